"""Personal data in text: what has a shape that ordinary prose hasn't.

Names and addresses have none, and aren't looked for. Each pattern is confirmed by a rule of its
own: a checksum, a registry of number plans, a range of addresses.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

KINDS = ("email", "phone", "card", "iban", "ip")

# Without one of these signs no pattern below can match; most texts are done with here.
_NUMBERS = re.compile(r"\d(?:[ \t.()/:-]{0,2}\d){5}|\d\.\d{1,3}\.\d|:[0-9a-fA-F]{0,4}:")

# A domain that RFC 2606 and RFC 6761 keep for examples belongs to nobody.
_EMAIL = re.compile(
    r"(?<![\w.%+-])[\w%+-][\w.%+-]{0,63}@(?!example\.)(?:[a-z0-9-]{1,63}\.){1,8}"
    r"(?!(?:example|invalid|test|localhost|png|jpe?g|gif|svg|webp)\b)[a-z]{2,24}(?![\w-])",
    re.ASCII | re.IGNORECASE,
)
_EXAMPLE_DOMAIN = re.compile(r"(?:@|\.)example\.(?:com|net|org)\Z", re.IGNORECASE)
_INTERNATIONAL = re.compile(r"(?<![\w+])\+[1-9](?:[ \t().-]{0,2}\d){6,14}(?!\d)")
# As they are written in North America; other national forms look like any other number.
_NORTH_AMERICAN = re.compile(
    r"(?<![\w.+/-])(?:\([2-9]\d{2}\) ?|[2-9]\d{2}([-. ]))[2-9]\d{2}(?(1)\1|-)\d{4}(?![\w/-]|\.\d)"
)
_CARD = re.compile(
    r"(?<![\w.,+-])(?:\d{13,16}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}|\d{4}([ -])\d{6}\2\d{5})"
    r"(?![\w-]|[.,]\d)"
)
# Visa, Mastercard, American Express, Discover, JCB: how the numbers start, and how long they are.
_CARD_PLANS = re.compile(
    r"4(?:\d{12}|\d{15})|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"
    r"|3[47]\d{13}|(?:6011|64[4-9]\d|65\d\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}"
)
_IBAN = re.compile(r"(?<![A-Z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
_IBAN_LENGTHS = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 "
    "EE20 EG29 ES24 FI18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 "
    "IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MR27 MT31 MU30 "
    "NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SE24 SI19 SK24 SM27 ST25 SV28 TL23 "
    "TN24 TR26 UA29 VA22 VG24 XK20"
)
_IP4 = re.compile(r"(?<![\w.-])\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\d)", re.ASCII)
_IP6 = re.compile(r"(?<![\w:.])[23][0-9a-f]{3}(?::[0-9a-f]{0,4}){3,7}(?![\w:])", re.IGNORECASE)


def personal_data(text: str) -> Iterator[tuple[str, int, str]]:
    """Kind, offset and value of everything found in a text."""
    if "@" not in text and not _NUMBERS.search(text):
        return
    for kind, pattern, confirmed in _PATTERNS:
        for found in pattern.finditer(text):
            if confirmed(found[0]):
                yield kind, found.start(), found[0]


def _is_email(value: str) -> bool:
    return not _EXAMPLE_DOMAIN.search(value)


def _is_phone(value: str) -> bool:
    import phonenumbers

    try:
        number = phonenumbers.parse(value, None if value.startswith("+") else "US")
    except phonenumbers.NumberParseException:
        return False
    return bool(phonenumbers.is_valid_number(number))


def _is_card(value: str) -> bool:
    digits = "".join(re.findall(r"\d", value))
    if not _CARD_PLANS.fullmatch(digits):
        return False
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return sum(number - 9 * (number > 9) for number in doubled) % 10 == 0


def _is_iban(value: str) -> bool:
    code = value.replace(" ", "")
    if _iban_lengths().get(code[:2]) != len(code):
        return False
    return int("".join(str(int(sign, 36)) for sign in code[4:] + code[:4])) % 97 == 1


@cache
def _iban_lengths() -> dict[str, int]:
    return {entry[:2]: int(entry[2:]) for entry in _IBAN_LENGTHS.split()}


def _is_public_ip(value: str) -> bool:
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        return False
    # Numbers of versions and of sections have four small parts as well.
    small = address.version == 4 and max(address.packed) < 32
    return address.is_global and not address.is_multicast and not small


_PATTERNS: tuple[tuple[str, re.Pattern[str], Callable[[Any], bool]], ...] = (
    ("email", _EMAIL, _is_email),
    ("phone", _INTERNATIONAL, _is_phone),
    ("phone", _NORTH_AMERICAN, _is_phone),
    ("card", _CARD, _is_card),
    ("iban", _IBAN, _is_iban),
    ("ip", _IP4, _is_public_ip),
    ("ip", _IP6, _is_public_ip),
)

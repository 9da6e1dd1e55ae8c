"""Personal data in text: what has a shape that ordinary prose hasn't.

Names and addresses have none, and aren't looked for. Each pattern is confirmed by a rule of its
own: a checksum, a registry of number plans, a range of addresses.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

KINDS = ("email", "phone", "card", "iban", "ip", "ssn", "tax-id")

# Without one of these signs no pattern below can match; most texts are done with here.
_NUMBERS = re.compile(
    r"\d(?:[ \t.()/:-]{0,2}\d){5}|\d\.\d{1,3}\.\d|:[0-9a-fA-F]{0,4}:|[A-Z]{6}\d\d[A-Z]"
)

# A domain that RFC 2606 and RFC 6761 keep for examples belongs to nobody. What a colon and a path
# follow is a place that git copies from.
_EMAIL = re.compile(
    r"(?<![\w.%+-])[\w%+-][\w.%+-]{0,63}@(?!example\.)(?:[a-z0-9-]{1,63}\.){1,8}"
    r"(?!(?:example|invalid|test|localhost|png|jpe?g|gif|svg|webp)\b)[a-z]{2,24}"
    r"(?![\w-]|:[\w~.-]+/)",
    re.ASCII | re.IGNORECASE,
)
_EXAMPLE_DOMAIN = re.compile(r"(?:@|\.)example\.(?:com|net|org)\Z", re.IGNORECASE)
_INTERNATIONAL = re.compile(r"(?<![\w+])\+[1-9](?:[ \t().-]{0,2}\d){6,14}(?!\d)")
_NORTH_AMERICAN = re.compile(
    r"(?<![\w.+/-])(?:\([2-9]\d{2}\) ?|[2-9]\d{2}([-. ]))[2-9]\d{2}(?(1)\1|-)\d{4}(?![\w/-]|\.\d)"
)
# As they are written elsewhere: with a nought in front and in groups, or behind a word.
_NATIONAL = re.compile(
    r"(?<![\w.,+/:-])\(?0\d{1,5}\)?[ /.-]{1,2}\d{2,8}(?:[ .-]\d{1,5}){0,4}(?![\w/-]|[.,:]\d)"
)
_CALLED = re.compile(
    r"(?:phone|mobile|cell|whatsapp|call(?: me| us)?(?: at| on)?|tel(?:e[fp]h?on[eo]?)?|handy"
    r"|m[oó]vil|fax|ruf(?: an)?|t[eé]l[eé]phone)\.?"
    r"(?: ?(?:no|nr|number|nummer|is|ist|es|est|:)\.?){0,2}[ \t]{0,2}"
    r"(\(?\d(?:[ ./()-]{0,2}\d){7,12})(?![\w-]|[.,:]\d)",
    re.IGNORECASE,
)
_DATE = re.compile(r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}(?:\D|\Z)")
_REGIONS = "US GB DE FR ES IT NL BE AT CH IN AU BR MX JP"
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
# Tax and social insurance numbers whose shape says what they are, and those that need a word.
_SSN = re.compile(r"(?<![\w.,-])\d{3}([- ])\d{2}\1\d{4}(?![\w-]|[.,]\d)")
_CODICE_FISCALE = re.compile(r"(?<!\w)[A-Z]{6}\d{2}[A-Z]\d{2}[A-Z]\d{3}[A-Z](?!\w)")
_DNI = re.compile(r"(?<![\w-])(?:\d{8}|[XYZ]-?\d{7})-?[A-Z](?![\w-])")
_CPF = re.compile(r"(?<![\w.-])\d{3}\.\d{3}\.\d{3}-\d{2}(?![\w-])")
_NINO = re.compile(r"(?<!\w)[A-CEGHJ-PR-TW-Z]{2}([ ]?)\d{2}\1\d{2}\1\d{2}\1[A-D](?!\w)")
_TAX_WORD = (
    r"(?:tax(?:payer)?[ -]?(?:id(?:entification)?|no|number|file number)|social security"
    r"|steuer(?:liche)?[ -]?id\w*|steuer[ -]?(?:nr|nummer)|\bid[ -]?nr\b|num[eé]ro fiscal"
    r"|\b(?:T[FI]N|EIN|PAN|SSN|ITIN|NIF|UTR|BSN|SIN|PESEL|CPF)\b)"
)
_NAMED_TAX_ID = re.compile(
    _TAX_WORD + r"(?: ?(?:no|nr|number|nummer|is|ist|#|:|\()\.?){0,3}[ \t]{0,2}"
    r"([A-Z]{0,5}\d(?:[ ./-]?\d){3,12}[A-Z]?)(?![\w-])",
    re.IGNORECASE,
)
_IP4 = re.compile(r"(?<![\w.-])\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\d)", re.ASCII)
_IP6 = re.compile(r"(?<![\w:.])[23][0-9a-f]{3}(?::[0-9a-f]{0,4}){3,7}(?![\w:])", re.IGNORECASE)


def personal_data(text: str) -> Iterator[tuple[str, int, str]]:
    """Kind, offset and value of everything found in a text."""
    if "@" not in text and not _NUMBERS.search(text):
        return
    seen: set[int] = set()
    lowered = text.lower()
    capitals = lowered != text
    for kind, pattern, confirmed in _PATTERNS:
        words, needs_capitals = _NEEDED.get(pattern, ((), False))
        if (needs_capitals and not capitals) or (words and not any(w in lowered for w in words)):
            continue
        group = 1 if words else 0
        for found in pattern.finditer(text):
            if found.end() not in seen and confirmed(found[group]):
                seen.add(found.end())
                yield kind, found.start(group), found[group]


def _is_phone(value: str) -> bool:
    return _is_phone_of(value, (None if value.startswith("+") else "US",))


def _is_national_phone(value: str) -> bool:
    if _DATE.match(value) or (value.isdigit() and len(value) < 9):
        return False
    return _is_phone_of(value, _REGIONS.split())


def _is_phone_of(value: str, regions: Sequence[str | None]) -> bool:
    import phonenumbers

    for region in regions:
        try:
            if phonenumbers.is_valid_number(phonenumbers.parse(value, region)):
                return True
        except phonenumbers.NumberParseException:
            continue
    return False


def _is_card(value: str) -> bool:
    from stdnum import luhn

    digits = "".join(re.findall(r"\d", value))
    return bool(_CARD_PLANS.fullmatch(digits) and luhn.is_valid(digits))


def _valid_by(*modules: str, **options: bool) -> Callable[[str], bool]:
    """Whether one of these modules of stdnum takes a value; each is imported by the first value."""
    return lambda value: any(
        import_module(f"stdnum.{one}").is_valid(value, **options) for one in modules
    )


def _is_public_ip(value: str) -> bool:
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        return False
    # Numbers of versions and of sections have four small parts as well.
    small = address.version == 4 and max(address.packed) < 32
    return address.is_global and not address.is_multicast and not small


_PATTERNS: tuple[tuple[str, re.Pattern[str], Callable[[Any], bool]], ...] = (
    ("email", _EMAIL, lambda value: not _EXAMPLE_DOMAIN.search(value)),
    ("ssn", _SSN, lambda value: _valid_by("us.ssn")(value.replace(" ", "-"))),
    ("tax-id", _CPF, _valid_by("br.cpf")),
    ("tax-id", _CODICE_FISCALE, _valid_by("it.codicefiscale")),
    ("tax-id", _DNI, _valid_by("es.dni", "es.nie")),
    ("tax-id", _NINO, lambda _: True),
    # What a word calls a tax number is one, if it is as long as they are.
    ("tax-id", _NAMED_TAX_ID, lambda value: len(re.findall(r"\w", value)) >= 8),
    ("phone", _INTERNATIONAL, _is_phone),
    ("phone", _NORTH_AMERICAN, _is_phone),
    ("phone", _NATIONAL, _is_national_phone),
    ("phone", _CALLED, _is_national_phone),
    ("card", _CARD, _is_card),
    ("iban", _IBAN, _valid_by("iban", check_country=False)),
    ("ip", _IP4, _is_public_ip),
    ("ip", _IP6, _is_public_ip),
)
# What a text must have for a pattern to be worth trying: one of some words, or a capital letter.
_CALL_WORDS = ("phon", "fon", "tel", "mobil", "móvil", "movil", "cell", "whatsapp", "call")
_TAX_WORDS = ("tax", "tin", "tfn", "ein", "pan", "ssn", "social", "steuer", "id", "nif", "utr")
_NEEDED: dict[re.Pattern[str], tuple[tuple[str, ...], bool]] = {
    _CALLED: ((*_CALL_WORDS, "handy", "fax", "ruf"), False),
    _NAMED_TAX_ID: ((*_TAX_WORDS, "bsn", "sin", "pesel", "fiscal", "cpf"), False),
    **dict.fromkeys((_CODICE_FISCALE, _DNI, _NINO, _IBAN), ((), True)),
}

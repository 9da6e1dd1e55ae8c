"""What must not leave this machine unseen: secrets and personal data in a folder to be pushed.

Every text file and every string in every Parquet file is read: rows, prompt, recipe, card. A
secret blocks until it is taken out, or allowed by its key; personal data may be allowed by its
kind as well (`KINDS`).

Secrets are found by Kingfisher, which knows the keys of several hundred services. It is run on a
private temporary file: it validates nothing, asks for no update and opens no connection. Rules of
our own find what it leaves out, and the values of this machine's own keys. Personal data is found
where it has a shape that ordinary prose hasn't: names and addresses have none, and aren't looked
for. Each pattern is confirmed by a checksum, a registry of number plans, or a range of addresses.
"""

import ipaddress
import json
import math
import os
import re
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib import import_module
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import ScreeningError
from distill_datasets.parquet import read_batches

if TYPE_CHECKING:
    import pyarrow as pa

_PAGE_SIGNS = 16_000_000
_PAGE_TEXTS = 200_000
_MOST_OF_A_KIND = 1_000
_MOST_SHOWN = 20
_SKIPPED_COLUMNS = ("id", "digest")  # digests of ours: they hold nothing that could be read


@dataclass(frozen=True)
class Finding:
    """One value that was found, in one place or several.

    `where` names the first place, `excerpt` shows no more than the start of the value, and `key`
    is what allows it: the same in every run.
    """

    kind: str
    where: str
    excerpt: str
    key: str
    places: int = 1

    @property
    def secret(self) -> bool:
        """Whether it opens something, rather than being about somebody."""
        return self.kind not in KINDS


@dataclass(frozen=True, slots=True)
class _Text:
    """A cell of a row, or some lines of a file from `line` on."""

    text: str
    file: str
    row: str = ""
    column: str = ""
    line: int = 0

    def where(self, sign: int) -> str:
        if self.column:
            return f"{self.file}, row {self.row}, column {self.column}"
        line = self.line + self.text.count("\n", 0, sign)
        return f"{self.file}, line {line}"


def screen(folder: Path | str) -> list[Finding]:
    """Everything in a folder's files that looks like a secret or like personal data.

    Reads a few megabytes at a time. Secrets come first. Of one kind the first thousand values
    are told apart; those after them share one finding. Raises `ScreeningError` where the
    scanner can't be run.
    """
    found = _Found()
    for page in _pages(_texts(Path(folder))):
        found.add(page)
    return found.listed()


def require_clean(findings: Collection[Finding], allow: Collection[str] = ()) -> None:
    """Raise `ScreeningError` that lists what was found, unless all of it is allowed.

    `allow` holds keys of findings, and kinds of personal data.
    """
    kinds = set(allow) & set(KINDS)
    left = [one for one in findings if one.kind not in kinds and one.key not in allow]
    if not left:
        return
    shown = [_line(finding) for finding in left[:_MOST_SHOWN]]
    if len(left) > _MOST_SHOWN:
        shown.append(f"and {len(left) - _MOST_SHOWN} more")
    by_kind = sorted({one.kind for one in left if not one.secret})
    hint = f", or all of a kind: {' '.join(f'--allow {kind}' for kind in by_kind)}"
    raise ScreeningError(
        "Nothing was sent, because this would have gone with it:\n  "
        + "\n  ".join(shown)
        + "\nTake it out, and revoke secrets that others may have seen. What is meant to be "
        f"read by others can be allowed: --allow KEY{hint if by_kind else ''}."
    )


def _line(finding: Finding) -> str:
    more = f" and {finding.places - 1:,} more places" if finding.places > 1 else ""
    what = f"secret ({finding.kind})" if finding.secret else finding.kind
    key = f"  [--allow {finding.key}]" if finding.key else ""
    return f"{what}: {finding.excerpt} in {finding.where}{more}{key}"


class _Found:
    """Findings by their keys; no more than a bounded number of them."""

    def __init__(self) -> None:
        self._findings: dict[str, Finding] = {}
        self._distinct: Counter[str] = Counter()
        self._own = own_keys()

    def add(self, page: Sequence[_Text]) -> None:
        """Look through some texts."""
        text = "\n".join(part.text for part in page)
        starts = [0, *accumulate(len(part.text) + 1 for part in page[:-1])]
        hits = list(scanned(text))
        lines = [0, *(found.end() for found in re.finditer("\n", text))] if hits else []
        own = (
            (f"the value of {name}", found.start(), value)
            for name, value in self._own.items()
            for found in re.finditer(re.escape(value), text)
        )
        secrets = ((kind, lines[line - 1], value) for kind, line, value in hits)
        for kind, sign, value in chain(secrets, matched(text), own):
            place = bisect_right(starts, sign) - 1
            self._note(kind, value, page[place].where(sign - starts[place]))
        for part in page:
            for kind, sign, value in personal_data(part.text):
                self._note(kind, value, part.where(sign))

    def listed(self) -> list[Finding]:
        return sorted(self._findings.values(), key=lambda one: not one.secret)

    def _note(self, kind: str, value: str, where: str) -> None:
        key = sha256(value.encode()).hexdigest()[:12]
        if key not in self._findings and self._distinct[kind] >= _MOST_OF_A_KIND:
            # Those can be allowed by their kind only, and secrets not at all.
            key = kind if kind in KINDS else ""
        known = self._findings.get(key)
        if known is None:
            self._distinct[kind] += 1
            # At most four signs and at most a quarter of a value, and how long it is.
            shown = f"{value[: min(4, len(value) // 4)]}… ({len(value)} characters)"
            self._findings[key] = Finding(kind, where, shown, key)
        elif where != known.where:
            self._findings[key] = replace(known, places=known.places + 1)


def _pages(texts: Iterable[_Text]) -> Iterator[list[_Text]]:
    """Texts gathered to what is worth one look; of equal cells in a page only the first."""
    page: list[_Text] = []
    seen: set[str] = set()
    signs = 0
    for text in texts:
        if text.column and text.text in seen:
            continue
        seen.add(text.text)
        page.append(text)
        signs += len(text.text)
        if signs >= _PAGE_SIGNS or len(page) >= _PAGE_TEXTS:
            yield page
            page, seen, signs = [], set(), 0
    if page:
        yield page


def _texts(folder: Path) -> Iterator[_Text]:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        yield from _cells(path, name) if path.suffix == ".parquet" else _lines(path, name)


def _lines(path: Path, name: str) -> Iterator[_Text]:
    """A text file, some lines at a time; a file with a zero byte near its start isn't one."""
    with path.open("rb") as file:
        if b"\0" in file.read(8_192):
            return
        file.seek(0)
        first = 1
        while block := b"".join(file.readlines(1_000_000)):
            text = block.decode(encoding="utf-8", errors="replace")
            yield _Text(text, name, line=first)
            first += text.count("\n")


def _cells(path: Path, name: str) -> Iterator[_Text]:
    import pyarrow as pa

    first = 0
    for batch in read_batches(path):
        rows = pa.Table.from_batches([batch])
        numbers = list(range(first, first + len(rows)))
        ids = rows["id"].to_pylist() if "id" in rows.column_names else numbers
        for column in rows.column_names:
            if column not in _SKIPPED_COLUMNS:
                for row, text in _strings(rows[column].combine_chunks(), ids):
                    yield _Text(text, name, str(row), column)
        first += len(rows)


def _strings(values: "pa.Array", rows: Sequence[object]) -> Iterator[tuple[object, str]]:
    """Every string in a column, however nested, with its row."""
    import pyarrow.compute as pc
    from pyarrow import types

    if types.is_string(values.type) or types.is_large_string(values.type):
        yield from ((row, text) for row, text in zip(rows, values.to_pylist(), strict=True) if text)
    elif types.is_struct(values.type):
        for field_number in range(values.type.num_fields):
            yield from _strings(pc.struct_field(values, [field_number]), rows)
    elif types.is_list(values.type) or types.is_large_list(values.type):
        owners = pc.list_parent_indices(values).to_pylist()
        yield from _strings(pc.list_flatten(values), [rows[owner] for owner in owners])
    elif types.is_dictionary(values.type):
        yield from _strings(values.dictionary_decode(), rows)


_OPTIONS = (
    "--no-validate",
    "--no-update-check",
    "--no-ignore",  # a comment in a row can't allow itself
    "--no-dedup",
    "--format=jsonl",
)
_CLEAN, _FOUND = (0,), (200, 205)  # its exit codes
_NOT_IN_KEYS = bytes.maketrans(b"()[]{}<>*|,!?", b" " * 13)
_SENTENCE_END = re.compile(rb"\.(?=\s|\Z)|(?<=[\w-]{16}):(?=\s)")
# Values that have a shape of their own, wherever they stand.
_SHAPES = {
    "tinker-api-key": r"tml-[A-Za-z0-9_-]{24,}",
    "aws-access-key-id": r"A(?<![A-Za-z0-9]A)(?:KIA|SIA)[A-Z0-9]{16}(?![A-Za-z0-9])",
    "telegram-bot-token": r"(?<![\w:/-])\d{8,10}:[A-Za-z0-9_-]{35}(?![\w-])",
    "discord-webhook": r"discord(?:app)?\.com/api/(?:v\d+/)?webhooks/\d{15,21}/[\w-]{30,}",
}
_URL_USER = re.compile(r"(?<=://)[^\s/:@'\"<>{}$*]{1,80}:[^\s/:@'\"<>{}$*]{3,200}(?=@\w)")
_AUTHORIZATION = re.compile(
    r"authorization[\"'`]?\s{0,3}[:=]\s{0,3}[\"'`]?(?:bearer|basic|token)\s{1,3}"
    r"([A-Za-z0-9._~+/=-]{8,2000})",
    re.ASCII | re.IGNORECASE,
)
_PASSWORD = re.compile(
    r"(?:pass(?:word|wort|wd|phrase)|contraseña|mot de passe)[\"'`*]{0,3}"
    r"\s{0,3}(?:is\s{1,3}|ist\s{1,3}|=>|:=|[:=])\s{0,3}[\"'`]?([^\s\"'`<>{}()$,;|]{6,100})",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"your|example|placeholder|change.?me|redacted|secret|user(?:name)?:pass|x{4}|\*{3}|\.{3}", re.I
)
# The names of keys in the environment, and how long a value is at least.
_OWN_KEYS = re.compile(r"(?:^|_)(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
_OWN_LENGTH = 8
# A value is only suspicious behind a word such as these; long random names are common elsewhere.
_ASSIGNED = re.compile(
    r"(?:api[_-]?key|access[_-]?key|secret|token|passw(?:or)?d|passwd|credentials?)[\w-]{0,20}"
    r"[\"'`]?\s{0,3}(?::=|=>|[:=])\s{0,3}[\"'`]?([A-Za-z0-9+/_.~!@#$%^&*=-]{10,200})",
    re.ASCII | re.IGNORECASE,
)
_RANDOM_BITS = 3.0  # a sign, in a part of ten signs or more
_SAME_CLASS = re.compile(r"[a-z]+|[A-Z]+|[0-9]+")
_RANDOM_CHANGES = 0.25  # a sign, between small letters, capitals and digits


def scanned(text: str) -> Iterator[tuple[str, int, str]]:
    """Rule, line (from 1) and value of what the scanner finds; the surest rule comes first."""
    with tempfile.TemporaryDirectory(prefix="distill-screening-") as folder:
        file = Path(folder) / "text.txt"
        # Without signs that no key has, in the same lines: the scanner's rules are made for code,
        # and miss a key that a comma, a bracket, a full stop or a letter beyond ASCII follows.
        plain = text.encode("ascii", "replace").translate(_NOT_IN_KEYS)
        file.write_bytes(_SENTENCE_END.sub(b" ", plain))
        report = _scan(file)
    found = [json.loads(line) for line in report.splitlines() if line.startswith("{")]
    hits = [(one["rule"]["name"], one["finding"]) for one in found if "finding" in one]
    hits.sort(key=lambda hit: hit[1]["confidence"] != "high")
    for rule, hit in hits:
        yield rule.removeprefix("secrets/"), int(hit["line"]), hit["snippet"]


def matched(text: str) -> Iterator[tuple[str, int, str]]:
    """Rule, offset and value of what the scanner leaves out."""
    for rule, pattern, likely in _RULES:
        for found in pattern.finditer(text):
            group = pattern.groups
            value = found[group].rstrip(".:!?") if rule == "password" else found[group]
            if likely(value):
                yield rule, found.start(group), value


def own_keys() -> dict[str, str]:
    """The keys that this machine uses, by where they come from.

    That is the environment's variables whose names say so, and the Hub's token.
    """
    from huggingface_hub import get_token

    found = {name: value for name, value in os.environ.items() if _OWN_KEYS.search(name)}
    token = None
    with suppress(ValueError, OSError):
        token = get_token()
    found |= {"the Hub's token": token} if token else {}
    trimmed = {name: value.strip().strip("\"'“”‘’") for name, value in found.items()}
    return {name: value for name, value in trimmed.items() if len(value) >= _OWN_LENGTH}


def _scan(file: Path) -> str:
    try:
        from kingfisher import get_binary_path

        command = [get_binary_path(), "scan", str(file), *_OPTIONS]
        run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    except (ImportError, OSError) as error:
        raise ScreeningError(
            f"The scanner for secrets can't be run ({error}), so nothing was sent. Install it: "
            "pip install kingfisher-bin"
        ) from error
    if run.returncode not in (*_CLEAN, *_FOUND):
        said = run.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise ScreeningError(
            f"The scanner for secrets failed with code {run.returncode}, so nothing was sent: "
            f"{said[0]}"
        )
    return run.stdout


def _is_unlike_words(value: str) -> bool:
    """Whether a value is more than letters and hyphens, and no stand-in for one."""
    mixed = re.search(r"[A-Za-z]", value) and re.search(r"[^A-Za-z_-]", value)
    return bool(mixed) and not _PLACEHOLDER.search(value)


def _is_random(value: str) -> bool:
    """Whether one part of a value mixes small letters, capitals and digits as no word does."""
    return any(
        len(part) >= 10
        and _bits(part) >= _RANDOM_BITS
        and len(_SAME_CLASS.findall(part)) - 1 >= _RANDOM_CHANGES * len(part)
        for part in re.split(r"[-_./]", value)
    )


def _bits(text: str) -> float:
    shares = [count / len(text) for count in Counter(text).values()]
    return -sum(share * math.log2(share) for share in shares)


_RULES: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    *((rule, re.compile(shape, re.ASCII), lambda _: True) for rule, shape in _SHAPES.items()),
    ("url-credentials", _URL_USER, lambda value: not _PLACEHOLDER.search(value)),
    ("authorization-header", _AUTHORIZATION, _is_unlike_words),
    ("password", _PASSWORD, lambda value: len(value) >= 6 and _is_unlike_words(value)),
    ("assigned-secret", _ASSIGNED, _is_random),
)


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

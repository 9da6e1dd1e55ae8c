"""Secrets in text: a scanner that knows the keys of several hundred services, and a few rules more.

The scanner is Kingfisher, run on a private temporary file: it validates nothing, asks for no
update and opens no connection. The rules find what it leaves out, and the values of this
machine's own keys.
"""

import json
import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from distill_datasets.errors import ScreeningError

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
        file.write_bytes(_without_prose(text))
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


def _without_prose(text: str) -> bytes:
    """The text with signs that no key has as spaces, its lines as they were.

    The scanner's rules are made for code: they miss a key that a comma, a bracket, a full stop
    or a letter beyond ASCII follows.
    """
    plain = text.encode("ascii", "replace").translate(_NOT_IN_KEYS)
    return _SENTENCE_END.sub(b" ", plain)


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


def _is_password(value: str) -> bool:
    return len(value) >= 6 and _is_unlike_words(value)


_RULES: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    *((rule, re.compile(shape, re.ASCII), lambda _: True) for rule, shape in _SHAPES.items()),
    ("url-credentials", _URL_USER, lambda value: not _PLACEHOLDER.search(value)),
    ("authorization-header", _AUTHORIZATION, _is_unlike_words),
    ("password", _PASSWORD, _is_password),
    ("assigned-secret", _ASSIGNED, _is_random),
)

"""Secrets in text: a scanner that knows the keys of several hundred services, and two rules more.

The scanner is Kingfisher, run on a private temporary file: it validates nothing, asks for no
update and opens no connection.
"""

import json
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
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
_TINKER_KEY = re.compile(r"tml-[A-Za-z0-9_-]{24,}")
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
    for found in _TINKER_KEY.finditer(text):
        yield "tinker-api-key", found.start(), found[0]
    for found in _ASSIGNED.finditer(text):
        if _is_random(found[1]):
            yield "assigned-secret", found.start(1), found[1]


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

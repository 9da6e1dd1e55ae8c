"""Reads lists and tables out of a model's free text, or says why it can't."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_FENCE = re.compile(r"^[ \t]*```[\w-]*[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_NUMBERED = re.compile(r"[ \t]*(\d{1,3})[.):][ \t]+(\S.*?)[ \t]*")
_HALF = re.compile("[\ud800-\udfff]")  # half of a character, which no file can hold
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Form(Generic[T]):
    """What a text should hold: in words, and as a function that gives None for anything else."""

    words: str
    read: Callable[[str], T | None]


def texts() -> Form[list[str]]:
    """A JSON list of strings, bare, fenced or in an object of its own; or numbered lines.

    An item may also be an object with one string in it.
    """

    def read(text: str) -> list[str] | None:
        found = _only(text, _strings)
        return _lines(text) if found is None else found

    return Form("a JSON list of strings", read)


def numbers(rows: int, highest: int) -> Form[list[tuple[int, ...] | None]]:
    """A JSON object that has, for each of 1 to `rows`, a list of numbers from 1 to `highest`.

    None stands for a null.
    """

    def fitting(value: Any) -> list[tuple[int, ...] | None] | None:
        if not isinstance(value, dict) or set(value) != {str(row) for row in range(1, rows + 1)}:
            return None
        found = [value[str(row)] for row in range(1, rows + 1)]
        if not all(one is None or _are_numbers(one, highest) for one in found):
            return None
        return [None if one is None else tuple(sorted(set(one))) for one in found]

    words = f"a JSON object with the keys 1 to {rows} and lists of numbers from 1 to {highest}"
    return Form(words, lambda text: _only(text, fitting))


def _only(text: str, fitting: Callable[[Any], T | None]) -> T | None:
    """The one value in a text that fits; two that differ would leave the choice to chance."""
    for part in (text, *reversed(_FENCE.findall(text))):
        try:
            value = json.loads(part)
        except ValueError:
            continue
        if (whole := fitting(value)) is not None:
            return whole
    found = [fit for value in _values(text) if (fit := fitting(value)) is not None]
    return found[0] if found and all(fit == found[0] for fit in found) else None


def _values(text: str) -> Iterator[Any]:
    """Every outermost JSON list and object in a text."""
    place = 0
    while match := re.compile(r"[\[{]").search(text, place):
        try:
            value, place = _DECODER.raw_decode(text, match.start())
            yield value
        except (ValueError, RecursionError):
            place = match.end()


def _strings(value: Any) -> list[str] | None:
    if isinstance(value, dict) and len(value) == 1:
        value = next(iter(value.values()))
    if not isinstance(value, list):
        return None
    found = [_string(item) for item in value]
    return None if None in found else [item for item in found if item is not None]


def _string(item: Any) -> str | None:
    if isinstance(item, dict) and len(item) == 1:
        item = next(iter(item.values()))
    return item.strip() if isinstance(item, str) and not _HALF.search(item) else None


def _lines(text: str) -> list[str] | None:
    """Lines numbered from 1 without a gap; what stands between them makes them ambiguous."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    matches = [_NUMBERED.fullmatch(line) for line in lines]
    first = next((place for place, match in enumerate(matches) if match), len(lines))
    numbered = [match for match in matches[first:] if match]
    right = [str(place) for place in range(1, len(numbered) + 1)]
    if first > 1 or not numbered or len(numbered) < len(lines) - first:
        return None
    return [match[2] for match in numbered] if [m[1] for m in numbered] == right else None


def _are_numbers(value: Any, highest: int) -> bool:
    return isinstance(value, list) and all(
        type(number) is int and 1 <= number <= highest for number in value
    )

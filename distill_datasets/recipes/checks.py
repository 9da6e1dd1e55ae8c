"""Checks of a recipe: whether a text does what the prompt demands."""

import json
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from distill_datasets.conversations import Call, split_calls
from distill_datasets.errors import RecipeError, nearest
from distill_datasets.recipes.parsing import find_all, fits_schema, read_json, value_text
from distill_datasets.recipes.sections import Check, Range
from distill_datasets.recipes.text_units import (
    count_bullets,
    count_characters,
    count_sentences,
    count_words,
    is_in_language,
)
from distill_datasets.recipes.tools import check_names

FAILED = "check: "  # and the name, as the reason of a rejection
_OF_REFERENCES = ("fields", "contains_reference")
_MINUS = "-−"


@dataclass(frozen=True)
class Said:
    """What checks look at: a text, why it ended, the answer read out of it, what is right.

    `has_tools` says whether the text may call tools.
    """

    text: str
    stop_reason: str | None = "stop"
    answer: str | None = None
    reference: str | None = None
    has_tools: bool = False

    @cached_property
    def _split(self) -> tuple[str, Sequence[Call] | None]:
        if not self.has_tools:
            return self.text, ()
        try:
            return split_calls(self.text)
        except (ValueError, RecursionError):
            return self.text, None

    @cached_property
    def words(self) -> str:
        """The text without its calls."""
        return unicodedata.normalize("NFC", self._split[0].strip())

    @property
    def called(self) -> set[str] | None:
        """The names of the tools that are called; None where the calls can't be read."""
        calls = self._split[1]
        return None if calls is None else {call.name for call in calls}


def validate_checks(
    checks: Sequence[Check],
    keep: str | Sequence[str],
    taken: Collection[str],
    *,
    has_tools: bool,
    has_references: bool,
) -> None:
    """Raise `ValueError` for names that are twice or `taken`, for a `keep` of no check, for checks
    of calls where there are no tools, and for those of references where there are none.
    """
    names = [check.name for check in checks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several checks are called {twice}: give each its own name")
    if known := sorted({*names} & {*taken}):
        raise ValueError(f"checks are called {known}, which are metrics: rename them")
    if unknown := [name for name in keep if name not in names] if keep != "all checks" else []:
        raise ValueError(
            f"keep names {unknown}; expected some of {names}, or 'all checks'."
            + nearest(unknown[0], names)
        )
    if keep == "all checks" and not names:
        raise ValueError("keep: all checks needs checks, and there is none")
    calling = [check.name for check in checks if check.kind in ("calls", "never_calls")]
    if calling and not has_tools:
        raise ValueError(f"the checks {calling} are about calls, and the recipe has no tools")
    referring = [check.name for check in checks if check.when or check.kind in _OF_REFERENCES]
    if referring and not has_references:
        raise ValueError(
            f"the checks {referring} look at the row's reference, and no row has one: name the "
            "column of the right answers as `queries.reference`, or leave those checks out"
        )


def check_tools(checks: Sequence[Check], tools: str) -> None:
    """Raise `RecipeError` for a check of a tool that isn't among the tools (JSON text)."""
    for check in checks:
        named = (check.calls if check.kind == "calls" else check.never_calls) or ()
        try:
            check_names(() if named is True else named, tools)
        except ValueError as error:
            raise RecipeError(f"The check {check.name!r}: {error}.") from error


def passes(check: Check, said: Said) -> bool | None:
    """Whether a text passes a check; None where the check says nothing of it.

    That is where `when` isn't found in the reference, where a check needs a reference and there is
    none, and where a text is too short to tell its language. What takes a pattern or a schema
    longer than a second doesn't pass.
    """
    try:
        if check.when is not None and not _found(check.when, said.reference or ""):
            return None
        return _KINDS[check.kind](getattr(check, check.kind), said)
    except TimeoutError:
        return False


def check_all(checks: Sequence[Check], said: Said) -> dict[str, bool | None]:
    """The result of each check, by its name."""
    return {check.name: passes(check, said) for check in checks}


def first_failure(checks: Sequence[Check], said: Said) -> str | None:
    """Why an answer that fails one of the checks is rejected; None where it fails none."""
    failed = (check.name for check in checks if passes(check, said) is False)
    return next((FAILED + name for name in failed), None)


def _found(pattern: str, text: str) -> bool:
    return next(find_all(pattern, text), None) is not None


def _counted(count: Callable[[str], int]) -> Callable[[Range, Said], bool]:
    def check(wanted: Range, said: Said) -> bool:
        found = count(said.words)
        return wanted.min <= found and (wanted.max is None or found <= wanted.max)

    return check


def _plain(text: str) -> str:
    """For comparing without upper and lower case."""
    return unicodedata.normalize("NFC", text).casefold()


def _occurring(texts: Sequence[str], said: Said) -> Iterator[bool]:
    words = said.words.casefold()
    return (_plain(text) in words for text in texts)


def _exact(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(unicodedata.normalize("NFC", text) for text in texts)


def _contains_reference(wanted: bool, said: Said) -> bool | None:
    """Whether the reference occurs as a whole: 7 occurs neither in 17 nor in 7.5 nor in -7."""
    reference, text = _plain(said.reference or "").strip(), said.words.casefold()
    if not reference:
        return None
    start = text.find(reference)
    while start >= 0:
        if _stands_alone(text, start, start + len(reference)):
            return True
        start = text.find(reference, start + 1)
    return False


def _stands_alone(text: str, start: int, end: int) -> bool:
    before, after = text[max(0, start - 2) : start], text[end : end + 2]
    first, last = text[start], text[end - 1]
    if first.isdigit() and before:
        signed = before[-1] in _MINUS and not before[:-1].isalnum()
        if signed or (before[-1] in ".," and before[:-1].isdigit()):
            return False
    if last.isdigit() and after[:1] in (".", ",") and after[1:].isdigit():
        return False
    return not (_joined(before[-1:], first) or _joined(last, after[:1]))


def _joined(left: str, right: str) -> bool:
    """Whether two characters are of one word; scripts without spaces join none."""
    return left.isalnum() and right.isalnum() and max(left, right) < "\u2e80"


def _is_json(form: bool | dict[str, Any], said: Said) -> bool:
    try:
        value = read_json(said.words)
    except (ValueError, RecursionError):
        return form is False
    if isinstance(form, bool):
        return form
    return fits_schema(value, json.dumps(form))


def _fields_equal(names: Sequence[str], said: Said) -> bool | None:
    right = _structure(said.reference)
    if right is None:
        return None
    found = _structure(said.answer)
    if found is None:
        found = _structure(said.words)
    return found is not None and all(_part(found, name) == _part(right, name) for name in names)


def _structure(text: str | None) -> Any:
    """The object or list that a text is, as JSON or as `key: value; key: value`; else None."""
    with suppress(ValueError, RecursionError):
        value = read_json(text or "")
        return value if isinstance(value, dict | list) else None
    parts = [part.partition(":") for part in (text or "").split(";")]
    if len(parts) > 1 and all(key.strip() and colon for key, colon, _ in parts):
        return {key.strip(): value.strip() for key, _, value in parts}
    return None


def _part(value: Any, path: str) -> str | None:
    """The part at a path as text; None where there is no such part."""
    for name in path.split("."):
        if isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        elif isinstance(value, dict) and name in value:
            value = value[name]
        else:
            return None
    return value_text(value)


def field_share(answer: str | None, reference: str) -> float:
    """The share of the reference's values that the answer has in the same place.

    Both are JSON, or `key: value; key: value`. Of a reference that is neither an object nor a list:
    1 where the answer equals it, else 0.
    """
    right = _structure(reference)
    if not right:
        return float(answer == reference)
    found, values = dict(_leaves(_structure(answer))), dict(_leaves(right))
    return float(sum(found.get(path) == text for path, text in values.items()) / len(values))


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, str]]:
    """Every value that holds no other, with its path."""
    if not isinstance(value, dict | list) or not value:
        yield path, value_text(value)
        return
    for name, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(part, (*path, name))


def _in_language(codes: Sequence[str], said: Said) -> bool | None:
    return is_in_language(said.words, codes)


def _calls(names: Sequence[str], said: Said) -> bool:
    return said.called is not None and {*names} <= said.called


def _never_calls(names: bool | Sequence[str], said: Said) -> bool:
    called = said.called
    if called is None:
        return False
    return not called if isinstance(names, bool) else not called & {*names}


_KINDS: Mapping[str, Callable[[Any, Said], bool | None]] = {
    "matches": lambda pattern, said: _found(pattern, said.words),
    "not_matches": lambda pattern, said: not _found(pattern, said.words),
    "starts_with": lambda texts, said: said.words.startswith(_exact(texts)),
    "ends_with": lambda texts, said: said.words.endswith(_exact(texts)),
    "sentences": _counted(count_sentences),
    "words": _counted(count_words),
    "bullets": _counted(count_bullets),
    "characters": _counted(count_characters),
    "json_form": _is_json,
    "fields": _fields_equal,
    "contains": lambda texts, said: all(_occurring(texts, said)),
    "contains_any": lambda texts, said: any(_occurring(texts, said)),
    "contains_reference": _contains_reference,
    "never": lambda texts, said: not any(_occurring(texts, said)),
    "language": _in_language,
    "choices": lambda choices, said: said.answer in choices,
    "calls": _calls,
    "never_calls": _never_calls,
    "ends": lambda wanted, said: said.stop_reason == "stop",
}

"""Checks of a recipe: whether a text does what the prompt demands.

Sentences, words, bullet points and characters are counted as a reader would.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import regex

from distill_datasets.conversations import Call, split_calls
from distill_datasets.errors import RecipeError, nearest
from distill_datasets.recipes.parsing import find_all, fits_schema, read_json, value_text
from distill_datasets.recipes.sections import Check, Range
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


_MARKER = re.compile(
    r"^[ \t>]*(?:(?:[-*+•‣◦▪●○·–—]|\d{1,3}\.\)?|\(?(?:\d{1,3}|[A-Za-z])\))[ \t]+)+(?=\S)",
    re.MULTILINE,
)
_LEFT_OUT = re.compile(r"[\[(](?:\.{3}|…)[\])]")
_SPACED = re.compile(r"\.(?:[ \xa0]\.){2,}")
_BULLET = re.compile(r"^[ \t>]*[-*+•‣◦▪●○·–—][ \t]+\S", re.MULTILINE)
_RULE = re.compile(r"^[ \t]*([-*_])(?:[ \t]*\1){2,}[ \t]*$", re.MULTILINE)
_BLOCK = re.compile(r"\n[ \t]*\n")
_ONE_EACH = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\u30fc]")
_BETWEEN = re.compile(r"[\s\u2014\u2015]+")
_CLOSING = r"[\"'“”‘’»«›)\]}」』】〉》*_`~]*"
# What ends a sentence: some signs do so wherever they stand, others before white space alone.
_END = re.compile(
    rf"(?:[。！？｡]|．(?!\d))[。！？｡．…]*{_CLOSING}|[.!?…؟۔։।॥።။‽]+{_CLOSING}(?=\s|$)",
    re.MULTILINE,
)
_OPENING = re.compile(r"[\s\"'“‘«‹(\[{¿¡„「『*_`~>]*")
_LAST_WORD = re.compile(r"((?<!°)[\w'’.°-]*)\.$")
_PRONOUN = re.compile(r"(?:^|[^\w\s]\s+|\b[^\W\d_A-Z]\w*\s+)I\.$")
# After a single letter with a point: a name goes on, but not with one of these words.
_BEGINS = re.compile(
    r"(?:The|This|That|These|Those|There|It|He|She|They|We|You|I|In|On|At|As|An?|And|But|So|If|For"
    r"|Its|His|Her|My|Our|Your|Their|How|What|When|Where|Why|Who|Did|Do|Does|Is|Are|Was|Were|Can"
    r"|Could|Please|After|Then|However|No|Not|Yes)\b"
)
_INITIAL_NEXT = re.compile(r"[^\W\d_]\.")
_INITIAL = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")
_ORDINAL = re.compile(
    r"(?:Januar|Jänner|Februar|März|April|Mai|Juni|Juli|August|September|Oktober|November|Dezember)\b"
)
# What a point makes short: before a name or within a sentence; and before a number.
_SHORT = re.compile(
    r"""mrs? | ms | dr | prof | st | rev | hon | gen | col | maj | capt | lt | sgt | gov | sen |
    rep | pres | mt | ft | messrs | mme | mlle | sr | sra | srta | hr | fr | frl | dott | sig
    | skt | lic | ing | avv | dir | med | vs | cf | ca | approx | incl | excl | resp | bzw |
    evtl | ggf | vgl | inkl | zzgl | e\.g | i\.e | z\.b | d\.h | u\.a | v\.a | p\.ej | c\.-à-d
    | t\.ex | bl\.a | d\.v\.s | b\.v | т\.е | т\.к | г | ул | им | проф""",
    re.VERBOSE,
)
_BEFORE_A_NUMBER = re.compile(
    "n[o°]|nos|nr|op|vol|figs?|str|eq|sec|ch|chap|pp?|par|art|abs|kap|s|bd|ver|v|núm|n|tel|ext|ст|стр"
)
_NORWEGIAN = frozenset(("nb", "nn", "no"))
_LEAST_TO_TELL = 30  # bytes of letters
_LIKELY = 0.2
_AHEAD = 40  # characters around a sign that decide what it is


def count_characters(text: str) -> int:
    """Characters as a reader sees them: an emoji of several parts is one."""
    return len(regex.findall(r"\X", text.strip()))


def count_bullets(text: str) -> int:
    """Lines that begin with a bullet; numbered lines are none."""
    return len(_BULLET.findall(_RULE.sub("", text)))


def count_words(text: str) -> int:
    """What stands between white space or long dashes and has a letter or a digit.

    A Chinese or Japanese character is a word. Markers of lists are none.
    """
    text, signs = _ONE_EACH.subn(" ", _MARKER.sub("", text))
    return signs + sum(any(map(str.isalnum, piece)) for piece in _BETWEEN.split(text))


def count_sentences(text: str) -> int:
    """Sentences, by their signs and by what follows.

    A paragraph, and an item of a list, ends a sentence even without a sign. No end is a sign
    before a small letter, nor the point of a number, of an initial or of a common abbreviation.
    """
    whole = _SPACED.sub("…", _LEFT_OUT.sub("", _RULE.sub("\n\n", text)))
    marked = _MARKER.sub("\n\n", whole)
    return sum(map(_sentences, _BLOCK.split(marked)))


def _sentences(block: str) -> int:
    count, start = 0, 0
    for end in _END.finditer(block):
        if _goes_on(block, end):
            continue
        count += any(map(str.isalnum, block[start : end.end()]))
        start = end.end()
    return count + any(map(str.isalnum, block[start:]))


def _goes_on(block: str, end: re.Match[str]) -> bool:
    """Whether the sentence goes on after a sign that may end it."""
    opening = _OPENING.match(block, end.end())
    next_word = opening.end() if opening else end.end()
    rest = block[next_word : next_word + _AHEAD]
    if rest[:1].islower():
        return True
    if not end[0].startswith(".") or end[0].startswith(".."):
        return False
    before = block[max(0, end.start() - _AHEAD) : end.start() + 1]
    last = _LAST_WORD.search(before)
    if not last or not rest or _PRONOUN.search(before):
        return False
    return _abbreviates(last[1], rest)


def _abbreviates(word: str, rest: str) -> bool:
    """Whether a word before a point is short for another, given what follows."""
    plain = word.lower().lstrip("'’.-")
    if _SHORT.fullmatch(plain):
        return True
    if rest[:1].isdigit() and _BEFORE_A_NUMBER.fullmatch(plain):
        return True
    if plain.isdecimal():
        return len(plain) < 3 and _ORDINAL.match(rest) is not None
    if plain in ("a.m", "p.m") or not _INITIAL.fullmatch(word):
        return False
    letters = word[:1].isupper() or len(word) > 1
    return _INITIAL_NEXT.match(rest) is not None or (letters and not _BEGINS.match(rest))


def is_in_language(text: str, codes: Sequence[str]) -> bool | None:
    """Whether a text may well be in one of the languages; None where it is too short to tell.

    Of texts as short as a sentence close languages, such as Spanish and Portuguese, can pass for
    one another.
    """
    if not _can_tell(text):
        return None
    norwegian = _NORWEGIAN if _NORWEGIAN & {*codes} else ()
    likely: Mapping[str, float] = dict(_identifier().rank(text))
    return sum(likely.get(code, 0.0) for code in {*codes, *norwegian}) >= _LIKELY


def language_of(text: str) -> str | None:
    """The likeliest language of a text, as an ISO code; None where it is too short to tell."""
    return str(_identifier().classify(text)[0]) if _can_tell(text) else None


def _can_tell(text: str) -> bool:
    letters = "".join(filter(str.isalpha, text))
    return len(letters.encode(errors="replace")) >= _LEAST_TO_TELL


@cache
def _identifier() -> Any:
    # Its model is read when the first text comes.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


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
    "language": lambda codes, said: is_in_language(said.words, codes),
    "choices": lambda choices, said: said.answer in choices,
    "calls": lambda names, said: said.called is not None and {*names} <= said.called,
    "never_calls": lambda names, said: (
        said.called is not None
        and not (said.called if names is True else said.called.intersection(names))
    ),
    "ends": lambda wanted, said: said.stop_reason == "stop",
}

"""What the gate and the tests of residue look for in a text, and how a query is changed."""

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any

import regex

from distill_datasets.conversations import from_text, is_conversation_text, to_text
from distill_datasets.recipes.checks import Said, check_all
from distill_datasets.recipes.recipe import Recipe

_RUN, _RUN_WIDE, _LEAST_RUN = 40, 14, 8  # characters in a row that are told
_LARGEST = 200_000  # characters of a prompt that are looked for
_WIDE = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]")
_WORD = regex.compile(r"[\p{L}\p{M}]{4,}")
_FINAL = regex.compile(r"[.!?。！？؟।…]+\s*\Z")
_TAIL = 1200  # characters in which a loop shows
_LONGEST_UNIT = 400
_SHORT_UNIT = 30  # characters, which must come five times and not three
_LEAST_LOOP = 30  # characters
_BROKEN = {"Cc", "Cs", "Co", "Cn"}  # control, half of a pair, private and unassigned characters
_LONGER = 4  # times as long, or as short: no paraphrase


class Secret:
    """A prompt that nobody shall be told: finds what a text has of it, word for word.

    What the teacher says to everybody, its answers in `told`, is no secret.
    """

    def __init__(self, prompt: str, told: Sequence[str] = ()) -> None:
        """Upper and lower case and white space make no difference."""
        plain = _plain(prompt)[:_LARGEST]
        wide = 2 * len(_WIDE.findall(plain)) > len(plain)
        self.length = max(_LEAST_RUN, min(_RUN_WIDE if wide else _RUN, len(plain) // 2))
        self._runs = {*self._runs_of(plain)}
        self._runs -= {run for text in told for run in self._runs_of(_plain(text))}

    def _runs_of(self, plain: str) -> Iterator[str]:
        return (plain[at : at + self.length] for at in range(len(plain) - self.length + 1))

    def longest_run(self, text: str) -> str:
        """The longest part of a text that stands in the prompt; empty where all are short."""
        plain = _plain(text)
        longest, begin, end = "", 0, 0
        for at, run in enumerate(self._runs_of(plain)):
            if run not in self._runs:
                continue
            begin = begin if end == at - 1 and longest else at
            end = at
            longest = max(longest, plain[begin : at + self.length], key=len)
        return longest.strip()


def task_form(recipe: Recipe, others: Sequence[str]) -> Callable[[str, str], bool] | None:
    """Whether a text has the form of the task's answers; None where `others` have it too.

    The form is what the student's answers are read by, or the recipe's checks, all of them.
    """
    parts = recipe.parts

    def is_read(text: str, stop_reason: str) -> bool:
        answers = [(part, part.student_reader.read(text, stop_reason).answer) for part in parts]
        return any(answer not in (None, "[]" if part.tools else None) for part, answer in answers)

    def is_checked(text: str, stop_reason: str) -> bool:
        found = [
            {*check_all(part.checks, Said(text, stop_reason, text)).values()} for part in parts
        ]
        return any(True in results and False not in results for results in found)

    for form in (is_read, is_checked):
        if not any(form(text, "stop") for text in others):
            checked = form is is_read or any(part.checks for part in parts)
            return form if checked else None
    return None


def with_typing_errors(text: str) -> str:
    """A text in which about every sixth word, and one at least, has a letter too few or too many,
    or two in the wrong order. The same for the same text.
    """
    random = Random(text)
    words = list(_WORD.finditer(text))
    for word in sorted(
        random.sample(words, -(-len(words) // 6)), key=lambda one: one.start(), reverse=True
    ):
        at = random.randrange(word.start() + 1, word.end() - 1)
        two = text[at : at + 2]
        slip = random.choice((two[::-1], two[0], two[0] + two))
        text = text[:at] + slip + text[at + 2 :]
    return text


def reworded(text: str) -> str:
    """A text without capitals and final signs, its white space single spaces."""
    return _FINAL.sub("", " ".join(text.lower().split()))


def last_text(query: str) -> str:
    """A query's text, or that of its last user's message."""
    if not is_conversation_text(query):
        return query
    *_, last = (one["content"] for one in from_text(query) if one["role"] == "user")
    return str(last)


def is_paraphrase(text: str, other: str) -> bool:
    """Whether a text may say in other words what another does: it is no copy, and no essay.

    >>> is_paraphrase("Where has my parcel got to?", "Where is my parcel?")
    True
    >>> is_paraphrase("where is  my parcel", "Where is my parcel?")
    False
    """
    if reworded(text) in ("", reworded(other)):
        return False
    return len(other) / _LONGER <= len(text) <= len(other) * _LONGER


def changed_query(query: str, change: Callable[[str], str]) -> str:
    """A query with its text, or its last user's message, changed."""
    if not is_conversation_text(query):
        return change(query)
    messages = from_text(query)
    last = max(place for place, one in enumerate(messages) if one["role"] == "user")
    messages[last] = {**messages[last], "content": change(messages[last]["content"])}
    return to_text(messages)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def ends_in_a_loop(text: str) -> bool:
    """Whether a text ends with one piece again and again.

    >>> ends_in_a_loop("The answer is: " * 8), ends_in_a_loop("one, two, three, four")
    (True, False)
    """
    tail = text.rstrip()[-_TAIL:]
    for unit in range(1, min(_LONGEST_UNIT, len(tail) // 3) + 1):
        length = max(unit * (5 if unit <= _SHORT_UNIT else 3), _LEAST_LOOP)
        if length > len(tail) or tail[-1] != tail[-1 - unit]:
            continue
        piece = tail[-length:]
        if piece[unit:] == piece[:-unit] and any(sign.isalnum() for sign in piece[-unit:]):
            return True
    return False


def is_broken(text: str) -> bool:
    """Whether a text has control characters or such as no tokenizer should have made.

    >>> is_broken("a\\x00b"), is_broken("a\\tb\\n")
    (True, False)
    """
    return any(
        sign == "\ufffd" or (sign not in "\t\n\r" and unicodedata.category(sign) in _BROKEN)
        for sign in text
        if not sign.isprintable() or sign == "\ufffd"
    )


# What no good answer looks like, by the rule that says how many may.
ODD_PATTERNS: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "empty": lambda answer: not str(answer["text"] or "").strip(),
    "cut_off": lambda answer: answer.get("stop_reason") == "length",
    "loops": lambda answer: ends_in_a_loop(str(answer["text"] or "")),
    "non_printing": lambda answer: is_broken(str(answer["text"] or "")),
}

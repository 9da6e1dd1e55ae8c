"""What a reader of a report must know first: each failure, or surprise, by its name."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill_datasets.tables import one_line

_ALIKE = 0.95  # of all rows: a system that says one thing
_VARIED = 0.8  # of all rows: less is no one thing
_FEW = 5  # rows of which nothing is said
_OPENING = 5  # words
_COPIED, _LABELLED = 0.5, 0.1  # of all rows
_LEAST_COPIED = 3  # words that are the same by chance
_MOST_LABELS = 200
_SHOWN = 60  # characters of a text


@dataclass(frozen=True)
class SystemRows:
    """What a system said, row by row, and what it was read as; None where it can't be read."""

    texts: Sequence[str]
    answers: Sequence[str | None]


def find_alerts(
    systems: Mapping[str, SystemRows],
    queries: Sequence[str],
    references: Sequence[str | None],
    verdict: Mapping[str, Any] | None = None,
) -> list[str]:
    """A sentence for each of: a collapsed student, right labels in a wrong format, a student that
    copies the query, one that is better than the teacher, a teacher that answers one thing.

    `systems` holds the rows of at least `teacher` and `student`; of `base` where it was asked,
    which may do alike. `queries` are readable texts, `references` what is right, where known. The
    `verdict`, of `verdict.decide`, says what is better.

        find_alerts({"teacher": ..., "student": ...}, queries, references, verdict)
    """
    found = [*_better(verdict)] if verdict else []
    if len(queries) < _FEW:
        return found
    teacher, student, base = systems["teacher"], systems["student"], systems.get("base")
    expected = [right or answer for right, answer in zip(references, teacher.answers, strict=True)]
    copied = [*_copies(student, teacher, queries)]
    return [
        *_collapsed(student, teacher, base, copies=bool(copied)),
        *_wrong_format(student, teacher, expected),
        *copied,
        *_one_answer(teacher),
        *found,
    ]


def _collapsed(
    student: SystemRows, teacher: SystemRows, base: SystemRows | None, *, copies: bool
) -> Iterator[str]:
    """One answer, the same words in any order or number, or the same opening of every text."""
    ways: list[tuple[str, Callable[[SystemRows], list[Any]]]] = [
        ("says the same", lambda rows: [_normal(text) for text in rows.texts]),
        ("gives the same answer", lambda rows: list(rows.answers)),
        ("says the same words", lambda rows: [frozenset(_words(text)) for text in rows.texts]),
        # Copies of queries that begin alike do so too.
        ("begins alike", lambda rows: [tuple(_words(text)[:_OPENING]) for text in rows.texts]),
    ]
    for what, of in ways[: -1 if copies else None]:
        share, example = _commonest(of(student), student)
        most = _ALIKE if what == "gives the same answer" else _VARIED
        unread = what == "gives the same answer" and not any(student.answers)
        if unread or share < _ALIKE or _commonest(of(teacher), teacher)[0] >= most:
            continue
        untrained = "; so does the base" if base and _commonest(of(base), base)[0] >= share else ""
        yield (
            f"Collapsed student: it {what} for {share:.0%} of the queries, like {_quoted(example)}"
            f"{untrained}. The teacher gives {len({*teacher.answers})} different answers."
        )
        return


def _one_answer(teacher: SystemRows) -> Iterator[str]:
    share, example = _commonest(list(teacher.answers), teacher)
    if share >= _ALIKE:
        yield (
            f"The teacher answers one thing: {_quoted(example)} to {share:.0%} of the queries. "
            "Any student that says it looks as good; add queries with other answers."
        )


def _wrong_format(
    student: SystemRows, teacher: SystemRows, expected: Sequence[str | None]
) -> Iterator[str]:
    """The right label, and no other, stands in a text that isn't read as it."""
    labels = Counter(label for label in expected if label)
    if len(labels) < 2 or len(labels) > min(_MOST_LABELS, len(expected) / 2):
        return
    longest = sorted(labels, key=len, reverse=True)
    pattern = re.compile(
        rf"(?<!\w)({'|'.join(re.escape(label) for label in longest)})(?!\w)", re.IGNORECASE
    )
    rows = _hidden(student, expected, pattern)
    if len(rows) < max(3, _LABELLED * len(expected)):
        return
    if len(_hidden(teacher, expected, pattern)) * 2 > len(rows):
        return
    yield (
        f"Right labels in a wrong format: in {len(rows)} of {len(expected)} rows the student's "
        f"text names the right label, but isn't read as it, like {_quoted(student.texts[rows[0]])} "
        f"for {expected[rows[0]]!r}. It knows more than its metrics say."
    )


def _hidden(
    rows: SystemRows, expected: Sequence[str | None], pattern: re.Pattern[str]
) -> list[int]:
    found = []
    for row, (text, answer, label) in enumerate(
        zip(rows.texts, rows.answers, expected, strict=True)
    ):
        if label and answer != label:
            named = {one.casefold() for one in pattern.findall(text)}
            if named == {label.casefold()}:
                found.append(row)
    return found


def _copies(student: SystemRows, teacher: SystemRows, queries: Sequence[str]) -> Iterator[str]:
    """The query stands in the text, or the text is a piece of the query."""
    mine, theirs = (
        [row for row, query in enumerate(queries) if _copied(rows.texts[row], query)]
        for rows in (student, teacher)
    )
    if len(mine) >= _COPIED * len(queries) and len(theirs) * 2 < len(mine):
        yield (
            f"Copies the query: the student's text repeats it in {len(mine)} of {len(queries)} "
            f"rows, like {_quoted(student.texts[mine[0]])}; the teacher's in {len(theirs)}."
        )


def _copied(text: str, query: str) -> bool:
    said, asked = _words(text), _words(query)
    if said == asked:
        return bool(said)
    shorter, longer = sorted((said, asked), key=len)
    if len(shorter) < _LEAST_COPIED:
        return False
    return f" {' '.join(shorter)} " in f" {' '.join(longer)} "


def _better(verdict: Mapping[str, Any]) -> Iterator[str]:
    if verdict["student_better"]:
        difference = verdict["difference"]
        yield (
            f"Better than the teacher: the student's {verdict['metric']} is "
            f"{verdict['student']:.3f}, the teacher's {verdict['teacher']:.3f}, a difference of "
            f"{difference['value']:+.3f} that isn't chance. The teacher's prompt can be improved, "
            "or the references fit what the student was trained on."
        )


def _commonest(values: Sequence[Any], rows: SystemRows) -> tuple[float, str]:
    """The share of the commonest value, and a text that has it."""
    value, times = Counter(values).most_common(1)[0]
    return times / len(values), rows.texts[values.index(value)]


def _normal(text: str) -> str:
    return " ".join(text.split())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _quoted(text: str) -> str:
    return repr(one_line(text, _SHOWN))

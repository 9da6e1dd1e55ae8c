"""May the student replace the prompt? Three outcomes, by a margin and what the rows can tell.

And what a reader of a report must know first, from the rows of its systems.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from math import ceil
from typing import Any

import numpy as np

from distill_datasets.conversations import readable
from distill_datasets.evaluation.comparison import STUDENT, TEACHER, Texts
from distill_datasets.evaluation.systems import SYSTEMS
from distill_datasets.recipes.checks import field_share
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.statistics import (
    Proportion,
    effective_rows,
    mcnemar,
    mean_difference,
    rows_needed,
    rows_needed_of_scores,
)
from distill_datasets.tables import one_line

REPLACES = "replaces the prompt"
DOES_NOT = "does not replace the prompt"
OPEN = "not enough evidence"

_ALIKE = 0.95  # of all rows: a system that says one thing
_VARIED = 0.8  # of all rows: less is no one thing
_FEW = 5  # rows of which nothing is said
_OPENING = 5  # words
_COPIED, _LABELLED = 0.5, 0.1  # of all rows
_LEAST_COPIED = 3  # words that are the same by chance
_MOST_LABELS = 200
_SHOWN = 60  # characters of a text
Values = list[float | None]
_AGAIN = SYSTEMS["teacher-again"]
_NEED_SECOND = (
    "Texts are compared with the teacher's, and only a second answer of the teacher says how near "
    "to them anybody comes: measure with --systems base teacher teacher-again student, or add "
    "references or checks."
)

_LEVEL = 0.9  # of both sides: each end alone is one-sided at 95 %
_GUESS = 0.05  # the discordance of rows that nobody has seen
_NEED_REFERENCES = ("accuracy", "field_match")
_APART = 0.5  # of two scores, where one of two systems counts as right alone


@dataclass(frozen=True)
class PairedRows:
    """What teacher and student reach on the same rows, by a metric that is a mean over rows.

    A value is 1 or True for right, 0 or False for wrong, or a score from 0 to 1; a row where
    either has None or NaN is left out. For an agreement with the teacher, `teacher` is how a second
    sample of the teacher agrees with the first.
    """

    metric: str
    ids: Sequence[str]
    groups: Sequence[str]
    teacher: Sequence[float | None]
    student: Sequence[float | None]


def main_metric(recipe: Recipe, references: Sequence[str | None]) -> str:
    """What a verdict is about: the first of the recipe's `metrics` that applies.

    `accuracy` and `field_match` apply where rows have references, and they and `agreement` where
    an answer has a form: a pattern, choices, a schema or tools. `macro_f1`, `ece` and `brier` are
    no means over rows, and babble is `answered` too. Without any it is `checks`, the share of the
    recipe's checks that a row passes, or `chrf` where there are none.
    """
    if all(part.has_form for part in recipe.parts):
        for name in recipe.metrics:
            if name == "agreement" or (name in _NEED_REFERENCES and any(references)):
                return name
    return "checks" if recipe.all_checks else "chrf"


def decide(rows: PairedRows, margin: float, *, trained_on: bool = False) -> dict[str, Any]:
    """The verdict: `outcome`, with what it is made of and the `rule` that decided.

    The student replaces the prompt where it is shown to be at most `margin` worse than the
    teacher, and does not where it is shown to be worse than that, each one-sided at 95 %: by the
    ends of the 90 % interval of the paired `difference`. `rows_needed` says how many more rows
    would decide, None where a million would not. Rows that the student was `trained_on` never show
    that it replaces the prompt. `only_teacher` and `only_student` are the ids of the rows where
    one is right alone, for scores where they are half a point apart.

        verdict = decide(PairedRows("accuracy", ids, groups, teacher, student), recipe.margin)
    """
    found: dict[str, Any] = {"outcome": OPEN, "metric": rows.metric, "margin": margin}
    both = np.array([rows.teacher, rows.student], np.float64)
    known = np.isfinite(both[0]) & np.isfinite(both[1])
    teacher, student = both[:, known]
    ids, groups = (list(compress(column, known)) for column in (rows.ids, rows.groups))
    if not ids:
        counted = {"rows": 0, "groups": 0, "only_teacher": [], "only_student": []}
        unknown = dict.fromkeys(["difference", "teacher", "student", "p"])
        rule = f"No row has a value of {rows.metric} for both teacher and student."
        found |= {**counted, **unknown, "rule": rule, "rows_needed": rows_needed(margin, _GUESS)}
        return {**found, "student_better": False}
    apart = student - teacher
    binary = bool(np.isin([teacher, student], (0.0, 1.0)).all())
    difference = _difference(student, teacher, groups, binary, _LEVEL)
    wide = _difference(student, teacher, groups, binary, 0.95)
    outcome, rule = _outcome(difference, margin, float(teacher.mean()))
    p = mcnemar(apart.tolist(), groups) if binary else None
    telling = outcome == OPEN and teacher.mean() > margin
    needed = _more_rows(apart, groups, margin, binary) if telling else None
    if telling and needed is None:
        rule += " It is so near that a million rows might not decide."
    if outcome == REPLACES and trained_on:
        outcome, rule = OPEN, "The student was trained on these very rows: measure on others."
    return {
        **found,
        "outcome": outcome,
        "difference": {**difference, "level": _LEVEL},
        "rule": rule,
        "rows_needed": needed,
        "only_teacher": [ids[row] for row in np.flatnonzero(apart <= -_APART).tolist()],
        "only_student": [ids[row] for row in np.flatnonzero(apart >= _APART).tolist()],
        "teacher": float(teacher.mean()),
        "student": float(student.mean()),
        "rows": len(ids),
        "groups": len(set(groups)),
        "p": p,
        "student_better": wide["low"] > 0 and (p is None or p < 0.05),
    }


def _difference(
    student: Any, teacher: Any, groups: Sequence[str], binary: bool, level: float
) -> dict[str, float]:
    if not binary:
        return mean_difference(student.tolist(), teacher.tolist(), groups, level)
    return Proportion((student - teacher).tolist(), groups, difference=True).interval(level)


def _outcome(difference: Mapping[str, float], margin: float, teacher: float) -> tuple[str, str]:
    low, high = difference["low"], difference["high"]
    if teacher <= margin:
        return OPEN, (
            f"The teacher itself reaches {teacher:.3f}, no more than the margin: a student that "
            "reaches nothing would be no worse. Name a metric first that the teacher meets."
        )
    if low > -margin:
        return REPLACES, (
            f"It is at most {margin:g} worse, at one-sided 95 %: the lower end of the paired "
            f"difference's 90 % interval, {low:+.4f}, is above -{margin:g}."
        )
    if high < -margin:
        return DOES_NOT, (
            f"It is more than {margin:g} worse, at one-sided 95 %: the upper end of the paired "
            f"difference's 90 % interval, {high:+.4f}, is below -{margin:g}."
        )
    return OPEN, (
        f"The paired difference's 90 % interval, from {low:+.4f} to {high:+.4f}, holds "
        f"-{margin:g}: the student may be worse by more than the margin, or by less."
    )


def _more_rows(apart: Any, groups: Sequence[str], margin: float, binary: bool) -> int | None:
    """Rows beyond those there are, at the discordance found, if both are right equally often.

    Where so many are there already, at the difference found.
    """
    worth, value = effective_rows(apart.tolist(), groups), float(apart.mean())
    shown, distance = (margin, value) if value > -margin else (-margin, -value)
    spread = max(float((np.abs(apart) > 0).mean()), 1 / worth) if binary else float(apart.std())
    count = rows_needed if binary else rows_needed_of_scores
    total = count(margin, spread)
    if total is not None and total <= worth:
        total = count(shown, spread, distance)
    if total is None:
        return None
    return max(1, ceil((total - worth) * len(apart) / worth))


def judge_rows(texts: Texts, *, free_text: bool) -> dict[str, Any]:
    """Whether the student replaces the prompt, by the recipe's margin on its main metric."""
    comparison, recipe = texts.comparison, texts.comparison.recipe
    metric = main_metric(recipe, comparison.references)
    if metric == "chrf" and not free_text:
        metric = "accuracy"  # the references are labels, whatever the recipe says of the answer
    alike = metric == "chrf" and not comparison.labelled
    against = _AGAIN if alike or metric == "agreement" else TEACHER
    teacher, student = (_reached(texts, metric, name) for name in (against, STUDENT))
    ids = list(comparison.answers[TEACHER]["id"])
    rows = PairedRows(metric, ids, comparison.groups, teacher, student)
    found = decide(rows, recipe.margin, trained_on=recipe.split.same_rows)
    if against == _AGAIN:
        found["student_better"] = False  # nearer to the teacher than its second answer is no better
    if alike:
        if _AGAIN not in comparison.answers:
            found |= {"rule": _NEED_SECOND, "rows_needed": None}
        elif ceiling := found["teacher"]:
            found["rule"] += (
                f" The teacher's second answer is {ceiling:.3f} like its first, as near as anybody "
                f"comes; the margin is {recipe.margin / ceiling:.0%} of that."
            )
    return found


def alerts_of(texts: Texts, verdict: dict[str, Any]) -> list[str]:
    """What a reader must know first."""
    comparison = texts.comparison
    systems = {
        name: SystemRows(said, comparison.predictions[name]) for name, said in texts.said.items()
    }
    queries = [readable(query) for query in comparison.queries]
    return find_alerts(systems, queries, comparison.references, verdict)


def _reached(texts: Texts, metric: str, system: str) -> Values:
    """What a system reaches in each row; None where a row says nothing of it."""
    comparison = texts.comparison
    if metric == "checks":  # the share of those that say something of the row
        rows = zip(*comparison.checked[system].values(), strict=True)
        said = ([one for one in row if one is not None] for row in rows)
        return [sum(row) / len(row) if row else None for row in said]
    if metric == "chrf":
        target = "reference" if comparison.labelled else "teacher"
        unknown: Values = [None] * len(comparison.groups)
        return [*texts.scores.get((system, target, metric), unknown)]
    taught = comparison.predictions[TEACHER]
    answers = comparison.predictions.get(system, taught)  # a teacher agrees with itself
    if metric == "agreement":
        pairs = zip(answers, taught, strict=True)
        return [None if right is None else float(answer == right) for answer, right in pairs]
    pairs = zip(answers, comparison.references, strict=True)
    if metric == "field_match":
        return [field_share(answer, right) if right else None for answer, right in pairs]
    return [float(answer == right) if right else None for answer, right in pairs]


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
        ("says the same", lambda rows: [" ".join(text.split()) for text in rows.texts]),
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
    read = zip(rows.texts, rows.answers, expected, strict=True)
    return [
        row
        for row, (text, answer, label) in enumerate(read)
        if label
        and answer != label
        and {one.casefold() for one in pattern.findall(text)} == {label.casefold()}
    ]


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


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _quoted(text: str) -> str:
    return repr(one_line(text, _SHOWN))

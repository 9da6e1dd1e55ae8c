"""What a judge's opinions are worth: scores, preference, how it errs, and what people correct."""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

from distill_datasets.conversations import readable
from distill_datasets.errors import DatasetError
from distill_datasets.statistics import (
    FEW,
    LEVEL,
    Proportion,
    independent_difference,
    mcnemar,
    mean_difference,
)
from distill_datasets.tables import aligned, interval_text

STUDENT, TEACHER = "student", "teacher"
TIE = "tie"

_OTHERS = (TEACHER, "base")  # whom the student's scores are compared with
_LABELS: Mapping[str, tuple[str, bool]] = {
    "better": ("not worse", True),
    "same": ("not worse", True),
    "tie": ("not worse", True),
    "worse": ("not worse", False),
    "good": ("good", True),
    "bad": ("good", False),
}
_LARGEST = 50_000_000  # bytes of a file of labels
_FLIPS = 0.3  # of the pairs: a judge that hardly knows what it prefers
_SYNONYMS = {
    **dict.fromkeys(("o1", "o3", "o4", "chatgpt", "codex", "davinci"), "gpt"),
    **dict.fromkeys(("mixtral", "ministral", "magistral", "codestral", "devstral"), "mistral"),
    "qwq": "qwen",
    **dict.fromkeys(("opus", "sonnet", "haiku"), "claude"),
    "gemini": "gemma",
    "meta": "llama",
}
_Number = Mapping[str, float]


@dataclass(frozen=True)
class JudgedRow:
    """A row with the text of each system; what is read out of a text is its answer.

    The `query` is as the recipe has it, and `shown` for people.
    """

    id: str
    query: str
    prompt: str
    group: str
    reference: str | None
    texts: Mapping[str, str]
    answers: Mapping[str, str | None]

    @property
    def shown(self) -> str:
        """The query, readable."""
        return readable(self.query)

    @property
    def is_pair(self) -> bool:
        """Whether student and teacher say different things."""
        return self.texts[STUDENT] != self.texts[TEACHER]


@dataclass(frozen=True)
class Opinions:
    """What a judge said, row by row; None where it can't be read.

    `scores` are by criterion and system, on the `scales`. `pairs` are who is better with the
    student shown first, and with the teacher first; None where both say the same.
    """

    scales: Mapping[str, tuple[float, float]]
    scores: Mapping[str, Mapping[str, Sequence[float | None]]]
    pairs: Sequence[tuple[str | None, str | None] | None]


@dataclass(frozen=True)
class HumanLabels:
    """What people say of rows, by id or by query: that the student is `not worse` than the
    teacher, or that what it says is `good`.
    """

    kind: str
    by: Literal["id", "query"]
    labels: Mapping[str, bool]

    @classmethod
    def read(cls, path: Path) -> "HumanLabels":
        """A CSV file with the columns `label`, and `id` or `query`; raises `DatasetError`."""
        try:
            if path.stat().st_size > _LARGEST:
                raise DatasetError(f"{str(path)!r} is larger than {_LARGEST:,} bytes.")
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
        except (OSError, ValueError, csv.Error) as error:
            raise DatasetError(f"The labels {str(path)!r} can't be read: {error}") from error
        columns = {*(rows[0] if rows else ())}
        by: Literal["id", "query"] = "id" if "id" in columns else "query"
        if not {by, "label"} <= columns:
            raise DatasetError(
                f"{str(path)!r} holds no labels: expected rows with the columns label, and id or "
                f"query; found {sorted(map(str, columns))}."
            )
        kinds, labels = set[str](), dict[str, bool]()
        for number, row in enumerate(rows, 2):
            said = (row["label"] or "").strip().lower()
            if said not in _LABELS:
                raise DatasetError(
                    f"{str(path)!r} line {number}: expected a label of {', '.join(_LABELS)}; "
                    f"found {row['label']!r}."
                )
            kind, label = _LABELS[said]
            kinds.add(kind)
            if labels.setdefault((row[by] or "").strip(), label) != label:
                raise DatasetError(
                    f"{str(path)!r} line {number}: {row[by]!r} has another label before. Keep one."
                )
        if len(kinds) != 1:
            raise DatasetError(
                f"{str(path)!r} mixes better/worse, of the student beside the teacher, with "
                "good/bad, of the student alone: expected one of the two."
            )
        return cls(kinds.pop(), by, labels)

    def of(self, ids: Sequence[str], queries: Sequence[str]) -> list[bool | None]:
        """Each row's label; raises `DatasetError` where no row has one."""
        keys = ids if self.by == "id" else [query.strip() for query in queries]
        found = [self.labels.get(key) for key in keys]
        if all(one is None for one in found):
            raise DatasetError(
                f"None of the {len(self.labels)} labels is of a row that is judged: expected the "
                f"{self.by} as rows.jsonl has it, such as {keys[0][:80]!r}."
            )
        return found


def find(
    rows: Sequence[JudgedRow],
    opinions: Opinions,
    labels: HumanLabels | None = None,
) -> dict[str, Any]:
    """A report's numbers of what a judge said."""
    groups = [row.group for row in rows]
    pairs = _pairs(rows, opinions)
    return {
        "n": len(rows),
        "scales": {name: list(scale) for name, scale in opinions.scales.items()},
        **_scores(opinions, groups),
        "preference": _preference(rows, opinions, pairs),
        "agreement": _agreement(rows, opinions),
        "first_shown": _first_shown(rows, opinions),
        "length_bias": _length_bias(rows, pairs),
        **_corrected(rows, opinions, pairs, labels),
    }


def _scores(opinions: Opinions, groups: Sequence[str]) -> dict[str, Any]:
    """Means, paired differences, and those that aren't chance, for all comparisons together."""
    means: dict[str, dict[str, Any]] = {}
    for criterion, of_systems in opinions.scores.items():
        for system in of_systems:
            if found := _mean(opinions, criterion, system, groups):
                means.setdefault(system, {})[criterion] = found
    others = [other for other in _OTHERS if other in means]
    level = 1 - (1 - LEVEL) / max(1, len(others) * len(opinions.scores))
    differences: dict[str, dict[str, Any]] = {}
    gaps = []
    for other in others:
        for criterion in opinions.scores:
            pair = STUDENT, other
            plain = _apart(opinions, criterion, pair, groups)
            strict = _apart(opinions, criterion, pair, groups, level)
            if plain is None or strict is None:
                continue
            differences.setdefault(f"{STUDENT}-{other}", {})[criterion] = plain
            if plain["rows"] >= FEW and (strict["low"] > 0 or strict["high"] < 0):
                gaps.append(f"{criterion}: {STUDENT} - {other} {_interval(plain, '+')}")
    return {"scores": means, "differences": differences, "gaps": gaps}


def _mean(
    opinions: Opinions, criterion: str, system: str, groups: Sequence[str]
) -> dict[str, float] | None:
    """A system's mean score, on the rows where it has one."""
    low, _ = opinions.scales[criterion]
    # Beside nothing: where all scores are equal, other rows may still have others.
    found = _apart(opinions, criterion, (system, None), groups)
    if found:
        found |= {name: low + max(0.0, found[name]) for name in ("value", "low", "high")}
    return found


def _apart(
    opinions: Opinions,
    criterion: str,
    pair: tuple[str, str | None],
    groups: Sequence[str],
    level: float = LEVEL,
) -> dict[str, float] | None:
    """One system's scores less another's, or less the least, on the rows where both have one."""
    low, high = opinions.scales[criterion]
    mine, theirs = (opinions.scores[criterion][one] if one else [low] * len(groups) for one in pair)
    both = [
        ((one - low) / (high - low), (other - low) / (high - low), group)
        for one, other, group in zip(mine, theirs, groups, strict=True)
        if one is not None and other is not None
    ]
    if not both:
        return None
    first, second, related = zip(*both, strict=True)
    found = mean_difference(first, second, related, level)
    ends = {name: found[name] * (high - low) for name in ("value", "low", "high")}
    return {**ends, "n": found["n"], "rows": len(both)}


def _pairs(rows: Sequence[JudgedRow], opinions: Opinions) -> list[str | None]:
    """Who is better in each row; a tie where the orders differ, None where one can't be read."""
    found: list[str | None] = []
    for row, pair in zip(rows, opinions.pairs, strict=True):
        if not row.is_pair or pair is None:
            found.append(TIE)
        elif None in pair:
            found.append(None)
        else:
            found.append(pair[0] if pair[0] == pair[1] else TIE)
    return found


def _preference(
    rows: Sequence[JudgedRow], opinions: Opinions, pairs: Sequence[str | None]
) -> dict[str, Any]:
    known = [place for place, who in enumerate(pairs) if who is not None]
    both = [pair for pair in opinions.pairs if pair and None not in pair]
    counted = {
        "student": sum(who == STUDENT for who in pairs),
        "teacher": sum(who == TEACHER for who in pairs),
        "ties": sum(who == TIE for who in pairs),
        "equal": sum(not row.is_pair for row in rows),
        "flipped": sum(TIE not in pair and pair[0] != pair[1] for pair in both),
        "unread": sum(who is None for who in pairs),
    }
    if not known:
        return counted
    signs = [float((pairs[one] == STUDENT) - (pairs[one] == TEACHER)) for one in known]
    groups = [rows[one].group for one in known]
    difference = Proportion(signs, groups, difference=True).interval()
    return {**counted, "difference": difference, "p": mcnemar(signs, groups)}


def _agreement(rows: Sequence[JudgedRow], opinions: Opinions) -> _Number | None:
    """How often the same pair, asked again in the other order, has the same answer."""
    asked = [place for place, pair in enumerate(opinions.pairs) if pair and None not in pair]
    if not asked:
        return None
    same = [float(len({*(opinions.pairs[one] or ())}) == 1) for one in asked]
    return Proportion(same, [rows[one].group for one in asked]).interval()


def _first_shown(rows: Sequence[JudgedRow], opinions: Opinions) -> _Number | None:
    """How often the text shown first is the better one, of the answers that name one."""
    shown, groups = list[float](), list[str]()
    for row, pair in zip(rows, opinions.pairs, strict=True):
        for first, said in zip((STUDENT, TEACHER), pair or (), strict=False):
            if said in (STUDENT, TEACHER):
                shown.append(float(said == first))
                groups.append(row.group)
    return Proportion(shown, groups).interval() if shown else None


def _length_bias(rows: Sequence[JudgedRow], pairs: Sequence[str | None]) -> dict[str, Any] | None:
    """How much more of the pairs a student wins where its text is the longer one.

    What the student wins anyway is in both numbers, and so isn't taken for a bias. None where one
    of them is always the longer.
    """
    won: dict[bool, tuple[list[float], list[str]]] = {True: ([], []), False: ([], [])}
    longer_won, groups = list[float](), list[str]()
    for row, who in zip(rows, pairs, strict=True):
        more = len(row.texts[STUDENT]) - len(row.texts[TEACHER])
        if who is None or not more or not row.is_pair:
            continue
        shares, related = won[more > 0]
        shares.append({STUDENT: 1.0, TIE: 0.5, TEACHER: 0.0}[who])
        related.append(row.group)
        if who != TIE:
            longer_won.append(float((who == STUDENT) == (more > 0)))
            groups.append(row.group)
    if not all(shares for shares, _ in won.values()):
        return None
    longer, shorter = (Proportion(*won[one]).interval() for one in (True, False))
    apart = independent_difference(longer, shorter)
    return {
        "value": apart["value"],
        "low": max(-1.0, apart["low"]),
        "high": min(1.0, apart["high"]),
        "n": min(longer["n"], shorter["n"]),
        "longer_wins": Proportion(longer_won, groups).interval() if longer_won else None,
    }


def _corrected(
    rows: Sequence[JudgedRow],
    opinions: Opinions,
    pairs: Sequence[str | None],
    labels: HumanLabels | None,
) -> dict[str, Any]:
    """The rate that people would find, by how the judge errs on the rows they labelled."""
    if labels is None:
        return {"corrected": False, "labels": None}
    if labels.kind == "good":
        what = "The student's text is good: its mean score is above the middle of the scale"
        said = _good(opinions, len(rows))
    else:
        what = "The student is not worse than the teacher, where their texts differ"
        said = [
            None if who is None or not row.is_pair else who != TEACHER
            for row, who in zip(rows, pairs, strict=True)
        ]
    human = labels.of([row.id for row in rows], [row.shown for row in rows])
    known = [place for place, one in enumerate(said) if one is not None]
    both = [one for one in known if human[one] is not None]

    def share(places: Sequence[int], wanted: bool) -> dict[str, float] | None:
        found = [float(said[one] is wanted) for one in places]
        return Proportion(found, [rows[one].group for one in places]).interval() if found else None

    observed = share(known, True)
    sensitivity = share([one for one in both if human[one]], True)
    specificity = share([one for one in both if not human[one]], False)
    rate = None
    if observed and sensitivity and specificity:
        rate = rogan_gladen(observed, sensitivity, specificity)
    found = {
        "kind": labels.kind,
        "what": what,
        "rows": len(both),
        "observed": observed,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "rate": rate,
    }
    if rate is None:
        found["why"] = _why_uncorrected(labels, sensitivity, specificity)
    return {"corrected": rate is not None, "labels": found}


def _why_uncorrected(
    labels: HumanLabels, sensitivity: _Number | None, specificity: _Number | None
) -> str:
    if sensitivity is None or specificity is None:
        pair = "good and bad" if labels.kind == "good" else "better (or same) and worse"
        return f"labels of both kinds are needed, {pair}, on rows that the judge told apart"
    return (
        f"on the labelled rows the judge is no better than chance (sensitivity "
        f"{sensitivity['value']:.2f}, specificity {specificity['value']:.2f})"
    )


def _good(opinions: Opinions, count: int) -> list[bool | None]:
    found: list[bool | None] = []
    for row in range(count):
        above = [
            score - sum(opinions.scales[criterion]) / 2
            for criterion, of_systems in opinions.scores.items()
            if (score := of_systems[STUDENT][row]) is not None
        ]
        found.append(sum(above) > 0 if above else None)
    return found


def rogan_gladen(
    observed: _Number, sensitivity: _Number, specificity: _Number, level: float = LEVEL
) -> dict[str, float] | None:
    """The true share, out of the one that an imperfect judge finds, as Rogan and Gladen (1978).

    Each has its `value` and `n`, of independent rows. The interval is Lang and Reiczigel's (2014),
    which counts that sensitivity and specificity are estimated too. None where the judge is no
    better than chance.

    >>> one = [{"value": v, "n": n} for v, n in ((0.6, 200), (0.9, 50), (0.8, 50))]
    >>> round(rogan_gladen(*one)["value"], 4)
    0.5714
    """
    useful = sensitivity["value"] + specificity["value"] - 1
    if useful <= 0:
        return None
    value = (observed["value"] + specificity["value"] - 1) / useful
    z = NormalDist().inv_cdf((1 + level) / 2)
    n = observed["n"] + z**2
    share = (observed["value"] * observed["n"] + z**2 / 2) / n
    right = [(one["value"] * one["n"] + 1) / (one["n"] + 2) for one in (sensitivity, specificity)]
    errors = [
        one * (1 - one) / (of["n"] + 2)
        for one, of in zip(right, (sensitivity, specificity), strict=True)
    ]
    slope = sum(right) - 1
    if slope <= 0:
        return None
    middle = (share + right[1] - 1) / slope
    shift = 2 * z**2 * (middle * errors[0] - (1 - middle) * errors[1])
    spread = share * (1 - share) / n + middle**2 * errors[0] + (1 - middle) ** 2 * errors[1]
    value, low, high = (
        min(1.0, max(0.0, one))
        for one in (
            value,
            middle + shift - z * sqrt(spread) / slope,
            middle + shift + z * sqrt(spread) / slope,
        )
    )
    return {"value": value, "low": min(low, value), "high": max(high, value), "n": observed["n"]}


def families(model: str) -> set[str]:
    """The families of models that a reference names: the first word of each model's name.

    A checkpoint's name says nothing.
    """
    found = set()
    for one in model.lower().split(" + "):
        if "://" in one:
            continue
        name = re.split(r"[/:]", one.partition("@")[0].rstrip("/"))[-1]
        if first := re.search(r"[a-z]+\d*", name):
            word = first[0].rstrip("0123456789")
            found.add(_SYNONYMS.get(first[0]) or _SYNONYMS.get(word, word))
    return found


def warnings(judge: str, models: Mapping[str, str], found: Mapping[str, Any]) -> Iterator[str]:
    """What makes a judge's opinions doubtful; `models` are those of the systems by their names."""
    named: dict[str, list[str]] = {}
    for system in (TEACHER, "base"):
        if system in models:
            named.setdefault(models[system], []).append(system)
    for model, systems in named.items():
        if judge == model or families(judge) & families(model):
            yield (
                f"The judge {judge} and the {' and the '.join(systems)} {model} are of one family: "
                "a model likes what sounds like itself. Ask a judge of another family."
            )
    flips, asked = found["preference"]["flipped"], found["n"] - found["preference"]["equal"]
    if asked >= FEW and flips > _FLIPS * asked:
        yield (
            f"The judge's preference flips with the order in {flips} of {asked} pairs: it hardly "
            "tells the two apart."
        )
    length = found["length_bias"]
    if length and length["low"] > 0:
        yield (
            "The judge favours length, or longer texts are better here: where its text is the "
            f"longer one the student wins {100 * length['value']:.0f} percentage points more."
        )


def judge_table(judge: Mapping[str, Any]) -> str:
    """The mean scores of each system."""
    return aligned(_cells(judge))


def judge_lines(judge: Mapping[str, Any]) -> list[str]:
    """A judge's opinions in sentences: who it is, what it finds, and how far it can be trusted."""
    corrected = "corrected by human labels" if judge["corrected"] else "uncorrected"
    return [
        f"Judge: {judge['model']}, by {', '.join(judge['rubrics'])}, {corrected}.",
        *(f"Warning: {one}" for one in judge["warnings"]),
        *_gaps(judge),
        *_preferred(judge),
        *_itself(judge),
        *_labelled(judge),
    ]


def _cells(judge: Mapping[str, Any]) -> Iterator[list[str]]:
    yield ["system", *judge["scales"], "rows"]
    for system, scores in judge["scores"].items():
        rows = "/".join(dict.fromkeys(str(one["rows"]) for one in scores.values()))
        cells = (_interval(scores[one]) if one in scores else "-" for one in judge["scales"])
        yield [system, *cells, rows]


def _gaps(judge: Mapping[str, Any]) -> Iterator[str]:
    if judge["n"] < FEW:
        yield f"No gap is named: {judge['n']} rows are too few, {FEW} are the least."
    elif judge["gaps"]:
        yield f"Gaps that aren't chance: {'; '.join(judge['gaps'])}."
    else:
        yield "No gap between the student's scores and others' is more than chance."


def _preferred(judge: Mapping[str, Any]) -> Iterator[str]:
    found = judge["preference"]
    unread = f", {found['unread']} can't be read" if found["unread"] else ""
    yield (
        f"Preferred, blind and in both orders: student {found['student']}, teacher "
        f"{found['teacher']}, tie {found['ties']} ({found['equal']} equal texts, "
        f"{found['flipped']} flip with the order){unread}."
    )
    if "difference" in found:
        p = "p < 0.001" if found["p"] < 0.001 else f"p = {found['p']:.3f}"
        yield f"Share of wins, student - teacher: {_interval(found['difference'], '+')}, {p}."


def _itself(judge: Mapping[str, Any]) -> Iterator[str]:
    if judge["agreement"]:
        yield (
            f"Agrees with itself when asked in the other order: {_interval(judge['agreement'])} of "
            "the pairs."
        )
    if judge["first_shown"]:
        yield f"Prefers the text shown first: {_interval(judge['first_shown'])} (0.5 is no bias)."
    if length := judge["length_bias"]:
        longer = length["longer_wins"]
        wins = f"; the longer text wins {_interval(longer)} of the decided pairs" if longer else ""
        yield f"Length bias: {_interval(length, '+')} (0 is none){wins}."
    else:
        yield (
            "Length bias can't be told: it takes pairs where the student's text is the longer one, "
            "and pairs where it is the shorter one."
        )


def _labelled(judge: Mapping[str, Any]) -> Iterator[str]:
    found = judge["labels"]
    if not found:
        yield "No human labels: these numbers are uncorrected (--judge-labels)."
    elif not found["rate"]:
        yield f"These numbers are uncorrected: {found['why']}."
    else:
        yield (
            f"{found['what']}: the judge says {_interval(found['observed'])}; corrected by "
            f"{found['rows']} human labels {_interval(found['rate'])} (sensitivity "
            f"{_interval(found['sensitivity'])}, specificity {_interval(found['specificity'])})."
        )


def _interval(number: _Number, sign: str = "") -> str:
    """Scores and shares of opinions in two digits."""
    return interval_text(number, sign, digits=2)

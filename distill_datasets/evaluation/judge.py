"""A judge of texts for which no label is right: what it is asked, and what its opinions are worth.

A judge sees the prompt, the query and one text, or two without names, in both orders. What it is
asked is in the journal, and paid once.
"""

import csv
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from math import sqrt
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import yaml

from distill_datasets.conversations import readable
from distill_datasets.errors import DatasetError, GenerationError, SettingsError, nearest
from distill_datasets.evaluation.report_text import judge_lines
from distill_datasets.evaluation.settings import MeasureSettings
from distill_datasets.evaluation.systems import HeldOut
from distill_datasets.files import builders_folder, read_yaml
from distill_datasets.generation.client import CachedClient, ManyRequests
from distill_datasets.generation.teachers import ScoringModel
from distill_datasets.models.sampler import Sample, Sampler, Sampling, digest
from distill_datasets.recipes.prompt import render_ours
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.recipes.sections import SamplingSection
from distill_datasets.schema import Message
from distill_datasets.statistics import (
    FEW,
    LEVEL,
    Proportion,
    independent_difference,
    mcnemar,
    mean_difference,
)
from distill_datasets.tables import interval_text

if TYPE_CHECKING:
    from distill_datasets.evaluation.comparison import Texts

OWN = "recipe"  # the rubric that is the recipe's judge prompt
STUDENT, TEACHER, TIE = "student", "teacher", "tie"

_VERSION = 1  # goes into the report's digest: raise it when opinions come out differently
_SCORED = (TEACHER, STUDENT, "base")
_SCALE = (1.0, 10.0)
_SAMPLING = Sampling(temperature=0.0, max_tokens=2048, seed=0)  # some judges think first
_LARGEST_RUBRIC, _LARGEST_LABELS = 100_000, 50_000_000  # bytes
_FLIPS = 0.3  # of the pairs: a judge that hardly knows what it prefers
_PREFERRED = re.compile(r"(?im)^[^\w\n]{0,12}better[^\w\n]{0,6}[:=][^\w\n]{0,6}(a|b|tie)\b")
_LABELS: Mapping[str, tuple[str, bool]] = {
    **dict.fromkeys(("better", "same", "tie"), ("not worse", True)),
    "worse": ("not worse", False),
    "good": ("good", True),
    "bad": ("good", False),
}
_SYNONYMS = {
    **dict.fromkeys(("o1", "o3", "o4", "chatgpt", "codex", "davinci"), "gpt"),
    **dict.fromkeys(("mixtral", "ministral", "magistral", "codestral", "devstral"), "mistral"),
    "qwq": "qwen",
    **dict.fromkeys(("opus", "sonnet", "haiku"), "claude"),
    "gemini": "gemma",
    "meta": "llama",
}
_Number = Mapping[str, float]


def load_criteria(rubric: str) -> dict[str, str]:
    """The criteria of a rubric, each with its meaning, by which a text is scored from 1 to 10.

    It is one that ships, by its name, or a YAML file; raises `SettingsError` for any other.
    """
    if not rubric.endswith((".yaml", ".yml")):
        known: dict[str, dict[str, str]] = yaml.safe_load(_shipped("rubrics.yaml"))
        if rubric not in known:
            names = [*known, OWN]
            raise SettingsError(
                f"There is no rubric {rubric!r}: expected {', '.join(names)} (the recipe's judge "
                f"prompt), or a YAML file `criterion: what it means`.{nearest(rubric, names)}"
            )
        return known[rubric]
    found = read_yaml(rubric, SettingsError, what="rubric", limit=_LARGEST_RUBRIC)
    texts = [one for pair in found.items() for one in pair] if isinstance(found, dict) else []
    if not texts or not all(isinstance(one, str) and one.strip() for one in texts):
        raise SettingsError(
            f"The rubric {rubric!r} holds no criteria: expected YAML lines `criterion: what it "
            "means`."
        )
    return dict(found)


def read_scores(criteria: Iterable[str], said: Sample) -> dict[str, float | None]:
    """The score of each criterion; None where it isn't there, or the text was cut off."""
    found = dict[str, float | None]()
    for name in criteria:
        pattern = rf"(?im)^[^\w\n]{{0,12}}{re.escape(name)}[^\w\n]{{0,6}}[:=][^\w\n]{{0,6}}(\d+)"
        scores = re.findall(pattern, said.text) if said.stop_reason != "length" else []
        known = scores and _SCALE[0] <= float(scores[-1]) <= _SCALE[1]
        found[name] = float(scores[-1]) if known else None
    return found


def _preferred(said: Sample, *, a: str, b: str) -> str | None:
    """Who is better; None where it isn't said, or the text was cut off."""
    found = _PREFERRED.findall(said.text)
    if not found or said.stop_reason == "length":
        return None
    return {"a": a, "b": b, "tie": TIE}[found[-1].lower()]


@cache
def _shipped(name: str) -> str:
    return (builders_folder() / "_judge" / name).read_text(encoding="utf-8")


def _asked(template: str, **fields: Any) -> list[Message]:
    return [{"role": "user", "content": render_ours(_shipped(f"{template}.md"), **fields)}]


@dataclass(frozen=True)
class JudgedRow:
    """A row with the text of each system; what is read out of a text is its answer."""

    id: str
    query: str
    prompt: str
    group: str
    reference: str | None
    texts: Mapping[str, str]
    answers: Mapping[str, str | None]


class _JudgeRequest(NamedTuple):
    """What is asked about a row's text by a system, or, `first`, about both of its texts."""

    row: int
    system: str
    messages: list[Message]
    sampling: Sampling
    read: Callable[[Sample], Any]
    first: bool = False


@dataclass(frozen=True)
class AnswerJudge:
    """A model that judges by rubrics, and what people say of some rows.

    The rubrics are those that are `named`; else the recipe's own prompt, else `quality`.
    """

    sampler: Sampler
    recipe: Recipe
    named: tuple[str, ...] = ()
    labels: "HumanLabels | None" = None

    def __post_init__(self) -> None:
        """Raises `SettingsError` for an unknown rubric, or two with one criterion."""
        names = [name for criteria in self._general for name in criteria]
        names += [OWN] if self._own else []
        if len({*names}) < len(names):
            raise SettingsError(f"Two of the rubrics {', '.join(self.rubrics)} have one criterion.")

    @cached_property
    def rubrics(self) -> tuple[str, ...]:
        """What the rubrics are called."""
        has_own = all(part.judge for part in self.recipe.parts)
        if OWN in self.named and not has_own:
            raise SettingsError(
                "The rubric 'recipe' is the recipe's judge prompt, and the recipe has no `judge`: "
                f"name one of {', '.join(yaml.safe_load(_shipped('rubrics.yaml')))}."
            )
        return tuple(dict.fromkeys(self.named)) or (OWN if has_own else "quality",)

    @cached_property
    def _general(self) -> list[dict[str, str]]:
        """The criteria of the rubrics that aren't the recipe's prompt."""
        return [load_criteria(name) for name in self.rubrics if name != OWN]

    @cached_property
    def _own(self) -> dict[str, ScoringModel]:
        """How the recipe's prompt is asked and read, by the name of the part that has it."""
        return {
            part.name: ScoringModel(
                self.sampler,
                section.sampling_over(SamplingSection()).parameters(),
                part.judge_prompt,
                section.pattern,
                section.scale,
            )
            for part in self.recipe.parts
            if OWN in self.rubrics and (section := part.judge)
        }

    @property
    def key(self) -> str:
        """The digest of everything that its part of a report depends on but the texts."""
        scoring = [list(one.parts) for one in self._own.values()]
        labels = asdict(self.labels) if self.labels else None
        asked = [_shipped("score.md"), _shipped("compare.md")]
        return digest([_VERSION, self.sampler.identity, self._general, scoring, labels, asked])

    def most_requests(self, systems: Iterable[str], rows: int) -> int:
        """So many are asked about so many rows, where no two texts are equal."""
        return rows * (len({*systems} & {*_SCORED}) * len(self.rubrics) + 2)

    def rows(self, texts: "Texts") -> list[JudgedRow]:
        """What is judged: of each row what its systems say, as the student would."""
        comparison = texts.comparison
        systems = [name for name in _SCORED if name in texts.said]
        ids = comparison.answers[TEACHER]["id"]
        return [
            JudgedRow(
                ids[place],
                query,
                self.recipe.messages(query)[0]["content"],
                comparison.groups[place],
                comparison.references[place],
                {name: texts.said[name][place] for name in systems},
                {name: comparison.predictions[name][place] for name in systems},
            )
            for place, query in enumerate(comparison.queries)
        ]

    def judge(
        self, rows: Sequence[JudgedRow], models: Mapping[str, str], client: CachedClient
    ) -> dict[str, Any]:
        """A report's key `judge`, with what the client's journal has, and asking for the rest.

        `models` are those of the systems, by their names.
        Says on standard error what is asked, and what it costs at most, beforehand. Raises
        `BudgetReached`, what the sampler raises for all, and `GenerationError` where a request
        failed, or nothing that was said can be read.
        """
        questions = [*self._questions(rows)]
        requests = ManyRequests([(self.sampler, one.messages, one.sampling) for one in questions])
        said = requests.said(client.journal, client.meter.prices if client.meter else None)
        print(f"judge: asks {self.sampler.model} {said}", file=sys.stderr)
        replies = requests.ask(client, title=f"judge {self.sampler.model}")
        opinions = self._opinions(rows, questions, [one.samples[0] for one in replies])
        found = {
            "model": self.sampler.model,
            "identity": self.sampler.identity,
            "rubrics": list(self.rubrics),
            "requests": len(questions),
            **opinions.findings(self.labels),
        }
        found["warnings"] = [*_warnings(self.sampler.model, models, found)]
        return {"summary": judge_lines(found), **found}

    def _questions(self, rows: Sequence[JudgedRow]) -> Iterator[_JudgeRequest]:
        compared = self._general or [load_criteria("quality")]
        by_all = {name: meaning for one in compared for name, meaning in one.items()}
        for place, row in enumerate(rows):
            seen = {"prompt": row.prompt, "query": readable(row.query)}
            for system, text in row.texts.items():
                for criteria in self._general:
                    asked = _asked("score", criteria=criteria, text=text, **seen)
                    read = partial(read_scores, criteria)
                    yield _JudgeRequest(place, system, asked, _SAMPLING, read)
                if self._own:
                    own = self._own[self.recipe.part(row.query)[0].name]
                    more = {"answer": row.answers[system], "reference": row.reference}
                    asked = own.messages(text=text, **seen, **more)
                    yield _JudgeRequest(place, system, asked, own.sampling, own.score)
            if row.texts[STUDENT] == row.texts[TEACHER]:
                continue
            for a, b in ((STUDENT, TEACHER), (TEACHER, STUDENT)):
                both = {"first": row.texts[a], "second": row.texts[b]}
                asked = _asked("compare", criteria=by_all, **both, **seen)
                yield _JudgeRequest(place, a, asked, _SAMPLING, partial(_preferred, a=a, b=b), True)

    def _opinions(
        self, rows: Sequence[JudgedRow], questions: Sequence[_JudgeRequest], said: Sequence[Sample]
    ) -> "Opinions":
        scores: dict[str, dict[str, list[float | None]]] = {}
        pairs: list[dict[str, str | None]] = [{} for _ in rows]
        readable_scores = False
        for one, sample in zip(questions, said, strict=True):
            found = one.read(sample)
            if one.first:
                pairs[one.row][one.system] = found
                continue
            scored = found if isinstance(found, Mapping) else {OWN: found}
            for criterion, score in scored.items():
                empty: list[float | None] = [None] * len(rows)
                scores.setdefault(criterion, {}).setdefault(one.system, empty)[one.row] = score
                readable_scores |= score is not None
        if not readable_scores:
            raise GenerationError(
                f"Nothing that the judge {self.sampler.model} said holds a score that can be read: "
                f"it said {said[0].text[:300]!r}. Expected lines such as 'clarity: 7'. Ask a judge "
                "that keeps to a form."
            )
        scales = {name: _SCALE for criteria in self._general for name in criteria}
        if ends := [one.scale for one in self._own.values()]:
            scales[OWN] = (min(low for low, _ in ends), max(high for _, high in ends))
        return Opinions(rows, scales, scores, pairs)


def open_judge(
    judge: Sampler | str | None, held_out: HeldOut, settings: MeasureSettings
) -> AnswerJudge | None:
    """A judge for what systems say to a release's rows; raises before anything is asked."""
    from distill_datasets.models.references import open_sampler

    if judge is None:
        if settings.rubrics or settings.judge_labels:
            raise SettingsError("Rubrics and labels are for a judge: name one (`judge`, --judge).")
        return None
    labels = HumanLabels.read(settings.judge_labels) if settings.judge_labels else None
    if labels:
        labels.of(held_out.rows["id"], held_out.rows["query"])
    sampler = open_sampler(judge) if isinstance(judge, str) else judge
    return AnswerJudge(sampler, held_out.recipe, settings.rubrics, labels)


@dataclass(frozen=True)
class HumanLabels:
    """What people say of rows, by id or query: the student is `not worse`, or its text `good`."""

    kind: str
    by: Literal["id", "query"]
    labels: Mapping[str, bool]

    @classmethod
    def read(cls, path: Path) -> "HumanLabels":
        """A CSV file with the columns `label`, and `id` or `query`; raises `DatasetError`."""
        try:
            if path.stat().st_size > _LARGEST_LABELS:
                raise DatasetError(f"{str(path)!r} is larger than {_LARGEST_LABELS:,} bytes.")
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
        keys = ids if self.by == "id" else [readable(query).strip() for query in queries]
        found = [self.labels.get(key) for key in keys]
        if all(one is None for one in found):
            raise DatasetError(
                f"None of the {len(self.labels)} labels is of a row that is judged: expected the "
                f"{self.by} as rows.jsonl has it, such as {keys[0][:80]!r}."
            )
        return found


@dataclass(frozen=True)
class Opinions:
    """What a judge said, row by row; None where it can't be read.

    `scores` are by criterion and system, on the `scales`. `pairs` are who is better, by who is
    shown first; empty where both say the same.
    """

    rows: Sequence[JudgedRow]
    scales: Mapping[str, tuple[float, float]]
    scores: Mapping[str, Mapping[str, Sequence[float | None]]]
    pairs: Sequence[Mapping[str, str | None]]

    def findings(self, labels: HumanLabels | None = None) -> dict[str, Any]:
        """A report's numbers of what a judge said."""
        asked = [(pair, row.group) for pair, row in zip(self.pairs, self.rows, strict=True) if pair]
        both = [({*pair.values()}, group) for pair, group in asked if None not in pair.values()]
        first_shown = (
            (said == first, group)
            for pair, group in asked
            for first, said in pair.items()
            if said in (STUDENT, TEACHER)
        )
        return {
            "n": len(self.rows),
            "scales": {name: list(scale) for name, scale in self.scales.items()},
            **self._scores(),
            "preference": self._preference(sum(said == {STUDENT, TEACHER} for said, _ in both)),
            "agreement": _share((len(said) == 1, group) for said, group in both),
            "first_shown": _share(first_shown),
            "length_bias": self._length_bias(),
            **(self._corrected(labels) if labels else {"corrected": False, "labels": None}),
        }

    def _scores(self) -> dict[str, Any]:
        """Means, paired differences, and those that aren't chance, for all comparisons together."""
        means: dict[str, dict[str, Any]] = {}
        for criterion, of_systems in self.scores.items():
            low, _ = self.scales[criterion]
            for system in of_systems:
                # Beside nothing: where all scores are equal, other rows may still have others.
                if found := self._apart(criterion, system, None):
                    found |= {end: low + max(0.0, found[end]) for end in ("value", "low", "high")}
                    means.setdefault(system, {})[criterion] = found
        others = [other for other in (TEACHER, "base") if other in means]
        level = 1 - (1 - LEVEL) / max(1, len(others) * len(self.scores))
        differences: dict[str, dict[str, Any]] = {}
        gaps = []
        for other in others:
            for criterion in self.scores:
                plain = self._apart(criterion, STUDENT, other)
                strict = self._apart(criterion, STUDENT, other, level)
                if not plain or not strict:
                    continue
                differences.setdefault(f"{STUDENT}-{other}", {})[criterion] = plain
                if plain["rows"] >= FEW and not strict["low"] <= 0 <= strict["high"]:
                    said = interval_text(plain, "+", digits=2)
                    gaps.append(f"{criterion}: {STUDENT} - {other} {said}")
        return {"scores": means, "differences": differences, "gaps": gaps}

    def _apart(
        self, criterion: str, system: str, other: str | None, level: float = LEVEL
    ) -> dict[str, float] | None:
        """One system's scores less another's, or less the least, on rows where both have one."""
        low, high = self.scales[criterion]
        found = self.scores[criterion]
        theirs = found[other] if other else [low] * len(self.rows)
        both = [
            ((one - low) / (high - low), (beside - low) / (high - low), row.group)
            for one, beside, row in zip(found[system], theirs, self.rows, strict=True)
            if one is not None and beside is not None
        ]
        if not both:
            return None
        first, second, groups = zip(*both, strict=True)
        apart = mean_difference(first, second, groups, level)
        ends = {name: apart[name] * (high - low) for name in ("value", "low", "high")}
        return {**ends, "n": apart["n"], "rows": len(both)}

    @cached_property
    def preferred(self) -> list[str | None]:
        """Who is better in each row: a tie where the orders differ, None where one is unread."""
        said = [{*pair.values()} for pair in self.pairs]
        return [None if None in one else one.pop() if len(one) == 1 else TIE for one in said]

    def _preference(self, flipped: int) -> dict[str, Any]:
        counted = {
            "student": self.preferred.count(STUDENT),
            "teacher": self.preferred.count(TEACHER),
            "ties": self.preferred.count(TIE),
            "equal": self.pairs.count({}),
            "flipped": flipped,
            "unread": self.preferred.count(None),
        }
        known = [
            (who, row.group) for who, row in zip(self.preferred, self.rows, strict=True) if who
        ]
        if not known:
            return counted
        signs = [float((who == STUDENT) - (who == TEACHER)) for who, _ in known]
        groups = [group for _, group in known]
        difference = Proportion(signs, groups, difference=True).interval()
        return {**counted, "difference": difference, "p": mcnemar(signs, groups)}

    def _length_bias(self) -> dict[str, Any] | None:
        """How much more of the pairs a student wins where its text is the longer one.

        What the student wins anyway is in both numbers, and so isn't taken for a bias. None where
        one of them is always the longer.
        """
        worth = {STUDENT: 1.0, TIE: 0.5, TEACHER: 0.0}
        told = [
            (who, more > 0, row.group)
            for row, who, pair in zip(self.rows, self.preferred, self.pairs, strict=True)
            if pair and who and (more := len(row.texts[STUDENT]) - len(row.texts[TEACHER]))
        ]
        longer, shorter = (
            _share((worth[who], group) for who, more, group in told if more is wanted)
            for wanted in (True, False)
        )
        if not longer or not shorter:
            return None
        apart = independent_difference(longer, shorter)
        return {
            "value": apart["value"],
            "low": max(-1.0, apart["low"]),
            "high": min(1.0, apart["high"]),
            "n": min(longer["n"], shorter["n"]),
            "longer_wins": _share(
                ((who == STUDENT) == more, group) for who, more, group in told if who != TIE
            ),
        }

    def _corrected(self, labels: HumanLabels) -> dict[str, Any]:
        """The rate that people would find, by how the judge errs on the rows they labelled."""
        if labels.kind == "good":
            what = "The student's text is good: its mean score is above the middle of the scale"
            above = [
                [
                    score - sum(self.scales[criterion]) / 2
                    for criterion, of_systems in self.scores.items()
                    if (score := of_systems[STUDENT][row]) is not None
                ]
                for row in range(len(self.rows))
            ]
            said = [sum(one) > 0 if one else None for one in above]
        else:
            what = "The student is not worse than the teacher, where their texts differ"
            said = [
                who != TEACHER if who and pair else None
                for who, pair in zip(self.preferred, self.pairs, strict=True)
            ]
        ids, queries = zip(*((row.id, row.query) for row in self.rows), strict=True)
        human = labels.of(ids, queries)
        known = [
            (one, right, row.group)
            for one, right, row in zip(said, human, self.rows, strict=True)
            if one is not None
        ]
        observed = _share((one, group) for one, _, group in known)
        sensitivity = _share((one, group) for one, right, group in known if right)
        specificity = _share((not one, group) for one, right, group in known if right is False)
        rate = None
        if not sensitivity or not specificity or not observed:
            pair = "good and bad" if labels.kind == "good" else "better (or same) and worse"
            why = f"labels of both kinds are needed, {pair}, on rows that the judge told apart"
        elif not (rate := rogan_gladen(observed, sensitivity, specificity)):
            why = (
                f"on the labelled rows the judge is no better than chance (sensitivity "
                f"{sensitivity['value']:.2f}, specificity {specificity['value']:.2f})"
            )
        found = {
            "kind": labels.kind,
            "what": what,
            "rows": sum(right is not None for _, right, _ in known),
            "observed": observed,
            "sensitivity": sensitivity,
            "specificity": specificity,
            "rate": rate,
            **({} if rate else {"why": why}),
        }
        return {"corrected": rate is not None, "labels": found}


def _share(found: Iterable[tuple[float, str]]) -> dict[str, float] | None:
    """The share of rows that are true, each with its group; None without rows."""
    rows = list(found)
    if not rows:
        return None
    return Proportion([float(one) for one, _ in rows], [group for _, group in rows]).interval()


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
    z = NormalDist().inv_cdf((1 + level) / 2)
    n = observed["n"] + z**2
    share = (observed["value"] * observed["n"] + z**2 / 2) / n
    counts = [one["n"] + 2 for one in (sensitivity, specificity)]
    right = [(one["value"] * one["n"] + 1) / (one["n"] + 2) for one in (sensitivity, specificity)]
    errors = [one * (1 - one) / count for one, count in zip(right, counts, strict=True)]
    slope = sum(right) - 1
    if useful <= 0 or slope <= 0:
        return None
    middle = (share + right[1] - 1) / slope
    shift = 2 * z**2 * (middle * errors[0] - (1 - middle) * errors[1])
    spread = share * (1 - share) / n + middle**2 * errors[0] + (1 - middle) ** 2 * errors[1]
    margin = z * sqrt(spread) / slope
    value, low, high = (
        min(1.0, max(0.0, one))
        for one in (
            (observed["value"] + specificity["value"] - 1) / useful,
            middle + shift - margin,
            middle + shift + margin,
        )
    )
    return {"value": value, "low": min(low, value), "high": max(high, value), "n": observed["n"]}


def families(model: str) -> set[str]:
    """The families of models that a reference names: the first word of each model's name.

    A checkpoint's name says nothing.
    """
    found = set()
    for one in model.lower().split(" + "):
        name = re.split(r"[/:]", one.partition("@")[0].rstrip("/"))[-1]
        if "://" not in one and (first := re.search(r"[a-z]+\d*", name)):
            word = first[0].rstrip("0123456789")
            found.add(_SYNONYMS.get(first[0]) or _SYNONYMS.get(word, word))
    return found


def _warnings(judge: str, models: Mapping[str, str], found: Mapping[str, Any]) -> Iterator[str]:
    """What makes a judge's opinions doubtful; `models` are those of the systems by their names."""
    if OWN in found["rubrics"]:
        yield (
            "The recipe's judge prompt also chose among the teacher's answers, so its scores "
            "favour the teacher. Name another rubric beside it, such as quality."
        )
    asked = [name for name in (TEACHER, "base") if name in models]
    for model in dict.fromkeys(models[name] for name in asked):
        if judge == model or families(judge) & families(model):
            systems = " and the ".join(name for name in asked if models[name] == model)
            yield (
                f"The judge {judge} and the {systems} {model} are of one family: a model likes "
                "what sounds like itself. Ask a judge of another family."
            )
    flips, pairs = found["preference"]["flipped"], found["n"] - found["preference"]["equal"]
    if pairs >= FEW and flips > _FLIPS * pairs:
        yield (
            f"The judge's preference flips with the order in {flips} of {pairs} pairs: it hardly "
            "tells the two apart."
        )
    length = found["length_bias"]
    if length and length["low"] > 0:
        yield (
            "The judge favours length, or longer texts are better here: where its text is the "
            f"longer one the student wins {100 * length['value']:.0f} percentage points more."
        )

"""When the student may answer alone: a threshold of its confidence, with a guarantee.

What a student says with less confidence goes to the teacher. Of what the student serves, it
disagrees with its teacher in at most a share that is asked for, with 95 % confidence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from distill_datasets.errors import DatasetError, SettingsError
from distill_datasets.evaluation.money import STUDENT, TEACHER, money_of_run
from distill_datasets.evaluation.page import write_page
from distill_datasets.evaluation.systems import greedy, read_held_out
from distill_datasets.files import one_writer, write_file
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient, all_of, run_in_thread
from distill_datasets.generation.rate_limit import Limits
from distill_datasets.models.references import connect, find_training
from distill_datasets.models.sampler import Logprobs
from distill_datasets.models.tinker import TinkerSampler
from distill_datasets.notebooks import interruptible
from distill_datasets.progress import Progress
from distill_datasets.report_files import (
    calibration_file,
    read_report,
    read_rows,
    report_file,
    split_report,
)
from distill_datasets.selective import Place, certify, choice_logprob, rows_to_certify
from distill_datasets.statistics import LEVEL
from distill_datasets.tables import aligned

if TYPE_CHECKING:
    from distill_datasets.evaluation.systems import HeldOut
    from distill_datasets.generation.pricing import Prices
    from distill_datasets.models.sampler import Sample, Sampler
    from distill_datasets.recipes.recipe import Recipe

Score = Literal["least", "mean", "sum", "choices"]
SCORES: tuple[Score, ...] = get_args(Score)
_MEANINGS: Mapping[Score, str] = {
    "least": "the least of an answer's log-probabilities",
    "mean": "the mean of an answer's log-probabilities",
    "sum": "the sum of an answer's log-probabilities",
    "choices": "the log-probability of an answer among the choices",
}
EPSILONS = (0.01, 0.02, 0.05)
_POINTS = 40  # of the curve
_CURVE = (0.002, 0.3)
_CONCURRENCY = 64
_LIKELIEST = 20  # tokens of a place, as many as OpenAI's protocol gives


@dataclass(frozen=True)
class Pair:
    """A query's confidence, and whether student and teacher gave one answer."""

    id: str
    group: str
    confidence: float
    agrees: bool


@dataclass(frozen=True)
class Point:
    """What `epsilon` allows: the student serves a share of `served`, above `threshold`.

    There is no threshold where none holds, and where all may be served, which `served` tells apart.
    `bound` is the most that it disagrees in, and `saved` the share of the teacher's cost.
    """

    epsilon: float
    served: float
    threshold: float | None = None
    rows: int = 0
    disagreements: int = 0
    bound: float | None = None
    saved: float | None = None

    def serves(self, confidence: float) -> bool:
        """Whether the student answers alone."""
        return self.served > 0 and (self.threshold is None or confidence > self.threshold)


@dataclass(frozen=True)
class Thresholds:
    """What `calibrate` found; it stands in the run's calibration.json."""

    path: Path
    report: str | None
    score: Score
    student: str
    split: str
    rows: int
    groups: int
    disagreements: int
    level: float
    points: Sequence[Point]
    curve: Sequence[Point]
    pairs: Sequence[Pair]

    @classmethod
    def read(cls, run: str | Path) -> Thresholds:
        """That of a run; raises `DatasetError` where there is none."""
        path = calibration_file(report_file(run))
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found.pop("worth", None)  # which older files have
            for name, kind in _LISTS.items():
                found[name] = [kind(**one) for one in found[name]]
            return cls(path=path, **found)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DatasetError(
                f"{str(path)!r} is no calibration ({error}): run `distill-datasets calibrate "
                f"{run}`."
            ) from error

    def text(self) -> str:
        """A table for a terminal, and what it means."""
        cells = [["epsilon", "served", "threshold", "rows", "disagree", "at most", "saved"]]
        cells += [_cells(one) for one in self.points]
        agree = 1 - self.disagreements / self.rows
        return (
            f"{self.rows} queries of {self.split!r} in {self.groups} groups, which count as one "
            f"each; student and teacher agree on {agree:.1%}. Confidence is "
            f"{_MEANINGS[self.score]}.\n\n"
            f"{aligned(cells)}\n\n"
            f"With {self.level:.0%} confidence the student disagrees with its teacher in at most "
            "epsilon of what it serves; the teacher answers the rest."
        )

    def keep(self) -> None:
        """Write it beside the report."""
        found = {name: value for name, value in asdict(self).items() if name != "path"}
        write_file(self.path, json.dumps(found, indent=1) + "\n")


_LISTS: Mapping[str, type] = {"points": Point, "curve": Point, "pairs": Pair}


@interruptible
def calibrate(
    run: str | Path,
    *,
    epsilons: Sequence[float] = EPSILONS,
    score: Score = "least",
    split: str = "test",
    prices: Prices | None = None,
) -> Thresholds:
    """Choose thresholds of the student's confidence on held-out queries that `measure` asked.

    The student is asked again, for its log-probabilities; the run's journal keeps its answers.
    Raises `DatasetError` for a run without a report, or whose answers are free text.

        print(calibrate("runs/demo", epsilons=[0.02]).text())
    """
    _require_settings(epsilons, score)
    path = split_report(report_file(run).parent, split)
    report, training = read_report(path), find_training(path.parent)
    if training is None:
        raise DatasetError(f"{str(path.parent)!r} holds no trained student: run `train` first.")
    held_out = read_held_out(report["dataset"]["path"], split=split)
    _require_form(held_out)
    known = Confidence(held_out.recipe, score)
    sampler = TinkerSampler(connect(training))
    with one_writer(path.parent, "calibration"):
        pairs = list(_pairs(held_out, path, sampler, known))
        costs = None if prices is None else money_of_run(path, prices)["per_query"]
        found = Thresholds(
            path=calibration_file(path),
            report=report.get("digest"),
            score=score,
            student=sampler.identity,
            split=split,
            rows=len(pairs),
            groups=len({one.group for one in pairs}),
            disagreements=sum(not one.agrees for one in pairs),
            level=LEVEL,
            points=choose(pairs, sorted(epsilons), costs),
            curve=choose(pairs, np.geomspace(*_CURVE, _POINTS).tolist(), costs),
            pairs=pairs,
        )
        found.keep()
        write_page(path, training)
    return found


def _require_settings(epsilons: Sequence[float], score: str) -> None:
    if not epsilons or not all(0 < one < 1 for one in epsilons) or score not in SCORES:
        raise SettingsError(
            "Expected epsilons above 0 and below 1, and a score of "
            f"{', '.join(SCORES)}; found {', '.join(map(str, epsilons)) or 'none'} and {score!r}."
        )


def _require_form(held_out: HeldOut) -> None:
    if held_out.free_text:
        raise DatasetError(
            "Answers of free text are never equal, so that nothing says whether two agree: "
            "calibrate a recipe whose answers have a form (`answer.choices`, `answer.pattern`, "
            "`answer.json_schema`, `tools`)."
        )


def choose(
    pairs: Sequence[Pair], epsilons: Sequence[float], costs: Mapping[str, float] | None = None
) -> list[Point]:
    """What each epsilon allows; `costs` are those of a query to teacher and student."""
    if not pairs:
        raise DatasetError("There are no queries to calibrate on.")
    scores = [one.confidence for one in pairs]
    wrong, groups = [not one.agrees for one in pairs], [one.group for one in pairs]
    found = []
    for epsilon in epsilons:
        chosen = certify(scores, wrong, groups, epsilon)
        point = Point(epsilon, 0.0)
        if chosen is not None:
            whole = chosen.threshold == -float("inf")
            point = Point(
                epsilon,
                chosen.rows / len(pairs),
                None if whole else chosen.threshold,
                chosen.rows,
                chosen.wrong,
                chosen.bound,
            )
        found.append(replace(point, saved=_saved(point.served, costs)))
    return found


class Confidence:
    """How sure a student is of its answer: one number of all of its tokens, the higher the surer.

    It is the least, the mean or the sum of their log-probabilities, or that of the whole answer
    among the recipe's choices (`choices`).
    """

    def __init__(self, recipe: Recipe, score: Score) -> None:
        """Raises `SettingsError` for a student that says more than one of the choices."""
        self._recipe, self.score = recipe, score
        parts = recipe.parts if score == "choices" else []
        self._choices = {part.name: _said_choices(part) for part in parts}

    @property
    def likeliest(self) -> int:
        """How many of the likeliest tokens of each place it needs to know."""
        return _LIKELIEST if self._choices else 0

    def of(self, query: str, places: Sequence[Place]) -> float:
        """That of an answer; raises `DatasetError` where its tokens don't tell."""
        values = [one.logprob for one in places]
        if not values:
            raise DatasetError(
                "The student's server gave no log-probabilities: serve it with `serve`."
            )
        if self.score != "choices":
            total = sum(values)
            return {"least": min(values), "sum": total, "mean": total / len(values)}[self.score]
        if not all(one.likeliest for one in places):
            raise DatasetError(
                "The student's server gave no top_logprobs, of which the score 'choices' needs "
                f"{_LIKELIEST} a token: serve it with `serve`, or calibrate by another score."
            )
        choices = self._choices[self._recipe.part(query)[0].name]
        # No part of a character begins a choice of ASCII, so that such an answer is none of them.
        if any("\ufffd" in one.token for one in places) and not all(map(str.isascii, choices)):
            raise DatasetError(
                "The student says choices in tokens that are parts of characters, of which nobody "
                "can tell which choice they begin: calibrate by another score."
            )
        return choice_logprob(places, choices)


def _said_choices(recipe: Recipe) -> Sequence[str]:
    """What a student says for each of a recipe's choices."""
    choices, reader = recipe.answer.choices, recipe.student_reader
    texts = [recipe.write_response(one, one) for one in choices]
    if not choices or [reader.read(one, "stop").answer for one in texts] != list(choices):
        raise SettingsError(
            "The score 'choices' is the probability of an answer among all that there are: "
            "expected `answer.choices` and a student that says one of them and nothing else; found "
            f"{list(choices)[:5]} and the response {recipe.response!r} in {recipe.name!r}. Choose "
            "another score."
        )
    return texts


def _places(samples: Iterable[Sample], decode: Callable[[Any], str]) -> Iterator[list[Place]]:
    """The tokens of each sample in texts; none where its server gives no log-probabilities."""
    for sample in samples:
        found = sample.logprobs or Logprobs((), ())
        rows = zip_longest(found.tokens, found.logprobs, found.top_tokens, found.top_logprobs)
        yield [
            Place(
                decode(token), value, list(zip(map(decode, ids or ()), values or (), strict=True))
            )
            for token, value, ids, values in rows
        ]


def _ask(
    recipe: Recipe, queries: Sequence[str], sampler: Sampler, path: Path, likeliest: int
) -> list[Sample]:
    """The student's answer to each query, with its log-probabilities."""
    plain = replace(greedy(recipe), top_logprobs=likeliest)
    with Journal(path) as journal:
        client = CachedClient(journal, limits=Limits(_CONCURRENCY))
        with Progress("calibrate", len(queries), unit="queries") as progress:
            client.progress = progress

            async def one(query: str) -> Sample:
                asked = recipe.student_messages(query), recipe.fitted_to_student(query, plain)
                reply = await client.sample(sampler, *asked)
                progress.advance()
                return reply.samples[0]

            return run_in_thread(lambda: all_of(map(one, queries)), stop=client.stop)


def _pairs(
    held_out: HeldOut, report: Path, sampler: TinkerSampler, known: Confidence
) -> Iterator[Pair]:
    """What the student says now, beside what the teacher said as it was measured."""
    recipe, journal = held_out.recipe, report.with_name("journal.sqlite")
    taught = {row["id"]: row["systems"]["teacher"]["answer"] for row in read_rows(report)}
    rows = [row for row in held_out.rows if row["id"] in taught]
    samples = _ask(recipe, [row["query"] for row in rows], sampler, journal, known.likeliest)
    decode = cache(lambda token: str(sampler.connection.tokenizer.decode([token])))
    for row, sample, places in zip(rows, samples, _places(samples, decode), strict=True):
        reader = recipe.part(row["query"])[0].student_reader
        answer = reader.read(sample.text, sample.stop_reason).answer
        # A teacher whose answer can't be read is agreed with by nobody.
        agrees = answer is not None and answer == taught[row["id"]]
        yield Pair(row["id"], row["group"], known.of(row["query"], places), agrees)


def _saved(served: float, costs: Mapping[str, float] | None) -> float | None:
    """The share of the teacher's cost that is saved, where the student is asked every query."""
    if costs is None or not costs[TEACHER]:
        return None
    return served - costs[STUDENT] / costs[TEACHER]


def _cells(point: Point) -> list[str]:
    saved = "" if point.saved is None else f"{point.saved:.1%}"
    if not point.served:
        least = f"none: {rows_to_certify(point.epsilon)} groups tell at the least"
        return [f"{point.epsilon:g}", "0.0%", least, "", "", "", saved]
    threshold = "all" if point.threshold is None else f"{point.threshold:.4g}"
    counts = [f"{point.rows}", f"{point.disagreements}", f"{point.bound:.4f}"]
    return [f"{point.epsilon:g}", f"{point.served:.1%}", threshold, *counts, saved]

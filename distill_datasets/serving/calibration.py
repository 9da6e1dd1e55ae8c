"""When the student may answer alone: a threshold of its confidence, with a guarantee.

What a student says with less confidence goes to the teacher. Of what the student serves, it
disagrees with its teacher in at most a share that is asked for, with 95 % confidence.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from itertools import zip_longest
from math import ceil, exp, lgamma, log, log1p
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from distill_datasets.errors import DatasetError, SettingsError
from distill_datasets.evaluation.money import STUDENT, TEACHER, money_of_run
from distill_datasets.evaluation.page import write_page
from distill_datasets.evaluation.systems import greedy, read_held_out
from distill_datasets.files import (
    calibration_file,
    one_writer,
    read_report,
    read_rows,
    report_file,
    split_report,
    write_file,
)
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient, ManyRequests
from distill_datasets.generation.rate_limit import Limits
from distill_datasets.models.references import checkpoints_in, connect, read_training
from distill_datasets.models.sampler import Logprobs
from distill_datasets.progress import interruptible
from distill_datasets.serving.protocol import Place
from distill_datasets.statistics import LEVEL, boundary
from distill_datasets.tables import aligned

if TYPE_CHECKING:
    from distill_datasets.evaluation.systems import HeldOut
    from distill_datasets.generation.pricing import Prices
    from distill_datasets.models.sampler import Sample
    from distill_datasets.models.tinker import TinkerSampler
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
_ROUNDED = 1e-6  # of a sum of parts of groups
_LEAST = -1e3  # a log-probability
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
    from distill_datasets.models.tinker import TinkerSampler

    if not epsilons or not all(0 < one < 1 for one in epsilons) or score not in SCORES:
        raise SettingsError(
            "Expected epsilons above 0 and below 1, and a score of "
            f"{', '.join(SCORES)}; found {', '.join(map(str, epsilons)) or 'none'} and {score!r}."
        )
    path = split_report(report_file(run).parent, split)
    report = read_report(path)
    training = _measured_training(path, report)
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


def _measured_training(path: Path, report: Mapping[str, Any]) -> Path:
    """The training in a report's folder whose best checkpoint the report is about."""
    student, run = report["systems"]["student"]["model"], path.parent
    saved = checkpoints_in(run)
    training, found = saved.get(student), list(dict.fromkeys(saved.values()))
    if training is not None and read_training(training)[1]["sampler"] == student:
        return training
    if not found:
        raise DatasetError(
            f"{str(run)!r} holds no trained student: expected the training of {student}, which "
            f"{path.name} is about. Run `train` with --out {run / 'train'}, and measure that."
        )
    raise DatasetError(
        f"{str(path)!r} is about {student}, which is the best checkpoint of no training in that "
        f"folder; found {', '.join(map(str, found))}. Measure one of them: "
        f"distill-datasets measure {report['dataset']['path']} --student {found[0]} --out {run}."
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
    found = [certify(scores, wrong, groups, epsilon) for epsilon in epsilons]
    if costs is None or not costs[TEACHER]:
        return found
    asked = costs[STUDENT] / costs[TEACHER]  # the student is asked every query
    return [replace(one, saved=one.served - asked) for one in found]


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


def _places(sample: Sample, decode: Callable[[Any], str]) -> list[Place]:
    """The tokens of a sample in texts; none where its server gives no log-probabilities."""
    found = sample.logprobs or Logprobs((), ())
    rows = zip_longest(found.tokens, found.logprobs, found.top_tokens, found.top_logprobs)
    return [
        Place(decode(token), value, list(zip(map(decode, ids or ()), values or (), strict=True)))
        for token, value, ids, values in rows
    ]


def _pairs(
    held_out: HeldOut, report: Path, sampler: TinkerSampler, known: Confidence
) -> Iterator[Pair]:
    """What the student says now, beside what the teacher said as it was measured."""
    recipe = held_out.recipe
    taught = {row["id"]: row["systems"]["teacher"]["answer"] for row in read_rows(report)}
    rows = [row for row in held_out.rows if row["id"] in taught]
    plain = replace(greedy(recipe), top_logprobs=known.likeliest)
    requests = [
        (sampler, recipe.student_messages(query), recipe.fitted_to_student(query, plain))
        for query in (row["query"] for row in rows)
    ]
    with Journal(report.with_name("journal.sqlite")) as journal:
        client = CachedClient(journal, limits=Limits(_CONCURRENCY))
        replies = ManyRequests(requests).ask(client, title="calibrate")
    decode = cache(lambda token: str(sampler.connection.tokenizer.decode([token])))
    for row, sample in zip(rows, (one.samples[0] for one in replies), strict=True):
        reader = recipe.part(row["query"])[0].student_reader
        answer = reader.read(sample.text, sample.stop_reason).answer
        # A teacher whose answer can't be read is agreed with by nobody.
        agrees = answer is not None and answer == taught[row["id"]]
        confidence = known.of(row["query"], _places(sample, decode))
        yield Pair(row["id"], row["group"], confidence, agrees)


def _cells(point: Point) -> list[str]:
    saved = "" if point.saved is None else f"{point.saved:.1%}"
    if not point.served:
        least = f"none: {rows_to_certify(point.epsilon)} groups tell at the least"
        return [f"{point.epsilon:g}", "0.0%", least, "", "", "", saved]
    threshold = "all" if point.threshold is None else f"{point.threshold:.4g}"
    counts = [f"{point.rows}", f"{point.disagreements}", f"{point.bound:.4f}"]
    return [f"{point.epsilon:g}", f"{point.served:.1%}", threshold, *counts, saved]


def binomial_tail(k: float, n: float, share: float) -> float:
    """How likely at most `k` of `n` rows are, each with a chance of `share`; both may be parts of
    rows, as of effective ones.

    >>> round(binomial_tail(0, 299, 0.01), 4)
    0.0495
    """
    if k >= n or share <= 0:
        return 1.0
    return 0.0 if share >= 1 else _incomplete_beta(n - k, k + 1, 1 - share)


def share_at_most(k: float, n: float, level: float = LEVEL) -> float:
    """Clopper and Pearson's upper bound, one-sided, of a share of which `n` rows show `k`.

    >>> round(share_at_most(0, 299), 4)
    0.01
    """
    return boundary(1.0, 0.0, lambda share: binomial_tail(k, n, share) <= 1 - level)


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised one, by Lentz's continued fraction."""
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    least = 1e-300
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log(1 - x)) / a
    c, d = 1.0, 1 / max(1 - (a + b) * x / (a + 1), least)
    found = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for part in (even, odd):
            d = 1 / (1 + part * d or least)
            c = 1 + part / c or least
            found *= c * d
        if abs(c * d - 1) < 1e-12:
            break
    return front * found


def certify(
    scores: Sequence[float],
    wrong: Sequence[bool],
    groups: Sequence[str],
    most: float,
    level: float = LEVEL,
) -> Point:
    """The lowest threshold above which at most a share of `most` is wrong.

    It holds with a probability of `level` over the groups that it was chosen by. Those are a sample
    of all groups, so that a binomial test says whether too many of what scores above a score are
    wrong. Tests go on to lower scores until the first that can't tell, from up to three places that
    only the scores decide, each at its part of what may fail; so the choice among all of them costs
    nothing more (Angelopoulos et al., "Learn then test", 2021). The rows of a group count as one
    together, however much they differ: how alike those are that are served, and all of them right,
    nothing tells.
    """
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    falling, errors = -np.asarray(scores, np.float64)[order], np.asarray(wrong)[order]
    sizes = Counter(groups)
    parts = np.array([1 / sizes[group] for group in groups])[order]
    served = np.concatenate([[0], np.cumsum(parts)])
    failed = np.concatenate([[0], np.cumsum(parts * errors)])
    starts, each = _starts(len(sizes), most, level)
    n, best = len(order), 0
    for start in starts:
        first = int(np.searchsorted(served, start - _ROUNDED))
        ranks = np.arange(first, n, max(1, (n - first) // 50))
        # Rows that tie with the next one are not above it.
        tested = {*np.searchsorted(falling, falling[ranks]).tolist(), n}
        for rows in sorted(size for size in tested if size >= first):
            if binomial_tail(failed[rows], served[rows], most) > 1 - each:
                break
            best = max(best, rows)
    if not best:
        return Point(most, 0.0)
    threshold = None if best == n else float(-falling[best])
    bound = share_at_most(failed[best], served[best], each)
    return Point(most, best / n, threshold, best, int(errors[:best].sum()), bound)


def rows_to_certify(most: float, level: float = LEVEL) -> int:
    """How many groups, none of their rows wrong, `certify` needs at the least.

    >>> rows_to_certify(0.01)
    299
    """
    return ceil(log(1 - level) / log(1 - most))


@lru_cache(maxsize=256)
def _starts(n: int, most: float, level: float) -> tuple[list[int], float]:
    """How many groups are tested first, so that 0, 2 or 5 wrong ones may pass, and the level of
    each test; as many as `n` groups allow.
    """
    for allowed in ((0, 2, 5), (0, 2), (0,)):
        each = 1 - (1 - level) / len(allowed)

        def passes(size: int, k: int, each: float = each) -> bool:
            return binomial_tail(k, size, most) <= 1 - each

        if n and passes(n, allowed[-1]):
            return [
                bisect_left(range(n + 1), True, key=lambda m: passes(m, k)) for k in allowed
            ], each
    return [], level


def choice_logprob(places: Iterable[Place], choices: Collection[str]) -> float:
    """The log-probability of an answer among the `choices`, in whatever tokens they are spelled.

    It is that of sampling which is held to them: at each place tokens are possible with which a
    choice goes on, and behind a whole choice everything else ends it. What is less likely than the
    `likeliest` is left out, and other tokens that leave open which choice it will be count against
    it. An answer that is none of the choices gets the least that there is.

    >>> rivals = [("yes", log(0.6)), ("no", log(0.2)), ("so", log(0.1))]
    >>> round(exp(choice_logprob([Place("yes", log(0.6), rivals)], ["yes", "no"])), 3)
    0.75
    """
    begun, said, walked = "", None, list[tuple[str, Place]]()
    for place in places:
        possible = _possible(begun, place.token, choices)
        walked.append((begun, place))
        if not possible or begun in possible:
            said = begun if possible else None
            break
        begun = (begun + place.token).lstrip()
    else:
        said = begun
    if said not in choices:
        return _LEAST
    doubt = 0.0
    for begun, place in reversed(walked):
        own = exp(place.logprob)
        sure, other = own * (1 - doubt), own * doubt
        for token, logprob in place.likeliest:
            if token != place.token and (possible := _possible(begun, token, choices)):
                if possible == {said}:
                    sure += exp(logprob)
                else:
                    other += exp(logprob)
        doubt = other / (sure + other)
    return log1p(-doubt) if doubt < 1 else _LEAST


def _possible(begun: str, token: str, choices: Collection[str]) -> set[str]:
    """The choices that an answer which `begun` so may still be, with this token behind it."""
    text = (begun + token).lstrip()
    found = {one for one in choices if one.startswith(text)}
    return found or ({begun} if begun in choices else set())

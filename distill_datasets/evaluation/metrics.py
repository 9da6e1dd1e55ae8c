"""`evaluate` metrics that need no download, and their intervals by bootstrap."""

from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray

from distill_datasets.errors import DatasetError, RecipeError
from distill_datasets.statistics import Estimate, Floats, resamples

Answers = Sequence[str | None]
# From weights (resamples x rows) to one value a resample: a row drawn twice weighs 2.
Statistic = Callable[[Floats], Floats]

_RESAMPLES = 2_000
_RESAMPLES_OF_OTHERS = 200  # each is one `compute` of a metric that isn't ours


class _Metric(evaluate.Metric):  # type: ignore[misc]  # evaluate ships no types
    """A prediction is an answer; None or an empty text is none."""

    meaning = ""
    compared = True

    def _info(self) -> evaluate.MetricInfo:
        # `evaluate` refuses None in a `string` column, not in this one.
        text = datasets.Value("large_string")
        columns = ("predictions", "references") if self.compared else ("predictions",)
        return evaluate.MetricInfo(
            description=self.meaning,
            citation="",
            inputs_description="Texts; None where there is no answer.",
            features=datasets.Features(dict.fromkeys(columns, text)),
        )

    def _compute(self, predictions: Answers, references: Answers = ()) -> dict[str, float]:
        whole = np.ones((1, len(predictions)))
        return {self.name: float(self.statistic(predictions, references)(whole)[0])}

    @staticmethod
    def statistic(predictions: Answers, references: Answers) -> Statistic:
        """How the rows' weights decide the value."""
        raise NotImplementedError


class Accuracy(_Metric):
    """The share of rows whose prediction equals the reference; no answer is wrong."""

    meaning = "Share of rows whose prediction equals the reference; no answer is wrong."

    @staticmethod
    def statistic(predictions: Answers, references: Answers) -> Statistic:  # noqa: D102
        pairs = zip(predictions, references, strict=True)
        return _share([bool(found) and found == expected for found, expected in pairs])


class Agreement(Accuracy):
    """Accuracy against another system's answers; where it gave none, nobody agrees."""

    meaning = "Share of rows whose prediction equals the teacher's answer, where it gave one."


class Answered(_Metric):
    """The share of rows with an answer, right or wrong."""

    meaning = "Share of rows with an answer, right or wrong."
    compared = False

    @staticmethod
    def statistic(predictions: Answers, references: Answers = ()) -> Statistic:  # noqa: D102
        return _share([bool(found) for found in predictions])


class MacroF1(_Metric):
    """The plain mean of F1 over the classes that occur in the references.

    No answer, and an answer that is no such class, misses its row's class and is a false alarm
    of none: `sklearn.metrics.f1_score(labels=sorted(set(references)), average="macro")`. In a
    resample the classes are those that its own references hold.
    """

    meaning = "Plain mean of F1 over the classes that occur in the references."

    @staticmethod
    def statistic(predictions: Answers, references: Answers) -> Statistic:  # noqa: D102
        classes = sorted({expected for expected in references if expected})
        if not classes:
            raise DatasetError("macro_f1 needs references, and found none; use `agreement`.")
        place = {name: index for index, name in enumerate(classes)}
        other = len(classes)
        truth = np.array([place.get(expected or "", other) for expected in references])
        guess = np.array([place.get(found or "", other) for found in predictions])
        hits = np.where(truth == guess, truth, other)

        def macro_f1(weights: Floats) -> Floats:
            true, guessed, hit = (_totals(weights, codes, other) for codes in (truth, guess, hits))
            f1 = 2 * hit / np.maximum(true + guessed, 1e-12)
            present = true > 0
            values: Floats = (f1 * present).sum(axis=1) / np.maximum(present.sum(axis=1), 1)
            return values

        return macro_f1


_OURS: dict[str, type[_Metric]] = {
    "accuracy": Accuracy,
    "macro_f1": MacroF1,
    "answered": Answered,
    "agreement": Agreement,
}


def load_metric(name: str) -> evaluate.Metric:
    """One of ours by its name, else whatever `evaluate.load` finds: a script's path, a Hub id.

    Ours need no network. Raises `RecipeError` that lists ours when nothing is found.
    """
    if name in _OURS:
        return _OURS[name](keep_in_memory=True)
    try:
        return evaluate.load(name, keep_in_memory=True)
    except (OSError, ImportError, ValueError) as error:
        close = get_close_matches(name, _OURS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise RecipeError(
            f"The metric {name!r} can't be loaded ({error}). Expected one of {sorted(_OURS)}, "
            f"the path of a metric's script, or a metric of the Hub.{hint}"
        ) from error


def estimate(
    metric: evaluate.Metric,
    predictions: Answers,
    references: Answers,
    groups: Sequence[str],
    *,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Each number of a metric, with its bootstrap over groups.

    Rows of one group (translations of a text) are drawn together, since they aren't independent;
    where every row is its own group this is the bootstrap over rows. Ours take 2,000 resamples; a
    metric that isn't ours is computed 201 times, with an empty text for no answer.
    """
    if not predictions:
        raise DatasetError("There are no rows to compute a metric on.")
    if isinstance(metric, _Metric):
        statistic = metric.statistic(predictions, references)
        value = float(statistic(np.ones((1, len(predictions))))[0])
        drawn = [statistic(weights) for weights in resamples(groups, _RESAMPLES, seed)]
        return {metric.name: Estimate(value, np.concatenate(drawn))}
    return _recomputed(
        metric, predictions, references, resamples(groups, _RESAMPLES_OF_OTHERS, seed)
    )


def _share(holds: Sequence[bool]) -> Statistic:
    held = np.array(holds, dtype=np.float64)
    return lambda weights: np.asarray(weights @ held / weights.sum(axis=1))


def _totals(weights: Floats, codes: NDArray[np.int64], size: int) -> Floats:
    """The weight of each code below `size`, in each resample."""
    return np.stack([np.bincount(codes, row, minlength=size + 1)[:size] for row in weights])


def _recomputed(
    metric: evaluate.Metric, predictions: Answers, references: Answers, chunks: Iterator[Floats]
) -> dict[str, Estimate]:
    """Estimates of a metric that can only be computed on rows that are really repeated."""
    found, expected = ([text or "" for text in texts] for texts in (predictions, references))
    whole = _numbers(metric, found, expected)
    draws = []
    for weights in (row for chunk in chunks for row in chunk):
        places = np.repeat(np.arange(len(found)), weights.astype(int))
        drawn = ([texts[place] for place in places] for texts in (found, expected))
        draws.append(_numbers(metric, *drawn))
    return {name: Estimate(whole[name], np.array([draw[name] for draw in draws])) for name in whole}


def _numbers(
    metric: evaluate.Metric, found: Sequence[str], expected: Sequence[str]
) -> dict[str, float]:
    """The numbers among a metric's results; one alone goes by the metric's name."""
    try:
        results = metric.compute(predictions=found, references=expected)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"The metric {metric.name!r} can't compare texts: {error} Expected one that takes "
            "strings as predictions and references; take it out of the recipe's `metrics`."
        ) from error
    numbers = {
        key: float(value) for key, value in results.items() if isinstance(value, int | float)
    }
    if not numbers:
        raise RecipeError(f"The metric {metric.name!r} gives no number, only {sorted(results)}.")
    return {metric.name: next(iter(numbers.values()))} if len(numbers) == 1 else numbers

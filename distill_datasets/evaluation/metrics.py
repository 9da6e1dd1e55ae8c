"""Metrics, ours by name and the user's own, and the numbers of a report that they make.

A recipe names metrics of ours alone, which need no network. Code runs only for a metric that the
user names: see `MeasureSettings`.
"""

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from math import isfinite
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from distill_datasets.errors import DatasetError, RecipeError, SettingsError, nearest
from distill_datasets.recipes.checks import field_share
from distill_datasets.similarity import chrf, equal, rouge_l
from distill_datasets.statistics import Bootstrap, Estimate, Floats, Proportion, resamples

if TYPE_CHECKING:
    import evaluate

Answers = Sequence[str | None]
Column = Sequence[Any]

ALWAYS = ("answered", "agreement")  # need no references
_RESAMPLES = 2_000
_RESAMPLES_OF_OWN = 200  # each computes a user's metric once
_BINS = np.arange(1, 10) / 10


class _Metric:
    columns: Sequence[str] = ("predictions", "references")
    kind = "large_string"  # `evaluate` refuses None in a `string` column, not in this one
    described = "Texts; None or an empty text where there is no answer."

    def __init__(self, name: str) -> None:
        self.name = name

    def estimate(self, found: Column, right: Column, groups: Sequence[str]) -> Estimate:
        """The value with its interval."""
        raise NotImplementedError

    def module(self) -> "evaluate.Metric":
        """The value alone, as a module of `evaluate` by the metric's name."""
        import datasets
        import evaluate

        ours = self

        class Module(evaluate.Metric):  # type: ignore[misc]  # evaluate ships no types
            def _info(self) -> evaluate.MetricInfo:
                return evaluate.MetricInfo(
                    description=ours.__doc__,
                    citation="",
                    inputs_description=ours.described,
                    features=datasets.Features(
                        dict.fromkeys(ours.columns, datasets.Value(ours.kind))
                    ),
                )

            def _compute(self, predictions: Column, references: Column = ()) -> dict[str, float]:
                alone = [str(row) for row in range(len(predictions))]
                return {ours.name: ours.estimate(predictions, references, alone).value}

        Module.__name__ = type(ours).__name__
        return Module(keep_in_memory=True)


class Accuracy(_Metric):
    """The share of rows whose prediction equals the reference; no answer is wrong."""

    def estimate(self, found: Answers, right: Answers, groups: Sequence[str]) -> Estimate:  # noqa: D102
        pairs = zip(found, right, strict=True)
        return Proportion([float(bool(text) and text == known) for text, known in pairs], groups)


class Agreement(Accuracy):
    """Accuracy against the teacher's answers; where it gave none, nobody agrees."""


class Answered(_Metric):
    """The share of rows with an answer, right or wrong."""

    columns = ("predictions",)

    def estimate(self, found: Answers, right: Answers, groups: Sequence[str]) -> Estimate:  # noqa: D102
        return Proportion([float(bool(text)) for text in found], groups)


class MacroF1(_Metric):
    """The plain mean of F1 over the classes that occur in the references.

    No answer, and an answer that is no such class, misses its row's class and is a false alarm
    of none: `sklearn.metrics.f1_score(labels=sorted(set(references)), average="macro")`. In a
    resample the classes are those that its own references hold.
    """

    def estimate(self, found: Answers, right: Answers, groups: Sequence[str]) -> Estimate:  # noqa: D102
        classes = sorted({known for known in right if known})
        if not classes:
            raise DatasetError("macro_f1 needs references, and found none; use `agreement`.")
        place = {name: index for index, name in enumerate(classes)}
        other = len(classes)
        truth = np.array([place.get(known or "", other) for known in right])
        guess = np.array([place.get(text or "", other) for text in found])
        hits = np.where(truth == guess, truth, other)

        def macro_f1(weights: Floats) -> Floats:
            true, guessed, hit = (_totals(weights, codes, other) for codes in (truth, guess, hits))
            f1 = 2 * hit / np.maximum(true + guessed, 1e-12)
            present = true > 0
            values: Floats = (f1 * present).sum(axis=1) / np.maximum(present.sum(axis=1), 1)
            return values

        # A mean over classes is as certain as its rarest class, and as the groups, let it be.
        of_class = Counter(code for code, _ in set(zip(truth.tolist(), groups, strict=True)))
        n = min(len(set(groups)), other**2 / sum(1 / of_class[code] for code in range(other)))
        value = float(macro_f1(np.ones((1, len(truth))))[0])
        return Bootstrap(value, _draws(macro_f1, groups), n)


def _totals(weights: Floats, codes: NDArray[np.int64], size: int) -> Floats:
    """The weight of each code below `size`, in each resample."""
    return np.stack([np.bincount(codes, row, minlength=size + 1)[:size] for row in weights])


def _draws(statistic: Callable[[Floats], Floats], groups: Sequence[str]) -> Floats:
    """A statistic of the rows' weights, in every resample of the groups."""
    return np.concatenate([statistic(weights) for weights in resamples(groups, _RESAMPLES)])


def mean_of(values: Floats, groups: Sequence[str]) -> Bootstrap:
    """The mean over the rows that have a value, with its bootstrap over groups."""
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)

    def mean(weights: Floats) -> Floats:
        with np.errstate(invalid="ignore"):
            means: Floats = (weights @ filled) / (weights @ known)
        return means

    value = float(mean(np.ones((1, len(values))))[0])
    return Bootstrap(value, _draws(mean, groups), _group_count(known, groups))


def ratio_of(above: Sequence[float], below: Sequence[float], groups: Sequence[str]) -> Bootstrap:
    """The ratio of two sums over the same rows, with its bootstrap over groups."""
    first, second = np.array(above), np.array(below)

    def ratio(weights: Floats) -> Floats:
        ratios: Floats = (weights @ first) / (weights @ second)
        return ratios

    return Bootstrap(float(ratio(np.ones((1, len(first))))[0]), _draws(ratio, groups))


def _group_count(known: NDArray[np.bool_], groups: Sequence[str]) -> float:
    return float(len({group for group, one in zip(groups, known, strict=True) if one}))


class FieldMatch(_Metric):
    """The mean share of the reference's values that the answer has in the same place.

    Both are JSON, or `key: value; key: value`. No answer has none of them; what the answer has
    beside them doesn't count.
    """

    def estimate(self, found: Answers, right: Answers, groups: Sequence[str]) -> Estimate:  # noqa: D102
        pairs = zip(found, right, strict=True)
        return mean_of(np.array([field_share(text, known or "") for text, known in pairs]), groups)


class Similarity(_Metric):
    """The mean over the rows of how alike an answer and its reference are, from 0 to 1."""

    score: Callable[[str, str], float]

    def estimate(self, found: Answers, right: Answers, groups: Sequence[str]) -> Estimate:  # noqa: D102
        pairs = zip(found, right, strict=True)
        scores = [type(self).score(text or "", known or "") for text, known in pairs]
        return mean_of(np.array(scores), groups)


class Chrf(Similarity):
    """The mean chrF of the rows: runs of one to six characters that answer and reference share."""

    score = staticmethod(chrf)


class RougeL(Similarity):
    """The mean ROUGE-L of the rows: the longest run of words that both have in order."""

    score = staticmethod(rouge_l)


class ExactMatch(Similarity):
    """The share of rows whose answer is the reference, white space at the ends aside."""

    score = staticmethod(equal)


class Calibration(_Metric):
    """Of confidences from 0 to 1, NaN where none was said, against 1 for right and 0 for wrong."""

    kind = "float64"
    described = "Confidences, NaN where none was said, and 1 for right, 0 for wrong."


class Brier(Calibration):
    """The mean square of confidence minus rightness: 0 is best, and 0.25 is always saying 0.5."""

    def estimate(self, found: Column, right: Column, groups: Sequence[str]) -> Estimate:  # noqa: D102
        return mean_of((np.array(found, float) - np.array(right, float)) ** 2, groups)


class Ece(Calibration):
    """The expected calibration error: how far, on average, confidence is from accuracy.

    Rows are in ten bins of equal width by their confidence, the first from 0 to 0.1 and with 0.1;
    the distances of the bins' mean confidence from their accuracy are weighted by their rows.
    """

    def estimate(self, found: Column, right: Column, groups: Sequence[str]) -> Estimate:  # noqa: D102
        said = np.array(found, float)
        known = np.isfinite(said)
        gaps = np.where(known, said - np.array(right, float), 0.0)
        bins = np.digitize(said, _BINS, right=True)
        members = np.stack([gaps * (bins == place) for place in range(len(_BINS) + 1)], axis=1)

        def error(weights: Floats) -> Floats:
            with np.errstate(invalid="ignore"):
                errors: Floats = np.abs(weights @ members).sum(axis=1) / (weights @ known)
            return errors

        value = float(error(np.ones((1, len(said))))[0])
        draws = _draws(error, groups)
        # Drawing rows anew makes every bin's distance noisier, and so greater, than it is.
        centred = np.clip(draws - np.nanmean(draws) + value, 0.0, 1.0)
        return Bootstrap(value, centred, _group_count(known, groups))


_OURS = {
    "accuracy": Accuracy,
    "macro_f1": MacroF1,
    "answered": Answered,
    "agreement": Agreement,
    "field_match": FieldMatch,
    "chrf": Chrf,
    "rouge_l": RougeL,
    "exact_match": ExactMatch,
    "ece": Ece,
    "brier": Brier,
}


def load_metric(name: str) -> _Metric:
    """One of ours; raises `RecipeError` that lists them for any other name."""
    if name not in _OURS:
        raise RecipeError(
            f"There is no metric {name!r}: expected one of {sorted(_OURS)}."
            f"{nearest(name, [*_OURS])} A metric of your own is no part of a recipe: give it to "
            "`measure`, as --metric path.py:Name."
        )
    return _OURS[name](name)


@dataclass(frozen=True)
class OwnMetric:
    """A user's metric. `key` names its code, None where that can't be known."""

    name: str
    compute: Callable[[list[str], list[str]], Any]
    key: str | None = None

    def numbers(self, predictions: Answers, references: Answers) -> dict[str, float]:
        """What it gives, by name; one number alone goes by the metric's own.

        Raises `SettingsError` where it raises anything, or gives no finite number.
        """
        found, expected = ([text or "" for text in texts] for texts in (predictions, references))
        expects = "lists of texts, predictions and references; no answer is an empty text"
        with _foreign(f"The metric {self.name!r} can't compare these texts", expects):
            given = self.compute(found, expected)
        results = given if isinstance(given, Mapping) else {self.name: given}
        numbers = {
            str(key): float(value)
            for key, value in results.items()
            if isinstance(value, int | float | np.number)
        }
        if not numbers:
            shown = sorted(results) if isinstance(given, Mapping) else repr(given)
            raise SettingsError(f"The metric {self.name!r} gives no number, only {shown}.")
        if endless := [name for name, value in numbers.items() if not isfinite(value)]:
            raise SettingsError(
                f"The metric {self.name!r} gives {numbers[endless[0]]} as {endless[0]!r}: "
                "expected a finite number."
            )
        return {self.name: next(iter(numbers.values()))} if len(numbers) == 1 else numbers

    def estimates(
        self, predictions: Answers, references: Answers, groups: Sequence[str]
    ) -> dict[str, Estimate]:
        """Each number with its bootstrap: computed 201 times, on rows that are really repeated.

        Where it can't be computed on a resample, there is no draw.
        """
        whole = self.numbers(predictions, references)
        draws: dict[str, list[float]] = {name: [] for name in whole}
        for chunk in resamples(groups, _RESAMPLES_OF_OWN):
            for weights in chunk:
                places = np.repeat(np.arange(len(predictions)), weights.astype(int)).tolist()
                drawn = ([texts[place] for place in places] for texts in (predictions, references))
                try:
                    found = self.numbers(*drawn)
                except SettingsError:
                    found = {}
                for name, values in draws.items():
                    values.append(found.get(name, np.nan))
        return {name: Bootstrap(whole[name], np.array(values)) for name, values in draws.items()}


def load_own_metric(given: Any) -> OwnMetric:
    """The user's metric: `path.py:Name`, a function, an `evaluate.Metric` or its class.

    Runs the file. Raises `SettingsError` where there is none such.
    """
    key = None
    if isinstance(given, str | Path):
        path, _, name = str(given).rpartition(":")
        if not path.endswith(".py") or not name:
            raise SettingsError(
                f"{str(given)!r} names no metric: expected path.py:Name, a file and what it "
                f"defines. Ours ({', '.join(sorted(_OURS))}) are named in the recipe."
            )
        module = _run_file(Path(path))
        if not hasattr(module, name):
            known = [one for one, it in vars(module).items() if callable(it) and one[:1] != "_"]
            raise SettingsError(
                f"{path!r} defines no {name!r}: expected a metric of that name; found "
                f"{known}.{nearest(name, known)}"
            )
        key = sha256(Path(path).read_bytes()).hexdigest() + name
        given = getattr(module, name)
    import evaluate

    if isinstance(given, type):
        given = given(keep_in_memory=True) if issubclass(given, evaluate.Metric) else given()
    if isinstance(given, evaluate.EvaluationModule):
        return OwnMetric(given.name, _computing(given), key)
    if not callable(given):
        raise SettingsError(
            f"{given!r} is no metric: expected path.py:Name, a function of predictions and "
            "references, or an `evaluate.Metric`."
        )
    return OwnMetric(getattr(given, "__name__", type(given).__name__), given, key)


def _computing(module: "evaluate.EvaluationModule") -> Callable[[list[str], list[str]], Any]:
    return lambda found, expected: module.compute(predictions=found, references=expected)


def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_metric_{uuid4().hex}", path)
    if not path.is_file() or spec is None:
        raise SettingsError(f"There is no file {str(path)!r} to load a metric from.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module here
    with _foreign(f"{str(path)!r} can't be run for its metric", "a file that Python runs"):
        # Not by the loader: for a file that is edited within a second it has the old code's bytes.
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)  # noqa: S102
    return module


@contextmanager
def _foreign(problem: str, expects: str) -> Iterator[None]:
    """Tells whatever a user's own code raises as an error of the settings that name it."""
    try:
        yield
    except Exception as error:
        raise SettingsError(f"{problem}: {error!r}. Expected {expects}.") from error


@dataclass(frozen=True)
class Metrics:
    """The recipe's metrics, those that need no reference, and the user's own."""

    ours: Mapping[str, _Metric]
    own: Sequence[OwnMetric] = ()

    @classmethod
    def load(
        cls,
        names: Sequence[str],
        own: Sequence[Any],
        references: Answers,
        *,
        always: Sequence[str] = ALWAYS,
    ) -> "Metrics":
        """Load all, and try the user's on these references, as if everything was right.

        Raises `RecipeError` or `SettingsError` before anything is asked.
        """
        ours = {name: load_metric(name) for name in dict.fromkeys((*names, *always))}
        found = [load_own_metric(one) for one in own]
        taken = list(ours)
        known = [reference for reference in references if reference]
        for metric in found:
            results = metric.numbers(known, known) if known else {metric.name: 0.0}
            if twice := [name for name in results if name in taken]:
                raise SettingsError(
                    f"Two metrics give {twice[0]!r}: give yours another name ({metric.name!r})."
                )
            taken += results
        return cls(ours, found)

    @property
    def names(self) -> list[str]:
        """Of those that need references."""
        return [*(name for name in self.ours if name not in ALWAYS), *(m.name for m in self.own)]

    @property
    def key(self) -> list[str]:
        """Names them and their code; never the same twice where that can't be known."""
        return [*self.ours, *(metric.key or uuid4().hex for metric in self.own)]

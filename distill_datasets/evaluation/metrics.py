"""Metrics, ours by name and the user's own, and the numbers of a report that they make.

A recipe names metrics of ours alone, which need no network. Code runs only for a metric that the
user names: see `MeasureSettings`.
"""

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from itertools import compress
from math import isfinite
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import regex
from numpy.typing import NDArray

from distill_datasets.errors import DatasetError, RecipeError, SettingsError, nearest
from distill_datasets.recipes.checks import field_share
from distill_datasets.statistics import Bootstrap, Estimate, Floats, Proportion, resamples

if TYPE_CHECKING:
    import evaluate

Answers = Sequence[str | None]
Column = Sequence[Any]
# What was found, what is right, and which rows are related: the value with its interval.
Metric = Callable[[Column, Column, Sequence[str]], Estimate]

ALWAYS = ("answered", "agreement")  # need no references
# Of confidences from 0 to 1, NaN where none was said, against 1 for right and 0 for wrong.
CALIBRATIONS = ("ece", "brier")
_RESAMPLES = 2_000
_RESAMPLES_OF_OWN = 200  # each computes a user's metric once
_BINS = np.arange(1, 10) / 10
# How alike two texts are: written here rather than taken from `sacrebleu` and `rouge_score`, with
# which it agrees: the second knows no word outside ASCII, so that Arabic or Japanese texts are
# always 0 to it.
_ORDERS = range(1, 7)  # lengths of chrF's runs of characters
_BETA = 2  # recall weighs so many times as much as precision
_MOST_COMPARED = 20_000  # characters of a text that are compared
# Words; in scripts without spaces every character is one.
_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}]\p{M}*|[\p{L}\p{N}\p{M}]+"
)


def chrf(found: str, right: str) -> float:
    """The F score of runs of one to six characters, white space aside; recall counts twice.

    That of `sacrebleu.sentence_chrf`, divided by 100.

        >>> round(chrf("the cat sat", "the cat sits"), 3)
        0.61
    """
    ours, theirs = _runs(found[:_MOST_COMPARED]), _runs(right[:_MOST_COMPARED])
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a and b]
    if not pairs:
        return 0.0
    hits = [(sum((a & b).values()), sum(a.values()), sum(b.values())) for a, b in pairs]
    precision = sum(hit / said for hit, said, _ in hits) / len(pairs)
    recall = sum(hit / wanted for hit, _, wanted in hits) / len(pairs)
    if not precision + recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (_BETA**2 * precision + recall)


def rouge_l(found: str, right: str) -> float:
    """The F score of the longest run of words that both have in order, others between them.

    That of `rouge_score` on ASCII texts; words are compared without upper and lower case.
    """
    ours, theirs = _words(found[:_MOST_COMPARED]), _words(right[:_MOST_COMPARED])
    common = _longest_common(ours, theirs)
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def equal(found: str, right: str) -> float:
    """1 for equal texts, white space at their ends aside; two empty ones aren't equal."""
    return float(bool(found.strip()) and found.strip() == right.strip())


@lru_cache(maxsize=64)
def _runs(text: str) -> tuple[Counter[str], ...]:
    plain = "".join(text.split())
    return tuple(
        Counter(plain[start : start + size] for start in range(len(plain) - size + 1))
        for size in _ORDERS
    )


@lru_cache(maxsize=64)
def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.casefold()))


def _longest_common(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    """The length of the longest common subsequence; a bit for each word of the first, at once."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    row = 0
    for word in second:
        # Hyyrö's: the bits of `row` mark where the subsequence grows.
        either = row | places.get(word, 0)
        shifted = row << 1 | 1
        row = either & ~(either - shifted)
    return row.bit_count()


def accuracy(found: Answers, right: Answers, groups: Sequence[str]) -> Estimate:
    """The share of rows whose prediction equals the reference; no answer is wrong."""
    pairs = zip(found, right, strict=True)
    return Proportion([float(bool(text) and text == known) for text, known in pairs], groups)


def answered(found: Answers, right: Answers, groups: Sequence[str]) -> Estimate:
    """The share of rows with an answer, right or wrong."""
    return Proportion([float(bool(text)) for text in found], groups)


def macro_f1(found: Answers, right: Answers, groups: Sequence[str]) -> Estimate:
    """The plain mean of F1 over the classes that occur in the references.

    No answer, and an answer that is no such class, misses its row's class and is a false alarm
    of none: `sklearn.metrics.f1_score(labels=sorted(set(references)), average="macro")`. In a
    resample the classes are those that its own references hold.
    """
    classes = sorted({known for known in right if known})
    if not classes:
        raise DatasetError("macro_f1 needs references, and found none; use `agreement`.")
    place = {name: index for index, name in enumerate(classes)}
    other = len(classes)
    truth = np.array([place.get(known or "", other) for known in right])
    guess = np.array([place.get(text or "", other) for text in found])
    hits = np.where(truth == guess, truth, other)

    def totals(weights: Floats, codes: NDArray[np.int64]) -> Floats:
        """The weight of each class, in each resample."""
        return np.stack([np.bincount(codes, row, minlength=other + 1)[:other] for row in weights])

    def mean_f1(weights: Floats) -> Floats:
        true, guessed, hit = (totals(weights, codes) for codes in (truth, guess, hits))
        f1, present = 2 * hit / np.maximum(true + guessed, 1e-12), true > 0
        values: Floats = (f1 * present).sum(axis=1) / np.maximum(present.sum(axis=1), 1)
        return values

    # A mean over classes is as certain as its rarest class, and as the groups, let it be.
    of_class = Counter(code for code, _ in set(zip(truth.tolist(), groups, strict=True)))
    n = min(len(set(groups)), other**2 / sum(1 / of_class[code] for code in range(other)))
    return _bootstrap(mean_f1, groups, n)


def _bootstrap(
    statistic: Callable[[Floats], Floats], groups: Sequence[str], n: float | None = None
) -> Bootstrap:
    """A statistic of the rows' weights, and its draws: one a resample of the groups."""
    with np.errstate(invalid="ignore"):
        value = float(statistic(np.ones((1, len(groups))))[0])
        draws = [statistic(weights) for weights in resamples(groups, _RESAMPLES)]
    return Bootstrap(value, np.concatenate(draws), n)


def mean_of(values: Floats, groups: Sequence[str]) -> Bootstrap:
    """The mean over the rows that have a value, with its bootstrap over groups."""
    known = np.isfinite(values)
    filled, n = np.where(known, values, 0.0), float(len({*compress(groups, known)}))
    return _bootstrap(lambda weights: (weights @ filled) / (weights @ known), groups, n)


def ratio_of(above: Sequence[float], below: Sequence[float], groups: Sequence[str]) -> Bootstrap:
    """The ratio of two sums over the same rows, with its bootstrap over groups."""
    first, second = np.array(above), np.array(below)
    return _bootstrap(lambda weights: (weights @ first) / (weights @ second), groups)


def _mean_score(score: Callable[[str | None, str], float]) -> Metric:
    """The mean over the rows of how alike an answer and its reference are, from 0 to 1."""

    def estimate(found: Answers, right: Answers, groups: Sequence[str]) -> Estimate:
        pairs = zip(found, right, strict=True)
        return mean_of(np.array([score(text, known or "") for text, known in pairs]), groups)

    return estimate


def brier(found: Column, right: Column, groups: Sequence[str]) -> Estimate:
    """The mean square of confidence minus rightness: 0 is best, and 0.25 is always saying 0.5."""
    return mean_of((np.array(found, float) - np.array(right, float)) ** 2, groups)


def ece(found: Column, right: Column, groups: Sequence[str]) -> Estimate:
    """The expected calibration error: how far, on average, confidence is from accuracy.

    Rows are in ten bins of equal width by their confidence, the first from 0 to 0.1 and with 0.1;
    the distances of the bins' mean confidence from their accuracy are weighted by their rows.
    """
    said = np.array(found, float)
    known = np.isfinite(said)
    gaps = np.where(known, said - np.array(right, float), 0.0)
    bins = np.digitize(said, _BINS, right=True)
    members = np.stack([gaps * (bins == place) for place in range(len(_BINS) + 1)], axis=1)

    def error(weights: Floats) -> Floats:
        errors: Floats = np.abs(weights @ members).sum(axis=1) / (weights @ known)
        return errors

    plain = _bootstrap(error, groups, float(len({*compress(groups, known)})))
    # Drawing rows anew makes every bin's distance noisier, and so greater, than it is.
    centred = np.clip(plain.draws - np.nanmean(plain.draws) + plain.value, 0.0, 1.0)
    return replace(plain, draws=centred)


# By their names in a recipe; `agreement` is accuracy against the teacher's answers.
OURS: Mapping[str, Metric] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "answered": answered,
    "agreement": accuracy,
    "field_match": _mean_score(field_share),
    "chrf": _mean_score(lambda text, known: chrf(text or "", known)),
    "rouge_l": _mean_score(lambda text, known: rouge_l(text or "", known)),
    "exact_match": _mean_score(lambda text, known: equal(text or "", known)),
    "ece": ece,
    "brier": brier,
}


def load_metric(name: str) -> "evaluate.Metric":
    """One of ours as a module of `evaluate`, to compute it or combine it with others anywhere.

    It takes None or an empty text for no answer, and confidences for `ece` and `brier`. Raises
    `RecipeError` that lists ours for any other name. Example:

        load_metric("accuracy").compute(predictions=["a", None], references=["a", "b"])
        # {"accuracy": 0.5}
    """
    import datasets  # like evaluate, late: together they take seconds
    import evaluate

    estimate = _ours(name)
    # `evaluate` refuses None in a `string` column, not in this one.
    kind = datasets.Value("float64" if name in CALIBRATIONS else "large_string")
    columns = ("predictions",) if name == "answered" else ("predictions", "references")

    class OurMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate ships no types
        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description=estimate.__doc__ or name,
                citation="",
                inputs_description=load_metric.__doc__,
                features=datasets.Features(dict.fromkeys(columns, kind)),
            )

        def _compute(self, predictions: Column, references: Column = ()) -> dict[str, float]:
            alone = [str(row) for row in range(len(predictions))]
            return {name: estimate(predictions, references, alone).value}

    OurMetric.__name__ = name  # by which `evaluate` names the module
    return OurMetric(keep_in_memory=True)


def _ours(name: str) -> Metric:
    if name not in OURS:
        raise RecipeError(
            f"There is no metric {name!r}: expected one of {sorted(OURS)}."
            f"{nearest(name, [*OURS])} A metric of your own is no part of a recipe: give it to "
            "`measure`, as --metric path.py:Name."
        )
    return OURS[name]


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
                f"defines. Ours ({', '.join(sorted(OURS))}) are named in the recipe."
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
    hub = sys.modules.get("evaluate")  # which takes seconds to import, and whoever uses it did
    if isinstance(given, type):
        given = given(keep_in_memory=True) if hub and issubclass(given, hub.Metric) else given()
    if hub and isinstance(given, hub.EvaluationModule):
        compute = given.compute
        return OwnMetric(given.name, lambda a, b: compute(predictions=a, references=b), key)
    if not callable(given):
        raise SettingsError(
            f"{given!r} is no metric: expected path.py:Name, a function of predictions and "
            "references, or an `evaluate.Metric`."
        )
    return OwnMetric(getattr(given, "__name__", type(given).__name__), given, key)


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

    ours: Mapping[str, Metric]
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
        ours = {name: _ours(name) for name in dict.fromkeys((*names, *always))}
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

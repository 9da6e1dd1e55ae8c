"""What is learned and measured when, and when training stops.

It stops for want of improvement, or where the student's answers collapse: they become one, don't
end where the teacher's do, or are empty.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from distill_datasets.training.settings import VALIDATION_LOSS, TrainSettings

if TYPE_CHECKING:
    from distill_datasets.models.tinker import Connection
    from distill_datasets.training.data import DatasetSplit, Rendered


_LEAST_STEPS = 60
_BLUR = 0.2  # of a length: similar rows meet in other batches in every epoch
_MEANS = {"token": "every response token of a batch alike", "example": "every response alike"}
_SUBSET = 1  # tells the choice of the rows from the order of them
_SHARE = 0.1  # of the training's tokens: what validation reads and writes
_MOST_MEASURED, _LEAST_MEASURED = 10, 3  # times a training, where nobody says how often
_FEW_ROWS = 20  # that are measured where little is trained: an internalisation score takes them
_FEW_ANSWERS = 4  # that are sampled there
_IN_A_ROW = 2  # measurements that show a collapse before training stops
_COLLAPSES = {
    "empty": "its answers are empty",
    "loops": "its answers repeat themselves without end",
    "endless": "its answers don't end where the teacher's do",
    "one": "its answers to different queries have become one",
}
# What is measured of sampled answers, and the share of them from which it is a collapse.
_SHARES = {
    "empty": ("answers_empty", 0.5),
    "loops": ("answers_looping", 0.5),
    "endless": ("answers_unending", 0.75),
}
_CLEAN = 0.25  # up to which share there is none
_VARIED = 8  # times as many different answers of the teacher, or one alone, are a collapse
_DOMINANT = 0.5  # a larger share of one response of the teacher's leaves nothing to be said
_FREE_TEXT = 0.5  # share of responses that occur once: fewer are labels


@dataclass(frozen=True)
class Step:
    """One batch: its number from 1 on, the places of its rows, and its learning rate."""

    number: int
    epoch: int
    places: Sequence[int]
    learning_rate: float


@dataclass(frozen=True)
class Schedule:
    """After which of `total` steps something is due beside learning.

    `evaluate_every` is None where there are no validation rows.
    """

    total: int
    settings: TrainSettings
    evaluate_every: int | None

    def measures(self, done: int) -> bool:
        """Whether the validation rows are measured; always of weights that are saved too."""
        every = self.evaluate_every
        return every is not None and (done % every == 0 or done == self.total)

    def keeps(self, done: int) -> bool:
        """Whether a full checkpoint is due that later ones don't replace."""
        return done % self.settings.save_every == 0 or done == self.total

    def saves(self, done: int) -> bool:
        """Whether anything is saved."""
        return self.measures(done) or self.keeps(done) or done % self.settings.rolling_every == 0


def plan_steps(lengths: Sequence[int], settings: TrainSettings, learning_rate: float) -> list[Step]:
    """Every row once an epoch in a seeded order; the last batch of an epoch may be smaller.

    `lengths` are the rows' tokens; of more rows than the settings allow, a seeded choice is
    learned.
    """
    from tinker_cookbook.utils.lr_scheduling import compute_schedule_lr_multiplier

    chosen = choose_rows(len(lengths), settings)
    an_epoch = len(_epoch(chosen, lengths, settings, 0))
    least = settings.steps or _LEAST_STEPS
    few = 1 if settings.steps else 2
    epochs = settings.epochs or max(few, math.ceil(least / an_epoch))
    batches = [
        (epoch, places)
        for epoch in range(epochs)
        for places in _epoch(chosen, lengths, settings, epoch)
    ][: settings.max_steps or settings.steps]

    def rate(step: int) -> float:
        decay = compute_schedule_lr_multiplier(settings.schedule, step, len(batches))
        return learning_rate * decay * min(1.0, (step + 1) / (settings.warmup_steps + 1))

    return [
        Step(step + 1, epoch, places, rate(step)) for step, (epoch, places) in enumerate(batches)
    ]


@dataclass(frozen=True)
class ValidationPlan:
    """After every how many steps how many validation rows are measured, and how many of those
    queries the student answers.

    `share` estimates the tokens of all that, the untrained student's measurement included, as a
    share of the training's.
    """

    every: int
    rows: int
    answered: int
    share: float

    @classmethod
    def of(
        cls, steps: int, trained: int, lengths: Sequence[int], settings: TrainSettings
    ) -> "ValidationPlan":
        """At most a tenth of the `trained` tokens, unless the settings say how often.

        First it measures less often, then fewer of the rows, whose tokens `lengths` are; a few
        rows are always measured at the end.
        """
        rows, answered = len(lengths), min(settings.answered_rows, len(lengths))
        mean = sum(lengths) / rows
        most = _SHARE * trained / mean  # rows that all measurements together may read and write
        every, times = settings.evaluate_every, min(_MOST_MEASURED, steps)
        if every:
            times = math.ceil(steps / every)
        else:
            times = min(times, max(_LEAST_MEASURED, int(most / (rows + answered)) - 1))
            each = most / (times + 1)
            less = min(1.0, each / (rows + answered))
            few_rows, few = min(rows, _FEW_ROWS), min(answered, _FEW_ANSWERS)
            answered = max(few, int(answered * less))
            rows = max(few_rows, min(rows, int(each) - answered))
            answered = max(few, min(answered, int(each) - rows))
            times = max(1, min(times, int(most / (rows + answered)) - 1))
            every = math.ceil(steps / times)
        return cls(every, rows, answered, (times + 1) * (rows + answered) * mean / trained)


@dataclass(frozen=True)
class TrainingPlan:
    """The rows as tokens, the steps over them, and what the configuration says of both.

    `chosen` are the rows of the training split that are learned; `measured` says how those of the
    validation split are.
    """

    train: "Rendered"
    validation: "Rendered | None"
    measured: ValidationPlan | None
    chosen: Sequence[int]
    steps: Sequence[Step]
    found: Mapping[str, Any]


def plan_training(
    splits: "Mapping[str, DatasetSplit]",
    connection: "Connection",
    settings: TrainSettings,
    begun: Mapping[str, Any] | None,
) -> TrainingPlan:
    """Render the splits and plan the steps; a training that has `begun` goes on as it was."""
    from distill_datasets.training.student import require_trainable

    longest = require_trainable(connection, settings)
    rendered = {
        role: split.render(connection, longest, settings.turns) for role, split in splits.items()
    }
    learning_rate = settings.learning_rate or default_learning_rate(connection)
    steps = plan_steps(rendered["train"].lengths, settings, learning_rate)
    kept = rendered["train"].kept
    chosen = [kept[place] for place in choose_rows(len(kept), settings)]
    measured = None
    if "validation" in rendered:
        measured = _plan_validation(rendered, steps, settings, begun)
        rendered["validation"] = rendered["validation"].at_most(measured.rows)
    rows = {role: len(rows) for role, rows in rendered.items()} | {"train": len(chosen)}
    found = {
        "base_model": connection.base_model,
        "renderer": connection.renderer_name,
        "identity": connection.identity,
        "learning_rate": learning_rate,
        "max_length": longest,
        "steps": len(steps),
        "normalization": _MEANS[settings.normalization],
        "measured": asdict(measured) if measured else None,
        "dataset": {
            "splits": {role: split.name for role, split in splits.items()},
            "rows": rows,
            "skipped": {role: rows.skipped for role, rows in rendered.items()},
        },
    }
    validation = rendered.get("validation")
    return TrainingPlan(rendered["train"], validation, measured, chosen, steps, found)


def _plan_validation(
    rendered: "Mapping[str, Rendered]",
    steps: Sequence[Step],
    settings: TrainSettings,
    begun: Mapping[str, Any] | None,
) -> ValidationPlan:
    if begun and (known := begun.get("measured")):
        plan = ValidationPlan(**known)
        return replace(plan, answered=min(plan.answered, settings.answered_rows))
    rows = rendered["validation"].lengths
    trained = sum(rendered["train"].lengths[place] for step in steps for place in step.places)
    if begun:  # by a version that measured ten times, and all rows
        settings = replace(
            settings, evaluate_every=settings.evaluate_every or len(steps) // 10 or 1
        )
    return ValidationPlan.of(len(steps), trained, rows, settings)


def choose_rows(rows: int, settings: TrainSettings) -> list[int]:
    """The places of the rows that are learned: all, or the seeded choice of `settings.rows`."""
    import numpy as np

    if settings.rows is None or settings.rows >= rows:
        return list(range(rows))
    order = np.random.default_rng([settings.seed, 0, _SUBSET]).permutation(rows)
    return sorted(order[: settings.rows].tolist())


def _epoch(
    chosen: Sequence[int], lengths: Sequence[int], settings: TrainSettings, epoch: int
) -> list[list[int]]:
    import numpy as np

    random = np.random.default_rng([settings.seed, epoch])
    if settings.batch_tokens is None:
        size = settings.batch_size
        order = [chosen[place] for place in random.permutation(len(chosen)).tolist()]
        return [order[start : start + size] for start in range(0, len(order), size)]
    blurred = np.array([lengths[place] for place in chosen]) * random.uniform(
        1 - _BLUR, 1 + _BLUR, len(chosen)
    )
    grouped = [chosen[place] for place in np.argsort(blurred).tolist()]
    batches = list(_filled(grouped, lengths, settings.batch_tokens))
    return [batches[place] for place in random.permutation(len(batches)).tolist()]


def _filled(order: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Batches of at most so many tokens; a row that is longer has one to itself."""
    batch: list[int] = []
    tokens = 0
    for place in order:
        if batch and tokens + lengths[place] > most:
            yield batch
            batch, tokens = [], 0
        batch.append(place)
        tokens += lengths[place]
    yield batch


def default_learning_rate(connection: "Connection") -> float:
    """Measured for the pocket model; the cookbook's formula, or what its README advises."""
    from tinker_cookbook.exceptions import ConfigurationError
    from tinker_cookbook.hyperparam_utils import get_lr

    if connection.reference == "pocket":
        return 3e-3
    if connection.reference.startswith("embedded:"):
        return 5e-4
    try:
        return float(get_lr(connection.base_model))
    except (ConfigurationError, NotImplementedError, OSError):
        return 5e-4


@dataclass(frozen=True)
class Selection:
    """The measurements up to a step, as far as a decision needs them.

    `mark` is the last value that was better than the mark before by `min_improvement`; `stale`
    counts the measurements since. `base` is the untrained student's value, `lowest` the lowest
    validation loss. `sign` is the collapse that the last `struck` measurements show; an earlier
    one was clearly `clean` of these signs.
    """

    metric: str = VALIDATION_LOSS
    min_improvement: float = 0.0
    best: float | None = None
    best_step: int = 0
    mark: float | None = None
    mark_step: int = 0
    stale: int = 0
    base: float | None = None
    lowest: float | None = None
    clean: Sequence[str] = field(default_factory=list)
    sign: str = ""
    struck: int = 0

    def read(self, metrics: Iterable[Mapping[str, Any]]) -> "Selection":
        """With all measurements among the lines of a metrics.jsonl."""
        selection = self
        for line in metrics:
            if selection.metric in line or VALIDATION_LOSS in line:
                selection = selection.measured(line["step"], line)
        return selection

    def measured(self, step: int, scores: Mapping[str, Any]) -> "Selection":
        """With one measurement more; that of step 0 is of the untrained student.

        A collapse counts where an earlier measurement was without it, or where the validation loss
        doesn't improve: many a base never ends an answer, and every student of few labels says the
        commonest first. What shows one is never the best.
        """
        loss = scores.get(VALIDATION_LOSS)
        improves = loss is not None and (self.lowest is None or loss < self.lowest)
        clean = sorted({*self.clean, *_clean_signs(scores)})
        found = replace(self, clean=clean, lowest=loss if improves else self.lowest)
        if step == 0:
            return replace(found, base=scores.get(self.metric))
        labels = scores.get("teacher_once", 0.0) < _FREE_TEXT
        for sign in collapse_signs(scores):
            if not improves or (sign in self.clean and not (labels and sign == "one")):
                return replace(found, sign=sign, struck=self.struck + 1, stale=self.stale + 1)
        found = replace(found, sign="", struck=0)
        value = scores.get(self.metric)
        return found if value is None else found.after(step, value)

    @property
    def collapsed(self) -> bool:
        """Whether the last measurements show that the student's answers have collapsed."""
        return self.struck >= _IN_A_ROW

    @property
    def collapse(self) -> str:
        """What the collapse looks like, in words."""
        return (
            f"the student collapsed: {_COLLAPSES[self.sign]}, in {self.struck} validations in a row"
        )

    @property
    def doubt(self) -> str:
        """What speaks against the best checkpoint, in words; empty where nothing does."""
        found = []
        if self.struck and not self.collapsed:
            found.append(f"of the last weights {_COLLAPSES[self.sign]}")
        base, best = self.base, self.best
        if base is not None and best is not None and not self._gain(base, best) > 0:
            found.append(
                "the best checkpoint is no better than the student before training "
                f"({self.metric} {base:.4g})"
            )
        return "; ".join(found)

    def after(self, step: int, value: float) -> "Selection":
        """With one measurement more; of equal ones, the first stays the best."""
        found = self
        if self.best is None or self._gain(self.best, value) > 0:
            found = replace(found, best=value, best_step=step)
        gain = None if self.mark is None else self._gain(self.mark, value)
        if gain is None or (gain > 0 and gain >= self.min_improvement):
            return replace(found, mark=value, mark_step=step, stale=0)
        return replace(found, stale=self.stale + 1)

    def exhausted(self, patience: int | None) -> bool:
        """Whether it hasn't got better for so many measurements."""
        return patience is not None and self.stale >= patience

    def _gain(self, before: float, now: float) -> float:
        return before - now if self.metric.endswith("loss") else now - before


def collapse_signs(scores: Mapping[str, Any]) -> list[str]:
    """What a measurement's sampled answers show that the teacher's responses don't."""

    if scores.get("answers", 0) < _FEW_ANSWERS:
        return []
    found = [sign for sign, (name, most) in _SHARES.items() if scores.get(name, 0.0) >= most]
    varied = max(_VARIED, scores.get("teacher_distinct", 0.0))
    alike = scores.get("answers_distinct", 0.0) * _VARIED <= varied
    return found + (["one"] if alike and scores.get("teacher_commonest", 0.0) <= _DOMINANT else [])


def _clean_signs(scores: Mapping[str, Any]) -> set[str]:
    """Those that a measurement is clearly without."""
    if not scores.get("answers"):
        return set()
    found = {sign for sign, (name, _) in _SHARES.items() if scores.get(name, 0.0) <= _CLEAN}
    varied = 2 * scores.get("answers_distinct", 0) >= scores.get("teacher_distinct", 0)
    return found | ({"one"} if varied else set())


def why_it_ended(selection: Selection, patience: int | None, done: int, planned: int) -> str:
    """The reason, in words."""
    if selection.collapsed:
        return selection.collapse
    if done < planned and selection.exhausted(patience):
        least = f" of {selection.min_improvement:g}" if selection.min_improvement else ""
        times = "validation" if patience == 1 else "validations"
        return f"no improvement{least} in {patience} {times} (best at step {selection.best_step})"
    return f"all {planned} steps done"

"""Which rows are learned in which step, at which rate, and when it is measured."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from distill_datasets.training.settings import TrainSettings

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
FEW_ANSWERS = 4  # that are sampled there


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
            few_rows, few = min(rows, _FEW_ROWS), min(answered, FEW_ANSWERS)
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

"""What is learned when, at which rate, and when training stops for want of improvement."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from distill_datasets.training.settings import VALIDATION_LOSS, TrainSettings

if TYPE_CHECKING:
    from distill_datasets.models.connection import Connection


_LEAST_STEPS = 60
_BLUR = 0.2  # of a length: similar rows meet in other batches in every epoch
_SUBSET = 1  # tells the choice of the rows from the order of them


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

    `measured` is whether there are validation rows.
    """

    total: int
    settings: TrainSettings
    measured: bool

    def measures(self, done: int) -> bool:
        """Whether the validation rows are measured; always of weights that are saved too."""
        every = self.settings.evaluate_every or max(1, self.total // 10)
        return self.measured and (done % every == 0 or self.keeps(done))

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
    counts the measurements since.
    """

    metric: str = VALIDATION_LOSS
    min_improvement: float = 0.0
    best: float | None = None
    best_step: int = 0
    mark: float | None = None
    mark_step: int = 0
    stale: int = 0

    @classmethod
    def of(
        cls,
        settings: TrainSettings,
        metrics: Iterable[Mapping[str, Any]],
        begun: "Selection | None" = None,
    ) -> "Selection":
        """What the lines of a metrics.jsonl say, after what was known when they began."""
        selection = begun or cls(settings.select, settings.min_improvement)
        for line in metrics:
            if selection.metric in line:
                selection = selection.after(line["step"], line[selection.metric])
        return selection

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


def why_it_ended(selection: Selection, settings: TrainSettings, done: int, planned: int) -> str:
    """The reason, in words."""
    if done < planned and selection.exhausted(settings.patience):
        least = f" of {settings.min_improvement:g}" if settings.min_improvement else ""
        times = "validation" if settings.patience == 1 else "validations"
        return (
            f"no improvement{least} in {settings.patience} {times} "
            f"(best at step {selection.best_step})"
        )
    return f"all {planned} steps done"

"""What is learned when: the order of the rows, and the learning rate of every step."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill_datasets.training.settings import TrainSettings as TrainSettings

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

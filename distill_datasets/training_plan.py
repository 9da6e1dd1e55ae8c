"""What is learned when: settings, the order of the rows, and the learning rate of every step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from distill_datasets.errors import SettingsError

if TYPE_CHECKING:
    from distill_datasets.connection import Connection


_LEAST_STEPS = 60


@dataclass(frozen=True)
class TrainSettings:
    """How to train; None leaves it to the model or to the length of the run.

    Without `epochs` there are two, or as many as make 60 steps: few rows need many passes.
    `normalization` "token" weighs every response token of a batch alike, "example" every
    response. `seed` decides the order of the rows and the first LoRA weights. `max_length` is in
    tokens: longer rows are left out and counted, never cut. `config` is a configuration of the
    dataset. The learning rate rises over `warmup_steps`, then follows `schedule`.
    """

    epochs: int | None = None
    batch_size: int = 32
    learning_rate: float | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 0
    rank: int = 32
    seed: int = 0
    normalization: Literal["token", "example"] = "token"
    evaluate_every: int | None = None
    save_every: int | None = None
    max_length: int | None = None
    max_steps: int | None = None
    renderer: str | None = None
    config: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"

    def __post_init__(self) -> None:
        """Refuse what can't be trained, before anything is spent."""
        for name in ("epochs", "batch_size", "rank", "evaluate_every", "save_every", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} must be at least 1; found {value!r}.")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise SettingsError(f"learning_rate must be above 0; found {self.learning_rate!r}.")
        if self.warmup_steps < 0:
            raise SettingsError(f"warmup_steps can't be below 0; found {self.warmup_steps!r}.")
        for name, known in (
            ("schedule", ("linear", "cosine", "constant")),
            ("normalization", ("token", "example")),
        ):
            if getattr(self, name) not in known:
                raise SettingsError(
                    f"{name} must be one of {known}; found {getattr(self, name)!r}."
                )


@dataclass(frozen=True)
class Step:
    """One batch: its number from 1 on, the places of its rows, and its learning rate."""

    number: int
    epoch: int
    places: Sequence[int]
    learning_rate: float


def plan_steps(rows: int, settings: TrainSettings, learning_rate: float) -> list[Step]:
    """Every row once an epoch in a seeded order; the last batch of an epoch may be smaller."""
    import numpy as np
    from tinker_cookbook.utils.lr_scheduling import compute_schedule_lr_multiplier

    an_epoch = math.ceil(rows / settings.batch_size)
    epochs = settings.epochs or max(2, math.ceil(_LEAST_STEPS / an_epoch))
    batches = [
        (epoch, order[start : start + settings.batch_size])
        for epoch in range(epochs)
        for order in [np.random.default_rng([settings.seed, epoch]).permutation(rows).tolist()]
        for start in range(0, rows, settings.batch_size)
    ][: settings.max_steps]

    def rate(step: int) -> float:
        decay = compute_schedule_lr_multiplier(settings.schedule, step, len(batches))
        return learning_rate * decay * min(1.0, (step + 1) / (settings.warmup_steps + 1))

    return [
        Step(step + 1, epoch, places, rate(step)) for step, (epoch, places) in enumerate(batches)
    ]


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

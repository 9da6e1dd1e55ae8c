"""A training before its first step: its rows rendered, its steps planned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import SettingsError
from distill_datasets.training.data import Rendered, Source, Split
from distill_datasets.training.folder import TrainingFolder, installed_versions
from distill_datasets.training.schedule import (
    Schedule,
    Step,
    choose_rows,
    default_learning_rate,
    plan_steps,
)
from distill_datasets.training.selection import VALIDATION_LOSS
from distill_datasets.training.settings import TrainSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from distill_datasets.models.connection import Connection

_MEANS = {"token": "every response token of a batch alike", "example": "every response alike"}


@dataclass(frozen=True)
class Run:
    """What the loop needs."""

    folder: TrainingFolder
    settings: TrainSettings
    source: Source
    train: Rendered
    validation: Rendered | None
    steps: Sequence[Step]

    def keys(self, split: Split) -> "NDArray[np.uint64]":
        """Of the rows that are trained on, in the split that was rendered."""
        places = choose_rows(len(self.train), self.settings)
        return split.keys[[self.train.kept[place] for place in places]]

    @property
    def schedule(self) -> Schedule:
        """What is due when."""
        return Schedule(len(self.steps), self.settings, self.validation is not None)


def prepare_run(
    splits: Mapping[str, Split],
    connection: "Connection",
    source: Source,
    settings: TrainSettings,
    folder: TrainingFolder,
) -> tuple[Run, dict[str, Any]]:
    """Render the splits and plan the steps: the run, and what is worth recording of it."""
    from distill_datasets.training.capabilities import require_trainable

    if "validation" not in splits and (settings.patience or settings.select != VALIDATION_LOSS):
        raise SettingsError(
            f"patience and select need validation rows: {source.reference!r} has no split "
            f"{settings.validation_split!r}. Name another, or leave both out."
        )
    longest = require_trainable(connection, settings)
    rendered = {role: split.render(connection, longest) for role, split in splits.items()}
    learning_rate = settings.learning_rate or default_learning_rate(connection)
    steps = plan_steps(rendered["train"].lengths, settings, learning_rate)
    rows = {role: len(rows) for role, rows in rendered.items()}
    rows["train"] = len(choose_rows(rows["train"], settings))
    run = Run(folder, settings, source, rendered["train"], rendered.get("validation"), steps)
    return run, {
        "base_model": connection.base_model,
        "renderer": connection.renderer_name,
        "identity": connection.identity,
        "learning_rate": learning_rate,
        "max_length": longest,
        "steps": len(steps),
        "normalization": _MEANS[settings.normalization],
        "dataset": {
            "splits": {role: split.name for role, split in splits.items()},
            "rows": rows,
            "skipped": {role: rows.skipped for role, rows in rendered.items()},
        },
        "versions": installed_versions(),
    }

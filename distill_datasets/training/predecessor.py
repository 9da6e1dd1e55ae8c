"""The student that a training starts from: its weights, and the rows that it has learned."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_datasets.errors import DatasetError, ModelError, SettingsError
from distill_datasets.models.connection import adopt_state, connect, read_training
from distill_datasets.models.tinker_sdk import explained
from distill_datasets.training.checkpoints import require_state
from distill_datasets.training.settings import TrainSettings

LEARNED = "learned.npy"  # in a training's folder: what is recognised as learned by a later one
_ADAPTED = ("rank", "train_attention", "train_mlp", "train_unembed")
Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class Predecessor:
    """Weights at a server's `path`; `folder` is the training that made them, where it is known."""

    path: str
    folder: Path | None
    adapted: Mapping[str, Any]

    def settled(self, settings: TrainSettings) -> TrainSettings:
        """The settings with the adapter that the weights have."""
        return replace(settings, **self.adapted)

    def bring(self, store: Path) -> None:
        """Put the weights where the server of another training finds them, if it is a local one."""
        if self.folder is not None:
            adopt_state(self.path, self.folder / "checkpoints", store)

    @property
    def learned(self) -> Keys:
        """The rows that it was trained on; raises `DatasetError` where nobody wrote them down."""
        file = self.folder / LEARNED if self.folder else None
        if file is None or not file.is_file():
            raise DatasetError(
                f"Nothing says which rows {str(self.folder or self.path)!r} has learned: expected "
                f"a training folder with {LEARNED}. Leave out --only-new to train on all rows."
            )
        keys: Keys = np.load(file)
        return keys


def find_predecessor(
    start: str | Path | None, student: str, *, only_new: bool = False
) -> Predecessor | None:
    """A training folder's best checkpoint, or the state at tinker://<run>/weights/<name>.

    None without a `start`. Raises `ModelError` for weights of another base model than the
    student's, and for a path that is no training state; `SettingsError` for `only_new` rows of
    nobody.
    """
    if start is None:
        if only_new:
            raise SettingsError(
                "only_new needs a student to start from: name it as start (--from)."
            )
        return None
    folder = Path(start)
    if (folder / "checkpoints.jsonl").is_file():
        config, checkpoint = read_training(folder)
        _require_base(str(start), config["student"], student)
        adapted = {
            name: one for name in _ADAPTED if (one := config["settings"].get(name)) is not None
        }
        return Predecessor(checkpoint["state"], folder, adapted)
    path = str(start)
    if not path.startswith("tinker://"):
        raise ModelError(
            f"{path!r} is no student to start from: expected a training's folder, or "
            "tinker://<run>/weights/<name>."
        )
    require_state(path)
    connection = connect(student)
    with explained(path):
        info = connection.rest.get_weights_info_by_tinker_path(path).result()
    _require_base(path, info.base_model, connection.base_model)
    return Predecessor(path, None, {"rank": info.lora_rank} if info.lora_rank else {})


def write_learned(folder: Path, keys: Keys, before: Predecessor | None) -> None:
    """Write down what a training learns, and what its predecessor had learned; see `Split.keys`."""
    known = before.folder / LEARNED if before and before.folder else None
    if known is not None and known.is_file():
        keys = np.concatenate([keys, np.load(known)])
    np.save(folder / LEARNED, np.unique(keys))


def _require_base(start: str, there: str, here: str) -> None:
    if there != here:
        raise ModelError(
            f"{start!r} was trained from {there!r}, not from {here!r}: name that model as the "
            "student."
        )

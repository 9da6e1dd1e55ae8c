"""Checkpoints on the server: what they say, how long they stay, and how training goes on from one.

A training goes on from its own newest checkpoint, from a state that the server alone knows
(`resume`), or begins with the weights of another training (`start`).
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import tinker
from numpy.typing import NDArray

from distill_datasets.errors import DatasetError, ModelError
from distill_datasets.files import write_file
from distill_datasets.models.connection import Connection, adopt_state
from distill_datasets.models.references import (
    base_of,
    connect,
    default_student,
    find_training,
    read_training,
)
from distill_datasets.models.sampler import digest
from distill_datasets.models.tinker_sdk import explained, optional, try_to
from distill_datasets.training.data import DatasetSource
from distill_datasets.training.folder import SavedCheckpoint
from distill_datasets.training.schedule import Selection
from distill_datasets.training.settings import TrainSettings, decisive, unlike_default
from distill_datasets.training.tracking import tell

LEARNED = "learned.npy"  # in a training's folder: the rows that a later training can leave out
_RENDERER = "renderer_name"  # the cookbook's name: its tools find a checkpoint's renderer by it
_DECISIVE = ("learning_rate", "max_length", "steps", "base_model", "renderer")
_ADAPTED = ("rank", "train_attention", "train_mlp", "train_unembed")
_DELETION = 10.0  # seconds for the server to delete what nobody needs
_KEEPING = 60.0  # seconds for it to keep one for good
_NOT_DELETED = "checkpoints that nobody needs any more stay on the server"
_NOT_KEPT = (
    "how long checkpoints stay on the server can't be changed: save the student (`push`, or "
    "`export`) before it expires"
)
_UNLISTED = "checkpoints can't be looked up on the server"
_UNKNOWN_BASE = "nothing says which model the weights to begin with were trained from"
_WEEK = 7 * 24 * 3600
RowKeys = NDArray[np.uint64]


def describe(config: Mapping[str, Any]) -> dict[str, str]:
    """What every checkpoint of a training says, as far as the training's configuration goes."""
    return {
        "made_by": f"distill_datasets {config['versions'].get('distill-datasets', 'unreleased')}",
        "dataset": str(config["dataset"]["path"]),
        "dataset_revision": config["dataset"]["revision"],
        "dataset_files": config["dataset"]["files"],
        "base_model": config["base_model"],
        _RENDERER: config["renderer"],
        "settings": _compact(unlike_default(config["settings"])),
        "config_digest": _config_digest(decisive(config["settings"]), config),
    }


def describe_progress(
    step: int, selection: Selection, checkpoints: Sequence[SavedCheckpoint]
) -> dict[str, str]:
    """What one checkpoint adds: enough to go on as if the local folder were still there."""
    best = [checkpoint for checkpoint in checkpoints if checkpoint.best]
    found = {"step": str(step), "selection": _compact(asdict(selection))}
    return found | ({"best": _compact(asdict(best[-1]))} if best else {})


def read_progress(
    connection: Connection, path: str, config: Mapping[str, Any]
) -> tuple[Selection, list[SavedCheckpoint]]:
    """Where a training that the server knows stands: the measurements, and the checkpoints to
    begin a folder with, the one at `path` last.

    Raises `ModelError` where it was trained on something else or otherwise; the message says what.
    """
    found = read_metadata(connection, path)
    missing = {"step", "selection", "config_digest", "dataset_revision"} - set(found)
    if missing:
        raise ModelError(
            f"{path!r} can't be resumed from: expected a checkpoint of `distill-datasets train`; "
            f"its metadata lacks {sorted(missing)}. Start from its weights instead (--from)."
        )
    require_same(path, found, config)
    step = int(found["step"])
    if step >= config["steps"]:
        raise ModelError(
            f"{path!r} is of step {step} of {config['steps']}: nothing is left to train. Measure "
            "it by its sampler path, or train longer from its weights (--from)."
        )
    begun = SavedCheckpoint(name="resumed", step=step, state=path, sampler=None)
    # Both belong to another training, which may still need them.
    best = (
        [SavedCheckpoint(**json.loads(found["best"]) | {"kept": True})] if "best" in found else []
    )
    return Selection(**json.loads(found["selection"])), [*best, begun]


def read_metadata(connection: Connection, path: str) -> dict[str, str]:
    """What the training state at a `tinker://` path says of itself, by the server alone."""
    run = require_state(path).training_run_id
    with explained(path):
        listed = optional(connection.rest.list_checkpoints(run), _UNLISTED)
    if listed is None:
        raise ModelError(
            f"{path!r} can't be resumed from: its server doesn't say how far it was trained. "
            "Continue in the folder of its training (--out), or start from its weights (--from)."
        )
    saved = listed.checkpoints
    for checkpoint in saved:
        if checkpoint.tinker_path == path:
            return dict(checkpoint.user_metadata or {})
    raise ModelError(
        f"{path!r} is not on the server: expected one of "
        f"{[one.tinker_path for one in saved if one.checkpoint_type == 'training'][:5]}. It may "
        "have expired."
    )


def require_state(path: str) -> tinker.ParsedCheckpointTinkerPath:
    """The parts of a path that training can go on from; raises `ModelError` for any other."""
    expected = "expected tinker://<run>/weights/<name>"
    try:
        parsed = tinker.ParsedCheckpointTinkerPath.from_tinker_path(path)
    except ValueError as error:
        raise ModelError(f"{path!r} names no checkpoint: {expected}.") from error
    if parsed.checkpoint_type != "training":
        raise ModelError(
            f"{path!r} is for sampling and has no optimizer: {expected}, the training state that "
            "was saved with it."
        )
    return parsed


def require_same(path: str, there: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Refuse to go on from a state, of which `there` is the metadata, with another training.

    Raises `ModelError` that names each difference.
    """
    here = describe(config)
    # What version 0.1 wrote may name the defaults of its settings.
    said = _compact(unlike_default(json.loads(there.get("settings", "{}"))))
    names = ("dataset_revision", "dataset_files", "base_model", _RENDERER, "settings")
    there = {**there, "settings": said}
    found = [name for name in names if there.get(name) != here[name]]
    settings = decisive(config["settings"])
    same = [here["config_digest"], _config_digest({**settings, "preset": "production"}, config)]
    if not found and there.get("config_digest") not in same:
        found = ["config_digest"]
    if found:
        differences = [f"{name} is {there.get(name)!r} there, {here[name]!r} now" for name in found]
        raise ModelError(
            f"{path!r} is of another training: {'; '.join(differences)}. Give the dataset and the "
            "settings that it was begun with, or start from its weights instead (--from)."
        )


class CheckpointRetention:
    """How long the server keeps checkpoints. Requests run beside the training."""

    def __init__(self, connection: Connection, ttl_seconds: int | None) -> None:
        """`ttl_seconds` as in the settings."""
        self._connection = connection
        default = None if connection.server else _WEEK
        self.ttl = default if ttl_seconds is None else ttl_seconds or None
        self._pending: list[tuple[Any, str]] = []

    def delete(self, checkpoints: Iterable[SavedCheckpoint]) -> None:
        """Begin to delete; what fails expires by itself."""
        rest = self._connection.rest
        self._pending += [
            (rest.delete_checkpoint_from_tinker_path(path), _NOT_DELETED)
            for path in _paths(checkpoints)
        ]

    def replace_best(self, old: Iterable[SavedCheckpoint], new: SavedCheckpoint) -> None:
        """Begin to keep the new one without end; the old ones get the usual time to live."""
        requests = [*self._set_ttl(old, self.ttl), *self._set_ttl([new], None)]
        self._pending += [(request, _NOT_KEPT) for request in requests]

    def keep(self, checkpoints: Iterable[SavedCheckpoint]) -> None:
        """Keep them for good; waits until the server has confirmed it, or says that it doesn't."""
        with explained(self._connection.reference):
            for request in self._set_ttl(checkpoints, None):
                try_to(request, _NOT_KEPT, timeout=_KEEPING)

    def _set_ttl(self, checkpoints: Iterable[SavedCheckpoint], ttl: int | None) -> list[Any]:
        if self.ttl is None:
            return []
        rest = self._connection.rest
        return [rest.set_checkpoint_ttl_from_tinker_path(path, ttl) for path in _paths(checkpoints)]

    def close(self) -> None:
        """Give what was begun a few seconds."""
        end = time.monotonic() + _DELETION
        for request, without in self._pending:
            with suppress(tinker.TinkerError, TimeoutError):
                request.future().exception(max(0.0, end - time.monotonic()))
                optional(request, without)


@dataclass(frozen=True)
class Predecessor:
    """Weights at a server's `path`; `folder` is the training that made them, where it is known."""

    path: str
    folder: Path | None
    adapted: Mapping[str, Any]

    def settled(self, settings: TrainSettings) -> TrainSettings:
        """The settings with the adapter that the weights have; says where another was asked for."""
        for name, one in self.adapted.items():
            if getattr(settings, name) not in (one, getattr(TrainSettings, name)):
                tell(f"{name} is {one}, as the weights to begin with have it.")
        return replace(settings, **self.adapted)

    def bring(self, store: Path) -> None:
        """Put the weights where the server of another training finds them, if it is a local one."""
        if self.folder is not None:
            adopt_state(self.path, self.folder / "checkpoints", store)

    @property
    def learned(self) -> RowKeys:
        """The rows that it was trained on; raises `DatasetError` where nobody wrote them down."""
        file = self.folder / LEARNED if self.folder else None
        if file is None or not file.is_file():
            raise DatasetError(
                f"Nothing says which rows {str(self.folder or self.path)!r} has learned: expected "
                f"a training folder with {LEARNED}. Leave out --only-new to train on all rows."
            )
        keys: RowKeys = np.load(file)
        return keys


def choose_student(source: DatasetSource, start: str | Path | None = None) -> str:
    """The student where none is named: that of `start`, or the model of the release's teacher.

    Raises `ModelError` where that can't be trained.
    """
    if start is None:
        return default_student(source.manifest.get("teacher"))
    if base := base_of(str(start)):
        return base
    raise _no_student(str(start))


def _no_student(start: str) -> ModelError:
    return ModelError(
        f"{start!r} is no student to start from: expected a training's folder, or "
        "tinker://<run>/weights/<name>."
    )


def find_predecessor(
    start: str | Path, student: str, *, renderer: str | None = None
) -> Predecessor:
    """A training folder's best checkpoint, or the state at tinker://<run>/weights/<name>.

    Raises `ModelError` for weights of another base model than the student's, and for a path that
    is no training state.
    """
    if (folder := find_training(start)) is not None:
        config, checkpoint = read_training(folder)
        _require_base(str(start), config["student"], student)
        adapted = {
            name: one for name in _ADAPTED if (one := config["settings"].get(name)) is not None
        }
        return Predecessor(checkpoint["state"], folder, adapted)
    path = str(start)
    if not path.startswith("tinker://"):
        raise _no_student(path)
    require_state(path)
    connection = connect(student, renderer=renderer)
    with explained(path):
        asked = connection.rest.get_weights_info_by_tinker_path(path)
        info = optional(asked, f"{_UNKNOWN_BASE}: {student!r} is trusted to be it")
    if info is None:
        return Predecessor(path, None, {})
    _require_base(path, info.base_model, connection.base_model)
    return Predecessor(path, None, {"rank": info.lora_rank} if info.lora_rank else {})


def write_learned(folder: Path, keys: RowKeys, before: Predecessor | None) -> None:
    """Write down what a training learns, and what its predecessor had learned.

    `keys` are those of `DatasetSplit.keys`.
    """
    known = before.folder / LEARNED if before and before.folder else None
    if known is not None and known.is_file():
        keys = np.concatenate([keys, np.load(known)])
    content = BytesIO()
    np.save(content, np.unique(keys))
    write_file(folder / LEARNED, content.getvalue())


def _paths(checkpoints: Iterable[SavedCheckpoint]) -> list[str]:
    return [path for one in checkpoints for path in (one.state, one.sampler) if path]


def _config_digest(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    return digest([settings, *(config[name] for name in _DECISIVE)])[:32]


def _require_base(start: str, there: str, here: str) -> None:
    if there != here:
        raise ModelError(
            f"{start!r} was trained from {there!r}, not from {here!r}: name that model as the "
            "student."
        )


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

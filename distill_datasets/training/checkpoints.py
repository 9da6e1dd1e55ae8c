"""Which checkpoints stay on the server, what they say of themselves, and how to find them again."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import tinker

from distill_datasets.errors import ModelError
from distill_datasets.models.connection import Connection
from distill_datasets.models.sampler import digest
from distill_datasets.models.tinker_sdk import explained
from distill_datasets.training.folder import Checkpoint
from distill_datasets.training.selection import Selection
from distill_datasets.training.settings import decisive, unlike_default

# The cookbook's name for it: its tools find the renderer of our checkpoints by that.
_RENDERER = "renderer_name"
_DECISIVE = ("learning_rate", "max_length", "steps", "base_model", "renderer")
_PATIENCE = 10.0  # seconds for the server to delete what nobody needs
_WEEK = 7 * 24 * 3600


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
        "config_digest": digest(
            [decisive(config["settings"]), *(config[name] for name in _DECISIVE)]
        )[:32],
    }


def describe_progress(
    step: int, selection: Selection, checkpoints: Sequence[Checkpoint]
) -> dict[str, str]:
    """What one checkpoint adds: enough to go on as if the local folder were still there."""
    best = [checkpoint for checkpoint in checkpoints if checkpoint.best]
    found = {"step": str(step), "selection": _compact(asdict(selection))}
    return found | ({"best": _compact(asdict(best[-1]))} if best else {})


def read_progress(
    connection: Connection, path: str, config: Mapping[str, Any]
) -> tuple[Selection, list[Checkpoint]]:
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
    _require_same(path, found, describe(config))
    step = int(found["step"])
    if step >= config["steps"]:
        raise ModelError(
            f"{path!r} is of step {step} of {config['steps']}: nothing is left to train. Measure "
            "it by its sampler path, or train longer from its weights (--from)."
        )
    begun = Checkpoint(name="resumed", step=step, state=path, sampler=None)
    # Both belong to another training, which may still need them.
    best = [Checkpoint(**json.loads(found["best"]) | {"kept": True})] if "best" in found else []
    return Selection(**json.loads(found["selection"])), [*best, begun]


def read_metadata(connection: Connection, path: str) -> dict[str, str]:
    """What the training state at a `tinker://` path says of itself, by the server alone."""
    run = require_state(path).training_run_id
    with explained(path):
        saved = connection.rest.list_checkpoints(run).result().checkpoints
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


def superseded(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Those that nobody needs since the last one was confirmed."""
    *older, _ = checkpoints
    best = [checkpoint for checkpoint in checkpoints if checkpoint.best][-1:]
    return [one for one in older if not one.kept and one not in best]


class Shelf:
    """The checkpoints on the server. Requests run beside the training."""

    def __init__(self, connection: Connection, ttl_seconds: int | None) -> None:
        """`ttl_seconds` as in the settings."""
        self._connection = connection
        default = None if connection.server else _WEEK
        self.ttl = default if ttl_seconds is None else ttl_seconds or None
        self._pending: list[Any] = []

    def delete(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Begin to; what fails expires by itself."""
        for path in _paths(checkpoints):
            request = self._connection.rest.delete_checkpoint_from_tinker_path(path)
            self._pending.append(request)

    def expire(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Begin to give them the time that they would have had, had they never been the best."""
        self._pending += self._set_ttl(checkpoints, self.ttl)

    def begin_to_keep(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Keep them for now; `keep` makes sure."""
        self._pending += self._set_ttl(checkpoints, None)

    def keep(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Keep them for good; waits until the server has confirmed it."""
        with explained(self._connection.reference):
            for request in self._set_ttl(checkpoints, None):
                request.result()

    def _set_ttl(self, checkpoints: Iterable[Checkpoint], ttl: int | None) -> list[Any]:
        if self.ttl is None:
            return []
        rest = self._connection.rest
        return [rest.set_checkpoint_ttl_from_tinker_path(path, ttl) for path in _paths(checkpoints)]

    def close(self) -> None:
        """Give what was begun a few seconds."""
        end = time.monotonic() + _PATIENCE
        for request in self._pending:
            with suppress(tinker.TinkerError, TimeoutError):
                request.result(max(0.0, end - time.monotonic()))


def _paths(checkpoints: Iterable[Checkpoint]) -> list[str]:
    return [path for one in checkpoints for path in (one.state, one.sampler) if path]


def _require_same(path: str, there: Mapping[str, str], here: Mapping[str, str]) -> None:
    names = ("dataset_revision", "dataset_files", "base_model", _RENDERER, "settings")
    found = [name for name in names if there.get(name) != here[name]]
    found = found or [name for name in ("config_digest",) if there.get(name) != here[name]]
    if found:
        differences = [f"{name} is {there.get(name)!r} there, {here[name]!r} now" for name in found]
        raise ModelError(
            f"{path!r} is of another training: {'; '.join(differences)}. Give the dataset and the "
            "settings that it was begun with, or start from its weights instead (--from)."
        )


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

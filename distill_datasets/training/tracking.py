"""Sends a training's numbers to the tracker that was named, and to no other."""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from distill_datasets.errors import SettingsError
from distill_datasets.models.sampler import digest

_PROJECT = "distill-datasets"
_INSTALL = "track={name!r} needs a package that isn't installed: pip install {name}."


class Tracker(Protocol):
    """Takes numbers by step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of a step; the same step may come in parts."""

    def close(self) -> None:
        """Send what is left."""


def open_tracker(name: str | None, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """The tracker of that name; raises `SettingsError` where it isn't installed.

    A training that is continued goes on in the same run of the tracker. Weights & Biases and
    TensorBoard keep their files in `folder`.
    """
    trackers: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
        "wandb": _Wandb,
        "trackio": _Trackio,
        "tensorboard": _TensorBoard,
    }
    if name is None:
        return _Nothing()
    try:
        return trackers[name](folder, config)
    except ImportError as error:
        raise SettingsError(_INSTALL.format(name=name) + f" ({error})") from error


def require_tracker(name: str | None) -> None:
    """Refuse a tracker that isn't installed, before anything is spent."""
    if name is not None and find_spec(name) is None:
        raise SettingsError(_INSTALL.format(name=name))


class _Nothing:
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Nobody wants it."""

    def close(self) -> None:
        """Nothing is left."""


class _Wandb:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._run = import_module("wandb").init(
            project=_PROJECT,
            name=folder.name,
            id=_run_id(folder),
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        name = f"{folder.name}-{_run_id(folder)[:8]}"
        self._run = import_module("trackio").init(
            project=_PROJECT, name=name, resume="allow", config=dict(config), embed=False
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _run_id(folder: Path) -> str:
    return digest([str(folder.resolve())])[:16]

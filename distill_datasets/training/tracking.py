"""A training's numbers as curves, as a line of text, and in the tracker that was named."""

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

from distill_datasets.errors import SettingsError
from distill_datasets.files import write_file
from distill_datasets.models.sampler import digest

_PROJECT = "distill-datasets"
_INSTALL = "track={name!r} needs a package that isn't installed: pip install {name}."

# A panel: what its axis says, and the numbers in it that are there.
_PANELS = (
    ("loss per response token", {"loss": "training", "validation_loss": "validation"}),
    ("share", {"accuracy": "accuracy", "internalisation": "internalisation"}),
    ("gradient norm", {"gradient_norm": "gradient norm"}),
    ("learning rate", {"learning_rate": "learning rate"}),
)
_SIZE = (7.0, 2.2)  # inches, of one panel
_FEW = 30  # points that are marked one by one
_BARS = "▁▂▃▄▅▆▇█"


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
    if name is None:
        return _Nothing()
    known = digest([str(folder.resolve())])[:16]
    try:
        if name == "tensorboard":
            return _TensorBoard(folder)
        if name == "trackio":
            run = f"{folder.name}-{known[:8]}"
            return _TrackedRun(name, name=run, config=dict(config), embed=False)
        return _TrackedRun(name, name=folder.name, id=known, dir=str(folder), config=dict(config))
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


class _TrackedRun:
    """A run of Weights & Biases or Trackio, which share these methods."""

    def __init__(self, package: str, **options: Any) -> None:
        self._run = import_module(package).init(project=_PROJECT, resume="allow", **options)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def draw_curves(metrics: Sequence[Mapping[str, Any]], file: Path) -> None:
    """A panel for each kind of number that the lines hold, over the steps."""
    from matplotlib.figure import Figure

    curves = [(name, _curves(metrics, keys)) for name, keys in _PANELS]
    drawn = [(name, lines) for name, lines in curves if lines]
    if not drawn:
        return
    # No automatic layout: it would take as long as all the rest.
    figure = Figure(figsize=(_SIZE[0], _SIZE[1] * len(drawn)), dpi=100)
    figure.subplots_adjust(left=0.12, right=0.98, top=0.97, bottom=0.6 / (len(drawn) + 2))
    panels = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, lines) in zip(panels, drawn, strict=True):
        for label, points in lines.items():
            axes.plot(
                *zip(*points, strict=True), label=label, marker="o" if len(points) < _FEW else ""
            )
        axes.set(ylabel=name)
        if list(lines) != [name]:
            axes.legend()
    panels[-1].set(xlabel="step")
    drawing = BytesIO()
    figure.savefig(drawing)
    write_file(file, drawing.getvalue())


def _curves(
    metrics: Sequence[Mapping[str, Any]], keys: Mapping[str, str]
) -> dict[str, list[tuple[int, float]]]:
    found = {
        label: [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
        for key, label in keys.items()
    }
    return {label: points for label, points in found.items() if points}


def sparkline(numbers: Iterable[float], width: int = 16) -> str:
    """The numbers as bars, averaged down to `width`; the lowest is the lowest bar."""
    values = list(numbers)
    if not values:
        return ""
    size = max(1, -(-len(values) // width))
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)

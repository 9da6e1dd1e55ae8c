"""A training's numbers as curves, as a line of text, and in the tracker that was named."""

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from markupsafe import Markup

from distill_datasets.drawing import Mark, curves
from distill_datasets.errors import SettingsError
from distill_datasets.files import write_file
from distill_datasets.models.sampler import digest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
_TITLE = 0.4  # inches above the panels
_FAR = 30  # times that a loss falls
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


def _panels(
    metrics: Sequence[Mapping[str, Any]],
) -> list[tuple[str, dict[str, list[tuple[int, float]]]]]:
    """Each kind of number that the lines hold, with its curves over the steps."""
    found = [(name, _curves(metrics, keys)) for name, keys in _PANELS]
    return [(name, lines) for name, lines in found if lines]


def panels_html(metrics: Sequence[Mapping[str, Any]], best: int | None = None) -> list[Markup]:
    """Every panel as inline SVG, with the step of the `best` checkpoint marked on the loss."""
    drawn = []
    for name, lines in _panels(metrics):
        at = dict(lines.get("validation", ()))
        marks = [Mark(best, at[best], f"best: step {best}")] if best in at else []
        log = False, name == _PANELS[0][0]
        drawn.append(curves(lines, x="step", y=name, log=log, marks=marks))
    return drawn


def draw_curves(
    metrics: Sequence[Mapping[str, Any]], file: Path, *, title: str = "", best: int | None = None
) -> None:
    """A panel for each kind of number that the lines hold, over the steps.

    The loss has a logarithmic axis where it falls far; the step of the `best` checkpoint is marked.
    """
    from matplotlib.figure import Figure

    drawn = _panels(metrics)
    if not drawn:
        return
    # No automatic layout: it would take as long as all the rest.
    height = _SIZE[1] * len(drawn) + _TITLE
    figure = Figure(figsize=(_SIZE[0], height), dpi=100)
    figure.subplots_adjust(left=0.12, right=0.98, top=1 - _TITLE / height, bottom=0.5 / height)
    figure.suptitle(title, fontsize=11, y=1 - 0.1 / height, va="top")
    for axes, (name, lines) in zip(
        figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0], drawn, strict=True
    ):
        _draw_panel(axes, name, lines, best)
    axes.set(xlabel="step")
    drawing = BytesIO()
    figure.savefig(drawing)
    write_file(file, drawing.getvalue())


def _draw_panel(
    axes: "Axes", name: str, lines: Mapping[str, Sequence[tuple[int, float]]], best: int | None
) -> None:
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < _FEW else "")
    heights = [height for points in lines.values() for _, height in points]
    if name == _PANELS[0][0]:
        if min(heights) > 0 and max(heights) > _FAR * min(heights):
            axes.set_yscale("log")
            name += " (log)"
        if best is not None:
            axes.axvline(best, color="black", linestyle=":", label=f"best checkpoint: step {best}")
    axes.set(ylabel=name)
    if list(lines) != [name]:
        axes.legend()


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

"""A training's numbers as curves, as a line of text, and in the tracker that was named."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from markupsafe import Markup

from distill_datasets.drawing import Mark, curves
from distill_datasets.errors import SettingsError
from distill_datasets.files import write_file
from distill_datasets.models.sampler import digest

_PROJECT = "distill-datasets"
_INSTALL = "track={name!r} needs a package that isn't installed: pip install {name}."
_LOSS = "loss per response token"
# A panel: what its axis says, and the numbers in it that are there.
_PANELS = {
    _LOSS: {"loss": "training", "validation_loss": "validation"},
    "share": {"accuracy": "accuracy", "internalisation": "internalisation"},
    "gradient norm": {"gradient_norm": "gradient norm"},
    "learning rate": {"learning_rate": "learning rate"},
}
_SIZE = (7.0, 2.2)  # inches, of one panel
_TITLE = 0.4  # inches above the panels
_FAR = 30  # times that a loss falls
_FEW = 30  # points that are marked one by one
_BARS = "▁▂▃▄▅▆▇█"


def _panels(metrics: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Each kind of number that the lines hold, with its curves over the steps."""
    panels = {}
    for name, keys in _PANELS.items():
        found = {
            label: [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
            for key, label in keys.items()
        }
        if any(found.values()):
            panels[name] = {label: points for label, points in found.items() if points}
    return panels


def panels_html(metrics: Sequence[Mapping[str, Any]], best: int | None = None) -> list[Markup]:
    """Every panel as inline SVG, with the step of the `best` checkpoint marked on the loss."""
    drawn = []
    for name, lines in _panels(metrics).items():
        at = dict(lines.get("validation", ()))
        marks = [Mark(best, at[best], f"best: step {best}")] if best in at else []
        drawn.append(curves(lines, x="step", y=name, log=(False, name == _LOSS), marks=marks))
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
    places = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, lines) in zip(places, drawn.items(), strict=True):
        for label, points in lines.items():
            marker = "o" if len(points) < _FEW else ""
            axes.plot(*zip(*points, strict=True), label=label, marker=marker)
        axes.set(ylabel=name)
        if name == _LOSS:
            heights = [height for points in lines.values() for _, height in points]
            if min(heights) > 0 and max(heights) > _FAR * min(heights):
                axes.set_yscale("log")
                axes.set(ylabel=f"{name} (log)")
            if best is not None:
                said = f"best checkpoint: step {best}"
                axes.axvline(best, color="black", linestyle=":", label=said)
        if list(lines) != [name]:
            axes.legend()
    axes.set(xlabel="step")
    drawing = BytesIO()
    figure.savefig(drawing)
    write_file(file, drawing.getvalue())


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


@contextmanager
def open_tracker(
    name: str | None, folder: Path, config: Mapping[str, Any]
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """What sends a step's numbers, which may come in parts, to the tracker of that name.

    A training that is continued goes on in the same run of the tracker. Weights & Biases and
    TensorBoard keep their files in `folder`. Raises `SettingsError` where it isn't installed.
    """
    if name is None:
        yield lambda _step, _values: None
        return
    board, known = name == "tensorboard", digest([str(folder.resolve())])[:16]
    own: dict[str, Any] = {"name": folder.name, "id": known, "dir": str(folder)}
    if name == "trackio":
        own = {"name": f"{folder.name}-{known[:8]}", "embed": False}
    run: Any
    try:
        if board:
            from torch.utils.tensorboard import SummaryWriter

            run = SummaryWriter(str(folder / "tensorboard"))
        else:
            named = {"project": _PROJECT, "resume": "allow", "config": dict(config)}
            run = import_module(name).init(**named, **own)
    except ImportError as error:
        raise SettingsError(_INSTALL.format(name=name) + f" ({error})") from error

    def track(step: int, values: Mapping[str, float]) -> None:
        if not board:
            run.log(dict(values), step=step)
            return
        for number, value in values.items():
            run.add_scalar(number, value, step)

    try:
        yield track
    finally:
        (run.close if board else run.finish)()


def require_tracker(name: str | None) -> None:
    """Refuse a tracker that isn't installed, before anything is spent."""
    if name is not None and find_spec(name) is None:
        raise SettingsError(_INSTALL.format(name=name))

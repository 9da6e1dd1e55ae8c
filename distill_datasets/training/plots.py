"""Draws what a training logged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# A panel: what its axis says, and the numbers in it that are there.
_PANELS = (
    ("loss per response token", {"loss": "training", "validation_loss": "validation"}),
    ("share", {"accuracy": "accuracy", "internalisation": "internalisation"}),
    ("gradient norm", {"gradient_norm": "gradient norm"}),
    ("learning rate", {"learning_rate": "learning rate"}),
)
_SIZE = (7.0, 2.2)  # inches, of one panel
_FEW = 30  # points that are marked one by one


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
    figure.savefig(file)


def _curves(
    metrics: Sequence[Mapping[str, Any]], keys: Mapping[str, str]
) -> dict[str, list[tuple[int, float]]]:
    found = {
        label: [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
        for key, label in keys.items()
    }
    return {label: points for label, points in found.items() if points}

"""Curves as matplotlib draws them, and as TensorBoard reads them."""

from pathlib import Path

import pytest

from distill_datasets.training.plots import (
    draw_curves,
    open_tracker,
)


def test_tensorboard_gets_every_number_at_its_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="only where TensorBoard is installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_tracker("tensorboard", tmp_path, {"rank": 8}) as track:
        track(1, {"loss": 2.0, "tokens": 10})
        track(2, {"loss": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]


@pytest.mark.parametrize(("last", "scale"), [(0.001, "log"), (1.0, "linear")])
def test_the_picture_has_a_title_the_best_step_and_an_axis_that_helps(
    last: float, scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *to: (drawn.append(figure), save(figure, *to))
    )
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": last, "validation_loss": last}]
    draw_curves(lines, tmp_path / "loss.png", title="pocket", best=2)
    (figure,) = drawn
    axes = figure.axes[0]
    assert (figure.get_suptitle(), axes.get_yscale()) == ("pocket", scale)
    assert "best checkpoint: step 2" in [line.get_label() for line in axes.get_lines()]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")

"""Trackers, as far as they can be tried without any, and curves as text and for pages."""

import sys
from pathlib import Path

import pytest

from distill_datasets.errors import SettingsError
from distill_datasets.training.plots import (
    open_tracker,
    panels_html,
    require_tracker,
    sparkline,
)

NEEDS = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "torch.utils.tensorboard"}


@pytest.mark.parametrize("name", NEEDS)
def test_a_tracker_that_is_not_installed_says_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, NEEDS[name], None)
    with (
        pytest.raises(SettingsError, match=f"track='{name}'.*pip install {name}"),
        open_tracker(name, tmp_path, {}),
    ):
        pass
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SettingsError, match=f"pip install {name}"):
        require_tracker(name)


def test_what_was_not_named_is_not_used(tmp_path: Path) -> None:
    with open_tracker(None, tmp_path, {}) as track:
        track(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_sparkline_shows_the_shape_in_a_bounded_width() -> None:
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([]) == ""
    assert len(sparkline(range(1000), width=16)) == 16


def test_panels_are_drawn_for_pages_too_with_the_best_step_where_it_was_measured() -> None:
    lines = [{"step": 1, "loss": 2.0, "learning_rate": 0.1}, {"step": 2, "validation_loss": 1.0}]
    loss, rate = panels_html(lines, best=2)
    assert "best: step 2" in loss and "best" not in rate
    assert "best" not in panels_html(lines, best=1)[0]

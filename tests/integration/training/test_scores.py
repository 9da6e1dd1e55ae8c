"""Where scores are kept."""

from pathlib import Path

import numpy as np
import pytest

from distill_datasets.models.scoring import SoftLabels
from distill_datasets.training.objectives.teacher import ScoreStore


def test_what_was_scored_is_read_back_to_the_bit_by_another_process(tmp_path: Path) -> None:
    labels = SoftLabels.of([4, 5], np.array([[4, 7], [5, 8]]), np.log([[0.6, 0.2], [0.9, 0.1]]))
    first = ScoreStore(tmp_path / "scores.sqlite")
    first.put([("a", labels)])
    first.close()
    again = ScoreStore(tmp_path / "scores.sqlite")
    read = again.get("a")
    assert "a" in again and "b" not in again
    assert read.kept == labels.kept
    for name in ("tokens", "ids", "logprobs"):
        assert np.array_equal(getattr(read, name), getattr(labels, name))
        assert getattr(read, name).dtype == getattr(labels, name).dtype
    again.close()


def test_the_mean_of_what_is_kept_is_over_the_labels_that_were_asked_for(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores.sqlite")
    some = [SoftLabels.of([4], np.array([[4]]), np.log([[kept]])) for kept in (0.5, 0.7, 0.9)]
    store.put(zip("abc", some, strict=True))
    assert store.mean_kept(["a", "c", "c"]) == pytest.approx((0.5 + 0.9 + 0.9) / 3)
    many = ["a", "b"] * 900
    assert store.mean_kept(many) == pytest.approx(0.6)
    store.close()

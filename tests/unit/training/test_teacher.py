"""The teacher's side of a release: which rows it is asked about, and where scores are kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from distill_datasets.errors import DatasetError
from distill_datasets.models.scoring import SoftLabels
from distill_datasets.training.data import DatasetSource, Rendered
from distill_datasets.training.objectives import TrainingTask
from distill_datasets.training.objectives.teacher import ScoreStore, chosen_rows
from distill_datasets.training.settings import ObjectiveSettings, TrainSettings


def task(sources: list[str | None], manifest: dict[str, Any]) -> TrainingTask:
    columns: dict[str, list[Any]] = {name: ["x"] * len(sources) for name in ("id", "query")}
    plain = Dataset.from_dict(
        {**columns, "response": ["y"] * len(sources), "sample": [0] * len(sources)}
        | {"source": sources}
    )
    kept: Any = range(len(sources))
    rows = Rendered(plain, kept, 0, plain, None)  # type: ignore[arg-type]
    source = DatasetSource("me/desk", Path(), "1", "1", manifest)
    settings = TrainSettings(objective=ObjectiveSettings("soft"))
    return TrainingTask(None, rows, source, settings, Path())  # type: ignore[arg-type]


def test_a_teacher_is_not_asked_about_rows_that_it_did_not_answer() -> None:
    """Those of a mix; a column of somebody else's that has that name says nothing."""
    released = {"content_digest": "d" * 64}
    with pytest.raises(DatasetError, match=r"2 of 3 rows of 'me/desk' are of its mix \(general\)"):
        chosen_rows(task([None, "general", "general"], released))
    assert chosen_rows(task([None, None], released))[0] == [0, 1]
    assert chosen_rows(task(["wikipedia"], {}))[0] == [0]


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

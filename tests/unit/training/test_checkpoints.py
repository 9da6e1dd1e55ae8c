"""Which checkpoint is the best, and when training stops."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.training.checkpoints import (
    SavedCheckpoint,
    Selection,
    TrainingResult,
    collapse_signs,
    why_it_ended,
)
from distill_datasets.training.settings import TrainSettings


def after(values: list[float], **settings: Any) -> Selection:
    chosen = TrainSettings(**settings)
    lines = [{"step": step, chosen.select: value} for step, value in enumerate(values, 1)]
    begun = Selection(chosen.select, chosen.min_improvement)
    return begun.read([{"step": 1, "loss": 9.0}, *lines])


def test_patience_counts_measurements_without_the_least_improvement() -> None:
    falling = [1.0, 0.9, 0.895, 0.89, 0.885]
    least = after(falling, min_improvement=0.05)
    assert (least.best_step, least.mark_step, least.stale) == (5, 2, 3)
    assert least.exhausted(3) and not least.exhausted(4) and not least.exhausted(None)
    assert after(falling).stale == 0


def test_of_equal_measurements_the_first_stays_the_best() -> None:
    selection = after([1.0, 0.5, 0.5, 0.5])
    assert (selection.best_step, selection.stale) == (2, 2)


def test_other_metrics_than_a_loss_are_better_when_higher() -> None:
    assert after([0.1, 0.7, 0.3], select="accuracy").best_step == 2


def test_a_selection_survives_being_written_down() -> None:
    half = after([1.0, 0.8, 0.9])
    again = Selection(**json.loads(json.dumps(asdict(half))))
    assert again.after(4, 0.85) == after([1.0, 0.8, 0.9, 0.85])


def test_why_it_ended_names_the_steps_or_the_patience() -> None:
    stale = Selection(min_improvement=0.001, best=0.5, best_step=60, mark=0.5, stale=2)
    assert why_it_ended(stale, 2, 80, 98) == (
        "no improvement of 0.001 in 2 validations (best at step 60)"
    )
    assert why_it_ended(stale, 2, 98, 98) == "all 98 steps done"


FINE = {
    **{"answers": 16, "answers_distinct": 14, "answers_empty": 0.0, "answers_unending": 0.0},
    **{"answers_looping": 0.0, "teacher_distinct": 15, "teacher_commonest": 0.1},
    "teacher_once": 0.9,
}
ONE = {**FINE, "answers_distinct": 1}
LOOPS = {**FINE, "answers_unending": 0.6, "answers_looping": 0.6}
EMPTY = {**FINE, "answers_empty": 0.75}


@pytest.mark.parametrize(
    ("scores", "signs"),
    [
        (FINE, []),
        (ONE, ["one"]),
        ({**ONE, "answers_distinct": 2}, []),
        ({**ONE, "answers_distinct": 2, "teacher_distinct": 16}, ["one"]),
        ({**ONE, "teacher_commonest": 0.6}, []),
        ({**ONE, "answers": 3}, []),
        (LOOPS, ["loops"]),
        ({**LOOPS, "answers_unending": 1.0}, ["loops", "endless"]),
        ({**FINE, "answers_unending": 0.75}, ["endless"]),
        ({**FINE, "answers_unending": 0.6}, []),
        (EMPTY, ["empty"]),
        ({**EMPTY, "answers_distinct": 1}, ["empty", "one"]),
        ({}, []),
    ],
)
def test_a_collapse_shows_in_what_the_teacher_does_not_do(
    scores: dict[str, float], signs: list[str]
) -> None:
    assert collapse_signs(scores) == signs


def watched(*measured: tuple[dict[str, float], float]) -> Selection:
    """Measurements with their validation loss; the first is of the untrained student."""
    lines = [
        {**scores, "step": step, "validation_loss": loss}
        for step, (scores, loss) in enumerate(measured)
    ]
    return Selection().read(lines)


@pytest.mark.parametrize("collapse", [ONE, LOOPS, EMPTY])
def test_a_collapse_stops_training_at_the_second_measurement_that_shows_it(
    collapse: dict[str, float],
) -> None:
    """However well the loss falls: a base that answers shows that training did it."""
    assert not watched((FINE, 9.0), (collapse, 5.0)).collapsed
    found = watched((FINE, 9.0), (FINE, 6.0), (collapse, 5.0), (collapse, 4.0))
    assert found.collapsed and (found.best_step, found.best) == (1, 6.0)
    assert "collapsed" in why_it_ended(found, None, 3, 60)
    assert watched((FINE, 9.0), (collapse, 5.0), (collapse, 4.0)).best is None


def test_one_measurement_of_a_collapse_is_a_doubt_alone() -> None:
    recovered = watched((FINE, 9.0), (ONE, 5.0), (FINE, 4.0), (ONE, 3.0))
    assert not recovered.collapsed and recovered.best_step == 2
    assert "answers to different queries have become one" in recovered.doubt
    assert watched((FINE, 9.0), (FINE, 4.0)).doubt == ""


@pytest.mark.parametrize("collapse", [LOOPS, EMPTY, ONE])
def test_what_a_base_does_itself_is_unlearned_in_time(collapse: dict[str, float]) -> None:
    """A base that loops still does after a few steps; only a loss that stays is a bad sign."""
    learning = watched((collapse, 9.0), (collapse, 5.0), (collapse, 4.0), (FINE, 3.0))
    assert not learning.collapsed and learning.doubt == "" and learning.best_step == 3
    assert watched((collapse, 9.0), (collapse, 9.5), (collapse, 9.5)).collapsed


def test_the_commonest_label_may_come_first_while_the_loss_falls() -> None:
    labels = {**ONE, "teacher_distinct": 4, "teacher_commonest": 0.4, "teacher_once": 0.0}
    assert not watched((FINE, 9.0), (labels, 3.0), (labels, 2.0), (labels, 1.5)).struck
    assert watched((FINE, 9.0), (labels, 3.0), (labels, 3.5), (labels, 3.2)).collapsed


def test_a_best_checkpoint_that_is_no_better_than_the_base_is_doubted() -> None:
    found = watched((FINE, 2.0), (FINE, 2.5), (FINE, 2.1))
    assert (found.best_step, found.base) == (2, 2.0)
    assert "no better than the student before training (validation_loss 2)" in found.doubt


def test_a_watched_selection_survives_being_written_down() -> None:
    half = watched((LOOPS, 9.0), (ONE, 5.0))
    again = Selection(**json.loads(json.dumps(asdict(half))))
    assert again == half and again.measured(2, ONE) == half.measured(2, ONE)


def test_a_verdict_names_every_score_that_can_choose() -> None:
    """What is measured of sampled answers chooses none."""
    scores = {"validation_loss": 0.5, "accuracy": 0.75, "answers_ended": 1.0, "answers": 4.0}
    last = SavedCheckpoint("s8", 8, "tinker://a", None, best=True, final=True, scores=scores)
    result = TrainingResult(Path("out"), last, last, 0.5, 8, 4, 0, 9, 1.0, "done")
    assert result.verdict == "the final weights won (validation_loss 0.5, accuracy 0.75)"

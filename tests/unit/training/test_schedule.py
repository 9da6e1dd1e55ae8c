"""What is learned when, and which measurement decides: pure functions, no model."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.training.checkpoints import SavedCheckpoint, TrainingResult
from distill_datasets.training.schedule import (
    Schedule,
    Selection,
    ValidationPlan,
    choose_rows,
    collapse_signs,
    plan_steps,
    why_it_ended,
)
from distill_datasets.training.settings import TrainSettings

LENGTHS = [5 + 7 * place % 60 for place in range(230)]


def places(settings: TrainSettings, lengths: list[int] = LENGTHS) -> list[list[int]]:
    return [list(step.places) for step in plan_steps(lengths, settings, 1.0)]


@pytest.mark.parametrize(("preset", "rows", "steps"), [("poc", 8, 100), ("debug", 10, 50)])
def test_a_preset_sets_rows_and_steps(preset: Any, rows: int, steps: int) -> None:
    planned = places(TrainSettings(preset=preset))
    assert len(planned) == steps
    assert {len(batch) for batch in planned} == {rows}
    assert len({tuple(sorted(batch)) for batch in planned}) == 1


def test_explicit_settings_win_over_a_preset() -> None:
    assert len(places(TrainSettings(preset="poc", max_steps=7))) == 7
    assert len(places(TrainSettings(preset="poc", epochs=3, batch_size=4))) == 3 * 2
    assert len(choose_rows(230, TrainSettings(preset="poc", max_rows=20))) == 20


def test_the_rows_of_a_subset_depend_on_the_seed() -> None:
    one, again, other = (choose_rows(230, TrainSettings(max_rows=8, seed=s)) for s in (0, 0, 1))
    assert one == again != other
    assert len(set(one)) == 8


def test_token_batches_hold_every_row_once_an_epoch_within_the_budget() -> None:
    settings = TrainSettings(batch_tokens=200, epochs=2)
    planned = places(settings)
    half = len([step for step in plan_steps(LENGTHS, settings, 1.0) if step.epoch == 0])
    for epoch in (planned[:half], planned[half:]):
        assert sorted(place for batch in epoch for place in batch) == list(range(len(LENGTHS)))
    assert all(sum(LENGTHS[place] for place in batch) <= 200 for batch in planned)
    assert places(settings) == planned != places(TrainSettings(batch_tokens=200, epochs=2, seed=1))


def test_token_batches_hold_rows_of_similar_length() -> None:
    def padding(settings: TrainSettings) -> float:
        batches = [[LENGTHS[place] for place in batch] for batch in places(settings)]
        return sum(max(b) * len(b) for b in batches) / sum(map(sum, batches))

    assert padding(TrainSettings(batch_tokens=300, epochs=1)) < 1.3
    assert padding(TrainSettings(batch_size=9, epochs=1)) > 1.5


def test_a_row_longer_than_the_budget_has_a_batch_to_itself() -> None:
    planned = places(TrainSettings(batch_tokens=10, epochs=1), [4, 50, 4])
    assert sorted(map(sorted, planned)) == [[0, 2], [1]]


def test_a_measurement_is_always_of_saved_weights() -> None:
    schedule = Schedule(98, TrainSettings(), 9)
    measured = [step for step in range(1, 99) if schedule.measures(step)]
    assert measured == [*range(9, 98, 9), 98]
    assert all(schedule.saves(step) for step in measured)
    assert [step for step in range(1, 99) if schedule.keeps(step)] == [98]
    assert schedule.saves(20) and not schedule.measures(20)


def test_without_validation_rows_nothing_is_measured() -> None:
    schedule = Schedule(250, TrainSettings(rolling_every=60), None)
    assert [step for step in range(1, 251) if schedule.saves(step)] == [
        60,
        100,
        120,
        180,
        200,
        240,
        250,
    ]
    assert not any(schedule.measures(step) for step in range(1, 251))


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


ENOUGH = 100_000  # tokens that are trained: validation costs nothing beside them


@pytest.mark.parametrize("trained", [3_000, 5_000, 10_000, 40_000, 600_000])
@pytest.mark.parametrize("rows", [1, 8, 30, 500])
def test_validation_costs_at_most_a_tenth_of_the_training(trained: int, rows: int) -> None:
    """The measurement before the first step included; but a few rows are always measured."""
    settings, lengths = TrainSettings(), [10, 30] * rows
    plan = ValidationPlan.of(60, trained, lengths[:rows], settings)
    times = -(-60 // plan.every)
    mean = sum(lengths[:rows]) / rows
    assert plan.share == pytest.approx((times + 1) * (plan.rows + plan.answered) * mean / trained)
    least = (times, plan.rows, plan.answered) == (1, min(rows, 20), min(rows, 4))
    assert plan.share <= 0.1 or least
    assert 1 <= times <= 10 and plan.rows <= rows and plan.answered <= min(16, rows)


def test_a_long_training_is_measured_ten_times_and_a_short_one_less_often_or_on_fewer_rows() -> (
    None
):
    lengths, settings = [20] * 24, TrainSettings()
    assert ValidationPlan.of(60, ENOUGH, lengths, settings).every == 6
    less = ValidationPlan.of(60, 48_000, lengths, settings)
    assert (less.every, less.rows, less.answered) == (12, 24, 16)
    fewer = ValidationPlan.of(60, 20_000, lengths, settings)
    assert (fewer.every, fewer.rows, fewer.answered) == (20, 20, 5)


def test_a_small_training_measures_as_many_rows_as_an_internalisation_score_takes() -> None:
    few = ValidationPlan.of(60, 6_000, [20] * 24, TrainSettings())
    assert few.rows == 20 and few.share < 0.2


def test_whoever_says_how_often_gets_all_rows() -> None:
    settings = TrainSettings(evaluate_every=2)
    plan = ValidationPlan.of(60, 1_000, [20] * 24, settings)
    assert (plan.every, plan.rows, plan.answered) == (2, 24, 16) and plan.share > 1


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

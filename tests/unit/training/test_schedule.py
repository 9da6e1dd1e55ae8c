"""What is learned and measured when: pure functions, no model."""

from typing import Any

import pytest

from distill_datasets.training.schedule import (
    Schedule,
    ValidationPlan,
    choose_rows,
    plan_steps,
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

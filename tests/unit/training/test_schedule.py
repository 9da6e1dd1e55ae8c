"""What is learned when, and which measurement decides: pure functions, no model."""

import json
from dataclasses import asdict
from typing import Any

import pytest

from distill_datasets.training.schedule import (
    Schedule,
    Selection,
    choose_rows,
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
    schedule = Schedule(98, TrainSettings(), measured=True)
    measured = [step for step in range(1, 99) if schedule.measures(step)]
    assert measured == [*range(9, 98, 9), 98]
    assert all(schedule.saves(step) for step in measured)
    assert [step for step in range(1, 99) if schedule.keeps(step)] == [98]
    assert schedule.saves(20) and not schedule.measures(20)


def test_without_validation_rows_nothing_is_measured() -> None:
    schedule = Schedule(250, TrainSettings(rolling_every=60), measured=False)
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
    return Selection.of(chosen, [{"step": 1, "loss": 9.0}, *lines])


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
    settings = TrainSettings(patience=2, min_improvement=0.001)
    stale = Selection(best=0.5, best_step=60, mark=0.5, mark_step=60, stale=2)
    assert why_it_ended(stale, settings, 80, 98) == (
        "no improvement of 0.001 in 2 validations (best at step 60)"
    )
    assert why_it_ended(stale, settings, 98, 98) == "all 98 steps done"

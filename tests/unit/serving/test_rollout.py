"""A student moves between stages by evidence that holds however often one looks at it."""

from pathlib import Path

import numpy as np
import pytest

from distill_datasets.errors import OutputError, SettingsError
from distill_datasets.evaluation.gate import GateRules
from distill_datasets.serving.rollout import (
    FAILED,
    OFF,
    STAGES,
    UNANSWERED,
    Evidence,
    Judgement,
    Move,
    RolloutState,
    StageRules,
    Usual,
    decide,
    parse_stages,
)
from tests.support.recipes import any_recipe

RULES = StageRules.of(0.97, 1.0, GateRules())
FINE = {"text": "en", "stop_reason": "stop"}


def shadowed(agreement: float, seed: int, most: int, rules: StageRules = RULES) -> Move | None:
    """What becomes of a student whose answers agree so often, as they come."""
    found = Evidence()
    for agrees in np.random.default_rng(seed).random(most) < agreement:
        found.count_shadowed(float(agrees), rules)
        if (move := decide("alpha", STAGES, found, rules)) is not None:
            return move
    return None


def test_a_worse_student_is_taken_off_within_twice_the_answers_that_are_promised() -> None:
    _, promised = RULES.promised(0.8)
    assert promised is not None and promised < 100
    moves = [shadowed(0.8, seed, 2 * promised) for seed in range(100)]
    assert sum(move is not None and move.to == OFF for move in moves) >= 95
    assert not any(move is not None and move.to != OFF for move in moves)


def test_a_student_as_good_as_on_held_out_rows_is_promoted() -> None:
    promised, _ = RULES.promised(0.8)
    assert promised is not None
    moves = [shadowed(RULES.expected, seed, 2 * promised) for seed in range(40)]
    assert sum(move is not None and move.to == "beta" for move in moves) >= 36
    assert not any(move is not None and move.to == OFF for move in moves)


def test_a_student_at_the_least_agreement_is_wrongly_promoted_in_5_percent_at_most() -> None:
    moves = [shadowed(RULES.least, seed, 600) for seed in range(100)]
    assert sum(move is not None and move.to == "beta" for move in moves) <= 5


def test_what_is_short_of_evidence_stays_where_it_is() -> None:
    assert shadowed(RULES.expected, 0, 20) is None
    assert decide("alpha", STAGES, Evidence(), RULES) is None
    assert decide(OFF, STAGES, Evidence(shadowed=500, agreement=500.0), RULES) is None


def test_the_last_stage_is_not_promoted() -> None:
    assert decide("production", STAGES, Evidence(shadowed=500, agreement=499.0), RULES) is None


def test_agreement_that_falls_late_is_drift_though_the_whole_stage_is_still_fine() -> None:
    found = Evidence()
    for _ in range(5_000):
        found.count_shadowed(1.0, RULES)
    generator, move = np.random.default_rng(1), None
    for _ in range(1, 200):
        found.count_shadowed(float(generator.random() < 0.85), RULES)
        if move := decide("production", STAGES, found, RULES):
            break
    assert move is not None and move.to == OFF and "fell" in move.why
    assert found.interval[0] > RULES.least


@pytest.mark.parametrize(
    ("said", "answered", "rule"),
    [
        ({"text": "", "stop_reason": "stop"}, False, "empty"),
        ({"text": "so it is, " * 30, "stop_reason": "length"}, True, "cut off"),
        ({"text": "maybe", "stop_reason": "stop"}, False, UNANSWERED),
    ],
)
def test_odd_answers_take_a_student_off_by_the_gates_rules(
    said: dict[str, str], answered: bool, rule: str
) -> None:
    found = Evidence()
    for place in range(40):
        found.count_answer(said if place % 2 else FINE, answered if place % 2 else True)
    move = decide("beta", STAGES, found, RULES)
    assert move is not None and move.to == OFF and move.why.startswith(rule)


def test_a_student_that_fails_often_is_taken_off_and_one_failure_is_none() -> None:
    found = Evidence(requests=30, answers=30)
    found.count_failed()
    assert decide("beta", STAGES, found, RULES) is None
    for _ in range(10):
        found.count_failed()
    move = decide("beta", STAGES, found, RULES)
    assert move is not None and move.to == OFF and move.why.startswith(FAILED)


def test_stages_are_read_as_written_and_rise() -> None:
    off, small, all_ = parse_stages(["try=0.05", "all=1:0.01"])
    assert (off.name, small.share, small.shadow, all_.shadow) == (OFF, 0.05, 1.0, 0.01)
    for wrong in (["a=0.5", "b=0.1"], ["a=0.1", "a=0.2"], ["a"], ["a=2"], ["a=nan"]):
        with pytest.raises(SettingsError):
            parse_stages(wrong)


def test_labels_and_lengths_are_held_against_those_of_held_out_rows() -> None:
    usual = Usual(["en", "de"] * 100, [2] * 200)
    assert usual.labels is None and usual.length_ratio is None
    for place in range(400):
        usual.add("en" if place % 2 else "de", 2)
    apart, chance = usual.labels or (1.0, 0.0)
    assert apart == 0.0 and 0.01 < chance < 0.03 and usual.length_ratio == 1.0
    for _ in range(500):  # as many as are looked at
        usual.add("fr", 6)
    assert usual.labels is not None and usual.labels[0] == 1.0 and usual.length_ratio == 3.0
    assert Usual([str(number) for number in range(200)], [3] * 200).labels is None


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"evidence": {"doubt": 1}}'])
def test_a_state_that_cannot_be_read_is_an_error_that_says_what_to_do(
    state: str, tmp_path: Path
) -> None:
    (tmp_path / "rollout").mkdir()
    (tmp_path / "rollout" / "state.json").write_text(state)
    with pytest.raises(OutputError, match="delete it, and name the stage with --to"):
        RolloutState(tmp_path, Judgement(any_recipe(), False), RULES)

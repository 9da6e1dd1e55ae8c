"""Which settings are refused, and which decide a training."""

from dataclasses import asdict
from typing import Any

import pytest

from distill_datasets.errors import SettingsError
from distill_datasets.training.settings import (
    ObjectiveSettings,
    TrainSettings,
    decisive,
    unlike_default,
)


def test_what_changes_no_weight_may_change_between_two_runs() -> None:
    assert decisive(asdict(TrainSettings(ahead=0, track="wandb", ttl_seconds=None))) == decisive({})
    assert unlike_default(asdict(TrainSettings(rank=8, ahead=0))) == {"rank": 8}


@pytest.mark.parametrize(
    "wrong",
    [
        {"preset": "huge"},
        {"batch_tokens": 0},
        {"patience": 0},
        {"min_improvement": -1.0},
        {"ttl_seconds": 60},
        {"track": "mlflow"},
        {"ahead": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        TrainSettings(**wrong)


def test_nothing_to_adapt_is_refused() -> None:
    with pytest.raises(SettingsError, match="Nothing to train"):
        TrainSettings(train_attention=False, train_mlp=False, train_unembed=False)


def test_settings_that_the_first_version_wrote_mean_what_they_meant() -> None:
    old = asdict(TrainSettings(rank=8)) | {"preset": "production"}
    old["objective"] = {**old["objective"], "temperature": 1.0}
    assert decisive(old) == decisive(asdict(TrainSettings(rank=8)))
    softened = {**old, "objective": {**old["objective"], "temperature": 2.0}}
    assert "objective" in unlike_default(softened) and "objective" not in unlike_default(old)


def test_a_setting_that_came_later_is_said_only_where_it_is_used() -> None:
    """Trainings that were begun without it go on."""
    assert "turns" not in decisive(asdict(TrainSettings()))
    used = asdict(TrainSettings(turns="all"))
    assert decisive(used)["turns"] == "all" and unlike_default(used) == {"turns": "all"}
    assert decisive(unlike_default(used)) == decisive(used)


@pytest.mark.parametrize("top_k", [-1, 1])
def test_a_reverse_kl_over_no_choice_is_refused(top_k: int) -> None:
    with pytest.raises(SettingsError, match="top_k"):
        ObjectiveSettings(name="on_policy", top_k=top_k)
    assert ObjectiveSettings(name="on_policy", top_k=0).policy_gradient


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", "dpo"), ("top_k", 0), ("alpha", 1.5), ("stale", 2)],
)
def test_an_objective_that_cant_be_trained_is_refused_by_its_name(
    field: str, value: object
) -> None:
    with pytest.raises(SettingsError, match=field):
        ObjectiveSettings(**{field: value})  # type: ignore[arg-type]

import pytest

from distill_datasets.errors import SettingsError
from distill_datasets.training.settings import ObjectiveSettings


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

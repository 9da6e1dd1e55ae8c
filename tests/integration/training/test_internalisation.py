"""The internalisation score of real models' likelihoods."""

from dataclasses import replace
from datetime import date

import pytest
from tinker import LoraConfig

from distill_datasets.errors import BudgetReached
from distill_datasets.generation.pricing import Meter, Price, Prices
from distill_datasets.models.references import connect
from distill_datasets.training.internalisation import (
    TeacherAnswer,
    measure_internalisation,
    reference_likelihoods,
)
from distill_datasets.training.student import Student

pytestmark = pytest.mark.usefixtures("undrawn")

ANSWERS = [
    TeacherAnswer(
        group=query,
        taught=[
            {"role": "system", "content": "One word."},
            {"role": "user", "content": query},
            {"role": "assistant", "content": "en"},
        ],
        learned=[
            {"role": "user", "content": query},
            {"role": "assistant", "content": "The answer is en and nothing else at all."},
        ],
    )
    for query in (f"the weather on day {number}" for number in range(20))
]


def test_the_score_of_three_models_is_made_of_their_likelihoods(model: str) -> None:
    """The student is the base with new weights, which change nothing: it scores 0."""
    base = connect(model)
    path = Student.create(base, LoraConfig(rank=4, seed=0)).save("new").result().sampler
    found = measure_internalisation(
        ANSWERS, {"base": base, "teacher": base, "student": replace(base, model_path=path)}
    )
    assert found["value"] == pytest.approx(0, abs=1e-4)
    nats = found["nats_per_token"]
    assert nats["student"] == pytest.approx(nats["base"], abs=1e-4)
    assert nats["teacher"] < nats["base"]
    assert found["rows"] == 20


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([replace(one, taught=one.learned) for one in ANSWERS], "hardly likelier"),
        (ANSWERS[:19], "it takes 20 answers of the teacher; found 19."),
    ],
)
def test_a_score_that_would_say_nothing_gives_way_to_the_reason(
    answers: list[TeacherAnswer], why: str, model: str
) -> None:
    base = connect(model)
    found = measure_internalisation(answers, dict.fromkeys(("base", "teacher", "student"), base))
    assert why in found["why"] and "value" not in found
    assert set(found["nats_per_token"]) == {"base", "teacher", "student"}


def test_an_end_that_the_teacher_did_not_make_is_not_counted(model: str) -> None:
    base = connect(model)
    cut = [replace(one, ended=False) for one in ANSWERS[:2]]
    whole = reference_likelihoods(ANSWERS[:2], base=base, teacher=base)
    found = reference_likelihoods(cut, base=base, teacher=base)
    assert [one - 1 for one in whole.tokens] == list(found.tokens)
    for shorter, longer in zip(found.base, whole.base, strict=True):
        assert shorter < longer


def test_a_budget_stops_before_the_first_request_that_it_has_no_room_for(model: str) -> None:
    base = connect(model)
    price = Price(prompt=1.0, response=1.0)
    prices = Prices(date=date(2026, 1, 1), currency="USD", models={model: price})
    enough, none = Meter(prices, budget=1.0), Meter(prices, budget=1e-9)
    systems = {"base": enough, "teacher": enough, "student": None}
    connections = dict.fromkeys(systems, base)
    measure_internalisation(ANSWERS[:2], connections, systems)
    tokens = enough.spent * 1e6
    assert tokens > 4 * 20  # of two conversations, each read twice
    with pytest.raises(BudgetReached):
        measure_internalisation(ANSWERS[:2], connections, {**systems, "teacher": none})
    assert none.spent == 0 and enough.spent * 1e6 == pytest.approx(1.5 * tokens, rel=0.2)

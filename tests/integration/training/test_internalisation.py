"""The internalisation score of real models' likelihoods."""

from dataclasses import replace

import pytest
from tinker import LoraConfig

from distill_datasets.models.references import connect
from distill_datasets.training.internalisation import TeacherAnswer, measure_internalisation
from distill_datasets.training.student import Student

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
    for query in ("the weather", "hello", "one two")
]


def test_the_score_of_three_models_is_made_of_their_likelihoods(model: str) -> None:
    """The student is the base with new weights, which change nothing: it scores 0."""
    base = connect(model)
    path = Student.create(base, LoraConfig(rank=4, seed=0)).save("new").result().sampler
    found = measure_internalisation(
        ANSWERS, {"base": base, "teacher": base, "student": replace(base, model_path=path)}
    )
    assert found is not None
    assert found["value"] == pytest.approx(0, abs=1e-4)
    nats = found["nats_per_token"]
    assert nats["student"] == pytest.approx(nats["base"], abs=1e-4)
    assert nats["teacher"] < nats["base"]
    assert found["rows"] == 3


def test_what_is_not_defined_is_said_and_left_out(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [replace(one, taught=one.learned) for one in ANSWERS]
    base = connect(model)
    assert (
        measure_internalisation(same, dict.fromkeys(("base", "teacher", "student"), base)) is None
    )
    assert "measure: The internalisation score is not defined" in capsys.readouterr().err

import pytest

from distill_datasets.errors import ModelError
from distill_datasets.models.references import default_student


@pytest.mark.parametrize("teacher", ["pocket", "tinker:Qwen/Qwen3-8B", "embedded:models/smol"])
def test_a_teacher_that_can_be_trained_is_the_student_where_none_is_named(teacher: str) -> None:
    assert default_student(teacher) == teacher


@pytest.mark.parametrize(
    "teacher", ["openai:gpt-5", "tinker://run/sampler_weights/x", "a + b", "runs/train", None]
)
def test_any_other_teachers_student_must_be_named(teacher: str | None) -> None:
    with pytest.raises(ModelError, match="Name the student with --student"):
        default_student(teacher)

"""The student, against the real embedded server and a tiny random model."""

from collections.abc import Iterator

import numpy as np
import pytest
import tinker

from distill_datasets.connection import Connection, connect
from distill_datasets.errors import ModelError
from distill_datasets.sampler import Message, Sampling
from distill_datasets.student import Example, Student, _datums
from tests.tiny_model import make_tiny_model

# The SDK leaves one connection of its first request open.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

EXAMPLES = [
    Example([5, 17, 40, 41, 42, 2], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]),
    Example([9, 60, 61, 2], [0.0, 0.0, 1.0, 1.0]),
]


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    folder = make_tiny_model(tmp_path_factory.mktemp("model"))
    connection = connect(f"embedded:{folder}", store=tmp_path_factory.mktemp("store"))
    with connection.service:
        yield connection


@pytest.fixture
def student(connection: Connection) -> Student:
    return Student.create(connection, rank=8, seed=3)


def learn(student: Student, steps: int) -> list[float]:
    return [student.submit(EXAMPLES, 1e-2, "token").result().loss for _ in range(steps)]


def test_an_untrained_students_loss_is_that_of_the_base_model(
    connection: Connection, student: Student
) -> None:
    """Pinned to transformers: the mean negative log likelihood of the response tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(connection.tokenizer_source, dtype=torch.float32)
    losses = []
    for example in EXAMPLES:
        ids = torch.tensor([list(example.tokens)])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)
        chosen = logprobs[range(len(example.tokens) - 1), example.tokens[1:]].numpy()
        losses.extend(-chosen[example.targets > 0])
    assert student.loss([EXAMPLES]).result() == pytest.approx(np.mean(losses), abs=1e-4)


def test_batches_of_any_size_give_one_loss(student: Student) -> None:
    whole = student.loss([EXAMPLES]).result()
    assert student.loss([[one] for one in EXAMPLES]).result() == pytest.approx(whole, abs=1e-5)


def test_learning_lowers_the_loss_and_evaluating_changes_nothing(student: Student) -> None:
    first = student.submit(EXAMPLES, 1e-2, "token").result()
    before = student.loss([EXAMPLES]).result()
    assert student.loss([EXAMPLES]).result() == before < first.loss
    assert (first.response_tokens, first.tokens) == (5, 10)
    assert first.gradient_norm is not None and first.gradient_norm > 0


def test_the_loss_evaluated_is_after_the_steps_submitted_before_it(student: Student) -> None:
    steps = [student.submit(EXAMPLES, 1e-2, "token") for _ in range(3)]
    evaluated = student.loss([EXAMPLES])
    later = student.submit(EXAMPLES, 1e-2, "token")
    assert evaluated.result() == pytest.approx(later.result().loss, abs=1e-6)
    assert [step.result().loss for step in steps][-1] > evaluated.result()


def test_a_resumed_student_goes_on_to_the_very_same_losses(
    connection: Connection, student: Student
) -> None:
    learn(student, 2)
    saved = student.save("two", {"step": "2"})
    assert learn(Student.resume(connection, saved.state), 3) == learn(student, 3)


def test_equal_seeds_learn_equally_and_others_do_not(connection: Connection) -> None:
    first, second, other = (
        learn(Student.create(connection, rank=8, seed=seed), 3) for seed in (1, 1, 2)
    )
    assert first == second != other


async def _answer(student: Student, path: str) -> str:
    messages: list[Message] = [{"role": "user", "content": "blue"}]
    reply = await student.sampler(path).sample(messages, Sampling(temperature=0, max_tokens=1))
    return reply.samples[0].text


def test_a_sampler_answers_with_the_weights_that_were_saved_and_no_later_ones(
    connection: Connection, student: Student
) -> None:
    import asyncio

    prompt = connection.renderer.build_generation_prompt([{"role": "user", "content": "blue"}])
    asked = prompt.to_ints()

    def taught(word: str) -> list[Example]:
        answer = connection.tokenizer.encode(word) + [connection.tokenizer.eos_token_id]
        return [Example(asked + answer, [0.0] * len(asked) + [1.0] * len(answer))]

    for _ in range(20):
        student.submit(taught("en"), 2e-2, "token").result()
    saved = student.save("en")
    for _ in range(20):
        student.submit(taught("de"), 2e-2, "token").result()
    later = student.save("de")
    assert asyncio.run(_answer(student, saved.sampler)) == "en"
    assert asyncio.run(_answer(student, later.sampler)) == "de"


def test_weights_are_normalized_as_the_cookbook_does_per_example() -> None:
    """Pinned to the cookbook's own datums; only it sums over examples where we take the mean."""
    import torch
    from tinker_cookbook.supervised.common import datum_from_model_input_weights

    for example, datum in zip(EXAMPLES, _datums(EXAMPLES, "example"), strict=True):
        theirs = datum_from_model_input_weights(
            tinker.ModelInput.from_ints(list(example.tokens)),
            torch.tensor(example.weights),
            reduction="mean",
        )
        assert datum.model_input.to_ints() == theirs.model_input.to_ints()
        ours = datum.loss_fn_inputs
        assert ours["target_tokens"].tolist() == theirs.loss_fn_inputs["target_tokens"].tolist()
        weights = np.asarray(theirs.loss_fn_inputs["weights"].tolist()) / len(EXAMPLES)
        assert ours["weights"].tolist() == pytest.approx(weights)


def test_per_token_every_response_token_weighs_the_same() -> None:
    weights = [datum.loss_fn_inputs["weights"].tolist() for datum in _datums(EXAMPLES, "token")]
    assert weights == [pytest.approx([0, 0, 0.2, 0.2, 0.2]), pytest.approx([0, 0.2, 0.2])]


def test_what_is_not_there_can_not_be_resumed(connection: Connection) -> None:
    with pytest.raises(ModelError, match="found no"):
        Student.resume(connection, "tinker://nothing/weights/here")


def test_a_trained_checkpoint_is_no_base_to_train(connection: Connection) -> None:
    from dataclasses import replace

    trained = replace(connection, model_path="tinker://run/sampler_weights/final")
    with pytest.raises(ModelError, match="expected a base model"):
        Student.create(trained, rank=8, seed=0)

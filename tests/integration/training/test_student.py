"""The student, against the real embedded server and a tiny random model."""

from collections.abc import Iterator

import numpy as np
import pytest
import tinker
from tinker.types import RequestErrorCategory

from distill_datasets.errors import ModelError, OutputError
from distill_datasets.models.connection import Connection
from distill_datasets.models.references import connect
from distill_datasets.models.sampler import Sampling
from distill_datasets.schema import Message
from distill_datasets.training.data import Example
from distill_datasets.training.student import (
    Learned,
    Student,
    Submitted,
    adam,
    datums,
    explained_training,
    supervised_batch,
)
from tests.support.training_runs import loss

EXAMPLES = [
    Example([5, 17, 40, 41, 42, 2], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]),
    Example([9, 60, 61, 2], [0.0, 0.0, 1.0, 1.0]),
]


@pytest.fixture(scope="module")
def connection(model: str) -> Iterator[Connection]:
    connection = connect(model)
    with connection.service:
        yield connection


@pytest.fixture
def student(connection: Connection) -> Student:
    return Student.create(connection, tinker.LoraConfig(rank=8, seed=3))


def submit(
    student: Student, examples: list[Example] = EXAMPLES, learning_rate: float = 1e-2
) -> Submitted[Learned]:
    return student.learn(supervised_batch(examples, "token"), adam(learning_rate))


def learn(student: Student, steps: int) -> list[float]:
    return [submit(student).result().loss for _ in range(steps)]


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
    assert loss(student, [EXAMPLES]) == pytest.approx(np.mean(losses), abs=1e-4)


def test_batches_of_any_size_give_one_loss(student: Student) -> None:
    whole = loss(student, [EXAMPLES])
    assert loss(student, [[one] for one in EXAMPLES]) == pytest.approx(whole, abs=1e-5)


def test_learning_lowers_the_loss_and_evaluating_changes_nothing(student: Student) -> None:
    first = submit(student).result()
    before = loss(student, [EXAMPLES])
    assert loss(student, [EXAMPLES]) == before < first.loss
    assert (first.response_tokens, first.tokens) == (5, 10)
    assert first.gradient_norm is not None and first.gradient_norm > 0


def test_the_loss_evaluated_is_after_the_steps_submitted_before_it(student: Student) -> None:
    steps = [submit(student) for _ in range(3)]
    evaluated = student.loss([EXAMPLES])
    later = submit(student).result().loss
    assert sum(row.nll for row in evaluated.result()) / 5 == pytest.approx(later, abs=1e-6)
    assert [step.result().loss for step in steps][-1] > later


def test_a_resumed_student_goes_on_to_the_very_same_losses(
    connection: Connection, student: Student
) -> None:
    learn(student, 2)
    saved = student.save("two", {"step": "2"}).result()
    assert learn(Student.resume(connection, saved.state), 3) == learn(student, 3)


def test_a_student_that_continues_has_the_weights_and_a_new_optimizer(
    connection: Connection, student: Student
) -> None:
    learn(student, 3)
    state = student.save("three").result().state
    resumed = learn(Student.resume(connection, state), 3)
    continued = learn(Student.continue_from(connection, state), 3)
    assert continued[0] == resumed[0]
    assert continued[2] != resumed[2]


def test_steps_submitted_behind_a_save_are_not_in_it(
    connection: Connection, student: Student
) -> None:
    """None of these waits for the server, whose order is all that keeps them apart."""
    steps = [submit(student)]
    saved = student.save("one", sampler=True)
    steps += [submit(student) for _ in range(5)]
    losses = [step.result().loss for step in steps]
    resumed = Student.resume(connection, saved.result().state)
    assert learn(resumed, 5) == losses[1:]


def test_a_gradient_is_clipped_and_weights_decay(connection: Connection) -> None:
    def losses(update: tinker.AdamParams) -> list[float]:
        student = Student.create(connection, tinker.LoraConfig(rank=8, seed=3))
        batch = supervised_batch(EXAMPLES, "token")
        return [student.learn(batch, update).result().loss for _ in range(3)]

    plain = losses(adam(1e-2))
    assert losses(adam(1e-2, grad_clip=1e-9)) != plain
    assert losses(adam(1e-2, weight_decay=5.0)) != plain


def test_a_full_disk_of_the_server_says_so() -> None:
    failed = tinker.RequestFailedError(
        "[Errno 28] No space left on device",
        request_id="1",
        category=RequestErrorCategory.Server,
    )
    with (
        pytest.raises(OutputError, match="disk is full.*run again"),
        explained_training("pocket", "it"),
    ):
        raise failed


def test_equal_seeds_learn_equally_and_others_do_not(connection: Connection) -> None:
    first, second, other = (
        learn(Student.create(connection, tinker.LoraConfig(rank=8, seed=seed)), 3)
        for seed in (1, 1, 2)
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
        submit(student, taught("en"), 2e-2).result()
    saved = student.save("en").result()
    for _ in range(20):
        submit(student, taught("de"), 2e-2).result()
    later = student.save("de").result()
    assert asyncio.run(_answer(student, saved.sampler)) == "en"
    assert asyncio.run(_answer(student, later.sampler)) == "de"


def test_weights_are_normalized_as_the_cookbook_does_per_example() -> None:
    """Pinned to the cookbook's own datums; only it sums over examples where we take the mean."""
    import torch
    from tinker_cookbook.supervised.common import datum_from_model_input_weights

    for example, datum in zip(EXAMPLES, datums(EXAMPLES, "example"), strict=True):
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
    weights = [datum.loss_fn_inputs["weights"].tolist() for datum in datums(EXAMPLES, "token")]
    assert weights == [pytest.approx([0, 0, 0.2, 0.2, 0.2]), pytest.approx([0, 0.2, 0.2])]


def test_what_is_not_there_can_not_be_resumed(connection: Connection) -> None:
    with pytest.raises(ModelError, match="found no"):
        Student.resume(connection, "tinker://nothing/weights/here")


def test_a_trained_checkpoint_is_no_base_to_train(connection: Connection) -> None:
    from dataclasses import replace

    trained = replace(connection, model_path="tinker://run/sampler_weights/final")
    with pytest.raises(ModelError, match="expected a base model"):
        Student.create(trained, tinker.LoraConfig(rank=8, seed=0))

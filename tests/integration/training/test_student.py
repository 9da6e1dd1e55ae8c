"""The student, and starting from another one, against the real embedded server and a tiny random
model.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from tinker.types import RequestErrorCategory

from distill_datasets.errors import DatasetError, ModelError, OutputError, SettingsError
from distill_datasets.models import references
from distill_datasets.models.references import connect
from distill_datasets.models.sampler import Sampling
from distill_datasets.models.tinker import Connection
from distill_datasets.schema import Message
from distill_datasets.training.data import Example, Rendered, locate, open_splits
from distill_datasets.training.student import (
    LEARNED,
    Learned,
    Student,
    Submitted,
    adam,
    choose_student,
    datums,
    explained_training,
    find_predecessor,
    response_logprobs,
    supervised_batch,
)
from distill_datasets.training.trainer import TrainingResult, train
from tests.support.server_log import trained_batches
from tests.support.shared_server import shared
from tests.support.training_runs import QUICK, ROWS, loss, metrics, write

EXAMPLES = [
    Example([5, 17, 40, 41, 42, 2], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]),
    Example([9, 60, 61, 2], [0.0, 0.0, 1.0, 1.0]),
]
pytestmark = pytest.mark.usefixtures("undrawn")
SETTINGS = replace(QUICK, epochs=1, evaluate_every=50, internalisation=False)


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
    batch = datums(EXAMPLES, "token")
    evaluated = student.logprobs([batch])
    later = submit(student).result().loss
    said = response_logprobs(EXAMPLES, evaluated.result())
    assert -sum(row.sum() for row in said) / 5 == pytest.approx(later, abs=1e-6)
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
    continued = learn(Student.resume(connection, state, optimizer=False), 3)
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


@pytest.fixture(scope="module")
def before(model: str, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """A student of five of the first twenty rows, validated with the last seven."""
    folder = tmp_path_factory.mktemp("before")
    dataset = write(folder / "dataset", train=ROWS[:20], validation=ROWS[29:])
    settings = replace(SETTINGS, max_rows=5, epochs=2)
    return train(dataset, student=model, out=folder / "out", settings=settings)


def read(dataset: Path, model: str) -> Rendered:
    return open_splits(locate(dataset), SETTINGS)["train"].render(references.connect(model), 512)


def test_it_begins_at_its_predecessors_loss_with_a_new_optimizer(
    before: TrainingResult, model: str, tmp_path: Path
) -> None:
    """It learns what the other was validated with, in one batch: the first loss is that one's."""
    dataset = write(tmp_path / "dataset", train=ROWS[29:])
    settings = replace(SETTINGS, epochs=2, schedule="constant")
    after = train(
        dataset, student=model, out=tmp_path / "out", settings=settings, start=before.path
    )
    losses = metrics(after)
    assert losses[1] == pytest.approx(before.best.validation_loss, abs=1e-5)
    (batch,) = read(dataset, model).batches(len(ROWS))
    found = []
    for optimizer in (False, True):
        student = Student.resume(references.connect(model), before.best.state, optimizer=optimizer)
        student.learn(supervised_batch(batch, "token"), adam(1e-2)).result()
        found.append(loss(student, [batch]))
    assert losses[2] == pytest.approx(found[0], abs=1e-5)
    assert losses[2] != pytest.approx(found[1], abs=1e-5)


def test_a_student_that_is_not_named_is_the_one_it_starts_from_or_the_teacher(
    before: TrainingResult, model: str, tmp_path: Path
) -> None:
    dataset = write(tmp_path / "dataset", train=ROWS[:4])
    one_step = replace(SETTINGS, max_steps=1)
    after = train(dataset, out=tmp_path / "out", settings=one_step, start=before.path)
    assert json.loads((after.path / "config.json").read_text())["student"] == model
    released = replace(locate(dataset), manifest={"teacher": "pocket"})
    assert choose_student(released) == "pocket"
    for source, start, said in (
        (released, "nowhere", "no student to start from"),
        (replace(released, manifest={"teacher": "openai:x"}), None, "Name the student"),
    ):
        with pytest.raises(ModelError, match=said):
            choose_student(source, start)


def test_only_new_trains_exactly_the_rows_that_nobody_learned(
    before: TrainingResult, model: str, tmp_path: Path
) -> None:
    """Of a row that `max_rows` left out nothing was learned: it is new."""
    learned = np.load(before.path / LEARNED)
    assert len(learned) == 5
    dataset = write(tmp_path / "dataset", train=ROWS[:29])
    after = train(
        dataset,
        student=model,
        out=tmp_path / "out",
        settings=replace(SETTINGS, batch_size=64),
        start=before.path,
        only_new=True,
    )
    keys = open_splits(locate(dataset), SETTINGS)["train"].keys
    new = [row for row, key in zip(ROWS, keys, strict=False) if key not in learned]
    assert after.rows == len(new) == 24
    # The server's own log: one batch of the same tokens as that of the new rows alone.
    alone = train(
        write(tmp_path / "alone", train=new),
        student=model,
        out=tmp_path / "by hand",
        settings=replace(SETTINGS, batch_size=64),
        start=before.path,
    )
    *known, batch = trained_batches(shared().store, after.best.state)
    assert known == trained_batches(shared().store, before.best.state)
    assert batch == trained_batches(shared().store, alone.best.state)[-1]
    assert set(np.load(after.path / LEARNED)) == set(keys)
    with pytest.raises(DatasetError, match="only rows that were learned before, 29 of them"):
        train(
            dataset,
            student=model,
            out=tmp_path / "more",
            settings=SETTINGS,
            start=after.path,
            only_new=True,
        )


def test_the_adapter_is_the_predecessors_whatever_the_settings_say(
    before: TrainingResult, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who asked for another is told."""
    found = find_predecessor(before.path, model)
    found.settled(SETTINGS)
    assert not capsys.readouterr().err
    settled = found.settled(replace(SETTINGS, rank=64))
    assert (settled.rank, settled.learning_rate) == (QUICK.rank, SETTINGS.learning_rate)
    assert f"rank is {QUICK.rank}, as the weights" in capsys.readouterr().err


def test_weights_are_brought_to_another_local_server_and_stay_where_they_are(
    before: TrainingResult, model: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(before.path, tmp_path / "before")
    run, kind, name = before.best.state.removeprefix("tinker://").replace(":", "_").split("/")
    shutil.copytree(shared().store / run, folder / "checkpoints" / run)
    found = find_predecessor(folder, model)
    (tmp_path / "store").mkdir()
    found.bring(tmp_path / "store")
    brought = tmp_path / "store" / run / kind / name
    assert sorted(path.name for path in brought.iterdir())
    for path in brought.iterdir():
        assert path.read_bytes() == (shared().store / run / kind / name / path.name).read_bytes()
    shutil.rmtree(folder / "checkpoints" / run)
    with pytest.raises(ModelError, match="Train that student again"):
        found.bring(tmp_path / "other")


def test_weights_of_another_base_are_refused(before: TrainingResult) -> None:
    with pytest.raises(ModelError, match="was trained from 'embedded:.*', not from 'pocket'"):
        find_predecessor(before.path, "pocket")


def test_what_is_no_student_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no student to start from: expected a training's folder"):
        find_predecessor(tmp_path, model)
    with pytest.raises(ModelError, match="is for sampling"):
        find_predecessor("tinker://run/sampler_weights/1", model)


def test_a_servers_state_does_as_well_but_nobody_knows_what_it_learned(
    before: TrainingResult, model: str
) -> None:
    found = find_predecessor(before.best.state, model)
    assert found.adapted == {"rank": QUICK.rank}
    with pytest.raises(DatasetError, match="Leave out --only-new"):
        _ = found.learned


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"only_new": True}, "only_new needs a student to start from"),
        ({"start": "out", "resume": "tinker://run/weights/one"}, "name one"),
    ],
)
def test_what_begins_a_training_is_one_thing(
    asked: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """Said before anything is looked for."""
    with pytest.raises(SettingsError, match=said):
        train(tmp_path / "nothing", out=tmp_path / "out", **asked)


def test_a_folder_without_the_learned_rows_is_refused_for_only_new(
    before: TrainingResult, model: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(before.path, tmp_path / "before")
    (folder / LEARNED).unlink()
    with pytest.raises(DatasetError, match=f"expected a training folder with {LEARNED}"):
        train(
            write(tmp_path / "dataset", train=ROWS[:9]),
            student=model,
            out=tmp_path / "out",
            settings=SETTINGS,
            start=folder,
            only_new=True,
        )
    assert not (tmp_path / "out/config.json").exists()


def test_the_configuration_says_where_it_began(
    before: TrainingResult, model: str, tmp_path: Path
) -> None:
    dataset = write(tmp_path / "dataset", train=ROWS[:9])
    settings = replace(SETTINGS, max_steps=1)
    train(dataset, student=model, out=tmp_path / "out", settings=settings, start=before.path)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["start"] == {"path": before.best.state, "only_new": False}
    with pytest.raises(OutputError, match=r"start.path is 'tinker://.*' there, None now"):
        train(dataset, student=model, out=tmp_path / "out", settings=settings)

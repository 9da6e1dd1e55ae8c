"""Checkpoints on the server: which stay, what they say, and how a training goes on from them."""

import asyncio
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tinker_cookbook.tokenizer_utils import register_tokenizer

from distill_datasets.errors import ModelError, OutputError, SettingsError
from distill_datasets.models import references
from distill_datasets.models.sampler import Sampling
from distill_datasets.models.tinker import TinkerSampler
from distill_datasets.training.checkpoints import CheckpointRetention, TrainingFolder
from distill_datasets.training.student import require_stated
from distill_datasets.training.trainer import TrainingResult, TrainSettings, train
from tests.support.server_log import trained_batches
from tests.support.shared_server import shared
from tests.support.training_runs import QUICK, ROWS, at_step, metrics, write

pytestmark = pytest.mark.usefixtures("undrawn")

LONGER = replace(QUICK, epochs=5, evaluate_every=4, save_every=8, rolling_every=3, ttl_seconds=7200)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 rows: 29 to train on, in batches of 8, 8, 8 and 5; 7 to validate with."""
    return write(tmp_path_factory.mktemp("dataset"), train=ROWS[:29], validation=ROWS[29:])


@pytest.fixture(scope="module")
def whole(dataset: Path, model: str, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """20 steps that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole")
    return train(dataset, student=model, out=out, settings=LONGER)


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupted_run(
    dataset: Path, model: str, out: Path, settings: TrainSettings, step: int
) -> TrainingFolder:
    with pytest.MonkeyPatch.context() as patch:
        at_step(step, interrupt, patch)
        with pytest.raises(KeyboardInterrupt):
            train(dataset, student=model, out=out, settings=settings)
    return TrainingFolder(out)


@pytest.fixture(scope="module")
def begun(dataset: Path, model: str, tmp_path_factory: pytest.TempPathFactory) -> TrainingFolder:
    """As `whole`, interrupted in its 14th step; for tests that go on in folders of their own."""
    return interrupted_run(dataset, model, tmp_path_factory.mktemp("begun"), LONGER, 14)


def on_the_server(model: str, training: Path) -> dict[str, Any]:
    """The checkpoints of a training's runs, by path."""
    checkpoints = TrainingFolder(training).checkpoints
    runs = {one.state.removeprefix("tinker://").split("/")[0] for one in checkpoints}
    rest = references.connect(model).rest
    return {
        one.tinker_path: one
        for run in runs
        for one in rest.list_checkpoints(run).result().checkpoints
    }


def answer(model: str, training: TrainingResult) -> list[str]:
    connection = replace(references.connect(model), model_path=training.final.sampler)

    async def ask() -> list[str]:
        sampler = TinkerSampler(connection)
        sampling = Sampling(temperature=0, max_tokens=4)
        asked = [[{"role": "user", "content": row["query"]}] for row in ROWS[29:]]
        replies = await asyncio.gather(*(sampler.sample(a, sampling) for a in asked))  # type: ignore[arg-type]
        return [reply.samples[0].text for reply in replies]

    return asyncio.run(ask())


def test_the_server_keeps_the_best_the_final_and_the_periodic_ones(
    whole: TrainingResult, model: str
) -> None:
    kept = TrainingFolder(whole.path).checkpoints
    assert {8, 16, 20} <= {one.step for one in kept} <= {8, 16, 20, whole.best.step}
    found = on_the_server(model, whole.path)
    assert set(found) == {path for one in kept for path in (one.state, one.sampler) if path}
    for checkpoint in kept:
        expires = found[checkpoint.state].expires_at
        assert (expires is None) == (checkpoint.final or checkpoint == whole.best)


def test_on_this_machine_nothing_expires_unasked(model: str) -> None:
    local = references.connect(model)
    assert CheckpointRetention(local, None).ttl is None
    assert CheckpointRetention(replace(local, server=None), None).ttl == 7 * 24 * 3600
    assert CheckpointRetention(replace(local, server=None), 0).ttl is None


def test_a_checkpoint_says_where_it_comes_from(whole: TrainingResult, model: str) -> None:
    config = json.loads((whole.path / "config.json").read_text())
    found = on_the_server(model, whole.path)
    for path in (whole.final.state, whole.final.sampler):
        said = found[path].user_metadata
        assert said["step"] == "20"
        assert said["dataset_revision"] == config["dataset"]["revision"]
        assert said["renderer_name"] == "distill_datasets/chat_template"
        assert len(said["config_digest"]) == 32
        assert said["made_by"].startswith("distill_datasets ")
        assert json.loads(said["settings"])["save_every"] == 8


def test_a_training_goes_on_from_the_server_alone(
    whole: TrainingResult, begun: TrainingFolder, dataset: Path, model: str, tmp_path: Path
) -> None:
    state = begun.checkpoints[-1]
    assert 9 <= state.step <= 13
    resumed = train(
        dataset, student=model, out=tmp_path / "new", settings=LONGER, resume=state.state
    )
    expected = {step: loss for step, loss in metrics(whole).items() if step > state.step}
    assert metrics(resumed) == expected
    assert (resumed.best.step, resumed.why) == (whole.best.step, whole.why)
    assert resumed.final.scores == whole.final.scores
    assert answer(model, resumed) == answer(model, whole)
    again = train(dataset, student=model, out=tmp_path / "new", settings=LONGER, resume=state.state)
    assert again == resumed


def test_a_resumed_training_must_be_the_same(
    begun: TrainingFolder, dataset: Path, model: str, tmp_path: Path
) -> None:
    state = begun.checkpoints[-1].state

    def resume(path: str = state, settings: TrainSettings = LONGER, data: Path = dataset) -> None:
        train(data, student=model, out=tmp_path / "new", settings=settings, resume=path)

    with pytest.raises(ModelError, match=r"settings is .*there, .*\"seed\":1"):
        resume(settings=replace(LONGER, seed=1))
    other = write(tmp_path / "other", train=ROWS[:28], validation=ROWS[29:])
    with pytest.raises(ModelError, match="dataset_revision is"):
        resume(data=other)
    with pytest.raises(ModelError, match="is for sampling and has no optimizer"):
        resume(state.replace("/weights/", "/sampler_weights/"))
    with pytest.raises(ModelError, match="names no checkpoint"):
        resume("tinker://somewhere")
    with pytest.raises(ModelError, match="is not on the server"):
        resume(state.rsplit("/", 1)[0] + "/nothing")
    assert not (tmp_path / "new" / "config.json").exists()


def test_a_hosted_student_is_trained_checked_and_resumed_all_the_same(
    dataset: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same server, as one that somebody else runs and that is known by its address only; who
    resumes need not name the student again.
    """
    server = shared().server
    monkeypatch.setenv("TINKER_BASE_URL", server.url)
    monkeypatch.setenv("TINKER_API_KEY", server.api_key)
    register_tokenizer(server.model, lambda: references.connect(model).tokenizer)
    student = f"tinker:{server.model}"
    settings = replace(LONGER, renderer="distill_datasets/chat_template", max_steps=9)
    with pytest.raises(SettingsError, match="max_length must be at most 512"):
        train(
            dataset, student=student, out=tmp_path / "a", settings=replace(settings, max_length=513)
        )
    begun = interrupted_run(dataset, student, tmp_path / "lost", settings, 8)
    state = begun.checkpoints[-1].state
    trained = train(dataset, out=tmp_path / "new", settings=settings, resume=state)
    assert trained.steps == 9 and trained.why == "all 9 steps done"


def test_a_finished_training_has_nothing_to_resume(
    dataset: Path, model: str, tmp_path: Path
) -> None:
    few = replace(QUICK, max_steps=1)
    done = train(dataset, student=model, out=tmp_path / "out", settings=few)
    with pytest.raises(ModelError, match="of step 1 of 1: nothing is left"):
        train(dataset, student=model, out=tmp_path / "new", settings=few, resume=done.final.state)


def test_a_path_to_a_checkpoint_is_no_student(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a base model.*--resume"):
        train(dataset, student="tinker://run/sampler_weights/final", out=tmp_path / "out")


@pytest.fixture
def contrary(tmp_path: Path) -> Path:
    """All validation rows contradict the training rows: it gets worse after a while."""
    wrong = [{**row, "response": "de"} for row in ROWS[29:]]
    right = [{**row, "response": "en"} for row in ROWS[:29]]
    return write(tmp_path / "contrary", train=right, validation=wrong)


STOPPING = replace(QUICK, epochs=8, schedule="constant", evaluate_every=2, patience=2)


def test_training_stops_when_it_gets_no_better_also_after_an_interruption(
    contrary: Path, model: str, tmp_path: Path
) -> None:
    whole = train(contrary, student=model, out=tmp_path / "whole", settings=STOPPING)
    assert whole.steps < 32
    assert whole.why == f"no improvement in 2 validations (best at step {whole.best.step})"
    assert whole.verdict.startswith(f"step {whole.best.step} won (validation_loss ")
    assert whole.best.step == whole.steps - 4
    assert set(on_the_server(model, whole.path)) >= {whole.best.sampler, whole.final.sampler}
    out = tmp_path / "out"
    assert interrupted_run(contrary, model, out, STOPPING, whole.steps - 1).checkpoints
    continued = train(contrary, student=model, out=out, settings=STOPPING)
    assert metrics(continued) == metrics(whole)
    assert (continued.why, continued.best.step) == (whole.why, whole.best.step)


def test_the_best_checkpoint_can_be_the_most_accurate_one(
    dataset: Path, model: str, tmp_path: Path
) -> None:
    settings = replace(QUICK, epochs=6, evaluate_every=6, select="accuracy")
    training = train(dataset, student=model, out=tmp_path / "out", settings=settings)
    measured = metrics(training, "accuracy")
    assert training.best.scores["accuracy"] == max(measured.values())
    right = [row["response"] for row in ROWS[29:]]
    found = answer(model, training)
    share = sum(a == b for a, b in zip(found, right, strict=True)) / len(right)
    assert measured[24] == share


def test_what_is_never_measured_can_not_be_selected_by(
    dataset: Path, model: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="select must be one of .*found 'charm'"):
        train(dataset, student=model, out=tmp_path / "out", settings=replace(QUICK, select="charm"))
    alone = write(tmp_path / "alone", train=ROWS[:8])
    with pytest.raises(SettingsError, match="need validation rows"):
        train(alone, student=model, out=tmp_path / "new", settings=replace(QUICK, patience=2))


def test_each_batch_is_trained_once_in_the_surviving_weights(
    whole: TrainingResult, dataset: Path, model: str, tmp_path: Path
) -> None:
    """By the server's log: from the final weights back through the states they came from."""
    out = tmp_path / "out"
    interrupted_run(dataset, model, out, LONGER, 8)
    interrupted_run(dataset, model, out, LONGER, 5)
    training = train(dataset, student=model, out=out, settings=LONGER)
    assert metrics(training) == metrics(whole)
    expected = trained_batches(shared().store, whole.final.state)
    assert trained_batches(shared().store, training.final.state) == expected
    assert len(expected) == 20


def test_a_full_disk_loses_nothing_that_was_trained(
    whole: TrainingResult,
    dataset: Path,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"

    def fill() -> None:
        (out / "metrics.jsonl").rename(out / "aside")
        (out / "metrics.jsonl").symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        at_step(11, fill, patch)
        with pytest.raises(OutputError, match="No space left.*run again: it continues"):
            train(dataset, student=model, out=out, settings=LONGER)
    (out / "aside").rename(out / "metrics.jsonl")
    assert metrics(train(dataset, student=model, out=out, settings=LONGER)) == metrics(whole)


def test_what_a_server_can_not_train_is_refused_before_anything_is_created(
    dataset: Path, model: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"rank must be at most \d+"):
        train(dataset, student=model, out=tmp_path / "a", settings=replace(QUICK, rank=100_000))
    with pytest.raises(SettingsError, match="max_length must be at most 512, the context"):
        train(dataset, student=model, out=tmp_path / "b", settings=replace(QUICK, max_length=513))
    for name in ("a", "b"):
        assert not (tmp_path / name / "config.json").exists()


def test_a_loss_that_a_server_lacks_is_named(model: str) -> None:
    found = {"max_context_length": 512, "loss_fns": ["ppo"]}
    with pytest.raises(ModelError, match=r"'sft' needs the loss 'cross_entropy'.*has \['ppo'\]"):
        require_stated(found, references.connect(model), QUICK)


def test_every_line_of_the_log_says_what_a_step_took(
    dataset: Path, model: str, tmp_path: Path
) -> None:
    import math

    settings = replace(QUICK, max_steps=2, price_per_million=2.0)
    training = train(dataset, student=model, out=tmp_path / "out", settings=settings)
    lines = [json.loads(line) for line in (training.path / "metrics.jsonl").open()]
    first, second = (line for line in lines if "loss" in line)
    measured = [line for line in lines if "validation_loss" in line][-1]
    assert second["spent"] == pytest.approx((first["tokens"] + second["tokens"]) * 2e-6, abs=1e-6)
    assert second["gradient_norm"] > 0 and second["learning_rate"] > 0
    assert second["nll"] == second["loss"]
    # Two letters and the end of the turn: three tokens at most, two bytes.
    bits = second["nll"] * second["response_tokens"] / math.log(2) / (8 * 2)
    assert second["bits_per_byte"] == pytest.approx(bits)
    assert measured["validation_bits_per_byte"] > 0


def test_a_folder_can_be_opened_by_many_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(TrainingFolder, [tmp_path / "out"] * 400))
    assert len(folders) == 400 and not list((tmp_path / "out").iterdir())


def lose(state: str) -> None:
    run, kind, name = state.removeprefix("tinker://").split("/")
    shutil.rmtree(shared().store / run.replace(":", "_") / kind / name)


def damage(state: str) -> None:
    run, kind, name = state.removeprefix("tinker://").split("/")
    folder = shared().store / run.replace(":", "_") / kind / name
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 100)


@pytest.mark.parametrize("happens", [lose, damage])
def test_without_its_newest_checkpoint_a_training_goes_back_to_the_one_before(
    happens: Callable[[str], None],
    whole: TrainingResult,
    dataset: Path,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    *_, before, newest = interrupted_run(dataset, model, out, LONGER, 14).checkpoints
    happens(newest.state)
    assert metrics(train(dataset, student=model, out=out, settings=LONGER)) == metrics(whole)
    said = capsys.readouterr().err
    assert f"the checkpoint of step {newest.step} can't be loaded" in said
    assert f"goes back to step {before.step}" in said


def test_without_any_checkpoint_it_begins_again(
    whole: TrainingResult, dataset: Path, model: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for checkpoint in interrupted_run(dataset, model, out, LONGER, 10).checkpoints:
        lose(checkpoint.state)
    assert metrics(train(dataset, student=model, out=out, settings=LONGER)) == metrics(whole)


def test_a_damaged_line_of_a_checkpoint_is_left_out(
    whole: TrainingResult,
    dataset: Path,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    interrupted_run(dataset, model, out, LONGER, 14)
    file = out / "checkpoints.jsonl"
    *lines, _ = file.read_text().splitlines()
    for damaged in ('{"name": "st', "\0\0\0", "[]", "{}"):
        file.write_text("\n".join([*lines, damaged]) + "\n")
        assert TrainingFolder(out).checkpoints[-1].step == json.loads(lines[-1])["step"]
    assert metrics(train(dataset, student=model, out=out, settings=LONGER)) == metrics(whole)
    assert f"line {len(lines) + 1} is damaged: left out" in capsys.readouterr().err


def test_a_training_folder_answers_in_spite_of_a_damaged_line_and_says_what_else_is_damaged(
    whole: TrainingResult, model: str, tmp_path: Path
) -> None:
    for name in ("config.json", "checkpoints.jsonl"):
        shutil.copy(whole.path / name, tmp_path)
    with (tmp_path / "checkpoints.jsonl").open("a") as file:
        file.write('\0\0\0\n{"best": true}\n{"name": "st')
    assert references.connect(tmp_path).model_path == whole.best.sampler
    (tmp_path / "config.json").write_text("")
    with pytest.raises(ModelError, match="config.json' is not a training's, or damaged: .*another"):
        references.connect(tmp_path)
    # As `train` says too, which writes over nothing that it can't read.
    with pytest.raises(OutputError, match="Choose another --out"):
        _ = TrainingFolder(tmp_path).config

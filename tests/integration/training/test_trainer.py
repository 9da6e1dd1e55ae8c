"""TrainingResult, against the real embedded server and a tiny random model."""

import asyncio
import json
import math
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from distill_datasets.errors import (
    DatasetError,
    DistillError,
    HubError,
    ModelError,
    OutputError,
    ServiceError,
)
from distill_datasets.files import one_writer
from distill_datasets.models import references
from distill_datasets.models import tinker as sdk
from distill_datasets.training import student as students
from distill_datasets.training.checkpoints import TrainingFolder, next_folder
from distill_datasets.training.data import Rendered, locate, open_splits
from distill_datasets.training.schedule import plan_steps
from distill_datasets.training.trainer import TrainingResult, TrainSettings, require_settings, train
from tests.support.forks import Process
from tests.support.server_log import trained_batches
from tests.support.shared_server import shared
from tests.support.soft_releases import release
from tests.support.training_runs import QUICK, ROWS, Rows, at_step, metrics, write

# As it is before `model` has every connection served by the tests' own.
_START_SERVER = references._server


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """36 rows: 29 to train on, in batches of 8, 8, 8 and 5; 7 to validate with."""
    return write(tmp_path / "dataset", train=ROWS[:29], validation=ROWS[29:])


def tokens_of(path: Path, model: str, split: str = "train") -> list[list[int]]:
    return [tokens for (tokens,) in rendered(path, model, split).rows["tokens"]]


def rendered(path: Path, model: str, split: str = "train") -> Rendered:
    return open_splits(locate(path), QUICK)[split].render(references.connect(model), 512)


def test_the_loss_falls_and_every_file_is_written(
    dataset: Path, model: str, tmp_path: Path
) -> None:
    training = train(dataset, student=model, out=tmp_path / "out", settings=QUICK)
    losses = metrics(training)
    assert list(losses) == list(range(1, 13)) and training.steps == 12
    assert losses[12] < losses[1] / 2
    assert training.final_loss == metrics(training, "validation_loss")[12]
    assert (training.rows, training.skipped) == (29, 0)
    files = {path.name for path in training.path.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints.jsonl", "loss.png"} <= files
    config = json.loads((training.path / "config.json").read_text())
    assert config["student"] == model and config["learning_rate"] == 1e-2
    assert config["renderer"] == "distill_datasets/chat_template"
    assert config["dataset"]["rows"] == {"train": 29, "validation": 7}
    assert config["dataset"]["revision"] == locate(dataset).revision


def test_every_row_is_trained_once_an_epoch_and_the_last_batch_is_kept(
    dataset: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    learn = students.Student.learn

    def watched(student: Any, batch: Any, update: Any) -> Any:
        for datum in batch.datums:
            last = datum.loss_fn_inputs["target_tokens"].tolist()[-1]
            seen.append([*datum.model_input.to_ints(), last])
        return learn(student, batch, update)

    monkeypatch.setattr(students.Student, "learn", watched)
    training = train(dataset, student=model, out=tmp_path / "out", settings=QUICK)
    once = sorted(tokens_of(dataset, model))
    assert [sorted(seen[:29]), sorted(seen[29:58]), sorted(seen[58:])] == [once] * 3
    assert seen[:29] != seen[29:58]
    assert training.tokens == 3 * sum(map(len, once))


def test_only_the_response_is_learned(dataset: Path, model: str) -> None:
    split = rendered(dataset, model)
    tokenizer = references.connect(model).tokenizer
    for example, row in zip(split.examples(range(len(split))), ROWS, strict=False):
        learned = [t for t, w in zip(example.tokens, example.weights, strict=True) if w]
        assert tokenizer.decode(learned) == f"{row['response']}<|im_end|>"
        assert set(example.weights) == {0.0, 1.0}


def forms(row: dict[str, str]) -> dict[str, dict[str, Any]]:
    asked = {"role": "user", "content": row["query"]}
    answered = {"role": "assistant", "content": row["response"]}
    nothing = {"name": None, "tool_calls": None}
    return {
        "query": row,
        "messages": {"messages": [asked, answered], "id": "1"},
        "absent": {"messages": [{**asked, **nothing}, {**answered, **nothing}]},
        "text": {"prompt": row["query"], "completion": row["response"]},
        "turns": {"prompt": [asked], "completion": [answered]},
    }


@pytest.mark.parametrize("form", list(forms(ROWS[0])))
def test_every_supported_form_gives_the_same_tokens(form: str, model: str, tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", train=ROWS[:5])
    other = write(tmp_path / "other", train=[forms(row)[form] for row in ROWS[:5]])
    assert tokens_of(other, model) == tokens_of(plain, model)


def test_every_kind_of_place_gives_the_same_tokens(model: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", train=ROWS[:5])
    rows = datasets.Dataset.from_list(ROWS[:5])
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "saved"))
    rows.save_to_disk(str(tmp_path / "one"))
    expected = tokens_of(folder, model)
    for name in ("folder/train.jsonl", "rows.parquet", "saved", "one"):
        before = locate(tmp_path / name).revision
        assert tokens_of(tmp_path / name, model) == expected
        assert locate(tmp_path / name).revision == before


def test_fewer_rows_than_a_batch_are_trained(model: str, tmp_path: Path) -> None:
    path = write(tmp_path / "few", train=ROWS[:3])
    training = train(path, student=model, out=tmp_path / "out", settings=QUICK)
    assert training.steps == 3 and training.best.step == 3
    assert training.final_loss == metrics(training)[3] < metrics(training)[1]


def test_a_finished_training_is_not_run_again(
    dataset: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(dataset, student=model, out=tmp_path / "out", settings=QUICK)
    before = {path: path.stat().st_mtime_ns for path in first.path.glob("*.*")}
    monkeypatch.setattr(references, "connect", None)
    assert train(dataset, student=model, out=tmp_path / "out", settings=QUICK) == first
    assert {path: path.stat().st_mtime_ns for path in first.path.glob("*.*")} == before


def test_other_settings_or_another_dataset_are_refused(
    dataset: Path, model: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    few = TrainSettings(max_steps=1, batch_size=8, rank=4)
    train(dataset, student=model, out=out, settings=few)
    with pytest.raises(OutputError, match="settings.seed is 0 there, 1 now"):
        train(
            dataset,
            student=model,
            out=out,
            settings=TrainSettings(max_steps=1, batch_size=8, rank=4, seed=1),
        )
    write(dataset, train=ROWS[:28])
    with pytest.raises(OutputError, match="dataset.files is"):
        train(dataset, student=model, out=out, settings=few)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_interrupted_training_continues_to_the_same_losses(
    dataset: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(dataset, student=model, out=tmp_path / "whole", settings=QUICK)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        at_step(8, interrupt, patch)
        with pytest.raises(KeyboardInterrupt) as interrupted:
            train(dataset, student=model, out=out, settings=QUICK)
    assert "it goes on after step 6" in interrupted.value.__notes__[0]
    assert TrainingFolder(out).checkpoints[-1].step == 6
    (out / "metrics.jsonl").open("a").write('{"step": 8, "lo')
    (out / "checkpoints.jsonl").open("a").write('{"name": "st')
    continued = train(dataset, student=model, out=out, settings=QUICK)
    assert metrics(continued) == metrics(whole)
    assert metrics(continued, "validation_loss") == metrics(whole, "validation_loss")


@pytest.mark.slow
def test_a_killed_training_and_a_killed_server_change_no_loss(
    dataset: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First a process and its own server end by SIGKILL, then the server of the next one."""
    settings = (
        "TrainSettings(epochs=10, batch_size=8, rank=4, learning_rate=1e-2, evaluate_every=9, "
        "rolling_every=3)"
    )
    out = tmp_path / "out"
    code = (
        "from distill_datasets.training.trainer import TrainSettings, train\n"
        f"train({str(dataset)!r}, student={model!r}, out={str(out)!r}, settings={settings})"
    )
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "child")}
    child = Process([sys.executable, "-c", code], env=environment, text=True)
    whole = train(dataset, student=model, out=tmp_path / "whole", settings=eval(settings))
    deadline = time.monotonic() + 100
    while len(TrainingFolder(out).metrics) < 8 and child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    killed_at = TrainingFolder(out).checkpoints[-1].step
    assert 0 < killed_at < 30
    monkeypatch.setattr(references, "_server", _START_SERVER)
    with monkeypatch.context() as patch:
        patch.setattr(sdk, "GLANCE", 0.1)
        at_step(8, kill_own_server, patch)
        with pytest.raises(ServiceError, match="run it again to continue"):
            train(dataset, student=model, out=out, settings=eval(settings))
    assert killed_at < TrainingFolder(out).checkpoints[-1].step < 40
    continued = train(dataset, student=model, out=out, settings=eval(settings))
    assert metrics(continued) == metrics(whole)
    assert continued.final.scores == whole.final.scores
    mine = trained_batches(out / "checkpoints", continued.final.state)
    assert mine == trained_batches(shared().store, whole.final.state) and len(mine) == 40
    references._SERVERS.popitem()[1].close()


def kill_own_server() -> None:
    (server,) = references._SERVERS.values()
    os.kill(server.pid, signal.SIGKILL)


def test_the_best_checkpoint_has_the_lowest_validation_loss(model: str, tmp_path: Path) -> None:
    """All validation rows contradict the training rows: it gets worse after a while."""
    wrong = [{**row, "response": "de"} for row in ROWS[29:]]
    right = [{**row, "response": "en"} for row in ROWS[:29]]
    path = write(tmp_path / "dataset", train=right, validation=wrong)
    settings = TrainSettings(
        epochs=3, batch_size=8, rank=4, learning_rate=1e-2, schedule="constant", evaluate_every=2
    )
    settings = replace(settings, save_every=3)  # what is kept and not measured is never the best
    training = train(path, student=model, out=tmp_path / "out", settings=settings)
    saved = TrainingFolder(training.path).checkpoints
    assert training.best == min(saved, key=lambda one: one.validation_loss or math.inf)
    assert sum(one.validation_loss is None for one in saved) == 2
    assert not training.best.final and saved[-1].final
    trained = references.connect(training.path)
    assert trained.model_path == training.best.sampler
    assert trained.renderer_name == "distill_datasets/chat_template"


def test_rows_too_long_are_left_out_and_counted(model: str, tmp_path: Path) -> None:
    long = {"query": "blau " * 300, "response": "de"}
    path = write(tmp_path / "dataset", train=[long, *ROWS[:4], long], validation=ROWS[4:6])
    few = TrainSettings(epochs=1, rank=4, max_length=100)
    training = train(path, student=model, out=tmp_path / "out", settings=few)
    assert (training.rows, training.skipped) == (4, 2)
    with pytest.raises(DatasetError, match="no row of at most 3 tokens: the shortest of 6 has"):
        train(path, student=model, out=tmp_path / "no", settings=TrainSettings(max_length=3))


REFUSED: dict[str, tuple[dict[str, Rows], str]] = {
    "columns": ({"train": [{"text": "x"}]}, r"expected a column 'messages'.*found \['text'\]"),
    "no split": ({"test": ROWS[:2]}, r"no split 'train'; found \['test'\]"),
    "no answer": ({"train": [ROWS[0], {"query": "x", "response": ""}]}, "row 1: expected"),
    "no turn": ({"train": [{"messages": [{"role": "user", "content": "x"}]}]}, "row 0: expected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_dataset_is_refused_with_what_was_found(
    case: str, model: str, tmp_path: Path
) -> None:
    splits, message = REFUSED[case]
    path = write(tmp_path / "dataset", **splits)
    with pytest.raises(DatasetError, match=message):
        train(path, student=model, out=tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "saved"])
def test_an_empty_split_is_refused(kind: str, model: str, tmp_path: Path) -> None:
    path = tmp_path / "dataset"
    path.mkdir()
    empty = datasets.Dataset.from_list(ROWS).select([])
    if kind == "parquet":
        empty.to_parquet(str(path / "train.parquet"))
    elif kind == "jsonl":
        write(path, train=[], validation=ROWS[:2])
    else:
        datasets.DatasetDict({"train": empty}).save_to_disk(str(path))
    with pytest.raises(DatasetError, match="empty"):
        train(path, student=model, out=tmp_path / "out")


def test_what_is_nowhere_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is not there"):
        train(tmp_path / "nothing", student=model, out=tmp_path / "out")
    with pytest.raises(HubError, match="is not on this machine and the Hub can't be reached"):
        train("org/nothing@v1.0.0", student=model, out=tmp_path / "out")


def test_a_folder_that_can_not_be_written_is_refused(
    dataset: Path, model: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Choose another --out"):
        train(dataset, student=model, out=tmp_path / "file")
    with pytest.raises(OutputError, match="inside the dataset"):
        train(dataset, student=model, out=dataset / "student")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(OutputError, match="holds something else"):
        train(dataset, student=model, out=tmp_path / "model")


def test_two_trainings_never_share_a_folder(dataset: Path, model: str, tmp_path: Path) -> None:
    with (
        one_writer(TrainingFolder(tmp_path / "out").path, "training"),
        pytest.raises(OutputError, match="Another process"),
    ):
        train(dataset, student=model, out=tmp_path / "out")


def test_a_trained_student_is_refused(dataset: Path, model: str, tmp_path: Path) -> None:
    few = TrainSettings(max_steps=1, batch_size=8, rank=4)
    trained = train(dataset, student=model, out=tmp_path / "out", settings=few)
    with pytest.raises(ModelError, match="expected a base model"):
        train(dataset, student=str(trained.path), out=tmp_path / "again", settings=few)


def test_it_runs_inside_a_running_event_loop(
    dataset: Path, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def cell() -> TrainingResult:
        return train(
            dataset,
            student=model,
            out=tmp_path / "out",
            settings=TrainSettings(max_steps=2, batch_size=8, rank=4),
        )

    assert asyncio.run(cell()).steps == 2
    assert "async context" not in caplog.text


def released(folder: Path, model: str, **facts: Any) -> tuple[Path, dict[str, Any]]:
    """A release whose manifest says something more."""
    path = release(folder, model)
    manifest = json.loads((path / "manifest.json").read_text()) | facts
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path, manifest


def test_a_releases_renderer_and_version_are_kept(model: str, tmp_path: Path) -> None:
    path, manifest = released(tmp_path / "run", model, teacher=model, renderer="qwen3")
    few = TrainSettings(max_steps=1, batch_size=8, rank=4, internalisation=False)
    train(path, student=model, out=tmp_path / "out", settings=few)
    config = TrainingFolder(tmp_path / "out").config
    assert config is not None and config["renderer"] == "qwen3"
    assert config["dataset"]["revision"] == f"{manifest['version']}/{manifest['content_digest']}"


def test_what_a_release_warns_of_is_said_once(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = released(tmp_path / "run", model, warnings=["Rows 3\x1b[2J and 4."])
    few = TrainSettings(max_steps=1, batch_size=8, rank=4, internalisation=False)
    for _ in range(2):
        train(path, student=model, out=tmp_path / "out", settings=few)
    assert capsys.readouterr().err.count("warns: Rows 3 [2J and 4.") == 1


@pytest.mark.parametrize(
    ("student", "wrong", "message"),
    [
        ("openai:gpt", {}, "can't be trained"),
        ("tinker://run/weights/x", {}, "already trained"),
        (None, {"rank": 100_000}, "rank must be at most"),
        (None, {"max_length": 513}, "max_length must be at most 512"),
        (None, {"validation_split": "dev", "patience": 2}, "no split 'dev'"),
    ],
)
def test_a_student_is_checked_before_its_dataset_is_there(
    student: str | None, wrong: dict[str, Any], message: str, model: str
) -> None:
    require_settings(model, TrainSettings(patience=2), splits=("train", "validation"))
    with pytest.raises(DistillError, match=message):
        require_settings(student or model, TrainSettings(**wrong), splits=("train", "validation"))


def test_the_next_folder_is_the_first_that_is_not_there(tmp_path: Path) -> None:
    assert next_folder(tmp_path / "run") == tmp_path / "run-2"
    (tmp_path / "run-2").mkdir()
    (tmp_path / "run-3").touch()
    assert next_folder(tmp_path / "run") == tmp_path / "run-4"


def test_the_order_depends_on_the_seed_alone() -> None:
    def order(seed: int) -> list[Any]:
        settings = TrainSettings(epochs=2, seed=seed, batch_size=4)
        return [step.places for step in plan_steps([1] * 10, settings, 1.0)]

    assert order(0) == order(0) != order(1)
    assert [len(places) for places in order(0)] == [4, 4, 2, 4, 4, 2]


@pytest.mark.parametrize(("rows", "steps"), [(12, 60), (320, 60), (1550, 98)])
def test_few_rows_are_passed_over_until_there_are_sixty_steps(rows: int, steps: int) -> None:
    assert len(plan_steps([1] * rows, TrainSettings(), 1.0)) == steps


def test_the_learning_rate_rises_then_falls() -> None:
    settings = TrainSettings(epochs=4, batch_size=1, warmup_steps=1)
    rates = [step.learning_rate for step in plan_steps([1], settings, 1.0)]
    assert rates == pytest.approx([0.5, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"learning_rate": -1.0}, {"schedule": "up"}, {"warmup_steps": -1}]
)
def test_settings_that_can_not_train_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DistillError, match=next(iter(wrong))):
        TrainSettings(**wrong)

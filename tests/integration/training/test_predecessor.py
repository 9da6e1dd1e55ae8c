"""Starting from another student, against the real embedded server and a tiny random model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill_datasets.errors import DatasetError, ModelError, OutputError, SettingsError
from distill_datasets.models import references
from distill_datasets.training.checkpoints import LEARNED, choose_student, find_predecessor
from distill_datasets.training.data import Rendered, locate, open_splits
from distill_datasets.training.student import Student, adam, supervised_batch
from distill_datasets.training.trainer import TrainingResult, train
from tests.support.server_log import trained_batches
from tests.support.shared_server import shared
from tests.support.training_runs import QUICK, ROWS, loss, metrics, write

pytestmark = pytest.mark.usefixtures("undrawn")

SETTINGS = replace(QUICK, epochs=1, evaluate_every=50, internalisation=False)


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
    found = {}
    for opening in (Student.continue_from, Student.resume):
        student = opening(references.connect(model), before.best.state)
        student.learn(supervised_batch(batch, "token"), adam(1e-2)).result()
        found[opening.__name__] = loss(student, [batch])
    assert losses[2] == pytest.approx(found["continue_from"], abs=1e-5)
    assert losses[2] != pytest.approx(found["resume"], abs=1e-5)


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

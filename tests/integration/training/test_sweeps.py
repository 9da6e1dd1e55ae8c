"""A grid of trainings, against the real embedded server and a tiny random model."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.errors import DatasetError, ModelError, OutputError, SettingsError
from distill_datasets.files import one_writer
from distill_datasets.models import references
from distill_datasets.training import validation
from distill_datasets.training.sweeps import Sweep, SweepTrial, sweep
from tests.support.soft_releases import release
from tests.support.training_runs import QUICK, ROWS, write

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write(tmp_path / "dataset", train=ROWS[:29], validation=ROWS[29:])


def swept(dataset: Path, model: str, out: Path, **grid: Any) -> Sweep:
    return sweep(dataset, student=model, out=out, grid=grid, settings=replace(QUICK, epochs=1))


def test_every_combination_is_trained_and_the_best_is_marked(
    dataset: Path, model: str, tmp_path: Path
) -> None:
    made = swept(dataset, model, tmp_path / "out", rank=[2, 4], learning_rate=[1e-2, 1e-6])
    assert [tuple(trial.values.values()) for trial in made.trials] == [
        (2, 1e-2),
        (2, 1e-6),
        (4, 1e-2),
        (4, 1e-6),
    ]
    losses = [trial.loss for trial in made.trials]
    assert None not in losses
    assert made.best.loss == min(losses)  # type: ignore[type-var]
    assert made.best.values["learning_rate"] == 1e-2
    (marked,) = (line for line in made.table().splitlines() if line.endswith("best"))
    assert marked.split()[0] == str(made.best.values["rank"])
    written = json.loads((tmp_path / "out/sweep.json").read_text())
    assert [trial["loss"] for trial in written] == losses
    assert (tmp_path / "out/sweep.png").stat().st_size > 10_000


def test_without_validation_rows_it_says_what_is_compared(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write(tmp_path / "dataset", train=ROWS[:2])
    one_step = replace(QUICK, max_steps=1)
    sweep(dataset, student=model, out=tmp_path / "out", grid={"rank": [2, 4]}, settings=one_step)
    assert capsys.readouterr().err.count("train: there are no validation rows") == 1


def test_a_larger_grid_trains_only_what_is_new(dataset: Path, model: str, tmp_path: Path) -> None:
    first = swept(dataset, model, tmp_path / "out", rank=[2])
    log = tmp_path / "out" / first.trials[0].folder / "metrics.jsonl"
    written = log.stat().st_mtime_ns
    more = swept(dataset, model, tmp_path / "out", rank=[2, 4])
    assert more.trials[0] == first.trials[0] and len(more.trials) == 2
    assert log.stat().st_mtime_ns == written


def test_base_and_teacher_are_asked_once_for_all_trials_on_the_same_answers(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, asked = validation.reference_likelihoods, list[int]()

    def counted(answers: Sequence[Any], **models: Any) -> Any:
        asked.append(len(answers))
        return measure(answers, **models)

    monkeypatch.setattr(validation, "reference_likelihoods", counted)
    said = "The answer is {{ answer }} and nothing else at all."
    labels = release(tmp_path / "labels", model, response=said, validation=20)
    swept(labels, model, tmp_path / "out", rank=[2, 4])
    assert asked == [20]
    first, second = (file.read_text() for file in (tmp_path / "out").glob("*/bounds.json"))
    assert first == second
    prompt = "Name the language."
    others = release(tmp_path / "others", model, response=said, prompt=prompt, validation=20)
    swept(others, model, tmp_path / "more", rank=[2])
    assert asked == [20, 20]
    (third,) = (file.read_text() for file in (tmp_path / "more").glob("*/bounds.json"))
    assert third != first


class Counted:
    """Stands where a server would that was started for one store."""

    closed = 0

    def close(self) -> None:
        self.closed += 1


def test_every_trials_server_ends_with_it_and_no_other(
    dataset: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, started, shared = Counted(), list[Counted](), references._server
    servers: dict[Any, Any] = {(Path("model"), tmp_path / "elsewhere", None): kept}

    def start(name: str, folder: Path, store: Path | None, dtype: str | None) -> Any:
        if store is not None:
            assert all(one.closed for one in started), "two trials had a server at once"
            started.append(Counted())
            servers[folder, store.resolve(), dtype] = started[-1]
        return shared(name, folder, store, dtype)

    monkeypatch.setattr(references, "_SERVERS", servers)
    monkeypatch.setattr(references, "_server", start)
    settings = replace(QUICK, max_steps=1, internalisation=False)
    sweep(dataset, student=model, out=tmp_path / "out", grid={"rank": [2, 4]}, settings=settings)
    assert [one.closed for one in started] == [1, 1]
    assert list(servers.values()) == [kept] and not kept.closed


def test_a_grid_that_cannot_be_trained_is_refused_at_once(
    dataset: Path, model: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="'ranks' is no training setting. Did you mean 'rank'"):
        swept(dataset, model, tmp_path / "out", ranks=[2])
    with pytest.raises(SettingsError, match="rank must be at least 1"):
        swept(dataset, model, tmp_path / "out", rank=[4, 0])
    with pytest.raises(SettingsError, match="The grid is empty"):
        swept(dataset, model, tmp_path / "out")
    with pytest.raises(SettingsError, match="The grid is empty"):
        swept(dataset, model, tmp_path / "out", rank=[])
    with pytest.raises(DatasetError):
        swept(tmp_path / "nowhere", model, tmp_path / "out", rank=[4])
    assert not list((tmp_path / "out").glob("*/metrics.jsonl"))


def test_a_training_that_failed_is_shown_and_never_the_best(tmp_path: Path) -> None:
    failed = SweepTrial({"rank": 2}, "rank-2", error="the loss became nan")
    finished = SweepTrial({"rank": 4}, "rank-4", loss=0.5, best_step=3, seconds=1.25, tokens=1000)
    made = Sweep(tmp_path, [failed, finished])
    assert made.best is finished
    assert made.table().splitlines()[1].endswith("the loss became nan")
    with pytest.raises(ModelError, match="the first failed with: the loss became nan"):
        _ = Sweep(tmp_path, [failed]).best


def test_two_sweeps_never_share_a_folder(dataset: Path, model: str, tmp_path: Path) -> None:
    with (
        one_writer(tmp_path / "out", "sweep"),
        pytest.raises(OutputError, match="Another process.*for this sweep"),
    ):
        swept(dataset, model, tmp_path / "out", rank=[2])
    assert not list((tmp_path / "out").glob("rank-2"))

"""What version 0.1 wrote loads, runs and continues: a run, its release, and two trainings."""

import json
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from distill_datasets import TrainSettings, generate, load_recipe, measure, publish, train
from distill_datasets.errors import OutputError
from distill_datasets.evaluation.report import Report
from distill_datasets.evaluation.report_text import markdown

pytestmark = pytest.mark.usefixtures("undrawn")

SETTINGS = TrainSettings(
    rank=1,
    train_unembed=False,
    batch_size=8,
    learning_rate=1e-3,
    evaluate_every=2,
    rolling_every=2,
    ahead=0,
)


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be changed, at the relative paths under which it was made."""
    shutil.copytree(Path(__file__).parent / "v0.1", tmp_path / "v0.1")
    monkeypatch.chdir(tmp_path / "v0.1")
    return tmp_path / "v0.1"


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def bought(run: str) -> int:
    """Answers that were paid for in this run's folder."""
    with closing(sqlite3.connect(Path(run) / "journal.sqlite")) as journal:
        (count,) = journal.execute("SELECT sum(times_bought) FROM answers").fetchone()
    return int(count)


def test_a_run_goes_on_and_asks_only_for_new_queries(old: Path) -> None:
    before = bought("run")
    assert generate(load_recipe("greetings"), out="run").kept == 72
    assert bought("run") - before == 8


def test_a_release_is_a_recipe_and_its_ledger_answers(old: Path) -> None:
    assert generate("run/release", out="again").kept == 72
    assert bought("again") == 8


def test_a_release_published_again_is_the_same_release(old: Path) -> None:
    digest = json.loads((old / "run/release/manifest.json").read_text())["content_digest"]
    release = publish("run", out="release")
    assert (release.version, release.digest) == ("1.0.0", digest)


def test_a_training_goes_on_to_the_losses_that_it_would_have_had(old: Path) -> None:
    before = lines(old / "unfinished/metrics.jsonl")
    settings = replace(SETTINGS, max_steps=6)
    training = train("run/release", student="pocket", out="unfinished", settings=settings)
    assert training.steps == 6
    # What the uninterrupted training logged.
    assert training.final_loss == pytest.approx(4.4404449835419655, rel=1e-5)
    after = lines(old / "unfinished/metrics.jsonl")
    assert after[:4] == before[:4]


def test_a_state_on_the_server_goes_on_in_a_new_folder(old: Path) -> None:
    (state,) = lines(old / "unfinished/checkpoints.jsonl")
    shutil.copytree(old / "unfinished/checkpoints", old / "new/checkpoints")
    training = train(
        "run/release",
        student="pocket",
        out="new",
        settings=replace(SETTINGS, max_steps=6),
        resume=str(state["state"]),
    )
    assert training.final_loss == pytest.approx(4.4404449835419655, rel=1e-5)


def test_settings_of_then_that_mean_the_default_go_on_and_others_are_named(old: Path) -> None:
    """All rows had a preset of their own, and a teacher could be softened."""
    file = old / "unfinished/config.json"
    config = json.loads(file.read_text())
    config["settings"]["preset"] = "production"
    file.write_text(json.dumps(config))
    settings = replace(SETTINGS, max_steps=6)
    training = train("run/release", student="pocket", out="unfinished", settings=settings)
    assert training.final_loss == pytest.approx(4.4404449835419655, rel=1e-5)
    config["settings"]["objective"]["temperature"] = 2.0
    file.write_text(json.dumps(config))
    with pytest.raises(OutputError, match=r"temperature is 2.0 there.*--out unfinished-2"):
        train("run/release", student="pocket", out="unfinished", settings=settings)


def test_a_finished_training_is_read_and_measured(old: Path) -> None:
    settings = replace(SETTINGS, max_steps=4)
    training = train("run/release", student="pocket", out="finished", settings=settings)
    assert training.final_loss == pytest.approx(5.2544, abs=1e-4)
    report = json.loads((old / "run/report.json").read_text())
    again = measure("run/release", student="finished", out="again").data
    for system in ("base", "teacher", "student"):
        there, here = report["systems"][system], again["systems"][system]
        assert here["metrics"]["accuracy"]["value"] == there["metrics"]["accuracy"]["value"]
        assert here["tokens"].items() >= there["tokens"].items()


def test_a_report_of_then_is_shown(old: Path) -> None:
    report = Report.read("run")
    assert report.data["n"] == 8
    assert report.table().splitlines()[3].startswith("student")
    assert "| student | no | 0.000 [0.000, 0.000]" in markdown(report.data)

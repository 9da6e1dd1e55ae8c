"""`run` from queries to a report, against a server that echoes and a tiny local student."""

import json
from pathlib import Path

import pytest

from distill_datasets.cli.main import main
from tests.conftest import edit
from tests.support.openai_server import OpenAIServer
from tests.support.training_runs import ROWS, write


def recipe_of(folder: Path, queries: int) -> Path:
    rows = [{"query": f"thing {n}, colour red", "split": None} for n in range(queries)]
    rows[-1]["split"] = "hard"
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    edit(folder, "recipe.yaml", ", group: family, reference: colour", ", forced_split: split")
    edit(folder, "recipe.yaml", "languages: [en]", "languages: [en]\nsampling: {max_tokens: 32}")
    return folder


def run(recipe: Path, out: Path, *flags: str | Path) -> int:
    short = ["--max-steps", "1", "--no-internalisation"]
    given = ["run", recipe, "--teacher", "openai:echo-small", "--out", out, *short, *flags]
    return main([str(one) for one in given])


def test_a_prompt_that_was_edited_gives_a_new_version_and_a_training_of_its_own(
    named_server: OpenAIServer,
    model: str,
    recipe_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, out = recipe_of(recipe_folder, 24), tmp_path / "run"
    assert run(recipe, out, "--student", model) == 0
    assert "training anew" not in capsys.readouterr().out
    asked, first = named_server.asked.total(), (out / "report.json").read_bytes()
    assert json.loads(first)["timed"]
    assert not json.loads((out / "report-hard.json").read_text())["timed"]

    edit(recipe, "prompt.md", "Name the colour", "Say the colour")
    assert run(recipe, out, "--student", model) == 0
    said = capsys.readouterr().out
    assert f"{out}/train holds a training of other data: training anew in {out}/train-2" in said
    assert "release 1.0.0" not in said and "release " in said
    assert named_server.asked.total() > asked
    assert (out / "report.json").read_bytes() != first
    assert (out / "train/config.json").is_file() and (out / "train-2/config.json").is_file()

    asked = named_server.asked.total()
    assert run(recipe, out, "--student", model) == 0
    assert not (out / "train-3").exists()
    assert named_server.asked.total() == asked


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--version", "one"], "'one' is not a version"),
        (["--limit", "2"], "has no row: the 2 queries are of"),
        ([], "Name the student with --student"),
    ],
)
def test_what_would_stop_a_run_later_stops_it_before_anybody_is_asked(
    flags: list[str],
    expected: str,
    named_server: OpenAIServer,
    recipe_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    student = ["--student", "pocket"] if flags else []
    assert run(recipe_of(recipe_folder, 24), tmp_path / "run", *flags, *student) == 2
    assert expected in capsys.readouterr().err
    assert not named_server.asked
    assert not (tmp_path / "run").exists()


def test_an_unknown_metric_stops_a_run_before_anybody_is_asked(
    named_server: OpenAIServer,
    recipe_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = recipe_of(recipe_folder, 24)
    (recipe / "recipe.yaml").write_text(
        (recipe / "recipe.yaml").read_text() + "metrics: [nosuch]\n"
    )
    assert run(recipe, tmp_path / "run", "--student", "pocket") == 2
    assert "nosuch" in capsys.readouterr().err
    assert not named_server.asked


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--rank", "100000"], "rank must be at most"),
        (["--max-length", "513"], "max_length must be at most 512"),
        (["--validation-split", "dev", "--patience", "2"], "has no split 'dev'"),
    ],
)
def test_a_student_that_can_not_be_trained_so_stops_a_run_before_anybody_is_asked(
    flags: list[str],
    expected: str,
    named_server: OpenAIServer,
    model: str,
    recipe_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = recipe_of(recipe_folder, 24)
    assert run(recipe, tmp_path / "run", "--student", model, *flags) == 2
    assert expected in capsys.readouterr().err
    assert not named_server.asked


def test_a_student_that_is_not_named_is_that_of_the_training_it_starts_from(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write(tmp_path / "dataset", train=ROWS[:9])
    train = ["train", str(dataset), "--max-steps", "1", "--no-internalisation"]
    assert main([*train, "--out", str(tmp_path / "unnamed")]) == 2
    assert "Name the student with --student" in capsys.readouterr().err
    assert main([*train, "--student", model, "--out", str(tmp_path / "first")]) == 0
    following = ["--from", str(tmp_path / "first"), "--out", str(tmp_path / "second")]
    assert main([*train, *following]) == 0
    config = json.loads((tmp_path / "second/config.json").read_text())
    assert config["student"] == model

import io
import json
from pathlib import Path

import pytest

from distill_datasets.cli.main import main
from distill_datasets.errors import DatasetError
from distill_datasets.generation.run import generate
from distill_datasets.generation.shards import Share
from distill_datasets.models.sampler import Echo, Reply, Sampling
from distill_datasets.releases.release import publish
from distill_datasets.releases.show import print_rows, show
from distill_datasets.schema import Message
from tests.support.panels import KEYS, Models, run


class Unsure(Echo):
    """Echoes, and fails for the sea."""

    async def sample(self, messages: list[Message], sampling: Sampling) -> Reply:  # type: ignore[override]
        if "sea" in messages[-1]["content"]:
            raise TimeoutError("too slow")
        return await super().sample(messages, sampling)


@pytest.fixture
def answered(recipe_folder: Path, tmp_path: Path) -> Path:
    generate(recipe_folder, teacher=Unsure(), out=tmp_path / "run")
    return tmp_path / "run"


def test_rows_of_a_run_are_shown_with_what_the_teacher_said_and_what_became_of_it(
    answered: Path,
) -> None:
    rows = show(answered)
    assert [row["query"] for row in rows][0] == "a rose, colour red"
    assert rows[0]["raw"] == "a rose, colour red"
    assert (rows[0]["answer"], rows[0]["response"], rows[0]["reason"]) == (
        "red",
        "It is red.",
        None,
    )
    assert rows[0]["tokens"]["response"] > 0
    assert rows[3]["reason"] == "TimeoutError: too slow"
    assert [row["reason"] for row in rows[4:]] == ["outside choices", "unparsable"]


def test_rejected_rows_failed_rows_and_those_with_a_text_are_found(answered: Path) -> None:
    assert [row["query"] for row in show(answered, which="rejected")] == [
        "a car, colour green",
        "a thought",
    ]
    assert [row["query"] for row in show(answered, which="errors")] == ["the sea, colour blue"]
    assert [row["query"] for row in show(answered, query="sky")] == ["the sky, colour blue"]
    assert len(show(answered, limit=2)) == 2


def test_rows_of_a_release_have_the_raw_text_out_of_its_ledger(
    recipe_folder: Path, tmp_path: Path
) -> None:
    generate(recipe_folder, teacher=Echo(), out=tmp_path / "run")
    release = publish(tmp_path / "run")
    of_run = {row["query"]: row for row in show(tmp_path / "run")}
    of_release = {row["query"]: row for row in show(release.path)}
    assert of_release.keys() == of_run.keys()
    for query, row in of_release.items():
        for name in ("raw", "answer", "response", "reason", "tokens", "teacher"):
            assert row[name] == of_run[query][name], (query, name)


def test_a_release_without_a_ledger_has_no_raw_text_of_what_it_kept(
    recipe_folder: Path, tmp_path: Path
) -> None:
    generate(recipe_folder, teacher=Echo(), out=tmp_path / "run")
    rows = show(publish(tmp_path / "run", ledger=False).path)
    assert {row["raw"] is None for row in rows} == {True, False}
    assert all(row["raw"] is None for row in rows if row["reason"] is None)


@pytest.mark.parametrize("choice", ["majority", "route"])
def test_of_several_teachers_the_text_that_was_chosen_is_shown(
    choice: str, tmp_path: Path, models: Models
) -> None:
    run(tmp_path, **KEYS[choice])
    rows = show(publish(tmp_path / "run").path)
    assert {row["raw"] for row in rows} <= {"colour: red", "colour: blue"}
    assert all(row["raw"] == f"colour: {row['answer']}" for row in rows)


def test_the_parts_of_a_run_are_shown_one_after_another(
    recipe_folder: Path, tmp_path: Path
) -> None:
    for number in (1, 2):
        generate(recipe_folder, teacher=Echo(), out=tmp_path / "run", share=Share(number, 2))
    assert len(show(tmp_path / "run")) == 6


def test_what_is_neither_a_run_nor_a_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="neither a run nor a release"):
        show(tmp_path / "nothing")


def test_what_is_printed_steers_no_terminal(answered: Path) -> None:
    rows = [{**show(answered)[0], "raw": "\x1b[31m[bold]red[/bold]\nand blue"}]
    file = io.StringIO()
    print_rows(rows, file)
    assert "\x1b" not in file.getvalue()
    assert "[bold]red[/bold]" in file.getvalue()


def test_a_long_text_is_printed_once_however_many_columns_hold_it(answered: Path) -> None:
    said = "Dear customer,\n\nwe look into it."
    rows = [{**show(answered)[0], "raw": f"{said}\n", "answer": said, "response": said}]
    file = io.StringIO()
    print_rows(rows, file)
    assert file.getvalue().count("we look into it.") == 1
    assert file.getvalue().count("(as raw)") == 2


def test_the_command_line_prints_rows_for_people_or_lines_of_json(
    answered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(answered), "--rejected", "-n", "1"]) == 0
    said = capsys.readouterr().out
    assert "a car, colour green" in said and "outside choices" in said
    assert main(["show", str(answered), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["query"] for line in lines] == [row["query"] for row in show(answered)]
    assert main(["show", str(answered), "--query", "no such thing"]) == 0
    assert capsys.readouterr().out == ""


def test_an_answer_that_fails_a_check_is_shown_with_its_name(
    recipe_folder: Path, tmp_path: Path
) -> None:
    keys = "checks: [{name: no_sky, never: sky}]\nkeep: all checks\n"
    (recipe_folder / "recipe.yaml").open("a").write(keys)
    generate(recipe_folder, teacher=Echo(), out=tmp_path / "run")
    release = publish(tmp_path / "run")
    for source in (tmp_path / "run", release.path):
        reasons = {row["query"]: row["reason"] for row in show(source, which="rejected")}
        assert reasons["the sky, colour blue"] == "check: no_sky"
    (row,) = show(release.path, query="sky")
    assert row["raw"] == "the sky, colour blue"

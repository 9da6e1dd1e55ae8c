from pathlib import Path

import pytest

from distill_datasets.cli.main import main
from distill_datasets.files import TEMPLATES
from tests.conftest import edit


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one error line of a command that must exit with 2."""
    assert main([str(argument) for argument in arguments]) == 2
    found = capsys.readouterr().err
    assert found.startswith("error: ")
    assert "Traceback" not in found
    return found


def test_an_unknown_recipe_names_near_ones(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    error = fails(capsys, "generate", "language-id", "--out", tmp_path / "run")
    assert "Did you mean 'language_id'" in error
    assert not (tmp_path / "run/journal.sqlite").exists()


def test_a_recipe_with_an_unknown_key_names_the_closest(
    capsys: pytest.CaptureFixture[str], recipe_folder: Path, tmp_path: Path
) -> None:
    edit(recipe_folder, "recipe.yaml", "teacher:", "teecher:")
    error = fails(capsys, "generate", recipe_folder, "--out", tmp_path / "run")
    assert "unknown key 'teecher'. Did you mean 'teacher'?" in error


def test_a_template_with_an_unknown_field_is_named(
    capsys: pytest.CaptureFixture[str], recipe_folder: Path, tmp_path: Path
) -> None:
    (recipe_folder / "prompt.md").write_text("{{ querry }}")
    assert "unknown field 'querry'" in fails(
        capsys, "generate", recipe_folder, "--out", tmp_path / "run"
    )


def test_a_missing_query_column_lists_those_found(
    capsys: pytest.CaptureFixture[str], recipe_folder: Path, tmp_path: Path
) -> None:
    edit(recipe_folder, "recipe.yaml", "group: family", "query: text")
    error = fails(capsys, "generate", recipe_folder, "--out", tmp_path / "run")
    assert "no column 'text'" in error and "'family'" in error


def test_empty_queries_are_refused(
    capsys: pytest.CaptureFixture[str], recipe_folder: Path, tmp_path: Path
) -> None:
    (recipe_folder / "queries.jsonl").write_text("")
    assert "nothing to ask" in fails(capsys, "generate", recipe_folder, "--out", tmp_path / "run")


@pytest.mark.parametrize("reference", ["gpt-9", "pokcet", "embedded:/no/such/model"])
def test_an_unknown_model_reference_says_what_is_expected(
    capsys: pytest.CaptureFixture[str], recipe_folder: Path, tmp_path: Path, reference: str
) -> None:
    error = fails(
        capsys, "generate", recipe_folder, "--teacher", reference, "--out", tmp_path / "run"
    )
    assert "expected" in error and reference in error


@pytest.mark.parametrize("reference", ["tinker:Qwen/Qwen3-8B", "tinker://run/sampler_weights/x"])
def test_a_tinker_model_without_a_key_says_what_to_set(
    capsys: pytest.CaptureFixture[str], recipe_folder: Path, tmp_path: Path, reference: str
) -> None:
    error = fails(
        capsys, "generate", recipe_folder, "--teacher", reference, "--out", tmp_path / "run"
    )
    assert "TINKER_API_KEY" in error


def test_an_output_folder_that_cannot_be_written_is_refused_first(
    capsys: pytest.CaptureFixture[str], recipe_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    error = fails(capsys, "generate", recipe_folder, "--out", tmp_path / "file/run")
    assert "Can't write to" in error


def test_publishing_a_folder_without_answers_says_what_to_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "generate" in fails(capsys, "publish", tmp_path)


def test_training_on_something_that_is_no_dataset_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    error = fails(capsys, "train", tmp_path / "nothing", "--out", tmp_path / "train")
    assert str(tmp_path / "nothing") in error


def test_the_shipped_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    names = [line.split()[0] for line in listed.splitlines() if line and line[0] != " "]
    assert {"language_id", "tool_call", "persona_template"} < {*names}
    assert "_template" not in names
    assert "persona_template:ada_lovelace" in listed


@pytest.mark.parametrize("like", TEMPLATES)
def test_a_new_recipe_of_each_kind_is_a_folder_that_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, like: str
) -> None:
    folder, run = tmp_path / "mine", str(tmp_path / "run")
    assert main(["new", "mine", "--like", like, "--folder", str(folder)]) == 0
    assert "distill-datasets run" in capsys.readouterr().out
    assert "name: mine" in (folder / "recipe.yaml").read_text()
    assert main(["generate", str(folder), "--out", run, "--limit", "8"]) == 0
    assert "kept" in capsys.readouterr().out
    assert "is there already" in fails(capsys, "new", "mine", "--folder", folder)


def test_a_recipe_name_that_cannot_be_one_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "can't name a recipe" in fails(capsys, "new", "../mine", "--folder", tmp_path / "x")


def test_an_unknown_verb_exits_with_2() -> None:
    with pytest.raises(SystemExit) as end:
        main(["distil"])
    assert end.value.code == 2

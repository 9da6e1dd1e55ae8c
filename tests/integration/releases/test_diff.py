import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pyarrow.parquet import read_table, write_table

from distill_datasets.errors import DatasetError
from distill_datasets.generation.run import generate
from distill_datasets.models.sampler import Echo, Reply, Sample, Sampling, Usage
from distill_datasets.releases.diff import Difference, diff
from distill_datasets.releases.release import publish
from distill_datasets.schema import Message
from tests.conftest import edit

LABELS = "answer: {pattern: 'colour (?P<answer>\\w+)', choices: [red, blue]}\n"


class Changed(Echo):
    """Echoes, but for the queries it has other answers to; counts as read from the cache."""

    def __init__(self, answers: Mapping[str, str] | None = None, cached: int = 0) -> None:
        super().__init__()
        self.answers, self.cached = answers or {}, cached

    @property
    def model(self) -> str:
        return "pocket"

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        query = messages[-1]["content"]
        text = self.answers.get(query, query)
        return Reply((Sample(text, "stop", len(text)),) * sampling.n, Usage(100, self.cached))


def release_of(folder: Path, recipe: Path, teacher: Echo | None = None) -> Path:
    generate(recipe, teacher=teacher or Changed(), out=folder)
    return publish(folder).path


def changes(tmp_path: Path, recipe: Path, teacher: Echo | None = None) -> Difference:
    """Between a release made before this call as `tmp_path/old` and one made now."""
    return diff(tmp_path / "old", release_of(tmp_path / "new", recipe, teacher))


@pytest.fixture(autouse=True)
def _old_release(tmp_path: Path, recipe_folder: Path) -> None:
    release_of(tmp_path / "old", recipe_folder)


def test_the_same_content_is_no_difference(tmp_path: Path, recipe_folder: Path) -> None:
    found = changes(tmp_path, recipe_folder)
    assert found.empty
    assert found.data["rows"] == {
        "old": 6,
        "new": 6,
        "added": 0,
        "removed": 0,
        "changed": 0,
        "recounted": 0,
    }
    assert "0 added, 0 removed, 0 changed" in found.text()
    assert not any(word in found.text() for word in ("labels:", " moved:", "recipe:", "prompt:"))


def test_rows_are_added_removed_and_changed_by_id(tmp_path: Path, recipe_folder: Path) -> None:
    edit(recipe_folder, "queries.jsonl", "a poppy", "a tulip")
    more = '{"query": "a fox, colour red", "family": "things", "colour": null}\n'
    (recipe_folder / "queries.jsonl").write_text(
        (recipe_folder / "queries.jsonl").read_text() + more
    )
    found = changes(tmp_path, recipe_folder, Changed({"the sky, colour blue": "colour red"}))
    rows = found.data["rows"]
    assert (rows["added"], rows["removed"], rows["changed"]) == (2, 1, 1)
    assert found.data["changed_columns"] == {"response": 1, "answer": 1}
    assert found.data["recipe"]["files"] == ["queries.jsonl"]
    assert "rows: 2 added, 1 removed, 1 changed" in found.text()
    assert not found.empty


def test_labels_that_moved_are_counted_from_what_to_what(
    tmp_path: Path, recipe_folder: Path
) -> None:
    answers = {
        "the sky, colour blue": "colour red",
        "the sea, colour blue": "colour red",
        "a rose, colour red": "colour blue",
        "a poppy, colour red": "no idea",
    }
    found = changes(tmp_path, recipe_folder, Changed(answers))
    assert found.data["labels"] == [
        {"from": "blue", "to": "red", "rows": 2},
        {"from": "red", "to": None, "rows": 1},
        {"from": "red", "to": "blue", "rows": 1},
    ]
    assert [moved["to"] for moved in found.data["moved"]] == ["rejected"]
    assert "2  blue -> red" in found.text()
    assert "1  red -> (no answer)" in found.text()


def test_rows_that_differ_in_the_teachers_cache_only_are_not_changed(
    tmp_path: Path, recipe_folder: Path
) -> None:
    found = changes(tmp_path, recipe_folder, Changed(cached=7))
    assert (found.data["rows"]["changed"], found.data["rows"]["recounted"]) == (0, 6)
    assert "6 others differ in the teacher's token counts only" in found.text()


def test_a_changed_prompt_is_shown_line_by_line(tmp_path: Path, recipe_folder: Path) -> None:
    edit(recipe_folder, "prompt.md", "Name the colour", "Name the main colour")
    found = changes(tmp_path, recipe_folder)
    assert found.data["recipe"]["prompt"].splitlines()[-2:] == [
        "-Name the colour of the thing. Say: colour NAME.",
        "+Name the main colour of the thing. Say: colour NAME.",
    ]
    assert "  +Name the main colour" in found.text()


def test_recipe_keys_that_changed_are_named_with_both_values(
    tmp_path: Path, recipe_folder: Path
) -> None:
    edit(recipe_folder, "recipe.yaml", "license: apache-2.0", "sampling: {temperature: 0.5}")
    keys = changes(tmp_path, recipe_folder).data["recipe"]["keys"]
    assert keys == {
        "sampling.temperature": {"old": 0.0, "new": 0.5},
        "license": {"old": "apache-2.0", "new": None},
    }


def test_lengths_are_those_of_the_kept_rows(tmp_path: Path, recipe_folder: Path) -> None:
    long = {"the sky, colour blue": "it is the " + "colour blue"}
    lengths = changes(tmp_path, recipe_folder, Changed(long)).data["lengths"]
    # Of the four kept rows "It is red." twice and "It is blue." twice; tokens are characters.
    assert lengths["response_characters"]["new"] == {"mean": 10.5, "p50": 10, "p95": 11}
    assert lengths["prompt_tokens"]["old"] == {"mean": 100.0, "p50": 100, "p95": 100}
    assert lengths["response_tokens"]["old"] == {"mean": 19.25, "p50": 19, "p95": 20}
    assert lengths["response_tokens"]["new"]["p95"] == 21


def test_samples_of_one_query_are_rows_of_their_own(tmp_path: Path, recipe_folder: Path) -> None:
    edit(recipe_folder, "recipe.yaml", "license:", "sampling: {n: 2}\nlicense:")
    assert changes(tmp_path, recipe_folder).data["rows"]["added"] == 6


def test_rows_in_two_splits_are_compared_once(tmp_path: Path, recipe_folder: Path) -> None:
    edit(recipe_folder, "recipe.yaml", "license:", "split: {same_rows: true}\nlicense:")
    found = changes(tmp_path, recipe_folder)
    assert found.data["rows"]["added"] == 0
    assert {moved["to"] for moved in found.data["moved"]} <= {"test+train", "train+test"}


def test_many_movements_are_cut_short_in_the_text_and_whole_in_the_data(
    tmp_path: Path, recipe_folder: Path
) -> None:
    edit(recipe_folder, "recipe.yaml", LABELS, "")
    lines = [json.dumps({"query": f"q{n}", "family": "f", "colour": None}) for n in range(30)]
    (recipe_folder / "queries.jsonl").write_text("\n".join(lines))
    shutil.rmtree(tmp_path / "old")
    release_of(tmp_path / "old", recipe_folder)
    found = changes(tmp_path, recipe_folder, Changed({f"q{n}": f"x{n}" for n in range(30)}))
    assert len(found.data["labels"]) == 30
    assert "10  in 10 other ways" in found.text()


def test_the_data_is_json_and_names_both_sides(tmp_path: Path, recipe_folder: Path) -> None:
    found = json.loads(json.dumps(changes(tmp_path, recipe_folder).data))
    assert found["old"]["reference"] == str(tmp_path / "old")
    assert found["new"]["version"] == "1.0.0"
    assert found["old"]["identity"] == Echo().identity


@pytest.mark.parametrize("name", ["absent", ".", "a/b/c"])
def test_what_is_no_release_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match="is no release: expected a folder with manifest"):
        diff(tmp_path / "old", tmp_path / name)


def test_rows_without_an_id_are_refused(tmp_path: Path) -> None:
    path: Any = next((tmp_path / "old" / "release" / "data").iterdir())
    write_table(read_table(path).drop_columns(["id"]), path)
    edit(tmp_path / "old" / "release", "manifest.json", '"sha256"', '"digests"')
    with pytest.raises(DatasetError, match=r"have no \['id'\]"):
        diff(tmp_path / "old", tmp_path / "old")

import gc
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from datasets import Dataset, load_from_disk

from distill_datasets.errors import GenerationError
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.rows import (
    ROWS_FILE,
    _collect_rarely,
    explain_rejections,
    finish,
    stream,
    tally,
)
from distill_datasets.generation.run import generate
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.models.sampler import Reply, Sample, Sampling, Usage
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.schema import Message, answer_features
from tests.conftest import edit

FAILURE = {"type": "time-out", "status": None, "message": "too slow", "attempts": 8}


def rows() -> Dataset:
    some: list[dict[str, Any]] = [
        {"id": "a", "sample": 0, "answer": "red", "teacher_response_tokens": 3},
        {"id": "a", "sample": 1, "rejection": "empty", "teacher_response_tokens": 1},
        {"id": "b", "sample": 0, "rejection": "truncated", "teacher_response_tokens": 9},
        {"id": "c", "sample": 0, "error": FAILURE},
    ]
    for row in some[:3]:
        row |= {"teacher_prompt_tokens": 20, "teacher_cached_tokens": 10}
    full = [{name: row.get(name) for name in answer_features()} for row in some]
    return Dataset.from_list(full, features=answer_features())


def test_rows_are_counted_by_what_became_of_them_and_tokens_by_what_was_paid() -> None:
    assert tally(rows()) == {
        **{"rows": 4, "kept": 1, "errors": 1},
        "rejected": {"empty": 1, "truncated": 1},
        "tokens": {"prompt": 40, "cached": 20, "response": 13},  # one prompt for a query
    }


def test_nothing_is_counted_as_nothing() -> None:
    counts = tally(rows().select(range(0)))
    assert (counts["rows"], counts["kept"]) == (0, 0)
    assert counts["tokens"] == {"prompt": 0, "cached": 0, "response": 0}


def test_a_finished_folder_holds_the_rows(tmp_path: Path) -> None:
    path = str(tmp_path / ROWS_FILE)
    written = rows().map(lambda row: row, cache_file_name=path, new_fingerprint="named")
    finish(written, tmp_path)
    found = load_from_disk(tmp_path)
    assert found.to_dict() == rows().to_dict()
    assert found.features == answer_features()
    assert found["error"][:] == [None, None, None, FAILURE]
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        ROWS_FILE,
        "dataset_info.json",
        "state.json",
    ]


def test_rows_are_read_a_few_at_a_time_and_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill_datasets.generation.rows._ROWS_AT_ONCE", 3)
    rows().save_to_disk(tmp_path)
    saved = load_from_disk(tmp_path)
    for some, order in ((rows(), "aabc"), (saved, "aabc"), (saved.select([3, 0, 2, 1]), "caba")):
        pieces = list(stream(some))
        assert max(map(len, pieces)) == 3
        assert [name for piece in pieces for name in piece["id"].to_pylist()] == list(order)


@dataclass
class Odd:
    """Answers with more tokens than there are, and with half of a pair."""

    model: str = "odd"
    identity: str = "odd"

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        return Reply((Sample("colour red", "stop", 10**30),), Usage(10**30, 0))


def test_counts_that_nobody_can_have_counted_are_unknown_in_rows_now_and_later(
    recipe_folder: Path, tmp_path: Path
) -> None:
    edit(recipe_folder, "prompt.md", "Name the colour", "Say the colour")
    for _ in range(2):
        made = generate(recipe_folder, teacher=Odd(), out=tmp_path / "run")
        assert made.errors == 0 and len(made.rows) == 6
        for name in ("teacher_prompt_tokens", "teacher_response_tokens"):
            assert made.rows[name][:] == [None] * 6
        shutil.rmtree(tmp_path / "run/answers")


def test_what_was_set_for_the_garbage_collector_is_set_again() -> None:
    before = gc.get_threshold()
    with pytest.raises(KeyError), _collect_rarely():
        assert gc.get_threshold()[0] > before[0]
        raise KeyError
    assert gc.get_threshold() == before


class Says:
    """Says the same to everything; one thing else to the queries that contain `good`."""

    model = identity = "says"

    def __init__(self, text: str, stop_reason: Literal["stop", "length"] = "stop") -> None:
        self.text, self.stop_reason, self.calls = text, stop_reason, 0

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        self.calls += 1
        if "good" in messages[-1]["content"]:
            return Reply((Sample("colour red", "stop", 2),), Usage(10, 0))
        return Reply((Sample(self.text, self.stop_reason, 5),), Usage(10, 0))


@pytest.fixture
def recipe(recipe_folder: Path) -> Recipe:
    """Three hundred queries."""
    return recipe_of(recipe_folder, [f"thing {n}" for n in range(300)])


def recipe_of(folder: Path, queries: Sequence[str]) -> Recipe:
    lines = (json.dumps({"query": query}) for query in queries)
    (folder / "queries.jsonl").write_text("\n".join(lines))
    edit(folder, "recipe.yaml", ", group: family, reference: colour", "")
    return load_recipe(folder)


FEW = GenerateSettings(concurrency=4)


def test_a_run_whose_first_rows_are_all_rejected_stops_before_the_rest(
    recipe: Recipe, tmp_path: Path
) -> None:
    teacher = Says("I think it is red.")
    with pytest.raises(GenerationError) as stopped:
        generate(recipe, teacher=teacher, out=tmp_path / "run", settings=FEW)
    said = str(stopped.value)
    assert "Of the first 50 rows none can be used" in said
    assert "Rejected: 50 unparsable" in said
    assert said.count("-> 'I think it is red.'") == 2
    assert "answer.pattern 'colour (?P<answer>\\\\w+)' never matches" in said
    assert 50 <= teacher.calls < 60
    assert not (tmp_path / "run/answers").exists()
    with Journal(tmp_path / "run/journal.sqlite") as journal:
        assert len(journal) == teacher.calls


def test_what_was_bought_before_the_recipe_was_mended_is_used_after_it(
    recipe: Recipe, recipe_folder: Path, tmp_path: Path
) -> None:
    first, then = Says("I think it is red."), Says("I think it is red.")
    with pytest.raises(GenerationError):
        generate(recipe, teacher=first, out=tmp_path / "run", settings=FEW)
    edit(recipe_folder, "recipe.yaml", "colour (?P", "it is (?P")
    made = generate(recipe_folder, teacher=then, out=tmp_path / "run", settings=FEW)
    assert made.kept == 300
    assert first.calls + then.calls == 300


def test_truncated_rows_stop_a_run_and_say_what_to_raise(recipe: Recipe, tmp_path: Path) -> None:
    teacher = Says("colour red and", "length")
    with pytest.raises(GenerationError, match="raise sampling.max_tokens, which is 512"):
        generate(recipe, teacher=teacher, out=tmp_path / "run", settings=FEW)
    assert teacher.calls < 60


def test_one_row_that_can_be_used_among_the_first_lets_a_run_go_on(
    recipe_folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(recipe_folder, ["a good thing", *(f"thing {n}" for n in range(299))])
    made = generate(recipe, teacher=Says("hm"), out=tmp_path / "run", settings=FEW)
    assert (made.kept, made.rejected) == (1, {"unparsable": 299})


@pytest.mark.parametrize(("most", "asked"), [(0, 300), (10, 14)])
def test_how_many_rows_may_be_rejected_can_be_said(
    most: int, asked: int, recipe: Recipe, tmp_path: Path
) -> None:
    teacher = Says("hm")
    settings = GenerateSettings(concurrency=4, stop_after_rejected=most)
    if most:
        with pytest.raises(GenerationError, match="Of the first 10 rows none"):
            generate(recipe, teacher=teacher, out=tmp_path / "run", settings=settings)
    else:
        assert generate(recipe, teacher=teacher, out=tmp_path / "run", settings=settings).kept == 0
    assert teacher.calls <= asked


def test_the_texts_in_a_message_are_short_and_steer_no_terminal(recipe: Recipe) -> None:
    rows: list[dict[str, Any]] = [
        {"query": "q", "raw": "\x1b[31m" + "x" * 9_999, "rejection": "outside choices"}
    ]
    said = explain_rejections(rows, recipe)
    assert "\x1b" not in said
    assert len(said) < 1_000
    assert "one of answer.choices ['red', 'blue']" in said


def test_rows_that_fail_a_check_stop_a_run_and_say_which_rule_it_covers(
    recipe: Recipe, tmp_path: Path
) -> None:
    brief = {"name": "brief", "words": {"max": 2}, "covers": "Say it in two words"}
    checked = recipe.replace(checks=[brief], keep="all checks")
    with pytest.raises(GenerationError) as stopped:
        generate(checked, teacher=Says("It is colour red."), out=tmp_path / "run", settings=FEW)
    said = str(stopped.value)
    assert "Rejected: 50 check: brief" in said
    assert "the check brief demands (Say it in two words) in prompt.md" in said
    assert 'mend the check, words: {"max": 2}' in said


def test_a_check_of_one_prompt_of_several_is_explained(recipe: Recipe) -> None:
    brief = {"name": "brief", "words": {"max": 2}, "covers": "Say it in two words"}
    member = recipe.replace(checks=[brief], keep="all checks")
    several = recipe.model_copy(update={"members": {"[color]": member}})
    rows: list[dict[str, Any]] = [{"query": "q", "raw": "red", "rejection": "check: brief"}]
    assert "the check brief demands (Say it in two words)" in explain_rejections(rows, several)

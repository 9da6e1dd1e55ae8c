import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from distill_datasets.errors import GenerationError
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.rows import explain_rejections
from distill_datasets.generation.run import generate
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.models.sampler import Reply, Sample, Sampling, Usage
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.schema import Message
from tests.conftest import edit


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

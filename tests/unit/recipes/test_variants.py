"""Recipes that stand for several: variants of one, and several prompts in one student."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_datasets.conversations import from_text
from distill_datasets.errors import RecipeError
from distill_datasets.recipes.loading import load_recipe, variants_of
from distill_datasets.recipes.queries import load_queries
from distill_datasets.recipes.recipe import Recipe

PEOPLE = {
    "ada": {"variables": {"who": "Ada"}},
    "marcus": {
        "variables": {"who": "Marcus"},
        "sampling": {"max_tokens": 9},
        "response": "{{ text }}",
    },
}
LINES = '{"query": "Who are you?"}\n'


def write(folder: Path, prompt: str | None, lines: str = LINES, **keys: Any) -> Path:
    """A recipe's folder; without a prompt it has no queries either."""
    folder.mkdir(parents=True)
    known: dict[str, Any] = {"name": folder.name, "description": "d", "teacher": "echo"}
    if prompt is not None:
        (folder / "prompt.md").write_text(prompt, encoding="utf-8")
        (folder / "queries.jsonl").write_text(lines, encoding="utf-8")
        known["queries"] = {"file": "queries.jsonl", "query": "query"}
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({**known, **keys}, sort_keys=False), encoding="utf-8"
    )
    return folder


def persona(tmp_path: Path, variants: object = PEOPLE) -> Path:
    common: dict[str, Any] = {"sampling": {"temperature": 0.5}, "variables": {"era": "then"}}
    return write(
        tmp_path / "persona", "You are {{ who }}, of {{ era }}.", variants=variants, **common
    )


def test_a_variant_lays_its_keys_over_the_recipe_section_by_section(tmp_path: Path) -> None:
    folder = persona(tmp_path)
    assert variants_of(folder) == ["ada", "marcus"]
    one = load_recipe(f"{folder}:marcus")
    assert (one.name, one.variant) == ("persona-marcus", "marcus")
    assert one.messages("Hi")[0]["content"] == "You are Marcus, of then."
    assert (one.sampling.temperature, one.sampling.max_tokens, one.response) == (
        0.5,
        9,
        "{{ text }}",
    )
    assert one.digest != load_recipe(f"{folder}:ada").digest


def test_variants_may_be_in_a_file_of_their_own(tmp_path: Path) -> None:
    folder = persona(tmp_path, "people.yaml")
    with pytest.raises(RecipeError, match=r"there is no file 'people\.yaml'"):
        load_recipe(f"{folder}:ada")
    (folder / "people.yaml").write_text(yaml.safe_dump(PEOPLE), encoding="utf-8")
    assert load_recipe(f"{folder}:ada").messages("Hi")[0]["content"] == "You are Ada, of then."


def test_a_variant_may_be_called_whatever_a_recipe_may_not_say(tmp_path: Path) -> None:
    folder = persona(tmp_path, "people.yaml")
    (folder / "people.yaml").write_text(yaml.safe_dump({"prompt": PEOPLE["ada"]}), encoding="utf-8")
    assert load_recipe(f"{folder}:prompt").messages("Hi")[0]["content"] == "You are Ada, of then."


def test_a_variant_cant_say_what_the_recipe_itself_cant(tmp_path: Path) -> None:
    folder = persona(tmp_path, {"ada": {**PEOPLE["ada"], "prompt": "You are Ada."}})
    with pytest.raises(RecipeError, match=r"'prompt' is not a key; the prompt is in prompt\.md"):
        load_recipe(f"{folder}:ada")


def test_a_copy_of_a_variant_is_that_variant_alone(tmp_path: Path) -> None:
    one = load_recipe(f"{persona(tmp_path)}:ada")
    one.dump(tmp_path / "copy")
    again = load_recipe(tmp_path / "copy")
    assert (again.digest, again.name, again.variant) == (one.digest, "persona-ada", "ada")


@pytest.mark.parametrize(
    ("name", "says"),
    [("", "has variants: name one of"), (":adda", "no variant 'adda'.*Did you mean 'ada'")],
)
def test_a_variant_must_be_named_and_be_there(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load_recipe(f"{persona(tmp_path)}{name}")


@pytest.mark.parametrize(
    "variants", [["ada"], {"ada": None}, {"a b": {}}, {"ada": {"respones": "x"}}]
)
def test_variants_that_are_none_are_refused(tmp_path: Path, variants: object) -> None:
    with pytest.raises(RecipeError, match=r"variants|respones"):
        load_recipe(f"{persona(tmp_path, variants)}:ada")


def library(tmp_path: Path) -> Recipe:
    home = tmp_path / "all"
    write(home, None, prompts={"[mood]": "mood", "[chat]": "inner/chat"})
    names = {"query": "query", "reference": "reference", "group": "group"}
    write(
        home / "mood",
        "Which mood?",
        '{"query": "Fine", "reference": "good", "group": "a"}\n{"query": "Bad"}\n',
        queries={"file": "queries.jsonl", **names},
        answer={"choices": ["good", "bad"]},
    )
    turns = [{"role": "system", "content": "It rains."}, {"role": "user", "content": "Hi"}]
    write(
        home / "inner" / "chat",
        "Be kind.",
        json.dumps({"messages": turns}),
        queries={"file": "queries.jsonl", "messages": "messages"},
    )
    return load_recipe(home)


def test_each_query_of_several_prompts_is_asked_with_its_own_and_learned_behind_its_handle(
    tmp_path: Path,
) -> None:
    recipe = library(tmp_path)
    fine, bad, chat = load_queries(recipe)["query"]
    assert recipe.messages(fine) == load_recipe(tmp_path / "all" / "mood").messages("Fine")
    assert recipe.student_messages(bad) == [
        {"role": "system", "content": "[mood]"},
        {"role": "user", "content": "Bad"},
    ]
    assert recipe.messages(chat)[0]["content"] == "Be kind.\n\nIt rains."
    assert recipe.student_messages(chat)[0]["content"] == "[chat]\n\nIt rains."
    assert [recipe.handle(one) for one in (fine, chat)] == ["[mood]", "[chat]"]
    assert recipe.part(fine)[1] == "Fine"
    assert from_text(recipe.part(chat)[1])[0]["content"] == "It rains."


def test_a_row_of_several_prompts_is_in_the_split_that_its_own_recipe_puts_it_in(
    tmp_path: Path,
) -> None:
    rows = load_queries(library(tmp_path))
    own = load_queries(load_recipe(tmp_path / "all" / "mood"))
    assert rows["split"][:2] == own["split"][:]
    assert rows["reference"][:2] == ["good", None]
    assert rows["group"][0] == "[mood] a"


def test_an_empty_query_of_several_prompts_is_named_by_its_number(tmp_path: Path) -> None:
    lines = [{"query": f"query {n}"} for n in range(1_200)] + [{"query": " "}]
    write(tmp_path / "all" / "many", "p", "".join(json.dumps(line) + "\n" for line in lines))
    write(tmp_path / "all" / "both", None, prompts={"[many]": "many"})
    (tmp_path / "all" / "many").rename(tmp_path / "all" / "both" / "many")
    with pytest.raises(RecipeError, match="Query 1201 of 'many' is empty"):
        load_queries(load_recipe(tmp_path / "all" / "both"))


def test_a_copy_of_several_prompts_holds_them_all(tmp_path: Path) -> None:
    recipe = library(tmp_path)
    recipe.dump(tmp_path / "copy")
    again = load_recipe(tmp_path / "copy")
    assert again.digest == recipe.digest
    assert load_queries(again).to_list() == load_queries(recipe).to_list()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"prompts": {"[a]": "nowhere"}}, "neither a folder"),
        ({"prompts": {"[a]": "../persona"}}, "outside"),
        ({"prompts": {" [a]": "mood"}}, "handle"),
        ({"prompts": {"[a]": "mood"}, "response": "x"}, "each of its recipes has its own"),
        ({"prompts": {"[a]": "again"}}, "has prompts itself"),
        ({"prompts": {}, "queries": None}, "queries"),
    ],
)
def test_prompts_that_cannot_be_are_refused(
    tmp_path: Path, keys: dict[str, Any], says: str
) -> None:
    home = write(tmp_path / "all", None if keys["prompts"] else "p", **keys)
    write(home / "mood", "Which mood?")
    write(home / "again", None, prompts={"[b]": "again"})
    with pytest.raises(Exception, match=says) as raised:
        load_recipe(home)
    assert "Error" in type(raised.value).__name__

"""What somebody else's recipe can do, and what YAML makes of words."""

import json
import shutil
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import yaml

from distill_datasets.conversations import from_text
from distill_datasets.errors import DistillError, RecipeError
from distill_datasets.files import TEMPLATES
from distill_datasets.recipes.loading import load_recipe, new_recipe, samples_among, variants_of
from distill_datasets.recipes.queries import load_queries
from distill_datasets.recipes.recipe import Recipe
from tests.conftest import edit


def add(folder: Path, line: str) -> None:
    with (folder / "recipe.yaml").open("a") as file:
        file.write(line + "\n")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("metrics: [no]", r"metrics\.0: .*stands in quotes: 'no'"),
        ("attribution: 2024-01-01", "stands in quotes: '2024-01-01'"),
        ("attribution: 1.0e+3", r"stands in quotes: '1.0e.3'"),
        ("attribution: 0123", "stands in quotes: '0123'"),
        ("variables: {a: on}", "stands in quotes: 'on'"),
        ("metrics: accuracy", r"Write a list: \[accuracy\]"),
        ("teacher: other", "Line 9 .* the key 'teacher' stands in line 3 already"),
        ("split: {train: 1.0, test: 0, validation: 0, train: 0.5}", "the key 'train'"),
        ("no: x", "the key no for something else than text"),
        ("sampling: {extra: {thinking: off}}", "takes off for a truth value"),
        ("sampling: {extra: {enum: [a, Yes]}}", "takes Yes for a truth value"),
        ("sampling: {n: 1000000000}", r"sampling\.n: .*less than or equal to 1000"),
        ("sampling: {max_tokens: 10000000000}", r"sampling\.max_tokens"),
        ("sampling: {top_logprobs: 100000}", r"sampling\.top_logprobs"),
        ("sampling: {seed: 99999999999999999999}", r"sampling\.seed"),
        ("metrics: [someone/metric]", "metrics names .*'accuracy'.*--metric path.py:Name"),
        ("metrics: [acuracy]", "Did you mean 'accuracy'"),
        ("variables: {query: x}", "can't name the query"),
        ("variables: {'a b': x}", "variables"),
        ("attribution: " + "[" * 90 + "]" * 90, "nested more than 64 levels"),
        ("attribution: " + "[" * 100_000, "nested more than 64 levels"),
        ("attribution: one: two", r"not YAML: .*\n.*line 9, column 17:\n.*one: two\n +\^"),
    ],
)
def test_what_a_recipe_cannot_say_is_named(recipe_folder: Path, line: str, says: str) -> None:
    add(recipe_folder, line)
    with pytest.raises(RecipeError, match=says):
        load_recipe(recipe_folder)


def test_a_language_that_yaml_takes_for_false_is_shown_as_it_is_written(
    recipe_folder: Path,
) -> None:
    edit(recipe_folder, "recipe.yaml", "[en]", "[en, no]")
    with pytest.raises(RecipeError, match=r"languages\.1: .*in quotes: 'no'"):
        load_recipe(recipe_folder)
    edit(recipe_folder, "recipe.yaml", "[en, no]", "no")
    with pytest.raises(RecipeError, match=r"languages: .*Write a list: \[no\]"):
        load_recipe(recipe_folder)


def test_aliases_that_multiply_are_refused_at_once(recipe_folder: Path) -> None:
    lines = ["attribution: &a0 [x, x]"]
    lines += [f"k{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    add(recipe_folder, "\n".join(lines))
    began = perf_counter()
    with pytest.raises(RecipeError, match="over 100,000 values with its aliases"):
        load_recipe(recipe_folder)
    assert perf_counter() - began < 60


def test_an_alias_within_itself_is_refused(recipe_folder: Path) -> None:
    add(recipe_folder, "attribution: &a [*a]")
    with pytest.raises(RecipeError, match="nested more than 64 levels"):
        load_recipe(recipe_folder)


def test_an_alias_that_is_used_once_is_fine(recipe_folder: Path) -> None:
    add(recipe_folder, "attribution: &a by hand\nteacher_terms: *a")
    assert load_recipe(recipe_folder).teacher_terms == "by hand"


@pytest.mark.parametrize("name", ["recipe.yaml", "prompt.md"])
def test_files_of_a_recipe_have_an_encoding_and_a_size(recipe_folder: Path, name: str) -> None:
    text = (recipe_folder / name).read_text()
    for encoding in ("utf-8-sig", "utf-16"):
        (recipe_folder / name).write_bytes(text.encode(encoding))
        assert load_recipe(recipe_folder).prompt.startswith("Name the colour")
    (recipe_folder / name).write_bytes((text + "# für").encode("latin-1"))
    with pytest.raises(RecipeError, match="is not UTF-8: line .* reads '.*# für'"):
        load_recipe(recipe_folder)
    (recipe_folder / name).write_text(text + "# " * 6_000_000)
    with pytest.raises(RecipeError, match="expected at most"):
        load_recipe(recipe_folder)


@pytest.mark.parametrize("place", ["/etc/passwd", "../secret.jsonl", "a/../../x", "C:\\x.jsonl"])
@pytest.mark.parametrize(
    "key",
    ["file: {}", "file: q.jsonl, sidecar: {}", "package: yaml, member: {}"],
)
def test_a_recipe_names_files_in_its_own_folder_alone(
    recipe_folder: Path, key: str, place: str
) -> None:
    edit(recipe_folder, "recipe.yaml", "file: queries.jsonl", key.format(f"'{place}'"))
    with pytest.raises(RecipeError, match="expected a file in the recipe's folder"):
        load_recipe(recipe_folder)


def test_a_link_out_of_the_recipes_folder_is_refused(recipe_folder: Path) -> None:
    secret = recipe_folder.parent / "secret.jsonl"
    (recipe_folder / "queries.jsonl").rename(secret)
    (recipe_folder / "queries.jsonl").symlink_to(secret)
    with pytest.raises(RecipeError, match="is a link to .*secret.jsonl"):
        load_recipe(recipe_folder)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("path: /home/me/letters", "/home/me/letters"),
        ("hub: me/private, revision: v1", "me/private"),
        ("package: yaml, member: loader.txt", "yaml/loader.txt"),
    ],
)
def test_a_release_reads_what_is_not_its_own_only_when_it_is_trusted(
    recipe_folder: Path, tmp_path: Path, source: str, named: str
) -> None:
    edit(recipe_folder, "recipe.yaml", "file: queries.jsonl", source)
    load_recipe(recipe_folder)
    recipe_folder.rename(tmp_path / "recipe")
    (tmp_path / "manifest.json").write_text("{}")
    for release in (tmp_path, tmp_path / "recipe"):
        with pytest.raises(RecipeError, match=f"{named}.*--trust"):
            load_recipe(release)
        assert load_recipe(release, trust=True).name == "colours"


def test_a_release_with_queries_of_its_own_needs_no_trust(
    recipe_folder: Path, tmp_path: Path
) -> None:
    recipe_folder.rename(tmp_path / "recipe")
    (tmp_path / "manifest.json").write_text("{}")
    assert len(load_queries(load_recipe(tmp_path))) == 6


@pytest.mark.parametrize("place", ["prompt.md", "prompts/one/prompt.md"])
def test_a_releases_prompt_is_no_link_to_another_file_of_yours(
    recipe_folder: Path, tmp_path: Path, place: str
) -> None:
    if place != "prompt.md":
        shutil.copytree(recipe_folder, recipe_folder / "prompts" / "one")
        text = "name: both\nteacher: pocket\nprompts: {'[a]': prompts/one}\nlicense: mit\n"
        (recipe_folder / "recipe.yaml").write_text(text + "description: Two in one.\n")
    (tmp_path / "letter.txt").write_text("Dear diary")
    (recipe_folder / place).unlink()
    (recipe_folder / place).symlink_to(tmp_path / "letter.txt")
    assert "Dear diary" in load_recipe(recipe_folder).prompt  # one's own recipe may
    recipe_folder.rename(tmp_path / "recipe")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DistillError, match="is a link to .*letter.txt"):
        load_recipe(tmp_path)


def test_queries_in_a_package_are_read_without_running_it(
    recipe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "loud_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('ran')")
    (package / "q.jsonl").write_text(json.dumps({"query": "a", "family": "f", "colour": None}))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    edit(
        recipe_folder,
        "recipe.yaml",
        "file: queries.jsonl",
        "package: loud_package, member: q.jsonl",
    )
    assert load_queries(load_recipe(recipe_folder))["query"][:] == ["a"]


@pytest.mark.parametrize("like", TEMPLATES)
def test_a_sample_has_all_splits_and_says_so_when_its_prompt_is_another(
    tmp_path: Path, like: str
) -> None:
    folder = new_recipe("mine", tmp_path / "mine", like=like)
    queries = load_queries(load_recipe(folder))
    assert {"train", "test"} <= {*queries["split"]}
    assert samples_among(queries["query"], load_recipe(folder).prompt) == []
    (folder / "prompt.md").write_text("Another prompt.")
    with pytest.warns(
        UserWarning, match=f"{len(queries)} of the {len(queries)} queries .* samples"
    ):
        load_queries(load_recipe(folder))


def test_queries_that_two_samples_share_belong_to_both(tmp_path: Path) -> None:
    labels = new_recipe("a", tmp_path / "a", like="labels")
    queries = load_queries(load_recipe(labels))["query"]
    assert samples_among(queries, (labels / "prompt.md").read_text().strip()) == []
    assert samples_among(["mine", queries[0]], "mine") == [queries[0]]


def test_an_unknown_kind_names_the_closest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean 'tools'"):
        new_recipe("a", tmp_path / "a", like="tool")


@pytest.mark.parametrize("name", ["2024", "no", "1e3"])
def test_a_name_that_yaml_takes_for_something_else_is_kept(tmp_path: Path, name: str) -> None:
    assert load_recipe(new_recipe(name, tmp_path / "folder")).name == name


@pytest.mark.parametrize("name", ["größe", "a b", ".hidden", ""])
def test_nothing_is_written_for_a_name_that_no_recipe_may_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="can't name a recipe"):
        new_recipe(name, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


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
    with pytest.raises(RecipeError, match=r"names 'people\.yaml', which .* lacks"):
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

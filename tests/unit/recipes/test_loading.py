"""What somebody else's recipe can do, and what YAML makes of words."""

import json
from pathlib import Path
from time import perf_counter

import pytest

from distill_datasets.errors import RecipeError
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.queries import load_queries
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
        ("attribution: " + "[" * 1_500, "nested more than 64 levels"),
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

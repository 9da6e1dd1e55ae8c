from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

from distill_datasets.errors import RecipeError
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.queries import load_queries, require_splits
from tests.conftest import edit


def test_rows_keep_their_order_groups_and_references(recipe_folder: Path) -> None:
    rows = load_queries(load_recipe(recipe_folder))
    assert rows["query"][0] == "a rose, colour red"
    assert rows["group"][:3] == ["plants", "plants", "nature"]
    assert rows["reference"][3:5] == ["blue", None]


def test_groups_never_straddle_two_splits() -> None:
    rows = load_queries(load_recipe("language_id"))
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["group"], set()).add(row["split"])
    assert {len(found) for found in splits.values()} == {1}


def test_the_sentences_of_language_id_have_the_labels_that_the_prompt_demands() -> None:
    rows = load_queries(load_recipe("language_id"))
    counts = Counter(rows["reference"][:2000])
    # By position: Bulgarian counts as ru, Swahili and Thai as ot; five romanised Urdu lines are
    # ot, one Spanish line is English, two Chinese ones have more Latin letters than Han.
    assert counts["ru"] == 134 + 133
    assert counts["ot"] == 133 + 133 + 5
    assert counts["ur"] == 133 - 5
    assert (counts["en"], counts["es"]) == (135, 132)
    assert (counts["zh"], counts[None]) == (131, 2)
    assert set(rows["split"][2000:]) == {"edge"}
    assert "edge" not in rows["split"][:2000]


def test_the_tutorial_has_its_twelve_sentences() -> None:
    rows = load_queries(load_recipe("language_id_tutorial"))
    assert "".join(rows["reference"]) == "ardeelenesfrhirutrurvizh"


def test_a_repeated_query_is_kept_under_an_id_of_its_own(recipe_folder: Path) -> None:
    edit(recipe_folder, "queries.jsonl", "a poppy", "a rose")
    ids = load_queries(load_recipe(recipe_folder))["id"][:]
    assert ids[1] == f"{ids[0]}-2"
    assert len(set(ids)) == 6


def test_adding_queries_moves_no_row(recipe_folder: Path) -> None:
    before = load_queries(load_recipe(recipe_folder))
    path = recipe_folder / "queries.jsonl"
    path.write_text('{"query": "new", "family": "more", "colour": null}\n' + path.read_text())
    after = load_queries(load_recipe(recipe_folder)).select(range(1, 7))
    assert after.to_dict() == before.to_dict()


def test_a_missing_column_is_an_error_that_lists_those_found(recipe_folder: Path) -> None:
    edit(recipe_folder, "recipe.yaml", "group: family", "group: clan")
    with pytest.raises(RecipeError, match=r"no column 'clan'.*\['query', 'family', 'colour'\]"):
        load_queries(load_recipe(recipe_folder))


def test_empty_queries_are_an_error(recipe_folder: Path) -> None:
    (recipe_folder / "queries.jsonl").write_text("\n")
    with pytest.raises(RecipeError, match="is empty: nothing to ask"):
        load_queries(load_recipe(recipe_folder))


@pytest.mark.parametrize("blank", [" ", r"\u200b"])
def test_an_empty_query_is_named_by_its_row(blank: str, recipe_folder: Path) -> None:
    edit(recipe_folder, "queries.jsonl", '"a thought"', f'"{blank}"')
    with pytest.raises(RecipeError, match="Query 6 is empty"):
        load_queries(load_recipe(recipe_folder))


def test_a_package_that_is_not_installed_says_what_to_install(recipe_folder: Path) -> None:
    edit(recipe_folder, "recipe.yaml", "file: queries.jsonl", "package: not_here, member: a.txt")
    with pytest.raises(RecipeError, match="pip install not-here"):
        load_queries(load_recipe(recipe_folder))


def test_content_that_is_not_the_pinned_one_is_refused(recipe_folder: Path) -> None:
    pinned = f"file: queries.jsonl, sha256: '{'0' * 64}'"
    edit(recipe_folder, "recipe.yaml", "file: queries.jsonl", pinned)
    with pytest.raises(RecipeError, match="not the content that the recipe pins"):
        load_queries(load_recipe(recipe_folder))


def test_a_sidecar_of_another_length_is_refused(recipe_folder: Path) -> None:
    (recipe_folder / "more.csv").write_text("colour2\nred\n")
    beside = "file: queries.jsonl, sidecar: more.csv"
    edit(recipe_folder, "recipe.yaml", "file: queries.jsonl", beside)
    with pytest.raises(RecipeError, match="has 1 rows and the queries 6"):
        load_queries(load_recipe(recipe_folder))


def test_any_path_that_datasets_reads_is_a_source(recipe_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    Dataset.from_dict({"query": ["one", "two"]}).to_parquet(tmp_path / "elsewhere/rows.parquet")
    (recipe_folder / "recipe.yaml").write_text(
        f"name: n\ndescription: d\nteacher: pocket\nqueries: {{path: {tmp_path / 'elsewhere'}}}\n"
    )
    assert load_queries(load_recipe(recipe_folder))["query"][:] == ["one", "two"]


def test_a_hub_dataset_named_as_a_path_has_to_be_pinned(recipe_folder: Path) -> None:
    edit(recipe_folder, "recipe.yaml", "file: queries.jsonl", "path: me/queries")
    with pytest.raises(RecipeError, match=r"named by `queries\.hub` and pinned"):
        load_queries(load_recipe(recipe_folder))


def test_lines_of_json_are_read_as_they_are_written(recipe_folder: Path) -> None:
    (recipe_folder / "queries.jsonl").write_text(
        '{"query": "2024-01-01 00:00:00"}\n\n{"query": 7, "colour": "red", "family": "x"}\n'
        '{"query": "three", "family": ""}\n',
        encoding="utf-8",
    )
    rows = load_queries(load_recipe(recipe_folder))
    assert rows["query"][:] == ["2024-01-01 00:00:00", "7", "three"]
    assert rows["reference"][:] == [None, "red", None]
    assert rows["group"][:] == [rows["id"][0], "x", rows["id"][2]]


def test_half_a_surrogate_pair_in_a_query_is_replaced(recipe_folder: Path) -> None:
    (recipe_folder / "queries.jsonl").write_text(
        '{"query": "x \\ud83d y", "family": "\\uDE00", "colour": "red"}\n'
        '{"query": "\\ud83d\\ude00"}\n'
    )
    rows = load_queries(load_recipe(recipe_folder))
    assert rows["query"][:] == ["x \ufffd y", "\U0001f600"]
    assert rows["group"][0] == "\ufffd"


@pytest.mark.parametrize("line", ["[1]", '{"query": "a"', '"text"'])
def test_a_line_that_is_no_object_is_named(recipe_folder: Path, line: str) -> None:
    (recipe_folder / "queries.jsonl").write_text(f'{{"query": "one"}}\n{line}\n')
    with pytest.raises(RecipeError, match="Line 2 of"):
        load_queries(load_recipe(recipe_folder))


def test_many_queries_are_on_disk_and_the_same(
    recipe_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(f'{{"query": "thing {n % 1500}", "family": null}}\n' for n in range(2_500))
    (recipe_folder / "queries.jsonl").write_text(lines)
    edit(recipe_folder, "recipe.yaml", ", reference: colour", "")
    held = load_queries(load_recipe(recipe_folder))
    monkeypatch.setattr("distill_datasets.recipes.queries._IN_MEMORY", 1_000)
    mapped = load_queries(load_recipe(recipe_folder))
    assert mapped.to_dict() == held.to_dict()
    assert mapped._fingerprint == held._fingerprint
    assert len(set(held["id"])) == 2_500
    assert held["id"][1500] == f"{held['id'][0]}-2"


def test_a_split_that_would_be_empty_is_named_with_what_there_is(recipe_folder: Path) -> None:
    recipe = load_recipe(recipe_folder)
    queries = load_queries(recipe)
    require_splits(recipe, queries, sorted(set(queries["split"])))
    with pytest.raises(RecipeError, match="the 2 queries are of 1 groups.*same_rows: true"):
        require_splits(recipe, queries.select(range(2)), ("train", "test"))


def test_rows_that_are_in_every_split_leave_none_empty(recipe_folder: Path) -> None:
    edit(recipe_folder, "recipe.yaml", "license:", "split: {same_rows: true}\nlicense:")
    recipe = load_recipe(recipe_folder)
    require_splits(recipe, load_queries(recipe).select(range(1)), ("train", "test"))

"""Rows of something else: their keys, which are drawn, and what a drawn row carries."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from distill_datasets.conversations import Call, write_calls
from distill_datasets.errors import RecipeError
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.mix import (
    carried_line,
    carried_part,
    draw_mix,
    mixed_answer,
    mixed_messages,
)
from distill_datasets.recipes.queries import load_queries
from distill_datasets.recipes.recipe import Recipe
from tests.unit.recipes.test_loading import write

GENERAL = {"name": "general", "share": 0.2, "file": "general.jsonl"}
QUERIES = "".join(json.dumps({"query": f"q{number}"}) + "\n" for number in range(10))


def chat(number: int | str) -> dict[str, Any]:
    asked, said = f"chat {number}", f"said {number}"
    return {"messages": [user(asked), {"role": "assistant", "content": said}]}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


CHATS = [chat(number) for number in range(30)]


def mixing(
    folder: Path, rows: Sequence[dict[str, Any]] = CHATS, *parts: dict[str, Any], **keys: Any
) -> Recipe:
    write(folder, "Be brief.", QUERIES, **{"mix": [*(parts or (GENERAL,))], **keys})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "general.jsonl").write_text(lines, encoding="utf-8")
    return load_recipe(folder)


def drawn(recipe: Recipe, own: int = 40) -> list[list[dict[str, Any]]]:
    return [rows.to_list() for rows in draw_mix(recipe, load_queries(recipe), own)]


def queries_of(recipe: Recipe, own: int = 40) -> list[str]:
    return [row["query"] for rows in drawn(recipe, own) for row in rows]


def problem(folder: Path, **part: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        mixing(folder, CHATS, {**GENERAL, **part})
    return str(caught.value)


def test_each_part_has_its_share_of_all_rows_to_train_on(tmp_path: Path) -> None:
    other = {**GENERAL, "name": "other", "share": 0.3}
    found = drawn(mixing(tmp_path / "r", CHATS, GENERAL, other), own=20)
    assert [len(rows) for rows in found] == [8, 12]
    assert {row["source"] for row in found[0]} == {"general"}
    assert {row["split"] for rows in found for row in rows} == {"train"}
    assert len({row["id"] for rows in found for row in rows}) == 20
    assert drawn(mixing(tmp_path / "s"), own=0) == [[]]


def test_the_draw_is_the_same_each_time_and_more_rows_move_few(tmp_path: Path) -> None:
    first = queries_of(mixing(tmp_path / "a"))
    assert first == queries_of(mixing(tmp_path / "b", CHATS[::-1]))
    more = queries_of(mixing(tmp_path / "c", [*CHATS, *map(chat, range(100, 105))]))
    assert len({*first} - {*more}) <= 5
    fewer = queries_of(mixing(tmp_path / "d"), own=20)
    assert fewer == first[: len(fewer)]


def test_no_row_comes_twice_or_is_a_query_or_an_example(tmp_path: Path) -> None:
    own = [{"query": "q1", "response": "a"}, {"query": "shown", "response": "a"}]
    rows = [*own, {"query": "new", "response": "1"}, {"query": "new", "response": "2"}]
    folder = tmp_path / "r"
    folder.parent.mkdir(exist_ok=True)
    recipe = mixing(folder, rows)
    (folder / "examples.jsonl").write_text('{"query": "shown", "response": "x"}\n')
    recipe = recipe.replace(examples={"file": "examples.jsonl"})
    with pytest.warns(UserWarning, match="'general' of the mix has 1 rows .* would be 10"):
        ((row,),) = drawn(recipe)
    assert (row["query"], row["response"]) == ("new", "1")


def test_no_row_is_a_conversation_of_a_recipe_behind_a_handle(tmp_path: Path) -> None:
    folder = write(tmp_path / "two", None, prompts={"[a]": "a", "[b]": "b"}, mix=[GENERAL])
    write(folder / "a", "Be brief.", QUERIES)
    write(folder / "b", "Be kind.", '{"query": "q77"}\n')
    rows = [{"query": text, "response": "x"} for text in ("q3", "q77", "other")]
    (folder / "general.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match="has 1 rows"):
        (query,) = queries_of(load_recipe(folder))
    assert query == '[{"role": "user", "content": "other"}]'


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"prompt": "Hi", "completion": "Ho"},
        {"prompt": [user("Hi")], "completion": [{"role": "assistant", "content": "Ho"}]},
        {"query": "Hi", "response": "Ho", "more": 1},
        {"messages": json.dumps([user("Hi"), {"role": "assistant", "content": "Ho"}])},
    ],
)
def test_columns_are_found_as_chat_datasets_name_them(row: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has 1 rows"):
        ((found,),) = drawn(mixing(tmp_path / "r", [row]))
    assert (found["query"], found["response"], found["tools"]) == ("Hi", "Ho", None)


def test_named_columns_are_read_from_a_table(tmp_path: Path) -> None:
    part = {"name": "t", "share": 0.5, "file": "t.csv", "query": "ask", "response": "say"}
    recipe = mixing(tmp_path / "r", CHATS, part)
    (tmp_path / "r" / "t.csv").write_text("ask;say\nHi, you;Ho\n", encoding="utf-8")
    ((found,),) = drawn(recipe, own=1)
    assert (found["query"], found["response"]) == ("Hi, you", "Ho")


@pytest.mark.filterwarnings("ignore:The part")
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [user("Hi")]}, "row 2: expected an answer at the end, found .* 'user'"),
        (
            {"messages": [{"role": "assistant", "content": "Ho"}]},
            "before the answer, found nothing",
        ),
        ({"messages": [user(" "), {"role": "assistant", "content": "Ho"}]}, "to answer is empty"),
        ({"messages": [user("Hi"), {"role": "assistant", "content": ""}]}, "answer is empty"),
        ({"messages": None}, "row 2: expected a list of messages, found None"),
        ({"messages": [user("Hi"), {"role": "x", "content": ""}]}, "expected a role of"),
        ({"messages": chat(1)["messages"], "tools": "no"}, "row 2: "),
    ],
)
def test_a_row_that_cannot_be_read_is_named(row: Any, said: str, tmp_path: Path) -> None:
    recipe = mixing(tmp_path / "r", [chat(0), row])
    with pytest.raises(RecipeError, match=f"'general' of the mix, .*{said}"):
        drawn(recipe)


def test_a_folder_of_tables_has_no_keys_that_its_rows_lack(tmp_path: Path) -> None:
    calls = [{"name": "find", "arguments": {"id": 1}}, {"name": "ask", "arguments": {"who": "me"}}]
    spoken = [{**SPOKEN, "tool_calls": [{"function": call}]} for call in calls]
    rows = [{"messages": [user(f"Do {n}"), one]} for n, one in enumerate(spoken)]
    source = tmp_path / "chats" / "data"
    source.mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(source / "train-00000-of-00001.parquet")
    part = {"name": "general", "share": 0.2, "path": str(tmp_path / "chats"), "license": "mit"}
    recipe = mixing(tmp_path / "r", CHATS, part)
    (found,) = drawn(recipe, own=8)
    assert {row["response"] for row in found} == {write_calls("Ah.", [Call(**c)]) for c in calls}
    assert recipe.mix[0].described == "chats"
    carried = carried_part(recipe.mix[0], "general.jsonl")
    assert (carried.path, carried.origin, carried.license) == (None, "chats", "mit")


def test_a_source_that_is_not_as_the_recipe_says_is_an_error(tmp_path: Path) -> None:
    recipe = mixing(tmp_path / "r", [{"text": "Hi"}])
    with pytest.raises(RecipeError, match=r"has no column .*'query and response'.*\['text'\]"):
        drawn(recipe)
    (tmp_path / "r" / "general.jsonl").unlink()
    with pytest.raises(RecipeError, match="is in .*general.jsonl', which isn't there"):
        drawn(recipe)


def test_the_keys_of_a_part_are_checked(tmp_path: Path) -> None:
    assert "exactly one of file, hub, path; found ['file', 'path']" in problem(
        tmp_path / "a", path="x"
    )
    assert "needs a revision" in problem(tmp_path / "b", file=None, hub="me/chats")
    assert "query is a column of texts" in problem(tmp_path / "c", query="q")
    assert "which is missing" in problem(tmp_path / "d", response="r")
    assert "less than 1" in problem(tmp_path / "e", share=1)
    assert "mix.0.share" in problem(tmp_path / "f", share=0)
    assert "Did you mean 'share'" in problem(tmp_path / "g", shore=0.1)
    with pytest.raises(RecipeError, match="name of its own; found twice: .*general"):
        mixing(tmp_path / "h", CHATS, GENERAL, GENERAL)
    half = {**GENERAL, "share": 0.5}
    with pytest.raises(RecipeError, match="add up to less than 1, found 1"):
        mixing(tmp_path / "i", CHATS, half, {**half, "name": "other"})


def test_a_model_answers_queries_alone_and_their_answers_are_left_out(tmp_path: Path) -> None:
    part = {**GENERAL, "model": "openai:base"}
    recipe = mixing(tmp_path / "r", [chat(0), {"messages": [user("Hi")]}], part)
    with pytest.warns(UserWarning, match="the answers at the end of 1 rows are left out"):
        (rows,) = drawn(recipe, own=8)
    assert {row["query"] for row in rows} == {"Hi", "chat 0"}
    assert {row["response"] for row in rows} == {None}
    text = mixing(tmp_path / "s", [{"text": "Hi"}], {**part, "query": "text"})
    assert queries_of(text, own=1) == ["Hi"]


FIND = {"name": "find", "arguments": {"id": 1}}
SPOKEN = {"role": "assistant", "content": " Ah. ", "tool_calls": [{"function": FIND}]}
FOUND = {"role": "tool", "content": "{}"}


@pytest.mark.filterwarnings("ignore:The part")
@pytest.mark.parametrize(
    "messages",
    [
        [user(" Hi\n"), {"role": "assistant", "content": "\n Ho "}],
        [user("Find it"), SPOKEN],
        [user("Find it"), SPOKEN, FOUND, {**SPOKEN, "content": None}],
        [{"role": "system", "content": "S"}, user("a"), chat(1)["messages"][1], user("b"), SPOKEN],
        [user('[{"role": "user"}]'), {"role": "assistant", "content": "Not <b>JSON</b>"}],
        [user("\ud83d"), {"role": "assistant", "content": "half a pair"}],
        [{**user("Hi"), "name": None}, {"role": "assistant", "content": "<tool_call>\n"
          '{"name": "x", "arguments": {}}\n</tool_call>'}],
    ],
)  # fmt: skip
def test_a_row_that_a_release_carries_is_read_as_the_same_row(
    messages: list[dict[str, Any]], tmp_path: Path
) -> None:
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    recipe = mixing(tmp_path / "r", [{"messages": messages, "tools": tools}])
    ((row,),) = drawn(recipe)
    lines = [carried_line(recipe.mix[0], row)]
    part = carried_part(recipe.mix[0], "general.jsonl")
    said = part.model_dump(exclude_defaults=True)
    again = mixing(tmp_path / "s", lines, said)
    assert drawn(again) == [[row]]
    assert carried_part(again.mix[0], "general.jsonl") == part
    assert part.described == "general.jsonl"
    whole = [*mixed_messages(row["query"]), mixed_answer(row["query"], row["response"])]
    assert [one["role"] for one in whole] == [one["role"] for one in messages]


def test_the_digest_follows_what_changes_a_row(tmp_path: Path) -> None:
    recipe = mixing(tmp_path / "r")
    plain = recipe.replace(mix=())
    same = recipe.replace(mix=[{**GENERAL, "license": "mit", "origin": "here"}])
    other = recipe.replace(mix=[{**GENERAL, "share": 0.3}])
    assert len({recipe.digest, plain.digest, other.digest}) == 3
    assert same.digest == recipe.digest
    assert plain.digest == load_recipe(write(tmp_path / "p/r", "Be brief.", QUERIES)).digest
    assert mixing(tmp_path / "s/r", CHATS[:-1]).digest != recipe.digest
    recipe.dump(tmp_path / "copy")
    assert load_recipe(tmp_path / "copy").digest == recipe.digest
    assert recipe.pinned and not recipe.replace(mix=[{**GENERAL, "file": None, "path": "x"}]).pinned


def test_a_releases_mix_reads_no_file_or_dataset_of_yours_unasked(tmp_path: Path) -> None:
    for number, source in enumerate(({"path": "/etc"}, {"hub": "me/x", "revision": "v1"})):
        part = {"name": "general", "share": 0.2, **source}
        home = tmp_path / f"release{number}" / "recipe"
        recipe = mixing(home, CHATS, part)
        (home.parent / "manifest.json").write_text("{}", encoding="utf-8")
        with pytest.raises(RecipeError, match="its mix would be read from .*--trust"):
            load_recipe(home)
        assert load_recipe(home, trust=True).mix == recipe.mix


def test_one_of_several_prompts_chooses_no_answers(tmp_path: Path) -> None:
    folder = write(tmp_path / "two", None, prompts={"[a]": "a"})
    best = {"choose": "best", "judge": {"prompt": "judge.md"}, "sampling": {"n": 2}}
    write(folder / "a", "Help.", **best, queries={"file": "questions.txt"}, response="{{ text }}")
    (folder / "a" / "questions.txt").write_text("Why?\n", encoding="utf-8")
    (folder / "a" / "judge.md").write_text("Rate {{ text }}", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"\['judge', 'choose'\], which would say nothing"):
        load_recipe(folder)


def test_a_recipe_with_a_mix_is_not_one_of_several(tmp_path: Path) -> None:
    folder = write(tmp_path / "two", None, prompts={"[a]": "a"})
    mixing(folder / "a")
    with pytest.raises(RecipeError, match="or a mix: it can't be one of several"):
        load_recipe(folder)

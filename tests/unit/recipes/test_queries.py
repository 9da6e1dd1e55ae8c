"""What a test split can decide is said before it is paid for, and no more of it is bought."""

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, Features, Json, List
from pyarrow.parquet import write_table

from distill_datasets.conversations import from_text
from distill_datasets.errors import RecipeError, SettingsError
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.queries import (
    HeldOutRows,
    keep_for_evidence,
    load_queries,
    require_splits,
)
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.statistics import least_margin, rows_needed
from tests.conftest import edit
from tests.support.conversations import TOOLS, said, talks, user
from tests.support.recipes import any_recipe


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


SPLIT = {"train": 0.5, "validation": 0.1, "test": 0.4}
recipe = partial(any_recipe, split=SPLIT)


def grouped(size: int = 1, **splits: int) -> Dataset:
    """So many groups in each split, of so many rows; the splits take turns."""
    rows = [
        {"query": f"{split} {group} {row}", "group": f"{split} {group}", "split": split}
        for split, groups in splits.items()
        for group in range(groups)
        for row in range(size)
    ]
    return Dataset.from_list(rows[::2] + rows[1::2])


def test_a_split_says_what_it_can_decide() -> None:
    first, head, *rows, lack = HeldOutRows.of(recipe(), grouped(train=90, test=300)).lines()
    assert first.startswith("300 test rows; where teacher and student are equally good")
    assert head.split("  ")[-1].strip() == "least margin of 300 rows"
    for row, share in zip(rows, (0.02, 0.05, 0.1), strict=True):
        needed = rows_needed(0.02, share)
        assert row.split()[:1] == [f"{share:.0%}"] and f" {needed:,} rows " in row
        assert row.endswith(f"{least_margin(300, share):.3f}")
    assert lack.startswith("Too few for a margin of 0.02: 300 rows of about 850. `distill-datasets")
    assert "of which 40% are test rows: about 1,375 more" in lack


def test_rows_of_groups_are_counted_by_the_group() -> None:
    found = HeldOutRows.of(recipe(), grouped(size=15, train=3, test=21)).lines()
    assert found[0].startswith("315 test rows in 21 groups, counted as if alike within")
    assert "21 groups of about 850" in found[-1]


def test_enough_rows_lack_nothing() -> None:
    wide = recipe(margin=0.1)
    held = HeldOutRows.of(wide, grouped(test=100))
    assert held.lack is None and len(held.lines()) == 5


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (recipe(split={"same_rows": True}), "(same_rows): they decide nothing"),
        (recipe(), "no row is in the test split"),
    ],
)
def test_a_split_that_decides_nothing_says_so(asked: Recipe, said: str) -> None:
    (line,) = HeldOutRows.of(asked, grouped(train=9)).lines()
    assert said in line


def test_a_margin_that_no_split_decides_is_to_be_raised() -> None:
    held = HeldOutRows.of(recipe(margin=0.0001), grouped(test=9))
    assert held.lack == "No test split decides a margin of 0.0001: raise it."
    assert "over a million" in held.lines()[2]


def test_only_as_many_test_rows_are_kept_as_the_margin_needs() -> None:
    given = grouped(size=2, train=70, validation=20, test=400)
    wide = recipe(margin=0.05)
    kept = keep_for_evidence(wide, given)
    needed = rows_needed(0.05, 0.05)
    assert needed is not None and needed < 400
    assert Counter(kept["split"]) == {"train": 140, "validation": 40, "test": 2 * needed}
    # In their order, whole groups, and the same ones whatever else is there.
    places = {query: place for place, query in enumerate(given["query"])}
    assert [places[query] for query in kept["query"]] == sorted(map(places.get, kept["query"]))
    assert set(Counter(kept["group"]).values()) == {2}
    again = keep_for_evidence(wide, grouped(size=2, test=400))
    assert set(again["query"]) == {query for query in kept["query"] if query.startswith("test")}


def test_where_there_are_too_few_all_are_asked_and_it_is_said() -> None:
    given = grouped(train=5, test=30)
    with pytest.warns(UserWarning, match="Too few for a margin of 0.02: 30 rows of about 850"):
        assert len(keep_for_evidence(recipe(), given)) == 35


def test_without_a_share_of_test_that_is_what_to_give() -> None:
    none = recipe(split={"train": 0.9, "validation": 0.1, "test": 0.0})
    lack = HeldOutRows.of(none, grouped(train=5, test=3)).lack
    assert lack is not None and "Give test a share in `split:`; or widen" in lack


def test_no_row_is_evidence_where_all_are_trained_on() -> None:
    with pytest.raises(SettingsError, match="no row is held out to be evidence"):
        keep_for_evidence(recipe(split={"same_rows": True}), grouped(train=5))


CALL = {"name": "find_order", "arguments": {"id": "A-1", "deep": {"n": 1}}}
MESSAGES = [
    {"role": "system", "content": "It is Monday."},
    user("Where is my order?"),
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": CALL["name"], "arguments": '{"deep": {"n": 1}, "id": "A-1"}'},
            }
        ],
    },
    {"role": "tool", "content": '{"state": "sent"}', "tool_call_id": "call_1"},
]
PLAIN = {"type": "function", "function": CALL}
SHAREGPT = [
    {"from": "system", "value": "It is Monday."},
    {"from": "human", "value": "Where is my order?"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": '{"state": "sent"}'},
]
FORMS: dict[str, Any] = {
    "OpenAI's": MESSAGES,
    "with nulls and other keys": [
        {**one, "name": None, "weight": 1, "tool_calls": one.get("tool_calls")} for one in MESSAGES
    ],
    "ShareGPT's": SHAREGPT,
    "Hermes'": [
        *SHAREGPT[:2],
        {"from": "gpt", "value": f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"},
        {"from": "tool", "value": '<tool_response>\n{"state": "sent"}\n</tool_response>'},
    ],
    "without ids": [
        *MESSAGES[:2],
        {"role": "assistant", "content": None, "tool_calls": [PLAIN]},
        {"role": "tool", "content": {"state": "sent"}},
    ],
    "in parts": [
        {**one, "content": [{"type": "text", "text": one["content"]}]} for one in MESSAGES
    ],
    "JSON text": json.dumps(MESSAGES),
    "in columns": {
        "role": [one["role"] for one in MESSAGES],
        "content": [one["content"] for one in MESSAGES],
        "tool_calls": [one.get("tool_calls") for one in MESSAGES],
    },
}


def queries(folder: Path) -> list[str]:
    return list(load_queries(load_recipe(folder))["query"])


@pytest.mark.parametrize("form", FORMS)
def test_a_conversation_is_one_text_whatever_its_form(tmp_path: Path, form: str) -> None:
    (text,) = queries(talks(tmp_path / "recipe", [{"messages": FORMS[form]}]))
    assert from_text(text) == MESSAGES


def test_keys_that_parquet_fills_in_are_no_arguments(tmp_path: Path) -> None:
    """Nor are they a message's; a JSON object that is a reference keeps its nulls."""
    import pyarrow as pa

    asked = [
        [user("a"), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "1"}]
        for call in (
            {"name": "find", "arguments": {"id": "A"}},
            {"name": "find", "arguments": {"of": {"size": 0.6}}},
        )
    ]
    rows = [{"messages": one, "answer": {"a": None, "b": 1}} for one in asked]
    write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "prompt.md").write_text("Help.")
    (tmp_path / "recipe.yaml").write_text(
        "name: n\ndescription: d\nteacher: pocket\n"
        "queries: {file: rows.parquet, messages: messages, reference: answer}\n"
    )
    queries = load_queries(load_recipe(tmp_path))
    made = [from_text(one)[1]["tool_calls"][0]["function"]["arguments"] for one in queries["query"]]
    assert made == ['{"id": "A"}', '{"of": {"size": 0.6}}']
    assert queries["reference"] == ['{"a": null, "b": 1}'] * 2


def test_what_datasets_and_parquet_hold_is_read(tmp_path: Path) -> None:
    text = queries(talks(tmp_path / "recipe", [MESSAGES]))
    nested = Dataset.from_list([{"messages": MESSAGES}])
    write_table(nested.data.table, tmp_path / "nested.parquet")
    as_json = Dataset.from_list(
        [{"messages": MESSAGES}], features=Features({"messages": List(Json())})
    )
    as_json.to_parquet(str(tmp_path / "folder" / "data" / "train.parquet"))
    for path in ("nested.parquet", "folder"):
        source = {"path": str(tmp_path / path), "messages": "messages"}
        assert queries(talks(tmp_path / "other", [], queries=source)) == text


def test_a_text_among_conversations_is_a_users_message(tmp_path: Path) -> None:
    rows: list[Any] = [{"messages": "[support] Hi"}, {"messages": user("Hi")}, [user("Hi")]]
    first, *others = map(from_text, queries(talks(tmp_path / "recipe", rows)))
    assert first == [user("[support] Hi")]
    assert others == [[user("Hi")]] * 2


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('[{"role": "user"', "expected messages as JSON, found"),
        ([{"role": "narrator", "content": "Once"}], "expected a role of .* found 'narrator'"),
        ([said("Hello")], "expected a message of a user or a tool at the end"),
        ([user(" ")], "its last message is empty"),
        ([user("\u200b\ufeff ")], "its last message is empty"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "expected text as content"),
        (7, "expected a list of messages, found 7"),
    ],
)
def test_what_is_no_conversation_is_an_error_with_its_row(
    tmp_path: Path, row: Any, says: str
) -> None:
    folder = talks(tmp_path / "recipe", [[user("Hi")], {"messages": row}])
    with pytest.raises(RecipeError, match=f"Query 2: {says}"):
        queries(folder)


def test_an_empty_conversation_is_an_empty_query(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Query 1 is empty"):
        queries(talks(tmp_path / "recipe", [{"messages": None}]))


def test_answers_that_are_there_already_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [[user("Hi"), said("Yes?"), user("Bye"), said("Bye")], [user("Hi")]]
    folder = talks(tmp_path / "recipe", rows)
    with pytest.warns(UserWarning, match="1 messages are left out of 1 of the 2 conversations"):
        first, _ = map(from_text, queries(folder))
    assert first == rows[0][:3]
    talks(folder, rows, turns="all")
    with pytest.warns(UserWarning, match="2 messages .*: every message of an assistant"):
        first, _ = map(from_text, queries(folder))
    assert first == [user("Hi"), user("Bye")]


def test_tools_beside_conversations_that_the_teacher_is_not_given_are_told_of(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    rows = [{"messages": [user("Hi")], "tools": json.dumps(TOOLS)}]
    queries(talks(tmp_path / "with", rows, tools=True))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="the teacher is given none: .* name it as `tools`"):
        queries(talks(tmp_path / "without", rows))


def test_a_tools_message_is_refused_where_every_turn_is_answered(tmp_path: Path) -> None:
    folder = talks(tmp_path / "recipe", [MESSAGES], turns="all", tools=True)
    with pytest.raises(RecipeError, match=r"Query 1: a tool's message answers a call that the"):
        queries(folder)


def test_references_of_calls_are_written_as_answers_are(tmp_path: Path) -> None:
    rows = [
        {"messages": [user("A-1")], "right": [PLAIN]},
        {"messages": [user("A-2")], "right": json.dumps([CALL])},
        {"messages": [user("Hi")], "right": []},
    ]
    source = {"file": "queries.jsonl", "messages": "messages", "reference": "right"}
    folder = talks(tmp_path / "recipe", rows, queries=source, tools=True)
    written = '[{"name": "find_order", "arguments": {"deep": {"n": 1}, "id": "A-1"}}]'
    assert load_queries(load_recipe(folder))["reference"][:] == [written, written, "[]"]
    talks(folder, [{**rows[0], "right": "ask back"}], queries=source, tools=True)
    with pytest.raises(RecipeError, match="Reference 1: expected a list of calls"):
        queries(folder)
    talks(folder, [{**rows[0], "right": {"name": "find_oder"}}], queries=source, tools=True)
    with pytest.raises(RecipeError, match="Reference 1: there is no tool 'find_oder'"):
        queries(folder)


def test_a_tools_message_needs_a_call_before_it(tmp_path: Path) -> None:
    rows = [[user("Hi"), {"role": "tool", "content": "sent"}]]
    with pytest.raises(RecipeError, match="Query 1: expected a call of the assistant before"):
        queries(talks(tmp_path / "recipe", rows))


def test_checks_and_examples_of_tools_that_are_not_there_are_said(tmp_path: Path) -> None:
    checks = [{"name": "looks", "calls": "find_oder"}]
    folder = talks(tmp_path / "recipe", [[user("Hi")]], tools=True, checks=checks)
    with pytest.raises(RecipeError, match="The check 'looks': there is no tool 'find_oder'"):
        queries(folder)
    talks(folder, [[user("Hi")]], tools=True, examples="examples.jsonl")
    for response, says in (
        ('<tool_call>{"name": "find_oder"}</tool_call>', "there is no tool 'find_oder'"),
        ("<tool_call>{</tool_call>", "its calls can't be read"),
    ):
        (folder / "examples.jsonl").write_text(json.dumps({"query": "a", "response": response}))
        with pytest.raises(RecipeError, match=f"row 1: {says}"):
            queries(folder)


def test_a_missing_column_is_named_by_its_own_key(tmp_path: Path) -> None:
    source = {"file": "queries.jsonl", "messages": "message"}
    folder = talks(tmp_path / "recipe", [[user("Hi")]], queries=source)
    with pytest.raises(RecipeError, match=r"queries\.messages.*Did you mean 'messages'"):
        queries(folder)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("tools", TOOLS, "tools: expected text"),
        ("student", "[desk]", "student: expected a mapping"),
        ("mix", {"name": "general"}, "mix: expected a list"),
        ("checks", [{"name": "a", "jsn": True}], "Did you mean 'json'.*characters, json, fields"),
        ("keep", ["x"], r"or 'all checks'\.$"),
    ],
)
def test_a_key_of_another_kind_is_said_in_yamls_words(
    tmp_path: Path, key: str, value: Any, says: str
) -> None:
    folder = talks(tmp_path / "recipe", [[user("Hi")]])
    fields = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**fields, key: value}))
    with pytest.raises(RecipeError, match=says):
        load_recipe(folder)

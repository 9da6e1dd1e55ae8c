"""What is written in a file is what is read."""

import json
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from distill_datasets.errors import RecipeError
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.queries import load_queries
from distill_datasets.recipes.user_files import TableFormat, read_rows, read_yaml


def recipe_with(folder: Path, name: str, more: str = "", answer: str = "{}") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "prompt.md").write_text("Be brief.")
    (folder / "recipe.yaml").write_text(
        "name: n\ndescription: d\nteacher: pocket\n"
        f"queries: {{file: {name}, query: query, reference: reference{more}}}\nanswer: {answer}\n"
    )
    return folder


def pairs(folder: Path, name: str, content: bytes | str, more: str = "") -> list[tuple[str, ...]]:
    """The queries of a file with their references."""
    recipe_with(folder, name, more)
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(data)
    rows = load_queries(load_recipe(folder))
    return list(zip(rows["query"], rows["reference"], strict=True))


@pytest.mark.parametrize(
    "cell",
    ["00123", "3.10", "NA", "None", "null", "nan", "true", "FALSE", "98765432109876543210", "1e5"]
    + ["2024-03-01", "0x1f", "1_000", "+49 30", " padded ", "-0"],
)
def test_a_cell_of_a_csv_file_is_the_text_that_is_written(tmp_path: Path, cell: str) -> None:
    content = f"query,reference\n{cell},{cell}\nplain,\n"
    assert pairs(tmp_path, "q.csv", content) == [(cell, cell), ("plain", None)]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_the_one_that_gives_the_columns(tmp_path: Path, separator: str) -> None:
    content = f"query{separator}reference\na b{separator}c\n"
    assert pairs(tmp_path, "q.csv", content) == [("a b", "c")]
    assert pairs(tmp_path, "q.csv", f"sep={separator}\n{content}") == [("a b", "c")]


def test_a_header_that_could_be_read_in_two_ways_asks_for_the_separator(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"name which, as `separator` under `queries`"):
        pairs(tmp_path, "q.csv", "who,what;when\na,b;c\n")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["q.csv", "q.jsonl", "q.json"])
def test_an_encoding_is_found_and_a_mark_is_no_character(
    tmp_path: Path, encoding: str, name: str
) -> None:
    row = {"query": "Grüße, naïve", "reference": "ß"}
    text = {
        "q.csv": 'query,reference\r\n"Grüße, naïve",ß\r\n',
        "q.jsonl": json.dumps(row, ensure_ascii=False) + "\r\n",
        "q.json": json.dumps([row], ensure_ascii=False),
    }[name]
    assert pairs(tmp_path, name, text.encode(encoding)) == [("Grüße, naïve", "ß")]


@pytest.mark.parametrize("name", ["q.csv", "q.tsv", "q.jsonl", "q.json", "q.txt"])
def test_other_bytes_are_an_error_that_says_which_key_names_the_encoding(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(RecipeError, match="line 2 holds other bytes.*encoding: cp1252.*'Café"):
        pairs(tmp_path, name, "query,reference\nCafé,x\n".encode("latin-1"))


def test_an_encoding_that_is_named_is_used(tmp_path: Path) -> None:
    content = "query;reference\nžlutý kůň;x\n".encode("cp1250")
    assert pairs(tmp_path, "q.csv", content, ", encoding: cp1250") == [("žlutý kůň", "x")]
    with pytest.raises(RecipeError, match="no encoding 'cp12520'"):
        pairs(tmp_path, "q.csv", content, ", encoding: cp12520")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("query,reference\na,b\nWell, then,c\n", "Line 3 of .* has 3 fields, and the header 2"),
        ("query,reference\na\n", "Line 2 of .* has 1 fields"),
        ('query,reference\na,b\n"open,c\nd,e\n', "Line 3 of .*unexpected end of data"),
        ('query,reference\n"a"b,c\n', "Line 2 of .*expected after"),
        ("query,query,reference\na,b,c\n", "several columns of one name: .'query'."),
    ],
)
def test_a_row_that_does_not_fit_is_named_by_its_line(
    tmp_path: Path, content: str, said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        pairs(tmp_path, "q.csv", content)


def test_rows_that_a_spreadsheet_leaves_empty_are_none(tmp_path: Path) -> None:
    table = b"query;reference;\r\nfirst;a;\r\n;;\r\nsecond;b;\r\n;;\r\n;;\r\n"
    assert pairs(tmp_path, "q.csv", table) == [("first", "a"), ("second", "b")]


def test_rows_beside_the_queries_keep_their_places_where_they_are_empty(tmp_path: Path) -> None:
    (tmp_path / "more.csv").write_text("reference,group\na,x\n,\nb,x\n,\n", encoding="utf-8")
    folder = recipe_with(tmp_path, "q.csv", ", sidecar: more.csv")
    (folder / "q.csv").write_text("query\none\ntwo\nthree\nfour\n", encoding="utf-8")
    assert load_queries(load_recipe(folder))["reference"] == ["a", None, "b", None]


def test_rows_that_are_named_by_number_are_counted_with_empty_ones(tmp_path: Path) -> None:
    folder = recipe_with(tmp_path, "q.csv", ", rows: [1, 3]")
    (folder / "q.csv").write_text("query,reference\none,x\n,\nthree,x\nfour,x\n", encoding="utf-8")
    assert load_queries(load_recipe(folder))["query"] == ["one", "three"]


def test_a_quoted_field_keeps_its_lines_quotes_and_separators(tmp_path: Path) -> None:
    content = 'query,reference\r\n"one\r\ntwo, ""three""",x\r\n\r\n'
    assert pairs(tmp_path, "q.csv", content) == [('one\r\ntwo, "three"', "x")]


def test_json_keeps_texts_and_the_digits_of_numbers(tmp_path: Path) -> None:
    rows = '[{"query": 3.10, "reference": "2024-01-05"}, {"query": 12345678901234567890}]'
    assert pairs(tmp_path, "q.json", rows) == [
        ("3.10", "2024-01-05"),
        ("12345678901234567890", None),
    ]


def test_lines_of_text_end_at_line_breaks_alone(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_bytes("\ufeffone\u2028still\r\n two \x0c\x85 \n\n\n".encode())
    (rows,) = read_rows(tmp_path / "q.txt", TableFormat())
    assert [row["text"] for row in rows] == ["one\u2028still", " two \x0c\x85 "]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([True, False], ["true", "false"]),
        ([1, None], ["1", None]),
        ([2.0, 2.5], ["2", "2.5"]),
        ([["b", "a"], []], ['["b", "a"]', "[]"]),
        ([{"k": None}, {"k": "é"}], ['{"k": null}', '{"k": "é"}']),
        ([Decimal("1.50"), None], ["1.50", None]),
        ([date(2024, 1, 5), None], ["2024-01-05", None]),
        ([b"x", "é".encode()], ["x", "é"]),
        (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
        (pa.array(["x", None], pa.large_string()), ["x", None]),
        (pa.array(["x", "y"], pa.string_view()), ["x", "y"]),
        (pa.nulls(2), [None, None]),
    ],
)
def test_references_in_parquet_are_written_as_answers_are(
    tmp_path: Path, values: Any, texts: list[str | None]
) -> None:
    recipe_with(tmp_path, "q.parquet")
    pq.write_table(pa.table({"query": ["a", "b"], "reference": values}), tmp_path / "q.parquet")
    assert load_queries(load_recipe(tmp_path))["reference"][:] == texts


def test_classes_in_parquet_have_their_names(tmp_path: Path) -> None:
    recipe_with(tmp_path, "q.parquet")
    features = Features({"query": Value("string"), "reference": ClassLabel(names=["bad", "good"])})
    rows = Dataset.from_dict({"query": ["a", "b", "c"], "reference": [1, 0, -1]}, features)
    rows.to_parquet(tmp_path / "q.parquet")
    assert load_queries(load_recipe(tmp_path))["reference"][:] == ["good", "bad", None]


def test_bytes_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    recipe_with(tmp_path, "q.parquet")
    table = pa.table({"query": [b"\xff\xfe\x00"], "reference": ["x"]})
    pq.write_table(table, tmp_path / "q.parquet")
    with pytest.raises(RecipeError, match="Query 1: expected text as query, found bytes"):
        load_queries(load_recipe(tmp_path))


@pytest.mark.parametrize(
    "value",
    [
        [{"role": "user", "content": "hi"}],
        {"role": "user", "content": "hi"},
        [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}],
    ],
)
def test_conversations_are_no_queries(tmp_path: Path, value: Any) -> None:
    with pytest.raises(RecipeError, match="expected a text column.*found conversations in 'query'"):
        pairs(tmp_path, "q.jsonl", json.dumps({"query": value, "reference": "x"}))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("boolean", [True, False]),
        ("number", [1, 2.5]),
        ("array", [["a", "b"], []]),
        ("object", [{"b": 1.0, "a": None}, {}]),
        ("string", ["a", " é "]),
    ],
)
def test_a_teacher_that_answers_what_the_file_says_is_right(
    tmp_path: Path, kind: str, values: list[Any]
) -> None:
    form = {"type": "object", "properties": {"v": {"type": kind}}}
    answer = json.dumps({"json_schema": form, "field": "v"})
    recipe_with(tmp_path, "q.json", answer=answer)
    rows = [{"query": f"q{n}", "reference": value} for n, value in enumerate(values)]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    recipe = load_recipe(tmp_path)
    said = [recipe.teacher_reader.read(json.dumps({"v": value}), "stop") for value in values]
    references = load_queries(recipe)["reference"][:]
    assert [one.answer for one in said] == [text.strip() for text in references]


def test_one_and_one_point_nought_are_one_answer(tmp_path: Path) -> None:
    form = json.dumps({"json_schema": {"type": "object"}, "field": "v"})
    reader = load_recipe(_with_row(tmp_path, form)).teacher_reader
    assert reader.read('{"v": 1}', "stop") == reader.read('{"v": 1.0}', "stop")


def _with_row(folder: Path, answer: str) -> Path:
    recipe_with(folder, "q.jsonl", answer=answer)
    (folder / "q.jsonl").write_text('{"query": "a", "reference": 1.0}\n')
    return folder


def test_cells_of_a_workbook_are_as_they_are_shown(tmp_path: Path) -> None:
    from openpyxl import Workbook

    book = Workbook()
    sheet = book.active
    sheet.append(["query", "reference"])
    sheet.append(["00123", 123])
    sheet.append([7, 2.5])
    sheet.append([datetime(2024, 3, 1), True])
    sheet["B2"].number_format = "00000"
    sheet["B3"].number_format = "0.00"
    book.save(tmp_path / "q.xlsx")
    recipe_with(tmp_path, "q.xlsx")
    rows = load_queries(load_recipe(tmp_path))
    assert rows["query"][:] == ["00123", "7", "2024-03-01"]
    assert rows["reference"][:] == ["00123", "2.50", "true"]


def test_a_number_that_a_workbook_has_rounded_is_an_error(tmp_path: Path) -> None:
    from openpyxl import Workbook

    book = Workbook()
    for row in (["query", "reference"], [12345678901234567890, "x"]):
        book.active.append(row)
    book.save(tmp_path / "q.xlsx")
    recipe_with(tmp_path, "q.xlsx")
    with pytest.raises(RecipeError, match="Cell A2 .* rounded away: format the column as text"):
        load_queries(load_recipe(tmp_path))


@pytest.mark.parametrize("schema", [True, False])  # of Arrow's own, which keeps dictionaries
@pytest.mark.parametrize("kind", ["text", "list", "struct"])
def test_a_small_parquet_file_of_endless_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, schema: bool
) -> None:
    monkeypatch.setattr("distill_datasets.parquet._MOST_READ", (1_000_000, 1_000))
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 100), pa.array(["x" * 100_000]))
    column = {
        "text": texts,
        "list": pa.ListArray.from_arrays(list(range(101)), texts),
        "struct": pa.StructArray.from_arrays([texts], ["content"]),
    }[kind]
    table = pa.table({"query": column, "reference": ["y"] * 100})
    pq.write_table(table, tmp_path / "q.parquet", compression="zstd", store_schema=schema)
    assert (tmp_path / "q.parquet").stat().st_size < 2_000
    recipe_with(tmp_path, "q.parquet")
    with pytest.raises(RecipeError, match="unpacks to .* bytes in memory: .* It is not read"):
        load_queries(load_recipe(tmp_path))


def test_a_parquet_file_of_more_rows_than_bytes_is_refused(tmp_path: Path) -> None:
    count = 11_000_000
    table = pa.table({"query": pa.nulls(count, pa.string()), "reference": pa.nulls(count)})
    pq.write_table(table, tmp_path / "q.parquet", compression="zstd")
    recipe_with(tmp_path, "q.parquet")
    with pytest.raises(RecipeError, match="unpacks to 11,000,000 rows"):
        load_queries(load_recipe(tmp_path))


def test_a_folder_of_csv_files_is_text_too(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("query,reference\n007,NA\n")
    folder = recipe_with(tmp_path / "recipe", "x.csv")
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("file: x.csv", f"path: {tmp_path / 'data'}"))
    rows = load_queries(load_recipe(folder))
    assert (rows["query"][:], rows["reference"][:]) == (["007"], ["NA"])


def test_rows_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"names rows \[3\]"):
        pairs(tmp_path, "q.jsonl", '{"query": "a"}\n{"query": "b"}\n', ", rows: [2, 3]")


@pytest.mark.parametrize(("text", "found"), [("", "nothing"), ("- one\n", "a list"), ("a", "text")])
def test_what_yaml_holds_in_the_place_of_keys_is_named(
    text: str, found: str, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=f"expected keys and values.*found {found}"):
        read_yaml(file)

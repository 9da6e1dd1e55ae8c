"""Tools of a recipe, and tools imported from other forms."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from distill_datasets.errors import RecipeError
from distill_datasets.recipes.parsing import Reader
from distill_datasets.recipes.tools import (
    _check_parameters,
    checked_tools,
    import_tools,
    read_tools,
)

ORDER = {
    "name": "find_order",
    "description": "Finds an order.",
    "parameters": {
        "type": "object",
        "properties": {"id": {"type": "string"}, "lines": {"type": "integer"}},
        "required": ["id"],
    },
}
PET = {"$ref": "#/components/schemas/Pet"}
PETS: dict[str, Any] = {
    "openapi": "3.0.3",
    "paths": {
        "/pets/{id}": {
            "parameters": [{"$ref": "#/components/parameters/Id"}],
            "get": {"operationId": "getPet", "summary": "One pet.", "description": "By its id."},
            "put": {
                "requestBody": {"$ref": "#/components/requestBodies/Pet"},
                "responses": {200: {"description": "ok"}},
            },
        },
        "/pets": {
            "get": {
                "operationId": "pets/list",
                "parameters": [
                    {"name": "limit", "in": "query", "description": "How many.", "schema": {
                        "type": "integer", "minimum": 0, "exclusiveMinimum": True, "example": 3}},
                ],
            },
            "x-note": "not a method",
        },
    },
    "components": {
        "parameters": {
            "Id": {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
        },
        "requestBodies": {
            "Pet": {"content": {"application/json": {"schema": PET}}}
        },
        "schemas": {
            "Pet": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"type": "string", "nullable": True},
                    "parent": {"$ref": "#/components/schemas/Pet"},
                    "kind": {"$ref": "#/components/schemas/Kind"},
                },
            },
            "Kind": {"type": "string", "enum": ["cat", "dog"]},
            "Unused": {"type": "string"},
        },
    },
}  # fmt: skip


def saved(tmp_path: Path, value: Any, name: str = "tools.json") -> Path:
    path = tmp_path / name
    write = yaml.safe_dump if name.endswith("yaml") else json.dumps
    path.write_text(write(value), encoding="utf-8")
    return path


def test_references_of_a_bundled_document_reach_into_lists_and_escaped_paths(
    tmp_path: Path,
) -> None:
    first = {"$ref": "#/paths/~1pets~1%7Bid%7D/get/parameters/0"}
    get = {"operationId": "one", "parameters": [PETS["components"]["parameters"]["Id"]]}
    document = {"paths": {"/pets/{id}": {"get": get, "put": {"operationId": "two",
        "parameters": [first]}}}}  # fmt: skip
    one, two = import_tools(saved(tmp_path, document))
    assert two["function"]["parameters"] == one["function"]["parameters"]
    assert set(one["function"]["parameters"]["properties"]) == {"id"}


def test_tools_are_read_in_one_form_whatever_stands_around_their_functions(tmp_path: Path) -> None:
    bare = {"name": "ping"}
    tools = json.loads(read_tools(saved(tmp_path, [{"type": "function", "function": ORDER}, bare])))
    assert tools[0] == {"type": "function", "function": ORDER}
    assert tools[1]["function"]["parameters"] == {"type": "object", "properties": {}}


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ({"tools": []}, "expected a list of tools"),
        ([], "expected a list of tools"),
        ([{"name": "a b"}], "tool 1: expected a function with a name"),
        ([ORDER, ORDER], "several tools of one name"),
        ([{"name": "a", "parameters": {"type": "strin"}}], "tool 1 .a.: not a JSON schema"),
        ([{"name": "a", "inputSchema": {}}], "tool 1 .a.: expected `parameters`.*tools import"),
        ([{"name": "a", "parameters": {"pattern": "("}}], "regular expression|not a .regex."),
    ],
)
def test_what_is_no_list_of_tools_is_said(tmp_path: Path, tools: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        read_tools(saved(tmp_path, tools))


@pytest.mark.parametrize(
    ("text", "answer", "rejection"),
    [
        ("There is none.", "[]", None),
        (
            'Hm.<tool_call>{"name": "find_order", "arguments": {"lines": 2.0, "id": "a"}}'
            "</tool_call>",
            '[{"name": "find_order", "arguments": {"id": "a", "lines": 2}}]',
            None,
        ),
        ('<tool_call>{"name": "find", "arguments": {}}</tool_call>', None, "unknown tool"),
        ('<tool_call>{"name": "find_order", "arguments": {}}</tool_call>', None, "off schema"),
        ('<tool_call>{"name": "find_order"', None, "unparsable"),
        *(
            (
                f'<tool_call>{{"name": "find_order", "arguments": {{"id": "a", "x": {number}}}}}'
                "</tool_call>",
                None,
                "off schema",
            )
            for number in ("9223372036854775808", "NaN", "[-1e999]")
        ),
    ],
)
def test_the_answer_is_the_calls_that_fit_their_schemas(
    tmp_path: Path, text: str, answer: str | None, rejection: str | None
) -> None:
    found = Reader(tools=read_tools(saved(tmp_path, [ORDER]))).read(text, "stop")
    assert (found.answer, found.rejection) == (answer, rejection)


@pytest.mark.parametrize("name", ["api.yaml", "api.json"])
def test_operations_of_an_openapi_document_become_tools(tmp_path: Path, name: str) -> None:
    tools = {
        one["function"]["name"]: one["function"]
        for one in import_tools(saved(tmp_path, PETS, name))
    }
    assert sorted(tools) == ["getPet", "pets_list", "put_pets_id"]
    assert tools["getPet"]["description"] == "One pet.\nBy its id."
    assert tools["getPet"]["parameters"]["required"] == ["id"]
    limit = tools["pets_list"]["parameters"]["properties"]["limit"]
    assert limit == {"type": "integer", "exclusiveMinimum": 0, "description": "How many."}
    pet = tools["put_pets_id"]["parameters"]
    assert sorted(pet["properties"]) == ["id", "kind", "name", "parent"]
    assert (sorted(pet["$defs"]), sorted(pet["required"])) == (["Kind", "Pet"], ["id", "name"])
    valid = Draft202012Validator(pet)
    assert valid.is_valid({"id": "1", "name": None, "parent": {"name": "x", "kind": "cat"}})
    assert not valid.is_valid({"id": "1", "name": "x", "parent": {"name": "y", "kind": "cow"}})


@pytest.mark.parametrize(
    "around", [lambda one: one, lambda one: {"result": one}, lambda one: one["tools"]]
)
def test_what_an_mcp_server_lists_becomes_tools(tmp_path: Path, around: Any) -> None:
    listed = {"tools": [{"name": "find_order", "title": "t", "description": "Finds an order.",
                         "inputSchema": ORDER["parameters"], "annotations": {}}]}  # fmt: skip
    assert import_tools(saved(tmp_path, around(listed))) == [
        {"type": "function", "function": ORDER}
    ]


def test_one_page_of_an_mcp_servers_list_is_said_to_be_one(tmp_path: Path) -> None:
    listed = {"tools": [{"name": "a", "inputSchema": {"type": "object"}}], "nextCursor": "p2"}
    with pytest.warns(UserWarning, match="one page .* cursor 'p2'"):
        import_tools(saved(tmp_path, listed))


def test_arguments_keep_names_that_schemas_have_too(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {
        "example": {"type": "string", "example": "dog", "default": {"example": 1}},
        "x-id": {"type": "integer"}}}  # fmt: skip
    body = {"in": "body", "name": "pet", "schema": schema}
    picture = {"in": "formData", "name": "picture", "type": "file"}
    operation = {"operationId": "add", "parameters": [body, picture]}
    paths = {"swagger": "2.0", "paths": {"/pet": {"post": operation}}}
    (tool,) = import_tools(saved(tmp_path, paths))
    assert tool["function"]["parameters"]["properties"] == {
        "body": {"type": "object", "properties": {
            "example": {"type": "string", "default": {"example": 1}}, "x-id": {"type": "integer"}}},
        "picture": {"type": "string"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"info": {}}, "expected an OpenAPI document"),
        ({"paths": {}}, "has no tools"),
        ({"paths": {"/a": {"get": {"parameters": [{"$ref": "other.yaml#/x"}]}}}}, "bundle it"),
        ({"paths": {"/a": {"get": {"parameters": [{"$ref": "#/tags/x"}]}}}, "tags": []}, "bundle"),
        ({"paths": {"/a": {"$ref": "#/x"}}, "x": None}, "bundle"),
        ({"paths": {"/a": {"$ref": "#/paths/~1a"}}}, "circle"),
        (
            {"paths": {"/a": {"get": {"parameters": [
                {"name": "x", "in": "query", "schema": {"$ref": "#/components/schemas/No"}}]}}}},
            "'No', which it lacks",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_said(tmp_path: Path, given: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        import_tools(saved(tmp_path, given))


@pytest.mark.parametrize("read", [read_tools, import_tools])
def test_bytes_that_are_no_text_are_not_said_to_be_wrong_json(tmp_path: Path, read: Any) -> None:
    path = tmp_path / "tools.json"
    path.write_bytes('[{"name": "café"}]'.encode("cp1252"))
    with pytest.raises(RecipeError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path} is not UTF-8: line 1 holds other bytes.")


def test_a_schema_is_made_ready_once_however_many_readers_there_are() -> None:
    catalogue = [{"name": f"tool_{n}", "parameters": ORDER["parameters"]} for n in range(3)]
    tools = json.dumps([{"type": "function", "function": one} for one in catalogue])
    readers = [Reader(tools=tools), Reader(tools=tools, untyped=True), Reader(json_schema="{}")]
    kinds = {type(one) for reader in readers for one in [*reader._tools.values()]}

    assert len(kinds) == 1


def test_tools_that_come_with_every_request_are_checked_once() -> None:
    tool = {"name": "ask", "parameters": {"type": "object", "title": "checked once"}}
    before = _check_parameters.cache_info()
    for _ in range(3):
        checked_tools([tool], "tools")
    after = _check_parameters.cache_info()

    assert (after.misses - before.misses, after.hits - before.hits) == (1, 2)


def test_a_schema_that_is_nested_without_end_is_named() -> None:
    deep: dict[str, Any] = {}
    for _ in range(2_000):
        deep = {"items": deep}
    with pytest.raises(RecipeError, match="tools, tool 1 .deep."):
        checked_tools([{"name": "deep", "parameters": deep}], "tools")

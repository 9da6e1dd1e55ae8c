"""A recipe's tools: a JSON file of their schemas, in OpenAI's form."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from distill_datasets.errors import RecipeError
from distill_datasets.recipes.parsing import check_schema
from distill_datasets.recipes.query_files import read_text

_LIMIT = 4 << 20  # bytes
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


def read_tools(path: Path) -> str:
    """The tools in a file, as JSON text in one form.

    Raises `RecipeError` that names the tool, for what is no list of tools with JSON schemas.
    """
    if not path.is_file():
        raise RecipeError(f"The recipe names the tools {path.name!r}, which isn't there.")
    text = read_text(path, limit=_LIMIT)
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{str(path)!r} is not JSON: {error}.") from error
    if not isinstance(given, list) or not given:
        raise RecipeError(
            f"{str(path)!r}: expected a list of tools in OpenAI's form, found {given!r:.200}. "
            "`distill-datasets tools import` makes one of an OpenAPI document or of what an MCP "
            "server lists."
        )
    return json.dumps(checked_tools(given, str(path)), ensure_ascii=False)


def check_names(named: Iterable[str], tools: str) -> None:
    """Raise `ValueError` for a name that none of the tools (JSON text) has."""
    known = [one["function"]["name"] for one in json.loads(tools)]
    if unknown := next((name for name in named if name not in known), None):
        raise ValueError(f"there is no tool {unknown!r}, expected one of {known}")


def checked_tools(given: Sequence[Any], where: str) -> list[dict[str, Any]]:
    """Tools in one form, each with a name of its own; raises `RecipeError` that names the tool."""
    tools = [_tool(one, f"{where}, tool {place}") for place, one in enumerate(given, 1)]
    names = [tool["function"]["name"] for tool in tools]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"{where!r} has several tools of one name: {twice}. Rename them.")
    return tools


@lru_cache(maxsize=1_000)  # an application sends the same tools with every request
def _check_parameters(schema: str) -> None:
    check_schema(json.loads(schema))


def _tool(given: Any, where: str) -> dict[str, Any]:
    """A tool in one form; around the function may be `{"type": "function"}`, or nothing."""
    function = given.get("function", given) if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or not _NAME.fullmatch(str(function.get("name", ""))):
        raise RecipeError(
            f"{where}: expected a function with a name of letters, digits, '_', '.' and '-', "
            f"found {given!r:.200}."
        )
    if other := sorted({"inputSchema", "input_schema", "parametersJsonSchema"} & {*function}):
        raise RecipeError(
            f"{where} ({function['name']}): expected `parameters`, its JSON schema, found "
            f"{other[0]!r}, which is another form: `distill-datasets tools import` converts what "
            "an MCP server lists."
        )
    parameters = function.get("parameters") or NO_PARAMETERS
    try:
        _check_parameters(json.dumps(parameters, default=str))
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise RecipeError(f"{where} ({function['name']}): {error}.") from error
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "description": str(function.get("description") or ""),
            "parameters": parameters,
        },
    }

"""A recipe's tools: a JSON file of their schemas, in OpenAI's form; made of documents of others.

An OpenAPI document, or what an MCP server lists, becomes such tools.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from warnings import warn

from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from distill_datasets.errors import RecipeError
from distill_datasets.recipes.parsing import check_schema
from distill_datasets.recipes.user_files import read_text, read_yaml

_LIMIT, _DOCUMENT = 4 << 20, 32 << 20  # bytes of tools, and of a document
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


def read_tools(path: Path) -> str:
    """The tools in a file, as JSON text in one form.

    Raises `RecipeError` that names the tool, for what is no list of tools with JSON schemas.
    """
    given = _read_json(path, _LIMIT)
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


def import_tools(source: Path) -> list[dict[str, Any]]:
    """The tools in an OpenAPI document (JSON or YAML), or in a list of an MCP server's.

    A list may be what `tools/list` answers, or tools in OpenAI's or Anthropic's form. An operation
    of OpenAPI becomes a tool: its parameters and the fields of its JSON body are the arguments, and
    the schemas that these refer to come along as `$defs`. Raises `RecipeError` for anything else.
    """
    if not source.is_file():
        raise RecipeError(f"There is no file {str(source)!r} to import tools from.")
    if source.suffix.lower() in (".yaml", ".yml"):
        given: Any = read_yaml(source, limit=_DOCUMENT)
    else:
        given = _read_json(source, _DOCUMENT)
    if isinstance(given, Mapping) and isinstance(given.get("result"), Mapping):
        given = given["result"]
    if isinstance(given, Mapping) and isinstance(given.get("paths"), Mapping):
        found = list(_operations(given))
    else:
        found = [_listed(one) for one in _list_in(given, source)]
    if not found:
        raise RecipeError(f"{str(source)!r} has no tools.")
    return checked_tools(found, str(source))


def _list_in(given: Any, source: Path) -> Sequence[Any]:
    """The list of tools that a file is, or that it has under `tools`."""
    listed = given.get("tools") if isinstance(given, Mapping) else given
    if not isinstance(listed, list):
        found = f"the keys {sorted(map(str, given))}" if isinstance(given, Mapping) else repr(given)
        raise RecipeError(
            f"{str(source)!r}: expected an OpenAPI document (with paths) or a list of tools, as an "
            f"MCP server's tools/list answers; found {found:.200}."
        )
    if isinstance(given, Mapping) and given.get("nextCursor"):
        warn(
            f"{str(source)!r} is one page of the server's list: more tools come with its cursor "
            f"{str(given['nextCursor'])[:80]!r}. Put all pages' `tools` into one list.",
            stacklevel=3,
        )
    return listed


def _read_json(path: Path, limit: int) -> Any:
    try:
        return json.loads(read_text(path, limit=limit))
    except (ValueError, RecursionError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{str(path)!r} is not JSON: {error}. YAML ends in .yaml.") from error


def _listed(given: Any) -> Any:
    """A tool of a list, whose schema may have one of three names."""
    if not isinstance(given, Mapping) or "function" in given:
        return given
    schema = next(
        (given[key] for key in ("parameters", "inputSchema", "input_schema") if key in given), None
    )
    about = given.get("description") or given.get("title")
    return {"name": _plain(str(given.get("name", ""))), "description": about, "parameters": schema}


def _plain(name: str) -> str:
    """A name of the characters that a tool's may have."""
    return re.sub(r"_*[^A-Za-z0-9_.-]+", "_", name).strip("_")[:64]


_METHODS = ("get", "put", "post", "delete", "patch", "head", "options", "trace")


def _operations(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    resolve = _Resolver(document)
    for path, item in document["paths"].items():
        shared = resolve.whole(item)
        for method in _METHODS:
            operation = shared.get(method)
            if not isinstance(operation, Mapping):
                continue
            name = operation.get("operationId") or f"{method}_{path}"
            said = [operation.get("summary"), operation.get("description")]
            both = [*shared.get("parameters", ()), *operation.get("parameters", ())]
            parameters = [resolve.whole(one) for one in both]
            body = resolve.whole(operation.get("requestBody") or {})
            yield {
                "name": _plain(str(name)),
                "description": "\n".join(dict.fromkeys(str(text).strip() for text in said if text)),
                "parameters": _arguments(parameters, body, resolve),
            }


def _arguments(
    parameters: Sequence[Mapping[str, Any]], body: Mapping[str, Any], resolve: "_Resolver"
) -> dict[str, Any]:
    """The JSON schema of an operation's arguments."""
    properties: dict[str, Any] = {}
    required: list[str] = []
    for one in parameters:
        if one.get("in") == "cookie" or "name" not in one:
            continue
        inner = one.get("schema") or _first(one.get("content")).get("schema")
        schema = inner or {k: v for k, v in one.items() if k in _SIMPLE}
        name = "body" if one.get("in") == "body" else str(one["name"])
        properties[name] = _described(resolve.schema(schema), one.get("description"))
        required += [name] if one.get("required") else []
    contents: Any = body.get("content") or {}
    content = contents.get("application/json") or _first(contents)
    if "schema" in content:
        schema = resolve.schema(content["schema"])
        whole = resolve.local(schema)
        fields = whole.get("properties") or {}
        if whole.get("type") == "object" and fields and not {*fields} & {*properties}:
            properties |= fields
            required += list(whole.get("required", ()))
        else:
            properties["body"] = _described(schema, body.get("description"))
            required += ["body"] if body.get("required") else []
    found: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        found["required"] = list(dict.fromkeys(required))
    if defs := resolve.definitions(found):
        found["$defs"] = defs
    return found


def _first(contents: Any) -> Mapping[str, Any]:
    found = next(iter(contents.values()), None) if isinstance(contents, Mapping) else None
    return found if isinstance(found, Mapping) else {}


_SIMPLE = ("type", "format", "enum", "default", "items", "minimum", "maximum", "pattern")
# What a schema of OpenAPI has and a JSON schema doesn't, or that says nothing to a model.
_LEFT_OUT = (
    *("example", "examples", "xml", "externalDocs", "discriminator", "nullable", "deprecated"),
)


def _described(schema: Any, description: Any) -> Any:
    if not description or not isinstance(schema, Mapping) or schema.get("description"):
        return schema
    return {**schema, "description": str(description).strip()}


class _Resolver:
    """Follows the references within an OpenAPI document."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._resolver = (
            Registry().with_resource("", DRAFT202012.create_resource(document)).resolver()
        )
        self._schemas: Mapping[str, Any] = {
            **(document.get("definitions") or {}),
            **((document.get("components") or {}).get("schemas") or {}),
        }

    def whole(self, part: Any) -> Mapping[str, Any]:
        """What a part of the document is, where it may be a reference to another."""
        for _ in range(10):
            if not isinstance(part, Mapping) or not isinstance(part.get("$ref"), str):
                return part if isinstance(part, Mapping) else {}
            reference, part = part["$ref"], None
            with suppress(Unresolvable, ValueError):  # which a word is as a place in a list
                part = self._resolver.lookup(reference).contents
            if not isinstance(part, Mapping):
                raise RecipeError(
                    f"The document refers to {reference!r}, which isn't in it: bundle it into one."
                )
        raise RecipeError("The document's references go in a circle.")

    def schema(self, given: Any) -> Any:
        """A schema as JSON Schema has it, whose references are to `$defs`."""
        if isinstance(given, list):
            return [self.schema(one) for one in given]
        if not isinstance(given, Mapping):
            return given
        found = {
            key: self._part(key, value)
            for key, value in given.items()
            if key not in _LEFT_OUT and not str(key).startswith("x-")
        }
        if isinstance(found.get("$ref"), str):
            found["$ref"] = f"#/$defs/{found['$ref'].rsplit('/', 1)[-1]}"
        if given.get("nullable") is True and isinstance(found.get("type"), str):
            found["type"] = [found["type"], "null"]
        for bound in ("exclusiveMinimum", "exclusiveMaximum"):
            plain = bound.removeprefix("exclusive").lower()
            if found.get(bound) is True and plain in found:
                found[bound] = found.pop(plain)
            elif isinstance(found.get(bound), bool):
                del found[bound]
        return found

    def _part(self, key: str, value: Any) -> Any:
        """What stands at a key of a schema: values as they are, schemas by whatever names."""
        if key == "type" and value == "file":  # of Swagger 2
            return "string"
        if key in ("enum", "const", "default"):
            return value
        if key in ("properties", "patternProperties", "$defs") and isinstance(value, Mapping):
            return {name: self.schema(one) for name, one in value.items()}
        return self.schema(value)

    def local(self, schema: Any) -> Mapping[str, Any]:
        """The schema that a reference to `$defs` stands for."""
        name = schema.get("$ref", "") if isinstance(schema, Mapping) else ""
        known = self._schemas.get(name.rsplit("/", 1)[-1]) if name else schema
        found = self.schema(known)
        return found if isinstance(found, Mapping) else {}

    def definitions(self, schema: Any) -> dict[str, Any]:
        """Every schema that this one refers to, directly or not."""
        found: dict[str, Any] = {}
        waiting = [schema]
        while waiting:
            for name in _references(waiting.pop()):
                if name not in self._schemas:
                    raise RecipeError(
                        f"The document refers to the schema {name!r}, which it lacks."
                    )
                if name not in found:
                    found[name] = self.schema(self._schemas[name])
                    waiting.append(found[name])
        return dict(sorted(found.items()))


def _references(schema: Any) -> Iterator[str]:
    """The names of the schemas that one refers to."""
    if isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str):
        yield schema["$ref"].rsplit("/", 1)[-1]
    parts = schema.values() if isinstance(schema, Mapping) else schema
    for part in parts if isinstance(schema, Mapping | list) else ():
        yield from _references(part)

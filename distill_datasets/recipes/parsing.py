"""From a response's text to an answer, or to a rejection with its reason."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

from distill_datasets.schema import whole_text

TRUNCATED = "truncated"
EMPTY = "empty"
UNPARSABLE = "unparsable"
OFF_SCHEMA = "off schema"
OUTSIDE_CHOICES = "outside choices"


@dataclass(frozen=True, slots=True)
class Parsed:
    """Exactly one of the two is set."""

    answer: str | None = None
    rejection: str | None = None


@dataclass(frozen=True)
class Reader:
    """Reads answers out of responses.

    `pattern` is a regular expression with a group named `answer`, searched for in the text;
    None takes the whole text. With `json_schema` (JSON text) what it finds is read as JSON, and
    the answer is the value at `field` (`a.b` lies within `a`), or the whole of it. Text is an
    answer as it is; other values are as JSON, keys in the schema's order. `choices`, when given,
    are the only answers.
    """

    pattern: str | None = None
    choices: tuple[str, ...] = ()
    json_schema: str | None = None
    field: str | None = None

    @property
    def parts(self) -> Sequence[Any]:
        """JSON values that name everything that an answer depends on but the text."""
        form = [] if self.json_schema is None else [self.json_schema, self.field]
        return [self.pattern, self.choices, *form]

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        return re.compile(self.pattern or r"(?s)(?P<answer>.*)")

    @cached_property
    def _schema(self) -> Any:
        return json.loads(self.json_schema or "true")

    @cached_property
    def _validator(self) -> Any:
        return open_validator(self._schema)

    def read(self, text: str, stop_reason: str) -> Parsed:
        """The answer in `text`; a response cut off by the token limit is never an answer."""
        if stop_reason == "length":
            return Parsed(rejection=TRUNCATED)
        if not text.strip():
            return Parsed(rejection=EMPTY)
        match = self._expression.search(text.strip())
        if match is None or not (match["answer"] or "").strip():
            return Parsed(rejection=UNPARSABLE)
        found = match["answer"].strip()
        if self.json_schema is None:
            return self._chosen(found)
        return self._read_json(found)

    def _chosen(self, answer: str) -> Parsed:
        if self.choices and answer not in self.choices:
            return Parsed(rejection=OUTSIDE_CHOICES)
        return Parsed(answer=answer)

    def _read_json(self, text: str) -> Parsed:
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return Parsed(rejection=UNPARSABLE)
        if not self._validator.is_valid(value):
            return Parsed(rejection=OFF_SCHEMA)
        schema = self._schema
        for name in self.field.split(".") if self.field else ():
            if not isinstance(value, dict) or name not in value:
                return Parsed(rejection=OFF_SCHEMA)
            value, schema = value[name], _property(schema, name)
        if value is None or (isinstance(value, str) and not value.strip()):
            return Parsed(rejection=EMPTY)
        if isinstance(value, str):
            return self._chosen(whole_text(value).strip())
        written = json.dumps(_ordered(value, schema), ensure_ascii=False)
        return self._chosen(whole_text(written))


def open_validator(schema: Any) -> Any:
    """Validates values; fetches nothing, so that a schema can only refer to itself."""
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    return validator_for(schema, default=Draft202012Validator)(schema, registry=Registry())


def check_schema(schema: Mapping[str, Any], field: str | None) -> None:
    """Raise `ValueError` for what is no JSON schema, or has no such `field`."""
    from jsonschema.exceptions import SchemaError
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    try:
        open_validator(schema).check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"not a JSON schema: at {error.json_path}, {error.message}") from error
    whole = DRAFT202012.create_resource(schema)
    place = whole.id() or ""
    resolver = Registry().with_resource(place, whole).resolver(place)
    for reference in _references(schema):
        try:
            resolver.lookup(reference)
        except Unresolvable as error:
            raise ValueError(
                f"the schema refers to {reference!r}, which it lacks; define it under $defs"
            ) from error
    for name in field.split(".") if field else ():
        known = schema.get("properties")
        if isinstance(known, Mapping) and name not in known:
            raise ValueError(f"field {field!r}: the schema has no {name!r}, only {sorted(known)}")
        schema = _property(schema, name)


def _references(schema: Any) -> list[str]:
    if isinstance(schema, Mapping):
        own = [schema["$ref"]] if isinstance(schema.get("$ref"), str) else []
        return own + [found for part in schema.values() for found in _references(part)]
    if isinstance(schema, Sequence) and not isinstance(schema, str):
        return [found for part in schema for found in _references(part)]
    return []


def _property(schema: Any, name: str) -> Any:
    found = (schema.get("properties") or {}).get(name) if isinstance(schema, Mapping) else None
    return found or {}


def _ordered(value: Any, schema: Any) -> Any:
    """The same value, its keys in the order of the schema's, then the others' own order sorted.

    A student that learns the whole object learns one order, which is what a strict server keeps.
    """
    if isinstance(value, list):
        items = schema.get("items") if isinstance(schema, Mapping) else None
        return [_ordered(item, items) for item in value]
    if not isinstance(value, dict):
        return value
    known = list((schema.get("properties") or {}) if isinstance(schema, Mapping) else {})
    names = [name for name in known if name in value] + sorted(set(value) - set(known))
    return {name: _ordered(value[name], _property(schema, name)) for name in names}


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")

"""From a response's text to an answer, or to a rejection with its reason."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from math import isfinite
from time import monotonic
from typing import Any, NamedTuple, NoReturn

import regex

from distill_datasets.conversations import calls_text, fitted_calls, read_calls, split_calls
from distill_datasets.schema import whole_text

TRUNCATED = "truncated"
EMPTY = "empty"
UNPARSABLE = "unparsable"
OFF_SCHEMA = "off schema"
OUTSIDE_CHOICES = "outside choices"
UNKNOWN_TOOL = "unknown tool"

_VERSION = 2  # of how JSON is read and written: raise it when answers come out differently
_SECONDS = 1.0  # that one pattern or schema may take on one text
_CHECKING = 30.0  # seconds that a schema itself may take to be checked
_LONGEST = 1_000_000  # characters that a pattern is searched for in
_LARGEST = 100_000  # what the repeats of a pattern may multiply its length to
_EXACT = 2**53  # from here on not every whole number is a float
_FENCE = re.compile(r"^[ \t]*```[\w-]*[ \t]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
_PIECE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]])*\]|\{(\d*)(?:,(\d*))?\}|.", re.DOTALL)
_deadline: ContextVar[float] = ContextVar("deadline")


class Reading(NamedTuple):
    """What became of a text: an answer and the response that is made of it, or a rejection."""

    answer: str | None = None
    response: str | None = None
    rejection: str | None = None


@dataclass(frozen=True)
class Reader:
    """Reads answers out of responses.

    `pattern` is a regular expression with a group named `answer`, searched for in the text;
    None takes the whole text. With `json_schema` (JSON text) what it finds is read as JSON, bare
    or in the one code fence of the text, and the answer is the value at `field` (`a.b` lies within
    `a`), or the whole of it. Text is an answer as it is; other values are as JSON, keys in the
    schema's order. `choices`, when given, are the only answers. With `tools` (JSON text of a list,
    in OpenAI's form) the answer is the calls in the text, as `calls_text` writes them, `[]` for
    none; each must be of a tool that is there, with arguments that fit its schema. They are made to
    fit where they are `untyped`, out of a chat format that writes numbers as texts. `recipe` names
    whose pattern it is, where one takes too long.
    """

    pattern: str | None = None
    choices: tuple[str, ...] = ()
    json_schema: str | None = None
    field: str | None = None
    tools: str | None = None
    untyped: bool = False
    recipe: str = dataclasses.field(default="", compare=False)

    @property
    def parts(self) -> Sequence[Any]:
        """JSON values that name everything that an answer depends on but the text."""
        form = [] if self.json_schema is None else [self.json_schema, self.field, _VERSION]
        tools = [] if self.tools is None else ["tools", self.tools, self.untyped, _VERSION]
        return [self.pattern, self.choices, *form, *tools]

    @cached_property
    def _schema(self) -> Any:
        return json.loads(self.json_schema or "true")

    @cached_property
    def _validator(self) -> Any:
        return _open_validator(self._schema)

    @cached_property
    def _tools(self) -> Mapping[str, Any]:
        """What checks the arguments of each tool, by its name."""
        known = [one["function"] for one in json.loads(self.tools or "[]")]
        return {one["name"]: _open_validator(one["parameters"]) for one in known}

    def read(self, text: str, stop_reason: str) -> Reading:
        """The answer in `text`; a response cut off by the token limit is never an answer.

        What takes a pattern or a schema longer than a second is a rejection that says so.
        """
        if stop_reason == "length":
            return Reading(rejection=TRUNCATED)
        if not text.strip():
            return Reading(rejection=EMPTY)
        try:
            if self.tools is not None:
                return self._read_calls(text)
            found = self._found(text.strip())
            if not found:
                return Reading(rejection=UNPARSABLE)
            return self._chosen(found) if self.json_schema is None else self._read_json(found)
        except TimeoutError as error:
            return Reading(rejection=f"{error} of recipe {self.recipe!r} took over {_SECONDS:g} s")

    def confidence(self, text: str, path: str) -> float | None:
        """The number from 0 to 1 at `path` (`a.b` lies within `a`) of the JSON in a text.

        None where there is none.
        """
        try:
            value = _load(self._found(text.strip()) or "")
        except (ValueError, RecursionError, TimeoutError):
            return None
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            return None
        return float(value)

    def _found(self, text: str) -> str | None:
        if self.pattern is None:
            return text
        match = next(find_all(self.pattern, text), None)
        return match["answer"].strip() if match and match["answer"] else None

    def _chosen(self, answer: str) -> Reading:
        answer = whole_text(answer)
        if self.choices and answer not in self.choices:
            return Reading(rejection=OUTSIDE_CHOICES)
        return Reading(answer)

    def _read_json(self, text: str) -> Reading:
        try:
            value = _load(text)
        except (ValueError, RecursionError):
            return Reading(rejection=UNPARSABLE)
        if not _fits(value, self._validator):
            return Reading(rejection=OFF_SCHEMA)
        for name in _names(self.field):
            if not isinstance(value, dict) or name not in value:
                return Reading(rejection=OFF_SCHEMA)
            value = value[name]
        if value is None or (isinstance(value, str) and not value.strip()):
            return Reading(rejection=EMPTY)
        return self._chosen(self.write(value))

    def _read_calls(self, text: str) -> Reading:
        try:
            _, calls = split_calls(text)
        except (ValueError, RecursionError):
            return Reading(rejection=UNPARSABLE)
        if self.untyped:
            calls = fitted_calls(calls, self.tools or "[]")
        if any(call.name not in self._tools for call in calls):
            return Reading(rejection=UNKNOWN_TOOL)
        fits = (_fits(dict(one.arguments), self._tools[one.name]) for one in calls)
        if not all(_storable(one.arguments) for one in calls) or not all(fits):
            return Reading(rejection=OFF_SCHEMA)
        return Reading(calls_text(calls))

    def write(self, value: Any) -> str:
        """A value as answers are written, so that equal ones are equal as text.

        Raises `ValueError` where calls of tools are expected, and the value is something else.
        """
        if self.tools is not None:
            return calls_text(read_calls(value))
        if isinstance(value, str):
            return value.strip()
        schema = self._schema
        for name in _names(self.field):
            schema = _property(schema, name)
        return json.dumps(_canonical(value, schema), ensure_ascii=False, default=str)


def read_json(text: str) -> Any:
    """The JSON value that a whole text is; raises `ValueError` or `RecursionError`."""
    return json.loads(text, parse_constant=no_constant)


def value_text(value: Any) -> str:
    """A JSON value as text, so that equal values are equal texts; 1 and 1.0 are one value."""
    return json.dumps(_canonical(value, {}), ensure_ascii=False)


def fits_schema(value: Any, schema: str) -> bool:
    """Whether a value fits a schema (JSON text); raises `TimeoutError` after a second."""
    return _fits(value, _validator_of(schema))


@lru_cache(maxsize=256)
def _validator_of(schema: str) -> Any:
    return _open_validator(json.loads(schema))


def _fits(value: Any, validator: Any) -> bool:
    _deadline.set(monotonic() + _SECONDS)
    try:
        return bool(validator.is_valid(value))
    except RecursionError:
        return False  # a schema that refers to itself without end holds for nothing


def _storable(value: Any) -> bool:
    """Whether every number in a JSON value comes back from a column of JSON as it is."""
    if isinstance(value, Mapping):
        return all(map(_storable, value.values()))
    if isinstance(value, list):
        return all(map(_storable, value))
    if isinstance(value, float):
        return isfinite(value)
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def find_all(pattern: str, text: str) -> "Iterator[regex.Match[str]]":
    """Matches of a pattern; raises `TimeoutError` for one that takes over a second."""
    if len(text) > _LONGEST:
        raise TimeoutError("the pattern, on a text this long,")
    try:
        yield from _compiled(pattern).finditer(text, timeout=_SECONDS)
    except TimeoutError:
        raise TimeoutError("the pattern") from None


@cache
def _compiled(pattern: str) -> "regex.Pattern[str]":
    return regex.compile(pattern)


def check_pattern(pattern: str, group: str | None = None) -> str:
    """The pattern; raises `ValueError` for no regular expression or one without the group."""
    if (size := _expanded(pattern)) > _LARGEST:
        raise ValueError(
            f"a regular expression whose repeats come to {size:,} pieces; expected at most "
            f"{_LARGEST:,}"
        )
    try:
        re.compile(pattern)
        groups = _compiled(pattern).groupindex
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"not a regular expression: {error}") from error
    if group is not None and group not in groups:
        raise ValueError(f"expected a group (?P<{group}>…), found {sorted(groups)}")
    return pattern


def _expanded(pattern: str) -> int:
    """How many pieces a pattern has with its counted repeats written out, within one another."""
    sizes, last = [0], 0
    for piece in _PIECE.finditer(pattern):
        if piece[0] == "(":
            sizes.append(0)
        elif piece[0] == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        elif piece[1] or piece[2]:
            times = max(int(count) for count in (piece[1], piece[2]) if count)
            sizes[-1] += last * (times - 1)
            last *= times
        else:
            last = 1
            sizes[-1] += 1
    return sum(sizes)


def _load(text: str) -> Any:
    """JSON, as it is or in the only code fence of a text."""
    text = text.strip().strip("\ufeff")
    try:
        return read_json(text)
    except ValueError:
        fences = _FENCE.findall(text)
        if len(fences) != 1:
            raise
        return read_json(fences[0])


def no_constant(name: str) -> NoReturn:
    """For `json.loads`, which takes `NaN` and the like for numbers."""
    raise ValueError(f"{name} is not JSON; write null")


def _open_validator(schema: Any) -> Any:
    """Validates values; fetches nothing, so that a schema can only refer to itself."""
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    kind = _in_time_class(validator_for(schema, default=Draft202012Validator))
    return kind(schema, registry=Registry())


@cache
def _in_time_class(kind: Any) -> Any:
    """A kind of validators that end at the deadline, whatever a schema makes of its parts.

    To make one takes longer than to check a value, and a catalogue has a schema a tool.
    """
    from jsonschema.validators import extend

    own: dict[str, Callable[..., Any]] = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
        "uniqueItems": _unique_items,
    }
    make: Any = extend  # which has no types
    made = make(kind, own)
    evolve = made.evolve

    def stay(self: Any, **changes: Any) -> Any:
        # Called for each part of a schema. One that names its own `$schema` would be checked by
        # that kind, which has no deadline.
        _check_time()
        part = changes.get("schema", self.schema)
        if isinstance(part, Mapping) and "$schema" in part:
            changes["schema"] = {key: part[key] for key in part if key != "$schema"}
        return evolve(self, **changes)

    made.evolve = stay
    return made


def _check_time() -> float:
    if (left := _deadline.get() - monotonic()) <= 0:
        raise TimeoutError("the schema")
    return left


def _matches(pattern: str, text: str) -> bool:
    try:
        return _compiled(pattern).search(text, timeout=_check_time()) is not None
    except TimeoutError:
        raise TimeoutError("the schema") from None


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if isinstance(value, str) and not _matches(pattern, value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, value: Any, schema: Any) -> Iterator[Any]:
    for pattern, part in patterns.items() if isinstance(value, dict) else ():
        for name, one in value.items():
            if _matches(pattern, name):
                yield from validator.descend(one, part, path=name, schema_path=pattern)


def _additional_properties(validator: Any, rest: Any, value: Any, schema: Any) -> Iterator[Any]:
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name, one in value.items() if isinstance(value, dict) else ():
        if name not in known and not any(_matches(pattern, name) for pattern in patterns):
            yield from validator.descend(one, rest, path=name)


def _unique_items(validator: Any, wanted: Any, value: Any, schema: Any) -> Iterator[Any]:
    """By the items' texts: to compare each with every other takes minutes for a few thousand."""
    from jsonschema import ValidationError

    if wanted and isinstance(value, list) and len({*map(value_text, value)}) < len(value):
        yield ValidationError(f"{value!r:.200} has an item twice")


def check_schema(schema: Mapping[str, Any], *fields: str | None) -> None:
    """Raise `ValueError` for what is no JSON schema, or has not all of these fields."""
    from jsonschema.validators import Draft202012Validator, validator_for

    kind = validator_for(schema, default=Draft202012Validator)
    rules = _in_time_class(kind)(kind.META_SCHEMA, format_checker=kind.FORMAT_CHECKER)
    _deadline.set(monotonic() + _CHECKING)
    try:
        error = next(rules.iter_errors(dict(schema)), None)
    except TimeoutError as slow:
        raise ValueError(f"{slow} takes over {_CHECKING:g} s to be checked: simplify it") from slow
    if error is not None:
        raise ValueError(f"not a JSON schema: at {error.json_path}, {error.message}")
    _check_keywords(schema)
    for field in fields:
        _check_field(schema, field)


def _check_field(schema: Mapping[str, Any], field: str | None) -> None:
    for name in _names(field):
        known = schema.get("properties")
        if isinstance(known, Mapping) and name not in known:
            raise ValueError(f"field {field!r}: the schema has no {name!r}, only {sorted(known)}")
        schema = _property(schema, name)


def _check_keywords(schema: Mapping[str, Any]) -> None:
    """Raise `ValueError` for what is a schema, and can't be checked within bounds or at all."""
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    whole, used = DRAFT202012.create_resource(schema), set[str]()
    place = whole.id() or ""
    resolver = Registry().with_resource(place, whole).resolver(place)
    for key, value in _keywords(schema):
        used.add(key)
        if key == "patternProperties" and isinstance(value, Mapping):
            for pattern in value:
                check_pattern(pattern)
        elif key == "pattern" and isinstance(value, str):
            check_pattern(value)
        elif key == "$ref" and isinstance(value, str):
            try:
                resolver.lookup(value)
            except Unresolvable as error:
                raise ValueError(
                    f"the schema refers to {value!r}, which it lacks; define it under $defs"
                ) from error
    if used >= {"patternProperties", "unevaluatedProperties"}:
        raise ValueError("patternProperties and unevaluatedProperties can't be used together")


def _keywords(schema: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a schema with its value, at any depth."""
    if isinstance(schema, Mapping):
        yield from schema.items()
        for part in schema.values():
            yield from _keywords(part)
    elif isinstance(schema, Sequence) and not isinstance(schema, str):
        for part in schema:
            yield from _keywords(part)


def _names(path: str | None) -> list[str]:
    """The names in a path: `a.b` lies within `a`."""
    return path.split(".") if path else []


def _property(schema: Any, name: str) -> Any:
    found = (schema.get("properties") or {}).get(name) if isinstance(schema, Mapping) else None
    return found or {}


def _canonical(value: Any, schema: Any) -> Any:
    """The same value with its keys in the order of the schema's, then the others' own sorted.

    A student that learns the whole object learns one order, which is what a strict server keeps.
    Whole numbers have no point: 1 and 1.0 are one value.
    """
    if isinstance(value, list):
        items = schema.get("items") if isinstance(schema, Mapping) else None
        return [_canonical(item, items) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return int(value)
    if not isinstance(value, dict):
        return value
    known = list((schema.get("properties") or {}) if isinstance(schema, Mapping) else {})
    names = [name for name in known if name in value] + sorted(set(value) - set(known))
    return {name: _canonical(value[name], _property(schema, name)) for name in names}

"""Conversations as text, so that a query and a response are one text each; rows of chats as such.

A conversation is the canonical JSON of its messages. A response that calls tools is its words and
then a block for each call, in the form that Hermes and Qwen models write:

    Let me look.
    <tool_call>
    {"name": "find_order", "arguments": {"id": "A-1"}}
    </tool_call>
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import category

from distill_datasets.errors import DatasetError
from distill_datasets.schema import Message, whole_text

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_ROLES = {
    **{name: name for name in ("system", "user", "assistant", "tool")},
    **{"developer": "system", "human": "user", "gpt": "assistant", "model": "assistant"},
    **{"bot": "assistant", "function": "tool", "observation": "tool", "tool_response": "tool"},
}
_CALLING = ("function_call", "tool_call")  # roles of the assistant's messages that are calls
_JSON = re.compile(r"\s*(\{|\[\s*[\[{\]\"])")
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
# Columns of chat datasets.
PAIRS, WHOLE = (("query", "response"), ("prompt", "completion")), ("messages", "conversations")
PYTHON_WORDS = {"True": True, "False": False, "None": None}  # as formats write Python's values
_KINDS: Mapping[type, set[str]] = {
    **{bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}, str: {"string"}},
    **{type(None): {"null"}, list: {"array"}, dict: {"object"}},
}
_ANSWER = re.compile(
    r"\s*<tool_response>\s*((?:(?!<tool_response>).)*?)\s*</tool_response>\s*", re.S
)
_BLOCK = re.compile(rf"\n?{_OPEN}(.*?){_CLOSE}", re.DOTALL)


class Call(NamedTuple):
    """A tool's name, and its arguments as JSON values."""

    name: str
    arguments: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The canonical JSON: equal calls are equal as text."""
        said = {"name": self.name, "arguments": _canonical(self.arguments)}
        return json.dumps(said, ensure_ascii=False)


def has_calls(text: str) -> bool:
    """Whether a call begins somewhere in a text, readable or not."""
    return _OPEN in text


def write_calls(content: str, calls: Iterable[Call | str]) -> str:
    """A response's words and its calls as one text; `split_calls` reads it.

    A call that can't be read stands as the text that it is, and `split_calls` raises for it.
    """
    blocks = [content.rstrip()] if content.strip() else []
    for call in calls:
        text = call if isinstance(call, str) else call.text
        for mark in (_OPEN, _CLOSE):  # inside of a JSON string, where an escape is the same text
            text = text.replace(mark, f"\\u003c{mark[1:]}")
        blocks.append(f"{_OPEN}\n{text}\n{_CLOSE}")
    return "\n".join(blocks)


def is_blank(text: str) -> bool:
    """Whether a text has no sign that can be seen: a zero-width space is none.

    >>> is_blank("\\u200b "), is_blank("?")
    (True, False)
    """
    return all(one.isspace() or category(one) == "Cf" for one in text)


def split_calls(text: str) -> tuple[str, list[Call]]:
    """The words and the calls of a response; raises `ValueError` for a call that can't be read."""
    # Behind the last end there is no call: each beginning there would be looked through to the end.
    text, end, rest = text.rpartition(_CLOSE)
    calls = [_call(_json(block)) for block in _BLOCK.findall(text + end)]
    content = _BLOCK.sub("", text + end) + rest
    if _OPEN in content or _CLOSE in content:
        raise ValueError("a tool call without its beginning or end")
    return content.strip(), calls


def _call(said: Any) -> Call:
    """A call in any of the forms that models and servers write."""
    if isinstance(said, Mapping) and isinstance(said.get("function"), Mapping):
        said = said["function"]
    if not isinstance(said, Mapping) or not isinstance(said.get("name"), str) or not said["name"]:
        raise ValueError(f"expected a call with a name, found {json.dumps(said)[:200]}")
    arguments = said.get("arguments", said.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json(arguments) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"expected arguments by name, found {json.dumps(arguments)[:200]}")
    return Call(said["name"], arguments)


def _check_numbers(value: Any) -> None:
    """Raise `ValueError` for a number that readers of JSON, such as that of `datasets`, refuse."""
    if isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            _check_numbers(one)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected a number, found {value}")
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise ValueError(f"expected a number of 64 bits, found {value}")


def _json(text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except RecursionError as error:
        raise ValueError("expected JSON of fewer levels") from error


def calls_text(calls: Iterable[Call]) -> str:
    """Calls in one order and form, as answers are written: a JSON list, `[]` for none."""
    return "[" + ", ".join(sorted(call.text for call in calls)) + "]"


def read_calls(value: Any) -> list[Call]:
    """Calls in OpenAI's form, or as `calls_text` writes them; raises `ValueError`."""
    if isinstance(value, str):
        value = json.loads(value) if value.strip() else []
    if not isinstance(value, Sequence):
        value = [] if value is None else [value]
    return [_call(one) for one in value]


def fitted_calls(calls: Iterable[Call], tools: str) -> list[Call]:
    """Calls whose arguments have the types that the tools' schemas name, where a text can have.

    For calls out of chat formats that write a text, a number and a truth value alike.
    """
    known = {
        one["function"]["name"]: one["function"].get("parameters") for one in json.loads(tools)
    }
    found = []
    for name, arguments in calls:
        parameters = known.get(name)
        schemas = parameters.get("properties", {}) if isinstance(parameters, Mapping) else {}
        typed = {key: _typed(value, _types(schemas.get(key))) for key, value in arguments.items()}
        found.append(Call(name, typed))
    return found


def _typed(value: Any, wanted: set[str]) -> Any:
    if not wanted or wanted & _kinds(value):
        return value
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if "string" in wanted else value
    read = _value(value)
    return read if wanted & _kinds(read) else value


def _types(schema: Any) -> set[str]:
    """The JSON types that a schema names; none where it names them elsewhere."""
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type") or []
    parts = [schema[key] for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list)]
    return {*([named] if isinstance(named, str) else named)}.union(*map(_types, sum(parts, [])))


def _kinds(value: Any) -> set[str]:
    whole = isinstance(value, float) and value.is_integer()
    return _KINDS[int] if whole else _KINDS.get(type(value), set())


def plain_value(text: str) -> Any:
    """The JSON value that a text writes; the text where it is none, or may have been meant as
    text: Python's words, and a number that would be written otherwise.
    """
    value = text if text in PYTHON_WORDS else _value(text)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return text if number and json.dumps(_canonical(value)) != text else value


def _value(text: str) -> Any:
    try:
        value = PYTHON_WORDS[text] if text in PYTHON_WORDS else _json(text)
    except ValueError:
        return text
    return text if isinstance(value, float) and not math.isfinite(value) else value


def _canonical(value: Any) -> Any:
    """The same JSON value with sorted keys; 1 and 1.0 are one number."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [_canonical(one) for one in value]
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return int(value) if whole else value


def tool_calls(calls: Iterable[Call], *, first: int = 1) -> list[dict[str, Any]]:
    """Calls in OpenAI's form, numbered from `first`; the arguments are JSON text."""
    return [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": json.dumps(_canonical(call.arguments), ensure_ascii=False),
            },
        }
        for number, call in enumerate(calls, first)
    ]


def user_message(text: str) -> Message:
    """A text as the message of a user."""
    return {"role": "user", "content": text}


def assistant_message(response: str, *, calls: bool, after: Sequence[Message] = ()) -> Message:
    """A response as a message; its blocks are calls only where `calls` says so.

    They are numbered from those of the messages that it comes `after`. Raises `ValueError` for a
    call that can't be read.
    """
    if not calls:
        return {"role": "assistant", "content": response}
    content, made = split_calls(response)
    message: Message = {"role": "assistant", "content": content}
    if made:
        first = 1 + sum(len(one.get("tool_calls", ())) for one in after)
        message["tool_calls"] = tool_calls(made, first=first)
    return message


def linked(messages: Sequence[Message]) -> list[Message]:
    """Messages in which each answer of a tool names its call's id and tool, as formats want them.

    Where it names none it answers the call that has none yet, in the calls' order.
    """
    found: list[Message] = []
    waiting: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "assistant":
            waiting = list(message.get("tool_calls") or ())
        elif message["role"] == "tool" and waiting:
            id = message.get("tool_call_id")
            call = next((one for one in waiting if id in (None, one.get("id"))), None)
            if call is not None:
                waiting.remove(call)
                said: Any = {"tool_call_id": call.get("id"), "name": call["function"]["name"]}
                message = {**said, **message}
        found.append(message)
    return found


def response_text(message: Mapping[str, Any]) -> str:
    """What `assistant_message` made a message of."""
    calls = read_calls(message.get("tool_calls"))
    content = message.get("content") or ""
    return write_calls(content, calls) if calls else content


def to_text(messages: Sequence[Message]) -> str:
    """A conversation as a query: `from_text` reads it back."""
    return json.dumps([dict(one) for one in messages], ensure_ascii=False)


def is_conversation_text(query: str) -> bool:
    """Whether a query begins as `to_text` writes conversations."""
    return query.startswith('[{"role": "')


def from_text(query: str) -> list[Message]:
    """The messages of a query that `to_text` wrote."""
    messages: list[Message] = json.loads(query)
    return messages


def below(
    prompt: str | None, examples: Sequence[Message], conversation: Sequence[Message]
) -> list[Message]:
    """A conversation after a prompt and examples; a system message of its own follows the prompt's
    text in one message.
    """
    own = conversation[0]["content"] if conversation[0]["role"] == "system" else None
    texts = [text for text in (prompt, own) if text]
    rest = conversation[1:] if own is not None else conversation
    system: Message = {"role": "system", "content": "\n\n".join(texts)}
    return [*([system] if texts else []), *examples, *rest]


def shown(messages: Iterable[Mapping[str, Any]]) -> str:
    """A conversation for a reader: a paragraph a message, after its role."""
    return "\n\n".join(f"{one['role']}: {response_text(one)}" for one in messages)


def readable(query: str) -> str:
    """A query for a reader: a conversation in paragraphs, other text as it is."""
    if not is_conversation_text(query):
        return query
    try:
        return shown(from_text(query))
    except (ValueError, KeyError, TypeError, AttributeError):
        return query  # of another origin


def read_messages(value: Any, *, texts: bool = False) -> list[Message]:
    """Messages in any of the forms of chat datasets, in OpenAI's form.

    `value` is a list of messages, one message, columns of them, or JSON text of these; where
    `texts` says so any other text is a user's message. Roles and content may be called `from` and
    `value`, content may come in parts of text, and calls in a message's text as `write_calls`
    writes them. Absent keys may be null, and others are left out. A call, and a tool's message,
    that has no id is given one. Raises `ValueError` that says what was expected and found.
    """
    if isinstance(value, str):
        said = texts and not _JSON.match(value)
        value = user_message(value) if said else _loaded(value)
    if isinstance(value, Mapping) and value.keys() & {"role", "from"}:
        value = _rows(value)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"expected a list of messages, found {value!r:.200}")
    return _numbered([_message(one) for one in value])


def without_answer(messages: Sequence[Message]) -> list[Message]:
    """A conversation without what the assistant says at its end."""
    found = [*messages]
    while found and found[-1]["role"] == "assistant":
        found.pop()
    return found


def with_answers(messages: Sequence[Message], answers: Sequence[str]) -> list[Message]:
    """A conversation up to the user's message after as many as there are answers.

    Each answer, which calls no tool, stands behind its message; the messages hold none of the
    assistant's.
    """
    found: list[Message] = []
    left = [*answers]
    for message in messages:
        found.append(message)
        if message["role"] == "user":
            if not left:
                break
            found.append(assistant_message(left.pop(0), calls=False))
    return found


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected messages as JSON, found {text!r:.80} ({error})") from error


def _rows(given: Mapping[str, Any]) -> list[Any]:
    """One message, or the messages whose columns these are."""
    columns = {name: value for name, value in given.items() if isinstance(value, list)}
    if not isinstance(given.get("role", given.get("from")), list):
        return [given]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _message(given: Any) -> Message:
    if isinstance(given, str) and _JSON.match(given):
        given = _loaded(given)
    if not isinstance(given, Mapping):
        raise ValueError(f"expected a message with a role and content, found {given!r:.200}")
    said = str(given.get("role") or given.get("from")).lower()
    role = "assistant" if said in _CALLING else _ROLES.get(said)
    if role is None:
        raise ValueError(f"expected a role of {[*_ROLES]}, found {said!r}")
    text, calls = _said(given, role, said in _CALLING)
    message: Message = {"role": role, "content": text}
    if calls:
        if role != "assistant":
            raise ValueError(f"expected tool calls in messages of the assistant, found {role!r}")
        message["tool_calls"] = _with_ids(calls)
    for name in ("tool_call_id", "name"):
        if role == "tool" and given.get(name) and isinstance(given[name], str):
            message[name] = given[name]
    return message


def _said(given: Mapping[str, Any], role: str, calling: bool) -> tuple[str, Any]:
    """A message's words, and its calls in whatever form they are."""
    content = given["content"] if given.get("content") is not None else given.get("value")
    if calling:
        return "", given.get("tool_calls") or content
    calls = given.get("tool_calls") or given.get("function_call")
    text = _content(content, role, empty=bool(calls) or role == "tool")
    if role == "tool" and (answer := _ANSWER.fullmatch(text)):
        text = answer[1]
    if role == "assistant" and not calls and has_calls(text):
        return split_calls(text)
    return text, calls


def _with_ids(calls: Any) -> list[dict[str, Any]]:
    """Calls with the ids that they have, or an empty one."""
    given = _decoded(calls)
    given = [*map(_decoded, [given] if isinstance(given, Mapping | Call) else given)]
    read: list[Call] = [one if isinstance(one, Call) else _call(one) for one in given]
    for one in read:
        _check_numbers(one.arguments)
    made = tool_calls(read)
    for call, old in zip(made, given, strict=True):
        known = old.get("id") if isinstance(old, Mapping) else None
        call["id"] = known if isinstance(known, str) else ""
    return made


def _decoded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _numbered(messages: list[Message]) -> list[Message]:
    """Calls without an id numbered; a tool's message without one is the next call's."""
    number, waiting = 0, list[str]()
    for message in messages:
        for call in message.get("tool_calls", ()):
            number += 1
            call["id"] = call["id"] or f"call_{number}"
            waiting.append(call["id"])
        if message["role"] == "tool":
            answered = message.get("tool_call_id") or (waiting[0] if waiting else None)
            if answered in waiting:
                waiting.remove(answered)
            if answered is not None:
                message["tool_call_id"] = answered
    return messages


def _content(content: Any, role: str, *, empty: bool) -> str:
    if content is None and empty:
        return ""
    if isinstance(content, str):
        return whole_text(content)
    parts = content if isinstance(content, list) else [content]
    given = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    texts = [text for text in given if isinstance(text, str)]
    if len(texts) == len(given):
        return whole_text("".join(texts))
    if role == "tool":  # what a tool returns is any JSON value
        return whole_text(json.dumps(content, ensure_ascii=False))
    raise ValueError(f"expected text as content, found {content!r:.200}")


class Conversation(NamedTuple):
    """Messages that end with the response, and the tools that the model is given, as JSON text."""

    messages: list[Message]
    tools: str | None = None


RowReader = Callable[["pa.Table", int], Conversation]  # a row of `as_written` and its number


def as_written(rows: "Dataset") -> "Dataset":
    """The same rows as Arrow holds them: `datasets` makes 0.6000000000000001 of 0.6 in JSON."""
    return rows.with_format("arrow")


def conversation_reader(rows: "Dataset", where: str) -> RowReader:
    """How to turn a row of `as_written` into a conversation that ends with the response.

    Supported: `messages` or `conversations`; `query` and `response`; `prompt` and `completion`.
    Each is text or messages, messages may be JSON text; a column `tools` goes along. Raises
    `DatasetError` that lists the columns of `rows`; what it returns raises it for a row that holds
    something else.
    """
    parts = _parts(rows.column_names, where)
    names = [*parts, *(["tools"] if "tools" in rows.column_names else [])]
    features = {name: rows.features[name] for name in names}
    for column in parts:
        kind = str(getattr(features[column], "dtype", ""))
        if kind.startswith(("timestamp", "date", "time")):
            raise DatasetError(
                f"{where} can't be trained on: expected text in {column!r}; found dates, which "
                "`datasets` doesn't keep as they are written. Save the rows as Parquet with that "
                "column as text."
            )

    def read(table: "pa.Table", number: int) -> Conversation:
        column = "tools"
        try:
            (row,) = table.select(names).to_pylist()
            tools = tools_in(_present(row.get(column), features.get(column)))
            messages: list[Message] = []
            for column, role in parts.items():
                messages += turns_in(_present(row[column], features[column]), role)
        except (ValueError, RecursionError) as error:
            raise DatasetError(
                f"{where}, row {number}: {column!r}: {error}. Convert that column "
                "(`dataset.map`) or leave such rows out (`dataset.filter`)."
            ) from error
        return Conversation(messages, tools)

    return read


def _parts(columns: Sequence[str], where: str) -> dict[str, str]:
    """The columns that make a conversation, with the role of text in them, if any."""
    pair = next((pair for pair in PAIRS if {*pair} <= {*columns}), None)
    whole = next((name for name in WHOLE if name in columns), None)
    if whole == "messages" or (whole and pair is None):
        return {whole: ""}
    if pair is None:
        raise DatasetError(
            f"{where} can't be trained on: expected a column 'messages', or 'query' and "
            f"'response', or 'prompt' and 'completion'; found {sorted(columns)}. Rename the "
            "columns (`dataset.rename_columns`) or pick another configuration."
        )
    return dict(zip(pair, ("user", "assistant"), strict=True))


def _present(value: Any, feature: Any) -> Any:
    """A value without the keys that Arrow fills in with None, where a column has fixed keys; JSON
    as what it says.
    """
    if isinstance(value, str) and getattr(feature, "_type", None) == "Json":
        return json.loads(value)
    if isinstance(value, Mapping) and isinstance(feature, Mapping):
        return {k: _present(v, feature.get(k)) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_present(one, inner) for one in value]
    return value


def turns_in(value: Any, role: str) -> list[Message]:
    """The messages in a cell; text is one of this `role`, and JSON of messages without one."""
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    if role and not isinstance(value, list):
        raise ValueError(f"expected text or messages; found {value!r:.200}")
    return read_messages(value)


def tools_in(value: Any) -> str | None:
    """The tools in a cell as JSON text in OpenAI's form; None for none.

    They come as JSON text or as a list, whose items may be JSON text and lack the
    `{"type": "function"}` around them.
    """
    if isinstance(value, str):
        value = json.loads(value) if value.strip() else None
    if not value:
        return None
    found = [*map(_decoded, value if isinstance(value, list) else [value])]
    functions = [one.get("function", one) if isinstance(one, Mapping) else one for one in found]
    if not all(isinstance(one, Mapping) and isinstance(one.get("name"), str) for one in functions):
        raise ValueError(f"expected a list of tools, each with a name; found {value!r:.200}")
    tools = [{"type": "function", "function": one} for one in functions]
    return json.dumps(tools, ensure_ascii=False)

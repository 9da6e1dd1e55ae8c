"""The columns of answers and releases."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

if TYPE_CHECKING:
    from datasets import Features


class Message(TypedDict):
    """One turn of a conversation, in OpenAI's form; `tool_calls` have their arguments as JSON."""

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


EARLIER = "earlier_responses"  # of a conversation's turns before the last, where all are answered
SOURCE = "source"  # which part of a recipe's mix a row is of; null in the recipe's own rows
_SURROGATE = re.compile("[\ud800-\udfff]")


def whole_text(text: str) -> str:
    """A text that a column can hold: JSON may bring halves of surrogate pairs, which are joined,
    or U+FFFD where one is alone.
    """
    if text.isascii() or not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", errors="replace")


# One row a sample. Where these are read: a row with an `error` was not answered, a row with a
# `rejection` was answered and paid for but can't be used, every other row is kept.
_ANSWER_COLUMNS = {
    "id": "string",
    "query": "string",
    "group": "string",
    "reference": "string",
    "split": "string",
    "sample": "int32",
    "teacher": "string",
    "raw": "string",
    "stop_reason": "string",
    "teacher_prompt_tokens": "int32",
    "teacher_cached_tokens": "int32",
    "teacher_response_tokens": "int32",
    "answer": "string",
    "response": "string",
    "rejection": "string",
    "error": "type, status, message and attempts; null in answered rows",
    "candidates": "int32",
    "agreement": "float64",
    "score": "float64",
}
_RELEASE_COLUMNS = (
    "id",
    "query",
    "response",
    "messages",
    "answer",
    "reference",
    "group",
    "sample",
    "teacher",
    "teacher_prompt_tokens",
    "teacher_cached_tokens",
    "teacher_response_tokens",
)
_REJECTED_COLUMNS = tuple(
    name
    for name in _ANSWER_COLUMNS
    if name not in ("answer", "response", "candidates", "agreement", "score")
)


def _features(columns: Sequence[str], *, calls: bool = False) -> "Features":
    from datasets import Features, Json, List, Value

    failure = {"type": "string", "status": "int32", "message": "string", "attempts": "int32"}
    # Fixed keys would put nulls into every message without calls, which chat templates of large
    # models take for calls.
    message = Json() if calls else {"role": Value("string"), "content": Value("string")}
    nested = {
        "error": {name: Value(kind) for name, kind in failure.items()},
        "messages": List(message),
        "requests": List(Value("string")),
        EARLIER: List(Value("string")),
    }
    kinds = {**dict.fromkeys(("tools", "handle", SOURCE), "string"), **_ANSWER_COLUMNS}
    return Features({name: nested.get(name) or Value(kinds[name]) for name in columns})


def answer_features(added: Sequence[str] = ()) -> "Features":
    """One row a sample, as `generate` writes it, and columns that some recipes add.

    `requests` holds the digests of what was asked for the row, where that was more than one
    teacher's request.
    """
    return _features((*_ANSWER_COLUMNS, "requests", *added))


def release_features(added: Sequence[str] = (), *, calls: bool = False) -> "Features":
    """A released row: the query, what the student shall say, and never the teacher's prompt.

    `added` names further columns, such as those that say how a row was chosen (`Recipe.evidence`).
    Where there may be `calls` of tools, each message is JSON, with the keys that it needs. No
    column is called `label`, `prompt` or `completion`: TRL refuses those beside `messages`.
    """
    return _features((*_RELEASE_COLUMNS, *added), calls=calls)


def rejected_features(added: Sequence[str] = ()) -> "Features":
    """A row that was asked and can't be used, with the reason."""
    return _features((*_REJECTED_COLUMNS, *added))


def failure_text(failure: Mapping[str, Any]) -> str:
    """A row's `error` in one line: its type, status and message."""
    status = "" if failure["status"] is None else f" {failure['status']}"
    return f"{failure['type']}{status}: {failure['message']}"


def failure_content(failure: Any) -> Any:
    """What a row's `error` says, as a tuple: without how often the row was asked.

    Releases of earlier versions say it in one text.
    """
    if not isinstance(failure, Mapping):
        return failure
    return tuple(failure[part] for part in ("type", "status", "message"))

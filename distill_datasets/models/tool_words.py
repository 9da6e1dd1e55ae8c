"""Tools in words, for chat formats that have no way of their own to tell of them.

The catalogue is a part of the system message, or of the first message of the user where a format
has no system role; a call is a block of text in the assistant's message, as
`conversations.write_calls` writes it; and what tools answered is a message of the user, one for
all answers to one message. It is the same text for a prompt and for training.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tinker_cookbook.renderers import ensure_text

from distill_datasets.conversations import read_calls, write_calls
from distill_datasets.errors import DatasetError

_WORDS = """\
# Tools

These functions can be called. Each line has one, as JSON:
<tools>
{tools}
</tools>

A call is a block of this form, after whatever else is said; several calls are several blocks:
<tool_call>
{{"name": "a function's name", "arguments": {{"a parameter's name": "its value"}}}}
</tool_call>
What a call returns follows in <tool_response></tool_response>."""


def in_words(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, has_system: bool
) -> list[Any]:
    """Messages without calls and roles of tools, in the cookbook's form."""
    found: list[Any] = []
    answers = False
    for message in messages:
        if message["role"] == "tool":
            answer = f"<tool_response>\n{ensure_text(message['content'])}\n</tool_response>"
            before = found.pop()["content"] + "\n" if answers else ""
            found.append({"role": "user", "content": before + answer})
        else:
            found.append(_spoken(message))
        answers = message["role"] == "tool"
    return _told(found, tools, "system" if has_system else "user") if tools else found


def _spoken(message: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in message.items() if key != "tool_calls"}
    if made := message.get("tool_calls"):
        calls = read_calls([call.model_dump() for call in made])
        plain["content"] = write_calls(ensure_text(message["content"]), calls)
    return plain


def _told(messages: list[Any], tools: Sequence[Mapping[str, Any]], role: str) -> list[Any]:
    """Messages of which the first of a role tells of the tools."""
    words = _WORDS.format(tools="\n".join(json.dumps(one, ensure_ascii=False) for one in tools))
    if role == "system":
        leads = bool(messages) and messages[0]["role"] == role
        prompt = ensure_text(messages[0]["content"]) + "\n\n" if leads else ""
        return [{"role": role, "content": prompt + words}, *messages[leads:]]
    place = next((n for n, message in enumerate(messages) if message["role"] == role), None)
    if place is None:
        raise DatasetError(
            f"Tools can't be told of in a conversation of {[one['role'] for one in messages]}: "
            "this model's chat template has no system role, so expected a message of the user."
        )
    first = messages[place]
    told = {**first, "content": f"{words}\n\n{ensure_text(first['content'])}"}
    return [*messages[:place], told, *messages[place + 1 :]]

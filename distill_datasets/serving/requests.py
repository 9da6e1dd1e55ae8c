"""The bodies of OpenAI's protocol as plain dataclasses.

What would change an answer and isn't done here is refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill_datasets.conversations import read_messages
from distill_datasets.embedded.wire import (
    Body,
    InvalidRequestError,
    number,
    section,
    shown,
    text,
    whole,
)
from distill_datasets.recipes.tools import checked_tools
from distill_datasets.schema import Message

MOST_CHOICES = 128
MOST_PROMPTS = 128
MOST_TOP = 20
MOST_STOPS = 16
_LARGE = 2**31
# Names that say how a token is drawn, as the embedded server reads them too.
_SAMPLING = ("temperature", "top_p", "top_k", "seed", "frequency_penalty", "presence_penalty")
_SHARED = {"model", "n", "stop", "stream", "stream_options", "logprobs", "max_tokens", *_SAMPLING}
_SHARED |= {"return_tokens_as_token_ids"}
_CHAT = _SHARED | {"messages", "tools", "tool_choice", "top_logprobs", "response_format"}
_CHAT |= {"max_completion_tokens"}
_TEXT = _SHARED | {"prompt", "echo"}
# These change no answer.
_SILENT = {"user", "metadata", "service_tier", "store", "prompt_cache_key", "safety_identifier"}
_SILENT |= {"prompt_cache_retention"}
# And these change none at the value that clients send.
_NEUTRAL: Mapping[str, Any] = {
    **{"logit_bias": {}, "best_of": 1, "parallel_tool_calls": True, "modalities": ["text"]},
    "suffix": "",
}


@dataclass(frozen=True)
class RequestSettings:
    """What chats and texts have in common.

    `sampling` is in the embedded server's words; `top` is the number of likeliest tokens a place,
    None where no log-probabilities are asked for, and `by_id` names tokens by their ids.
    """

    model: str
    n: int
    sampling: Mapping[str, Any]
    stop: tuple[str, ...]
    top: int | None
    by_id: bool
    stream: bool
    usage: bool


@dataclass(frozen=True)
class ChatAsked:
    """A conversation to go on with; `tools` is JSON text, `schema` what the answer is held to.

    Where it `calls`, the answer is a call of a tool, and the schema that of the call.
    """

    asked: RequestSettings
    messages: Sequence[Message]
    tools: str | None
    schema: Any
    calls: bool = False


@dataclass(frozen=True)
class TextAsked:
    """Texts, or their token ids, to go on with; with `echo` each is part of its answer."""

    asked: RequestSettings
    prompts: Sequence[str | list[int]]
    echo: bool
    only_echo: bool


def read_chat(body: Body) -> ChatAsked:
    """The body of `/chat/completions`; raises `InvalidRequestError` or another of ours."""
    _refuse_others(body, _CHAT)
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise InvalidRequestError(f"expected messages as a list; found {shown(given)}")
    try:
        messages = read_messages(given)
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidRequestError(f"the messages can't be read: {error}") from error
    top = None
    if _flag(body, "logprobs"):
        top = whole(body, "top_logprobs", 0, MOST_TOP, 0)
    elif body.get("top_logprobs"):
        raise InvalidRequestError("expected logprobs: true beside top_logprobs; found it off")
    most = "max_completion_tokens" if body.get("max_completion_tokens") else "max_tokens"
    tools, schema = _read_tools(body), _read_form(body)
    called = _called(body.get("tool_choice"), tools)
    if tools and schema is not None:
        raise InvalidRequestError(
            "expected tools or a response_format of JSON; found both: a call is not of that form"
        )
    limit = whole(body, most, 1, _LARGE, None)
    told = json.dumps(tools, ensure_ascii=False) if tools else None
    schema = schema if called is None else called
    return ChatAsked(_asked(body, top, limit), messages, told, schema, called is not None)


def read_text(body: Body) -> TextAsked:
    """The body of `/completions`; raises `InvalidRequestError`."""
    _refuse_others(body, _TEXT)
    most = whole(body, "max_tokens", 0, _LARGE, 16)
    echo = _flag(body, "echo")
    if not most and not echo:
        raise InvalidRequestError("expected max_tokens of 1 or more, or echo; found neither")
    if echo and body.get("stream"):
        raise InvalidRequestError("expected echo or stream; found both")
    top = whole(body, "logprobs", 0, MOST_TOP, None)
    asked = _asked(body, top, most or 1)
    return TextAsked(asked, _read_prompts(body.get("prompt")), echo, not most)


def _asked(body: Body, top: int | None, most: int | None) -> RequestSettings:
    sampling = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
    number(body, "temperature", 0.0, 2.0, 1.0)
    return RequestSettings(
        model=text(body, "model"),
        n=whole(body, "n", 1, MOST_CHOICES, 1),
        sampling={**sampling, "max_tokens": most},
        stop=_read_stop(body.get("stop")),
        top=top,
        by_id=_flag(body, "return_tokens_as_token_ids"),
        stream=_flag(body, "stream"),
        usage=_flag(section(body, "stream_options"), "include_usage"),
    )


def _refuse_others(body: Body, known: set[str]) -> None:
    """Refuse what would change the answer and isn't done."""
    for name, value in body.items():
        if value is None or name in known or name in _SILENT:
            continue
        if name not in _NEUTRAL:
            found = f"this server has no {name[:80]!r}; found {shown(value)}: leave it out"
            raise InvalidRequestError(found)
        if value != _NEUTRAL[name]:
            raise InvalidRequestError(
                f"expected {name} of {_NEUTRAL[name]!r}, the only one that this server knows; "
                f"found {shown(value)}: leave it out"
            )


def _flag(body: Body, name: str) -> bool:
    found = body.get(name)
    if found is not None and not isinstance(found, bool):
        raise InvalidRequestError(f"expected {name} as true or false; found {shown(found)}")
    return bool(found)


def _read_stop(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else given or []
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or "" in stops:
        raise InvalidRequestError(
            f"expected stop as a text or at most {MOST_STOPS}, none empty; found {shown(given)}"
        )
    return tuple(text({"stop": one}, "stop") for one in stops)


def _read_tools(body: Body) -> list[dict[str, Any]]:
    given = body.get("tools")
    if not given or body.get("tool_choice") == "none":
        return []
    if not isinstance(given, list):
        raise InvalidRequestError(f"expected tools as a list; found {shown(given)}")
    if any(section(one, "function").get("strict") for one in given if isinstance(one, dict)):
        raise InvalidRequestError("calls are not held to a schema here: leave strict out of tools")
    return checked_tools(given, "tools")


def _called(choice: Any, tools: Sequence[Mapping[str, Any]]) -> Any:
    """The schema of the call that a `tool_choice` demands; None where it demands none."""
    if choice in (None, "auto", "none"):
        return None
    known = {one["function"]["name"]: one["function"] for one in tools}
    name = section(choice, "function").get("name") if isinstance(choice, dict) else None
    wanted = [*known.values()] if choice == "required" else [known[name]] if name in known else []
    if not wanted:
        raise InvalidRequestError(
            "expected tool_choice of 'auto', 'none', 'required' or the function of one of the "
            f"tools, {sorted(known)[:20]}; found {shown(choice)}"
        )
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": one["name"]},
                "arguments": one.get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for one in wanted
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _read_form(body: Body) -> Any:
    """The schema that an answer is held to; None for none."""
    form = section(body, "response_format")
    kind = form.get("type", "text")
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema":
        schema = section(form, "json_schema").get("schema")
        if not isinstance(schema, dict | bool):
            raise InvalidRequestError(
                f"expected response_format.json_schema.schema as an object; found {shown(schema)}"
            )
        return schema
    if kind != "text":
        raise InvalidRequestError(
            "expected response_format.type of 'text', 'json_object' or 'json_schema'; found "
            f"{shown(kind)}"
        )
    return None


def _read_prompts(given: Any) -> list[str | list[int]]:
    """One text, several, the token ids of one, or those of several."""
    single = isinstance(given, str) or (
        isinstance(given, list) and bool(given) and all(type(one) is int for one in given)
    )
    prompts = [given] if single else given
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= MOST_PROMPTS:
        raise InvalidRequestError(
            f"expected prompt as a text, token ids, or at most {MOST_PROMPTS} of them; found "
            f"{shown(given)}"
        )
    for one in prompts:
        ids = isinstance(one, list) and bool(one) and all(type(id) is int for id in one)
        if not ids and not (isinstance(one, str) and one):
            raise InvalidRequestError(f"expected a prompt with a text or ids; found {shown(one)}")
    return list(prompts)

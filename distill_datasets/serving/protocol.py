"""OpenAI's protocol, read and written: what the server answers and the proxy passes on.

What would change an answer of the server and isn't done there is refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from aiohttp import web

from distill_datasets.conversations import Call, below, read_messages, to_text, write_calls
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

if TYPE_CHECKING:
    from distill_datasets.recipes.recipe import Recipe

MOST_CHOICES = 128
MOST_PROMPTS = 128
MOST_TOP = 20
MOST_STOPS = 16
_LARGE = 2**31
# Names that say how a token is drawn, as the embedded server reads them too.
_SAMPLING = ("temperature", "top_p", "top_k", "seed", "frequency_penalty", "presence_penalty")
_SHARED = {"model", "n", "stop", "stream", "stream_options", "logprobs", "max_tokens", *_SAMPLING}
_SHARED |= {"return_tokens_as_token_ids"}
# These change no answer.
_SHARED |= {"user", "metadata", "service_tier", "store", "prompt_cache_key", "safety_identifier"}
_SHARED |= {"prompt_cache_retention"}
_CHAT = _SHARED | {"messages", "tools", "tool_choice", "top_logprobs", "response_format"}
_CHAT |= {"max_completion_tokens"}
_TEXT = _SHARED | {"prompt", "echo"}
# And these change none at the value that clients send.
_NEUTRAL: Mapping[str, Any] = {
    **{"logit_bias": {}, "best_of": 1, "parallel_tool_calls": True, "modalities": ["text"]},
    "suffix": "",
}
_MOST_TEXT = 1 << 20  # characters of a stream that are kept to be counted
INVALID = "invalid_request_error"


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
class ChatRequest(RequestSettings):
    """A conversation to go on with; `tools` is JSON text, `schema` what the answer is held to.

    Where it `calls`, the answer is a call of a tool, and the schema that of the call.
    """

    messages: Sequence[Message]
    tools: str | None
    schema: Any
    calls: bool


@dataclass(frozen=True)
class TextRequest(RequestSettings):
    """Texts, or their token ids, to go on with; with `echo` each is part of its answer."""

    prompts: Sequence[str | list[int]]
    echo: bool
    only_echo: bool


def read_chat(body: Body) -> ChatRequest:
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
    return ChatRequest(
        **_read_settings(body, top, whole(body, most, 1, _LARGE, None)),
        messages=messages,
        tools=json.dumps(tools, ensure_ascii=False) if tools else None,
        schema=schema if called is None else called,
        calls=called is not None,
    )


def read_text(body: Body) -> TextRequest:
    """The body of `/completions`; raises `InvalidRequestError`."""
    _refuse_others(body, _TEXT)
    most = whole(body, "max_tokens", 0, _LARGE, 16)
    echo = _flag(body, "echo")
    if not most and not echo:
        raise InvalidRequestError("expected max_tokens of 1 or more, or echo; found neither")
    if echo and body.get("stream"):
        raise InvalidRequestError("expected echo or stream; found both")
    settings = _read_settings(body, whole(body, "logprobs", 0, MOST_TOP, None), most or 1)
    prompts = _read_prompts(body.get("prompt"))
    return TextRequest(**settings, prompts=prompts, echo=echo, only_echo=not most)


def _read_settings(body: Body, top: int | None, most: int | None) -> dict[str, Any]:
    """The fields of `RequestSettings`."""
    sampling = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
    number(body, "temperature", 0.0, 2.0, 1.0)
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or "" in stops:
        raise InvalidRequestError(
            f"expected stop as a text or at most {MOST_STOPS}, none empty; found {shown(stop)}"
        )
    return {
        "model": text(body, "model"),
        "n": whole(body, "n", 1, MOST_CHOICES, 1),
        "sampling": {**sampling, "max_tokens": most},
        "stop": tuple(text({"stop": one}, "stop") for one in stops),
        "top": top,
        "by_id": _flag(body, "return_tokens_as_token_ids"),
        "stream": _flag(body, "stream"),
        "usage": _flag(section(body, "stream_options"), "include_usage"),
    }


def _refuse_others(body: Body, known: set[str]) -> None:
    """Refuse what would change the answer and isn't done."""
    for name, value in body.items():
        if value is None or name in known:
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
    calls = []
    for one in wanted:
        parts = {"name": {"const": one["name"]}}
        parts["arguments"] = one.get("parameters") or {"type": "object"}
        said = {"type": "object", "properties": parts, "required": [*parts]}
        calls.append({**said, "additionalProperties": False})
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _read_form(body: Body) -> Any:
    """The schema that an answer is held to; None for none."""
    form = section(body, "response_format")
    kind, schema = form.get("type", "text"), section(form, "json_schema").get("schema")
    if kind not in ("text", "json_object", "json_schema"):
        raise InvalidRequestError(
            "expected response_format.type of 'text', 'json_object' or 'json_schema'; found "
            f"{shown(kind)}"
        )
    if kind == "json_schema" and not isinstance(schema, dict | bool):
        raise InvalidRequestError(
            f"expected response_format.json_schema.schema as an object; found {shown(schema)}"
        )
    return {"text": None, "json_object": {"type": "object"}, "json_schema": schema}[kind]


def _read_prompts(given: Any) -> list[str | list[int]]:
    """One text, several, the token ids of one, or those of several."""

    def is_prompt(one: Any) -> bool:
        ids = isinstance(one, list) and all(type(id) is int for id in one)
        return bool(one) and (ids or isinstance(one, str))

    prompts = [given] if is_prompt(given) else given
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= MOST_PROMPTS:
        raise InvalidRequestError(
            f"expected prompt as a text, token ids, or at most {MOST_PROMPTS} of them; found "
            f"{shown(given)}"
        )
    for one in prompts:
        if not is_prompt(one):
            raise InvalidRequestError(f"expected a prompt with a text or ids; found {shown(one)}")
    return list(prompts)


def with_prompt(
    recipe: Recipe, messages: Sequence[Message], tools: str | None
) -> tuple[Sequence[Message], str | None]:
    """A conversation below a recipe's prompt, and the tools that go with it.

    Raises `InvalidRequestError` for one that the prompt can't be put before.
    """
    if recipe.members:
        query = to_text(messages)
        try:
            member, _ = recipe.part(query)
        except KeyError as error:
            raise InvalidRequestError(
                f"expected a system message that begins with one of {sorted(recipe.members)}, "
                f"which says whose prompt it is; found {str(error)[:80]}"
            ) from error
        return recipe.messages(query), tools or member.tools_text
    first = messages[0]
    if first["role"] == "system" and first["content"].strip() == recipe.student_prompt:
        messages = messages[1:]  # the student's own, in the teacher's place
    if recipe.asks_in_one_message:
        if [one["role"] for one in messages] != ["user"]:
            raise InvalidRequestError(
                "this model's prompt holds the query: expected one message of the user; "
                f"found {[one['role'] for one in messages][:20]}"
            )
        return recipe.messages(messages[0]["content"]), tools or recipe.tools_text
    if not messages:
        raise InvalidRequestError("expected a message of the user; found the prompt alone")
    shown = below(recipe.system_text, recipe.example_turns, messages)
    return shown, tools or recipe.tools_text


def without_prompt(recipe: Recipe, messages: Sequence[Message]) -> Sequence[Message]:
    """A conversation without the recipe's prompt, where the application still sends it."""
    if recipe.members or not messages:
        return messages
    first, *rest = messages
    if recipe.asks_in_one_message:
        mark, text = "\x00", first["content"]
        before, _, after = recipe.messages(mark)[0]["content"].partition(mark)
        around = text.startswith(before) and text.endswith(after)
        if not rest and around and len(text) >= len(before) + len(after):
            return [{**first, "content": text[len(before) : len(text) - len(after)]}]
    elif first["role"] == "system" and first["content"].strip() == recipe.system_text.strip():
        shown = list(recipe.example_turns)
        return rest[len(shown) :] if rest[: len(shown)] == shown else rest
    return messages


@dataclass(frozen=True)
class Exchange:
    """What one model answered to a conversation."""

    text: str
    stop_reason: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    response_tokens: int = 0


class Place(NamedTuple):
    """A token of an answer, its log-probability, and the likeliest tokens in its place."""

    token: str
    logprob: float
    likeliest: Sequence[tuple[str, float]] = ()


def messages_of(body: Any) -> list[Message]:
    """The messages of a request; raises `ValueError` for what is none."""
    messages = body.get("messages") if isinstance(body, Mapping) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("expected a JSON object with `messages`, a list of at least one")
    if not all(isinstance(one, Mapping) and isinstance(one.get("role"), str) for one in messages):
        raise ValueError("expected each message as an object with `role` and `content`")
    return [cast(Message, {**one, "content": _text(one.get("content"))}) for one in messages]


def _text(content: Any) -> str:
    """A message's content; parts of text are joined, as models see them."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(one, Mapping) and isinstance(one.get("text"), str) for one in parts):
        raise ValueError("expected `content` as text, or as a list of parts of text")
    return "\n".join(one["text"] for one in parts)


def read_exchange(answer: Mapping[str, Any]) -> Exchange:
    """The first choice of an answer; raises what reading something else raises."""
    choice = answer["choices"][0]
    message = choice["message"]
    calls = [_call(one["function"]) for one in message.get("tool_calls") or ()]
    text = str(message.get("content") or "")
    text = write_calls(text, calls) if calls else text
    return Exchange(text, _reason(choice.get("finish_reason")), *_counts(answer.get("usage")))


def _call(function: Mapping[str, Any]) -> Call:
    return Call(function["name"], json.loads(function["arguments"] or "{}"))


def read_places(choice: Mapping[str, Any]) -> list[Place]:
    """The tokens of a choice with their log-probabilities; none where none are given."""

    def named(found: Mapping[str, Any]) -> tuple[str, float]:
        return str(found["token"]), float(found["logprob"])

    try:
        places = (choice.get("logprobs") or {}).get("content") or ()
        return [Place(*named(one), [*map(named, one.get("top_logprobs") or ())]) for one in places]
    except (TypeError, ValueError, KeyError, AttributeError):
        return []


def as_events(answer: Mapping[str, Any], *, counts: bool) -> Iterator[bytes]:
    """A whole answer as the events of a stream: what it says, why it ends, and with `counts` its
    numbers of tokens.
    """
    shared = {key: answer[key] for key in ("id", "created", "model") if key in answer}
    shared["object"] = "chat.completion.chunk"

    def event(*choices: Mapping[str, Any], **more: Any) -> bytes:
        said = {**shared, "choices": choices, **more}
        return f"data: {json.dumps(said, ensure_ascii=False)}\n\n".encode()

    for index, choice in enumerate(answer["choices"]):
        delta = dict(choice["message"])
        if calls := delta.get("tool_calls"):
            delta["tool_calls"] = [{"index": place, **one} for place, one in enumerate(calls)]
        known = {"logprobs": choice["logprobs"]} if choice.get("logprobs") else {}
        yield event({"index": index, "delta": delta, "finish_reason": None, **known})
        yield event({"index": index, "delta": {}, "finish_reason": choice.get("finish_reason")})
    if counts and (usage := answer.get("usage")):
        yield event(usage=usage)
    yield b"data: [DONE]\n\n"


def _reason(said: Any) -> str:
    return "length" if said == "length" else "stop"


def _counts(usage: Any) -> tuple[int, int, int]:
    """Tokens of the prompt, of it from a cache, and of the answer; 0 where nobody counts."""
    usage = usage if isinstance(usage, Mapping) else {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else 0
    counts = (usage.get("prompt_tokens"), cached, usage.get("completion_tokens"))
    prompt, read, response = (one if isinstance(one, int) and one > 0 else 0 for one in counts)
    return prompt, min(read, prompt), response


class SpokenStream:
    """An answer in events, passed on line by line under the name that the client asked for."""

    def __init__(self, name: str) -> None:
        """`name` takes the place of the model's own."""
        self._name, self.done = name, False
        self._text, self._reason = list[str](), "stop"
        self._calls: dict[int, dict[str, str]] = {}
        self._counts, self._kept = (0, 0, 0), 0

    def passed(self, line: bytes) -> bytes:
        """A line for the client; what can't be read goes on as it is."""
        data = line.removeprefix(b"data:").strip()
        if data == line.strip() or not data:
            return line
        if data == b"[DONE]":
            self.done = True
            return line
        try:
            event = json.loads(data)
            self._read(event)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            return line
        if self._name:
            event["model"] = self._name
        return b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n"

    def _read(self, event: Mapping[str, Any]) -> None:
        if event.get("usage"):
            self._counts = _counts(event["usage"])
        for choice in event.get("choices", ()):
            if not choice.get("index"):  # of several the first is read
                self._add(choice.get("delta") or {})
                if said := choice.get("finish_reason"):
                    self._reason = _reason(said)

    def _add(self, delta: Mapping[str, Any]) -> None:
        if text := delta.get("content"):
            self._kept += len(text)
            if self._kept <= _MOST_TEXT:
                self._text.append(text)
        for call in delta.get("tool_calls") or ():
            known = self._calls.setdefault(int(call["index"]), {"name": "", "arguments": ""})
            for key, part in (call.get("function") or {}).items():
                known[key] = known.get(key, "") + (part or "")

    @property
    def exchange(self) -> Exchange:
        """What was said, once it is done; a call that can't be read as it was written."""
        text, calls = "".join(self._text), list[Call | str]()
        for _, one in sorted(self._calls.items()):
            try:
                calls.append(_call(one))
            except (ValueError, RecursionError):
                calls.append(one["arguments"])
        text = write_calls(text, calls) if calls else text
        return Exchange(text, self._reason, *self._counts)


def refused(
    status: int, message: str, *, kind: str = INVALID, code: str | None = None
) -> web.Response:
    """A refusal in the protocol's form."""
    return web.json_response({"error": error_body(message, kind, code)}, status=status)


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error in the protocol's form."""
    return {"message": message, "type": kind, "param": None, "code": code}

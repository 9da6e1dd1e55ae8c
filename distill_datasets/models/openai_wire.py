"""The bodies of `/chat/completions`: what is asked, and what an answer says, whole or streamed.

Answers are read tolerantly: servers differ in names, leave fields out, and send other types.
"""

import json
import math
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import aiohttp

from distill_datasets.conversations import Call, linked, read_calls, write_calls
from distill_datasets.errors import ModelError, RejectedError, RetryableError, ServiceError
from distill_datasets.models.endpoint import MOST_BYTES, too_large
from distill_datasets.models.sampler import (
    Allowance,
    Logprobs,
    Reply,
    Sample,
    Sampling,
    Usage,
    split_thoughts,
)
from distill_datasets.schema import Message, whole_text

_OURS = frozenset({"messages", "model", "n", "stream", "stream_options", "tools"})
_ATTEMPTS = 3  # for an answer that can't be read
_MOST_COUNT = 2**31 - 1  # what a column of counts holds
_TEXTS = ("content", "reasoning_content", "reasoning", "thinking", "refusal")
# Names of the reasons for which a model stopped, in small letters; any other is "stop".
_LENGTH = re.compile(
    "length|(max|model|context|token)_(output_|new_)?(tokens|length|limit)(_reached)?|"
    "model_context_window_exceeded"
)
_FILTERED = re.compile(
    "content_filter(ed)?|safety|recitation|sensitive|blocklist|prohibited_content|spii|refusal|"
    "image_safety|guardrails?(_intervened)?"
)
_NO_LETTERS = re.compile("[^a-z]+")
_FAILED = re.compile(
    "error|abort(ed)?|cancell?ed|failed|timeout|network_error|insufficient_system_resource"
)
_REASONING = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
_TOOLS = frozenset({"tool_calls", "function_call", "tool_use"})
_TOKEN_ID = re.compile(r"token_id:(\d+)")


def write_body(
    model: str,
    messages: Sequence[Message],
    sampling: Sampling,
    *,
    length_key: str = "max_tokens",
    stream: bool = False,
) -> bytes:
    """A request's body; `length_key` is the server's name for `Sampling.max_tokens`."""
    told = zip(messages, linked(messages), strict=True)
    rendered = ",".join(_rendered(one, same.get("tool_call_id")) for one, same in told)
    return f"{_before_messages(model, sampling, length_key, stream)}[{rendered}]}}".encode()


def _rendered(message: Message, answers: str | None) -> str:
    """A message, and the id of the call that it `answers`, which servers require."""
    # The prompt is the same in every request of a run, and may be long.
    if message["role"] == "system":
        return _prompt(message["content"])
    fields: dict[str, Any] = {**message}
    if answers is not None:
        fields["tool_call_id"] = answers
    if message.get("tool_calls") and not message["content"]:
        fields["content"] = None  # some servers take no empty text beside calls
    return json.dumps(fields)


@lru_cache(maxsize=64)
def _prompt(content: str) -> str:
    return json.dumps({"role": "system", "content": content})


@lru_cache(maxsize=64)
def _before_messages(model: str, sampling: Sampling, length_key: str, stream: bool) -> str:
    fields = {"model": model, **parameters(sampling, length_key)}
    if stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(fields)[:-1] + ',"messages":'


def parameters(sampling: Sampling, length_key: str) -> dict[str, Any]:
    """How to sample, in the server's words; `Sampling.extra` is merged over it, a null removes.

    `temperature` and `top_p` are always said, since a server may have others of its own; `top_k`,
    which not every server takes, only where it isn't -1. vLLM and SGLang fill what is not said
    from the model's own generation settings: `extra: {top_k: -1}` says that there is none.
    """
    fields: dict[str, Any] = {
        length_key: sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "n": None if sampling.n == 1 else sampling.n,
        "top_k": None if sampling.top_k == -1 else sampling.top_k,
        "seed": sampling.seed,
        "stop": list(sampling.stop) or None,
    }
    if sampling.top_logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": sampling.top_logprobs}
    if sampling.json_schema is not None:
        form = {"name": "answer", "strict": True, "schema": json.loads(sampling.json_schema)}
        fields["response_format"] = {"type": "json_schema", "json_schema": form}
    if sampling.tools is not None:
        fields["tools"] = json.loads(sampling.tools)
    extra: dict[str, Any] = json.loads(sampling.extra or "{}")
    if taken := sorted(_OURS & {*extra}):
        raise ModelError(
            f"sampling.extra names {taken}, which the request itself sets. Remove them; `n` is "
            "sampling.n, the model is the recipe's teacher, and `tools` is a key of the recipe."
        )
    return {name: value for name, value in (fields | extra).items() if value is not None}


def parse(text: bytes | str) -> dict[str, Any]:
    """The JSON object of an answer; raises `RetryableError` for anything else."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig", errors="replace")
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise bad_answer(repr(text[:200])) from error
    if not isinstance(body, dict):
        raise bad_answer(repr(text[:200]))
    return body


def bad_answer(found: str) -> RetryableError:
    """An answer that doesn't have the protocol's form; it is asked for twice more."""
    found = whole_text(found)
    error = RetryableError(f"Expected a chat completion, found: {found}", type="bad answer")
    error.most_attempts = _ATTEMPTS
    return error


def read_reply(
    body: Mapping[str, Any],
    sampling: Sampling,
    first_token_seconds: float | None = None,
    allowance: Allowance | None = None,
) -> Reply:
    """What a `chat.completion` says.

    Raises `RejectedError` where a sample was filtered or refused, `RetryableError` for an answer
    that is none, and `ServiceError` where the server ignores a part of what was asked.
    """
    try:
        choices = sorted(body["choices"], key=lambda choice: choice.get("index") or 0)
        texts = [_read_choice(choice, called=sampling.tools is not None) for choice in choices]
        if choices and len(choices) != sampling.n:
            raise ServiceError(
                f"Asked for {sampling.n} samples in one request, the server gave {len(choices)}: "
                "it ignores `n`. Set sampling.n to 1, or ask a server that honours it."
            )
        if not choices:
            raise bad_answer("an answer without any choice")
        logprobs = [_read_logprobs(choice.get("logprobs"), sampling) for choice in choices]
        usage, response_tokens = _read_usage(body.get("usage"))
        tokens = _share_out(response_tokens, texts, logprobs)
        samples = tuple(
            Sample(text, stop_reason, count, reasoning, places)
            for (text, reasoning, stop_reason), count, places in zip(
                texts, tokens, logprobs, strict=True
            )
        )
        return Reply(samples, usage, first_token_seconds, allowance)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, RejectedError):
            raise
        raise bad_answer(f"{error!r} in {json.dumps(body)[:300]}") from error


def _read_choice(choice: Mapping[str, Any], *, called: bool) -> tuple[str, str | None, Any]:
    """A choice's text, its reasoning, and why the model stopped; `called` where it had tools."""
    said = choice.get("finish_reason")
    reason = _NO_LETTERS.sub("_", str(said or "").lower()).strip("_")
    message = choice.get("message") or choice.get("delta") or {}
    content = message.get("content", choice.get("text"))
    parts = [_part(one) for one in (content if isinstance(content, list) else [content])]
    joined = dict.fromkeys(("text", "thinking", "refusal"), "")
    for kind, piece in parts:
        joined[kind] = joined.get(kind, "") + piece
    text, refusal = whole_text(joined["text"]), _told(message.get("refusal")) or joined["refusal"]
    if _FILTERED.fullmatch(reason) or refusal:
        held = whole_text(refusal) or "The provider's filter held the answer back."
        raise RejectedError(held, type="content policy")
    if _FAILED.fullmatch(reason):
        error = RetryableError(f"The server stopped the answer: {reason}", type="server error")
        error.most_attempts = _ATTEMPTS
        raise error
    calls = calls_of(message)
    if not called and not text and (calls or reason in _TOOLS):
        raise RejectedError(
            "The model called a tool in place of an answer; the recipe has none to offer.",
            type="bad request",
        )
    thoughts, text = split_thoughts(text)
    if called and calls:
        text = whole_text(write_calls(text, calls))
    told = next((found for name in _REASONING if (found := _told(message.get(name)))), "")
    reasoning = whole_text(told or joined["thinking"]) or thoughts
    cut_off = _LENGTH.fullmatch(reason) is not None
    if not text and not reasoning and (not message or not (cut_off or reason == "stop")):
        raise bad_answer(f"finish_reason {said!r} and message {choice.get('message')!r}")
    return text, reasoning, "length" if cut_off else "stop"


def _part(part: Any) -> tuple[str, str]:
    """A part of a content: its kind ("text", "thinking", "refusal" or another) and its text."""
    if not isinstance(part, dict) or "type" not in part:
        plain = isinstance(part, dict) and part.keys() == {"text"}
        kept = part is None or isinstance(part, str) or plain
        return "text", _told(part) if kept else json.dumps(part, ensure_ascii=False)
    kind = str(part["type"])
    known = {"output_text": "text", "reasoning": "thinking"}
    return known.get(kind, kind), _told(part)


def _told(value: Any) -> str:
    """The text in a field that is a text, a list of such, or an object around one."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(_told, value))
    if isinstance(value, dict):
        names = ("text", "thinking", "reasoning", "refusal", "summary", "value")
        return next((_told(value[name]) for name in names if name in value), "")
    return ""


def _read_logprobs(found: Any, sampling: Sampling) -> Logprobs | None:
    wanted = sampling.top_logprobs
    if wanted is None:
        return None
    places = found.get("content") if isinstance(found, dict) else None
    if places is None:
        raise ServiceError(
            "Asked for log-probabilities, the server gave none: it ignores `logprobs`. Remove "
            "sampling.top_logprobs, or ask a server that has them."
        )
    tops = [
        sorted(place["top_logprobs"], key=lambda top: -top["logprob"])[:wanted] if wanted else []
        for place in places
    ]
    if tops and max(map(len, tops)) < wanted:
        raise ServiceError(
            f"Asked for the {wanted} most likely tokens of each place, the server gave "
            f"{max(map(len, tops))}. Lower sampling.top_logprobs to what it has."
        )
    return Logprobs(
        tuple(_token(place["token"]) for place in places),
        tuple(place["logprob"] for place in places),
        tuple(tuple(_token(top["token"]) for top in row) for row in tops) if wanted else (),
        tuple(tuple(top["logprob"] for top in row) for row in tops) if wanted else (),
    )


def _token(text: str) -> int | str:
    match = _TOKEN_ID.fullmatch(text)
    return int(match[1]) if match else whole_text(text)


def _share_out(
    total: int | None,
    texts: Sequence[tuple[str, str | None, Any]],
    logprobs: Sequence[Logprobs | None],
) -> list[int | None]:
    """Each sample's tokens. The server counts those of all together, so this is exact for one.

    Several share by their numbers of log-probabilities, or without any by the lengths of their
    texts: only the sum is the server's.
    """
    if len(texts) == 1 or total is None:
        return [total] * len(texts)
    weights = [
        len(places.tokens) if places else len(text) + len(reasoning or "")
        for (text, reasoning, _), places in zip(texts, logprobs, strict=True)
    ]
    ends, whole, before = [], sum(weights) or 1, 0
    for weight in weights:
        before += weight
        ends.append(round(total * before / whole))
    ends[-1] = total
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _read_usage(usage: Any) -> tuple[Usage, int | None]:
    """The token counts of an answer and those of its samples, None where nothing counts them."""
    usage = usage if isinstance(usage, dict) else {}
    prompt = _count(usage, "prompt_tokens", "input_tokens")
    response = _count(usage, "completion_tokens", "output_tokens")
    total = _count(usage, "total_tokens")
    if total is not None and response is None and prompt is not None and total >= prompt:
        response = total - prompt
    if total is not None and prompt is None and response is not None and total >= response:
        prompt = total - response
    asked, said = (
        usage.get(f"{one}_tokens_details") or usage.get(f"{other}_tokens_details")
        for one, other in (("prompt", "input"), ("completion", "output"))
    )
    cached = _count(asked, "cached_tokens") or _count(usage, "prompt_cache_hit_tokens") or 0
    reasoning = _count(said, "reasoning_tokens") or _count(usage, "reasoning_tokens") or 0
    cost = _number(usage.get("cost"))
    return Usage(prompt, cached, reasoning, cost if cost is None or cost >= 0 else None), response


def _count(counts: Any, *names: str) -> int | None:
    """The first number of tokens under one of the names; None where there is none.

    Raises `RetryableError` for an impossible one.
    """
    for name in names if isinstance(counts, dict) else ():
        number = _number(counts.get(name))
        if number is None or number < 0 or number != int(number):
            continue
        if number > _MOST_COUNT:
            found = f"{name} {str(counts[name])[:40]}"
            raise bad_answer(f"{found}, more tokens than any model reads or writes")
        return int(number)
    return None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except OverflowError:
        return float(_MOST_COUNT) * 2
    except ValueError:
        return None
    return number if math.isfinite(number) else None


async def read_stream(content: aiohttp.StreamReader) -> tuple[dict[str, Any], float | None]:
    """The body of a `chat.completion`, and when (monotonic seconds) its first text came.

    A stream that says what went wrong is that error's body. Raises `RetryableError` for one that
    breaks off.
    """
    choices: dict[int, dict[str, Any]] = {}
    usage, arrived, done = None, None, False
    async for chunk in _events(content):
        if chunk is None:
            done = True
            continue
        if chunk.get("error"):
            return {"error": chunk["error"]}, None
        usage = chunk.get("usage") or usage
        try:
            told = any([_add(choices, part) for part in chunk.get("choices") or ()])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise bad_answer(f"{error!r} in the streamed {json.dumps(chunk)[:200]}") from error
        if told and arrived is None:
            arrived = time.monotonic()
    ended = bool(choices) and all(choice["finish_reason"] for choice in choices.values())
    if not done and not (ended and usage):
        raise bad_answer("a stream that broke off")
    return {"choices": list(map(_joined, choices.values())), "usage": usage}, arrived


def _joined(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice whose texts came in pieces, each maybe half of a surrogate pair."""
    message = {
        name: "".join(pieces) if all(isinstance(piece, str) for piece in pieces) else pieces
        for name, pieces in choice["message"].items()
    }
    if calls := choice["calls"].joined:
        message["tool_calls"] = calls
    return {**choice, "message": message}


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any] | None]:
    """The objects of server-sent events, None for the last one.

    Lines of one event are joined; an event is over with its object, since some servers send no
    blank line after it.
    """
    # By hand: the reader's own lines may not be longer than 128 KB.
    rest, pending, size = b"", b"", 0
    async for piece in content.iter_any():
        size += len(piece)
        *lines, rest = re.split(rb"\r\n|\n|\r(?!\Z)", rest + piece)
        if size > 8 * MOST_BYTES or len(rest) > MOST_BYTES or len(pending) > MOST_BYTES:
            raise too_large()
        for line in lines:
            line = line.removeprefix(b"\xef\xbb\xbf")
            if line.startswith(b"data:"):
                pending = b"\n".join(filter(None, (pending, line[5:].strip())))
                with suppress(RetryableError):
                    yield None if pending == b"[DONE]" else parse(pending)
                    pending = b""
            elif not line.strip() and pending:
                yield parse(pending)
                pending = b""
    pending += rest.strip().removeprefix(b"data:")
    if pending:
        yield None if pending.strip() == b"[DONE]" else parse(pending)


def _add(choices: dict[int, dict[str, Any]], part: Mapping[str, Any]) -> bool:
    """Join a part to its choice; whether it has any text."""
    index = part.get("index") or 0
    empty: dict[str, Any] = {"index": index, "message": {}, "finish_reason": None, "logprobs": None}
    choice = choices.setdefault(index, empty | {"calls": CallPieces()})
    choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
    if places := (part.get("logprobs") or {}).get("content"):
        if choice["logprobs"] is None:
            choice["logprobs"] = {"content": []}
        choice["logprobs"]["content"] += places
    delta = part.get("delta") or part.get("message") or {}
    said: bool = choice["calls"].add(delta)
    for name in _TEXTS:
        if text := delta.get(name):
            pieces = choice["message"].setdefault(name, [])
            pieces.extend(text if isinstance(text, list) else [text])
            said = True
    return said


def calls_of(message: Mapping[str, Any]) -> list[Call | str]:
    """What a message calls; a call that can't be read is the JSON text that came."""
    return [_read_call(one) for one in _listed(message)]


def _listed(message: Mapping[str, Any]) -> list[Any]:
    # `function_call` is how the protocol called one tool before it had several.
    found = message.get("tool_calls") or message.get("function_call") or []
    return found if isinstance(found, list) else [found]


def _read_call(one: Any) -> Call | str:
    try:
        return read_calls([one])[0]
    except ValueError:
        return json.dumps(one, ensure_ascii=False)


class CallPieces:
    """The calls of a streamed message: names and arguments come in pieces, calls side by side."""

    def __init__(self) -> None:
        """None so far."""
        self._calls: list[dict[str, Any]] = []
        self._by_index: dict[Any, dict[str, Any]] = {}

    def add(self, delta: Mapping[str, Any]) -> bool:
        """Join a part of a message; whether it has any call."""
        pieces = _listed(delta)
        for piece in pieces:
            said = piece.get("function", piece)
            call = self._call(piece, said)
            call["id"] = call["id"] or piece.get("id")
            name = said.get("name") or ""
            call["name"] += "" if name == call["name"] else name  # some repeat it in every piece
            if arguments := said.get("arguments"):
                call["arguments"].append(arguments)
        return bool(pieces)

    def _call(self, piece: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
        """The call that a piece continues: the one of its index, unless it names another id.

        Servers that give no index, or the same to all, send each call whole.
        """
        index, id = piece.get("index"), piece.get("id")
        call = self._by_index.get(index)
        begins = call is None or (id and call["id"] and id != call["id"])
        if index is None and id is None and said.get("name") and call and call["arguments"]:
            begins = True
        if call is None or begins:
            call = {"id": None, "name": "", "arguments": []}
            self._calls.append(call)
            self._by_index[index] = call
        return call

    @property
    def joined(self) -> list[dict[str, Any]]:
        """Calls as a message that wasn't streamed has them."""
        return [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": _together(call["arguments"])},
            }
            for call in self._calls
        ]


def _together(pieces: list[Any]) -> Any:
    """Texts as one, or the object that came whole."""
    return "".join(pieces) if all(isinstance(one, str) for one in pieces) else pieces[-1]

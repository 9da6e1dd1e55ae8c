"""Requests and answers of OpenAI's protocol as a proxy needs them: read, and passed on."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from distill_datasets.conversations import Call, write_calls
from distill_datasets.schema import Message
from distill_datasets.serving.rollout import Exchange

_MOST_TEXT = 1 << 20  # characters of a stream that are kept to be counted


class Place(NamedTuple):
    """A token of an answer, its log-probability, and the likeliest tokens in its place."""

    token: str
    logprob: float
    likeliest: Sequence[tuple[str, float]] = ()


def read_messages(body: Any) -> list[Message]:
    """The messages of a request; raises `ValueError` for what is none."""
    messages = body.get("messages") if isinstance(body, Mapping) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("expected a JSON object with `messages`, a list of at least one")
    found: list[Message] = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError("expected each message as an object with `role` and `content`")
        read: Any = {**message, "content": _text(message.get("content"))}
        found.append(read)
    return found


def _text(content: Any) -> str:
    """A message's content; parts of text are joined, as models see them."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(one, Mapping) and isinstance(one.get("text"), str) for one in parts):
        raise ValueError("expected `content` as text, or as a list of parts of text")
    return "\n".join(one["text"] for one in parts)


def read_exchange(answer: Mapping[str, Any]) -> Exchange:
    """The first choice of an answer; raises what reading something else raises."""
    choice = answer["choices"][0]
    message = choice["message"]
    calls = [
        Call(one["function"]["name"], json.loads(one["function"]["arguments"] or "{}"))
        for one in message.get("tool_calls") or ()
    ]
    text = str(message.get("content") or "")
    text = write_calls(text, calls) if calls else text
    return Exchange(text, _reason(choice.get("finish_reason")), *_counts(answer.get("usage")))


def read_places(choice: Mapping[str, Any]) -> list[Place]:
    """The tokens of a choice with their log-probabilities; none where none are given."""
    found = choice.get("logprobs")
    places = found.get("content") if isinstance(found, Mapping) else None
    try:
        return [
            Place(*_named(one), [*map(_named, one.get("top_logprobs") or ())])
            for one in places or ()
        ]
    except (TypeError, ValueError, KeyError, AttributeError):
        return []


def _named(found: Mapping[str, Any]) -> tuple[str, float]:
    return str(found["token"]), float(found["logprob"])


def as_events(answer: Mapping[str, Any], *, counts: bool) -> Iterator[bytes]:
    """A whole answer as the events of a stream: what it says, why it ends, and with `counts` its
    numbers of tokens.
    """
    shared = {key: answer[key] for key in ("id", "created", "model") if key in answer}
    shared["object"] = "chat.completion.chunk"
    for index, choice in enumerate(answer["choices"]):
        calls = choice["message"].get("tool_calls") or ()
        delta = dict(choice["message"])
        if calls:
            delta["tool_calls"] = [{"index": place, **one} for place, one in enumerate(calls)]
        first = {"index": index, "delta": delta, "finish_reason": None}
        last = {"index": index, "delta": {}, "finish_reason": choice.get("finish_reason")}
        if choice.get("logprobs"):
            first["logprobs"] = choice["logprobs"]
        for event in ({"choices": [first]}, {"choices": [last]}):
            yield f"data: {json.dumps({**shared, **event}, ensure_ascii=False)}\n\n".encode()
    if counts and (usage := answer.get("usage")):
        yield f"data: {json.dumps({**shared, 'choices': [], 'usage': usage})}\n\n".encode()
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
            if not choice.get("index"):  # the first, of several
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
        """What was said, once it is done."""
        text = "".join(self._text)
        if self._calls:
            text = write_calls(text, [_called(one) for _, one in sorted(self._calls.items())])
        return Exchange(text, self._reason, *self._counts)


def _called(said: Mapping[str, str]) -> Call | str:
    """A call; its arguments as they were written where those can't be read."""
    try:
        return Call(said["name"], json.loads(said["arguments"] or "{}"))
    except (ValueError, RecursionError):
        return said["arguments"]

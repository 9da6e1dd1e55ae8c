"""What the engine draws for a request, while it runs, as bodies of OpenAI's protocol."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_datasets.conversations import Call, assistant_message, tool_calls
from distill_datasets.embedded.scheduler import Payload, SampleJob
from distill_datasets.embedded.wire import DrawnSample, InvalidRequestError, SampleRequest, pb
from distill_datasets.errors import ModelError, ServiceError
from distill_datasets.models.renderers import Prompts, TextRenderer, open_renderer
from distill_datasets.serving.protocol import ChatRequest, RequestSettings

if TYPE_CHECKING:
    from aiohttp import web

    from distill_datasets.embedded.engine import Service
    from distill_datasets.embedded.logits import Constrain

_CALL = "<tool_call>"
_OPENED, _CLOSED = "<think>", "</think>"
_HALF = "\ufffd"  # what a part of a character is decoded as
_LONGEST_CHARACTER = 4  # tokens
# Texts that are control tokens in one vocabulary and plain ones in another.
_MARK = re.compile(r"</?think>|<tool_call|<function|<[|｜]")
_LONGEST_MARK = 16
# A response is read whole a few tokens behind a mark, else once it has grown so much; and in all so
# many times its tokens, so that whatever a model writes takes time in proportion.
_NEAR, _MORE, _MOST = 8, 1.25, 16
CALL_OPENING = "<tool_call>\n"
_TOOL = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}
_PROBE = json.dumps([{"type": "function", "function": _TOOL}])
# The likeliest tokens of one place and their logprobs.
Top = tuple[list[int], list[float]]


@dataclass(frozen=True)
class ChatFormat:
    """How messages become tokens and tokens a message, for models of one base."""

    tokenizer: Any
    name: str

    @cached_property
    def renderer(self) -> TextRenderer:
        """Raises `ModelError` for a model without a chat format."""
        return open_renderer(self.name, self.tokenizer)

    @cached_property
    def prompts(self) -> Prompts:
        """Renders conversations, token for token as a Tinker client of ours does."""
        return Prompts(self.renderer)

    @cached_property
    def _stops(self) -> Sequence[Any]:
        try:
            return list(self.renderer.get_stop_sequences())
        except ModelError:
            return ()

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        found = [one for one in self._stops if isinstance(one, int)]
        found = found or [self.tokenizer.eos_token_id]
        return tuple(one for one in dict.fromkeys(found) if one is not None)

    @cached_property
    def end_texts(self) -> tuple[str, ...]:
        """The texts that end an answer, in formats that end it so."""
        return tuple(one for one in self._stops if isinstance(one, str))

    @cached_property
    def call_opening(self) -> tuple[int, ...]:
        """The tokens before the JSON of a call, in formats that write one as `write_calls` does.

        Raises `InvalidRequestError` for another format.
        """
        said = Call("f", {})
        turns: Any = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": tool_calls([said])},
        ]
        example, _ = self.renderer.build_supervised_example(turns, tools=_PROBE)
        if CALL_OPENING + said.text not in self.tokenizer.decode(example.to_ints()):
            raise InvalidRequestError(
                "expected tool_choice of 'auto' or 'none': this model's chat format does not write "
                f"calls as JSON behind {CALL_OPENING.strip()}, to which an answer can be held"
            )
        return tuple(self.tokenizer.encode(CALL_OPENING, add_special_tokens=False))

    @cached_property
    def controls(self) -> frozenset[int]:
        """The tokens that may mean something to the renderer."""
        return frozenset([*self.ends, *self.tokenizer.all_special_ids])


@dataclass(frozen=True)
class Outcome:
    """What a request came to; `prompt_logprobs` and `prompt_top` are those of the prompt's tokens,
    None for the first, and empty where they were not asked for.
    """

    samples: list[DrawnSample]
    cached: int
    prompt_logprobs: list[float | None]
    prompt_top: list[Top | None]


class LiveRequest:
    """One request, submitted when it is made, and given up once its `client` went away."""

    def __init__(
        self,
        service: Service,
        weights: str,
        request: SampleRequest,
        client: web.Request,
        asked: RequestSettings,
        constrain: Constrain | None = None,
    ) -> None:
        self._loop, self._client = asyncio.get_running_loop(), client
        # The likeliest tokens are known at the end only: with them a stream comes at once.
        self._stream = asked.stream and not asked.top
        self._drawn: deque[tuple[int, int, float]] = deque()
        self._changed, self._told = asyncio.Event(), False
        self._payload: Payload | None = None
        job = SampleJob(weights, request, self._resolve, watch=self._watch, constrain=constrain)
        service.compute.submit(job)

    def _watch(self, sample: int, token: int, logprob: float) -> bool:
        """On the compute thread: wakes the event loop once, however many tokens it has to fetch."""
        if self._stream:
            self._drawn.append((sample, token, logprob))
            if not self._told:
                self._told = True
                self._loop.call_soon_threadsafe(self._changed.set)
        return not self._left()

    def _resolve(self, payload: Payload) -> None:
        self._payload = payload
        self._loop.call_soon_threadsafe(self._changed.set)

    def _left(self) -> bool:
        return self._client.transport is None or self._client.transport.is_closing()

    async def drawn(self) -> list[tuple[int, int, float]]:
        """Samples, tokens and logprobs since the last call, at least one; none at the end."""
        while not self._drawn and self._payload is None:
            await self._wait()
        return [self._drawn.popleft() for _ in range(len(self._drawn))]

    async def _wait(self) -> None:
        await self._changed.wait()
        self._changed.clear()
        self._told = False

    async def outcome(self) -> Outcome:
        """Wait for the end.

        Raises `InvalidRequestError` for what can't be answered, and `ServiceError` for the server's
        own failure, or where nobody waits any more.
        """
        while self._payload is None:
            await self._wait()
        if self._left():
            raise ServiceError("the client went away")
        if not isinstance(self._payload, bytes):
            failed = self._payload.get("category") == "server"
            raise (ServiceError if failed else InvalidRequestError)(str(self._payload.get("error")))
        found = pb.SampleResponse.FromString(self._payload)
        samples = [
            DrawnSample(
                np.frombuffer(one.tokens, np.int32).tolist(),
                np.frombuffer(one.logprobs, np.float32).tolist(),
                _read_top(one.topk_sampled_logprobs),
                one.stop_reason == pb.STOP_REASON_STOP,
            )
            for one in found.sequences
        ]
        known = np.frombuffer(found.prompt_logprobs, np.float32).tolist()
        prompt, top = [None, *known[1:]] if known else [], _read_top(found.topk_prompt_logprobs)
        known_top = [None, *top[1:]] if top else []
        return Outcome(samples, found.prompt_cache_hit_tokens, prompt, known_top)


def _read_top(found: pb.TopkLogprobs) -> list[Top]:
    shape = (found.length, found.k)
    ids = np.frombuffer(found.token_ids, np.int32).reshape(shape).tolist()
    logprobs = np.frombuffer(found.logprobs, np.float32).reshape(shape).tolist()
    return list(zip(ids, logprobs, strict=True))


@dataclass(frozen=True)
class SpokenMessage:
    """A response as a message: its words, calls and thoughts; `cut` says that a stop ended it."""

    content: str
    cut: bool
    calls: Sequence[Mapping[str, Any]] = ()
    reasoning: str | None = None


@dataclass(frozen=True)
class TextReader:
    """Reads a plain continuation, and says how much of it can't change any more."""

    format: ChatFormat
    asked: RequestSettings

    def read(self, tokens: Sequence[int]) -> SpokenMessage:
        """The text without the token that ended it, up to a stop."""
        ended = tokens[-1:] and tokens[-1] in self.format.ends
        text = str(self.format.tokenizer.decode(tokens[:-1] if ended else tokens))
        return SpokenMessage(*_cut(text, self.asked.stop))

    def settled(self, said: Choice) -> str:
        """The text but for what may be the beginning of a character or of a stop."""
        text = said.text
        if said.tokens[-1:] and said.tokens[-1] in self.format.ends:
            text = text.removesuffix(str(self.format.tokenizer.decode(said.tokens[-1:])))
        return _settled(_cut(text, self.asked.stop)[0], self.asked.stop)

    def plain(self, tokens: Sequence[int]) -> str:
        """All of it, with whatever a chat format writes around words."""
        return TextReader.read(self, tokens).content


@dataclass(frozen=True)
class ChatReader(TextReader):
    """Reads messages as a chat format writes them; `thinks` where its prompt opens the thoughts.

    Where the prompt opened a call of a tool, an answer is the JSON of this one.
    """

    asked: ChatRequest
    tools: str | None
    thinks: bool

    def read(self, tokens: Sequence[int]) -> SpokenMessage:
        """The message that the renderer reads, up to a stop."""
        text, reasoning = self.format.renderer.read_response(tokens, tools=self.tools)
        text, cut = _cut(text, self.asked.stop)
        if self.tools is None:
            return SpokenMessage(text, cut, (), reasoning)
        try:
            whole = f"{CALL_OPENING}{text}\n</tool_call>" if self.asked.calls else text
            message = assistant_message(whole, calls=True, after=self.asked.messages)
        except ValueError:  # a call that can't be read is what the model said
            return SpokenMessage(text, cut, (), reasoning)
        return SpokenMessage(message["content"], cut, message.get("tool_calls", ()), reasoning)

    def settled(self, said: Choice) -> str:
        """Its words before any call, once its thoughts are over."""
        raw = said.text.lstrip()
        opens = self.thinks or raw.startswith(_OPENED) or _OPENED.startswith(raw)
        if self.asked.calls or (opens and _CLOSED not in raw):
            return ""
        marks = (*self.asked.stop, *((_CALL,) if self.tools else ()))
        return _settled(_cut(self._words(said), marks)[0], marks)

    def _words(self, said: Choice) -> str:
        """The words as the renderer reads them, which reads all of them only where it must: behind
        them text is words too, until a token or a text comes that may mean something to it.
        """
        count, start = len(said.tokens), max(0, said.seen - _LONGEST_MARK)
        if any(one.end() > said.seen for one in _MARK.finditer(said.text, start)):
            said.marked = count
        if said.marked <= said.whole and said.behind is not None:
            return said.words + said.text[said.behind :]
        due = count <= said.marked + _NEAR or count >= _MORE * said.whole
        if due and said.spent <= _MOST * count:
            said.spent += count
            words, _ = self.format.renderer.read_response(said.tokens, tools=self.tools)
            said.words, said.whole = words.rstrip(_HALF).rstrip(), count
            said.seen, place = len(said.text), len(said.text.rstrip())
            ends = bool(said.words) and said.text[:place].endswith(said.words)
            said.behind = place if ends else None
        return said.words


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _settled(text: str, marks: Sequence[str]) -> str:
    begun = [
        len(text) - size
        for mark in marks
        for size in range(1, min(len(mark), len(text) + 1))
        if text.endswith(mark[:size])
    ]
    # Blanks at an end may not be part of the message.
    return text[: min(begun, default=len(text))].rstrip()


class Choice:
    """One sample in a stream: its tokens with their text, and how many of both were sent.

    Each token is decoded a few times, however many follow. `marked` counts the tokens up to the
    last control token. Of what a chat's renderer read whole, the reader keeps how many tokens
    (`whole`) and characters (`seen`) those were, in all readings together too (`spent`), the
    `words`, and where these end in the `text`: None where they are not the end of it.
    """

    def __init__(self, reader: TextReader) -> None:
        self.reader, self._decode = reader, reader.format.tokenizer.decode
        self.tokens, self.logprobs, self.text = list[int](), list[float](), ""
        self._begin, self._end, self._tried = 0, 0, 0
        self.marked, self.whole, self.seen, self.spent, self.words = 0, 0, 0, 0, ""
        self.behind: int | None = None
        self.sent, self.told = "", 0

    def add(self, drawn: Sequence[tuple[int, float]]) -> None:
        """Take note of tokens and their log-probabilities; half a character at their end is not
        yet part of the text.
        """
        for token, logprob in drawn:
            self.tokens.append(token)
            self.logprobs.append(logprob)
            if token in self.reader.format.controls:
                self.marked = len(self.tokens)
        waiting = len(self.tokens) - self._end
        if not waiting or (waiting > _LONGEST_CHARACTER and waiting < 2 * self._tried):
            return
        # What was decoded last stands before what is new: blanks may depend on it.
        before = len(self._decode(self.tokens[self._begin : self._end]))
        shortest = max(self._end, len(self.tokens) - _LONGEST_CHARACTER)
        for end in range(len(self.tokens), shortest, -1):
            new = str(self._decode(self.tokens[self._begin : end]))[before:]
            if not new.endswith(_HALF):
                self.text += new
                self._begin, self._end, self._tried = self._end, end, 0
                return
        self._tried = waiting

    def news(self) -> str:
        """Words that can be sent now."""
        settled = self.reader.settled(self)
        if not settled.startswith(self.sent):
            return ""
        self.sent, new = settled, settled[len(self.sent) :]
        return new

    def rest(self, whole: str, plain: str) -> str | None:
        """Words that are still to be sent, of the `whole` or, where that begins otherwise, as in
        thoughts that nothing opened, of the `plain` text; None where others were sent before.
        """
        texts = (one[len(self.sent) :] for one in (whole, plain) if one.startswith(self.sent))
        return next(texts, None)


@dataclass(frozen=True)
class BodyWriter:
    """Writes the bodies of one answer."""

    reader: TextReader
    fingerprint: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def asked(self) -> RequestSettings:
        """What was asked for."""
        return self.reader.asked

    @property
    def chat(self) -> bool:
        """Whether a chat is answered, and not a text."""
        return isinstance(self.reader, ChatReader)

    def body(self, choices: Sequence[Mapping[str, Any]], *, chunk: bool = False) -> dict[str, Any]:
        """An answer, or a chunk of one."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": f"{kind}.chunk" if chunk and self.chat else kind,
            "created": self.created,
            "model": self.asked.model,
            "system_fingerprint": self.fingerprint,
            "choices": list(choices),
        }

    def choice(self, index: int, said: SpokenMessage, sample: DrawnSample) -> dict[str, Any]:
        """A whole sample as a choice; `said` is how it is read."""
        places = self.logprobs(sample.tokens, sample.logprobs, sample.top)
        found = {"index": index, "finish_reason": _finish(said, sample), "logprobs": places}
        if not self.chat:
            return {**found, "text": said.content}
        message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        if said.calls:
            message |= {"content": said.content or None, "tool_calls": list(said.calls)}
        return {**found, "message": message}

    def echo(
        self, choice: dict[str, Any], prompt: Sequence[int], outcome: Outcome, sample: DrawnSample
    ) -> dict[str, Any]:
        """A choice behind its prompt, with the log-probabilities of both."""
        logprobs = [*outcome.prompt_logprobs, *sample.logprobs]
        top = [*outcome.prompt_top, *sample.top] if self.asked.top else []
        places = self._text_logprobs([*prompt, *sample.tokens], logprobs, top)
        text = f"{self.reader.format.tokenizer.decode(prompt)}{choice['text']}"
        return {**choice, "text": text, "logprobs": places}

    def delta(self, index: int, choice: Choice, text: str) -> dict[str, Any]:
        """More words of a choice, with the log-probabilities of all tokens since the last."""
        places = self.logprobs(choice.tokens[choice.told :], choice.logprobs[choice.told :], [])
        choice.told = len(choice.tokens)
        said = {"delta": {"content": text}} if self.chat else {"text": text}
        return {"index": index, "finish_reason": None, "logprobs": places, **said}

    def last_delta(
        self, index: int, choice: Choice, said: SpokenMessage, text: str, sample: DrawnSample
    ) -> dict[str, Any]:
        """The end of a choice: all that was not sent before."""
        new = slice(choice.told, None)
        places = self.logprobs(sample.tokens[new], sample.logprobs[new], sample.top[new])
        found = {"index": index, "finish_reason": _finish(said, sample), "logprobs": places}
        if not self.chat:
            return {**found, "text": text}
        delta: dict[str, Any] = {"content": text} if text else {}
        if said.reasoning:
            delta["reasoning_content"] = said.reasoning
        if said.calls:
            delta["tool_calls"] = [{"index": n, **call} for n, call in enumerate(said.calls)]
        return {**found, "delta": delta}

    def logprobs(
        self, tokens: Sequence[int], logprobs: Sequence[float], top: Sequence[Top]
    ) -> dict[str, Any] | None:
        """Log-probabilities as chats or texts have them; None where they were not asked for."""
        if not self.chat or self.asked.top is None:
            return self._text_logprobs(tokens, logprobs, top)
        places = []
        rows = top or [([], [])] * len(tokens)
        for token, logprob, row in zip(tokens, logprobs, rows, strict=True):
            likeliest = [self._place(*one) for one in zip(*row, strict=True)]
            places.append({**self._place(token, logprob), "top_logprobs": likeliest})
        return {"content": places, "refusal": None}

    def _text_logprobs(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float | None],
        top: Sequence[Top | None],
    ) -> dict[str, Any] | None:
        if self.asked.top is None:
            return None
        rows = [
            row and {self._name(id): value for id, value in zip(*row, strict=True)} for row in top
        ]
        return {
            "tokens": [self._name(token) for token in tokens],
            "token_logprobs": list(logprobs),
            "top_logprobs": rows or None,
            "text_offset": [0, *accumulate(len(self._text(token)) for token in tokens)][:-1],
        }

    def _place(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        known = None if _HALF in text else list(text.encode())
        return {"token": self._name(token), "logprob": logprob, "bytes": known}

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self.asked.by_id else self._text(token)

    def _text(self, token: int) -> str:
        return str(self.reader.format.tokenizer.decode([token]))


def _finish(said: SpokenMessage, sample: DrawnSample) -> str:
    """Why a choice ended, in the protocol's words."""
    if said.calls:
        return "tool_calls"
    return "stop" if sample.stopped or said.cut else "length"


def usage(prompts: Sequence[Sequence[int]], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The token counts of requests, by their prompts and what they came to."""
    read = sum(map(len, prompts))
    drawn = sum(len(one.tokens) for outcome in outcomes for one in outcome.samples)
    return {
        "prompt_tokens": read,
        "completion_tokens": drawn,
        "total_tokens": read + drawn,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached for one in outcomes)},
    }

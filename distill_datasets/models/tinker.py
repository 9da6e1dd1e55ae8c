"""Samples from Tinker, and from every server of its protocol, such as the one in embedded/."""

import asyncio
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from os.path import commonprefix
from typing import Any

import tinker

from distill_datasets.errors import AccessError, ModelError
from distill_datasets.models import tinker_sdk as sdk
from distill_datasets.models.connection import Connection
from distill_datasets.models.endpoint import Standing
from distill_datasets.models.sampler import Logprobs, Reply, Sample, Sampling, Usage
from distill_datasets.schema import Message

# Rows that are rendered both ways before what was learned is trusted.
_VERIFIED = 8
# Shapes of conversations that are remembered; a recipe has one.
_MOST_SHAPES = 16
# Below this many characters a common beginning costs more to look for than to tokenize.
_WORTHWHILE = 64


@dataclass
class _Surroundings:
    """The tokens around the last message's text, which differs from row to row."""

    head: list[int]
    tail: list[int]
    verified: int = 0
    last: str | None = None
    fixed: str = ""
    fixed_tokens: Sequence[int] = ()


class Prompts:
    """Renders conversations as a cookbook renderer does, token for token.

    Most rows of a recipe differ in the last message alone, and there behind a long common text.
    The rest is taken from earlier rows, but only where tokens can't reach across: at chunks that
    the renderer encodes apart, at control tokens, and at line starts of tokenizers that always
    split there. The first rows are rendered both ways; one difference ends it.
    """

    def __init__(self, renderer: Any) -> None:
        """`renderer` is one that `open_renderer` opens."""
        self._renderer = renderer
        self._known: dict[tuple[Any, ...], _Surroundings | None] = {}
        self._encoder = getattr(renderer.tokenizer, "backend_tokenizer", None)
        self._controls = frozenset(_control_ids(renderer.tokenizer))
        self._by_lines = self._encoder is not None and _splits_at_lines(self._encoder)

    def tokens(self, messages: Sequence[Message], tools: str | None = None) -> list[int]:
        """The prompt that asks for the next message."""
        *before, last = messages
        content = last["content"]
        key = (tools, *map(_shape, before), *_shape({**last, "content": ""}))
        around = self._known.get(key)
        # Renderers may strip blanks; control tokens in a text may mean something to them.
        own = None if around is None or _blank_at_an_end(content) else self._text(around, content)
        if around is not None and own is not None and around.verified >= _VERIFIED:
            return [*around.head, *own, *around.tail]
        rendered = self._render(messages, tools)
        whole = [token for chunk in rendered for token in chunk]
        if key not in self._known and len(self._known) < _MOST_SHAPES:
            self._known[key] = self._learn(rendered, content)
        elif around is not None and own is not None:
            self._verify(key, around, whole == [*around.head, *own, *around.tail])
        return whole

    def _verify(self, key: tuple[Any, ...], around: _Surroundings, equal: bool) -> None:
        around.verified += 1
        if not equal:
            self._known[key] = None

    def _render(self, messages: Sequence[Message], tools: str | None) -> list[list[int]]:
        prompt = self._renderer.build_generation_prompt(messages, tools=tools)
        return [list(chunk.tokens) for chunk in prompt.chunks]

    def _learn(self, chunks: Sequence[list[int]], content: str) -> _Surroundings | None:
        """What stands around the text in a rendered conversation; None where that can't be told."""
        if self._encoder is None or _blank_at_an_end(content):
            return None
        own = self._encode(content)
        for index, chunk in reversed(list(enumerate(chunks))):
            for start in range(len(chunk) - len(own), -1, -1):
                end = start + len(own)
                if chunk[start:end] == own and self._stands_apart(chunk, start, end):
                    head = [token for one in chunks[:index] for token in one] + chunk[:start]
                    tail = chunk[end:] + [token for one in chunks[index + 1 :] for token in one]
                    return _Surroundings(head, tail)
        return None

    def _stands_apart(self, chunk: Sequence[int], start: int, end: int) -> bool:
        """Whether no text between these two places can merge with what is around it."""
        begins = start == 0 or chunk[start - 1] in self._controls or self._ends_line(chunk[:start])
        return begins and (end == len(chunk) or chunk[end] in self._controls)

    def _ends_line(self, tokens: Sequence[int]) -> bool:
        text: str = self._renderer.tokenizer.decode(tokens[-1:])
        return self._by_lines and text.endswith("\n")

    def _text(self, around: _Surroundings, content: str) -> list[int] | None:
        """The tokens of the last message; None if it has control tokens."""
        if not around.fixed or not content.startswith(around.fixed):
            self._fix(around, content)
        if around.fixed and content.startswith(around.fixed):
            rest = self._encode(content[len(around.fixed) :])
            own = [*around.fixed_tokens, *rest]
        else:
            own = rest = self._encode(content)
        return own if self._controls.isdisjoint(rest) else None

    def _fix(self, around: _Surroundings, content: str) -> None:
        """Keep the lines that this row begins with like the one before."""
        shared = "" if around.last is None else commonprefix([around.last, content])
        around.last = content
        place = _last_line_start(shared) if self._by_lines else 0
        if place >= _WORTHWHILE:
            tokens = self._encode(shared[:place])
            if self._controls.isdisjoint(tokens):
                around.fixed, around.fixed_tokens = shared[:place], tokens

    def _encode(self, text: str) -> list[int]:
        # Past the wrapper of transformers, which takes five times as long for a short text.
        assert self._encoder is not None
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids


def _shape(message: Message) -> tuple[Any, ...]:
    """All of a message, as a key: calls have their own, and answers of tools name theirs."""
    rest = {name: value for name, value in message.items() if name not in ("role", "content")}
    return message["role"], message["content"], json.dumps(rest) if rest else ""


def _blank_at_an_end(content: str) -> bool:
    return not content or content[0].isspace() or content[-1].isspace()


def _last_line_start(text: str) -> int:
    """Where the last line that does not begin with a blank begins; 0 if there is none."""
    place = len(text)
    while (place := text.rfind("\n", 0, place)) >= 0:
        if place + 1 < len(text) and not text[place + 1].isspace():
            return place + 1
    return 0


def _control_ids(tokenizer: Any) -> list[int]:
    """Tokens that are cut out of a text before anything else, without the blanks around them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return [id for id, token in added.items() if not (token.lstrip or token.rstrip)]


def _splits_at_lines(encoder: Any) -> bool:
    """Whether a new line always begins a new token, whatever characters stand around it.

    Pre-tokenizers tell apart letters, digits, marks and blanks: one of each kind stands for all.
    """
    before, after = (
        ("a", "1", ".", " ", "\n", "é", "的", "'"),
        ("b", "2", ",", "'", "ß", "中", "🙂"),
    )
    if encoder.pre_tokenizer is None:
        return False
    for left, right in product(before, after):
        first, second = f"x{left}\n", f"{right}y"
        pieces = encoder.pre_tokenizer.pre_tokenize_str(first + second)
        whole, *parts = (
            encoder.encode(text, add_special_tokens=False).ids
            for text in (first + second, first, second)
        )
        if len(first) not in {start for _, (start, _) in pieces} or whole != sum(parts, []):
            return False
    return True


class TinkerSampler:
    """Samples from a connection; one request asks for `Sampling.n` samples.

    `timeout` is in seconds, for a whole answer; a change holds for the requests after it.
    """

    def __init__(
        self,
        connection: Connection,
        client: tinker.SamplingClient | None = None,
        *,
        timeout: float | None = None,
    ) -> None:
        """Open a sampling session, or use one that is open; raises `ModelError` where the server
        refuses the model.
        """
        self.connection, self.timeout = connection, timeout
        self._standing = Standing()
        self._held: dict[str, asyncio.Future[tinker.SamplingClient]] = {}
        with sdk.explained(connection.reference):
            self.client: tinker.SamplingClient = client or connection.open_session().result()

    @property
    def model(self) -> str:
        """The reference, as written."""
        return self.connection.reference

    @property
    def identity(self) -> str:
        """Reference, weights, checkpoint and renderer."""
        return self.connection.identity

    @cached_property
    def _prompts(self) -> Prompts:
        return Prompts(self.connection.renderer)

    @cached_property
    def _stop(self) -> Any:
        return self.connection.renderer.get_stop_sequences()

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Answer once. `Sampling.stop` cuts the text here: a server that isn't told of it samples,
        and is paid for, what is behind.
        """
        if sampling.extra is not None:
            raise ModelError(
                f"{self.model!r} takes no further settings: expected a recipe without "
                f"`sampling.extra`, found {sampling.extra}."
            )
        tokens = self._prompts.tokens(messages, sampling.tools)
        try:
            with self._standing.request(), sdk.explained(self.model), sdk.classified():
                client = await self._client(sampling.json_schema)
                request = client.sample(
                    _model_input(tokens),
                    sampling.n,
                    self._parameters(sampling),
                    topk_sample_logprobs=sampling.top_logprobs or 0,
                )
                async with asyncio.timeout(self.timeout):
                    response = await sdk.answered(request.future(), self.connection.ended)
        except (AccessError, ModelError) as error:
            raise await self._standing.judge(error) from error.__cause__
        self._standing.accept()
        samples = tuple(self._read(sequence, sampling) for sequence in response.sequences)
        return Reply(samples, Usage(len(tokens), response.prompt_cache_hit_tokens))

    async def _client(self, schema: str | None) -> tinker.SamplingClient:
        """The open session; of a local model one whose samples are held to the schema.

        Where its server can't hold them to it, what they are read by still tells.
        """
        ends = [one for one in self._stop if isinstance(one, int)]
        if schema is None or self.connection.server is None or not ends:
            return self.client
        held = self._held.get(schema)
        if held is None or (held.done() and (held.cancelled() or held.exception())):
            held = self._held[schema] = asyncio.ensure_future(self._hold(schema, ends))
        return await asyncio.shield(held)

    async def _hold(self, schema: str, ends: list[int]) -> tinker.SamplingClient:
        client: tinker.SamplingClient = await self.connection.open_session()
        refused = await sdk.hold_to_schema(
            client, self.connection.rest, self.connection.ended, schema, ends
        )
        if refused is None:
            return client
        warnings.warn(
            f"{self.model!r} is not held to the schema of its answers, which are read by it all "
            f"the same: {refused}",
            stacklevel=2,
        )
        return self.client

    def _parameters(self, sampling: Sampling) -> tinker.SamplingParams:
        return tinker.SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            stop=self._stops(sampling.stop),
        )

    def _stops(self, texts: tuple[str, ...]) -> Any:
        """Where a server ends a sample. The protocol takes texts or tokens, not both, and only the
        server of a local model is known to find a control token by its text.
        """
        whole = all(isinstance(one, str) for one in self._stop)
        if not texts or not (whole or self.connection.server is not None):
            return self._stop
        decode = self.connection.tokenizer.decode
        return [*texts, *(one if isinstance(one, str) else decode([one]) for one in self._stop)]

    def _read(self, sequence: Any, sampling: Sampling) -> Sample:
        text, reasoning = self.connection.renderer.read_response(
            sequence.tokens, tools=sampling.tools
        )
        ends = [place for stop in sampling.stop if (place := text.find(stop)) >= 0]
        cut_off = not ends and sequence.stop_reason == "length"
        return Sample(
            text[: min(ends)] if ends else text,
            "length" if cut_off else "stop",
            len(sequence.tokens),
            reasoning=reasoning,
            logprobs=None if sampling.top_logprobs is None else _logprobs(sequence),
        )


def _model_input(tokens: list[int]) -> tinker.ModelInput:
    """Not validated: a thousand numbers that are known to be numbers."""
    chunk = tinker.EncodedTextChunk.model_construct(tokens=tokens, type="encoded_text")
    return tinker.ModelInput.model_construct(chunks=[chunk])


def _logprobs(sequence: Any) -> Logprobs:
    top = [row or [] for row in sequence.topk_logprobs or ()]
    return Logprobs(
        tuple(sequence.tokens),
        tuple(sequence.logprobs or ()),
        tuple(tuple(token for token, _ in row) for row in top),
        tuple(tuple(value for _, value in row) for row in top),
    )

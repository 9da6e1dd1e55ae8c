"""One protocol for teacher, base and student: messages in, samples and token counts out."""

import asyncio
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal, Protocol

from distill_datasets.schema import Message


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample; every field changes the answer, so every field is in the request digest.

    `n` samples are asked for in one request. `top_k` of -1 and `top_p` of 1 leave the
    distribution whole. `stop` adds to the stop sequences of the model's own chat format.
    `top_logprobs` asks for the log-probability of every sampled token and of so many of the most
    likely ones in its place. `json_schema` (JSON text) is the form that the text must have, `tools`
    (JSON text of a list, in OpenAI's form) are those that may be called, and `extra` (JSON text of
    an object) is whatever else a provider takes.
    """

    temperature: float = 1.0
    max_tokens: int = 512
    top_p: float = 1.0
    top_k: int = -1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    top_logprobs: int | None = None
    json_schema: str | None = None
    extra: str | None = None
    tools: str | None = None


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities (natural) of a sampled response, an entry a token, the stop token's too.

    A token is its id where the server says it, else its text. `top_tokens` and `top_logprobs`
    hold the most likely tokens of each place, the likeliest first.
    """

    tokens: tuple[int | str, ...]
    logprobs: tuple[float, ...]
    top_tokens: tuple[tuple[int | str, ...], ...] = ()
    top_logprobs: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> "Logprobs":
        """What `asdict` and JSON made of it."""
        return cls(
            tuple(fields["tokens"]),
            tuple(fields["logprobs"]),
            tuple(map(tuple, fields.get("top_tokens", ()))),
            tuple(map(tuple, fields.get("top_logprobs", ()))),
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled response; `tokens` counts its tokens, stop token and reasoning included.

    Calls of tools are part of the `text`, as `conversations.write_calls` writes them.
    `tokens` is None where the server does not count. `reasoning` is what a thinking model said
    before its answer.
    """

    text: str
    stop_reason: Literal["stop", "length"]
    tokens: int | None
    reasoning: str | None = None
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Prompt tokens of one request, and how many of them the server read from its cache.

    `prompt_tokens` is None where the server does not count, and `reasoning_tokens` are part of the
    samples' tokens. `cost` is in dollars, as the provider
    itself stated it.
    """

    prompt_tokens: int | None
    cached_tokens: int
    reasoning_tokens: int = 0
    cost: float | None = None


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a provider's headers say is left to ask, of requests and of tokens.

    The `_seconds` are those until the allowance is whole again; None where nothing is said.
    """

    requests: int | None = None
    requests_seconds: float | None = None
    tokens: int | None = None
    tokens_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one request: `Sampling.n` samples and the prompt's token counts.

    `first_token_seconds` is known where the reply was streamed. `allowance` is true only at the
    moment of the reply, and is not kept.
    """

    samples: tuple[Sample, ...]
    usage: Usage
    first_token_seconds: float | None = None
    allowance: Allowance | None = field(default=None, compare=False)

    @property
    def response_tokens(self) -> int | None:
        """Tokens of all samples; None where the server does not count them."""
        return total(sample.tokens for sample in self.samples)

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and of all samples, as far as the server counts them."""
        return (self.usage.prompt_tokens or 0) + (self.response_tokens or 0)

    def to_json(self) -> str:
        """One line of JSON, read back by `from_json`; what says nothing is left out."""
        kept: dict[str, Any] = {"samples": [*map(_stated, self.samples)]}
        kept["usage"] = _stated(self.usage)
        if self.first_token_seconds is not None:
            kept["first_token_seconds"] = self.first_token_seconds
        return json.dumps(kept, ensure_ascii=False, default=asdict)

    @classmethod
    def from_json(cls, text: str) -> "Reply":
        """The reply that `to_json` wrote."""
        fields = json.loads(text)
        for sample in fields["samples"]:
            if "logprobs" in sample:
                sample["logprobs"] = Logprobs.read(sample["logprobs"])
        samples = tuple(Sample(**sample) for sample in fields["samples"])
        return cls(samples, Usage(**fields["usage"]), fields.get("first_token_seconds"))


def total(counts: Iterable[int | None]) -> int | None:
    """The sum of counts; None where one of them is unknown."""
    known = list(counts)
    return None if None in known else sum(count or 0 for count in known)


_SILENT = {"reasoning": None, "logprobs": None, "reasoning_tokens": 0, "cost": None}


def _stated(value: Sample | Usage) -> dict[str, Any]:
    # Not `asdict`, which copies deeply: there may be thousands of log-probabilities.
    return _without({name: getattr(value, name) for name in value.__slots__}, _SILENT)


def _without(fields: dict[str, Any], silent: Mapping[str, Any]) -> dict[str, Any]:
    """Fields less those whose value is the `silent` one."""
    return {name: value for name, value in fields.items() if (name, value) not in silent.items()}


class Sampler(Protocol):
    """Anything that answers messages.

    `model` is the reference a person would write. `identity` also names what else decides the
    answer (weights, chat format): two samplers of one identity are interchangeable, and the
    journal treats them so.
    """

    @property
    def model(self) -> str:
        """The model reference, as written."""
        ...

    @property
    def identity(self) -> str:
        """The reference with everything that decides the answer, stable across processes."""
        ...

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Answer once.

        Raises `RetryableError` where the same request may succeed later, `RejectedError` where it
        never will but others may, `ModelError` when no later call can succeed. Any other
        exception is this row's failure, tried again by the next run only.
        """
        ...


def digest(value: object) -> str:
    """The SHA-256 of a JSON value, independent of key order; 64 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def request_digest(identity: str, messages: Sequence[Message], sampling: Sampling) -> str:
    """The key under which an answer is paid for once."""
    return digest({"model": identity, "messages": list(messages), "sampling": _said(sampling)})


@lru_cache(maxsize=64)
def _said(sampling: Sampling) -> Mapping[str, Any]:
    # A field that is not used is no part of the key, so that a new field keeps paid answers.
    unused = dict.fromkeys(("top_logprobs", "json_schema", "extra", "tools"))
    return _without(asdict(sampling), unused)


def request_parts(messages: Sequence[Message], sampling: Sampling) -> tuple[list[str], list[str]]:
    """What a request has a model read: texts, and JSON (earlier calls, and the tools)."""
    calls = [call["function"] for message in messages for call in message.get("tool_calls") or ()]
    written = [json.dumps(call, ensure_ascii=False) for call in calls]
    return [message["content"] for message in messages], [*written, *filter(None, [sampling.tools])]


def split_thoughts(text: str) -> tuple[str | None, str]:
    """The reasoning and the answer of a text that begins with `<think>…</think>`.

    Some chat templates open the thoughts themselves, so that the text has their end alone, with
    nothing else on its line. Thoughts without an end have no answer after them.
    """
    opened = text.lstrip().startswith("<think>")
    before, closed, after = text.partition("</think>")
    ends_line = bool(closed) and not after.split("\n", 1)[0].strip()
    if not opened and ("<think>" in before or not ends_line):
        return None, text
    return before.lstrip().removeprefix("<think>").strip() or None, after.lstrip()


@dataclass
class Echo:
    """Answers with the last message: for dry runs and tests, with no model at all.

    Tokens are words. `delay` is in seconds; `calls` counts the requests made.
    """

    template: str = "{text}"
    delay: float = 0.0
    calls: int = 0

    @property
    def model(self) -> str:
        """The reference `echo`."""
        return "echo"

    @property
    def identity(self) -> str:
        """The template decides the answer."""
        return f"echo/{self.template}"

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Repeat the last message through the template, `n` times."""
        self.calls += 1
        await asyncio.sleep(self.delay)
        texts, written = request_parts(messages, sampling)
        words = sum(len(text.split()) for text in [*texts, *written])
        text = self.template.replace("{text}", messages[-1]["content"])
        sample = Sample(text, "stop", len(text.split()) + 1)
        return Reply((sample,) * sampling.n, Usage(words, 0))

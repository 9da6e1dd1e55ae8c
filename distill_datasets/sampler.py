"""One protocol for teacher, base and student: messages in, samples and token counts out."""

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal, Protocol, TypedDict


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample; every field changes the answer, so every field is in the request digest.

    `n` samples are asked for in one request. `top_k` of -1 and `top_p` of 1 leave the
    distribution whole. `stop` adds to the stop sequences of the model's own chat format.
    """

    temperature: float = 1.0
    max_tokens: int = 512
    top_p: float = 1.0
    top_k: int = -1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled response; `tokens` counts its tokens, the stop token included."""

    text: str
    stop_reason: Literal["stop", "length"]
    tokens: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Prompt tokens of one request, and how many of them the server read from its cache."""

    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What one request bought: `Sampling.n` samples and the prompt's token counts."""

    samples: tuple[Sample, ...]
    usage: Usage

    def to_json(self) -> str:
        """One line of JSON, read back by `from_json`."""
        # By hand: `asdict` copies deeply, and took longer than everything else about a row.
        samples = [
            {"text": sample.text, "stop_reason": sample.stop_reason, "tokens": sample.tokens}
            for sample in self.samples
        ]
        usage = {
            "prompt_tokens": self.usage.prompt_tokens,
            "cached_tokens": self.usage.cached_tokens,
        }
        return json.dumps({"samples": samples, "usage": usage}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Reply":
        """The reply that `to_json` wrote."""
        fields = json.loads(text)
        samples = tuple(Sample(**sample) for sample in fields["samples"])
        return cls(samples, Usage(**fields["usage"]))


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
        """Answer once; raises on failure, `ModelError` when no later call can succeed."""
        ...


def digest(value: object) -> str:
    """The SHA-256 of a JSON value, independent of key order; 64 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=64)
def _fields(sampling: Sampling) -> dict[str, object]:
    return asdict(sampling)


def request_digest(identity: str, messages: Sequence[Message], sampling: Sampling) -> str:
    """The key under which an answer is paid for once."""
    return digest({"model": identity, "messages": list(messages), "sampling": _fields(sampling)})


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
        words = sum(len(message["content"].split()) for message in messages)
        text = self.template.replace("{text}", messages[-1]["content"])
        sample = Sample(text, "stop", len(text.split()) + 1)
        return Reply((sample,) * sampling.n, Usage(words, 0))

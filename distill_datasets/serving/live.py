"""A request to the engine while it runs: tokens as they are drawn, and what came of it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from distill_datasets.embedded.scheduler import Payload, SampleJob
from distill_datasets.embedded.wire import DrawnSample, InvalidRequestError, SampleRequest, pb
from distill_datasets.errors import ServiceError

if TYPE_CHECKING:
    from distill_datasets.embedded.engine import Service
    from distill_datasets.embedded.logits import Constrain

# The likeliest tokens of one place and their logprobs.
Top = tuple[list[int], list[float]]


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
    """One request, submitted when it is made; `left` says that its client went away."""

    def __init__(
        self,
        service: Service,
        weights: str,
        request: SampleRequest,
        left: Callable[[], bool],
        *,
        constrain: Constrain | None = None,
        stream: bool = False,
    ) -> None:
        self._loop, self._left, self._stream = asyncio.get_running_loop(), left, stream
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

    async def drawn(self) -> list[tuple[int, int, float]]:
        """Samples, tokens and logprobs since the last call, at least one; none at the end."""
        while not self._drawn:
            if self._payload is not None:
                return []
            await self._changed.wait()
            self._changed.clear()
            self._told = False
        return [self._drawn.popleft() for _ in range(len(self._drawn))]

    async def outcome(self) -> Outcome:
        """Wait for the end.

        Raises `InvalidRequestError` for what can't be answered, and `ServiceError` for the server's
        own failure, or where nobody waits any more.
        """
        while self._payload is None:
            await self._changed.wait()
            self._changed.clear()
            self._told = False
        if self._left():
            raise ServiceError("the client went away")
        if isinstance(self._payload, bytes):
            return _read(pb.SampleResponse.FromString(self._payload))
        message = str(self._payload.get("error"))
        if self._payload.get("category") == "server":
            raise ServiceError(message)
        raise InvalidRequestError(message)


def _read(found: pb.SampleResponse) -> Outcome:
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
    prompt: list[float | None] = [None, *known[1:]] if known else []
    top: list[Top | None] = [*_read_top(found.topk_prompt_logprobs)]
    return Outcome(samples, found.prompt_cache_hit_tokens, prompt, [None, *top[1:]] if top else [])


def _read_top(found: pb.TopkLogprobs) -> list[Top]:
    shape = (found.length, found.k)
    ids = np.frombuffer(found.token_ids, np.int32).reshape(shape).tolist()
    logprobs = np.frombuffer(found.logprobs, np.float32).reshape(shape).tolist()
    return list(zip(ids, logprobs, strict=True))

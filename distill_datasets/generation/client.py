"""Answers: from the journal where they are, from a sampler where not, each once."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import count
from typing import Any, TypeVar

from distill_datasets.errors import RejectedError, RequestError, RetryableError
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.pricing import Meter
from distill_datasets.generation.rate_limit import Limits
from distill_datasets.models.sampler import Reply, Sampler, Sampling, request_digest
from distill_datasets.progress import Progress
from distill_datasets.schema import Message

T = TypeVar("T")

_ATTEMPTS = 8
_PATIENCE = 600.0  # seconds that one request may rest between its attempts, in all
_FIRST_REST, _LONGEST_REST = 0.5, 60.0  # seconds, before jitter
_RESTING = 8  # times the concurrency: so many requests may rest beside those at work
_CHARACTERS = 4  # of a prompt, in a token; the limit corrects it by what the server counts
_REFUSALS = (429, 503, 529)  # statuses of a server that has too much to do


def run_in_thread(make: Callable[[], Awaitable[T]], *, stop: Callable[[], None] | None = None) -> T:
    """The result of a coroutine, run to its end on an event loop of its own in another thread.

    Safe where a loop is running (Jupyter, async code): the one way from a synchronous verb to
    `CachedClient.sample`. `make` is called inside that loop. On Ctrl-C `stop` is called (say
    `client.stop`, so that what is in flight is kept) and the coroutine runs to its end; without
    it, it is cancelled.
    """
    began: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()

    async def made() -> T:
        task = asyncio.current_task()
        assert task is not None
        began.set_result((asyncio.get_running_loop(), task))
        return await make()

    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(lambda: asyncio.run(made()))
        try:
            return future.result()
        except BaseException:
            if not future.done():
                loop, task = began.result()
                loop.call_soon_threadsafe(stop or task.cancel)
            raise


class CachedClient:
    """One journal for everything that is asked; two who ask the same share one request.

    Every sampler is asked as fast as it allows, and with no more requests at once than `limits`
    do. What may succeed later is asked again, with patience, while others go on.
    """

    def __init__(
        self,
        journal: Journal,
        progress: Progress | None = None,
        *,
        limits: Limits | None = None,
        meter: Meter | None = None,
    ) -> None:
        """`progress` is told of the tokens that were bought, not of rows."""
        self.journal, self.meter = journal, meter
        self.progress = progress or Progress("ask", 0)
        self.limits = limits or Limits()
        # For whoever starts much work: a turn for each piece, given back while a request of it
        # waits for another attempt.
        self.turns = asyncio.Semaphore(self.limits.concurrency)
        self._stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked: dict[str, asyncio.Event] = {}
        self._resting: set[asyncio.Future[None]] = set()

    @property
    def stopped(self) -> bool:
        """Whether nothing more is asked."""
        return self._stopped

    def stop(self) -> None:
        """Ask nothing more: `sample` raises `InterruptedError` from now on; from any thread.

        Requests in flight go on to their end.
        """
        self._stopped = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._send_home)

    async def sample(
        self, sampler: Sampler, messages: Sequence[Message], sampling: Sampling
    ) -> Reply:
        """The journal's answer, or a bought one, which is in the journal before anyone reads it.

        Raises `RejectedError` for what was rejected, now or by an earlier run; `RetryableError`
        when no attempt succeeded; `BudgetReached`; `InterruptedError` after `stop`; and whatever
        else the sampler raises.
        """
        self._check()
        self._loop = self._loop or asyncio.get_running_loop()
        key = request_digest(sampler.identity, messages, sampling)
        if known := self._known(key):
            return known
        while key in self._asked:
            await self._asked[key].wait()
            if known := self._known(key):
                return known
        self._asked[key] = asyncio.Event()
        try:
            reply = await self._insist(key, sampler, messages, sampling)
        finally:
            self._asked.pop(key).set()
        self.progress.advance(0, tokens=reply.tokens)
        return reply

    def _known(self, key: str) -> Reply | None:
        found = self.journal.get(key)
        if found is None and (rejection := self.journal.rejection(key)):
            raise rejection
        return found

    async def _insist(
        self, key: str, sampler: Sampler, messages: Sequence[Message], sampling: Sampling
    ) -> Reply:
        """Ask until there is an answer, or a reason to stop asking."""
        waited = 0.0
        for attempt in count(1):
            try:
                return await self._ask(key, sampler, messages, sampling)
            except RejectedError as error:
                self.journal.reject(
                    key,
                    sampler.identity,
                    type=error.type,
                    status=error.status,
                    message=str(error),
                )
                raise
            except RetryableError as error:
                error.attempts = attempt
                rest = _rest(attempt, error.retry_after)
                if attempt == _ATTEMPTS or waited + rest > _PATIENCE:
                    raise
            waited += rest
            await self._wait(rest)
        raise AssertionError("a loop without an end has ended")

    async def _ask(
        self, key: str, sampler: Sampler, messages: Sequence[Message], sampling: Sampling
    ) -> Reply:
        """One attempt, in its place within the budget and the limit of the sampler."""
        gate = self.limits.gate(sampler.identity)
        meter = self.meter
        async with meter.room(sampler, messages, sampling) if meter else nullcontext():
            ticket = await gate.enter(_estimate(messages) if self.limits.tokens_per_minute else 0)
            try:
                self._check()
                reply = await sampler.sample(messages, sampling)
                await self.journal.put_together(key, sampler.identity, reply)
            except RequestError as error:
                if error.status in _REFUSALS:
                    gate.refuse(ticket, getattr(error, "retry_after", None))
                else:
                    gate.fail(ticket)
                raise
            except BaseException:
                gate.fail(ticket)
                raise
            gate.accept(ticket, reply.tokens, reply.allowance)
            if meter:
                meter.count(sampler, reply)
        return reply

    async def _wait(self, seconds: float) -> None:
        """Rest between two attempts; the turn is another's meanwhile, unless too many rest."""
        assert self._loop is not None
        yields = len(self._resting) < _RESTING * self.limits.concurrency
        resting = self._loop.create_future()
        self._resting.add(resting)
        timer = self._loop.call_later(seconds, _finish, resting)
        if yields:
            self.turns.release()
        try:
            await resting
        finally:
            timer.cancel()
            self._resting.discard(resting)
            if yields:
                await self.turns.acquire()
        self._check()

    def _check(self) -> None:
        if self._stopped:
            raise InterruptedError("stopped before this was asked")

    def _send_home(self) -> None:
        self.limits.close()
        for resting in self._resting:
            _finish(resting)


def _rest(attempt: int, retry_after: float | None) -> float:
    """Seconds between an attempt and the next: what the server asks for, and some jitter."""
    longest = min(_LONGEST_REST, _FIRST_REST * 2 ** (attempt - 1))
    if retry_after:
        longest = min(longest, retry_after / 4)
    return (retry_after or 0.0) + random.uniform(0, longest)


def _finish(waiting: "asyncio.Future[None]") -> None:
    if not waiting.done():
        waiting.set_result(None)


def _estimate(messages: Sequence[Message]) -> float:
    return sum(len(message["content"]) for message in messages) / _CHARACTERS

"""Answers requests: out of the journal of paid answers (cache.py), else from a model.

`CachedClient.sample` owns the whole life of a request: it looks into the journal, joins an equal
request that is under way, waits for room in the budget and for a place within the sampler's rate
limit, asks, puts the answer on disk, gives the place back, and asks again what may succeed later.
"""

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import count
from threading import Thread
from typing import Any, TypeVar

from distill_datasets.errors import (
    FATAL,
    GenerationError,
    PendingError,
    PriceError,
    RejectedError,
    RequestError,
    RetryableError,
    ServiceError,
)
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.pricing import Meter, Prices
from distill_datasets.generation.rate_limit import Limits, RateLimit, Ticket
from distill_datasets.models.sampler import Reply, Sampler, Sampling, request_digest, request_parts
from distill_datasets.progress import Progress, amount_text, in_notebook
from distill_datasets.schema import Message

T = TypeVar("T")

_ATTEMPTS = 8  # of a request, not counting tries while the sampler refuses everybody
_FAR = 100 * 365 * 86_400.0  # seconds
_WAIT_IN_ALL = 600.0  # seconds that a request waits between attempts, and a run for a sampler
_WAIT_FOR_FIRST = 120.0  # seconds that a run waits for a sampler that has never answered
_LONGEST_WAIT = 300.0  # seconds that a server may ask to wait
_FIRST_REST, _LONGEST_REST = 0.5, 60.0  # seconds between two attempts, before jitter
_RESTING = 8  # times the concurrency: so many requests may rest beside those under way
_PATIENCE = 2.0  # seconds that a stopped cell of a notebook waits for requests under way
_CHARACTERS = 4  # of a prompt, in a token; the limit corrects it by what the server counts
_REFUSALS = (429, 503, 529)  # statuses of a server that has too much to do
_TIMEOUT, _LEAST_TIMEOUT = 600.0, 60.0  # seconds: a sampler's own, and the least of those learned
_NEARLY_ALL, _TIMES, _REPLIES = 0.99, 10, 50  # share of answers, times as long, and how many say so


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

    def end() -> None:
        loop, task = began.result()
        loop.call_soon_threadsafe(stop or task.cancel)

    return work_in_thread(lambda: asyncio.run(made()), stop=end)


async def outcome(work: Awaitable[T]) -> T | Exception:
    """What came of one request or one row: its result, or its failure as a value.

    Raised, a failure would throw away what runs beside it. What no other would escape (`FATAL`) is
    raised.
    """
    try:
        return await work
    except FATAL:
        raise
    except Exception as error:
        return error


async def all_of(requests: Iterable[Awaitable[T]]) -> list[T]:
    """Every result; raises only when all have ended, since what is in flight is paid for.

    Of several failures the first is raised, or one that ends the run.
    """
    found = await asyncio.gather(*requests, return_exceptions=True)
    failures = [result for result in found if isinstance(result, BaseException)]
    if failures:
        raise min(failures, key=lambda failure: not isinstance(failure, FATAL))
    return [result for result in found if not isinstance(result, BaseException)]


def work_in_thread(work: Callable[[], T], *, stop: Callable[[], None]) -> T:
    """The result of a function that runs in another thread.

    On Ctrl-C `stop` is called and the function runs to its end; a second Ctrl-C leaves it alone,
    to end with the process. In a notebook it is left alone after two seconds: whoever stops a cell
    wants to go on.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    thread = Thread(target=run, daemon=True)
    try:
        thread.start()
        return done.result()
    finally:
        if thread.ident and not done.done():  # interrupted
            stop()
            wait([done], timeout=_PATIENCE if in_notebook() else None)


class CachedClient:
    """One journal for everything that is asked; two who ask the same share one request.

    Every sampler is asked as fast as it allows, and with no more requests at once than `limits`
    do. What may succeed later is asked again while others go on. All who ask share one event loop.
    """

    def __init__(
        self,
        journal: Journal,
        progress: Progress | None = None,
        *,
        limits: Limits | None = None,
        meter: Meter | None = None,
        ask_rejected_again: bool = False,
    ) -> None:
        """`progress` is told of the tokens that were bought, not of rows.

        What an earlier run found rejected for good is asked for only with `ask_rejected_again`.
        """
        self.journal, self.meter = journal, meter
        self.progress = progress or Progress("ask", 0)
        self.limits = limits or Limits()
        self.ask_rejected_again = ask_rejected_again
        self.places = Places(self.limits.concurrency)  # for whoever works on many rows
        self.rejected_before = 0  # requests that an earlier run found rejected for good
        self._stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked: dict[str, asyncio.Event] = {}
        self._stopping = asyncio.Event()  # wakes those that rest
        self._resting = 0
        self._answered: set[str] = set()  # identities
        self._rejected: dict[str, tuple[str, RejectedError]] = {}  # not in the journal, by digest
        self._timeouts: dict[str, _LearnedTimeout] = {}

    def stop(self) -> None:
        """Ask nothing more: `sample` raises `InterruptedError` from now on; from any thread.

        Requests in flight go on to their end.
        """
        self._stopped = True
        in_flight = sum(limit.in_flight for limit in self.limits.samplers.values())
        self.progress.advance(0, note=f"stopping: {in_flight} requests under way")
        if self._loop is not None and not self._loop.is_closed():
            for wake in (self._stopping.set, *(one.close for one in self.limits.samplers.values())):
                self._loop.call_soon_threadsafe(wake)

    async def sample(
        self, sampler: Sampler, messages: Sequence[Message], sampling: Sampling
    ) -> Reply:
        """The journal's answer, or a bought one, which is on disk before anyone reads it.

        Raises `RejectedError` for what was rejected, now or by an earlier run; `RetryableError`
        when no attempt succeeded; `BudgetReached`; `PendingError` for a server that asks to come
        back much later; `InterruptedError` after `stop`; and whatever else the sampler raises.
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
            reply = await self._ask_until_answered(key, sampler, messages, sampling)
        finally:
            self._asked.pop(key).set()
        self.progress.advance(0, tokens=reply.tokens)
        return reply

    def _known(self, key: str) -> Reply | None:
        found = self.journal.get(key)
        if found is None and key in self._rejected:
            raise self._rejected[key][1]
        before = None if found or self.ask_rejected_again else self.journal.rejection(key)
        if before is not None:
            self.rejected_before += 1
            raise before
        return found

    async def _ask_until_answered(
        self, key: str, sampler: Sampler, messages: Sequence[Message], sampling: Sampling
    ) -> Reply:
        limit = self.limits.of(sampler.identity)
        rested, counted = 0.0, 0
        for attempt in count(1):
            paused = limit.paused
            try:
                return await self._ask(key, sampler, messages, sampling)
            except RejectedError as error:
                self._reject(key, sampler.identity, error)
                raise
            except RetryableError as error:
                error.attempts = attempt
                self._check_wait(limit, sampler, error)
                # What is refused like everything else says nothing about this request.
                counted += not (paused and limit.paused)
                rest = 0.0 if limit.paused else _rest(counted, error.retry_after)
                most = min(_ATTEMPTS, error.most_attempts or _ATTEMPTS)
                if counted >= most or rested + rest > _WAIT_IN_ALL:
                    raise
            rested += rest
            if rest:
                await self._rest(rest)
        raise AssertionError("a loop without an end has ended")

    async def _ask(
        self, key: str, sampler: Sampler, messages: Sequence[Message], sampling: Sampling
    ) -> Reply:
        """One attempt, in its place within the budget and the limit of the sampler."""
        limit, meter = self.limits.of(sampler.identity), self.meter
        async with meter.room(sampler, messages, sampling) if meter else nullcontext():
            ticket = await limit.enter(
                estimated_tokens(messages, sampling) if self.limits.tokens_per_minute else 0
            )
            with ExitStack() as unanswered:
                unanswered.callback(limit.fail, ticket)
                try:
                    self._check()
                    reply = await self._answer_in_time(sampler, messages, sampling)
                except RequestError as error:
                    unanswered.pop_all()
                    _end(limit, ticket, error)
                    raise
                unanswered.pop_all()
            limit.accept(ticket, reply.tokens, reply.allowance)
            await self.journal.store(key, sampler.identity, reply)
            if sampler.identity not in self._answered:
                self._answered.add(sampler.identity)
                for rejected, (whose, why) in list(self._rejected.items()):
                    if whose == sampler.identity:
                        self._reject(rejected, whose, why)
            if meter:
                meter.count(sampler, reply)
        return reply

    async def _answer_in_time(
        self, sampler: Sampler, messages: Sequence[Message], sampling: Sampling
    ) -> Reply:
        """The sampler's answer, within the user's time-out or one learned from other answers."""
        endpoint = getattr(sampler, "endpoint", None)
        if endpoint is None or endpoint.timeout != _TIMEOUT:
            return await sampler.sample(messages, sampling)
        timeout = self._timeouts.setdefault(sampler.identity, _LearnedTimeout())
        return await timeout.within(sampler.sample(messages, sampling))

    def _reject(self, key: str, identity: str, error: RejectedError) -> None:
        """Remember what is rejected; for later runs only if the sampler answers others."""
        if identity in self._answered:
            self._rejected.pop(key, None)
            self.journal.reject(key, identity, error)
        else:
            self._rejected[key] = identity, error

    def _check_wait(self, limit: RateLimit, sampler: Sampler, error: RetryableError) -> None:
        """Raises what ends a run, where the sampler refuses everybody for too long."""
        known, asked = sampler.identity in self._answered, error.retry_after or 0.0
        if asked > _LONGEST_WAIT and (limit.paused or not (known or limit.in_flight)):
            # A date in the year 9999 lies beyond what this machine's own zone can say.
            back = datetime.now().astimezone() + timedelta(seconds=min(asked, _FAR))
            raise PendingError(
                f"{sampler.model!r} asks to come back in {asked / 3600:,.1f} hours "
                f"({error}). Everything that was paid for is kept: run the same command again "
                f"after {back:%Y-%m-%d %H:%M}."
            ) from error
        if limit.paused_seconds > (_WAIT_IN_ALL if known else _WAIT_FOR_FIRST):
            raise ServiceError(
                f"{sampler.model!r} has refused everything for {limit.paused_seconds:.0f} s, at "
                f"last with: {error}. Everything that was paid for is kept: run the same command "
                "again when it is back."
            ) from error

    async def _rest(self, seconds: float) -> None:
        """Wait between two attempts; the place is another's meanwhile, unless too many rest."""
        self._resting += 1
        lent = self._resting <= _RESTING * self.limits.concurrency
        with self.places.lent() if lent else nullcontext():
            try:
                async with asyncio.timeout(seconds):
                    await self._stopping.wait()
            except TimeoutError:
                pass
            finally:
                self._resting -= 1
        self._check()

    def _check(self) -> None:
        if self._stopped:
            raise InterruptedError("stopped before this was asked")


@dataclass(frozen=True)
class ManyRequests:
    """Many requests that belong to no row, each a sampler, messages, and how to sample."""

    requests: Sequence[tuple[Sampler, Sequence[Message], Sampling]]

    def said(self, journal: Journal, prices: Prices | None = None) -> str:
        """How many nobody has answered, of how many tokens, and what those can cost."""
        keys = {
            request_digest(sampler.identity, messages, sampling): (sampler, messages, sampling)
            for sampler, messages, sampling in self.requests
        }
        left = [one for key, one in keys.items() if journal.entry(key) is None]
        counted = f"{len(left):,} of {len(keys):,} requests (the others are answered already)"
        reads = [estimated_tokens(messages, sampling) for _, messages, sampling in left]
        writes = [sampling.n * sampling.max_tokens for *_, sampling in left]
        counted += f", about {sum(reads):,.0f} tokens to read, at most {sum(writes):,} to write"
        if prices is None:
            return counted
        try:
            most = sum(
                prices.of(sampler.identity).of(read, 0, write)
                for (sampler, *_), read, write in zip(left, reads, writes, strict=True)
            )
        except PriceError:
            return f"{counted} (no price)"
        return f"{counted}, at most {amount_text(most)} {prices.currency}"

    def ask(self, client: CachedClient, *, title: str) -> list[Reply]:
        """Their replies in order; what was paid is in the journal, whatever fails.

        Raises `GenerationError` where some failed, or what ends the run.
        """

        async def one(request: tuple[Sampler, Sequence[Message], Sampling]) -> Reply | str:
            async with client.places:
                try:
                    reply = await outcome(client.sample(*request))
                except FATAL:
                    client.stop()
                    raise
            client.progress.advance(1)
            return f"{type(reply).__name__}: {reply}" if isinstance(reply, Exception) else reply

        with Progress(title, len(self.requests), unit="requests", meter=client.meter) as progress:
            client.progress = progress
            found = run_in_thread(lambda: all_of(map(one, self.requests)), stop=client.stop)
        if failed := [reply for reply in found if isinstance(reply, str)]:
            raise GenerationError(
                f"{title}: {len(failed)} of {len(found)} requests failed, the first with "
                f"{failed[0].removesuffix('.')}. Run again: what was paid is kept, "
                "and only those are asked."
            )
        return [reply for reply in found if isinstance(reply, Reply)]


class Places:
    """Places for rows that are worked on, given in the order of coming.

    Whoever waits for something else than a sampler lends its place, and has it back at once.
    """

    def __init__(self, count: int) -> None:
        self._count, self._taken = count, 0
        self._door, self._freed = asyncio.Lock(), asyncio.Event()

    async def acquire(self) -> None:
        """Wait for a place."""
        async with self._door:
            while self._taken >= self._count:
                self._freed.clear()
                await self._freed.wait()
            self._taken += 1

    def release(self) -> None:
        """Give a place back."""
        self._taken -= 1
        self._freed.set()

    async def __aenter__(self) -> None:
        """Wait for a place."""
        await self.acquire()

    async def __aexit__(self, *_: object) -> None:
        """Give it back."""
        self.release()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """A place is another's meanwhile."""
        self.release()
        try:
            yield
        finally:
            self._taken += 1


class _LearnedTimeout:
    """Ends requests that take many times as long as nearly all others of their sampler."""

    def __init__(self) -> None:
        self._took: deque[float] = deque(maxlen=1000)
        self._replies = 0
        self._waiting: dict[asyncio.Timeout, float] = {}  # when each began
        self._seconds = _TIMEOUT

    async def within(self, answer: Awaitable[Reply]) -> Reply:
        """The answer; raises `RetryableError` where it doesn't come in time."""
        began = asyncio.get_running_loop().time()
        timeout = asyncio.timeout_at(began + self._seconds)
        try:
            async with timeout:
                self._waiting[timeout] = began
                reply = await answer
        except TimeoutError as error:
            if not timeout.expired():
                raise
            said = f"No whole answer within {self._seconds:.0f} s, where most take far less"
            raise RetryableError(said, type="time-out") from error
        finally:
            self._waiting.pop(timeout, None)
        self._took.append(asyncio.get_running_loop().time() - began)
        self._replies += 1
        if self._replies % _REPLIES == 0:
            self._learn()
        return reply

    def _learn(self) -> None:
        late = sorted(self._took)[int(_NEARLY_ALL * (len(self._took) - 1))]
        self._seconds = min(_TIMEOUT, max(_LEAST_TIMEOUT, _TIMES * late))
        for timeout, began in self._waiting.items():
            if not timeout.expired():
                timeout.reschedule(began + self._seconds)


def _end(limit: RateLimit, ticket: Ticket, error: RequestError) -> None:
    """Tell a limit what an attempt that failed says about the server."""
    status = error.status or 0
    if isinstance(error, RejectedError):
        limit.accept(ticket)  # the server is at work
    elif status in _REFUSALS:
        limit.refuse(ticket, getattr(error, "retry_after", None))
    elif status >= 500 or error.type == "connection":
        limit.refuse(ticket, getattr(error, "retry_after", None), load=False)
    else:
        limit.fail(ticket)


def _rest(attempt: int, retry_after: float | None) -> float:
    """Seconds between an attempt and the next: what the server asks for, and some jitter."""
    longest = min(_LONGEST_REST, _FIRST_REST * 2 ** (attempt - 1))
    if retry_after:
        longest = min(longest, retry_after / 4)
    return (retry_after or 0.0) + random.uniform(0, longest)


def estimated_tokens(messages: Sequence[Message], sampling: Sampling) -> float:
    """About how many tokens a request reads, where no tokenizer is at hand."""
    texts, written = request_parts(messages, sampling)
    return sum(map(len, [*texts, *written])) / _CHARACTERS

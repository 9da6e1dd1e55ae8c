"""How fast a sampler is asked: as fast as it answers, and never faster than the user allows."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from distill_datasets.errors import SettingsError
from distill_datasets.generation.crowd import Crowd
from distill_datasets.generation.pace import Bucket, Pace
from distill_datasets.models.sampler import Allowance

# The first requests start in groups, each up to this share of all, so fast that all of them would
# take so many seconds; refusals come back in a gap after each, which lasts twice as long as the
# group took where both sides are slow.
_GROUPS, _RAMP = (0.25, 0.5, 1.0), 0.06
_GAPS, _LONGEST_GAP = (0.025, 0.04), 0.15
_HOLD = 0.05  # a refusal among them holds back the others, which others may follow
_HELD = 5.0  # seconds for which headers alone hold back what could be asked


@dataclass(frozen=True, slots=True)
class Ticket:
    """One request under way: its number, when it began, and the tokens it was reckoned with."""

    number: int
    began: float
    tokens: float = 0.0


class Limit:
    """When one sampler may be asked next; a plain machine, told the time in seconds.

    It starts with `concurrency` requests at once and no other limit but the user's, learns a rate
    from refusals (`Pace`) and a smaller number from queues (`Crowd`), and heeds the headers that
    say what is left.
    """

    def __init__(
        self,
        concurrency: int = 256,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        now: float = 0.0,
    ) -> None:
        self.in_flight = 0
        self.pace, self.crowd = Pace(), Crowd(concurrency)
        self._group, self._group_began = 0, now
        self._hold_until = now
        self._requests = _minutely(requests_per_minute, now)
        self._tokens = _minutely(tokens_per_minute, now)
        self._ratio = 1.0  # tokens that a request turned out to have, to those reckoned with
        self._size = 1.0  # tokens of a request, as they were counted lately
        self._left: float | None = None  # requests that headers allow, until when they are believed
        self._left_until = 0.0
        self._refused_at = 0  # the most in flight beside a refusal, since they strained the pace
        self._started = 0

    def wait(self, now: float, tokens: float = 0.0) -> float | None:
        """Seconds until the next start, which is 0 for now; None until something ends."""
        if self.in_flight >= max(1, int(self.crowd.size)):
            return None
        seconds = max(self.pace.wait(now), self._ramp_wait(now))
        if self._left is not None and self._left < 1:
            seconds = max(seconds, self._left_until - now)
        if self.pace.strained:
            self.pace.strained = False
            self.crowd.refuse(self._refused_at)
            self._refused_at = 0
        if self._requests is not None:
            seconds = max(seconds, self._requests.wait(1, now))
        if self._tokens is not None:
            seconds = max(seconds, self._tokens.wait(tokens * self._ratio, now))
        return max(seconds, 0.0)

    def start(self, now: float, tokens: float = 0.0) -> Ticket:
        """Count a request that starts now; `tokens` estimates its size."""
        ticket = Ticket(self._started, now, tokens)
        self._started += 1
        self.in_flight += 1
        if self._group < len(_GROUPS):
            self._look_at_group(now)
        self.pace.start(now)
        if self._left is not None:
            self._left -= 1
        for bucket, amount in (
            (self._requests, 1.0),
            (self._tokens, tokens * self._ratio),
        ):
            if bucket is not None:
                bucket.take(amount, now)
        return ticket

    def accept(
        self,
        ticket: Ticket,
        now: float,
        *,
        tokens: float = 0.0,
        allowance: Allowance | None = None,
    ) -> None:
        """It was answered; `tokens` are those it had."""
        newest = self._started - 1
        self.crowd.reply(ticket.number, now - ticket.began, self.in_flight, newest, now)
        self.in_flight -= 1
        self._size += 0.1 * (tokens - self._size)
        if self._tokens is not None and ticket.tokens:
            self._tokens.take(tokens - ticket.tokens * self._ratio, now)
            self._ratio += 0.1 * (tokens / ticket.tokens - self._ratio)
        if allowance is not None:
            self._heed(allowance, now)

    def refuse(self, ticket: Ticket, now: float, retry_after: float | None = None) -> None:
        """The server has too much to do, or too much of us."""
        self.in_flight -= 1
        self._refused_at = max(self._refused_at, self.in_flight)
        if self._group < len(_GROUPS):
            self._hold_until = now + _HOLD
        self.pace.refuse(ticket.number, now, retry_after)

    def fail(self, ticket: Ticket, now: float) -> None:
        """It ended in another way, which says nothing about load."""
        self.in_flight -= 1

    def _ramp_wait(self, now: float) -> float:
        """Seconds until the next one of the first requests may start."""
        if not self._started or self._group == len(_GROUPS):
            return 0.0
        before = int(_GROUPS[self._group - 1] * self.crowd.cap) if self._group else 0
        offset = (self._started - before) * _RAMP / self.crowd.cap
        return max(self._group_began + offset, self._hold_until) - now

    def _look_at_group(self, now: float) -> None:
        """Let the next group begin after a gap when one is complete."""
        if self._started == 1:
            self._group_began = now
        took = now - self._group_began
        if took > _LONGEST_GAP:
            self._group = len(_GROUPS)  # these come too slowly to need a ramp
        elif self._started >= int(_GROUPS[self._group] * self.crowd.cap):
            if self._group < len(_GAPS):
                self._group_began = now + max(_GAPS[self._group], 2 * took)
            self._group += 1

    def _heed(self, said: Allowance, now: float) -> None:
        """So many may start until more is said; what is in flight is counted by the server."""
        left = [
            (count / need, seconds)
            for count, need, seconds in (
                (said.requests, 1.0, said.requests_seconds),
                (said.tokens, max(self._size, 1.0), said.tokens_seconds),
            )
            if count is not None and seconds
        ]
        if left:
            self._left, seconds = min(left)
            self._left_until = now + min(seconds, _HELD)


def _minutely(amount: float | None, now: float) -> Bucket | None:
    # Providers count by the minute but refuse by the second.
    return None if amount is None else Bucket(amount / 60, max(amount / 60, 1.0), now)


class Gate:
    """Lets coroutines through one by one as a limit allows, in the order in which they came."""

    def __init__(self, limit: Limit, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self._clock = limit, clock
        self._queue: deque[tuple[asyncio.Future[Ticket], float]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def enter(self, tokens: float = 0.0) -> Ticket:
        """Wait for a place, which is held until one of the three methods below is called."""
        if not self._queue:
            now = self._clock()
            if self.limit.wait(now, tokens) == 0:
                return self.limit.start(now, tokens)
        waiting: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
        self._queue.append((waiting, tokens))
        self._admit()
        try:
            return await waiting
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                self.fail(waiting.result())
            raise

    def accept(self, ticket: Ticket, tokens: float, allowance: Allowance | None) -> None:
        """See `Limit.accept`."""
        self.limit.accept(ticket, self._clock(), tokens=tokens, allowance=allowance)
        self._admit()

    def refuse(self, ticket: Ticket, retry_after: float | None) -> None:
        """See `Limit.refuse`."""
        self.limit.refuse(ticket, self._clock(), retry_after)
        self._admit()

    def fail(self, ticket: Ticket) -> None:
        """See `Limit.fail`."""
        self.limit.fail(ticket, self._clock())
        self._admit()

    def close(self) -> None:
        """Raise `InterruptedError` for everyone who waits."""
        while self._queue:
            waiting, _ = self._queue.popleft()
            if not waiting.done():
                waiting.set_exception(InterruptedError("stopped before this was asked"))

    def _admit(self) -> None:
        while self._queue:
            waiting, tokens = self._queue[0]
            if waiting.done():  # cancelled
                self._queue.popleft()
                continue
            now = self._clock()
            seconds = self.limit.wait(now, tokens)
            if seconds == 0:
                self._queue.popleft()
                waiting.set_result(self.limit.start(now, tokens))
                continue
            if seconds is not None and self._timer is None:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(seconds, self._wake)
            return

    def _wake(self) -> None:
        self._timer = None
        self._admit()


@dataclass
class Limits:
    """What the user allows of every sampler, and a gate for each, by its identity."""

    concurrency: int = 256
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    clock: Callable[[], float] = time.monotonic
    gates: dict[str, Gate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises `SettingsError` for limits under which nothing could ever be asked."""
        for name in ("concurrency", "requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SettingsError(f"{name} must be more than 0; found {value!r}.")

    def gate(self, identity: str) -> Gate:
        """The sampler's own."""
        if identity not in self.gates:
            limit = partial(
                Limit,
                requests_per_minute=self.requests_per_minute,
                tokens_per_minute=self.tokens_per_minute,
            )
            self.gates[identity] = Gate(limit(self.concurrency, now=self.clock()), self.clock)
        return self.gates[identity]

    def close(self) -> None:
        """Raise `InterruptedError` for everyone who waits at a gate."""
        for gate in self.gates.values():
            gate.close()

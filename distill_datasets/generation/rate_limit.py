"""How fast a sampler is asked: as fast as it answers, and never faster than the user allows.

A sampler is asked with `concurrency` requests at once until it shows that it takes less:

- Many requests refused in a row pause all others. One after the other is tried, and when one isn't
  refused all go on as before. What was accepted until then is kept as the server's rate where the
  pause was longer than the work before it, and brief or like the one before: a server that was out
  of order for a while is asked at full speed again.
- Single refusals lower the rate, or the number at once, a little and once a round trip, unless as
  many are refused at any rate. Round trips without them raise both again, in growing steps.
- Where replies take long against the quickest, fewer at once are tried: if as many replies a
  second come, the others only waited in the server's queue.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from math import sqrt
from statistics import median
from typing import NamedTuple

from distill_datasets.models.sampler import Allowance

# The first requests, at the beginning and after a pause, start in groups: after so many of all
# comes a gap in which refusals come back, of twice the time that the group took.
_FEWEST = 16
_GROUPS, _GAP, _LONGEST_GAP = (0.25, 0.5), 0.03, 0.3
_SOME, _HOLD = 3, 0.05  # so many refused in a row hold back the others for so many seconds
_MANY = 8  # refused in a row pause all others
_PROBES = (0.1, 1.0)  # seconds between two tries in a pause, at least and at most
_BRIEF = 2.0  # seconds of a pause that a limit explains
_LESS, _MUCH_LESS = 0.98, 0.7  # of the rate, after a refusal and, at least, after a pause
_STEPS = (0.01, 0.25)  # shares by which the rate is raised, at first and at most
_ROUND_TRIP, _REPLIES = 1.0, 20  # seconds and replies that say something, at least
_UNHURRIED = 0.005  # a share of refusals that is no reason to change anything
_SLOW, _NOTABLE = 2.0, 0.25  # times the quickest reply, and seconds beyond it: like a queue
_FEWER, _AS_MANY, _FEW = 0.75, 0.9, 32  # at once, of the replies a second, and never fewer
_TRIALS = (4, 64)  # round trips between two trials, at first and at most
_HEED = 5.0  # seconds for which headers alone hold back what could be asked
_INSTANT = 1e-6


class Ticket(NamedTuple):
    """One request under way: its number, when it began, and the tokens it was reckoned with."""

    number: int
    began: float
    tokens: float = 0.0


@dataclass
class Bucket:
    """Lets through `rate` a second on average, and at once what comes in `seconds`."""

    rate: float
    seconds: float
    empty_until: float = float("-inf")  # when all that passed will have been made up for

    def wait(self, now: float, amount: float = 1.0) -> float:
        """Seconds until `amount` may pass; one larger than the bucket passes when it is full."""
        return self.empty_until - now - max(0.0, self.seconds - amount / self.rate)

    def take(self, now: float, amount: float = 1.0) -> None:
        """Let `amount` pass; less than nothing gives back."""
        self.empty_until = max(self.empty_until, now) + amount / self.rate


class RateLimit:
    """When one sampler may be asked next. `Limits` makes one for each."""

    def __init__(self, limits: "Limits") -> None:
        now = limits.clock()
        self.clock, self.cap = limits.clock, limits.concurrency
        self.size = float(self.cap)
        self._groups = {n for share in _GROUPS if (n := int(share * self.cap)) >= _FEWEST}
        self.in_flight = self._started = 0
        self._pacing: Bucket | None = None
        # Providers count by the minute but refuse by the second.
        self._requests, self._tokens = (
            Bucket(amount / 60, max(1.0, 60 / amount)) if amount else None
            for amount in (limits.requests_per_minute, limits.tokens_per_minute)
        )
        self._ratio = self._tokens_each = 1.0  # tokens, to those reckoned with, and of a request
        self._left, self._left_until = float("inf"), now  # what headers allow, and until when
        self._ramp_first, self._group_began, self._hold_until = 0, now, now
        self._refused: set[int] = set()  # numbers, of late
        self._latency = self._refusal_latency = 0.0
        self._pause: float | None = None  # when the last of many was refused
        self._pause_number = self._held = 0  # the first start in it; in flight when it began
        self._probe: tuple[float, int] | None = None  # when it began, and in flight beside it
        self._probe_at = now
        self._period, self._accepted = now, 0  # when the last pause ended, and starts since then
        self._estimate = 0.0
        self._usual: deque[float] = deque(maxlen=7)  # shares of refusals
        self._step, self._growth, self._shortest = _STEPS[0], 1.0, _ROUND_TRIP
        self._quickest = float("inf")
        self._trial: tuple[float, float] | None = None  # number at once and replies a second before
        self._until_trial = self._trial_every = _TRIALS[0]
        self._full = self._binding = self._lowered = self._settling = False
        self._door, self._changed, self._closed = asyncio.Lock(), asyncio.Event(), False
        self._open_round_trip(now)

    @property
    def rate(self) -> float | None:
        """Starts a second that the server seems to allow, where it allows fewer than are wanted."""
        return self._pacing.rate if self._pacing else None

    @property
    def paused(self) -> bool:
        """Whether the server refuses everything at the moment."""
        return self._pause is not None

    @property
    def paused_seconds(self) -> float:
        """How long it has done so."""
        return 0.0 if self._pause is None else self.clock() - self._pause

    async def enter(self, tokens: float = 0.0) -> Ticket:
        """Wait for a place in the order of coming; it is held until `leave` is called."""
        async with self._door:
            while not self._closed:
                self._changed.clear()
                seconds = self.wait(tokens)
                if seconds == 0:
                    return self.start(tokens)
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await self._changed.wait()
        raise InterruptedError("stopped before this was asked")

    def close(self) -> None:
        """Raise `InterruptedError` for everyone who waits."""
        self._closed = True
        self._changed.set()

    def wait(self, tokens: float = 0.0) -> float | None:
        """Seconds until the next start, which is 0 for now; None until something ends."""
        now, quiet = self.clock(), 0.0
        if self._probe:
            quiet = max(_PROBES[0], 4 * self._refusal_latency)
        if self._probe and now - self._probe[0] >= quiet - _INSTANT:
            self._resume(*self._probe, now)  # a refusal would have come by now
        if self.in_flight >= max(1, int(self.size)):
            return None
        if self.paused:
            until = [self._probe_at, *([self._probe[0] + quiet] if self._probe else [])]
            seconds = min(until) - now
        else:
            left = self._left_until if self._left < 1 else now
            paced = self._pacing.wait(now) if self._pacing else 0.0
            self._binding = self._binding or paced > 0
            seconds = max(self._hold_until - now, left - now, paced)
        if self._requests:
            seconds = max(seconds, self._requests.wait(now))
        if self._tokens:
            seconds = max(seconds, self._tokens.wait(now, tokens * self._ratio))
        return seconds if seconds > _INSTANT else 0.0

    def start(self, tokens: float = 0.0) -> Ticket:
        """Count a request that starts now; `tokens` estimates its size."""
        now = self.clock()
        ticket = Ticket(self._started, now, tokens)
        if self.paused:
            self._probe = self._probe or (now, self.in_flight)
            self._probe_at = now + min(max(2 * self._latency, _PROBES[0]), _PROBES[1])
        if not self._started:
            self._period = now
        if self._started == self._ramp_first:
            self._group_began = now
        self._started += 1
        if self._started - self._ramp_first in self._groups:
            gap = max(_GAP, 2 * (now - self._group_began))
            self._group_began = now + gap
            if gap < _LONGEST_GAP:  # a group that took longer needs no gap
                self._hold_until = now + gap
        self.in_flight += 1
        self._accepted += 1
        self._left -= 1
        self._full = self._full or self.in_flight >= int(self.size)
        for bucket in filter(None, (self._pacing, self._requests)):
            bucket.take(now)
        if self._tokens:
            self._tokens.take(now, tokens * self._ratio)
        return ticket

    def accept(
        self, ticket: Ticket, tokens: float = 0.0, allowance: Allowance | None = None
    ) -> None:
        """It was answered; `tokens` are those it had."""
        now = self._leave()
        if self.paused and ticket.number >= self._pause_number:
            self._resume(*(self._probe or (ticket.began, self.in_flight)), now)
        took = now - ticket.began
        self._latency += (0.1 if self._latency else 1.0) * (took - self._latency)
        self._quickest = min(self._quickest, took)
        self._replies += 1
        self._seconds += took
        if tokens:
            self._tokens_each += 0.1 * (tokens - self._tokens_each)
            if self._tokens and ticket.tokens:
                self._tokens.take(now, tokens - ticket.tokens * self._ratio)
                self._ratio += 0.1 * (tokens / ticket.tokens - self._ratio)
        if allowance is not None:
            self._heed(allowance, now)
        self._close_round_trip(ticket, now)

    def refuse(
        self, ticket: Ticket, retry_after: float | None = None, *, load: bool = True
    ) -> None:
        """It was refused, for too much `load` or because the server is out of order."""
        now = self._leave()
        self._accepted -= 1
        self._refusal_latency += 0.2 * (now - ticket.began - self._refusal_latency)
        if self.paused:
            if ticket.number >= self._pause_number:
                self._probe = None
            else:
                self._held = min(self._held, self.in_flight)
            self._probe_at = max(self._probe_at, now + (retry_after or 0.0))
            return
        in_a_row = self._count_in_a_row(ticket.number)
        if in_a_row >= _MANY:
            self._pause, self._pause_number, self._held = now, self._started, self.in_flight
            self._probe_at = now + (_PROBES[0] if retry_after is None else retry_after)
        elif in_a_row >= _SOME:
            self._hold_until = now + _HOLD
        if load:
            self._refusals += 1
            if not self._lowered and not self.paused and self._unusual():
                self._lower()

    def fail(self, ticket: Ticket) -> None:
        """It ended in another way, which says nothing about the server."""
        self._leave()

    def _leave(self) -> float:
        self.in_flight -= 1
        self._changed.set()
        return self.clock()

    def _count_in_a_row(self, number: int) -> int:
        self._refused = {one for one in self._refused if one > number - 8 * _MANY} | {number}
        first = last = number
        while first - 1 in self._refused:
            first -= 1
        while last + 1 in self._refused:
            last += 1
        return last - first + 1

    def _lower(self) -> None:
        self._lowered, self._step, self._growth = True, _STEPS[0], 1.0
        if self._pacing:
            self._pacing.rate *= _LESS
        if self.in_flight + 1 >= int(self.size):
            self.size = max(1.0, float(self.in_flight))

    def _resume(self, began: float, beside: int, now: float) -> None:
        """Go on after a pause, which a request that `began` earlier has ended."""
        assert self._pause is not None
        passed = self._accepted - (self._started - self._pause_number)
        before, length = self._estimate, max(began - self._period, 1e-3)
        estimate = passed / length
        pause, work = began - self._pause, self._pause - self._period
        known = before / 1.5 <= estimate <= before * 1.5
        if passed and work < pause and (pause <= _BRIEF or known):
            rate = max(estimate, self.rate * _MUCH_LESS) if self.rate else estimate
            # Timers are late by a millisecond or so: a little is made up for at once.
            self._pacing, self._step = Bucket(rate, 0.02, now), 2 * _STEPS[0]
            self._shortest = max(_ROUND_TRIP, length / 2)  # a limit by the minute shows late
            if beside < self._held:  # it may be their number that is limited
                self.size = max(1.0, min(self.size, self._held))
        self._estimate, self._pause, self._probe = estimate, None, None
        self._refused.clear()
        self._period, self._accepted = began, self._started - self._pause_number
        self._ramp_first = self._started
        self._open_round_trip(now)

    def _unusual(self) -> bool:
        """Whether more are refused than of late at other rates."""
        starts = max(1, self._started - self._first)
        expected = starts * (median(self._usual) if self._usual else 0.0)
        return self._refusals > expected + 3 * sqrt(expected) + _UNHURRIED * starts

    def _open_round_trip(self, now: float) -> None:
        self._first, self._round_trip = self._started, now
        self._replies = self._refusals = 0
        self._seconds = 0.0
        self._full = self._binding = self._lowered = False

    def _close_round_trip(self, ticket: Ticket, now: float) -> None:
        """Judge a round trip when it is over: what started in it has begun to be answered."""
        length, decided = now - self._round_trip, self._replies + self._refusals
        few = decided < max(_REPLIES, self.size)
        if ticket.number < self._first or length < self._shortest or few:
            return
        rate, unusual = self._replies / length, self._unusual()
        self._usual.append(self._refusals / max(1, self._started - self._first))
        if self._pacing and unusual:
            self._pacing.rate = min(self._pacing.rate, rate)
        elif self._pacing and self._binding:
            self._pacing.rate *= 1 + self._step
            self._step = min(2 * self._step, _STEPS[1])
        if not unusual:
            self._judge_latency(rate)
        self._open_round_trip(now)

    def _judge_latency(self, rate: float) -> None:
        """Fewer at once where more only wait in line; more where nothing waits."""
        took = self._seconds / self._replies
        waits = took > _SLOW * self._quickest and took - self._quickest > _NOTABLE
        if self._trial is not None:
            size, before = self._trial
            if self._settling:
                self._settling = False  # what started before the trial has ended now
                return
            self._trial = None
            if rate >= _AS_MANY * before:
                self._trial_every, self._until_trial = _TRIALS[0], 1
            else:
                self.size = size
                self._trial_every = self._until_trial = min(2 * self._trial_every, _TRIALS[1])
        elif waits and self._full and self.size > _FEW:
            self._until_trial -= 1
            if self._until_trial <= 0:
                self._trial, self._settling = (self.size, rate), True
                self.size = max(_FEW, self.size * _FEWER)
        elif self._full and not waits and self.size < self.cap:
            self.size = min(self.cap, self.size + self._growth)
            self._growth = min(2 * self._growth, max(1.0, self.size / 4))

    def _heed(self, said: Allowance, now: float) -> None:
        """So many may start until more is said; what is in flight is counted by the server."""
        left = [
            (count / need, seconds)
            for count, need, seconds in (
                (said.requests, 1.0, said.requests_seconds),
                (said.tokens, max(self._tokens_each, 1.0), said.tokens_seconds),
            )
            if count is not None and seconds
        ]
        if left:
            self._left, seconds = min(left)
            self._left_until = now + min(seconds, _HEED)


@dataclass
class Limits:
    """What the user allows of every sampler."""

    concurrency: int = 256
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    clock: Callable[[], float] = time.monotonic
    samplers: dict[str, RateLimit] = field(default_factory=dict)

    def of(self, identity: str) -> RateLimit:
        """The limit of the sampler with this identity."""
        if identity not in self.samplers:
            self.samplers[identity] = RateLimit(self)
        return self.samplers[identity]

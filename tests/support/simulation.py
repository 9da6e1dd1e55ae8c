"""Servers in simulated time, so that limits can be tested over minutes without waiting for them."""

import random
from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple, Protocol

from distill_datasets.generation.rate_limit import Limits, RateLimit, Ticket


class Served(NamedTuple):
    """What becomes of a request: after how long, and whether it is refused."""

    seconds: float
    refused: bool = False
    retry_after: float | None = None


class Server(Protocol):
    """Decides on a request when it arrives, at `now`."""

    def ask(self, now: float) -> Served: ...


@dataclass
class Unlimited:
    """Answers everything after `seconds`, and refuses a share of it at random."""

    seconds: float = 0.2
    refused: float = 0.0
    dice: random.Random = field(default_factory=lambda: random.Random(7))

    def ask(self, now: float) -> Served:
        if self.dice.random() < self.refused:
            return Served(0.001, True, 1.0)
        return Served(self.seconds)


@dataclass
class PerSecond:
    """Answers so many requests in any one second, and refuses the others at once."""

    limit: int = 100
    seconds: float = 0.2
    retry_after: float | None = 1.0
    period: float = 1.0
    recent: deque[float] = field(default_factory=deque)

    def ask(self, now: float) -> Served:
        while self.recent and self.recent[0] <= now - self.period:
            self.recent.popleft()
        if len(self.recent) >= self.limit:
            return Served(0.005, True, self.retry_after)
        self.recent.append(now)
        return Served(self.seconds)


@dataclass
class AtOnce:
    """Works on so many requests at once, and refuses the others."""

    limit: int = 50
    seconds: float = 0.2
    ends: list[float] = field(default_factory=list)

    def ask(self, now: float) -> Served:
        self.ends = [end for end in self.ends if end > now]
        if len(self.ends) >= self.limit:
            return Served(0.005, True)
        self.ends.append(now + self.seconds)
        return Served(self.seconds)


@dataclass
class Queueing:
    """Works on so many requests at once; the others wait in line."""

    limit: int = 20
    seconds: float = 0.2
    ends: list[float] = field(default_factory=list)

    def ask(self, now: float) -> Served:
        if len(self.ends) < self.limit:
            heappush(self.ends, now + self.seconds)
            return Served(self.seconds)
        end = max(heappop(self.ends), now) + self.seconds
        heappush(self.ends, end)
        return Served(end - now)


@dataclass
class OutOfOrder:
    """Refuses everything from one moment to another, and answers everything else."""

    begins: float
    ends: float
    seconds: float = 0.2
    retry_after: float | None = None

    def ask(self, now: float) -> Served:
        if self.begins <= now < self.ends:
            return Served(0.005, True, self.retry_after)
        return Served(self.seconds)


@dataclass
class HeavyTailed:
    """Answers everything, each after another time."""

    mean: float = 2.0
    dice: random.Random = field(default_factory=lambda: random.Random(7))

    def ask(self, now: float) -> Served:
        return Served(0.1 + self.dice.expovariate(1 / self.mean))


@dataclass
class Outcome:
    """How a simulated run went."""

    limit: RateLimit
    seconds: float = 0.0
    requests: int = 0
    refused: int = 0
    most_in_flight: int = 0
    starts: list[float] = field(default_factory=list)


def simulate(limits: Limits, server: Server, rows: int, cost: float = 0.0) -> Outcome:
    """Ask the server `rows` things within limits; refused ones come again after a rest.

    `cost` is the client's own time for a request, in seconds.
    """
    return _Simulation(limits, server, rows, cost).run()


class _Simulation:
    def __init__(self, limits: Limits, server: Server, rows: int, cost: float) -> None:
        self.now = self.busy = 0.0
        limits.clock = lambda: self.now
        self.limit, self.server, self.waiting, self.cost = limits.of("it"), server, rows, cost
        self.outcome, self.dice, self.order = Outcome(self.limit), random.Random(3), count()
        # What comes when: the end of a request, another try of a row, or only a look at the limit.
        self.events: list[tuple[float, int, tuple[Ticket, Served] | int]] = []
        self.planned = float("inf")  # when the next start is looked at again

    def run(self) -> Outcome:
        outcome = self.outcome
        while True:
            if self.waiting:
                self.start()
            if not self.events:
                outcome.seconds = self.now
                outcome.requests = len(outcome.starts)
                return outcome
            self.now, _, what = heappop(self.events)
            if self.now >= self.planned:
                self.planned = float("inf")
            if isinstance(what, tuple):
                self.end(*what)
            else:
                self.waiting += what

    def at(self, moment: float, what: tuple[Ticket, Served] | int) -> None:
        heappush(self.events, (moment, next(self.order), what))

    def start(self) -> None:
        limit, outcome = self.limit, self.outcome
        while self.waiting and (seconds := limit.wait()) is not None:
            seconds = max(seconds, self.busy - self.now)
            if seconds > 0:
                if self.now + seconds < self.planned:
                    self.planned = self.now + seconds
                    self.at(self.planned, 0)
                return
            self.waiting -= 1
            served = self.server.ask(self.now)
            self.at(self.now + served.seconds, (limit.start(), served))
            outcome.starts.append(self.now)
            outcome.refused += served.refused
            outcome.most_in_flight = max(outcome.most_in_flight, limit.in_flight)
            self.busy = self.now + self.cost

    def end(self, ticket: Ticket, served: Served) -> None:
        if not served.refused:
            self.limit.accept(ticket)
            return
        self.limit.refuse(ticket, served.retry_after)
        rest = (served.retry_after or 0.0) + self.dice.uniform(0, 0.5)
        # As the client does: what everyone is refused waits at the limit, not by itself.
        self.at(self.now + (0.0 if self.limit.paused else rest), 1)

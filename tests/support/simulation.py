"""Servers in simulated time, so that limits can be tested over minutes without waiting for them."""

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Protocol

from distill_datasets.generation.rate_limit import Limits, RateLimit, Ticket


@dataclass(frozen=True)
class Served:
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
            heapq.heappush(self.ends, now + self.seconds)
            return Served(self.seconds)
        end = max(heapq.heappop(self.ends), now) + self.seconds
        heapq.heappush(self.ends, end)
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
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.planned = float("inf")  # when the next start is looked at again

    def run(self) -> Outcome:
        while True:
            self.start()
            if not self.events:
                self.outcome.seconds = self.now
                return self.outcome
            self.now, _, what = heapq.heappop(self.events)
            if self.now >= self.planned:
                self.planned = float("inf")
            what(self.now)

    def at(self, moment: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self.events, (moment, next(self.order), what))

    def start(self) -> None:
        while self.waiting and (seconds := self.limit.wait()) is not None:
            seconds = max(seconds, self.busy - self.now)
            if seconds > 0:
                if self.now + seconds < self.planned:
                    self.planned = self.now + seconds
                    self.at(self.planned, lambda now: None)
                return
            self.waiting -= 1
            served = self.server.ask(self.now)
            ticket = self.limit.start()
            self.at(self.now + served.seconds, partial(self.end, ticket, served))
            self.outcome.requests += 1
            self.outcome.refused += served.refused
            self.outcome.starts.append(self.now)
            in_flight = self.limit.in_flight
            self.outcome.most_in_flight = max(self.outcome.most_in_flight, in_flight)
            self.busy = self.now + self.cost

    def end(self, ticket: Ticket, served: Served, now: float) -> None:
        if not served.refused:
            self.limit.accept(ticket)
            return
        self.limit.refuse(ticket, served.retry_after)
        rest = (served.retry_after or 0.0) + self.dice.uniform(0, 0.5)
        # As the client does: what everyone is refused waits at the limit, not by itself.
        self.at(now + (0.0 if self.limit.paused else rest), self.again)

    def again(self, now: float) -> None:
        self.waiting += 1

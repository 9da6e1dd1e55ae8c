"""Results that are promised now and collected later."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

# Collected results stay for clients whose connection broke while they were sent.
KEPT = 4096


@dataclass(frozen=True)
class Outcome:
    """A finished request: protobuf bytes or JSON."""

    payload: bytes | dict[str, Any]


@dataclass
class Promise:
    """A request that was accepted."""

    request_id: str
    done: asyncio.Event = field(default_factory=asyncio.Event)
    outcome: Outcome | None = None

    def resolve(self, outcome: Outcome) -> None:
        """Hand over the result and wake whoever waits; the first result stands."""
        if self.outcome is None:
            self.outcome = outcome
            self.done.set()


def failure(message: str, *, category: str = "user") -> Outcome:
    """An error in the form that the SDK raises from `.result()`."""
    return Outcome({"error": message, "category": category})


class Promises:
    """All promises of the server, by request id."""

    def __init__(self) -> None:
        self._open: dict[str, Promise] = {}
        self._collected: OrderedDict[str, Promise] = OrderedDict()

    def get(self, request_id: str) -> Promise | None:
        """A promise made earlier: a repeated request must not be computed again."""
        return self._open.get(request_id) or self._collected.get(request_id)

    def make(self, request_id: str) -> Promise:
        """Promise a result."""
        promise = self._open[request_id] = Promise(request_id)
        return promise

    def collected(self, promise: Promise) -> None:
        """Let a delivered result go once enough newer ones were delivered."""
        self._open.pop(promise.request_id, None)
        self._collected[promise.request_id] = promise
        while len(self._collected) > KEPT:
            self._collected.popitem(last=False)

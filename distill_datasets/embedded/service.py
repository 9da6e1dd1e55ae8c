"""The server's state between requests, and how a request becomes a promise."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .engine import Engine
from .failures import RequestError
from .futures import Outcome, Promise, Promises, failure
from .model import ModelCard
from .store import Store
from .worker import Call, Sampling, Work, Worker


@dataclass
class Session:
    """A client's connection: what it named itself, and what it made."""

    session_id: str
    user_metadata: dict[str, Any] | None
    display_name: str | None
    models: list[str] = field(default_factory=list)
    samplers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sampler:
    """A sampling session: which weights answer."""

    sampler_id: str
    model_path: str | None
    weights: str


@dataclass
class _Turns:
    """The order of one model's requests, which may arrive out of order."""

    due: int = 1
    early: dict[int, tuple[Promise, Work]] = field(default_factory=dict)


class Service:
    """One model served; lives on the event loop, computes on the worker."""

    def __init__(self, card: ModelCard, store: Store) -> None:
        self.card, self.store = card, store
        self.engine = Engine(card, store)
        self.worker = Worker(self.engine.run_batch, self.engine.load)
        self.promises = Promises()
        self.sessions: dict[str, Session] = {}
        self.samplers: dict[str, Sampler] = {}
        self._turns: dict[str, _Turns] = {}
        self._loop = asyncio.get_running_loop()

    def session(self, session_id: str) -> Session:
        """A session that was created on this server."""
        if session_id not in self.sessions:
            raise RequestError(
                f"found no session {session_id!r}: the server was restarted; create a new "
                "ServiceClient"
            )
        return self.sessions[session_id]

    def promise(self, request_id: str, run: Callable[[], Any]) -> Promise:
        """Compute on the worker; a repeated request gets the first one's promise."""
        known = self.promises.get(request_id)
        if known is not None:
            return known
        promise = self.promises.make(request_id)
        self.worker.submit(self._call(promise, run))
        return promise

    def promise_in_turn(self, model_id: str, seq_id: int, run: Callable[[], Any]) -> Promise:
        """Compute after all earlier requests of a model, in whatever order they arrive."""
        request_id = f"{model_id}:{seq_id}"
        known = self.promises.get(request_id)
        if known is not None:
            return known
        promise = self.promises.make(request_id)
        turns = self._turns.get(model_id)
        if turns is None:
            # The engine's answer says that this model is not here.
            self.worker.submit(self._call(promise, run))
            return promise
        turns.early[seq_id] = (promise, self._call(promise, run))
        while turns.due in turns.early:
            self.worker.submit(turns.early.pop(turns.due)[1])
            turns.due += 1
        return promise

    def promise_sample(self, request_id: str, make: Callable[[], tuple[str, Any]]) -> Promise:
        """Sample; `make` reads the request and may refuse it."""
        known = self.promises.get(request_id)
        if known is not None:
            return known
        promise = self.promises.make(request_id)
        try:
            weights, request = make()
        except RequestError as error:
            promise.resolve(failure(str(error)))
        else:
            self.worker.submit(Sampling(weights, request, self._resolver(promise)))
        return promise

    def expect_turns(self, model_id: str) -> None:
        """Start counting a model's requests."""
        self._turns.setdefault(model_id, _Turns())

    def refuse_gap(self, promise: Promise) -> None:
        """Fail requests whose predecessor never arrived, rather than let them wait forever."""
        turns = self._turns.get(promise.request_id.rpartition(":")[0])
        if turns is None or all(early is not promise for early, _ in turns.early.values()):
            return
        message = (
            f"expected request {turns.due} of this model first; found {sorted(turns.early)}: "
            "it never arrived, so these were not executed; send them again"
        )
        for early, _ in turns.early.values():
            early.resolve(failure(message))
        turns.due = max(turns.early) + 1
        turns.early.clear()

    def _call(self, promise: Promise, run: Callable[[], Any]) -> Call:
        return Call(lambda: Outcome(run()), self._resolver(promise))

    def _resolver(self, promise: Promise) -> Callable[[Outcome], None]:
        def resolve(outcome: Outcome) -> None:
            self._loop.call_soon_threadsafe(promise.resolve, outcome)

        return resolve

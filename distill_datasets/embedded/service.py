"""The server's state between requests: sessions, uncollected results, order of training."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill_datasets.errors import ServiceError

from .constraints import Constrain
from .engine import ComputeThread, Engine, Job, failure
from .model import ModelCard
from .scheduler import Payload, Resolve, SampleJob
from .store import Store
from .wire import InvalidRequestError, SampleRequest

# Collected results stay for clients whose connection broke while they were sent.
KEPT = 4096
# Requests of one model that wait for an earlier one.
MOST_EARLY = 4096


@dataclass
class Promise:
    """A request that was accepted; its result is collected later."""

    request_id: str
    done: asyncio.Event = field(default_factory=asyncio.Event)
    payload: Payload | None = None

    def resolve(self, payload: Payload) -> None:
        """Hand over the result and wake whoever waits; the first result stands."""
        if self.payload is None:
            self.payload = payload
            self.done.set()


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


@dataclass
class Session:
    """A client's connection: what it named itself, and what it made."""

    session_id: str
    user_metadata: dict[str, Any] | None
    display_name: str | None
    models: list[str] = field(default_factory=list)
    samplers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SamplingSession:
    """Which weights answer, and what holds their answers to a form."""

    sampler_id: str
    model_path: str | None
    weights: str
    constrain: Constrain | None = None


@dataclass
class _RequestOrder:
    """The next request of one model, and those that arrived before their turn."""

    due: int = 1
    early: dict[int, tuple[Promise, Job]] = field(default_factory=dict)


class Service:
    """One model served; lives on the event loop, computes on its thread."""

    def __init__(self, card: ModelCard, store: Store) -> None:
        self.card, self.store = card, store
        self.engine = Engine(card, store)
        self.compute = ComputeThread(self.engine, self.engine.load)
        self.promises = Promises()
        self.sessions: dict[str, Session] = {}
        self.samplers: dict[str, SamplingSession] = {}
        self._orders: dict[str, _RequestOrder] = {}
        self._loop = asyncio.get_running_loop()

    def session(self, session_id: str) -> Session:
        """A session that was created on this server."""
        if session_id not in self.sessions:
            raise InvalidRequestError(
                f"found no session {session_id!r}: the server was restarted; create a new "
                "ServiceClient"
            )
        return self.sessions[session_id]

    def sampler(self, sampler_id: str) -> SamplingSession:
        """A sampling session that was created on this server."""
        if sampler_id not in self.samplers:
            raise InvalidRequestError(
                f"found no sampling session {sampler_id!r}: the server was restarted; create a "
                "new sampling client"
            )
        return self.samplers[sampler_id]

    async def hold(self, schema: Any, ends: Sequence[int]) -> Constrain:
        """What holds samples to a JSON schema, each behind one of the tokens `ends`.

        Raises `InvalidRequestError` for a schema that can't be held, or without llguidance.
        """
        held: list[Constrain] = []

        def run() -> Payload:
            held.append(self.engine.hold(schema, tuple(ends)))
            return {}

        found = Promise("constraint")
        self.compute.submit(Job(run, self._resolver(found)))
        await found.done.wait()
        if held:
            return held[0]
        told = found.payload if isinstance(found.payload, dict) else {}
        kind = ServiceError if told.get("category") == "server" else InvalidRequestError
        raise kind(str(told.get("error")))

    def promise(self, request_id: str, run: Callable[[], Payload]) -> Promise:
        """Compute; a repeated request gets the first one's promise."""
        known = self.promises.get(request_id)
        if known is not None:
            return known
        promise = self.promises.make(request_id)
        self.compute.submit(Job(run, self._resolver(promise)))
        return promise

    def promise_in_order(self, model_id: str, seq_id: int, run: Callable[[], Payload]) -> Promise:
        """Compute after all earlier requests of a model, in whatever order they arrive."""
        order = self._orders.get(model_id)
        request_id = f"{model_id}:{seq_id}"
        known = self.promises.get(request_id)
        # The engine's answer says that a model is not here.
        if known is not None or order is None:
            return known or self.promise(request_id, run)
        if len(order.early) >= MOST_EARLY:
            raise InvalidRequestError(
                f"expected request {order.due} of this model; found {MOST_EARLY} later ones that "
                "wait for it: send it first"
            )
        promise = self.promises.make(request_id)
        order.early[seq_id] = (promise, Job(run, self._resolver(promise)))
        while order.due in order.early:
            self.compute.submit(order.early.pop(order.due)[1])
            order.due += 1
        return promise

    def promise_sample(
        self, request_id: str, read: Callable[[], tuple[SamplingSession, SampleRequest]]
    ) -> Promise:
        """Sample; `read` gives session and request, and may refuse it."""
        known = self.promises.get(request_id)
        if known is not None:
            return known
        promise = self.promises.make(request_id)
        try:
            sampler, request = read()
        except InvalidRequestError as error:
            promise.resolve(failure(str(error)))
        else:
            resolve, constrain = self._resolver(promise), sampler.constrain
            self.compute.submit(SampleJob(sampler.weights, request, resolve, constrain=constrain))
        return promise

    def expect_requests(self, model_id: str) -> None:
        """Start counting a model's requests."""
        self._orders.setdefault(model_id, _RequestOrder())

    def refuse_gap(self, promise: Promise) -> None:
        """Fail requests whose predecessor never arrived, rather than let them wait forever."""
        order = self._orders.get(promise.request_id.rpartition(":")[0])
        if order is None or all(early is not promise for early, _ in order.early.values()):
            return
        message = (
            f"expected request {order.due} of this model first; found {sorted(order.early)}: "
            "it never arrived, so these were not executed; send them again"
        )
        for early, _ in order.early.values():
            early.resolve(failure(message))
        order.due = max(order.early) + 1
        order.early.clear()

    def _resolver(self, promise: Promise) -> Resolve:
        def resolve(payload: Payload) -> None:
            self._loop.call_soon_threadsafe(promise.resolve, payload)

        return resolve

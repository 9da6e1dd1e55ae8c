"""One model served: sessions and promised results on the event loop, all that is computed on one
thread.

That is training in order, saved weights being sampled, and samples that wait together in one batch.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import DistillError, ServiceError

from .conversion import ADAPTER_FILE, AdapterLayout
from .model import LoadedModel, ModelCard, load_model
from .scheduler import (
    BASE,
    MOST_SNAPSHOTS,
    Payload,
    Resolve,
    SampledWeights,
    SampleJob,
)
from .store import ExecutionLog, Kind, Store, StoredCheckpoint, StoredRun
from .wire import Body, InvalidRequestError, pb, read_sample_request

if TYPE_CHECKING:
    from .batching import RunningBatch
    from .logits import Constrain, Grammars
    from .trainer import Trainee

# Collected results stay for clients whose connection broke while they were sent.
KEPT = 4096
# Requests of one model that wait for an earlier one.
MOST_EARLY = 4096


@dataclass
class Promise:
    """A request that was accepted; its result is collected later, on the event loop `loop`."""

    request_id: str
    loop: asyncio.AbstractEventLoop
    done: asyncio.Event = field(default_factory=asyncio.Event)
    payload: Payload | None = None

    def settle(self, payload: Payload) -> None:
        """Hand over the result and wake whoever waits; the first result stands."""
        if self.payload is None:
            self.payload = payload
            self.done.set()

    def resolve(self, payload: Payload) -> None:
        """Hand over the result from another thread."""
        self.loop.call_soon_threadsafe(self.settle, payload)


@dataclass(frozen=True)
class SamplingSession:
    """Which weights answer, and what holds their answers to a form."""

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
        self.sessions: set[str] = set()
        self.samplers: dict[str, SamplingSession] = {}
        self._open: dict[str, Promise] = {}
        self._collected: OrderedDict[str, Promise] = OrderedDict()
        self._orders: dict[str, _RequestOrder] = {}
        self._loop = asyncio.get_running_loop()

    def require_session(self, session_id: str) -> None:
        """Refuse a session that was not created on this server."""
        if session_id not in self.sessions:
            raise InvalidRequestError(
                f"found no session {session_id!r}: the server was restarted; create a new "
                "ServiceClient"
            )

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

        found = Promise("constraint", self._loop)
        self.compute.submit(Job(run, found.resolve))
        await found.done.wait()
        if held:
            return held[0]
        told = found.payload if isinstance(found.payload, dict) else {}
        kind = ServiceError if told.get("category") == "server" else InvalidRequestError
        raise kind(str(told.get("error")))

    def known(self, request_id: str) -> Promise | None:
        """A promise made earlier: a repeated request must not be computed again."""
        return self._open.get(request_id) or self._collected.get(request_id)

    def collected(self, promise: Promise) -> None:
        """Let a delivered result go once enough newer ones were delivered."""
        self._open.pop(promise.request_id, None)
        self._collected[promise.request_id] = promise
        while len(self._collected) > KEPT:
            self._collected.popitem(last=False)

    def _make(self, request_id: str) -> Promise:
        promise = self._open[request_id] = Promise(request_id, self._loop)
        return promise

    def promise(self, request_id: str, run: Callable[[], Payload]) -> Promise:
        """Compute; a repeated request gets the first one's promise."""
        promise = self.known(request_id)
        if promise is None:
            promise = self._make(request_id)
            self.compute.submit(Job(run, promise.resolve))
        return promise

    def promise_in_order(self, model_id: str, seq_id: int, run: Callable[[], Payload]) -> Promise:
        """Compute after all earlier requests of a model, in whatever order they arrive."""
        order = self._orders.get(model_id)
        request_id = f"{model_id}:{seq_id}"
        # The engine's answer says that a model is not here.
        if order is None or self.known(request_id) is not None:
            return self.promise(request_id, run)
        if len(order.early) >= MOST_EARLY:
            raise InvalidRequestError(
                f"expected request {order.due} of this model; found {MOST_EARLY} later ones that "
                "wait for it: send it first"
            )
        promise = self._make(request_id)
        order.early[seq_id] = (promise, Job(run, promise.resolve))
        while order.due in order.early:
            self.compute.submit(order.early.pop(order.due)[1])
            order.due += 1
        return promise

    def promise_sample(self, request_id: str, sampler_id: str, body: Body) -> Promise:
        """Sample; what is asked wrongly is refused with the result."""
        promise = self.known(request_id)
        if promise is not None:
            return promise
        promise = self._make(request_id)
        try:
            sampler, request = self.sampler(sampler_id), read_sample_request(body)
        except InvalidRequestError as error:
            promise.settle(failure(str(error)))
        else:
            asked = sampler.weights, request, promise.resolve
            self.compute.submit(SampleJob(*asked, constrain=sampler.constrain))
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
            early.settle(failure(message))
        order.due = max(order.early) + 1
        order.early.clear()


def failure(message: str, *, category: str = "user") -> Payload:
    """An error in the form that the SDK raises from `.result()`."""
    return {"error": message, "category": category}


@dataclass(frozen=True)
class Job:
    """Anything but sampling."""

    run: Callable[[], Payload]
    resolve: Resolve


class ComputeThread:
    """Owns torch: whatever touches the model runs here.

    Samples read weights that never change, so that their order can't matter: they run together, a
    step at a time. Everything else runs in the order it was asked for. Where both wait, both get
    as much time.
    """

    def __init__(
        self,
        sampler: Engine,
        prepare: Callable[[], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._sampler, self._prepare, self._clock = sampler, prepare, clock
        self._arrived: deque[Job | SampleJob] = deque()
        self._changed = threading.Condition()
        self._broken: Payload | None = None
        # Jobs that wait, and how much longer they had the thread than samples that waited too.
        self._jobs: deque[Job] = deque()
        self._ahead = 0.0
        threading.Thread(target=self._work, name="compute", daemon=True).start()

    def submit(self, job: Job | SampleJob) -> None:
        """Queue a job."""
        with self._changed:
            self._arrived.append(job)
            self._changed.notify()

    def _work(self) -> None:
        # A model that can't be loaded is every request's answer.
        self._attempt(self._prepare, self._break)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._arrived or self._jobs or self._sampler.busy)
                arrived = list(self._arrived)
                self._arrived.clear()
            for job in arrived:
                if self._broken is not None:
                    job.resolve(self._broken)
                elif isinstance(job, Job):
                    self._jobs.append(job)
                else:
                    self._attempt(partial(self._sampler.add, job), job.resolve)
            self._compute()

    def _compute(self) -> None:
        """A job or a step of the samples, whichever has had less of the time that both wait."""
        began, jobs, samples = self._clock(), bool(self._jobs), self._sampler.busy
        if jobs and not (samples and self._ahead > 0):
            job = self._jobs.popleft()
            self._attempt(lambda: job.resolve(job.run()), job.resolve)
            self._ahead += self._clock() - began
        elif samples:
            self._attempt(self._sampler.step, self._sampler.fail)
            self._ahead -= self._clock() - began
        if not (jobs and samples):
            self._ahead = 0.0

    def _break(self, found: Payload) -> None:
        said = found["error"] if isinstance(found, dict) else ""
        self._broken = failure(f"the model could not be loaded: {said}")

    def _attempt(self, run: Callable[[], None], refuse: Resolve) -> None:
        """The request boundary: whatever goes wrong here is told to a client, not raised."""
        try:
            run()
        except DistillError as error:
            refuse(failure(str(error)))
        except Exception as error:  # a bug must fail one request, not end the server
            traceback.print_exc(file=sys.stderr)
            refuse(failure(_told(error), category="server"))


def _told(error: Exception) -> str:
    """What a client reads of an error that no request should cause."""
    said = f"{type(error).__name__}: {error}"
    # Torch raises an error of its own on a GPU, and a plain RuntimeError on a CPU.
    if isinstance(error, MemoryError) or "memory" in str(error).lower():
        return f"the server is out of memory: send fewer or shorter rows at once ({said})"
    return said


class Engine:
    """Everything that touches torch; all methods but `weights_of` run on the compute thread."""

    def __init__(self, card: ModelCard, store: Store) -> None:
        self.card, self.store = card, store
        self._log = ExecutionLog(store.folder, store.clock)
        self._scratch = tempfile.TemporaryDirectory(prefix="distill-embedded-")
        self._saved: dict[str, Path] = {}
        self._snapshots: deque[Path] = deque()
        self._numbers = count()
        self._trainees: dict[str, Trainee] = {}
        self._loaded: tuple[LoadedModel, SampledWeights, RunningBatch] | None = None
        self._grammars: dict[tuple[int, ...], Grammars] = {}

    def load(self) -> None:
        """Load the model; seconds."""
        from .batching import RunningBatch

        base = load_model(self.card)
        weights = SampledWeights(base, self._saved)
        self._loaded = base, weights, RunningBatch(base, weights)

    def hold(self, schema: Any, ends: tuple[int, ...]) -> Constrain:
        """What makes the constraint of each sample that is held to a schema."""
        from .logits import Grammars

        base, *_ = self._model
        if ends not in self._grammars:
            self._grammars[ends] = Grammars(base.tokenizer.to_str(), base.vocabulary, ends)
        return self._grammars[ends].compile(schema)

    def close(self) -> None:
        """Remove weights that were saved for this process only."""
        self._scratch.cleanup()

    def weights_of(self, model_path: str | None, store: Store | None = None) -> str:
        """The key of the weights at a sampler path; a path written anew is another key.

        They are in the engine's own store, unless another is named.
        """
        if model_path is None:
            return BASE
        store = store or self.store
        checkpoint, folder = store.find(model_path)
        self._require_kind(checkpoint, "sampler_weights", store)
        key = f"{model_path}@{checkpoint.created}"
        self._saved[key] = folder
        return key

    def weights_in(self, folder: Path) -> str:
        """The key of an adapter in PEFT's format, wherever it lies.

        Whether it fits this model shows when it is sampled.
        """
        AdapterLayout.read(folder)
        key = f"{folder.resolve()}@{(folder / ADAPTER_FILE).stat().st_mtime_ns}"
        self._saved[key] = folder
        return key

    @property
    def busy(self) -> bool:
        """Whether any sample runs or waits."""
        return self._loaded is not None and self._loaded[2].busy

    def add(self, job: SampleJob) -> None:
        """Accept a sample request; raises `InvalidRequestError` where it can't be served."""
        self._model[2].add(job)

    def step(self) -> None:
        """Go on with the samples by about a token each."""
        self._model[2].step()

    def fail(self, payload: Payload) -> None:
        """Answer the requests that made the last step fail, and go on without them."""
        self._model[2].fail(payload)

    def create(self, run: StoredRun) -> dict[str, Any]:
        """Start a run with a fresh adapter."""
        from .lora import LoraSpec
        from .trainer import Trainee

        base, weights, _ = self._model
        self._trainees[run.run_id] = Trainee(base, weights.adapters, LoraSpec.read(run.lora))
        self.store.add_run(run)
        self._log.add(run.run_id, 0, "create_model", **run.lora)
        return {"model_id": run.run_id, "type": "create_model"}

    def forward_backward(self, message: pb.ForwardBackwardRequest) -> bytes:
        """Score rows and gather their gradients."""
        from .trainer import read_train_request, write_train_result

        request = read_train_request(message)
        logprobs, metrics = self._trainee(message.model_id).forward_backward(request)
        did = "forward" if request.forward_only else "forward_backward"
        tokens = sum(len(row.tokens) for row in request.data)
        facts = {"batch": request.digest, "rows": len(request.data), "tokens": tokens}
        self._log.add(message.model_id, message.seq_id, did, loss=request.loss, **facts)
        return write_train_result(logprobs, metrics)

    def optim_step(self, model_id: str, seq_id: int, body: Body) -> dict[str, Any]:
        """Take a step of Adam."""
        from .trainer import AdamParams

        params = AdamParams.read(body)
        metrics = self._trainee(model_id).step(params)
        self._log.add(model_id, seq_id, "optim_step", learning_rate=params.learning_rate)
        return {"metrics": metrics}

    def save(self, checkpoint: StoredCheckpoint, seq_id: int, *, overwrite: bool) -> dict[str, Any]:
        """Write a checkpoint."""
        trainee, optimizer = self._trainee(checkpoint.run_id), checkpoint.has_optimizer
        self.store.write(
            checkpoint,
            lambda folder: trainee.save(folder, optimizer=optimizer),
            overwrite=overwrite,
        )
        self._log.add(checkpoint.run_id, seq_id, "save_weights", path=checkpoint.path)
        return {"path": checkpoint.path}

    def save_for_session(self, model_id: str, key: str) -> None:
        """Keep the present weights under a key, for sampling in this process only."""
        trainee = self._trainee(model_id)
        folder = Path(self._scratch.name) / str(next(self._numbers))
        folder.mkdir()
        trainee.save(folder, optimizer=False)
        self._saved[key] = folder
        self._snapshots.append(folder)
        while len(self._snapshots) > MOST_SNAPSHOTS:
            shutil.rmtree(self._snapshots.popleft())

    def load_into(
        self, model_id: str, seq_id: int, path: str, *, optimizer: bool
    ) -> dict[str, Any]:
        """Continue a run from a checkpoint of any run of the same model and LoRA layout."""
        trainee = self._trainee(model_id)
        run, folder = self.training_checkpoint(path)
        layout = trainee.spec.dump()
        if any(key != "seed" and run.lora.get(key) != layout[key] for key in layout):
            raise InvalidRequestError(
                f"expected a checkpoint with {layout}; found {run.lora} in {path!r}: create the "
                "client from the checkpoint (create_training_client_from_state), which takes its "
                "layout"
            )
        trainee.restore(folder, optimizer=optimizer)
        self._log.add(model_id, seq_id, "load_weights", path=path, optimizer=optimizer)
        return {"path": path, "model_id": model_id, "type": "load_weights"}

    def training_checkpoint(self, path: str) -> tuple[StoredRun, Path]:
        """The run and the folder of a training checkpoint that belongs to the served model."""
        checkpoint, folder = self.store.find(path)
        return self._require_kind(checkpoint, "weights", self.store), folder

    def _require_kind(self, checkpoint: StoredCheckpoint, kind: Kind, store: Store) -> StoredRun:
        if checkpoint.kind != kind:
            use = "sampled" if kind == "sampler_weights" else "trained further"
            maker = "save_weights_for_sampler" if kind == "sampler_weights" else "save_state"
            raise InvalidRequestError(
                f"expected a path under {kind}/, which can be {use}; found {checkpoint.path!r}: "
                f"save one with {maker}()"
            )
        run = store.run(checkpoint.run_id)
        known = (run.fingerprint, run.weights or self.card.weights)
        if known != (self.card.fingerprint, self.card.weights):
            raise InvalidRequestError(
                f"{checkpoint.path} was trained on {run.base_model!r} ({'/'.join(known)}); this "
                f"server has {self.card.name!r} ({self.card.fingerprint}/{self.card.weights}): "
                "serve that model instead"
            )
        return run

    def _trainee(self, model_id: str) -> Trainee:
        if model_id not in self._trainees:
            raise InvalidRequestError(
                f"found no model {model_id!r} in this server, only {list(self._trainees)}: it was "
                "not created or the server was restarted; create_training_client_from_state "
                "resumes from a saved checkpoint"
            )
        return self._trainees[model_id]

    @property
    def _model(self) -> tuple[LoadedModel, SampledWeights, RunningBatch]:
        if self._loaded is None:
            raise RuntimeError("expected load() first; found no model")
        return self._loaded

"""The model with everything derived from it: runs in training, saved weights being sampled."""

from __future__ import annotations

import shutil
import tempfile
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .executed import Log
from .failures import MissingError, RequestError
from .futures import Outcome
from .model import Base, ModelCard, load_base
from .sample_wire import SampleResult, write_sample_result
from .store import Checkpoint, Kind, Run, Store
from .train_wire import TrainRequest, write_train_result
from .worker import Sampling

if TYPE_CHECKING:
    from .lora import Adapters, LoraSpec
    from .prefix_cache import Prefixes
    from .trainer import Trainee

# The key of the base model's own weights.
BASE = "base"
# Adapters kept in memory for sampling; others are read again when needed.
MOST_SAMPLERS = 8
# Unnamed weights kept for sampling; a training that samples at every step makes one each time.
MOST_SNAPSHOTS = 64


@dataclass(frozen=True)
class SaveOrder:
    """A checkpoint to write: what the client said about it."""

    model_id: str
    seq_id: int
    kind: Kind
    name: str
    overwrite: bool = False
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None


class Engine:
    """Everything that touches torch; all methods but `weights_of` run on the worker's thread."""

    def __init__(self, card: ModelCard, store: Store) -> None:
        self.card, self.store = card, store
        self._log = Log(store.folder, store.clock)
        self._scratch = tempfile.TemporaryDirectory(prefix="distill-embedded-")
        self._folders: dict[str, Path] = {}
        self._snapshots: deque[Path] = deque()
        self._numbers = count()
        self._samplers: OrderedDict[str, str] = OrderedDict()
        self._trainees: dict[str, Trainee] = {}
        self._base: Base | None = None
        self._adapters_made: Adapters | None = None
        self._prefixes_made: Prefixes | None = None

    def load(self) -> None:
        """Load the model; seconds."""
        self._base = load_base(self.card)

    def close(self) -> None:
        """Remove weights that were saved for this process only."""
        self._scratch.cleanup()

    # Sampling

    def weights_of(self, model_path: str | None) -> str:
        """The key of the weights at a sampler path; a path written anew is another key."""
        if model_path is None:
            return BASE
        checkpoint, folder = self.store.find(model_path)
        self._require_kind(checkpoint, "sampler_weights")
        key = f"{model_path}@{checkpoint.created}"
        self._folders[key] = folder
        return key

    def run_batch(self, samplings: Sequence[Sampling]) -> Sequence[Sampling]:
        """Sample for the first request and those that fit beside it; returns who was served."""
        from .decoding import check_context, compute_prefix, decode
        from .scheduler import plan

        base, weights = self._require_base(), samplings[0].weights
        check_context(samplings[0].request, base)
        fit = [one for one in samplings if self._fits(one)]
        self._activate(weights)
        batch = plan(
            weights,
            [one.request for one in fit],
            self._prefixes,
            lambda tokens: compute_prefix(base, tokens),
        )
        chosen = [fit[index] for index in batch.chosen]
        shared = None if batch.prefix is None else batch.prefix.cut(batch.length)

        def done(index: int, result: SampleResult) -> None:
            chosen[index].resolve(Outcome(write_sample_result(chosen[index].request, result)))

        decode(base, [one.request for one in chosen], shared, done)
        return chosen

    def _fits(self, sampling: Sampling) -> bool:
        from .decoding import check_context

        try:
            check_context(sampling.request, self._require_base())
        except RequestError:
            return False
        return True

    def _activate(self, weights: str) -> None:
        """Make the network compute with some weights."""
        if weights == BASE:
            if self._adapters_made is not None:
                self._adapters_made.activate(None)
            return
        if weights not in self._samplers:
            folder = self._folders[weights]
            if not folder.is_dir():
                raise MissingError(
                    f"the weights of this client were deleted: {weights}; of unnamed ones the last "
                    f"{MOST_SNAPSHOTS} are kept, named ones (save_weights_for_sampler) until their "
                    "time is over"
                )
            self._samplers[weights] = self._adapters.load(folder)
        self._samplers.move_to_end(weights)
        while len(self._samplers) > MOST_SAMPLERS:
            gone, name = self._samplers.popitem(last=False)
            self._adapters.drop(name)
            self._prefixes.forget(gone)
        self._adapters.activate(self._samplers[weights])

    # Training

    def create(self, run: Run, spec: LoraSpec) -> dict[str, Any]:
        """Start a run with a fresh adapter."""
        from .trainer import Trainee

        self._trainees[run.run_id] = Trainee(self._require_base(), self._adapters, spec)
        self.store.add_run(run)
        self._log.add(run.run_id, 0, "create_model", **run.lora)
        return {"model_id": run.run_id, "type": "create_model"}

    def forward_backward(self, model_id: str, seq_id: int, request: TrainRequest) -> bytes:
        """Score rows and gather their gradients."""
        result = self._trainee(model_id).forward_backward(request)
        did = "forward" if request.forward_only else "forward_backward"
        tokens = sum(len(row.tokens) for row in request.data)
        facts = {"batch": request.digest, "rows": len(request.data), "tokens": tokens}
        self._log.add(model_id, seq_id, did, loss=request.loss, **facts)
        return write_train_result(result)

    def optim_step(self, model_id: str, seq_id: int, body: dict[str, Any]) -> dict[str, Any]:
        """Take a step of Adam."""
        from .trainer import AdamParams

        params = AdamParams.read(body)
        metrics = self._trainee(model_id).step(params)
        self._log.add(model_id, seq_id, "optim_step", learning_rate=params.learning_rate)
        return {"metrics": metrics}

    def save(self, order: SaveOrder) -> dict[str, Any]:
        """Write a checkpoint."""
        trainee, training = self._trainee(order.model_id), order.kind == "weights"
        checkpoint = Checkpoint(
            order.model_id,
            order.kind,
            order.name,
            self.store.now(),
            user_metadata=order.user_metadata,
            expires_at=self.store.expiry(order.ttl_seconds),
            has_optimizer=training,
        )
        self.store.write(
            checkpoint,
            lambda folder: trainee.save(folder, optimizer=training),
            overwrite=order.overwrite,
        )
        self._log.add(order.model_id, order.seq_id, "save_weights", path=checkpoint.path)
        return {"path": checkpoint.path}

    def save_for_session(self, model_id: str, key: str) -> None:
        """Keep the present weights under a key, for sampling in this process only."""
        folder = Path(self._scratch.name) / str(next(self._numbers))
        folder.mkdir()
        self._trainee(model_id).save(folder, optimizer=False)
        self._folders[key] = folder
        self._snapshots.append(folder)
        while len(self._snapshots) > MOST_SNAPSHOTS:
            shutil.rmtree(self._snapshots.popleft())

    def load_into(
        self, model_id: str, seq_id: int, path: str, *, optimizer: bool
    ) -> dict[str, Any]:
        """Continue a run from a checkpoint of any run of the same model and LoRA layout."""
        trainee = self._trainee(model_id)
        checkpoint, folder = self.checkpoint(path)
        saved = self.store.run(checkpoint.run_id).lora
        now = trainee.spec.dump()
        differ = [key for key in now if key != "seed" and saved.get(key) != now[key]]
        if differ:
            raise RequestError(
                f"expected a checkpoint with {now}; found {saved} in {path!r}: create the client "
                "from the checkpoint (create_training_client_from_state), which takes its layout"
            )
        trainee.restore(folder, optimizer=optimizer)
        self._log.add(model_id, seq_id, "load_weights", path=path, optimizer=optimizer)
        return {"path": path, "model_id": model_id, "type": "load_weights"}

    def create_from(self, run: Run, path: str, *, optimizer: bool) -> dict[str, Any]:
        """Start a run from a checkpoint."""
        from .lora import LoraSpec

        self.create(run, LoraSpec(**run.lora))
        return self.load_into(run.run_id, 0, path, optimizer=optimizer)

    def checkpoint(self, path: str) -> tuple[Checkpoint, Path]:
        """A training checkpoint that belongs to the served model."""
        checkpoint, folder = self.store.find(path)
        self._require_kind(checkpoint, "weights")
        return checkpoint, folder

    def _require_kind(self, checkpoint: Checkpoint, kind: Kind) -> None:
        if checkpoint.kind != kind:
            use = "sampled" if kind == "sampler_weights" else "trained further"
            maker = "save_weights_for_sampler" if kind == "sampler_weights" else "save_state"
            raise RequestError(
                f"expected a path under {kind}/, which can be {use}; found {checkpoint.path!r}: "
                f"save one with {maker}()"
            )
        run = self.store.run(checkpoint.run_id)
        if run.fingerprint != self.card.fingerprint:
            raise RequestError(
                f"{checkpoint.path} was trained on {run.base_model!r} ({run.fingerprint}); this "
                f"server has {self.card.name!r} ({self.card.fingerprint}): serve that model instead"
            )

    def _trainee(self, model_id: str) -> Trainee:
        if model_id not in self._trainees:
            raise RequestError(
                f"found no model {model_id!r} in this server, only {list(self._trainees)}: it was "
                "not created or the server was restarted; create_training_client_from_state "
                "resumes from a saved checkpoint"
            )
        return self._trainees[model_id]

    def _require_base(self) -> Base:
        if self._base is None:
            raise RuntimeError("expected load() first; found no model")
        return self._base

    @property
    def _adapters(self) -> Adapters:
        """Made when first needed: importing peft takes seconds, and sampling a base needs none."""
        if self._adapters_made is None:
            from .lora import Adapters

            self._adapters_made = Adapters(self._require_base())
        return self._adapters_made

    @property
    def _prefixes(self) -> Prefixes:
        if self._prefixes_made is None:
            from .prefix_cache import Prefixes

            self._prefixes_made = Prefixes()
        return self._prefixes_made

"""The student: what a server is asked to train, how a batch is sent to it, how it is read, and
what it starts from."""

import errno
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar

import numpy as np
import tinker
from numpy.typing import NDArray

from distill_datasets.errors import (
    DatasetError,
    ModelError,
    OutputError,
    ServiceError,
    SettingsError,
)
from distill_datasets.models import tinker as sdk
from distill_datasets.models.references import (
    adopt_state,
    base_of,
    connect,
    default_student,
    find_training,
    read_training,
)
from distill_datasets.models.tinker import Connection, TinkerSampler, explained, optional
from distill_datasets.training import tell
from distill_datasets.training.data import DatasetSource, Example
from distill_datasets.training.settings import TrainSettings

Normalization = Literal["token", "example"]
T = TypeVar("T")
LossName = Literal["cross_entropy", "importance_sampling"]
_FULL = os.strerror(errno.ENOSPC)
_KEPT = "What was saved is kept: run it again with the same output folder to continue."
_LONGEST = 4096  # tokens a row: what a local machine holds; more must be asked for
LEARNED = "learned.npy"  # in a training's folder: the rows that a later training can leave out
_ADAPTED = ("rank", "train_attention", "train_mlp", "train_unembed")
_UNLISTED = "checkpoints can't be looked up on the server"
_NO_STUDENT = (
    "{!r} is no student to start from: expected a training's folder, or "
    "tinker://<run>/weights/<name>."
)
_UNKNOWN_BASE = "nothing says which model the weights to begin with were trained from"
RowKeys = NDArray[np.uint64]


@dataclass(frozen=True)
class Learned:
    """One step: what it learned before its update, and what it took.

    `loss` is what was minimised, per response token; `nll` that of the dataset's own responses,
    in nats per token, None where the step held none; `response_bytes` are theirs. `tokens` counts
    whole conversations, as servers bill them. `extra` is what an objective adds to the log.
    """

    loss: float
    response_tokens: int
    tokens: int
    gradient_norm: float | None = None
    nll: float | None = None
    response_bytes: int = 0
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def bits_per_byte(self) -> float | None:
        """The NLL in bits over the bytes of the responses: comparable across tokenizers."""
        return bits_per_byte(self.nll, self.response_tokens, self.response_bytes)


@dataclass(frozen=True)
class TrainingBatch:
    """Rows for one step: the datums, the server's loss for them, and a reader of its outputs.

    `read` gets the `loss_fn_outputs`, one mapping a datum, in their order.
    """

    datums: Sequence[tinker.Datum]
    read: Callable[[Sequence[Mapping[str, Any]]], Learned]
    loss: LossName = "cross_entropy"


def supervised_batch(examples: Sequence[Example], normalization: Normalization) -> TrainingBatch:
    """The cross entropy of the responses, each token or each response weighing alike."""
    batch = datums(examples, normalization)

    def read(outputs: Sequence[Mapping[str, Any]]) -> Learned:
        said = response_logprobs(examples, target_logprobs(batch, outputs))
        tokens = sum(map(len, said))
        nll = -sum(float(one.sum()) for one in said) / tokens
        return Learned(
            loss=nll,
            nll=nll,
            response_tokens=tokens,
            response_bytes=sum(example.bytes for example in examples),
            tokens=sum(len(example.tokens) for example in examples),
        )

    return TrainingBatch(batch, read)


def shares(lengths: Sequence[int], normalization: Normalization) -> list[int]:
    """What each row's weights are divided by, as servers sum weighted losses over a batch.

    Per token, every response token of the batch counts alike; per example, every response does.
    """
    return [sum(lengths) if normalization == "token" else len(lengths) * own for own in lengths]


def datum(tokens: Sequence[int], **inputs: NDArray[Any]) -> tinker.Datum:
    """A conversation as the server wants it, with what its loss takes: `target_tokens` are integers
    of 64 bits, and all others floats of 32.
    """
    kinds = {name: np.int64 if name == "target_tokens" else np.float32 for name in inputs}
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(list(tokens[:-1])),
        loss_fn_inputs={
            name: tinker.TensorData.from_numpy(np.asarray(one, kinds[name]))
            for name, one in inputs.items()
        },
    )


def datums(examples: Sequence[Example], normalization: Normalization) -> list[tinker.Datum]:
    """For the cross entropy; the weights carry the mean."""
    masks = [example.targets for example in examples]
    sizes = shares([int(mask.sum()) for mask in masks], normalization)
    return [
        datum(one.tokens, target_tokens=np.asarray(one.tokens[1:]), weights=mask / size)
        for one, mask, size in zip(examples, masks, sizes, strict=True)
    ]


def target_logprobs(
    batch: Sequence[tinker.Datum], outputs: Sequence[Mapping[str, Any]]
) -> list[NDArray[np.float64]]:
    """Of every target of a batch, (N) or (N, K), as the server's loss gives them back."""
    return [
        np.asarray(output["logprobs"].to_numpy(), np.float64).reshape(
            one.loss_fn_inputs["target_tokens"].shape
        )
        for one, output in zip(batch, outputs, strict=True)
    ]


def response_logprobs(
    examples: Sequence[Example], targets: Sequence[NDArray[np.float64]]
) -> list[NDArray[np.float64]]:
    """Of the tokens of each response alone."""
    return [one[example.targets > 0] for example, one in zip(examples, targets, strict=True)]


def bits_per_byte(nll: float | None, tokens: float, size: int) -> float | None:
    """From nats per token; None where nothing was scored or no bytes are known."""
    return nll * tokens / math.log(2) / size if nll is not None and size else None


def adam(
    learning_rate: float, *, weight_decay: float = 0.0, grad_clip: float = 0.0
) -> tinker.AdamParams:
    """How the weights follow a gradient; 0 for none of a thing."""
    return tinker.AdamParams(
        learning_rate=learning_rate,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=weight_decay,
        grad_clip_norm=grad_clip,
    )


@dataclass(frozen=True)
class Saved:
    """A checkpoint's name, and its paths: what training resumes from, and what can be sampled."""

    name: str
    state: str
    sampler: str | None


class Submitted(Generic[T]):
    """What a server was asked for, on its way."""

    def __init__(self, wait: Callable[[], T]) -> None:
        """Made by a `Student`."""
        self._wait = wait

    def result(self) -> T:
        """Wait until the server has done it."""
        return self._wait()


class Student:
    """LoRA weights on a server. Requests run there in the order in which they are made here.

    Every method may raise `ModelError`, `AccessError` or `ServiceError`.
    """

    def __init__(self, connection: Connection, client: tinker.TrainingClient) -> None:
        """Use `create` or `resume`."""
        self.connection = connection
        self._client = client

    @classmethod
    def create(
        cls, connection: Connection, lora: tinker.LoraConfig, metadata: dict[str, str] | None = None
    ) -> Self:
        """New LoRA weights over the connection's base model; the server keeps `metadata`."""
        if connection.model_path:
            raise ModelError(
                f"{connection.reference!r} is already trained ({connection.model_path}): expected "
                "a base model to train, for example 'pocket' or 'tinker:<base model>'."
            )
        return cls._opened(
            connection,
            connection.service.create_lora_training_client,
            base_model=connection.base_model,
            **lora.model_dump(),
            user_metadata=metadata,
        )

    @classmethod
    def resume(
        cls,
        connection: Connection,
        state: str,
        metadata: dict[str, str] | None = None,
        *,
        optimizer: bool = True,
    ) -> Self:
        """The weights and the optimizer, or a new one, as `save` left them at the path `state`."""
        service = connection.service
        load: Callable[..., Any] = service.create_training_client_from_state
        if optimizer:
            load = service.create_training_client_from_state_with_optimizer
        return cls._opened(connection, load, path=state, user_metadata=metadata)

    @classmethod
    def _opened(cls, connection: Connection, create: Callable[..., Any], **options: Any) -> Self:
        with explained_training(
            connection.reference, f"to open {options.get('path', 'a new student')}"
        ):
            # `.future()`: only on clients does the SDK log a warning inside a running event loop.
            return cls(connection, create(**options).future().result())

    def learn(self, batch: TrainingBatch, update: tinker.AdamParams) -> Submitted[Learned]:
        """Learn one batch; returns at once, so that the next can be queued behind it."""
        with self._explained("to learn a batch"):
            gradient = self._client.forward_backward(list(batch.datums), batch.loss)
            updating = self._client.optim_step(update)

        def result() -> Learned:
            asked = f"a batch of {len(batch.datums)} rows with {batch.loss!r}"
            outputs = self._wait(gradient, asked).loss_fn_outputs
            metrics = self._wait(updating, "a step of the optimizer").metrics or {}
            learned = batch.read(outputs)
            if not math.isfinite(learned.loss):
                raise ModelError(
                    f"{self.connection.reference!r}: the loss became {learned.loss}. Train again "
                    "into another folder with a lower learning rate."
                )
            norms = [value for key, value in metrics.items() if "grad" in key]
            return replace(learned, gradient_norm=norms[0] if norms else None)

        return Submitted(result)

    def logprobs(
        self, batches: Sequence[Sequence[tinker.Datum]]
    ) -> Submitted[list[NDArray[np.float64]]]:
        """Of every target of batches for the cross entropy, in their order, with the weights as
        the steps submitted before leave them; learns nothing.
        """
        asked = "to compute log-probabilities"
        with self._explained(asked):
            pending = [
                (batch, self._client.forward(list(batch), "cross_entropy")) for batch in batches
            ]

        return Submitted(
            lambda: [
                one
                for batch, forward in pending
                for one in target_logprobs(batch, self._wait(forward, asked).loss_fn_outputs)
            ]
        )

    def save(
        self,
        name: str,
        metadata: Mapping[str, str] | None = None,
        *,
        sampler: bool = True,
        ttl_seconds: int | None = None,
    ) -> Submitted[Saved]:
        """Keep the weights as the steps submitted before leave them, with the optimizer for
        resuming and, where `sampler`, for sampling; returns before the server has them.
        """
        kept = dict(metadata or {})
        with self._explained("to save weights"):
            sampled = None
            if sampler:
                sampled = self._client.save_weights_for_sampler(name, ttl_seconds, kept)
                # The SDK (0.38) numbers this request only on its own thread, where a step that
                # is submitted meanwhile could come first: wait for that thread, not the server.
                self._client.holder.run_coroutine_threadsafe(_nothing()).result()
            state = self._client.save_state(name, ttl_seconds, user_metadata=kept)

        def result() -> Saved:
            asked = "to save weights for sampling"
            path = self._wait(sampled, asked).path if sampled else None
            return Saved(name, self._wait(state, "to save weights and optimizer").path, path)

        return Submitted(result)

    def snapshot(self) -> tinker.SamplingClient:
        """Sample with the weights as the steps submitted before leave them; kept for as long as
        the client is. Waits for the server.
        """
        asked = "to sample from the present weights"
        with self._explained(asked):
            opened = self._client.save_weights_and_get_sampling_client()
        client: tinker.SamplingClient = self._wait(opened, asked)
        return client

    def _explained(self, asked: str) -> AbstractContextManager[None]:
        return explained_training(self.connection.reference, asked)

    def _wait(self, request: Any, asked: str) -> Any:
        """The request's result; `ServiceError` where its server ends meanwhile."""
        with self._explained(asked):
            return sdk.wait(request, self.connection.ended)

    def sampler(self, path: str | None) -> TinkerSampler:
        """Sample from the `Saved.sampler` of a checkpoint; None for the base."""
        return TinkerSampler(replace(self.connection, model_path=path))


async def _nothing() -> None:
    """Runs when everything submitted before it has begun."""


@contextmanager
def explained_training(reference: str, asked: str) -> Iterator[None]:
    """Adds to the SDK's errors what only training requests run into, and what was `asked` for."""
    with sdk.all_explained(reference, refused=f"refused {asked}", kept=_KEPT):
        try:
            yield
        except tinker.RequestFailedError as error:
            if _FULL not in str(error):
                raise
            raise OutputError(
                f"{reference!r}: the server's disk is full ({error}). Free some of it, and run "
                "again: it continues from the last checkpoint."
            ) from error


def require_trainable(connection: Connection, settings: TrainSettings) -> int:
    """Check the student, the rank, the context and the objective; the longest row to train on.

    Tinker states which models it trains and their context; what a server doesn't state is not
    checked here, but for the endpoints that training needs. Raises `ModelError` or `SettingsError`.
    """
    if connection.server is None:
        sdk.require_endpoints(connection.rest, connection.reference)
    return require_stated(_stated(connection), connection, settings)


def require_stated(
    stated: Mapping[str, Any], connection: Connection, settings: TrainSettings
) -> int:
    """The same, for what a server has stated about the model."""
    if stated.get("trainable") is False:
        raise ModelError(
            f"{connection.base_model!r} can be sampled on this server, but not trained: choose "
            "another student."
        )
    most = stated.get("max_lora_rank")
    if most is not None and settings.rank > most:
        raise SettingsError(
            f"rank must be at most {most} for {connection.base_model!r}; found {settings.rank}."
        )
    losses = stated.get("loss_fns")
    loss = "importance_sampling" if settings.objective.policy_gradient else "cross_entropy"
    if losses is not None and loss not in losses:
        raise ModelError(
            f"The objective {settings.objective.name!r} needs the loss {loss!r}, which the server "
            f"of {connection.reference!r} doesn't have; it has {sorted(losses)}."
        )
    context = stated.get("max_context_length") or connection.max_context
    if context is not None and settings.max_length is not None and settings.max_length > context:
        raise SettingsError(
            f"max_length must be at most {context}, the context of {connection.base_model!r}; "
            f"found {settings.max_length}."
        )
    return settings.max_length or min(context or _LONGEST, _LONGEST)


def _stated(connection: Connection) -> Mapping[str, Any]:
    with sdk.explained(connection.reference):
        # Not by the SDK's type, which leaves out the limits that a server may state.
        asked = sdk.ask(connection.rest, "GET", "get_server_capabilities")
        found = sdk.optional(asked, sdk.NOT_STATED)
    if found is None:
        return {}
    listed = found.get("supported_models") if isinstance(found, dict) else None
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise ServiceError(
            f"{connection.reference!r}: expected the server to list its models in "
            f"get_server_capabilities; found {str(found)[:200]!r}."
        )
    models = {str(model.get("model_name")): model for model in listed}
    if connection.base_model not in models:
        near = get_close_matches(connection.base_model, list(models), n=3, cutoff=0.3)
        raise ModelError(
            f"{connection.base_model!r} is unknown to the server. Near names: {near}; it has "
            f"{len(models)}."
        )
    stated: Mapping[str, Any] = models[connection.base_model]
    return stated


def read_metadata(connection: Connection, path: str) -> dict[str, str]:
    """What the training state at a `tinker://` path says of itself, by the server alone."""
    run = require_state(path).training_run_id
    with explained(path):
        listed = optional(connection.rest.list_checkpoints(run), _UNLISTED)
    if listed is None:
        raise ModelError(
            f"{path!r} can't be resumed from: its server doesn't say how far it was trained. "
            "Continue in the folder of its training (--out), or start from its weights (--from)."
        )
    saved = listed.checkpoints
    for checkpoint in saved:
        if checkpoint.tinker_path == path:
            return dict(checkpoint.user_metadata or {})
    raise ModelError(
        f"{path!r} is not on the server: expected one of "
        f"{[one.tinker_path for one in saved if one.checkpoint_type == 'training'][:5]}. It may "
        "have expired."
    )


def require_state(path: str) -> tinker.ParsedCheckpointTinkerPath:
    """The parts of a path that training can go on from; raises `ModelError` for any other."""
    expected = "expected tinker://<run>/weights/<name>"
    try:
        parsed = tinker.ParsedCheckpointTinkerPath.from_tinker_path(path)
    except ValueError as error:
        raise ModelError(f"{path!r} names no checkpoint: {expected}.") from error
    if parsed.checkpoint_type != "training":
        raise ModelError(
            f"{path!r} is for sampling and has no optimizer: {expected}, the training state that "
            "was saved with it."
        )
    return parsed


@dataclass(frozen=True)
class Predecessor:
    """Weights at a server's `path`; `folder` is the training that made them, where it is known.

    `adapted` are the settings of their adapter, None where nobody says.
    """

    path: str
    folder: Path | None
    adapted: Mapping[str, Any]

    def settled(self, settings: TrainSettings) -> TrainSettings:
        """The settings with the adapter that the weights have; says where another was asked for."""
        known = {name: one for name, one in self.adapted.items() if one is not None}
        for name, one in known.items():
            if getattr(settings, name) not in (one, getattr(TrainSettings, name)):
                tell(f"{name} is {one}, as the weights to begin with have it.")
        return replace(settings, **known)

    def bring(self, store: Path) -> None:
        """Put the weights where the server of another training finds them, if it is a local one."""
        if self.folder is not None:
            adopt_state(self.path, self.folder / "checkpoints", store)

    @property
    def learned(self) -> RowKeys:
        """The rows that it was trained on; raises `DatasetError` where nobody wrote them down."""
        file = self.folder / LEARNED if self.folder else None
        if file is None or not file.is_file():
            raise DatasetError(
                f"Nothing says which rows {str(self.folder or self.path)!r} has learned: expected "
                f"a training folder with {LEARNED}. Leave out --only-new to train on all rows."
            )
        keys: RowKeys = np.load(file)
        return keys


def choose_student(source: DatasetSource, start: str | Path | None = None) -> str:
    """The student where none is named: that of `start`, or the model of the release's teacher.

    Raises `ModelError` where that can't be trained.
    """
    if start is None:
        return default_student(source.manifest.get("teacher"))
    if base := base_of(str(start)):
        return base
    raise ModelError(_NO_STUDENT.format(str(start)))


def find_predecessor(
    start: str | Path, student: str, *, renderer: str | None = None
) -> Predecessor:
    """A training folder's best checkpoint, or the state at tinker://<run>/weights/<name>.

    Raises `ModelError` for weights of another base model than the student's, and for a path that
    is no training state.
    """
    path = str(start)
    if (folder := find_training(start)) is not None:
        config, checkpoint = read_training(folder)
        there, here = config["student"], student
        adapted = {name: config["settings"].get(name) for name in _ADAPTED}
        found = Predecessor(checkpoint["state"], folder, adapted)
    elif path.startswith("tinker://"):
        require_state(path)
        connection = connect(student, renderer=renderer)
        with explained(path):
            asked = connection.rest.get_weights_info_by_tinker_path(path)
            info = optional(asked, f"{_UNKNOWN_BASE}: {student!r} is trusted to be it")
        there, here = info.base_model if info else connection.base_model, connection.base_model
        found = Predecessor(path, None, {"rank": info.lora_rank if info else None})
    else:
        raise ModelError(_NO_STUDENT.format(path))
    if there != here:
        raise ModelError(
            f"{path!r} was trained from {there!r}, not from {here!r}: name that model as the "
            "student."
        )
    return found

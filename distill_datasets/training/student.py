"""The model that is taught: it learns a batch, saves, loads, and becomes a sampler."""

import errno
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import tinker

from distill_datasets.errors import ModelError, OutputError
from distill_datasets.models import tinker_sdk as sdk
from distill_datasets.models.connection import Connection
from distill_datasets.models.tinker import TinkerSampler
from distill_datasets.training.batches import (
    Batch,
    Example,
    Learned,
    Scored,
    Update,
    datums,
    scored,
)

_FULL = os.strerror(errno.ENOSPC)
_KEPT = "What was saved is kept: run it again with the same output folder to continue."


@dataclass(frozen=True)
class Adapted:
    """What the LoRA weights adapt, and how: `seed` decides their first values."""

    rank: int = 32
    seed: int = 0
    attention: bool = True
    mlp: bool = True
    unembed: bool = True


@dataclass(frozen=True)
class Saved:
    """The two paths of a checkpoint: what training resumes from, and what can be sampled."""

    state: str
    sampler: str | None


class PendingStep:
    """A batch on its way to the server."""

    def __init__(self, student: "Student", batch: Batch, learning: tuple[Any, Any]) -> None:
        """Made by `Student.learn`."""
        self._student, self._batch = student, batch
        self._gradient, self._update = learning

    def result(self) -> Learned:
        """Wait until the server has learned it."""
        with _explained(self._student.connection.reference):
            outputs = self._student.wait(self._gradient).loss_fn_outputs
            metrics = self._student.wait(self._update).metrics or {}
        learned = self._batch.read(outputs)
        if not math.isfinite(learned.loss):
            raise ModelError(
                f"{self._student.connection.reference!r}: the loss became {learned.loss}. Train "
                "again into another folder with a lower learning rate."
            )
        norms = [value for key, value in metrics.items() if "grad" in key]
        return replace(learned, gradient_norm=norms[0] if norms else None)


class PendingLoss:
    """Batches whose loss is being computed."""

    def __init__(
        self, student: "Student", batches: Sequence[tuple[Sequence[Example], Any]]
    ) -> None:
        """Made by `Student.loss`."""
        self._student, self._batches = student, batches

    def rows(self) -> list[Scored]:
        """Wait for all of them: each row's score, in their order."""
        with _explained(self._student.connection.reference):
            return [
                row
                for examples, future in self._batches
                for row in scored(examples, self._student.wait(future).loss_fn_outputs)
            ]

    def result(self) -> float:
        """Wait for all of them: the loss per response token."""
        rows = self.rows()
        return sum(row.nll for row in rows) / sum(row.tokens for row in rows)


class PendingSave:
    """Weights that are being saved."""

    def __init__(self, student: "Student", state: Any, sampler: Any) -> None:
        """Made by `Student.save`."""
        self._student, self._state, self._sampler = student, state, sampler

    def result(self) -> Saved:
        """Wait until the server has confirmed all of it."""
        with _explained(self._student.connection.reference):
            sampler = self._student.wait(self._sampler).path if self._sampler else None
            return Saved(self._student.wait(self._state).path, sampler)


class Student:
    """LoRA weights on a server. Requests run there in the order in which they are made here.

    Every method may raise `ModelError`, `AccessError` or `ServiceError`.
    """

    def __init__(self, connection: Connection, client: tinker.TrainingClient) -> None:
        """Use `create`, `resume` or `continue_from`."""
        self.connection = connection
        self._client = client

    @classmethod
    def create(
        cls, connection: Connection, adapted: Adapted, metadata: dict[str, str] | None = None
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
            rank=adapted.rank,
            seed=adapted.seed,
            train_mlp=adapted.mlp,
            train_attn=adapted.attention,
            train_unembed=adapted.unembed,
            user_metadata=metadata,
        )

    @classmethod
    def resume(
        cls, connection: Connection, state: str, metadata: dict[str, str] | None = None
    ) -> Self:
        """The weights and the optimizer as `save` left them at the path `state`."""
        load = connection.service.create_training_client_from_state_with_optimizer
        return cls._opened(connection, load, path=state, user_metadata=metadata)

    @classmethod
    def continue_from(
        cls, connection: Connection, state: str, metadata: dict[str, str] | None = None
    ) -> Self:
        """The weights at the path `state`, with a new optimizer."""
        load = connection.service.create_training_client_from_state
        return cls._opened(connection, load, path=state, user_metadata=metadata)

    @classmethod
    def _opened(cls, connection: Connection, create: Callable[..., Any], **options: Any) -> Self:
        with _explained(connection.reference):
            # `.future()`: only on clients does the SDK log a warning inside a running event loop.
            return cls(connection, create(**options).future().result())

    def learn(self, batch: Batch, update: Update) -> PendingStep:
        """Learn one batch; returns at once, so that the next can be queued behind it."""
        with _explained(self.connection.reference):
            gradient = self._client.forward_backward(list(batch.datums), batch.loss)
            updating = self._client.optim_step(
                tinker.AdamParams(
                    learning_rate=update.learning_rate,
                    beta1=0.9,
                    beta2=0.95,
                    eps=1e-8,
                    weight_decay=update.weight_decay,
                    grad_clip_norm=update.grad_clip,
                )
            )
        return PendingStep(self, batch, (gradient, updating))

    def loss(self, batches: Sequence[Sequence[Example]]) -> PendingLoss:
        """The loss with the weights as the steps submitted before leave them; learns nothing."""
        with _explained(self.connection.reference):
            pending = [
                (examples, self._client.forward(datums(examples, "token"), "cross_entropy"))
                for examples in batches
            ]
        return PendingLoss(self, pending)

    def save(
        self,
        name: str,
        metadata: Mapping[str, str] | None = None,
        *,
        sampler: bool = True,
        ttl_seconds: int | None = None,
    ) -> PendingSave:
        """Keep the weights as the steps submitted before leave them, with the optimizer for
        resuming and, where `sampler`, for sampling; returns before the server has them.
        """
        kept = dict(metadata or {})
        with _explained(self.connection.reference):
            sampled = None
            if sampler:
                sampled = self._client.save_weights_for_sampler(name, ttl_seconds, kept)
                # The SDK (0.38) numbers this request only on its own thread, where a step that
                # is submitted meanwhile could come first: wait for that thread, not the server.
                self._client.holder.run_coroutine_threadsafe(_nothing()).result()
            state = self._client.save_state(name, ttl_seconds, user_metadata=kept)
        return PendingSave(self, state, sampled)

    def snapshot(self) -> tinker.SamplingClient:
        """Sample with the weights as the steps submitted before leave them; kept for as long as
        the client is. Waits for the server.
        """
        with _explained(self.connection.reference):
            opened = self._client.save_weights_and_get_sampling_client()
            client: tinker.SamplingClient = self.wait(opened)
            return client

    def wait(self, request: Any) -> Any:
        """The request's result; `ServiceError` where its server ends meanwhile."""
        return sdk.wait(request, self.connection.ended)

    def sampler(self, path: str) -> TinkerSampler:
        """Sample from the `Saved.sampler` of a checkpoint."""
        return TinkerSampler(replace(self.connection, model_path=path))


async def _nothing() -> None:
    """Runs when everything submitted before it has begun."""


@contextmanager
def _explained(reference: str) -> Iterator[None]:
    """Adds to the SDK's errors what only training requests run into."""
    with sdk.all_explained(reference, refused="refused", kept=_KEPT):
        try:
            yield
        except tinker.RequestFailedError as error:
            if _FULL not in str(error):
                raise
            raise OutputError(
                f"{reference!r}: the server's disk is full ({error}). Free some of it, and run "
                "again: it continues from the last checkpoint."
            ) from error

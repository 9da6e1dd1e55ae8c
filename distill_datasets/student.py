"""The model that is taught: it learns a batch, saves, loads, and becomes a sampler."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import tinker
from numpy.typing import NDArray

from distill_datasets.connection import Connection, ended, explained
from distill_datasets.errors import ModelError, ServiceError
from distill_datasets.samplers.tinker import TinkerSampler

Normalization = Literal["token", "example"]
_GLANCE = 2.0  # seconds between looks at whether the server still runs
_LOSS: Literal["cross_entropy"] = "cross_entropy"


@dataclass(frozen=True)
class Example:
    """A rendered conversation; a token is learned as much as its weight says, 0 not at all."""

    tokens: Sequence[int]
    weights: Sequence[float]

    @property
    def targets(self) -> NDArray[np.float32]:
        """The weights of the tokens that are predicted: all but the first."""
        return np.asarray(self.weights[1:], dtype=np.float32)


@dataclass(frozen=True)
class Learned:
    """One step: the loss per response token before its update, and what it took.

    `tokens` counts whole conversations, as servers bill them.
    """

    loss: float
    response_tokens: int
    tokens: int
    gradient_norm: float | None


@dataclass(frozen=True)
class Saved:
    """The two paths of a checkpoint: what training resumes from, and what can be sampled."""

    state: str
    sampler: str


class PendingStep:
    """A batch on its way to the server."""

    def __init__(self, student: "Student", examples: Sequence[Example], learning: Any) -> None:
        """Made by `Student.submit`."""
        self._student, self._examples = student, examples
        self._gradient, self._update = learning

    def result(self) -> Learned:
        """Wait until the server has learned it."""
        with _explained(self._student.connection.reference):
            outputs = self._student.wait(self._gradient).loss_fn_outputs
            metrics = self._student.wait(self._update).metrics or {}
        loss, response_tokens = _loss(self._examples, outputs)
        if not math.isfinite(loss):
            raise ModelError(
                f"{self._student.connection.reference!r}: the loss became {loss}. Train again into "
                "another folder with a lower learning rate."
            )
        norms = [value for key, value in metrics.items() if "grad" in key]
        return Learned(
            loss=loss / response_tokens,
            response_tokens=round(response_tokens),
            tokens=sum(len(example.tokens) for example in self._examples),
            gradient_norm=norms[0] if norms else None,
        )


class PendingLoss:
    """Batches whose loss is being computed."""

    def __init__(
        self, student: "Student", batches: Sequence[tuple[Sequence[Example], Any]]
    ) -> None:
        """Made by `Student.loss`."""
        self._student, self._batches = student, batches

    def result(self) -> float:
        """Wait for all of them: the loss per response token."""
        with _explained(self._student.connection.reference):
            parts = [
                _loss(examples, self._student.wait(future).loss_fn_outputs)
                for examples, future in self._batches
            ]
        return sum(loss for loss, _ in parts) / sum(tokens for _, tokens in parts)


class Student:
    """LoRA weights on a server. Requests run there in the order in which they are made here.

    Every method may raise `ModelError`, `AccessError` or `ServiceError`.
    """

    def __init__(self, connection: Connection, client: tinker.TrainingClient) -> None:
        """Use `create` or `resume`."""
        self.connection = connection
        self._client = client

    @classmethod
    def create(cls, connection: Connection, *, rank: int, seed: int) -> Self:
        """New LoRA weights over the connection's base model."""
        if connection.model_path:
            raise ModelError(
                f"{connection.reference!r} is already trained ({connection.model_path}): expected "
                "a base model to train, for example 'pocket' or 'tinker:<base model>'."
            )
        with _explained(connection.reference):
            opened = connection.service.create_lora_training_client(
                base_model=connection.base_model, rank=rank, seed=seed
            )
            # `.future()`: only on clients does the SDK log a warning inside a running event loop.
            return cls(connection, opened.future().result())

    @classmethod
    def resume(cls, connection: Connection, state: str) -> Self:
        """The weights and the optimizer as `save` left them at the path `state`."""
        with _explained(connection.reference):
            opened = connection.service.create_training_client_from_state_with_optimizer(state)
            # `.future()`: only on clients does the SDK log a warning inside a running event loop.
            return cls(connection, opened.future().result())

    def submit(
        self, examples: Sequence[Example], learning_rate: float, normalization: Normalization
    ) -> PendingStep:
        """Learn one batch; returns at once, so that the next can be queued behind it."""
        with _explained(self.connection.reference):
            gradient = self._client.forward_backward(_datums(examples, normalization), _LOSS)
            update = self._client.optim_step(
                tinker.AdamParams(learning_rate=learning_rate, beta1=0.9, beta2=0.95, eps=1e-8)
            )
        return PendingStep(self, examples, (gradient, update))

    def loss(self, batches: Sequence[Sequence[Example]]) -> PendingLoss:
        """The loss with the weights as the steps submitted before leave them; learns nothing."""
        with _explained(self.connection.reference):
            pending = [
                (examples, self._client.forward(_datums(examples, "token"), _LOSS))
                for examples in batches
            ]
        return PendingLoss(self, pending)

    def save(self, name: str, metadata: dict[str, str] | None = None) -> Saved:
        """Keep the weights for sampling, and with the optimizer for resuming.

        Waits for both: the SDK (0.38) numbers a sampler save on its own thread, so that a step
        submitted meanwhile could get before it.
        """
        with _explained(self.connection.reference):
            sampler = self.wait(self._client.save_weights_for_sampler(name))
            state = self.wait(self._client.save_state(name, user_metadata=metadata))
        return Saved(state.path, sampler.path)

    def wait(self, request: Any) -> Any:
        """The request's result. The SDK tries a dead address again for five minutes; a server of
        this machine that has ended is noticed within seconds.
        """
        result = request.future()
        while True:
            with suppress(FutureTimeout):
                return result.result(_GLANCE)
            if result.done():
                return result.result()
            if error := ended(self.connection):
                raise error

    def sampler(self, path: str) -> TinkerSampler:
        """Sample from the `Saved.sampler` of a checkpoint."""
        return TinkerSampler(replace(self.connection, model_path=path))


def _datums(examples: Sequence[Example], normalization: Normalization) -> list[tinker.Datum]:
    """The server sums weighted losses, so the weights carry the mean.

    Per token, every response token of the batch counts alike; per example, every response does.
    """
    masks = [example.targets for example in examples]
    sums = [float(mask.sum()) for mask in masks]
    shares = [sum(sums) if normalization == "token" else len(sums) * own for own in sums]
    return [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(list(example.tokens[:-1])),
            loss_fn_inputs={
                "target_tokens": tinker.TensorData.from_numpy(
                    np.asarray(example.tokens[1:], np.int64)
                ),
                "weights": tinker.TensorData.from_numpy((mask / share).astype(np.float32)),
            },
        )
        for example, mask, share in zip(examples, masks, shares, strict=True)
    ]


def _loss(examples: Sequence[Example], outputs: Sequence[Any]) -> tuple[float, float]:
    """Summed over the response tokens, and how many they are."""
    loss = tokens = 0.0
    for example, output in zip(examples, outputs, strict=True):
        mask = example.targets
        logprobs = np.asarray(output["logprobs"].to_numpy(), dtype=np.float64)
        loss -= float(logprobs[mask > 0] @ mask[mask > 0])
        tokens += float(mask.sum())
    return loss, tokens


@contextmanager
def _explained(reference: str) -> Iterator[None]:
    """Adds to the sampler's explanations what only training requests run into."""
    try:
        with explained(reference):
            yield
    except tinker.RequestFailedError as error:
        raise ModelError(f"{reference!r}: the server refused: {error}") from error
    except (tinker.APIConnectionError, tinker.InternalServerError) as error:
        raise ServiceError(
            f"{reference!r}: the server is gone ({error}). What was saved is kept: run it again "
            "with the same output folder to continue."
        ) from error
    except tinker.APIStatusError as error:
        raise ModelError(f"{reference!r}: the server refused: {error}") from error

"""What one step sends to the server, and how its answer is read."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import tinker
from numpy.typing import NDArray

Normalization = Literal["token", "example"]
LossName = Literal["cross_entropy", "importance_sampling"]


@dataclass(frozen=True)
class Example:
    """A rendered conversation; a token is learned as much as its weight says, 0 not at all.

    `bytes` is the length of its response in UTF-8, which no tokenizer changes.
    """

    tokens: Sequence[int]
    weights: Sequence[float]
    bytes: int = 0

    @property
    def targets(self) -> NDArray[np.float32]:
        """The weights of the tokens that are predicted: all but the first."""
        return np.asarray(self.weights[1:], dtype=np.float32)


@dataclass(frozen=True)
class Update:
    """How the weights follow the gradient: Adam's settings, 0 for none of a thing."""

    learning_rate: float
    weight_decay: float = 0.0
    grad_clip: float = 0.0


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
class Batch:
    """Rows for one step: the datums, the server's loss for them, and a reader of its outputs.

    `read` gets the `loss_fn_outputs`, one mapping a datum, in their order.
    """

    datums: Sequence[tinker.Datum]
    read: Callable[[Sequence[Mapping[str, Any]]], Learned]
    loss: LossName = "cross_entropy"


def supervised_batch(examples: Sequence[Example], normalization: Normalization) -> Batch:
    """The cross entropy of the responses, each token or each response weighing alike."""

    def read(outputs: Sequence[Mapping[str, Any]]) -> Learned:
        rows = scored(examples, outputs)
        tokens = sum(row.tokens for row in rows)
        nll = sum(row.nll for row in rows) / tokens
        return Learned(
            loss=nll,
            nll=nll,
            response_tokens=round(tokens),
            response_bytes=sum(example.bytes for example in examples),
            tokens=sum(len(example.tokens) for example in examples),
        )

    return Batch(datums(examples, normalization), read)


def shares(masks: Sequence[NDArray[np.float32]], normalization: Normalization) -> list[float]:
    """What each row's weights are divided by, as servers sum weighted losses over a batch.

    Per token, every response token of the batch counts alike; per example, every response does.
    """
    sums = [float(mask.sum()) for mask in masks]
    return [sum(sums) if normalization == "token" else len(sums) * own for own in sums]


def datums(examples: Sequence[Example], normalization: Normalization) -> list[tinker.Datum]:
    """As the server wants them: the weights carry the mean."""
    masks = [example.targets for example in examples]
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
        for example, mask, share in zip(examples, masks, shares(masks, normalization), strict=True)
    ]


@dataclass(frozen=True)
class Scored:
    """One row's response: its negative log likelihood in nats, and the tokens in it."""

    nll: float
    tokens: float


def scored(examples: Sequence[Example], outputs: Sequence[Mapping[str, Any]]) -> list[Scored]:
    """The responses' scores, from the server's log-probabilities of every token."""
    rows = []
    for example, output in zip(examples, outputs, strict=True):
        mask = example.targets
        logprobs = np.asarray(output["logprobs"].to_numpy(), dtype=np.float64)
        rows.append(Scored(-float(logprobs[mask > 0] @ mask[mask > 0]), float(mask.sum())))
    return rows


def bits_per_byte(nll: float | None, tokens: float, size: int) -> float | None:
    """From nats per token; None where nothing was scored or no bytes are known."""
    return nll * tokens / math.log(2) / size if nll is not None and size else None

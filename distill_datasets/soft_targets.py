"""A teacher's probabilities as something to learn: softened, mixed with what it said, as targets.

Hinton et al. (2015) soften both sides and multiply the loss by the temperature squared, to make up
for the student's softer gradient. The servers' cross-entropy has no temperature of its own, so
only the teacher's side is softened here, and there is nothing to make up for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SoftLabels:
    """What a teacher thinks at each of the N places of a response, the stop token's included.

    `tokens` (N) is the response itself, `ids` and `logprobs` (N, K) the likeliest tokens in its
    places; a place with fewer ends with logarithms of minus infinity. Log-probabilities are kept
    as float16, which moves a distribution by less than its entropy / 2048. `kept` is how much of
    the teacher's probability the K tokens had, the mean over the places.
    """

    tokens: NDArray[np.int32]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float16]
    kept: float

    @classmethod
    def of(
        cls,
        tokens: Sequence[int] | NDArray[np.int32],
        ids: NDArray[np.integer],
        logprobs: NDArray[np.floating],
    ) -> "SoftLabels":
        """From arrays of any precision."""
        return cls(
            np.asarray(tokens, np.int32),
            np.asarray(ids, np.int32),
            np.asarray(logprobs, np.float16),
            float(np.exp(np.asarray(logprobs, np.float64)).sum(axis=1).mean()),
        )


@dataclass(frozen=True)
class SoftExample:
    """A prompt that the student sees, and what the teacher thinks of each place of the answer.

    `bytes` is the length of the answer in UTF-8.
    """

    prompt: Sequence[int]
    labels: SoftLabels
    bytes: int = 0

    @property
    def tokens(self) -> list[int]:
        """The whole conversation."""
        return [*self.prompt, *self.labels.tokens.tolist()]


@dataclass(frozen=True)
class Targets:
    """(N, K) tokens and how much each is learned; a place that isn't learned weighs nothing."""

    tokens: NDArray[np.int64]
    weights: NDArray[np.float32]


def soften(logprobs: NDArray[np.floating], temperature: float) -> NDArray[np.float64]:
    """Probabilities that add up to 1 over the K tokens; the tail beyond them is shared out."""
    scaled = np.asarray(logprobs, np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), np.float64)


def soft_targets(labels: SoftLabels, *, temperature: float, alpha: float) -> Targets:
    """What is learned at each place of a response; the weights of a place add up to 1.

    The first column is the response's own token, whatever it weighs, so that its loss is always
    known; `alpha` is the share of these hard labels. The others are the teacher's likeliest.
    """
    soft = (1 - alpha) * soften(labels.logprobs, temperature)
    own = labels.tokens[:, None]
    elsewhere = np.isfinite(labels.logprobs) & (labels.ids != own)
    first = alpha + np.where(elsewhere, 0, soft).sum(axis=1, keepdims=True)
    return Targets(
        np.concatenate([own, np.where(elsewhere, labels.ids, own)], axis=1).astype(np.int64),
        np.concatenate([first, np.where(elsewhere, soft, 0)], axis=1).astype(np.float32),
    )


def placed(targets: Targets, prompt: int, width: int) -> Targets:
    """The targets behind a prompt of so many tokens, as wide as the batch's widest.

    A model predicts the token after each of its inputs: the first place of a response is
    predicted by the prompt's last token, so all but that one of the prompt's tokens are skipped.
    """
    length, columns = targets.tokens.shape
    tokens = np.zeros((prompt - 1 + length, width), np.int64)
    weights = np.zeros((prompt - 1 + length, width), np.float32)
    tokens[prompt - 1 :, :columns] = targets.tokens
    weights[prompt - 1 :, :columns] = targets.weights
    return Targets(tokens, weights)

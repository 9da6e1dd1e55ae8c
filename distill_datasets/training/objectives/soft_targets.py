"""A teacher's probabilities as something to learn: softened, mixed with what it said, as targets.

Hinton et al. (2015) soften both sides and multiply the loss by the temperature squared, to make up
for the student's softer gradient. The servers' cross-entropy has no temperature of its own, so
only the teacher's side is softened here, and there is nothing to make up for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill_datasets.models.scoring import SoftLabels

_LEAST = float(np.log(np.finfo(np.float32).tiny))  # no server's probability is smaller, but for 0


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


def reverse_targets(
    tokens: Sequence[int],
    ids: NDArray[np.integer],
    student: NDArray[np.floating],
    teacher: NDArray[np.floating],
) -> Targets:
    """Targets whose cross-entropy has the gradient of the reverse KL over the tokens `ids` (N, K).

    `student` and `teacher` (N, K) are log-probabilities, the student's those of now. A token weighs
    p (a - Σ p a / Σ p), where p is how likely the student finds it and a by how much likelier the
    teacher does: the weights of a place add up to 0. The first column is the response's own token,
    which weighs nothing.
    """
    p, gain = np.exp(np.asarray(student, np.float64)), _gain(student, teacher)
    mean = (p * gain).sum(axis=1, keepdims=True) / p.sum(axis=1, keepdims=True)
    own = np.asarray(tokens, np.int64)[:, None]
    weights = np.concatenate([np.zeros_like(p[:, :1]), p * (gain - mean)], axis=1)
    others = np.where(np.isfinite(student), ids, own)
    return Targets(np.concatenate([own, others], axis=1), weights.astype(np.float32))


def reverse_kl(student: NDArray[np.floating], teacher: NDArray[np.floating]) -> NDArray[np.float64]:
    """Nats at each of N places by which the student leaves the teacher, over the tokens (N, K)."""
    p = np.exp(np.asarray(student, np.float64))
    return np.asarray(-(p * _gain(student, teacher)).sum(axis=1) / p.sum(axis=1), np.float64)


def _gain(student: NDArray[np.floating], teacher: NDArray[np.floating]) -> NDArray[np.float64]:
    """Places with fewer tokens than others end with minus infinity on the student's side."""
    likely = np.isfinite(student)
    ours = np.where(likely, student, 0.0).astype(np.float64)
    return np.where(likely, np.maximum(teacher, _LEAST) - ours, 0.0)


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

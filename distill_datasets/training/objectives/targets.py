"""Distributions over tokens as training targets: arithmetic, and batches for the server.

The server's cross-entropy takes (N, K) targets with weights: at each of N places, K tokens and how
much each is learned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill_datasets.models.scoring import SoftLabels
from distill_datasets.training.student import (
    Learned,
    Normalization,
    TrainingBatch,
    datum,
    shares,
)

LEAST = float(np.log(np.finfo(np.float32).tiny))  # no server's probability is smaller, but for 0
_LEAST_REST = 1e-6  # of float32 probabilities that add up to 1


@dataclass(frozen=True)
class SoftExample:
    """A prompt that the student sees, and the teacher's distributions over the response's tokens.

    `bytes` is the length of the response in UTF-8.
    """

    prompt: Sequence[int]
    labels: SoftLabels
    bytes: int = 0

    @property
    def tokens(self) -> list[int]:
        """The whole conversation."""
        return [*self.prompt, *self.labels.tokens.tolist()]


@dataclass(frozen=True)
class SoftTargets:
    """(N, K) tokens and how much each is learned; a place that isn't learned weighs nothing."""

    tokens: NDArray[np.int64]
    weights: NDArray[np.float32]


def normalised(logprobs: NDArray[np.floating]) -> NDArray[np.float64]:
    """Probabilities that add up to 1 over the K tokens; the tail beyond them is shared out."""
    exact = np.asarray(logprobs, np.float64)
    powers = np.exp(exact - exact.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), np.float64)


def soft_targets(labels: SoftLabels, *, alpha: float) -> SoftTargets:
    """What is learned at each place of a response; the weights of a place add up to 1.

    The first column is the response's own token, whatever it weighs, so that its loss is always
    known; `alpha` is the share of these hard labels. The others are the teacher's likeliest.
    """
    soft = (1 - alpha) * normalised(labels.logprobs)
    own = labels.tokens[:, None]
    elsewhere = np.isfinite(labels.logprobs) & (labels.ids != own)
    first = alpha + np.where(elsewhere, 0, soft).sum(axis=1, keepdims=True)
    return SoftTargets(
        np.concatenate([own, np.where(elsewhere, labels.ids, own)], axis=1).astype(np.int64),
        np.concatenate([first, np.where(elsewhere, soft, 0)], axis=1).astype(np.float32),
    )


def reverse_targets(
    tokens: Sequence[int],
    ids: NDArray[np.integer],
    student: NDArray[np.floating],
    teacher: NDArray[np.floating],
    meant: NDArray[np.integer] | None = None,
) -> SoftTargets:
    """Targets whose cross-entropy has the exact gradient of `reverse_kl`.

    `student` and `teacher` (N, K) are log-probabilities of the tokens `ids`, the student's from its
    current weights. A token weighs p (a - r), where p is how likely the student finds it, and a and
    r by how much likelier the teacher finds it and all other tokens together: as p of the rest is
    what the K leave, its gradient is theirs. The first column is the response's own token, which
    weighs nothing.

    Where a token is not `meant` (N, K) but another, what the teacher gives it is taken from it and
    learned for the other, as a hard label is.
    """
    p, gain, rest = _shares(student, teacher)
    own = np.asarray(tokens, np.int64)[:, None]
    weights = np.concatenate([np.zeros_like(p[:, :1]), p * (gain - rest.gain)], axis=1)
    others = np.where(np.isfinite(student), ids, own)
    found = np.concatenate([own, others], axis=1)
    if meant is not None and (moved := np.isfinite(student) & (meant != ids)).any():
        mass = np.where(moved, np.exp(teacher), 0.0)
        weights[:, 1:] -= mass
        found = np.concatenate([found, np.where(moved, meant, own)], axis=1)
        weights = np.concatenate([weights, mass], axis=1)
    return SoftTargets(found, weights.astype(np.float32))


def reverse_kl(student: NDArray[np.floating], teacher: NDArray[np.floating]) -> NDArray[np.float64]:
    """Nats at each of N places by which the student leaves the teacher, never less than 0.

    Over the tokens (N, K), and all others as one token more.
    """
    p, gain, rest = _shares(student, teacher)
    # p - p exp(a) adds up to 0 over both whole distributions; with it no term is below 0.
    terms = [one * (np.expm1(a) - a) for one, a in ((p, gain), (rest.p, rest.gain))]
    return np.asarray(sum(term.sum(axis=1) for term in terms), np.float64)


class _Others(NamedTuple):
    """All other tokens as one (N, 1): how likely, and by how much likelier to the teacher."""

    p: NDArray[np.float64]
    gain: NDArray[np.float64]


def _shares(
    student: NDArray[np.floating], teacher: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64], _Others]:
    """The student's probabilities of tokens (N, K), by how much likelier the teacher finds them in
    nats, and the rest. Places with fewer tokens end with minus infinity on the student's side.

    What float32 can't tell from a rest of 0 counts as the least rest: as the gradient there falls
    with the rest itself, that moves it by nothing.
    """
    likely = np.isfinite(student)
    ours = np.where(likely, student, 0.0).astype(np.float64)
    theirs = np.where(likely, np.maximum(teacher, LEAST), -np.inf).astype(np.float64)
    p = np.where(likely, np.exp(ours), 0.0)
    left, taught = (
        np.maximum(1 - one.sum(axis=1, keepdims=True), _LEAST_REST) for one in (p, np.exp(theirs))
    )
    gain = np.where(likely, theirs - ours, 0.0)
    return p, gain, _Others(left, np.log(taught) - np.log(left))


def soft_batch(
    examples: Sequence[SoftExample], targets: Sequence[SoftTargets], normalization: Normalization
) -> TrainingBatch:
    """One datum an example; `extra` says how far the student is from the targets.

    The loss is the cross-entropy with the targets in nats per response token, `kl` what of it the
    student can still learn, `kept` the share of the teacher's probability that they hold.
    """
    width = max(target.tokens.shape[1] for target in targets)
    wide = [
        after_prompt(target, len(example.prompt), width)
        for example, target in zip(examples, targets, strict=True)
    ]
    sizes = shares([np.ones(len(target.tokens), np.float32) for target in targets], normalization)
    datums = [
        datum(one.tokens, target_tokens=target.tokens, weights=target.weights / size)
        for one, target, size in zip(examples, wide, sizes, strict=True)
    ]

    def read(outputs: Sequence[Mapping[str, Any]]) -> Learned:
        logprobs = [
            np.asarray(output["logprobs"].to_numpy(), np.float64).reshape(target.tokens.shape)
            for output, target in zip(outputs, wide, strict=True)
        ]
        return _learned(examples, wide, logprobs)

    return TrainingBatch(datums, read)


def after_prompt(targets: SoftTargets, prompt: int, width: int) -> SoftTargets:
    """The targets after a prompt of `prompt` tokens, in rows of `width` columns.

    A model predicts the token after each of its inputs: the first place of a response is
    predicted by the prompt's last token, so all but that one of the prompt's tokens are skipped.
    """
    length, columns = targets.tokens.shape
    tokens = np.zeros((prompt - 1 + length, width), np.int64)
    weights = np.zeros((prompt - 1 + length, width), np.float32)
    tokens[prompt - 1 :, :columns] = targets.tokens
    weights[prompt - 1 :, :columns] = targets.weights
    return SoftTargets(tokens, weights)


def _learned(
    examples: Sequence[SoftExample], targets: Sequence[SoftTargets], logprobs: Sequence[Any]
) -> Learned:
    count = sum(len(example.labels.tokens) for example in examples)
    loss = entropy = nll = 0.0
    for example, target, found in zip(examples, targets, logprobs, strict=True):
        weights = target.weights.astype(np.float64)
        learned = weights > 0
        loss -= float(weights[learned] @ found[learned])
        entropy -= float(weights[learned] @ np.log(weights[learned]))
        nll -= float(found[len(example.prompt) - 1 :, 0].sum())
    kept = sum(example.labels.kept * len(example.labels.tokens) for example in examples)
    return Learned(
        loss=loss / count,
        nll=nll / count,
        response_tokens=count,
        response_bytes=sum(example.bytes for example in examples),
        tokens=sum(len(example.tokens) for example in examples),
        extra={"kl": (loss - entropy) / count, "kept": kept / count},
    )

"""Soft labels as batches: (N, K) targets under the server's cross-entropy."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tinker

from distill_datasets.training.batches import Batch, Learned, Normalization, shares
from distill_datasets.training.objectives.producers import Lesson
from distill_datasets.training.objectives.soft_labels import get_soft_labels
from distill_datasets.training.objectives.soft_targets import (
    SoftExample,
    Targets,
    placed,
    soft_targets,
)
from distill_datasets.training.schedule import Step
from distill_datasets.training.student import PendingStep


class SoftProducer:
    """The teacher's probabilities, got for all rows before the first step, and kept on disk."""

    def __init__(self, lesson: Lesson) -> None:
        """Scores what is not stored yet; raises `DatasetError` or `ModelError` where it can't."""
        self._lesson = lesson
        self._labelled = get_soft_labels(lesson)

    def prepare(self, step: Step) -> None:
        """Nothing to start."""

    def submit(self, step: Step) -> PendingStep:
        """Learn the step's rows."""
        settings = self._lesson.settings
        examples = self._labelled.examples(step.places)
        targets = [
            soft_targets(
                example.labels,
                temperature=settings.objective.temperature,
                alpha=settings.objective.alpha,
            )
            for example in examples
        ]
        batch = soft_batch(examples, targets, settings.normalization)
        return self._lesson.student.learn(batch, self._lesson.update(step))

    def close(self) -> None:
        """Release the file of the labels."""
        self._labelled.close()


def soft_batch(
    examples: Sequence[SoftExample], targets: Sequence[Targets], normalization: Normalization
) -> Batch:
    """One datum an example; `extra` says how far the student is from the targets.

    The loss is the cross-entropy with the targets in nats per response token, `kl` what of it the
    student can still learn, `kept` the share of the teacher's probability that they hold.
    """
    width = max(target.tokens.shape[1] for target in targets)
    wide = [
        placed(target, len(example.prompt), width)
        for example, target in zip(examples, targets, strict=True)
    ]
    sizes = shares([np.ones(len(target.tokens), np.float32) for target in targets], normalization)
    datums = [
        _datum(example, target, size)
        for example, target, size in zip(examples, wide, sizes, strict=True)
    ]

    def read(outputs: Sequence[Mapping[str, Any]]) -> Learned:
        logprobs = [
            np.asarray(output["logprobs"].to_numpy(), np.float64).reshape(target.tokens.shape)
            for output, target in zip(outputs, wide, strict=True)
        ]
        return _learned(examples, wide, logprobs)

    return Batch(datums, read)


def _datum(example: SoftExample, targets: Targets, size: float) -> tinker.Datum:
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(example.tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData.from_numpy(targets.tokens),
            "weights": tinker.TensorData.from_numpy((targets.weights / size).astype(np.float32)),
        },
    )


def _learned(
    examples: Sequence[SoftExample], targets: Sequence[Targets], logprobs: Sequence[Any]
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

"""What a training step learns: responses, the teacher's probabilities, or its corrections.

The training loop knows the steps; an objective knows what to learn in one:

    objective.prepare(step)   # for the first step, and for each while the one before is learned
    objective.submit(step)    # -> Submitted, whose result() is a Learned

Both come in the order of the steps, on the loop's thread, and avoid waiting for the server, since
several steps are queued there. `submit` builds a `TrainingBatch` (datums, the server's loss for
them, a reader of its outputs) and hands it to `Student.learn`. Where a step needs more than that,
such as samples or a teacher's scores, `prepare` starts it with the weights after the steps
submitted so far. `Learned.extra` goes to metrics.jsonl as it is.

A run that is killed goes on from a checkpoint with a new objective: what it does for a step
depends on the step, the settings and the student's weights, never on what it did before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import tinker

from distill_datasets.training.data import DatasetSource, Rendered
from distill_datasets.training.schedule import Step
from distill_datasets.training.settings import TrainSettings
from distill_datasets.training.student import (
    Learned,
    Student,
    Submitted,
    adam,
    supervised_batch,
)


class Objective(Protocol):
    """Turns a step of the schedule into a learned batch."""

    def prepare(self, step: Step) -> None:
        """Start what a coming step needs, in the background."""

    def submit(self, step: Step) -> Submitted[Learned]:
        """Send what this step learns; returns before it is learned."""
        ...

    def close(self) -> None:
        """Leave nothing running; called at the end, however that came."""


@dataclass(frozen=True)
class TrainingTask:
    """What an objective works with: a student, its training rows, and how they are learned.

    `rows` are those that are short enough, `source` is the dataset that they are from. `folder` is
    the training's own, for what outlives a killed run. On policy the first `warm_steps` learn the
    rows' own responses. `say` shows what is waited for.
    """

    student: Student
    rows: Rendered
    source: DatasetSource
    settings: TrainSettings
    folder: Path
    warm_steps: int = 0
    say: Callable[[str], None] = lambda _: None

    def update(self, step: Step) -> tinker.AdamParams:
        """Adam's settings for a step."""
        return adam(
            step.learning_rate,
            weight_decay=self.settings.weight_decay,
            grad_clip=self.settings.grad_clip,
        )


class SupervisedObjective:
    """Learns the dataset's own responses ("sft")."""

    def __init__(self, task: TrainingTask) -> None:
        """Everything is rendered already."""
        self._task = task

    def prepare(self, step: Step) -> None:
        """Nothing to start."""

    def submit(self, step: Step) -> Submitted[Learned]:
        """Learn the step's rows."""
        examples = self._task.rows.examples(step.places)
        batch = supervised_batch(examples, self._task.settings.normalization)
        return self._task.student.learn(batch, self._task.update(step))

    def close(self) -> None:
        """Nothing runs."""

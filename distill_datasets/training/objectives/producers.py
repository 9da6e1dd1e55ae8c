"""What the training loop calls for each step: the only part that differs between objectives.

The loop (training.py) knows the steps; a producer knows what to learn in one.

    producer.prepare(step)   # for the first step, and for each while the one before is learned
    producer.submit(step)    # -> PendingStep, whose result() is a Learned

Both come in the order of the steps, on the loop's thread, and must not wait for the server where
they can avoid it: several steps are in flight (`TrainSettings.ahead`). `submit` builds a `Batch`
(datums, the server's loss for them, a reader of its outputs) and hands it to `Student.learn`,
which sends forward_backward and optim_step together. Where one step needs more than the loop's
order (new sampler weights, scores of a teacher), `prepare` starts it: there the weights are those
after the steps submitted so far. `Learned.extra` goes to metrics.jsonl as it is.

A run that is killed starts again at a checkpoint with a new producer: what it does for a step may
depend on the step, the settings and the student's weights, not on what it did before.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from distill_datasets.training.batches import Update, supervised_batch
from distill_datasets.training.data import Rendered, Source
from distill_datasets.training.schedule import Step, TrainSettings
from distill_datasets.training.student import PendingStep, Student


class Producer(Protocol):
    """Turns a step of the plan into a learned batch."""

    def prepare(self, step: Step) -> None:
        """Start what a coming step needs: sampling or scoring, in the background."""

    def submit(self, step: Step) -> PendingStep:
        """Send what this step learns; returns before it is learned."""
        ...

    def close(self) -> None:
        """Leave nothing running; called at the end, however that came."""


@dataclass(frozen=True)
class Lesson:
    """All that a producer may need, decided before the first step.

    `rows` are the training rows that are short enough: `rows.examples(step.places)` as tokens,
    `rows.conversations(step.places)` as messages. `folder` is the training's own, for what shall
    outlive a kill.
    """

    student: Student
    rows: Rendered
    source: Source
    settings: TrainSettings
    folder: Path

    def update(self, step: Step) -> Update:
        """Adam's settings for a step."""
        return Update(step.learning_rate, self.settings.weight_decay, self.settings.grad_clip)


class SupervisedProducer:
    """Hard labels: the loss of the dataset's own responses."""

    def __init__(self, lesson: Lesson) -> None:
        """Everything is rendered already."""
        self._lesson = lesson

    def prepare(self, step: Step) -> None:
        """Nothing to start."""

    def submit(self, step: Step) -> PendingStep:
        """Learn the step's rows."""
        examples = self._lesson.rows.examples(step.places)
        batch = supervised_batch(examples, self._lesson.settings.normalization)
        return self._lesson.student.learn(batch, self._lesson.update(step))

    def close(self) -> None:
        """Nothing runs."""

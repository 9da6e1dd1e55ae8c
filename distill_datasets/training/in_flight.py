"""What was submitted and isn't confirmed yet: steps, and saves with their measurements."""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import SettingsError
from distill_datasets.progress import Progress
from distill_datasets.training.batches import Learned
from distill_datasets.training.checkpoints import Shelf, describe_progress, superseded
from distill_datasets.training.folder import Checkpoint, TrainingFolder
from distill_datasets.training.schedule import Schedule, Step
from distill_datasets.training.selection import VALIDATION_LOSS
from distill_datasets.training.settings import TrainSettings
from distill_datasets.training.sparkline import sparkline
from distill_datasets.training.student import PendingSave, PendingStep, Student
from distill_datasets.training.tracking import Tracker

if TYPE_CHECKING:
    from distill_datasets.training.validation import PendingScores, Validator

_SHOWN = 64  # of the last losses in the live line


@dataclass(frozen=True)
class Desk:
    """Where results go, and what decides what becomes of them.

    `described` is what every checkpoint says of its training.
    """

    student: Student
    folder: TrainingFolder
    settings: TrainSettings
    schedule: Schedule
    validators: "Sequence[Validator]"
    described: Mapping[str, str]
    tracker: Tracker
    progress: Progress


@dataclass(frozen=True)
class _Mark:
    """A save on its way; `scores` are None where nothing is measured."""

    step: Step
    name: str
    save: PendingSave
    scores: "Sequence[PendingScores] | None"
    kept: bool


class InFlight:
    """Everything that is confirmed is written down in the order in which it was submitted."""

    def __init__(self, desk: Desk) -> None:
        """Goes on from what the folder holds."""
        self._desk = desk
        self._open: deque[tuple[Step, PendingStep] | _Mark] = deque()
        metrics = desk.folder.metrics
        self.selection = desk.folder.selection(desk.settings)
        self._shelf = Shelf(desk.student.connection, desk.settings.ttl_seconds)
        self._losses: deque[float] = deque(maxlen=_SHOWN)
        self._tokens = sum(line.get("tokens", 0) for line in metrics)
        self._began = time.monotonic()

    def learn(self, step: Step, pending: PendingStep) -> None:
        """A step that was submitted."""
        self._open.append((step, pending))

    def save(self, step: Step) -> None:
        """Save the weights as the steps submitted so far leave them, and measure them where that
        is due. What the save says of itself holds all measurements of earlier ones.
        """
        while self._has_marks():
            self._settle_first()
        desk, done = self._desk, step.number
        final, kept = done == desk.schedule.total, desk.schedule.keeps(done)
        measured = desk.schedule.measures(done)
        name = "final" if final else f"step-{done:06d}"
        saved = desk.student.save(
            name,
            {
                **desk.described,
                **describe_progress(done, self.selection, desk.folder.checkpoints),
            },
            sampler=kept or measured,
            ttl_seconds=None if final else self._shelf.ttl,
        )
        scores = None
        if measured:
            scores = [validator.submit(desk.student, saved) for validator in desk.validators]
        self._open.append(_Mark(step, name, saved, scores, kept))

    def settle(self, ahead: int) -> None:
        """Wait until at most so many steps are queued behind the one that is being learned."""
        while sum(not isinstance(entry, _Mark) for entry in self._open) > ahead:
            self._settle_first()

    def settle_all(self) -> None:
        """Wait for everything."""
        while self._open:
            self._settle_first()

    def exhausted(self) -> bool:
        """Whether to stop: the measurements submitted so far don't get better any more."""
        if self._desk.settings.patience is None:
            return False
        while self._has_marks():
            self._settle_first()
        return self.selection.exhausted(self._desk.settings.patience)

    def close(self) -> None:
        """Let go of the server, after everything is settled."""
        self._shelf.close()

    def _has_marks(self) -> bool:
        return any(isinstance(entry, _Mark) for entry in self._open)

    def _settle_first(self) -> None:
        first = self._open.popleft()
        if isinstance(first, _Mark):
            self._settle_mark(first)
        else:
            self._settle_step(*first)

    def _settle_step(self, step: Step, pending: PendingStep) -> None:
        learned = pending.result()
        now = time.monotonic()
        seconds, self._began = now - self._began, now
        self._tokens += learned.tokens
        self._log(step, self._line(step, learned, seconds))
        self._losses.append(learned.loss)
        note = f"loss {learned.loss:.4f} {sparkline(self._losses)}"
        self._desk.progress.advance(1, tokens=learned.tokens, note=note)

    def _line(self, step: Step, learned: Learned, seconds: float) -> dict[str, Any]:
        line: dict[str, Any] = {
            "loss": learned.loss,
            "nll": learned.nll,
            "bits_per_byte": learned.bits_per_byte,
            "learning_rate": step.learning_rate,
            "gradient_norm": learned.gradient_norm,
            "response_tokens": learned.response_tokens,
            "tokens": learned.tokens,
            "tokens_per_second": round(learned.tokens / max(seconds, 1e-9), 1),
            "seconds": round(seconds, 4),
            **learned.extra,
        }
        price = self._desk.settings.price_per_million
        if price is not None:
            line["spent"] = round(self._tokens * price / 1e6, 6)
        return {name: value for name, value in line.items() if value is not None}

    def _settle_mark(self, mark: _Mark) -> None:
        desk, done = self._desk, mark.step.number
        saved = mark.save.result()
        scores = {name: v for one in mark.scores or () for name, v in one.result().items()}
        if scores:
            self._log(mark.step, scores)
            self.selection = self.selection.after(done, self._chosen(scores))
        before = [checkpoint for checkpoint in desk.folder.checkpoints if checkpoint.best][-1:]
        checkpoint = Checkpoint(
            name=mark.name,
            step=done,
            state=saved.state,
            sampler=saved.sampler,
            validation_loss=scores.get(VALIDATION_LOSS),
            best=self.selection.best_step == done if scores else mark.kept,
            final=done == desk.schedule.total or self.selection.exhausted(desk.settings.patience),
            kept=mark.kept,
            scores=scores,
        )
        if checkpoint.final:
            # Once this is written down, nobody comes back to it.
            self._shelf.keep([checkpoint, *([] if checkpoint.best else before)])
        desk.folder.add(checkpoint)
        if checkpoint.best:
            self._shelf.expire(one for one in before if one.kept)
            self._shelf.begin_to_keep([checkpoint])
        gone = superseded(desk.folder.checkpoints)
        if gone:
            desk.folder.forget({one.name for one in gone})
            self._shelf.delete(gone)

    def _chosen(self, scores: Mapping[str, float]) -> float:
        name = self.selection.metric
        if name not in scores:
            raise SettingsError(
                f"select={name!r} was not measured: expected one of {sorted(scores)}."
            )
        return scores[name]

    def _log(self, step: Step, values: Mapping[str, Any]) -> None:
        self._desk.folder.log({"step": step.number, "epoch": step.epoch, **values})
        self._desk.tracker.log(step.number, values)

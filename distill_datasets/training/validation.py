"""What is measured on the validation rows while training, to choose the best checkpoint by."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from distill_datasets.errors import SettingsError
from distill_datasets.models.sampler import Sampling
from distill_datasets.schema import Message
from distill_datasets.training.batches import bits_per_byte
from distill_datasets.training.data import Rendered
from distill_datasets.training.selection import VALIDATION_LOSS
from distill_datasets.training.student import PendingLoss, PendingSave, Student

if TYPE_CHECKING:
    from distill_datasets.training.internalisation import Bounds
    from distill_datasets.training.objectives.producers import Lesson

_SLACK = 8  # tokens that an answer may be longer than the longest response, to be seen as other
_AT_ONCE = 256  # requests


class PendingScores(Protocol):
    """Numbers that are being computed."""

    def result(self) -> Mapping[str, float]:
        """Wait for them, by name; a name that ends in "loss" is better when it is lower."""
        ...


class Validator(Protocol):
    """Measures the student as the steps submitted so far leave it."""

    def submit(self, student: Student, save: PendingSave) -> PendingScores:
        """Begin; `save` is of the same weights, for what must sample from them."""
        ...


class LossValidator:
    """The loss per response token, in nats."""

    def __init__(self, rows: Rendered, batch_size: int, bounds: "Bounds | None" = None) -> None:
        """Measured in batches of that many rows; with `bounds`, also as internalisation."""
        self._batches = list(rows.batches(batch_size))
        self._bytes = sum(one.bytes for batch in self._batches for one in batch)
        self._bounds = bounds

    def submit(self, student: Student, save: PendingSave) -> PendingScores:
        """Queued behind the steps."""
        return _Loss(student.loss(self._batches), self._bytes, self._bounds)


class _Loss:
    def __init__(self, pending: PendingLoss, size: int, bounds: "Bounds | None") -> None:
        self._pending, self._bytes, self._bounds = pending, size, bounds

    def result(self) -> Mapping[str, float]:
        rows = self._pending.rows()
        tokens = sum(row.tokens for row in rows)
        loss = sum(row.nll for row in rows) / tokens
        bits = bits_per_byte(loss, tokens, self._bytes)
        found = {VALIDATION_LOSS: loss} | ({"validation_bits_per_byte": bits} if bits else {})
        return found | _internalised([row.nll for row in rows], self._bounds)


def _internalised(nats: Sequence[float], bounds: "Bounds | None") -> dict[str, float]:
    if bounds is None:
        return {}
    from distill_datasets.training.internalisation import internalisation

    interval = internalisation(nats, bounds).interval()
    names = {"value": "", "low": "_low", "high": "_high"}
    return {f"internalisation{names[name]}": one for name, one in interval.items()}


class AccuracyValidator:
    """The share of rows whose greedy answer is the row's response, to the letter."""

    def __init__(self, rows: Rendered) -> None:
        """Asks for no more tokens than the longest response needs."""
        places = range(len(rows))
        self._conversations = rows.conversations(places)
        longest = max(int((one.targets > 0).sum()) for one in rows.examples(places))
        self._sampling = Sampling(temperature=0.0, max_tokens=longest + _SLACK)

    def submit(self, student: Student, save: PendingSave) -> PendingScores:
        """Samples beside the training that goes on."""
        pool = ThreadPoolExecutor(1, thread_name_prefix="accuracy")
        try:
            return pool.submit(self._score, student, save)
        finally:
            pool.shutdown(wait=False)

    def _score(self, student: Student, save: PendingSave) -> Mapping[str, float]:
        path = save.result().sampler
        if path is None:
            raise ValueError("expected a save for sampling; found a state only")
        return {"accuracy": asyncio.run(self._share(student, path))}

    async def _share(self, student: Student, path: str) -> float:
        sampler, gate = student.sampler(path), asyncio.Semaphore(_AT_ONCE)

        async def right(conversation: Sequence[Message]) -> bool:
            *asked, response = conversation
            async with gate:
                reply = await sampler.sample(asked, self._sampling)
            return reply.samples[0].text.strip() == response["content"].strip()

        found = await asyncio.gather(*map(right, self._conversations))
        return sum(found) / len(found)


def open_validators(
    lesson: "Lesson",
    rows: Rendered | None,
    more: "Sequence[Callable[[Lesson, Rendered], Validator]]" = (),
) -> list[Validator]:
    """Everything that is measured on the validation rows, nothing without any.

    Raises `SettingsError` where the best checkpoint shall be chosen by what can't be measured.
    """
    from distill_datasets.training.validation_bounds import validation_bounds

    if rows is None:
        return []
    settings = lesson.settings
    bounds = validation_bounds(lesson, rows) if settings.internalisation else None
    if bounds is None and settings.select == "internalisation":
        raise SettingsError("select can't be internalisation here: there is no such score.")
    found: list[Validator] = [LossValidator(rows, settings.batch_size, bounds)]
    if settings.select == "accuracy":
        found.append(AccuracyValidator(rows))
    return [*found, *(make(lesson, rows) for make in more)]

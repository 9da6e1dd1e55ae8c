"""What is measured on the validation rows while training, to choose the best checkpoint by.

The loss, accuracy, and internalisation, whose two ends (how likely base and teacher find the
teacher's answers) are measured once.
"""

import asyncio
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from distill_datasets.chat_rows import Conversation
from distill_datasets.conversations import (
    PYTHON_WORDS,
    Call,
    calls_text,
    plain_value,
    read_calls,
    split_calls,
)
from distill_datasets.errors import (
    DatasetError,
    HubError,
    ModelError,
    RecipeError,
    ServiceError,
    SettingsError,
)
from distill_datasets.files import write_file
from distill_datasets.generation.ledger import LEDGER
from distill_datasets.models.sampler import Sampling, digest
from distill_datasets.schema import Message
from distill_datasets.training.data import Rendered, cache_folder
from distill_datasets.training.internalisation import (
    ReferenceLikelihoods,
    TeacherAnswer,
    internalisation,
    reference_likelihoods,
)
from distill_datasets.training.objectives import TrainingTask
from distill_datasets.training.objectives.teacher import (
    TeacherPrompts,
    connect_teacher,
    read_teacher_prompts,
    teacher_texts,
)
from distill_datasets.training.settings import VALIDATION_LOSS
from distill_datasets.training.student import (
    PendingLoss,
    PendingSave,
    RowLoss,
    Student,
    bits_per_byte,
)

if TYPE_CHECKING:
    from distill_datasets.models.connection import Connection

_SLACK = 8  # tokens that an answer may be longer than the longest response, to be seen as other
_AT_ONCE = 256  # requests
_FILE = "bounds.json"  # in the training's folder, so that a rerun asks nobody
_VERSION = 2  # of what is cached: raise it when the likelihoods come out differently
_COLUMNS = ("query", "sample", "response", "group")


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

    def __init__(
        self, rows: Rendered, batch_size: int, ends: ReferenceLikelihoods | None = None
    ) -> None:
        """Measured in batches of that many rows; with `ends`, also as internalisation."""
        self._batches = list(rows.batches(batch_size))
        self._bytes = sum(one.bytes for batch in self._batches for one in batch)
        self._ends = ends

    def submit(self, student: Student, save: PendingSave) -> PendingScores:
        """Queued behind the steps."""
        return _Loss(student.loss(self._batches), self._bytes, self._ends)


class _Loss:
    def __init__(self, pending: PendingLoss, size: int, ends: ReferenceLikelihoods | None) -> None:
        self._pending, self._bytes, self._ends = pending, size, ends

    def result(self) -> Mapping[str, float]:
        rows = self._pending.rows()
        tokens = sum(row.tokens for row in rows)
        loss = sum(row.nll for row in rows) / tokens
        bits = bits_per_byte(loss, tokens, self._bytes)
        found = {VALIDATION_LOSS: loss} | ({"validation_bits_per_byte": bits} if bits else {})
        return found | (_internalised(rows, self._ends) if self._ends else {})


def _internalised(rows: Sequence[RowLoss], ends: ReferenceLikelihoods) -> dict[str, float]:
    """Of as many of a response's tokens as were judged: an end that isn't the teacher's is last."""
    judged = zip(rows, ends.tokens, strict=True)
    nats = [-float(row.logprobs[:tokens].sum()) for row, tokens in judged]
    interval = internalisation(nats, ends).interval()
    names = {"value": "", "low": "_low", "high": "_high"}
    return {f"internalisation{names[name]}": one for name, one in interval.items()}


class AccuracyValidator:
    """The share of rows whose greedy answer is the row's response, to the letter.

    Of several turns that is the last one; calls of tools are equal in any order.
    """

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

        async def right(conversation: Conversation) -> bool:
            *asked, response = conversation.messages
            sampling = replace(self._sampling, tools=conversation.tools)
            async with gate:
                reply = await sampler.sample(asked, sampling)
            return is_response(
                reply.samples[0].text, response, typed=conversation.tools is not None
            )

        found = await asyncio.gather(*map(right, self._conversations))
        return sum(found) / len(found)


def is_response(text: str, response: Message, *, typed: bool) -> bool:
    """Whether a text is a response: its words, and its calls in any order.

    Where the tools' schemas weren't there, calls aren't `typed`: 5 may be "5" in the chat format.
    """
    wanted = response.get("tool_calls")
    if not wanted:
        return text.strip() == response["content"].strip()
    try:
        words, calls = split_calls(text)
    except ValueError:
        return False
    found = read_calls(wanted)
    if not typed:
        calls, found = list(map(_untyped, calls)), list(map(_untyped, found))
    return (words, calls_text(calls)) == (response["content"].strip(), calls_text(found))


def _untyped(call: Call) -> Call:
    """A call whose texts are read as the JSON, or Python's words, that they may be."""
    values = {
        name: PYTHON_WORDS.get(one, plain_value(one)) if isinstance(one, str) else one
        for name, one in call.arguments.items()
    }
    return Call(call.name, values)


def open_validators(
    task: TrainingTask,
    rows: Rendered | None,
    more: Sequence[Callable[[TrainingTask, Rendered], Validator]] = (),
) -> list[Validator]:
    """Everything that is measured on the validation rows, nothing without any.

    Raises `SettingsError` where the best checkpoint is to be chosen by what can't be measured.
    """
    if rows is None:
        return []
    settings = task.settings
    ends = validation_likelihoods(task, rows) if settings.internalisation else None
    if ends is None and settings.select == "internalisation":
        raise SettingsError("select can't be internalisation here: there is no such score.")
    found: list[Validator] = [LossValidator(rows, settings.batch_size, ends)]
    if settings.select == "accuracy":
        found.append(AccuracyValidator(rows))
    return [*found, *(make(task, rows) for make in more)]


def validation_likelihoods(task: TrainingTask, rows: Rendered) -> ReferenceLikelihoods | None:
    """How likely base and teacher find the teacher's answers to the validation rows.

    Its own words come from the release's ledger. None where there is no score: the dataset is no
    release or lacks what its teacher said, its teacher can't score, or the prompt changes nothing;
    a line on standard error says why.
    Costs two requests a row, and nothing in a folder where they were made, or where another
    training on this machine has asked the same models about the same answers.
    """
    file = task.folder / _FILE
    if known := _known(file):
        return known
    try:
        prompts = read_teacher_prompts(task, (LEDGER,))
        answers = _answers(task, prompts, rows)
        teacher = connect_teacher(task, prompts)
        ends = _cached(answers, base=task.student.connection, teacher=teacher)
        internalisation(ends.base, ends)  # no score is defined between equal ends
    except (DatasetError, RecipeError, ModelError, ServiceError, HubError) as error:
        print(f"train: no internalisation score: {error}", file=sys.stderr)
        return None
    _write(file, ends)
    return ends


def _cached(
    answers: Sequence[TeacherAnswer], *, base: "Connection", teacher: "Connection"
) -> ReferenceLikelihoods:
    asked = [_VERSION, base.identity, teacher.identity, *map(asdict, answers)]
    cached = cache_folder() / f"bounds-{digest(asked)[:32]}.json"
    if known := _known(cached):
        return known
    ends = reference_likelihoods(answers, base=base, teacher=teacher)
    _write(cached, ends)
    return ends


def _answers(task: TrainingTask, prompts: TeacherPrompts, rows: Rendered) -> list[TeacherAnswer]:
    if missing := sorted({*_COLUMNS} - {*rows.plain.column_names}):
        raise DatasetError(f"{prompts.where!r} lacks a release's columns {missing}.")
    kept = rows.plain.select_columns(list(_COLUMNS)).select(rows.kept)
    return [
        TeacherAnswer.to(prompts.recipe, row, text, row["response"])
        for row, text in zip(kept, teacher_texts(task, prompts, kept), strict=True)
    ]


def _known(file: Path) -> ReferenceLikelihoods | None:
    """What was measured before; None where nothing was, or where the file is damaged."""
    try:
        return ReferenceLikelihoods(**json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _write(file: Path, ends: ReferenceLikelihoods) -> None:
    write_file(file, json.dumps(asdict(ends)) + "\n")

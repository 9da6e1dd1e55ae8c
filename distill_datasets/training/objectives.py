"""What a training step learns: responses, the teacher's probabilities, or its corrections.

The training loop calls an objective's `prepare` for a step while the one before is learned, and
then its `submit`, in the order of the steps and on one thread. Both avoid waiting for the server,
since several steps are queued there: where a step needs samples or a teacher's scores, `prepare`
starts them with the weights after the steps submitted so far.

A run that is killed goes on from a checkpoint with a new objective: what it does for a step
depends on the step, the settings and the student's weights, never on what it did before.

Two of them ask the teacher again, and learn distributions over tokens: its side of a release and
the targets stand here too. The server's cross-entropy takes (N, K) targets with weights: at each
of N places, K tokens and how much each is learned.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tinker
from numpy.typing import NDArray

from distill_datasets.errors import DatasetError, ModelError
from distill_datasets.generation.ledger import find_replies
from distill_datasets.hub.references import find_release
from distill_datasets.models.sampler import request_digest
from distill_datasets.models.scoring import CutEnds, SoftLabels, response_span
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.training.data import DatasetSource, Rendered
from distill_datasets.training.schedule import Step, choose_rows
from distill_datasets.training.settings import TrainSettings
from distill_datasets.training.student import (
    Learned,
    Normalization,
    Student,
    Submitted,
    TrainingBatch,
    adam,
    datum,
    shares,
    supervised_batch,
    target_logprobs,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from distill_datasets.models.tinker import Connection

LEAST = float(np.log(np.finfo(np.float32).tiny))  # no server's probability is smaller, but for 0
_LEAST_REST = 1e-6  # of float32 probabilities that add up to 1
_COLUMNS = ("id", "sample", "query", "response")
_AT_ONCE = 512  # rows


class Objective(ABC):
    """Turns a step of the schedule into a learned batch."""

    def prepare(self, step: Step) -> None:  # noqa: B027 (most have nothing to start)
        """Start what a coming step needs, in the background."""

    @abstractmethod
    def submit(self, step: Step) -> Submitted[Learned]:
        """Send what this step learns; returns before it is learned."""

    def close(self) -> None:  # noqa: B027
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


class SupervisedObjective(Objective):
    """Learns the dataset's own responses ("sft")."""

    def __init__(self, task: TrainingTask) -> None:
        """Everything is rendered already."""
        self._task = task

    def submit(self, step: Step) -> Submitted[Learned]:  # noqa: D102
        examples = self._task.rows.examples(step.places)
        batch = supervised_batch(examples, self._task.settings.normalization)
        return self._task.student.learn(batch, self._task.update(step))


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
    p, gain = _shares(student, teacher)
    own = np.asarray(tokens, np.int64)[:, None]
    pulled = p[:, :-1] * (gain[:, :-1] - gain[:, -1:])
    weights = np.concatenate([np.zeros_like(own, np.float64), pulled], axis=1)
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
    p, gain = _shares(student, teacher)
    # p - p exp(gain) adds up to 0 over both whole distributions; with it no term is below 0.
    return np.asarray((p * (np.expm1(gain) - gain)).sum(axis=1), np.float64)


def _shares(
    student: NDArray[np.floating], teacher: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How likely the student finds tokens (N, K) and, in the last column, all others as one, and by
    how many nats likelier the teacher does. Places with fewer tokens end with minus infinity on the
    student's side.

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
    rest = np.log(taught) - np.log(left)
    return np.concatenate([p, left], axis=1), np.concatenate([gain, rest], axis=1)


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
    sizes = shares([len(target.tokens) for target in targets], normalization)
    datums = [
        datum(one.tokens, target_tokens=target.tokens, weights=target.weights / size)
        for one, target, size in zip(examples, wide, sizes, strict=True)
    ]

    def read(outputs: Sequence[Mapping[str, Any]]) -> Learned:
        count = sum(len(example.labels.tokens) for example in examples)
        loss = entropy = nll = kept = 0.0
        logprobs = target_logprobs(datums, outputs)
        for example, target, found in zip(examples, wide, logprobs, strict=True):
            learned = target.weights > 0
            weights = target.weights[learned].astype(np.float64)
            loss -= float(weights @ found[learned])
            entropy -= float(weights @ np.log(weights))
            nll -= float(found[len(example.prompt) - 1 :, 0].sum())
            kept += example.labels.kept * len(example.labels.tokens)
        return Learned(
            loss=loss / count,
            nll=nll / count,
            response_tokens=count,
            response_bytes=sum(example.bytes for example in examples),
            tokens=sum(len(example.tokens) for example in examples),
            extra={"kl": (loss - entropy) / count, "kept": kept / count},
        )

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


@dataclass(frozen=True)
class ReleasedRow:
    """A released row; `prompt` and `tokens` are what the student reads and is to say.

    `bytes` is the length of the response in UTF-8.
    """

    id: str
    sample: int
    query: str
    response: str
    prompt: Sequence[int]
    tokens: Sequence[int]
    bytes: int


def chosen_rows(task: TrainingTask) -> tuple[list[int], "Dataset"]:
    """The places of the rows that are trained on, and those rows as they were released.

    Raises `DatasetError` where the columns of a release are missing.
    """
    settings, rendered = task.settings, task.rows
    if missing := sorted({*_COLUMNS} - {*rendered.plain.column_names}):
        raise DatasetError(
            f"The objective {settings.objective.name!r} needs a release's columns {_COLUMNS}; "
            f"{task.source.reference!r} lacks {missing}. Train on the release, or with 'sft'."
        )
    places = choose_rows(len(rendered), settings)
    return places, _released(task, places)


def released_rows(task: TrainingTask, places: Sequence[int]) -> list[ReleasedRow]:
    """The rows at these places of the training rows, with their tokens."""
    found = []
    for row, example in zip(_released(task, places), task.rows.examples(places), strict=True):
        start, end = response_span(example.weights)
        prompt, tokens = list(example.tokens[:start]), list(example.tokens[start:end])
        found.append(ReleasedRow(**row, prompt=prompt, tokens=tokens, bytes=example.bytes))
    return found


def _released(task: TrainingTask, places: Sequence[int]) -> "Dataset":
    kept = [task.rows.kept[place] for place in places]
    return task.rows.plain.select_columns(list(_COLUMNS)).select(kept)


class Wording(NamedTuple):
    """One answer in two forms: as the teacher says it, and as the student is to say it."""

    teacher: str
    student: str


@dataclass(frozen=True)
class ReleasedTeacher:
    """What the teacher of a release reads and says; `where` is the release, as it was named."""

    task: TrainingTask
    where: str
    folder: Path
    recipe: Recipe

    @property
    def choices(self) -> Sequence[str]:
        """The only answers, where the recipe names them."""
        return self.recipe.answer.choices

    def says(self, query: str, response: str) -> bool:
        """Whether a student's response is something that the teacher itself could have said."""
        return self.recipe.read(query, None, response, "stop").response == response.strip()

    def wordings(self, text: str) -> list[Wording]:
        """A teacher's text with each of the choices in its answer's place.

        Raises `DatasetError` for a text in which the answers can't be exchanged.
        """
        reader = self.recipe.teacher_reader
        answer = reader.read(text, "stop").answer
        place = text.rfind(answer) if answer else -1
        while answer and place >= 0:
            before, after = text[:place], text[place + len(answer) :]
            texts = [f"{before}{choice}{after}" for choice in self.choices]
            read = [reader.read(one, "stop").answer for one in texts]
            if read == list(self.choices):
                return [
                    Wording(one, self.recipe.write_response(one, choice))
                    for choice, one in zip(self.choices, texts, strict=True)
                ]
            place = text.rfind(answer, 0, place)
        raise DatasetError(
            f"The labels of {self.where!r} can't be scored: expected a text of the teacher that "
            f"reads as another choice when its answer is exchanged; found {text[-200:]!r}, read "
            f"as {answer!r}. Train with labels='scored', or with the objective 'sft'."
        )

    def texts(self, rows: "Dataset") -> list[str]:
        """What the teacher itself said for each of the rows, out of the release's ledger.

        Where that lacks it, a response that the teacher could have said itself stands for its
        words. Raises `DatasetError` for any other row.
        """
        recipe, identity = self.recipe, self.task.source.manifest.get("identity")
        columns = [rows[name] for name in ("query", "sample", "response")]
        keys, replies = [""] * len(rows), {}
        if identity and not recipe.teachers:
            sampling = recipe.sampling_parameters
            keys = [
                request_digest(identity, recipe.messages(query), recipe.fitted(query, sampling))
                for query in columns[0]
            ]
            replies = find_replies(self.folder, set(keys))
        texts = []
        for key, query, sample, response in zip(keys, *columns, strict=True):
            samples = replies[key].samples if key in replies else ()
            if sample >= len(samples) and not self.says(query, response):
                raise DatasetError(
                    f"The ledger of {self.where!r} doesn't hold what its teacher said to "
                    f"{query[:80]!r}. Publish with the ledger; without one there is no "
                    "internalisation score, and soft labels need labels='scored'."
                )
            texts.append(samples[sample].text if sample < len(samples) else response)
        return texts

    def connect(self, *, own: bool = False) -> "Connection":
        """The model that scores: the one that the settings name, else the release's own teacher.

        With `own` it is always the release's, and must be the very model that answered then; it
        alone has the renderer that the release names. A teacher that is the student's base shares
        its server. Raises `ModelError` for one that gives no probabilities.
        """
        from distill_datasets.models.references import connect

        student, manifest = self.task.student.connection, self.task.source.manifest
        released = str(manifest.get("teacher", self.recipe.teacher))
        reference = released if own else self.task.settings.objective.teacher or released
        own_renderer = self.recipe.renderer or manifest.get("renderer")
        renderer, teacher = own_renderer if reference == released else None, student
        if reference != student.reference or renderer not in (None, student.renderer_name):
            try:
                teacher = connect(reference, renderer=renderer)
            except ModelError as error:
                raise type(error)(
                    f"The teacher {reference!r} of {self.where!r} can't be asked for "
                    f"probabilities: {error} Name a teacher that can, or train with 'sft'."
                ) from error
        if own and teacher.identity != manifest.get("identity"):
            raise DatasetError(
                f"The soft labels in {self.where!r} are those of {manifest.get('identity')!r}, "
                f"but {reference!r} is {teacher.identity!r}: expected the same model, whose tokens "
                "they are. Generate and publish again, or train with labels='scored'."
            )
        return teacher

    def cut_ends(self) -> CutEnds | None:
        """Where the answers end, of a teacher with stop texts; None for one that ends its own."""
        if not self.recipe.stop_texts:
            return None
        task = self.task
        places = choose_rows(len(task.rows), task.settings)

        def responses() -> Iterator[Sequence[int]]:
            for first in range(0, len(places), _AT_ONCE):
                for one in task.rows.examples(places[first : first + _AT_ONCE]):
                    start, end = response_span(one.weights)
                    yield one.tokens[start:end]

        return CutEnds.of(task.student.connection, self.recipe.stop_texts, responses())

    def prompt_tokens(self, connection: "Connection", query: str) -> list[int]:
        """The tokens that the teacher has read when it begins to answer."""
        messages: list[Any] = [dict(message) for message in self.recipe.messages(query)]
        tools = self.recipe.part(query)[0].tools_text
        rendered = connection.renderer.build_generation_prompt(messages, tools=tools)
        return [int(token) for token in rendered.to_ints()]

    def require_own_words(self, rows: "Dataset") -> None:
        """Refuse responses that the teacher, under its prompt, would not say itself.

        It would find their first word all but impossible, and teach its own instead.
        """
        said = zip(rows["query"], rows["response"], strict=True)
        strange = [response for query, response in said if not self.says(query, response)]
        if strange:
            soft = " or with the objective 'soft' and labels='choices'" if self.choices[1:] else ""
            raise DatasetError(
                f"{len(strange)} of {len(rows)} responses in {self.where!r} are not what its "
                f"teacher says itself, such as {strange[0][:200]!r}: expected responses that the "
                "recipe's `answer` reads and its `response` leaves as they are. Ask for that form "
                "in prompt.md, or set response: '{{ text }}', and publish again; or train with "
                f"'sft'{soft}."
            )


def read_teacher(task: TrainingTask, parts: Sequence[str] = ()) -> ReleasedTeacher:
    """The teacher of the release that is trained on; of a Hub dataset these `parts` are fetched.

    Raises `DatasetError` where there is none, and where a row is more than one response.
    """
    source, reference = task.source, task.source.reference
    pinned = reference
    if not source.path.is_file() and not Path(reference).expanduser().exists():
        pinned = f"{reference.partition('@')[0]}@{source.files}"
    release = find_release(pinned, (*parts, "recipe"), task.settings.config)
    if release is None or not (release.path / "recipe" / "recipe.yaml").is_file():
        raise DatasetError(
            f"{reference!r} doesn't say how its teacher is asked: expected a release with "
            "recipe/recipe.yaml and recipe/prompt.md in it, as `publish` writes it. Train on that "
            "release, or with the objective 'sft', which needs no prompt."
        )
    recipe = load_recipe(release.path / "recipe", trust=True)
    if recipe.turns == "all":
        raise DatasetError(
            f"The teacher of {reference!r} answered every turn of a conversation (`turns: all`), "
            "and can be asked about one response a row only: train with the objective 'sft'."
        )
    return ReleasedTeacher(task, reference, release.path, recipe)

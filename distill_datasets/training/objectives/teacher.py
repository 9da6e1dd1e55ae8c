"""The teacher's side of a release, for objectives that ask the teacher again while training.

Its prompt and its words come from the recipe in the release; what it was paid to score is kept in
the training's folder.
"""

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from distill_datasets.errors import DatasetError, ModelError, OutputError
from distill_datasets.generation.ledger import find_replies
from distill_datasets.hub.references import find_release
from distill_datasets.models.sampler import request_digest
from distill_datasets.models.scoring import CutEnds, SoftLabels, response_span
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.training.objectives import TrainingTask
from distill_datasets.training.schedule import choose_rows

if TYPE_CHECKING:
    from datasets import Dataset

    from distill_datasets.models.connection import Connection

_COLUMNS = ("id", "sample", "query", "response")
_VERSION = 1  # of what is stored: raise it when scores come out differently
_TABLE = """
CREATE TABLE IF NOT EXISTS scores (
    digest TEXT NOT NULL PRIMARY KEY,
    tokens BLOB NOT NULL,
    ids BLOB NOT NULL,
    logprobs BLOB NOT NULL,
    kept REAL NOT NULL
)
"""
_AT_ONCE = 512  # rows


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
class TeacherPrompts:
    """What the teacher of a release reads and says; `where` is the release, as it was named."""

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


def teacher_texts(task: TrainingTask, prompts: TeacherPrompts, rows: "Dataset") -> list[str]:
    """What the teacher itself said for each of a release's rows, out of the release's ledger.

    Where that lacks it, a response that the teacher could have said itself stands for its words.
    Raises `DatasetError` for any other row.
    """
    recipe, identity = prompts.recipe, task.source.manifest.get("identity")
    columns = [rows[name] for name in ("query", "sample", "response")]
    keys, replies = [""] * len(rows), {}
    if identity and not recipe.teachers:
        sampling = recipe.sampling_parameters
        keys = [
            request_digest(identity, recipe.messages(query), recipe.fitted(query, sampling))
            for query in columns[0]
        ]
        replies = find_replies(prompts.folder, set(keys))
    texts = []
    for key, query, sample, response in zip(keys, *columns, strict=True):
        samples = replies[key].samples if key in replies else ()
        if sample >= len(samples) and not prompts.says(query, response):
            raise DatasetError(
                f"The ledger of {prompts.where!r} doesn't hold what its teacher said to "
                f"{query[:80]!r}. Publish with the ledger; without one there is no "
                "internalisation score, and soft labels need labels='scored'."
            )
        texts.append(samples[sample].text if sample < len(samples) else response)
    return texts


def read_teacher_prompts(task: TrainingTask, parts: Sequence[str] = ()) -> TeacherPrompts:
    """The recipe in the release that is trained on; of a Hub dataset these `parts` are fetched.

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
    return TeacherPrompts(reference, release.path, recipe)


def connect_teacher(
    task: TrainingTask, prompts: TeacherPrompts, *, own: bool = False
) -> "Connection":
    """The model that scores: the one that the settings name, else the release's own teacher.

    With `own` it is always the release's, and must be the very model that answered then; it alone
    has the renderer that the release names. A teacher that is the student's base shares its
    server. Raises `ModelError` for one that gives no probabilities.
    """
    from distill_datasets.models.references import connect

    student, manifest = task.student.connection, task.source.manifest
    released = str(manifest.get("teacher", prompts.recipe.teacher))
    reference = released if own else task.settings.objective.teacher or released
    renderer = None
    if reference == released:
        renderer = prompts.recipe.renderer or manifest.get("renderer")
    teacher = student
    if reference != student.reference or renderer not in (None, student.renderer_name):
        try:
            teacher = connect(reference, renderer=renderer)
        except ModelError as error:
            raise type(error)(
                f"The teacher {reference!r} of {prompts.where!r} can't be asked for "
                f"probabilities: {error} Name a teacher that can, or train with 'sft'."
            ) from error
    if own and teacher.identity != manifest.get("identity"):
        raise DatasetError(
            f"The soft labels in {prompts.where!r} are those of {manifest.get('identity')!r}, but "
            f"{reference!r} is {teacher.identity!r}: expected the same model, whose tokens they "
            "are. Generate and publish again, or train with labels='scored'."
        )
    return teacher


def cut_ends(task: TrainingTask, prompts: TeacherPrompts) -> CutEnds | None:
    """Where the answers of a teacher with stop texts end; None for one that ends its own."""
    texts = prompts.recipe.stop_texts
    if not texts:
        return None
    places = choose_rows(len(task.rows), task.settings)

    def responses() -> Iterator[Sequence[int]]:
        for first in range(0, len(places), _AT_ONCE):
            for one in task.rows.examples(places[first : first + _AT_ONCE]):
                start, end = response_span(one.weights)
                yield one.tokens[start:end]

    return CutEnds.of(task.student.connection, texts, responses())


def prompt_tokens(teacher: "Connection", prompts: TeacherPrompts, query: str) -> list[int]:
    """The tokens that the teacher has read when it begins to answer."""
    messages: list[Any] = [dict(message) for message in prompts.recipe.messages(query)]
    tools = prompts.recipe.part(query)[0].tools_text
    rendered = teacher.renderer.build_generation_prompt(messages, tools=tools)
    return [int(token) for token in rendered.to_ints()]


def require_own_words(prompts: TeacherPrompts, rows: "Dataset") -> None:
    """Refuse responses that the teacher, under its prompt, would not say itself.

    It would find their first word all but impossible, and teach its own instead.
    """
    said = zip(rows["query"], rows["response"], strict=True)
    strange = [response for query, response in said if not prompts.says(query, response)]
    if strange:
        raise DatasetError(
            f"{len(strange)} of {len(rows)} responses in {prompts.where!r} are not what its "
            f"teacher says itself, such as {strange[0][:200]!r}: expected responses that the "
            "recipe's `answer` reads and its `response` leaves as they are. Ask for that form in "
            "prompt.md, or set response: '{{ text }}', and publish again; or train with 'sft'"
            + (
                " or with the objective 'soft' and labels='choices'."
                if len(prompts.choices) > 1
                else "."
            )
        )


@dataclass(frozen=True)
class LabelRequest:
    """A row's labels: the key that they are stored under, and how to begin to ask for them.

    What `start` returns waits for the labels.
    """

    key: str
    start: Callable[[], Callable[[], SoftLabels]]


def score_key(*parts: Any) -> str:
    """The digest of what is scored: by whom, after what, and what."""
    return sha256(repr((_VERSION, *parts)).encode()).hexdigest()


class ScoreStore:
    """Soft labels on disk, by the digest of what was scored.

    Tokens are int32, log-probabilities float16.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file; raises `OutputError` where it can't be written."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=60)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute(_TABLE)
        except (OSError, sqlite3.Error) as error:
            raise self._unwritable(error) from error

    def __contains__(self, digest: str) -> bool:
        """Whether it was scored before."""
        asked = "SELECT 1 FROM scores WHERE digest = ?"
        return self._database.execute(asked, (digest,)).fetchone() is not None

    def get(self, digest: str) -> SoftLabels:
        """What was scored before; `KeyError` where nothing was."""
        row = self._database.execute(
            "SELECT tokens, ids, logprobs, kept FROM scores WHERE digest = ?", (digest,)
        ).fetchone()
        if row is None:
            raise KeyError(digest)
        tokens = np.frombuffer(row[0], "<i4")
        shape = (len(tokens), -1)
        ids, logprobs = np.frombuffer(row[1], "<i4"), np.frombuffer(row[2], "<f2")
        return SoftLabels(tokens, ids.reshape(shape), logprobs.reshape(shape), row[3])

    def mean_kept(self, digests: Sequence[str]) -> float:
        """The mean of `SoftLabels.kept` over these; all of them are stored."""
        asked = "SELECT kept FROM scores WHERE digest = ?"
        return fmean(self._database.execute(asked, (one,)).fetchone()[0] for one in digests)

    def put(self, entries: Iterable[tuple[str, SoftLabels]]) -> None:
        """Keep them all or none; raises `OutputError` when the disk won't take it."""
        rows = [
            (
                digest,
                labels.tokens.astype("<i4").tobytes(),
                labels.ids.astype("<i4").tobytes(),
                labels.logprobs.astype("<f2").tobytes(),
                labels.kept,
            )
            for digest, labels in entries
        ]
        try:
            with self._database:
                self._database.executemany(
                    "INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?)", rows
                )
        except sqlite3.Error as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Release the file."""
        self._database.close()

    def _unwritable(self, error: Exception) -> OutputError:
        remedy = "Free some space or choose another --out, and run again: what is stored is kept."
        if "not a database" in str(error) or "malformed" in str(error):
            remedy = "It is damaged: delete it and run again, which scores all rows anew."
        return OutputError(f"Can't use the scores {str(self.path)!r}: {error}. {remedy}")

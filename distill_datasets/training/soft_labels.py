"""Soft labels: the student learns the teacher's probabilities at each token of its responses.

They are got for all rows before the first step, and kept on disk: those of a closed set of
answers, those that generation kept, or those that the teacher gives when it reads the responses
under its prompt.

The answers of a closed set are labels, each a sequence of tokens. Where several begin alike, a
label's probability is a product over the places of the tree that they form; what the student
learns at a place is the share of each next token among the labels that are still possible there.
"""

import math
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distill_datasets.errors import DatasetError, OutputError
from distill_datasets.generation.ledger import LEDGER
from distill_datasets.models.sampler import digest
from distill_datasets.models.scoring import (
    CutEnds,
    Scorer,
    SoftLabels,
    require_same_tokenizer,
    split_conversation,
)
from distill_datasets.progress import Progress
from distill_datasets.releases.contents import SOFT, has_soft, read_soft
from distill_datasets.training import tell
from distill_datasets.training.objectives import (
    Objective,
    ReleasedRow,
    ReleasedTeacher,
    SoftExample,
    TrainingTask,
    chosen_rows,
    read_teacher,
    released_rows,
    soft_batch,
    soft_targets,
)
from distill_datasets.training.schedule import Step
from distill_datasets.training.student import Learned, Submitted

if TYPE_CHECKING:
    from datasets import Dataset

    from distill_datasets.models.tinker import Connection

SCORES = "scores.sqlite"  # in the training's folder: what a rerun does not pay again
_ROWS_AT_ONCE = 512  # scored together
_ENOUGH = 0.9  # of the teacher's probability: with less, the tail is shared among other tokens
_REMEDIES = {
    "choices": "It often wants to say something else: mend the prompt or the choices.",
    "stored": "Generate with more `sampling.top_logprobs`, and train with as large a top_k.",
    "scored": "Train with a larger top_k.",
}
Tokens = tuple[int, ...]
_TABLE = """
CREATE TABLE IF NOT EXISTS scores (
    digest TEXT NOT NULL PRIMARY KEY,
    tokens BLOB NOT NULL,
    ids BLOB NOT NULL,
    logprobs BLOB NOT NULL,
    kept REAL NOT NULL
)
"""
_VERSION = 1  # of what is stored: raise it when scores come out differently


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


class SoftObjective(Objective):
    """Learns the teacher's probabilities ("soft")."""

    def __init__(self, task: TrainingTask) -> None:
        """Get all labels; asks the teacher only for what is not stored yet.

        Raises `DatasetError` for a release without a recipe, for another tokenizer, and for rows
        that the labels' source can't do; `ModelError` for a teacher that can't score.
        """
        self._task = task
        self._store = ScoreStore(task.folder / SCORES)
        with ExitStack() as unopened:
            unopened.callback(self._store.close)
            teacher = read_teacher(task, (LEDGER, SOFT))
            self._keys = get_labels(teacher, self._store)
            self._cuts = teacher.cut_ends()
            unopened.pop_all()

    def examples(self, places: Sequence[int]) -> list[SoftExample]:
        """The rows at these places of the training rows."""
        found = [self._store.get(self._keys[place]) for place in places]
        rows = zip(found, released_rows(self._task, places), strict=True)
        return [
            SoftExample(
                row.prompt, self._cuts.hard(labels, row.tokens) if self._cuts else labels, row.bytes
            )
            for labels, row in rows
        ]

    def submit(self, step: Step) -> Submitted[Learned]:  # noqa: D102
        settings = self._task.settings
        examples = self.examples(step.places)
        targets = [soft_targets(one.labels, alpha=settings.objective.alpha) for one in examples]
        batch = soft_batch(examples, targets, settings.normalization)
        return self._task.student.learn(batch, self._task.update(step))

    def close(self) -> None:  # noqa: D102
        self._store.close()


def get_labels(released: ReleasedTeacher, store: ScoreStore) -> dict[int, str]:
    """The keys in the store of the labels of each row that is trained on, by the row's place."""
    task = released.task
    (places, rows), source = chosen_rows(task), task.settings.objective.labels
    if source == "auto" and len(released.choices) > 1:
        source = "choices"
    elif source == "auto":
        source = "stored" if has_soft(released.folder) else "scored"
    teacher = released.connect(own=source == "stored")
    if source != "choices":
        require_same_tokenizer(teacher, task.student.connection)
    if source == "stored":
        keys = _stored(released, dict(zip(places, _names(rows), strict=True)), store)
    else:
        scoring = _of_choices if source == "choices" else _of_responses
        keys = _score(task, places, scoring(released, teacher, rows), store)
    if (kept := store.mean_kept(list(keys.values()))) < _ENOUGH:
        held = "the recipe's choices" if source == "choices" else "the soft labels"
        tell(
            f"warning: {held} hold {kept:.2f} of the teacher's probability on average; the "
            f"student learns the rest as if it were theirs. {_REMEDIES[source]}"
        )
    return keys


def _names(rows: "Dataset") -> list[tuple[str, int]]:
    return list(zip(rows["id"], rows["sample"], strict=True))


def _stored(
    released: ReleasedTeacher, names: Mapping[int, tuple[str, int]], store: ScoreStore
) -> dict[int, str]:
    """Copies the release's own labels, whose file can only be read in its order."""
    k, files = released.task.settings.objective.top_k, released.task.source.files
    keys = {name: score_key("stored", files, k, *name) for name in names.values()}
    if any(key not in store for key in keys.values()):
        store.put((keys[name], labels) for name, labels in read_soft(released.folder, keys, k))
    missing = sum(key not in store for key in keys.values())
    if missing:
        raise DatasetError(
            f"{released.where!r} stores soft labels of {len(keys) - missing} of {len(keys)} rows: "
            "expected all of them. Rows whose response is not the teacher's own text have none; "
            "generate with `sampling.top_logprobs` and publish again, or train with "
            "labels='scored'."
        )
    return {place: keys[name] for place, name in names.items()}


def _score(
    task: TrainingTask,
    places: Sequence[int],
    request: Callable[[ReleasedRow], LabelRequest],
    store: ScoreStore,
) -> dict[int, str]:
    """The keys of every row's labels, all of them stored; scores those that aren't."""
    keys: dict[int, str] = {}
    with Progress("score", len(places)) as progress:
        for first in range(0, len(places), _ROWS_AT_ONCE):
            part = places[first : first + _ROWS_AT_ONCE]
            asked = [request(row) for row in released_rows(task, part)]
            missing = {one.key: one.start for one in asked if one.key not in store}
            waiting = [(key, start()) for key, start in missing.items()]
            for key, wait in waiting:
                store.put([(key, wait())])
            keys.update(zip(part, (one.key for one in asked), strict=True))
            progress.advance(len(part))
    return keys


def _of_choices(
    released: ReleasedTeacher, teacher: "Connection", rows: "Dataset"
) -> Callable[[ReleasedRow], LabelRequest]:
    """The probabilities of the recipe's choices in the answer's place."""
    if len(released.choices) < 2:
        raise DatasetError(
            f"The recipe of {released.where!r} names no choices (`answer.choices`), so labels have "
            "no exact probabilities. Train with labels='scored'."
        )
    reader = released.recipe.student_reader
    for query, response in zip(rows["query"], rows["response"], strict=True):
        if reader.read(response, "stop").answer not in released.choices:
            raise _outside(query, response, released.choices, released.where)
    said = dict(zip(_names(rows), released.texts(rows), strict=True))
    scorer = LabelScorer(released, teacher, said.values())
    return lambda row: scorer.request(row, said[row.id, row.sample])


def _of_responses(
    released: ReleasedTeacher, teacher: "Connection", rows: "Dataset"
) -> Callable[[ReleasedRow], LabelRequest]:
    """The response itself, read by the teacher under its prompt."""
    released.require_own_words(rows)
    scorer, k = Scorer(teacher), released.task.settings.objective.top_k

    def request(row: ReleasedRow) -> LabelRequest:
        context = released.prompt_tokens(teacher, row.query)

        def start() -> Callable[[], SoftLabels]:
            pending = scorer.read(context, row.tokens, k)

            def finish() -> SoftLabels:
                ranking = pending.result().ranking
                assert ranking is not None
                return SoftLabels.of(row.tokens, ranking.ids, ranking.logprobs)

            return finish

        return LabelRequest(score_key("scored", teacher.identity, k, context, row.tokens), start)

    return request


class LabelScorer:
    """Exact probabilities of a recipe's choices, by the teacher's own words before its answer.

    Labels, not tokens, are compared, so that the teacher may have another tokenizer. Costs a
    request a row where the labels differ in one token, and more where they share beginnings.
    """

    def __init__(
        self, released: ReleasedTeacher, teacher: "Connection", texts: Iterable[str]
    ) -> None:
        """Open a scoring session with the teacher, which said these `texts`, in any order."""
        student = released.task.student.connection
        self._teacher, self._released = teacher, released
        self._scorer = Scorer(teacher)
        self._wordings = lru_cache(maxsize=4096)(released.wordings)
        self._said = lru_cache(maxsize=4096)(lambda text: spoken_tokens(teacher, text))
        self._written = lru_cache(maxsize=4096)(lambda text: spoken_tokens(student, text))
        self._ways: Callable[[int], Sequence[int]] = lambda token: [token]
        self._cut_key: list[str] = []
        if stops := released.recipe.stop_texts:
            every = {self._said(one.teacher) for text in {*texts} for one in self._wordings(text)}
            cuts = CutEnds.of(teacher, stops, sorted(every))
            self._ways, self._cut_key = cache(cuts.ways), [digest(cuts.table.tolist())]

    def request(self, row: ReleasedRow, text: str) -> LabelRequest:
        """How to ask for a row's labels, where the teacher itself said `text`.

        Raises `DatasetError` for a row whose response is none of the choices.
        """
        wordings = self._wordings(text)
        responses = [self._written(wording.student) for wording in wordings]
        if tuple(row.tokens) not in responses:
            known = [wording.student for wording in wordings]
            raise _outside(row.query, row.response, known, self._released.where)
        spoken = [self._said(wording.teacher) for wording in wordings]
        prompt = self._released.prompt_tokens(self._teacher, row.query)
        asked = [self._teacher.identity, prompt, spoken, row.tokens, responses]
        key = score_key("choices", *asked, *self._cut_key)

        def start() -> Callable[[], SoftLabels]:
            finish = self._start(prompt, spoken)
            return lambda: label_targets(row.tokens, responses, finish())

        return LabelRequest(key, start)

    def _start(self, prompt: list[int], spoken: Sequence[Tokens]) -> Callable[[], Any]:
        """Begin to ask how likely each label is; what is returned waits for it."""
        shared, labels = diverging(spoken)
        places, ways = children(labels), self._ways
        asked = []
        for path in paths(labels):
            beginnings = [path[:length] for length in range(len(path) + 1)]
            wanted = [[way for one in places[place] for way in ways(one)] for place in beginnings]
            pending = self._scorer.following([*prompt, *shared], path, wanted)
            asked.append((beginnings, pending))

        def finish() -> Any:
            found: dict[Tokens, Mapping[int, float]] = {}
            for beginnings, pending in asked:
                for place, row in zip(beginnings, pending.result(), strict=True):
                    found[place] = {
                        token: float(np.logaddexp.reduce([row[way] for way in ways(token)]))
                        for token in places[place]
                    }
            return label_logprobs(labels, found)

        return finish


def spoken_tokens(connection: "Connection", text: str) -> Tokens:
    """A response as a model says it, the token that ends it included."""
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": text}]
    _, spoken = split_conversation(connection, turns)
    return tuple(spoken)


def _outside(query: str, response: str, known: Sequence[str], where: str) -> DatasetError:
    return DatasetError(
        f"A response in {where!r} is none of the recipe's choices: expected one of "
        f"{list(known)[:20]}, found {response!r} for {query[:80]!r}. Mend the recipe's choices, "
        "or train with labels='scored'."
    )


def diverging(sequences: Sequence[Sequence[int]]) -> tuple[Tokens, list[Tokens]]:
    """What all sequences begin with, and the rest of each without what all end with.

    No rest is the beginning of another: of a common end as much stays as that takes. The
    sequences must be different.
    """
    shared = tuple(_alike(sequences))
    rests = [tuple(sequence[len(shared) :]) for sequence in sequences]
    cut = len(list(_alike([rest[::-1] for rest in rests])))

    def tells_apart(rests: Sequence[Tokens]) -> bool:
        beginnings = {rest[:length] for rest in rests for length in range(len(rest))}
        return len(set(rests)) == len(rests) and not beginnings & set(rests) and () not in rests

    while cut and not tells_apart([rest[:-cut] for rest in rests]):
        cut -= 1
    return shared, [rest[: len(rest) - cut] for rest in rests]


def _alike(sequences: Sequence[Sequence[int]]) -> list[int]:
    columns = zip(*sequences, strict=False)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def children(labels: Sequence[Tokens]) -> dict[Tokens, list[int]]:
    """The tokens that may follow each beginning of a label, in the order of the labels."""
    found: dict[Tokens, dict[int, None]] = {}
    for label in labels:
        for place, token in enumerate(label):
            found.setdefault(label[:place], {})[token] = None
    return {beginning: list(tokens) for beginning, tokens in found.items()}


def paths(labels: Sequence[Tokens]) -> list[Tokens]:
    """The fewest beginnings that a model must read to have passed every place of the tree."""
    inner = {label[:-1] for label in labels}
    return sorted(
        path for path in inner if not any(path == other[: len(path)] != other for other in inner)
    )


def label_logprobs(
    labels: Sequence[Tokens], places: Mapping[Tokens, Mapping[int, float]]
) -> NDArray[np.float64]:
    """Of whole labels, given those of the tokens at each place; not renormalised."""
    return np.array(
        [
            sum(places[label[:place]][token] for place, token in enumerate(label))
            for label in labels
        ],
        np.float64,
    )


def label_targets(
    response: Sequence[int], labels: Sequence[Sequence[int]], logprobs: NDArray[np.float64]
) -> SoftLabels:
    """What to learn at each place of a response that is one of the labels, written out.

    `logprobs` are the teacher's of each label; `kept` is what it gives all of them together.
    """
    places: list[dict[int, float]] = []
    for length in range(len(response)):
        start = tuple(response[:length])
        possible = [
            (label[length], logprob)
            for label, logprob in zip(labels, logprobs.tolist(), strict=True)
            if len(label) > length and tuple(label[:length]) == start
        ]
        best = max(logprob for _, logprob in possible)
        places.append({})
        for token, logprob in possible:
            places[-1][token] = places[-1].get(token, 0.0) + math.exp(logprob - best)
    width = max(map(len, places))
    ids = np.zeros((len(response), width), np.int32)
    found = np.full((len(response), width), -np.inf)
    for place, tokens in enumerate(places):
        total = sum(tokens.values())
        ranked = sorted(tokens, key=lambda token: (-tokens[token], token))
        ids[place, : len(ranked)] = ranked
        with np.errstate(divide="ignore"):  # what the teacher rules out stays ruled out
            found[place, : len(ranked)] = np.log([tokens[token] / total for token in ranked])
    kept = float(np.exp(logprobs).sum())
    return SoftLabels(np.asarray(response, np.int32), ids, found.astype(np.float16), kept)

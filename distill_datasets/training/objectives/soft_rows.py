"""The rows that soft labels are for, and the loop that scores them once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import DatasetError
from distill_datasets.models.scoring import SoftLabels, response_span
from distill_datasets.progress import Progress
from distill_datasets.training.batches import Example
from distill_datasets.training.objectives.producers import Lesson
from distill_datasets.training.objectives.score_store import ScoreStore
from distill_datasets.training.schedule import choose_rows

if TYPE_CHECKING:
    from datasets import Dataset

_COLUMNS = ("id", "sample", "query", "response")
_VERSION = 1  # of what is stored: raise it when scores come out differently
_IN_FLIGHT = 512  # rows scored at once, and stored together


@dataclass(frozen=True)
class SoftRow:
    """A released row; `prompt` and `tokens` are what the student sees and shall say."""

    id: str
    sample: int
    query: str
    response: str
    prompt: Sequence[int]
    tokens: Sequence[int]


@dataclass(frozen=True)
class Scoring:
    """A row's labels on their way: under which key they are kept, and how to wait for them."""

    key: str
    start: Callable[[], Callable[[], SoftLabels]]


def chosen_rows(lesson: Lesson) -> tuple[list[int], "Dataset"]:
    """The places of the rows that are trained on, and those rows as they were released.

    Raises `DatasetError` where the columns of a release are missing.
    """
    settings, rendered = lesson.settings, lesson.rows
    if missing := sorted({*_COLUMNS} - {*rendered.plain.column_names}):
        raise DatasetError(
            f"The objective {settings.objective.name!r} needs a release's columns {_COLUMNS}; "
            f"{lesson.source.reference!r} lacks {missing}. Train on the release, or with 'sft'."
        )
    places = choose_rows(len(rendered), settings)
    return places, _released(lesson, places)


def soft_rows(lesson: Lesson, places: Sequence[int]) -> list[SoftRow]:
    """The rows at these places, with their tokens."""
    found = []
    for row, example in zip(_released(lesson, places), lesson.rows.examples(places), strict=True):
        prompt, tokens = split_response(example)
        found.append(SoftRow(**row, prompt=prompt, tokens=tokens))
    return found


def split_response(example: Example) -> tuple[list[int], list[int]]:
    """The tokens before a response, and its own."""
    start, end = response_span(example.weights)
    tokens = list(example.tokens)
    return tokens[:start], tokens[start:end]


def _released(lesson: Lesson, places: Sequence[int]) -> "Dataset":
    kept = [lesson.rows.kept[place] for place in places]
    return lesson.rows.plain.select_columns(list(_COLUMNS)).select(kept)


def score_rows(
    lesson: Lesson,
    places: Sequence[int],
    scoring: Callable[[SoftRow], Scoring],
    store: ScoreStore,
) -> dict[int, str]:
    """The keys of every row's labels, all of them stored; scores those that aren't."""
    keys: dict[int, str] = {}
    with Progress("score", len(places)) as progress:
        for first in range(0, len(places), _IN_FLIGHT):
            part = places[first : first + _IN_FLIGHT]
            asked = [scoring(row) for row in soft_rows(lesson, part)]
            missing = {one.key: one.start for one in asked if one.key not in store}
            waiting = [(key, start()) for key, start in missing.items()]
            for key, wait in waiting:
                store.put([(key, wait())])
            keys.update(zip(part, (one.key for one in asked), strict=True))
            progress.advance(len(part))
    return keys


def score_key(*parts: Any) -> str:
    """Names what is scored: by whom, after what, and what."""
    return sha256(repr((_VERSION, *parts)).encode()).hexdigest()

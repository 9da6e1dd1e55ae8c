"""The soft labels of a release's rows: of its choices, as generation kept them, or scored."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from distill_datasets.errors import DatasetError
from distill_datasets.generation.ledger import LEDGER
from distill_datasets.models.scoring import Scorer, SoftLabels, require_same_tokenizer
from distill_datasets.releases.soft_labels import SOFT, has_soft, read_soft
from distill_datasets.training.objectives.closed_set import (
    LabelScorer,
    require_choices,
    teacher_texts,
)
from distill_datasets.training.objectives.producers import Lesson
from distill_datasets.training.objectives.score_store import ScoreStore
from distill_datasets.training.objectives.soft_rows import (
    Scoring,
    SoftRow,
    chosen_rows,
    score_key,
    score_rows,
    split_response,
)
from distill_datasets.training.objectives.soft_targets import SoftExample
from distill_datasets.training.objectives.teacher import (
    TeacherPrompts,
    connect_teacher,
    prompt_tokens,
    read_teacher_prompts,
    require_own_words,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from distill_datasets.models.connection import Connection

SCORES = "scores.sqlite"  # in the training's folder: what a rerun does not pay again


class SoftSet:
    """The soft labels of the rows that are trained on, in a file, read as they are needed."""

    def __init__(self, lesson: Lesson, store: ScoreStore, keys: Mapping[int, str]) -> None:
        """`keys` are what the labels of the row at each place are stored under."""
        self._lesson, self._store, self._keys = lesson, store, keys

    def examples(self, places: Sequence[int]) -> list[SoftExample]:
        """The rows at these places of `lesson.rows`."""
        found = []
        for place, example in zip(places, self._lesson.rows.examples(places), strict=True):
            prompt, _ = split_response(example)
            found.append(SoftExample(prompt, self._store.get(self._keys[place]), example.bytes))
        return found

    def close(self) -> None:
        """Release the file."""
        self._store.close()


def get_soft_labels(lesson: Lesson) -> SoftSet:
    """What the teacher thinks of each row that is trained on; asks it only what isn't stored yet.

    Raises `DatasetError` for a release without a recipe, for another tokenizer, and for rows that
    the labels' source can't do; `ModelError` for a teacher that can't score.
    """
    settings, (places, rows) = lesson.settings.objective, chosen_rows(lesson)
    prompts = read_teacher_prompts(lesson, (LEDGER, SOFT))
    source = settings.labels if settings.labels != "auto" else _source(prompts)
    teacher = connect_teacher(lesson, prompts, own=source == "stored")
    if source != "choices":
        require_same_tokenizer(teacher, lesson.student.connection)
    store = ScoreStore(lesson.folder / SCORES)
    try:
        if source == "stored":
            keys = _stored(lesson, prompts, dict(zip(places, _names(rows), strict=True)), store)
        else:
            scoring = _of_choices if source == "choices" else _of_responses
            keys = score_rows(lesson, places, scoring(lesson, teacher, prompts, rows), store)
    except BaseException:
        store.close()
        raise
    return SoftSet(lesson, store, keys)


def _source(prompts: TeacherPrompts) -> str:
    if len(prompts.choices) > 1:
        return "choices"
    return "stored" if has_soft(prompts.folder) else "scored"


def _names(rows: "Dataset") -> list[tuple[str, int]]:
    return list(zip(rows["id"], rows["sample"], strict=True))


def _stored(
    lesson: Lesson, prompts: TeacherPrompts, names: Mapping[int, tuple[str, int]], store: ScoreStore
) -> dict[int, str]:
    """Copies the release's own labels, whose file can only be read in its order."""
    k = lesson.settings.objective.top_k
    keys = {name: score_key("stored", lesson.source.files, k, *name) for name in names.values()}
    if any(key not in store for key in keys.values()):
        store.put((keys[name], labels) for name, labels in read_soft(prompts.folder, keys, k))
    missing = sum(key not in store for key in keys.values())
    if missing:
        raise DatasetError(
            f"{prompts.where!r} stores soft labels of {len(keys) - missing} of {len(keys)} rows: "
            "expected all of them. Rows whose response is not the teacher's own text have none; "
            "generate with `sampling.top_logprobs` and publish again, or train with "
            "labels='scored'."
        )
    return {place: keys[name] for place, name in names.items()}


def _of_choices(
    lesson: Lesson, teacher: "Connection", prompts: TeacherPrompts, rows: "Dataset"
) -> Callable[[SoftRow], Scoring]:
    if len(prompts.choices) < 2:
        raise DatasetError(
            f"The recipe of {prompts.where!r} names no choices (`answer.choices`), so labels have "
            "no exact probabilities. Train with labels='scored'."
        )
    require_choices(prompts, rows)
    said = teacher_texts(lesson, teacher, prompts, rows)
    scorer = LabelScorer(teacher, lesson.student.connection, prompts)
    return lambda row: scorer.scoring(row, said[row.query, row.response])


def _of_responses(
    lesson: Lesson, teacher: "Connection", prompts: TeacherPrompts, rows: "Dataset"
) -> Callable[[SoftRow], Scoring]:
    """The response itself, read by the teacher under its prompt."""
    require_own_words(prompts, rows)
    scorer, k = Scorer(teacher), lesson.settings.objective.top_k

    def scoring(row: SoftRow) -> Scoring:
        context = prompt_tokens(teacher, prompts, row.query)

        def start() -> Callable[[], SoftLabels]:
            pending = scorer.read(context, row.tokens, k)

            def finish() -> SoftLabels:
                ranking = pending.result().ranking
                assert ranking is not None
                return SoftLabels.of(row.tokens, ranking.ids, ranking.logprobs)

            return finish

        return Scoring(score_key("scored", teacher.identity, k, context, row.tokens), start)

    return scoring

"""Soft labels: the student learns the teacher's probabilities at each token of its responses.

They are got for all rows before the first step, and kept on disk: those of a closed set of
answers, those that generation kept, or those that the teacher gives when it reads the responses
under its prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from distill_datasets.errors import DatasetError
from distill_datasets.generation.ledger import LEDGER
from distill_datasets.models.scoring import Scorer, SoftLabels, require_same_tokenizer
from distill_datasets.progress import Progress
from distill_datasets.releases.soft_labels import SOFT, has_soft, read_soft
from distill_datasets.training.objectives import TrainingTask
from distill_datasets.training.objectives.closed_set import (
    LabelScorer,
    require_choices,
)
from distill_datasets.training.objectives.targets import SoftExample, soft_batch, soft_targets
from distill_datasets.training.objectives.teacher import (
    LabelRequest,
    ReleasedRow,
    ScoreStore,
    TeacherPrompts,
    chosen_rows,
    connect_teacher,
    cut_ends,
    prompt_tokens,
    read_teacher_prompts,
    released_rows,
    require_own_words,
    score_key,
    teacher_texts,
)
from distill_datasets.training.schedule import Step
from distill_datasets.training.student import Learned, Submitted
from distill_datasets.training.tracking import tell

if TYPE_CHECKING:
    from datasets import Dataset

    from distill_datasets.models.connection import Connection

SCORES = "scores.sqlite"  # in the training's folder: what a rerun does not pay again
_ROWS_AT_ONCE = 512  # scored together
_ENOUGH = 0.9  # of the teacher's probability: with less, the tail is shared among other tokens


class SoftObjective:
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
            prompts = read_teacher_prompts(task, (LEDGER, SOFT))
            self._keys = get_labels(task, prompts, self._store)
            self._cuts = cut_ends(task, prompts)
            unopened.pop_all()

    def examples(self, places: Sequence[int]) -> list[SoftExample]:
        """The rows at these places of the training rows."""
        rows = zip(places, released_rows(self._task, places), strict=True)
        return [
            SoftExample(row.prompt, self._cut(self._store.get(self._keys[place]), row), row.bytes)
            for place, row in rows
        ]

    def _cut(self, labels: SoftLabels, row: ReleasedRow) -> SoftLabels:
        return self._cuts.hard(labels, row.tokens) if self._cuts else labels

    def prepare(self, step: Step) -> None:
        """Nothing to start."""

    def submit(self, step: Step) -> Submitted[Learned]:
        """Learn the step's rows."""
        settings = self._task.settings
        examples = self.examples(step.places)
        targets = [soft_targets(one.labels, alpha=settings.objective.alpha) for one in examples]
        batch = soft_batch(examples, targets, settings.normalization)
        return self._task.student.learn(batch, self._task.update(step))

    def close(self) -> None:
        """Release the file of the labels."""
        self._store.close()


def get_labels(task: TrainingTask, prompts: TeacherPrompts, store: ScoreStore) -> dict[int, str]:
    """The keys in the store of the labels of each row that is trained on, by the row's place."""
    settings, (places, rows) = task.settings.objective, chosen_rows(task)
    source = settings.labels if settings.labels != "auto" else _source(prompts)
    teacher = connect_teacher(task, prompts, own=source == "stored")
    if source != "choices":
        require_same_tokenizer(teacher, task.student.connection)
    if source == "stored":
        keys = _stored(task, prompts, dict(zip(places, _names(rows), strict=True)), store)
    else:
        scoring = _of_choices if source == "choices" else _of_responses
        keys = _score(task, places, scoring(task, teacher, prompts, rows), store)
    _warn_of_little(store.mean_kept(list(keys.values())), source)
    return keys


def _source(prompts: TeacherPrompts) -> str:
    if len(prompts.choices) > 1:
        return "choices"
    return "stored" if has_soft(prompts.folder) else "scored"


def _names(rows: "Dataset") -> list[tuple[str, int]]:
    return list(zip(rows["id"], rows["sample"], strict=True))


def _warn_of_little(kept: float, source: str) -> None:
    if kept >= _ENOUGH:
        return
    remedy = {
        "choices": "It often wants to say something else: mend the prompt or the choices.",
        "stored": "Generate with more `sampling.top_logprobs`, and train with as large a top_k.",
        "scored": "Train with a larger top_k.",
    }
    held = "the recipe's choices" if source == "choices" else "the soft labels"
    tell(
        f"warning: {held} hold {kept:.2f} of the teacher's probability on average; the "
        f"student learns the rest as if it were theirs. {remedy[source]}"
    )


def _stored(
    task: TrainingTask,
    prompts: TeacherPrompts,
    names: Mapping[int, tuple[str, int]],
    store: ScoreStore,
) -> dict[int, str]:
    """Copies the release's own labels, whose file can only be read in its order."""
    k = task.settings.objective.top_k
    keys = {name: score_key("stored", task.source.files, k, *name) for name in names.values()}
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
    task: TrainingTask, teacher: "Connection", prompts: TeacherPrompts, rows: "Dataset"
) -> Callable[[ReleasedRow], LabelRequest]:
    """The probabilities of the recipe's choices in the answer's place."""
    if len(prompts.choices) < 2:
        raise DatasetError(
            f"The recipe of {prompts.where!r} names no choices (`answer.choices`), so labels have "
            "no exact probabilities. Train with labels='scored'."
        )
    require_choices(prompts, rows)
    said = dict(zip(_names(rows), teacher_texts(task, prompts, rows), strict=True))
    scorer = LabelScorer(teacher, task.student.connection, prompts, said.values())
    return lambda row: scorer.request(row, said[row.id, row.sample])


def _of_responses(
    task: TrainingTask, teacher: "Connection", prompts: TeacherPrompts, rows: "Dataset"
) -> Callable[[ReleasedRow], LabelRequest]:
    """The response itself, read by the teacher under its prompt."""
    require_own_words(prompts, rows)
    scorer, k = Scorer(teacher), task.settings.objective.top_k

    def request(row: ReleasedRow) -> LabelRequest:
        context = prompt_tokens(teacher, prompts, row.query)

        def start() -> Callable[[], SoftLabels]:
            pending = scorer.read(context, row.tokens, k)

            def finish() -> SoftLabels:
                ranking = pending.result().ranking
                assert ranking is not None
                return SoftLabels.of(row.tokens, ranking.ids, ranking.logprobs)

            return finish

        return LabelRequest(score_key("scored", teacher.identity, k, context, row.tokens), start)

    return request

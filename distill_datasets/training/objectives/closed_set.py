"""Closed answer sets under a teacher's prompt: how likely is each label in the answer's place?"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import DatasetError, GenerationError
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient
from distill_datasets.generation.ledger import restore
from distill_datasets.generation.rows import ask
from distill_datasets.generation.teachers import PromptedModel
from distill_datasets.models.scoring import Scorer, SoftLabels, split_conversation
from distill_datasets.training.objectives.label_tree import (
    Tokens,
    children,
    diverging,
    label_logprobs,
    label_targets,
    paths,
)
from distill_datasets.training.objectives.producers import Lesson
from distill_datasets.training.objectives.soft_rows import (
    Scoring,
    SoftRow,
    score_key,
)
from distill_datasets.training.objectives.teacher import TeacherPrompts, prompt_tokens

if TYPE_CHECKING:
    from datasets import Dataset

    from distill_datasets.models.connection import Connection


class LabelScorer:
    """Exact probabilities of a recipe's choices, by the teacher's own words before its answer.

    Labels, not tokens, are compared, so that the teacher may have another tokenizer. Costs a
    request a row where the labels differ in one token, and more where they share beginnings.
    """

    def __init__(
        self, teacher: "Connection", student: "Connection", prompts: TeacherPrompts
    ) -> None:
        """Open a scoring session with the teacher."""
        self._teacher, self._prompts = teacher, prompts
        self._scorer = Scorer(teacher)
        self._said = lru_cache(maxsize=4096)(lambda text: spoken_tokens(teacher, text))
        self._written = lru_cache(maxsize=4096)(lambda text: spoken_tokens(student, text))

    def scoring(self, row: SoftRow, text: str) -> Scoring:
        """How a row is scored, in whose answer's place the teacher said `text`.

        Raises `DatasetError` for a row whose response is none of the choices.
        """
        wordings = self._prompts.wordings(text)
        responses = [self._written(wording.student) for wording in wordings]
        if tuple(row.tokens) not in responses:
            known = [wording.student for wording in wordings]
            raise _outside(row.query, row.response, known, self._prompts.where)
        spoken = [self._said(wording.teacher) for wording in wordings]
        prompt = prompt_tokens(self._teacher, self._prompts, row.query)
        key = score_key("choices", self._teacher.identity, prompt, spoken, row.tokens, responses)

        def start() -> Callable[[], SoftLabels]:
            finish = self._start(prompt, spoken)
            return lambda: label_targets(row.tokens, responses, finish())

        return Scoring(key, start)

    def _start(self, prompt: list[int], spoken: Sequence[Tokens]) -> Callable[[], Any]:
        shared, labels = diverging(spoken)
        places = children(labels)
        asked = []
        for path in paths(labels):
            beginnings = [path[:length] for length in range(len(path) + 1)]
            wanted = [places[beginning] for beginning in beginnings]
            pending = self._scorer.following([*prompt, *shared], path, wanted)
            asked.append((beginnings, pending))

        def finish() -> Any:
            found: dict[Tokens, Mapping[int, float]] = {}
            for beginnings, pending in asked:
                found.update(zip(beginnings, pending.result(), strict=True))
            return label_logprobs(labels, found)

        return finish


def spoken_tokens(connection: "Connection", text: str) -> Tokens:
    """A response as a model says it, the end of its turn included."""
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": text}]
    _, spoken = split_conversation(connection, turns)
    return tuple(spoken)


def teacher_texts(
    lesson: Lesson, teacher: "Connection", prompts: TeacherPrompts, rows: "Dataset"
) -> dict[tuple[str, str], str]:
    """What the teacher said, by query and response, from the release's ledger where it has one.

    Elsewhere it is asked again, once: the answers are journaled in the training's folder. Raises
    `DatasetError` where it answers otherwise now.
    """
    from distill_datasets.models.tinker import TinkerSampler

    recipe = prompts.recipe
    prompted = PromptedModel(
        TinkerSampler(teacher),
        recipe.sampling_parameters,
        recipe.messages,
        recipe.teacher_reader,
        recipe.write_response,
    )
    with Journal(lesson.folder / "journal.sqlite") as journal:
        restore(prompts.folder, journal)
        answers = ask(_queries(rows), prompted, CachedClient(journal), title="teacher's words")
    if failed := [error for error in answers["error"] if error]:
        raise GenerationError(
            f"{len(failed)} of the teacher's answers could not be had, the first for "
            f"{failed[0]!r}. Run again: what was paid is kept."
        )
    columns = ("query", "response", "raw")
    said = {
        (query, response): raw
        for query, response, raw in zip(*(answers[name] for name in columns), strict=True)
    }
    pairs = list(zip(rows["query"], rows["response"], strict=True))
    if other := [query for query, response in pairs if (query, response) not in said]:
        raise DatasetError(
            f"The teacher answers {len(other)} of {len(pairs)} queries otherwise than in "
            f"{prompts.where!r}, such as {other[0]!r}: expected its own words, which the "
            "release's ledger carries. Publish with the ledger, or train with labels='scored'."
        )
    return said


def require_choices(prompts: TeacherPrompts, rows: "Dataset") -> None:
    """Refuse responses that the recipe doesn't read as one of its choices."""
    reader = prompts.recipe.student_reader
    for query, response in zip(rows["query"], rows["response"], strict=True):
        if reader.read(response, "stop").answer not in prompts.choices:
            raise _outside(query, response, prompts.choices, prompts.where)


def _queries(rows: "Dataset") -> "Dataset":
    from datasets import Dataset, Features, Value

    unique = dict(zip(rows["id"], rows["query"], strict=True))
    columns = {
        "id": list(unique),
        "query": list(unique.values()),
        "group": list(unique),
        "reference": [None] * len(unique),
        "split": ["train"] * len(unique),
    }
    return Dataset.from_dict(columns, features=Features(dict.fromkeys(columns, Value("string"))))


def _outside(query: str, response: str, known: Sequence[str], where: str) -> DatasetError:
    return DatasetError(
        f"A response in {where!r} is none of the recipe's choices: expected one of "
        f"{list(known)[:20]}, found {response!r} for {query[:80]!r}. Mend the recipe's choices, "
        "or train with labels='scored'."
    )

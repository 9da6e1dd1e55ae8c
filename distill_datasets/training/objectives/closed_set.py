"""Closed answer sets: how likely the teacher finds each label in its answer's place.

A label is a sequence of tokens. Where several begin alike, its probability is a product over the
places of the tree that they form; what the student learns at a place is the share of each next
token among the labels that are still possible there.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distill_datasets.errors import DatasetError
from distill_datasets.models.sampler import digest
from distill_datasets.models.scoring import CutEnds, Scorer, SoftLabels, split_conversation
from distill_datasets.training.objectives.teacher import (
    LabelRequest,
    ReleasedRow,
    TeacherPrompts,
    prompt_tokens,
    score_key,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from distill_datasets.models.connection import Connection

Tokens = tuple[int, ...]


class LabelScorer:
    """Exact probabilities of a recipe's choices, by the teacher's own words before its answer.

    Labels, not tokens, are compared, so that the teacher may have another tokenizer. Costs a
    request a row where the labels differ in one token, and more where they share beginnings.
    """

    def __init__(
        self,
        teacher: "Connection",
        student: "Connection",
        prompts: TeacherPrompts,
        texts: Iterable[str],
    ) -> None:
        """Open a scoring session with the teacher, which said these `texts`, in any order."""
        self._teacher, self._prompts = teacher, prompts
        self._scorer = Scorer(teacher)
        self._wordings = lru_cache(maxsize=4096)(prompts.wordings)
        self._said = lru_cache(maxsize=4096)(lambda text: spoken_tokens(teacher, text))
        self._written = lru_cache(maxsize=4096)(lambda text: spoken_tokens(student, text))
        self._ways: Callable[[int], Sequence[int]] = lambda token: [token]
        self._cut_key: list[str] = []
        if stops := prompts.recipe.stop_texts:
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
            raise _outside(row.query, row.response, known, self._prompts.where)
        spoken = [self._said(wording.teacher) for wording in wordings]
        prompt = prompt_tokens(self._teacher, self._prompts, row.query)
        asked = [self._teacher.identity, prompt, spoken, row.tokens, responses]
        key = score_key("choices", *asked, *self._cut_key)

        def start() -> Callable[[], SoftLabels]:
            finish = self._start(prompt, spoken)
            return lambda: label_targets(row.tokens, responses, finish())

        return LabelRequest(key, start)

    def _start(self, prompt: list[int], spoken: Sequence[Tokens]) -> Callable[[], Any]:
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


def require_choices(prompts: TeacherPrompts, rows: "Dataset") -> None:
    """Refuse responses that the recipe doesn't read as one of its choices."""
    reader = prompts.recipe.student_reader
    for query, response in zip(rows["query"], rows["response"], strict=True):
        if reader.read(response, "stop").answer not in prompts.choices:
            raise _outside(query, response, prompts.choices, prompts.where)


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
    while cut and not _tells_apart([rest[:-cut] for rest in rests]):
        cut -= 1
    return shared, [rest[: len(rest) - cut] for rest in rests]


def _alike(sequences: Sequence[Sequence[int]]) -> list[int]:
    columns = zip(*sequences, strict=False)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def _tells_apart(rests: Sequence[Tokens]) -> bool:
    beginnings = {rest[:length] for rest in rests for length in range(len(rest))}
    return len(set(rests)) == len(rests) and not beginnings & set(rests) and () not in rests


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
    places = [_next_tokens(response[:place], labels, logprobs) for place in range(len(response))]
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


def _next_tokens(
    beginning: Sequence[int], labels: Sequence[Sequence[int]], logprobs: NDArray[np.float64]
) -> dict[int, float]:
    start, length = tuple(beginning), len(beginning)
    possible = [
        (label[length], logprob)
        for label, logprob in zip(labels, logprobs.tolist(), strict=True)
        if len(label) > length and tuple(label[:length]) == start
    ]
    best = max(logprob for _, logprob in possible)
    found: dict[int, float] = {}
    for token, logprob in possible:
        found[token] = found.get(token, 0.0) + math.exp(logprob - best)
    return found

"""Rounds of questions to a teacher, until there are enough queries or hardly new ones come."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil
from typing import Any, TypeVar

from distill_datasets.errors import GenerationError
from distill_datasets.models.sampler import digest
from distill_datasets.synthesis.duplicates import NearDuplicates
from distill_datasets.synthesis.interview import Interview, ParsedReply, Question, explained

T = TypeVar("T")
Exercised = tuple[int, ...]

NEAR_DUPLICATE, OFF_TOPIC, EMPTY = "near-duplicate", "off topic", "empty"
BESIDE, SPARE, REPLACED = "beside its rule", "more than its rule needs", "gave way to a rule"
_FIRST = 8  # questions of the first round, which shows whether the teacher can do this at all
_LEAST = 4  # questions of any later one: a single one says little about the yield
_YIELD, _DRY = 0.05, 2  # less than this share of new queries, in so many rounds in a row
_AIMED = 3  # questions at most for a rule that no query exercises
_JUDGED = 20  # queries by hand that are judged in one request


class Coverage:
    """Counts queries by rule; rules are numbered from 1, in the prompt's order."""

    def __init__(self, rules: Sequence[str]) -> None:
        """`unjudged` counts queries of which nobody said what they exercise."""
        self.rules = tuple(rules)
        self.unjudged = 0
        self._queries: Counter[int] = Counter()

    def add(self, exercised: Exercised | None) -> None:
        """Count one query."""
        self.unjudged += self._unknown(exercised)
        self._queries.update(exercised or ())

    def spare(self, exercised: Exercised | None) -> bool:
        """Whether every rule would keep a query without one that exercises these."""
        return all(self._queries[number] > 1 for number in exercised or ())

    def remove(self, exercised: Exercised | None) -> None:
        """Count one query no more."""
        self.unjudged -= self._unknown(exercised)
        self._queries.subtract(exercised or ())

    def _unknown(self, exercised: Exercised | None) -> bool:
        return exercised is None and bool(self.rules)

    @property
    def uncovered(self) -> list[int]:
        """The numbers of the rules that no query exercises."""
        return [number for number, _ in enumerate(self.rules, 1) if not self._queries[number]]

    def table(self) -> list[dict[str, Any]]:
        """Every rule with its number and how many queries exercise it."""
        return [
            {"number": number, "rule": rule, "queries": self._queries[number]}
            for number, rule in enumerate(self.rules, 1)
        ]


@dataclass(frozen=True, slots=True)
class NewQuery:
    """A query with what was asked for; those of one question are a group."""

    query: str
    group: str
    attributes: Mapping[str, str]
    aimed: bool
    rules: Exercised | None = None


@dataclass(frozen=True, slots=True)
class DroppedQuery:
    """A query that is not kept, why, and for a near-duplicate of which one."""

    query: str
    group: str
    reason: str
    like: str | None = None
    similarity: float | None = None


@dataclass
class QueryRounds:
    """What a teacher wrote so far: `kept` in the order of the questions, and `dropped`.

    The order of the replies decides nothing, so that the same journal brings the same queries.
    `known` are the queries of earlier runs, by group; `note` hears how many are new.
    """

    interview: Interview
    duplicates: NearDuplicates
    coverage: Coverage
    known: Mapping[str, set[str]]
    note: Callable[[int], None]

    def __post_init__(self) -> None:
        """Nothing is asked yet."""
        self.kept: list[NewQuery] = []
        self.dropped: list[DroppedQuery] = []
        self.asked = self.unreadable = self.failed = 0
        self.stopped: str | None = None
        self._read = self._new = 0

    async def judge(self, queries: Sequence[str]) -> None:
        """Count which rules are exercised by queries that lie in the file already."""
        parts = [queries[place : place + _JUDGED] for place in range(0, len(queries), _JUDGED)]
        replies = await _all(self._exercised(part) for part in parts)
        for part, found in zip(parts, replies, strict=True):
            for rules in found or [None] * len(part):
                self.coverage.add(rules if found is None else rules or ())

    async def fill(self, questions: Iterator[Question], n: int) -> int:
        """Ask until `n` are kept, or too few are new; returns how many questions are used up."""
        used = dry = 0
        while len(self.kept) < n:
            read, new, unread = self._read, self._new, self.unreadable + self.failed
            asked = list(islice(questions, self._size(n - len(self.kept))))
            found = await self._round(asked, needed=True)
            for rows in found:
                room = n - len(self.kept)
                self._keep(rows[:room])
                if len(rows) > room:
                    return used
                used += 1
            read, new = self._read - read, self._new - new
            poor = new < _YIELD * read if read else self.unreadable + self.failed > unread
            dry = dry + 1 if poor else 0
            if dry == _DRY:
                self.stopped = f"under {_YIELD:.0%} of the queries were new in {_DRY} rounds"
                return used
        return used

    async def aim(self, ask: Callable[[int, int], Question], n: int) -> None:
        """Ask for queries of the rules that have none; of `n`, each rule gets a share at most."""
        share = max(1, n // max(1, len(self.coverage.rules)))
        for attempt in range(1, _AIMED + 1):
            numbers = self.coverage.uncovered
            found = await self._round([ask(number, attempt) for number in numbers])
            for number, rows in zip(numbers, found, strict=True):
                self._take(rows, number, n, share)
        if len(self.kept) == n:
            self.stopped = None

    def _size(self, missing: int) -> int:
        """How many questions it takes, by what the earlier ones brought."""
        if not self.asked:
            return min(_FIRST, ceil(missing / self.interview.count))
        expected = max(self._new / self.asked, self.interview.count / 2)
        return max(_LEAST, ceil(missing / expected))

    async def _round(
        self, questions: Sequence[Question], *, needed: bool = False
    ) -> list[list[NewQuery]]:
        """New queries of each question; where they are `needed`, raises if the teacher can't."""
        replies = await _all(self.interview.queries(question) for question in questions)
        unread = [one for one in replies if one.value is None]
        failed = sum(one.error is not None for one in unread)
        if needed and len(unread) == len(replies) and (failed == len(replies) or not self.asked):
            raise _nothing(unread)
        self.asked += len(questions)
        self.failed += failed
        self.unreadable += len(unread) - failed
        fresh = [self._fresh(*pair) for pair in zip(questions, replies, strict=True)]
        found = await _all(self._judged(rows) for rows in fresh)
        self._new += sum(map(len, found))
        return found

    def _fresh(self, question: Question, reply: ParsedReply[list[str]]) -> list[NewQuery]:
        """What a question brought that was not there."""
        group = f"synthesis-{digest(self.interview.request(question))[:12]}"
        known = self.known.get(group, set())
        queries = [query for query in reply.value or () if query not in known]
        self._read += len(queries)
        rows = []
        for query in queries:
            row = NewQuery(query, group, question.attributes, question.rule is not None)
            if not query:
                self._drop(row, EMPTY)
            elif match := self.duplicates.add(query):
                similarity = round(match.similarity, 3)
                self._drop(row, NEAR_DUPLICATE, like=match.text, similarity=similarity)
            else:
                rows.append(row)
        return rows

    async def _judged(self, rows: Sequence[NewQuery]) -> list[NewQuery]:
        """Those that are meant for the prompt, with the rules that they exercise."""
        found = await self._exercised([row.query for row in rows])
        if found is None:
            return list(rows)
        for row, rules in zip(rows, found, strict=True):
            if rules is None:
                self._drop(row, OFF_TOPIC)
        pairs = zip(rows, found, strict=True)
        return [replace(row, rules=rules) for row, rules in pairs if rules is not None]

    async def _exercised(self, queries: Sequence[str]) -> list[Exercised | None] | None:
        """None where there are no rules, or the teacher's judgement can't be had."""
        if not (queries and self.coverage.rules):
            return None
        return (await self.interview.exercised(self.coverage.rules, queries)).value

    def _take(self, rows: Sequence[NewQuery], number: int, n: int, share: int) -> None:
        """Keep what exercises a rule, in the place of queries that no rule needs."""
        taken = 0
        for row in rows:
            fits = number in (row.rules or ())
            if len(self.kept) < n:
                self._keep([row])
            elif not fits:
                self._drop(row, BESIDE)
            elif taken == share or not self._make_room():
                self._drop(row, SPARE)
            else:
                self._keep([row])
            taken += fits

    def _make_room(self) -> bool:
        """Drop the last query whose rules others exercise too."""
        for place in reversed(range(len(self.kept))):
            row = self.kept[place]
            if not row.aimed and self.coverage.spare(row.rules):
                del self.kept[place]
                self.coverage.remove(row.rules)
                self._drop(row, REPLACED)
                self.note(-1)
                return True
        return False

    def _keep(self, rows: Sequence[NewQuery]) -> None:
        self.kept += rows
        for row in rows:
            self.coverage.add(row.rules)
        self.note(len(rows))

    def _drop(self, row: NewQuery, reason: str, **why: Any) -> None:
        self.dropped.append(DroppedQuery(row.query, row.group, reason, **why))


async def _all(tasks: Iterable[Awaitable[T]]) -> list[T]:
    """All results in order; an error is raised when every request in flight has ended."""
    found = await asyncio.gather(*tasks, return_exceptions=True)
    errors = [one for one in found if isinstance(one, BaseException)]
    for error in sorted(errors, key=lambda one: type(one) is InterruptedError):
        raise error
    return [one for one in found if not isinstance(one, BaseException)]


def _nothing(replies: Sequence[ParsedReply[Any]]) -> GenerationError:
    return GenerationError(
        f"The teacher was asked for queries {len(replies)} times, and no reply was of use. The "
        f"first: {explained(replies[0])}. Paid replies are kept."
    )

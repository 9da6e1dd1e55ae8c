"""Queries from a prompt: the teacher writes them, varied, distinct, and for every rule."""

import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from math import ceil, prod
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar
from warnings import warn

from distill_datasets.errors import GenerationError, RecipeError
from distill_datasets.files import one_writer, writable_folder, write_file
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient, all_of, run_in_thread
from distill_datasets.generation.pricing import Meter
from distill_datasets.generation.rate_limit import Limits
from distill_datasets.models.sampler import Sampler, digest
from distill_datasets.progress import Progress, interruptible
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.synthesis.interview import (
    Interview,
    ParsedReply,
    QueryRequest,
    explained,
    open_teacher,
)
from distill_datasets.synthesis.query_file import AXES, ORIGIN, QueryFile, open_query_file
from distill_datasets.tables import html_card, html_table

if TYPE_CHECKING:
    from pandas import DataFrame
    from rensa import RMinHash

T = TypeVar("T")
Exercised = tuple[int, ...]
NEAR_DUPLICATE, OFF_TOPIC, EMPTY = "near-duplicate", "off topic", "empty"
BESIDE, SPARE, REPLACED = "beside its rule", "more than its rule needs", "gave way to a rule"
_FIRST = 8  # questions of the first round, which shows whether the teacher can do this at all
_LEAST = 4  # questions of any later one: a single one says little about the yield
_YIELD, _DRY = 0.05, 2  # less than this share of new queries, in so many rounds in a row
_AIMED = 3  # questions at most for a rule that no query exercises
_JUDGED = 20  # queries by hand that are judged in one request
_SUMMARY, _DROPPED = "synthesis.json", Path("synthesis") / "dropped.jsonl"
_EXAMPLES, _EXAMPLE_LENGTH = 3, 2000  # queries by hand that a request shows; their characters
_HASHES, _BANDS = 128, 32
_ERROR = 0.15  # more than three standard deviations of a similarity estimated from 128 hashes


@dataclass(frozen=True)
class Synthesized:
    """What `synthesize` left: the recipe's folder, and what became of the teacher's queries.

    `kept` are in the file now, `new` of them by this call, which `dropped` others, by reason.
    `stopped` says why there are fewer than were wanted. `summary` is what `synthesis.json` holds.
    """

    path: Path
    kept: int
    new: int
    dropped: Mapping[str, int]
    stopped: str | None
    summary: Mapping[str, Any]

    @property
    def uncovered_rules(self) -> tuple[str, ...]:
        """The rules that no query exercises."""
        return tuple(row["rule"] for row in self.summary["rules"] if not row["queries"])

    def sentence(self) -> str:
        """What became of the teacher's queries, in one line."""
        counts = {**self.dropped, "unreadable": self.summary["unreadable"]}
        counts["failed requests"] = self.summary["failed"]
        lost = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
        short = (
            f"; stopped short of {self.summary['wanted']}: {self.stopped}" if self.stopped else ""
        )
        return (
            f"{self.kept} queries by the teacher, {self.new} of them new, behind "
            f"{self.summary['by_hand']} by hand{f'; dropped: {lost}' if lost else ''}{short}"
        )

    def to_pandas(self) -> "DataFrame":
        """The rules of the prompt, and how many queries exercise each."""
        from pandas import DataFrame

        return DataFrame(self.summary["rules"])

    def _repr_html_(self) -> str:
        rules = [[row["number"], row["rule"], row["queries"]] for row in self.summary["rules"]]
        return html_card(
            f"Synthesized: {self.kept:,} queries in {self.path}",
            self.sentence(),
            html_table(rules, ["", "rule", "queries"]),
        )

    def table(self) -> str:
        """How many queries exercise each rule and have each attribute, as text."""
        rules = self.summary["rules"]
        lines = ["queries  rule"] if rules else []
        lines += [f"{row['queries']:>7}  {row['number']}. {row['rule']}" for row in rules]
        for name, counts in self.summary["balance"].items():
            least, most = min(counts.values()), max(counts.values())
            lines.append(f"{name}: {len(counts)} values, {least} to {most} queries each")
        return "\n".join(lines)


@interruptible
def synthesize(  # noqa: PLR0913 (whom to ask for how much, how fast, and where it goes)
    recipe: Recipe | str | Path,
    *,
    n: int,
    out: str | Path | None = None,
    teacher: Sampler | str | None = None,
    seed: int = 0,
    limits: Limits | None = None,
    meter: Meter | None = None,
) -> Synthesized:
    """Let the teacher write `n` queries for the recipe's prompt, behind those that are there.

    Rows go to the recipe's `queries.jsonl`, or with `out` to that of a copy of the recipe, with
    what was asked for in columns and one group for the queries of one request, so that a split
    never parts them; `recipe.yaml` names the group's column. Coverage and balance are in
    `synthesis.json`, raw replies and what was dropped in `synthesis/`. Rows of earlier calls
    count; the same call again asks nothing. With an `n` of 0 only the coverage of the queries
    that are there is taken. Costs two requests per ten queries, one per twenty by hand, and at
    most three for a rule that nothing exercises. Raises `RecipeError` for queries that can't be
    added to, and `GenerationError` for a teacher whose replies can't be used.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if n < 0:
        raise RecipeError(f"Expected a number of queries of 0 or more, found {n}.")
    if recipe.members:
        raise RecipeError(
            f"{recipe.name!r} has several prompts: let queries be written for each of its recipes, "
            f"{sorted(one.name for one in recipe.members.values())}."
        )
    file = open_query_file(recipe, out)
    if file.samples:
        warn(
            f"{file.samples} of the queries in {str(file.path)!r} are the samples that `new` wrote "
            "for another prompt: they are left out here. Remove them before you generate.",
            stacklevel=2,
        )
    folder = writable_folder(file.recipe.folder / "synthesis")
    asked, sampler = open_teacher(file.recipe, teacher)
    before = min(n, len(file.written))
    with (
        one_writer(folder, "synthesis"),
        Journal(folder / "journal.sqlite") as journal,
        Progress("synthesize", n, unit="queries", start=before, meter=meter) as progress,
    ):
        client = CachedClient(journal, progress, limits=limits, meter=meter)
        synthesis = _SynthesisRun(file, Interview(client, sampler, asked), seed)
        rounds = run_in_thread(lambda: synthesis.run(n, progress), stop=client.stop)
    return synthesis.save(rounds, n)


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


@dataclass
class QueryRounds:
    """What a teacher wrote so far: `kept` in the order of the questions, and `dropped`.

    The order of the replies decides nothing, so that the same journal brings the same queries.
    `known` are the queries of earlier runs, by group; `note` hears how many are new.
    """

    interview: Interview
    duplicates: "NearDuplicates"
    coverage: Coverage
    known: Mapping[str, set[str]]
    note: Callable[[int], None]

    def __post_init__(self) -> None:
        """Nothing is asked yet."""
        self.kept: list[NewQuery] = []
        self.dropped: list[dict[str, Any]] = []  # as the file of them has them
        self.asked = self.unreadable = self.failed = 0
        self.stopped: str | None = None
        self._read = self._new = 0

    async def judge(self, queries: Sequence[str]) -> None:
        """Count which rules are exercised by queries that lie in the file already."""
        parts = [queries[place : place + _JUDGED] for place in range(0, len(queries), _JUDGED)]
        replies = await all_of(self._exercised(part) for part in parts)
        for part, found in zip(parts, replies, strict=True):
            for rules in found or [None] * len(part):
                self.coverage.add(rules if found is None else rules or ())

    async def fill(self, questions: Iterator[QueryRequest], n: int) -> int:
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

    async def aim(self, ask: Callable[[int, int], QueryRequest], n: int) -> None:
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
        self, questions: Sequence[QueryRequest], *, needed: bool = False
    ) -> list[list[NewQuery]]:
        """New queries of each question; where they are `needed`, raises if the teacher can't."""
        replies = await all_of(self.interview.queries(question) for question in questions)
        unread = [one for one in replies if one.value is None]
        failed = sum(one.error is not None for one in unread)
        if needed and len(unread) == len(replies) and (failed == len(replies) or not self.asked):
            raise GenerationError(
                f"The teacher was asked for queries {len(unread)} times, and no reply was of use. "
                f"The first: {explained(unread[0])}. Paid replies are kept."
            )
        self.asked += len(questions)
        self.failed += failed
        self.unreadable += len(unread) - failed
        fresh = [self._fresh(*pair) for pair in zip(questions, replies, strict=True)]
        found = await all_of(self._judged(rows) for rows in fresh)
        self._new += sum(map(len, found))
        return found

    def _fresh(self, question: QueryRequest, reply: ParsedReply[list[str]]) -> list[NewQuery]:
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
        why = {"like": None, "similarity": None, **why}
        self.dropped.append({"query": row.query, "group": row.group, "reason": reason, **why})


class _SynthesisRun:
    """One call: what is in the file, what is asked, what is written."""

    def __init__(self, file: QueryFile, interview: Interview, seed: int) -> None:
        self.file, self.interview, self.seed = file, interview, seed
        self.recipe = file.recipe
        self._before = _read_summary(self.recipe.folder)
        self._place = 0
        self._order: str | None = None

    async def run(self, n: int, progress: Progress) -> QueryRounds:
        """Everything that is asked."""
        given = self.recipe.synthesis.rules or await self.interview.rules()
        tools = [one["function"] for one in json.loads(self.recipe.tools_text or "[]")]
        calls = [f"Calls the tool {one['name']}: {one['description']}".strip(": ") for one in tools]
        checked = [check.covers for check in self.recipe.checks if check.covers]
        rules = list(dict.fromkeys([*given, *calls, *checked]))
        duplicates = NearDuplicates(self.recipe.synthesis.similarity)
        for row in self.file.rows:
            duplicates.add(self.file.query(row))
        known: defaultdict[str, set[str]] = defaultdict(set)
        for row in self.file.written:
            known[str(row.get(self.file.columns["group"]))].add(self.file.query(row))
        rounds = QueryRounds(self.interview, duplicates, Coverage(rules), known, progress.advance)
        await self._judge(rounds, rules)
        missing = n - len(self.file.written)
        if missing > 0:
            topics = self.recipe.synthesis.topics or await self.interview.topics()
            await self._write(rounds, axes_of(self.recipe, topics), missing)
        return rounds

    async def _judge(self, rounds: QueryRounds, rules: Sequence[str]) -> None:
        """What is known of the rows is in them, while the rules are the same."""
        same = rules == [row["rule"] for row in self._before.get("rules", [])]
        unknown = []
        for row in self.file.rows:
            known = self.file.rules(row) if same and self.file.is_written(row) else None
            if known is None:
                unknown.append(self.file.query(row))
            else:
                rounds.coverage.add(known)
        await rounds.judge(unknown)

    async def _write(
        self, rounds: QueryRounds, axes: Mapping[str, Sequence[str]], missing: int
    ) -> None:
        self._order = digest([self.seed, {name: list(axes[name]) for name in axes}])[:12]
        if self._order == self._before.get("order"):
            self._place = self._before["questions"]
        questions = islice(self._questions(axes), self._place, None)
        self._place += await rounds.fill(questions, missing)
        rules = rounds.coverage.rules

        def aimed(number: int, attempt: int) -> QueryRequest:
            rule = rules[number - 1]
            seed = f"{self.seed} {rule}"
            chosen = next(islice(combinations(axes, seed), attempt - 1, None))
            return QueryRequest(chosen, self._examples(f"{seed} {attempt}"), rule)

        await rounds.aim(aimed, missing)

    def _questions(self, axes: Mapping[str, Sequence[str]]) -> Iterator[QueryRequest]:
        """One after the other, each decided by its place alone, whatever the replies are."""
        size = prod(map(len, axes.values()))
        for place, chosen in zip(count(), combinations(axes, self.seed), strict=False):
            examples = self._examples(f"{self.seed} {place}")
            yield QueryRequest(chosen, examples, again=place // size + 1)

    def _examples(self, seed: str) -> Sequence[str]:
        short = [one for one in self.file.queries_by_hand if len(one) <= _EXAMPLE_LENGTH]
        return Random(seed).sample(short, min(_EXAMPLES, len(short)))

    def save(self, rounds: QueryRounds, n: int) -> Synthesized:
        """The rows, and then what is to be said of them."""
        rows = [
            {
                "query": row.query,
                "group": row.group,
                **row.attributes,
                "rules": None if row.rules is None else list(row.rules),
                "origin": ORIGIN,
            }
            for row in rounds.kept
        ]
        if rows or self.file.written:
            self.file.append(rows)
        columns, coverage = self.file.columns.items(), rounds.coverage
        written = [{name: row.get(own) for name, own in columns} for row in self.file.written]
        summary = {
            "recipe": self.recipe.name,
            "teacher": self.interview.sampler.model,
            "seed": self.seed,
            "wanted": n,
            "by_hand": len(self.file.queries_by_hand),
            "kept": len(written) + len(rows),
            "new": len(rows),
            "balance": balance([*written, *rows]),
            "order": self._order or self._before.get("order"),
            "questions": self._place if self._order else self._before.get("questions", 0),
            "dropped": _save_dropped(self.recipe.folder / _DROPPED, rounds.dropped),
            "unreadable": rounds.unreadable,
            "failed": rounds.failed,
            "unjudged": coverage.unjudged,
            "stopped": rounds.stopped,
            "rules": coverage.table(),
            "uncovered": coverage.uncovered,
        }
        text = json.dumps(summary, ensure_ascii=False, indent=2)
        write_file(self.recipe.folder / _SUMMARY, text + "\n")
        dropped = Counter(row["reason"] for row in rounds.dropped)
        kept, new = len(written) + len(rows), len(rows)
        return Synthesized(self.recipe.folder, kept, new, dropped, rounds.stopped, summary)


def _read_summary(folder: Path) -> dict[str, Any]:
    """What an earlier call said; empty where there was none."""
    path = folder / _SUMMARY
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} can't be read: {error}. Remove it and run again.") from error
    return found


def _save_dropped(path: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """All that was ever dropped, counted by reason."""
    before = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    now = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines = [line for line in dict.fromkeys([*before, *now]) if line]
    if now:
        write_file(path, "".join(f"{line}\n" for line in lines))
    return dict(Counter(json.loads(line)["reason"] for line in lines))


def axes_of(recipe: Recipe, topics: Sequence[str]) -> dict[str, Sequence[str]]:
    """The values of every attribute; one without values is left to the teacher."""
    given = recipe.synthesis
    values = (
        topics,
        given.styles,
        given.lengths,
        given.languages or recipe.languages,
        given.difficulties,
        [str(count) for count in given.turns] if recipe.holds_conversations else (),
    )
    return {name: found for name, found in zip(AXES, values, strict=True) if found}


def combinations(axes: Mapping[str, Sequence[str]], seed: object) -> Iterator[dict[str, str]]:
    """Every combination once, then every one again, without end, in an order of the seed's.

    Of whatever many are taken, each value has had its share: first of the combinations that
    begin alike, then of all.
    """
    random = Random(str(seed))
    beginnings: Counter[tuple[str, ...]] = Counter()
    values: Counter[tuple[str, str]] = Counter()

    def choose(axis: str, before: tuple[str, ...]) -> str:
        options = list(axes[axis])
        random.shuffle(options)
        return min(options, key=lambda one: (beginnings[(*before, one)], values[axis, one]))

    while True:
        chosen: tuple[str, ...] = ()
        for axis in axes:
            value = choose(axis, chosen)
            chosen = (*chosen, value)
            beginnings[chosen] += 1
            values[axis, value] += 1
        yield dict(zip(axes, chosen, strict=True))


def balance(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """How many rows have each value of each attribute, the most frequent first."""
    counts = {
        name: Counter(row[name] for row in rows if row.get(name) is not None) for name in AXES
    }
    return {name: dict(found.most_common()) for name, found in counts.items() if found}


@dataclass(frozen=True, slots=True)
class Match:
    """The earlier text that a text repeats, and the share of shingles that both have."""

    text: str
    similarity: float


class NearDuplicates:
    """Texts of which no two have a Jaccard similarity of shingles of `threshold` or more.

    MinHash proposes pairs (128 hashes in 32 bands: of the pairs at 0.6 it misses 1 %, at 0.5
    one in eight), and the shingles themselves decide. Takes 0.03 ms for a sentence.
    """

    def __init__(self, threshold: float) -> None:
        """`threshold` of 1 leaves only texts that differ in case, width or spaces."""
        from rensa import RMinHashLSH

        self.threshold = threshold
        self._texts: list[str] = []
        self._places: dict[str, int] = {}
        self._hashed: list[RMinHash] = []
        self._index = RMinHashLSH(threshold=threshold, num_perm=_HASHES, num_bands=_BANDS)

    def add(self, text: str) -> Match | None:
        """Keep a text, or say which earlier one it repeats most."""
        from rensa import RMinHash

        plain = _plain(text)
        if plain in self._places:
            return Match(self._texts[self._places[plain]], 1.0)
        shingles = _shingles(plain)
        hashed = RMinHash(num_perm=_HASHES, seed=1)
        hashed.update(list(shingles))
        near = [
            (self._similarity(shingles, place), -place)
            for place in self._index.query(hashed)
            if hashed.jaccard(self._hashed[place]) >= self.threshold - _ERROR
        ]
        if near and max(near)[0] >= self.threshold:
            similarity, place = max(near)
            return Match(self._texts[-place], similarity)
        self._places[plain] = len(self._texts)
        self._index.insert(len(self._texts), hashed)
        self._texts.append(text)
        self._hashed.append(hashed)
        return None

    def _similarity(self, shingles: set[str], place: int) -> float:
        other = _shingles(_plain(self._texts[place]))
        return len(shingles & other) / len(shingles | other)


def _plain(text: str) -> str:
    """A text without case, width and spacing."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _shingles(plain: str) -> set[str]:
    """All runs of five characters, or of three where most are wide.

    An ideograph says as much as several letters: runs of five would leave no two sentences alike.
    """
    wide = 0 if plain.isascii() else sum(unicodedata.east_asian_width(one) in "WF" for one in plain)
    size = 3 if 2 * wide > len(plain) else 5
    return {plain[place : place + size] for place in range(max(1, len(plain) - size + 1))}

"""A run before it is paid for: every prompt rendered, and what asking them would take."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from heapq import nsmallest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.generation.cache import Journal
from distill_datasets.generation.estimate import (
    Heard,
    Load,
    Planned,
    Span,
    disk_bytes,
    follow_up,
    load_of,
    token_counter,
    total,
)
from distill_datasets.generation.ledger import ledger_digests
from distill_datasets.generation.pricing import Meter, Prices
from distill_datasets.generation.rate_limit import Limits
from distill_datasets.generation.rehearsal_text import rehearsal_text
from distill_datasets.generation.shards import Share
from distill_datasets.generation.teachers import Answerer, open_teachers
from distill_datasets.generation.trial import Sampled, ask_some
from distill_datasets.models.sampler import Sampler
from distill_datasets.progress import Progress
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.queries import load_queries
from distill_datasets.recipes.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

_COUNTED = 4_000  # requests whose tokens are counted; of more, about so many


@dataclass(frozen=True)
class Rehearsal:
    """What a run would take from here; `known` requests cost nothing, being answered already.

    `seconds` are those of the rows at `concurrency`, for servers that keep up with it; None where
    nothing was asked. `disk` is in bytes. `sample_cost` is what the sampled rows cost just now,
    and `sample_kept` whether the run will find them in its journal.
    """

    recipe: str
    queries: int
    requests: int
    known: int
    loads: tuple[Load, ...]
    concurrency: int
    seconds: float | None
    disk: Span
    currency: str | None
    priced_at: str | None
    sampled: tuple[Sampled, ...] = ()
    sample_cost: float | None = None
    sample_kept: bool = False
    notes: tuple[str, ...] = ()

    @property
    def cost(self) -> Span | None:
        """Of all models; None where one has no price."""
        costs = [load.cost for load in self.loads if load.cost is not None]
        return total(costs) if costs and len(costs) == len(self.loads) else None

    @property
    def data(self) -> dict[str, Any]:
        """For JSON."""
        cost = self.cost
        return {**asdict(self), "cost": asdict(cost) if cost else None}

    def text(self) -> str:
        """As a table for people."""
        return rehearsal_text(self.data)


def rehearse(  # noqa: PLR0913 (what `generate` takes, and how much to find out)
    recipe: Recipe | str | Path,
    *,
    teacher: Sampler | str | None = None,
    out: str | Path | None = None,
    prices: Prices | Path | str | None = None,
    sample: int = 0,
    concurrency: int = 256,
    limit: int | None = None,
    ledger: bool = True,
    share: Share | None = None,
) -> Rehearsal:
    """Find out what `generate` with the same choices would take, and write nothing.

    Tokens are counted where a model's tokenizer is on this machine, and guessed from bytes
    otherwise. `sample` rows, drawn at random and always the same, are asked for real and paid
    for: they say what responses cost and how long they take. Those answers go into the journal of
    `out`, where the run finds them; without `out` they are only shown. Raises what `generate`
    raises, and `PriceError` for a model without a price before anything is asked.
    """
    source = None if isinstance(recipe, Recipe) else recipe
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    known = Prices.load(prices) if isinstance(prices, str | Path) else prices
    queries = load_queries(recipe)
    queries = queries if limit is None else queries.select(range(min(limit, len(queries))))
    if share is not None:
        queries, out = share.of(queries), share.folder(out) if out is not None else None
    teachers = open_teachers(recipe, teacher)
    meter = Meter(known) if known else None
    if meter:
        meter.check(teachers.models)
    stage = _Stage(teachers, queries, _journal_of(out), meter)
    if source is not None and ledger:
        stage.answered |= ledger_digests(source)
    stage.ask(sample, Limits(concurrency))
    stage.plan()
    return stage.found(teachers.recipe, concurrency, known)


def _journal_of(out: str | Path | None) -> Path | None:
    return None if out is None else Path(out) / "journal.sqlite"


@dataclass
class _Stage:
    """What is found out on the way: requests by model, rows asked, and what is answered."""

    answering: Answerer
    queries: "Dataset"
    journal: Path | None
    meter: Meter | None
    answered: set[str] = field(default_factory=set)
    heard: Sequence[Heard] = ()
    sampled: Sequence[Sampled] = ()
    planned: dict[str, Planned] = field(default_factory=dict)
    requests: int = 0
    known: int = 0
    rows_left: int = 0

    def ask(self, count: int, limits: Limits) -> None:
        """Ask some rows for real, by the hashes of their queries: queries often come in cycles."""
        drawn = ((sha256(text.encode()).digest(), n) for n, text in enumerate(_texts(self.queries)))
        places = [place for _, place in nsmallest(count, drawn)]
        if places:
            some = self.queries.select(sorted(places)).to_list()
            trial = ask_some(
                self.answering, some, journal=self.journal, limits=limits, meter=self.meter
            )
            self.heard, self.sampled = trial.heard, trial.sampled

    def plan(self) -> None:
        """Render every request, and count those that are left to ask."""
        every = max(1, -(-len(self.queries) // _COUNTED))
        with ExitStack() as stack:
            journal = None
            if self.journal is not None and self.journal.is_file():
                journal = stack.enter_context(Journal(self.journal))
            progress = stack.enter_context(Progress("rehearse", len(self.queries)))
            for query in _texts(self.queries):
                self.rows_left += self._plan_row(query, journal, every)
                progress.advance(1)

    def _plan_row(self, query: str, journal: Journal | None, every: int) -> bool:
        """Whether something is left to ask for the row; one prompt in `every` is counted."""
        left = False
        for asking in self.answering.asked(query):
            key = asking.request_key(query)
            self.requests += 1
            if key in self.answered or (journal and _is_answered(journal, key)):
                self.known += 1
                continue
            self.answered.add(key)  # who asks the same again shares the answer
            identity = asking.sampler.identity
            planned = self.planned.setdefault(identity, Planned(asking.sampler))
            count = int(key[:8], 16) % every == 0
            planned.add(asking.messages(query), asking.sampling, count=count)
            left = True
        return left

    def found(self, recipe: Recipe, concurrency: int, prices: Prices | None) -> Rehearsal:
        """Everything put together."""
        loads = [
            load_of(planned, self._heard_of(identity, expected=True), prices)
            for identity, planned in self.planned.items()
        ]
        asked = sum(one.text is not None for one in self.sampled)
        for identity in dict.fromkeys(one.sampler.identity for one in self.heard):
            if self.rows_left and (heard := self._heard_of(identity, expected=False)):
                loads.append(follow_up(heard, asked, self.rows_left, prices))
        stated = any(one.reply.usage.cost is not None for one in self.heard)
        return Rehearsal(
            recipe=recipe.name,
            queries=len(self.queries),
            requests=self.requests,
            known=self.known,
            loads=tuple(loads),
            concurrency=concurrency,
            seconds=self._seconds(concurrency),
            disk=disk_bytes(list(self.planned.values()), self.heard, loads),
            currency=prices.currency if prices else ("USD" if stated else None),
            priced_at=prices.date.isoformat() if prices else None,
            sampled=tuple(self.sampled),
            sample_cost=self._sample_cost(),
            sample_kept=self.journal is not None,
            notes=tuple(self._notes(recipe)),
        )

    def _heard_of(self, identity: str, *, expected: bool) -> list[Heard]:
        return [
            one
            for one in self.heard
            if one.sampler.identity == identity and one.expected == expected
        ]

    def _seconds(self, concurrency: int) -> float | None:
        times = [one.seconds for one in self.sampled if one.seconds is not None]
        if not times:
            return None
        mean = sum(times) / len(times)
        return mean * max(self.rows_left / concurrency, 1.0) if self.rows_left else 0.0

    def _sample_cost(self) -> float | None:
        if self.meter is not None:
            return self.meter.spent
        costs = [one.reply.usage.cost for one in self.heard if one.bought]
        stated = [cost for cost in costs if cost is not None]
        return sum(stated) if stated and len(stated) == len(costs) else None

    def _notes(self, recipe: Recipe) -> Iterator[str]:
        if not self.sampled:
            yield (
                "Nothing was asked: a response has between one token and the most allowed, and "
                "the time is unknown. --sample 5 asks five rows for real."
            )
            if recipe.judge:
                yield "What the judge would be asked is not in it: --sample shows that too."
        failed = [one.problem for one in self.sampled if one.text is None]
        if failed:
            yield f"{len(failed)} of {len(self.sampled)} sampled rows failed: {failed[0]}"
        if any(token_counter(one.sampler) is None for one in self.planned.values()):
            yield (
                "A tokenizer that is not on this machine can't count: where tokens are guessed, a "
                "token is taken for four bytes, and for two to six in the bounds."
            )


def _is_answered(journal: Journal, key: str) -> bool:
    return journal.entry(key) is not None or journal.rejection(key) is not None


def _texts(queries: "Dataset") -> Iterator[str]:
    for some in queries.select_columns(["query"]).iter(batch_size=1_000):
        yield from some["query"]

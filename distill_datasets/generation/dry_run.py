"""What a run would take, before it is paid for: requests, tokens, money, time and disk.

Tokens, money and bytes are estimated with bounds, from a few requests that were made.
"""

import asyncio
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from heapq import nsmallest
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.conversations import readable
from distill_datasets.errors import DistillError, RequestError
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient, run_in_thread
from distill_datasets.generation.examples import most_answers
from distill_datasets.generation.ledger import ledger_digests, replay
from distill_datasets.generation.pricing import Meter, Prices
from distill_datasets.generation.run import ChosenRows, open_untouched, select_rows
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.generation.shards import Share
from distill_datasets.generation.teachers import (
    PromptedModel,
    Request,
    Teachers,
    known_requests,
    open_teachers,
)
from distill_datasets.models.sampler import Reply, Sampler, Sampling, request_digest, request_parts
from distill_datasets.progress import Progress, amount_text, interruptible
from distill_datasets.recipes.queries import HeldOutRows
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.schema import Message
from distill_datasets.tables import aligned, html_card, html_preformatted, one_line

if TYPE_CHECKING:
    from datasets import Dataset

# A token of UTF-8 text has about four bytes; from code and rare scripts to English prose it has
# between two and six, in today's tokenizers of large models.
_BYTES_A_TOKEN = (6.0, 4.0, 2.0)
_ERRORS = 2.0  # standard errors to either side
_STORED = 320  # bytes of a request in the journal beside its texts: digest, its index, JSON
_ROW = 200  # bytes of an answer's row beside its texts
_COUNTED = 4_000  # requests whose tokens are counted; of more, about so many
_SHOWN = 120  # characters of a sampled text


@dataclass(frozen=True)
class Span:
    """A number between two bounds; `expected` is None where nothing says what to expect."""

    low: float
    expected: float | None
    high: float

    @classmethod
    def exactly(cls, value: float) -> "Span":
        """A number that is known."""
        return cls(value, value, value)

    def __add__(self, other: "Span") -> "Span":
        known = self.expected is not None and other.expected is not None
        expected = (self.expected or 0) + (other.expected or 0) if known else None
        return Span(self.low + other.low, expected, self.high + other.high)

    def within(self, low: float, high: float) -> "Span":
        """The same, no wider than these bounds."""
        return Span(max(self.low, low), self.expected, min(self.high, high))

    def text(self, write: Callable[[float], str]) -> str:
        """As people read it, each number written by a function."""
        bounds = f"{write(self.low)} to {write(self.high)}"
        if self.expected is None:
            return bounds
        return write(self.expected) + ("" if self.low == self.high else f" ({bounds})")


@dataclass(frozen=True)
class ModelLoad:
    """What one model will be asked for and will cost, in what is left to ask."""

    model: str
    requests: int
    prompt: Span
    response: Span
    source: str
    cost: Span | None


@dataclass(frozen=True)
class SampledRequest:
    """A request that was really made, and what came.

    `size` is in bytes; `bought` says whether it was paid now, `expected` whether it was known
    before anybody answered, which a judge's is not.
    """

    sampler: Sampler
    size: int
    reply: Reply
    bought: bool
    expected: bool

    @property
    def prompt_tokens(self) -> int:
        """As the server counted them; 0 where it didn't."""
        return self.reply.usage.prompt_tokens or 0

    @property
    def response_tokens(self) -> int:
        """Of all samples."""
        return self.reply.response_tokens or 0


@dataclass
class PlannedRequests:
    """The requests that one model will get; `counted` pairs the sizes of some with their tokens.

    `unknown` answers to earlier turns will be in their prompts, of `most_unknown` tokens at most.
    """

    sampler: Sampler
    requests: int = 0
    size: int = 0
    samples: int = 0
    most_tokens: int = 0
    unknown: int = 0
    most_unknown: int = 0
    counted: list[tuple[float, float]] = field(default_factory=list)

    def add(
        self, messages: Sequence[Message], sampling: Sampling, *, count: bool, unknown: int = 0
    ) -> None:
        """One request more, its tokens counted where the model has a tokenizer here."""
        self.unknown += unknown
        self.most_unknown += unknown * sampling.max_tokens
        size = size_of(messages, sampling)
        self.requests += 1
        self.size += size
        self.samples += sampling.n
        self.most_tokens += sampling.n * sampling.max_tokens
        if count and (counter := token_counter(self.sampler)):
            self.counted.append((size, counter(messages, sampling)))

    def prompt(self, made: Sequence[SampledRequest]) -> tuple[Span, str]:
        """The prompts' tokens, and how they are known."""
        known, source = self._known(made)
        if not self.unknown:
            return known, source
        each = [one.response_tokens for one in made]
        answers = _each(each, self.unknown) if each else Span(self.unknown, None, self.most_unknown)
        answers = answers.within(self.unknown, self.most_unknown)
        return known + answers, f"{source}, and earlier answers"

    def _known(self, made: Sequence[SampledRequest]) -> tuple[Span, str]:
        """The tokens of what is known of the prompts."""
        if self.counted and len(self.counted) == self.requests:
            return Span.exactly(sum(tokens for _, tokens in self.counted)), "counted"
        if self.counted:
            found = scaled(self.counted, self.size, self.requests)
            return found, f"scaled from {len(self.counted):,} counted"
        guess = Span(*(self.size / ratio for ratio in _BYTES_A_TOKEN))
        if not made:
            return guess, "guessed from bytes"
        pairs = [(float(one.size), float(one.prompt_tokens)) for one in made]
        found = scaled(pairs, self.size, self.requests).within(guess.low, guess.high)
        return found, f"scaled from {len(pairs)} asked"

    def response(self, made: Sequence[SampledRequest]) -> Span:
        """The responses' tokens, between one each and the most allowed."""
        if not made:
            return Span(self.samples, None, self.most_tokens)
        found = _each([one.response_tokens for one in made], self.requests)
        return found.within(self.samples, self.most_tokens)


@dataclass(frozen=True)
class SampledRow:
    """A row that was really asked; `seconds` is None where the journal had its answer."""

    query: str
    text: str | None
    answer: str | None
    problem: str | None
    seconds: float | None

    def __str__(self) -> str:
        said = self.problem if self.text is None else self.text
        query, said = one_line(readable(self.query), _SHOWN), one_line(str(said), _SHOWN)
        read = f" -> {self.answer!r}" if self.answer is not None else ""
        dropped = f" [{self.problem}]" if self.problem and self.text is not None else ""
        return f"{query} | {said}{read}{dropped}"


@dataclass(frozen=True)
class DryRun:
    """What a run would take from here; `known` requests cost nothing, being answered already.

    `seconds` are those of the rows at `concurrency`, for servers that keep up with it; None where
    nothing was asked. `disk` is in bytes. `sample_cost` is what the sampled rows cost just now,
    and `sample_kept` whether the run will find them in its journal. `evidence` says what the test
    split can decide.
    """

    recipe: str
    queries: int
    requests: int
    known: int
    loads: tuple[ModelLoad, ...]
    concurrency: int
    seconds: float | None
    disk: Span
    currency: str | None
    priced_at: str | None
    sampled: tuple[SampledRow, ...] = ()
    sample_cost: float | None = None
    sample_kept: bool = False
    evidence: tuple[str, ...] = ()
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
        """For people: a table with a line a model, then time, disk, and what was really asked."""
        left = sum(load.requests for load in self.loads)
        lines = [
            f"{self.recipe}: {self.queries:,} queries, {self.requests:,} requests, "
            f"{self.known:,} of them answered already or asked twice, {left:,} to ask",
            "",
            aligned(self._cells()),
            "",
            f"time      {self._time()}",
            f"disk      {self.disk.text(_bytes)}",
        ]
        if self.sampled:
            lines += [f"sampled   {self._paid()}", *(f"          {one}" for one in self.sampled)]
        for place, line in enumerate(self.evidence):
            lines.append(f"{'' if place else 'evidence':<10}{line}")
        return "\n".join([*lines, *(f"note      {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        return html_card(f"A dry run of {self.recipe}", html_preformatted(self.text()))

    def _cells(self) -> Iterator[Sequence[str]]:
        priced = f"cost ({self.currency})" if self.currency else "cost"
        yield ["model", "requests", "prompt tokens", "", "response tokens", priced]
        for load in self.loads:
            yield [
                load.model,
                f"{load.requests:,}",
                load.prompt.text(_count),
                load.source,
                load.response.text(_count),
                load.cost.text(amount_text) if load.cost else "no price",
            ]
        if len(self.loads) > 1 and self.cost:
            yield ["all", "", "", "", "", self.cost.text(amount_text)]
        if self.priced_at:
            yield ["", "", "", "", "", f"at the prices of {self.priced_at}"]

    def _time(self) -> str:
        if self.seconds is None:
            return "unknown"
        at = f"with {self.concurrency} rows at once, where the servers keep up"
        if self.seconds < 120:
            return f"about {self.seconds:,.1f} s {at}"
        if self.seconds > 7200:
            return f"about {self.seconds / 3600:,.1f} h {at}"
        return f"{self.seconds / 60:,.0f} min {at}"

    def _paid(self) -> str:
        cost = self.sample_cost
        paid = "at no known price" if cost is None else f"for {amount_text(cost)} {self.currency}"
        kept = "kept in the journal" if self.sample_kept else "not kept: name --out to keep them"
        return f"{len(self.sampled)} rows {paid}, {kept}"


@dataclass
class _Plan:
    """The requests by the sampler's identity, apart from those for rows of a mix; all, those
    `answered` already, rows left to ask. One prompt in `every` so many is counted.
    """

    answered: "_KnownAnswers"
    every: int
    by_model: dict[str, PlannedRequests] = field(default_factory=dict)
    mixed: dict[str, PlannedRequests] = field(default_factory=dict)
    requests: int = 0
    known: int = 0
    rows_left: int = 0

    def add(
        self,
        asked: PromptedModel,
        requests: Iterable[tuple[Request, int]],
        planned: dict[str, PlannedRequests],
    ) -> bool:
        """The requests of a query, to those that are `planned`; whether any is left to ask."""
        left = False
        for request, unknown in requests:
            self.requests += 1
            if self.answered.holds(request.key):
                self.known += 1
                continue
            self.answered.digests.add(request.key)  # who asks it again shares the answer
            one = planned.setdefault(asked.identity, PlannedRequests(asked.sampler))
            count = int(request.key[:8], 16) % self.every == 0
            one.add(request.messages, request.sampling, count=count, unknown=unknown)
            left = True
        return left


@interruptible
def dry_run(  # noqa: PLR0913 (what `generate` takes, and how much to find out)
    recipe: Recipe | str | Path,
    *,
    teacher: Sampler | str | None = None,
    out: str | Path | None = None,
    prices: Prices | Path | str | None = None,
    sample: int = 0,
    settings: GenerateSettings | None = None,
    share: Share | None = None,
) -> DryRun:
    """Find out what `generate` with the same choices would take, and write nothing.

        print(dry_run("language_id", prices="prices.yaml", sample=5).text())

    Tokens are counted where a model's tokenizer is on this machine, and guessed from bytes
    otherwise. `sample` rows, drawn at random and always the same, are asked for real and paid
    for; their answers go into the journal of `out`, where the run finds them. Raises what
    `generate` raises, and `PriceError` for a model without a price before anything is asked.
    """
    settings = settings or GenerateSettings()
    teachers = open_teachers(recipe, teacher, trust=settings.trust)
    priced = Prices.load(prices) if isinstance(prices, str | Path) else prices
    untouched = open_untouched(teachers.recipe, settings)
    if meter := Meter(priced) if priced else None:
        meter.check([*teachers.models, *(one.model for one in untouched.values())])
    chosen = select_rows(teachers.recipe, untouched, settings, share)
    folder = share.folder(out) if share and out is not None else out
    journal = None if folder is None else Path(folder) / "journal.sqlite"
    sampled, made = _ask_some(teachers, _draw(chosen.queries, sample), journal, settings, meter)
    known = _KnownAnswers.of(journal, recipe if settings.ledger else None, teachers.recipe)
    with known as answered:
        plan = _plan(teachers, chosen, answered)
    loads = (*_loads(plan, made, sum(one.text is not None for one in sampled), priced),)
    return DryRun(
        recipe=teachers.recipe.name,
        queries=len(chosen.queries),
        requests=plan.requests,
        known=plan.known,
        loads=loads,
        concurrency=settings.concurrency,
        seconds=_seconds(sampled, plan.rows_left, settings.concurrency),
        disk=disk_bytes([*plan.by_model.values(), *plan.mixed.values()], made, loads),
        currency=priced.currency if priced else _stated_currency(made),
        priced_at=priced.date.isoformat() if priced else None,
        sampled=tuple(sampled),
        sample_cost=meter.spent if meter else _stated_cost(made),
        sample_kept=journal is not None,
        evidence=() if share else (*HeldOutRows.of(teachers.recipe, chosen.queries).lines(),),
        notes=(*_notes(teachers.recipe, plan, sampled),),
    )


def _draw(queries: "Dataset", count: int) -> list[dict[str, Any]]:
    """Some rows, by the hashes of their queries: queries often come in cycles."""
    drawn = ((sha256(text.encode()).digest(), n) for n, text in enumerate(_texts(queries)))
    places = sorted(place for _, place in nsmallest(count, drawn))
    rows: list[dict[str, Any]] = queries.select(places).to_list()
    return rows


def _ask_some(
    teachers: Teachers,
    rows: Sequence[dict[str, Any]],
    journal: Path | None,
    settings: GenerateSettings,
    meter: Meter | None,
) -> tuple[list[SampledRow], list[SampledRequest]]:
    """Ask rows for real, which costs: the rows, and every request that they took.

    A row that fails is one with a problem; raises what no row would escape.
    """
    if not rows:
        return [], []
    with ExitStack() as stack:
        path = journal or Path(stack.enter_context(tempfile.TemporaryDirectory()), "journal")
        answers = stack.enter_context(Journal(path))
        progress = stack.enter_context(Progress("sample", len(rows), meter=meter))
        client = CachedClient(answers, progress, limits=settings.limits, meter=meter)
        asked = [_RowClient(client) for _ in rows]

        async def ask_all() -> list[SampledRow | BaseException]:
            work = [_ask_row(teachers, *one) for one in zip(rows, asked, strict=True)]
            return await asyncio.gather(*work, return_exceptions=True)

        found = run_in_thread(ask_all, stop=client.stop)
    for one in found:
        if isinstance(one, DistillError) and not isinstance(one, RequestError):
            raise one
    sampled = [
        one
        if isinstance(one, SampledRow)
        else SampledRow(row["query"], None, None, f"{type(one).__name__}: {one}", None)
        for row, one in zip(rows, found, strict=True)
    ]
    return sampled, [request for one in asked for request in one.made]


async def _ask_row(teachers: Teachers, row: dict[str, Any], client: "_RowClient") -> SampledRow:
    query = row["query"]
    if teachers.recipe.turns != "all":
        client.expected = {one.request_key(query) for one in teachers.asked(query)}
    began = time.monotonic()
    first, *_ = await teachers.answer(query, client, row["reference"])
    seconds = time.monotonic() - began if any(one.bought for one in client.made) else None
    client.shared.progress.advance(1)
    return SampledRow(query, first.get("raw"), first.get("answer"), first.get("rejection"), seconds)


class _RowClient:
    """Asks for one row, and remembers what was asked and what came."""

    def __init__(self, shared: CachedClient) -> None:
        self.shared = shared
        self.made: list[SampledRequest] = []
        self.expected: Collection[str] | None = None  # every one

    async def sample(
        self, sampler: Sampler, messages: Sequence[Message], sampling: Sampling
    ) -> Reply:
        """As the shared client does."""
        key = request_digest(sampler.identity, messages, sampling)
        known = self.shared.journal.entry(key) is not None
        reply = await self.shared.sample(sampler, messages, sampling)
        expected = self.expected is None or key in self.expected
        self.made.append(
            SampledRequest(sampler, size_of(messages, sampling), reply, not known, expected)
        )
        return reply


@dataclass
class _KnownAnswers:
    """What needs no asking: requests by their digests, and journals that have their answers."""

    digests: set[str]
    journals: Sequence[Journal] = ()

    @classmethod
    @contextmanager
    def of(
        cls, journal: Path | None, given: Recipe | str | Path | None, recipe: Recipe
    ) -> Iterator["_KnownAnswers"]:
        """What a run's journal, and the ledger of the release that its recipe is of, hold.

        The answers in a ledger are read only where they decide what else is asked.
        """
        release = None if isinstance(given, Recipe) else given
        digests = set() if release is None else ledger_digests(release)
        with ExitStack() as stack:
            paths = [journal] if journal and journal.is_file() else []
            if digests and release is not None and recipe.turns == "all":
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                replay(release, scratch)
                paths.append(scratch / "journal.sqlite")
            yield cls(digests, [stack.enter_context(Journal(path)) for path in paths])

    def holds(self, key: str) -> bool:
        """Whether a request was answered, or rejected for good."""
        return key in self.digests or any(
            one.entry(key) is not None or one.rejection(key) is not None for one in self.journals
        )

    def get(self, key: str) -> Reply | None:
        """The answer to a request, where a journal has it."""
        return next(filter(None, (one.get(key) for one in self.journals)), None)


def _plan(teachers: Teachers, chosen: ChosenRows, answered: _KnownAnswers) -> _Plan:
    """Render every request, and count those that are left to ask; one prompt in some is counted."""
    asked = [(one.model, one.rows) for one in chosen.mixed if one.model]
    rows = len(chosen.queries) + sum(len(some) for _, some in asked)
    plan = _Plan(answered, max(1, -(-rows // _COUNTED)))
    with Progress("dry run", rows) as progress:
        for query in _texts(chosen.queries):
            left = False
            for one in teachers.asked(query):
                requests = _requests(teachers.recipe, one, query, answered)
                left |= plan.add(one, requests, plan.by_model)
            plan.rows_left += left
            progress.advance(1)
        for model, some in asked:
            for query in _texts(some):
                request = Request(model.request_key(query), *model.request(query))
                plan.add(model, [(request, 0)], plan.mixed)
                progress.advance(1)
    return plan


def _requests(
    recipe: Recipe, model: PromptedModel, query: str, answered: _KnownAnswers
) -> Iterator[tuple[Request, int]]:
    """What a query asks of a model, and how many answers of turns before it aren't known.

    Empty ones are in the place of those.
    """
    asked, found = (model.identity, model.sampling), list[Request]()
    for request in known_requests(recipe, asked, query, answered.get):
        yield request, 0
        found.append(request)
    turns = recipe.turns_of(query)
    if len(found) < turns and answered.get(found[-1].key) is None:
        for turn in range(len(found), turns):
            asks = model.request(query, [""] * turn)
            yield Request(request_digest(found[-1].key, *asks), *asks), turn - len(found) + 1


def _texts(queries: "Dataset") -> Iterator[str]:
    for some in queries.select_columns(["query"]).iter(batch_size=1_000):
        yield from some["query"]


def _loads(
    plan: _Plan, made: Sequence[SampledRequest], asked: int, prices: Prices | None
) -> list[ModelLoad]:
    """Those of the planned requests, then of models, like a judge, that nobody can plan for."""

    def of(identity: str, *, expected: bool) -> list[SampledRequest]:
        return [
            one for one in made if one.sampler.identity == identity and one.expected == expected
        ]

    loads = [
        load_of(planned, of(identity, expected=True), prices)
        for identity, planned in plan.by_model.items()
    ]
    for planned in plan.mixed.values():
        load = load_of(planned, [], prices)
        loads.append(replace(load, model=f"{load.model} (mix)"))
    for identity in dict.fromkeys(one.sampler.identity for one in made):
        if plan.rows_left and (found := of(identity, expected=False)):
            loads.append(follow_up(found, asked, plan.rows_left, prices))
    return loads


def _seconds(sampled: Sequence[SampledRow], rows_left: int, concurrency: int) -> float | None:
    times = [one.seconds for one in sampled if one.seconds is not None]
    if not times:
        return None
    mean = sum(times) / len(times)
    return mean * max(rows_left / concurrency, 1.0) if rows_left else 0.0


def _stated_currency(made: Sequence[SampledRequest]) -> str | None:
    return "USD" if any(one.reply.usage.cost is not None for one in made) else None


def _stated_cost(made: Sequence[SampledRequest]) -> float | None:
    """What providers said that the requests cost, where all of them did."""
    costs = [one.reply.usage.cost for one in made if one.bought]
    stated = [cost for cost in costs if cost is not None]
    return sum(stated) if stated and len(stated) == len(costs) else None


def _notes(recipe: Recipe, plan: _Plan, sampled: Sequence[SampledRow]) -> Iterator[str]:
    if not sampled:
        yield (
            "Nothing was asked: a response has between one token and the most allowed, and "
            "the time is unknown. --sample 5 asks five rows for real."
        )
        if recipe.judge:
            yield "What the judge would be asked is not in it: --sample shows that too."
    if chosen := most_answers(recipe):
        yield (
            f"Choosing the examples takes up to {chosen:,} answers more, of which those of the "
            "development rows with the choice are used again; the prompt tokens are those of the "
            "first examples in the file."
        )
    if any(one.unknown for one in plan.by_model.values()):
        yield "Later turns hold the answers to earlier ones, of one token to the most allowed each."
    if plan.mixed and sampled:
        yield "Of the rows of the mix none is sampled: what they take is bounded, not scaled."
    failed = [one.problem for one in sampled if one.text is None]
    if failed:
        yield f"{len(failed)} of {len(sampled)} sampled rows failed: {failed[0]}"
    if any(
        token_counter(one.sampler) is None
        for one in [*plan.by_model.values(), *plan.mixed.values()]
    ):
        yield (
            "A tokenizer that is not on this machine can't count: where tokens are guessed, a "
            "token is taken for four bytes, and for two to six in the bounds."
        )


def _count(value: float) -> str:
    return f"{round(value):,}"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1_000:
            return f"{value:,.0f} {unit}"
        value /= 1_000
    return f"{value:,.1f} TB"


def total(spans: Iterable[Span]) -> Span:
    """Of all of them."""
    return sum(spans, start=Span.exactly(0.0))


def scaled(pairs: Sequence[tuple[float, float]], size: float, count: int) -> Span:
    """What `count` things of this `size` in all come to, from pairs of size and amount.

    By the ratio of amount to size, give or take two standard errors; of one pair the error is
    not known, and the bounds are the widest.
    """
    ratio = sum(amount for _, amount in pairs) / max(sum(one for one, _ in pairs), 1e-9)
    expected = ratio * size
    if len(pairs) < 2:
        return Span(0.0, expected, float("inf"))
    strays = sum((amount - ratio * one) ** 2 for one, amount in pairs) / (len(pairs) - 1)
    error = _ERRORS * sqrt(strays / len(pairs)) * count
    return Span(max(expected - error, 0.0), expected, expected + error)


def size_of(messages: Sequence[Message], sampling: Sampling) -> int:
    """Bytes of what a request has a model read."""
    texts, written = request_parts(messages, sampling)
    return sum(len(text.encode()) for text in [*texts, *written])


def load_of(
    planned: PlannedRequests, made: Sequence[SampledRequest], prices: Prices | None
) -> ModelLoad:
    """A model's load from its planned requests and those of it that were really made."""
    sampler, requests = planned.sampler, planned.requests
    (prompt, source), response = planned.prompt(made), planned.response(made)
    cost = _cost(sampler, prompt, response, made, prices, requests)
    return ModelLoad(sampler.model, requests, prompt, response, source, cost)


def follow_up(
    made: Sequence[SampledRequest], asked: int, left: int, prices: Prices | None
) -> ModelLoad:
    """The load of a model that nobody can plan for, a judge's: as in the rows that were asked."""
    sampler, requests = made[0].sampler, round(len(made) * left / asked)
    prompt = _bounded([one.prompt_tokens for one in made], requests)
    response = _bounded([one.response_tokens for one in made], requests)
    cost = _cost(sampler, prompt, response, made, prices, requests)
    source = f"as in the {asked} rows asked"
    return ModelLoad(sampler.model, requests, prompt, response, source, cost)


def disk_bytes(
    planned: Iterable[PlannedRequests], made: Sequence[SampledRequest], loads: Sequence[ModelLoad]
) -> Span:
    """What the journal and the answers will take: a response is in the first once, in them twice.

    From tokens where no response was seen; a token has four bytes then, and two to six of them.
    """
    fixed, texts = 0.0, Span.exactly(0.0)
    for one, load in zip(planned, loads, strict=False):
        fixed += one.requests * _STORED + one.samples * _ROW
        of_model = [each.reply for each in made if each.sampler.identity == one.sampler.identity]
        sizes = [sum(len(sample.text.encode()) for sample in each.samples) for each in of_model]
        bound = one.most_tokens * _BYTES_A_TOKEN[1]
        texts += (
            _each(sizes, one.requests).within(0, bound)
            if sizes
            else Span(load.response.low, None, bound)
        )
    expected = None if texts.expected is None else fixed + 3 * texts.expected
    return Span(fixed + 3 * texts.low, expected, fixed + 3 * texts.high)


def token_counter(sampler: Sampler) -> Callable[[Sequence[Message], Sampling], int] | None:
    """How a sampler's prompts are counted here, as its server would; None where nothing can.

    Takes the chat format and the tokenizer of its connection; nothing is downloaded for others.
    """
    connection = getattr(sampler, "connection", None)
    if connection is None:
        return None

    def count(messages: Sequence[Message], sampling: Sampling) -> int:
        prompt = connection.renderer.build_generation_prompt(messages, tools=sampling.tools)
        return int(prompt.length)

    return count


def _each(amounts: Sequence[float], requests: int) -> Span:
    """What requests come to, from the amounts of some."""
    return scaled([(1.0, float(amount)) for amount in amounts], requests, requests)


def _bounded(amounts: Sequence[float], requests: int) -> Span:
    """The same, with at most twice the largest amount for each."""
    return _each(amounts, requests).within(0, 2 * requests * max(amounts))


def _cost(  # noqa: PLR0913 (of one model, all that its cost depends on)
    sampler: Sampler,
    prompt: Span,
    response: Span,
    made: Sequence[SampledRequest],
    prices: Prices | None,
    requests: int,
) -> Span | None:
    """As providers stated it for the requests made, else by the price file.

    By that, everything comes from the cache at best, and nothing at worst.
    """
    stated = [one.reply.usage.cost for one in made]
    costs = [cost for cost in stated if cost is not None]
    if costs and len(costs) == len(stated) and (prices is None or prices.currency == "USD"):
        return _bounded(costs, requests)
    if prices is None:
        return None
    price, expected = prices.of(sampler.identity), None
    if prompt.expected is not None and response.expected is not None:
        tokens = sum(one.prompt_tokens for one in made)
        share = sum(one.reply.usage.cached_tokens for one in made) / tokens if tokens else 0
        expected = price.of(prompt.expected, prompt.expected * share, response.expected)
    low = price.of(prompt.low, prompt.low, response.low)
    return Span(low, expected, price.of(prompt.high, 0, response.high))

"""What a run would take, before it is paid for: requests, tokens, money, time and disk.

Tokens, money and bytes are estimated with bounds, from a few requests that were made.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from heapq import nsmallest
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.conversations import readable
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient, all_of, outcome, run_in_thread
from distill_datasets.generation.examples import most_answers
from distill_datasets.generation.ledger import take_over
from distill_datasets.generation.pricing import Meter, Prices
from distill_datasets.generation.rows import query_texts
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

_COUNTED = 4_000  # requests whose tokens are counted; of more, about so many
_SHOWN = 120  # characters of a sampled text
# A token of UTF-8 text has about four bytes; from code and rare scripts to English prose it has
# between two and six, in today's tokenizers of large models.
_BYTES_A_TOKEN = (6.0, 4.0, 2.0)
_ERRORS = 2.0  # standard errors to either side
_STORED = 320  # bytes of a request in the journal beside its texts: digest, its index, JSON
_ROW = 200  # bytes of an answer's row beside its texts


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

    def text(self, write: Callable[[float], str] = "{:,.0f}".format) -> str:
        """As people read it, each number written by a function."""
        bounds = f"{write(self.low)} to {write(self.high)}"
        if self.expected is None:
            return bounds
        return write(self.expected) + ("" if self.low == self.high else f" ({bounds})")


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


def _each(amounts: Sequence[float], requests: int) -> Span:
    """What requests come to, from the amounts of some."""
    return scaled([(1.0, float(amount)) for amount in amounts], requests, requests)


def _bounded(amounts: Sequence[float], requests: int) -> Span:
    """The same, with at most twice the largest amount for each."""
    return _each(amounts, requests).within(0, 2 * requests * max(amounts))


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
class ModelLoad:
    """What one model will be asked for, will cost and will leave on disk, in what is left to ask.

    `source` says how the prompts' tokens are known.
    """

    model: str
    requests: int
    prompt: Span
    response: Span
    source: str
    disk: Span = Span.exactly(0)
    cost: Span | None = None


@dataclass(frozen=True)
class DryRun:
    """What a run would take from here; `known` requests cost nothing, being answered already.

    `seconds` are those of the rows at `concurrency`, for servers that keep up with it; None where
    nothing was asked. `sample_cost` is what the sampled rows cost just now, and `sample_kept`
    whether the run will find them in its journal. `evidence` says what the test split can decide.
    """

    recipe: str
    queries: int
    requests: int
    known: int
    loads: tuple[ModelLoad, ...]
    concurrency: int
    seconds: float | None
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
    def disk(self) -> Span:
        """Bytes of the journal and the answers."""
        return total(load.disk for load in self.loads)

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
            paid, kept = "at no known price", "not kept: name --out to keep them"
            if self.sample_cost is not None:
                paid = f"for {amount_text(self.sample_cost)} {self.currency}"
            if self.sample_kept:
                kept = "kept in the journal"
            lines.append(f"sampled   {len(self.sampled)} rows {paid}, {kept}")
            lines += [f"          {one}" for one in self.sampled]
        for place, line in enumerate(self.evidence):
            lines.append(f"{'' if place else 'evidence':<10}{line}")
        return "\n".join([*lines, *(f"note      {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        return html_card(f"A dry run of {self.recipe}", html_preformatted(self.text()))

    def _cells(self) -> Iterator[Sequence[str]]:
        priced = f"cost ({self.currency})" if self.currency else "cost"
        yield ["model", "requests", "prompt tokens", "", "response tokens", priced]
        for load in self.loads:
            cost = load.cost.text(amount_text) if load.cost else "no price"
            tokens = load.prompt.text(), load.source, load.response.text()
            yield [load.model, f"{load.requests:,}", *tokens, cost]
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


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1_000:
            return f"{value:,.0f} {unit}"
        value /= 1_000
    return f"{value:,.1f} TB"


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
    release = None if isinstance(recipe, Recipe) or not settings.ledger else recipe
    with _open_journals(journal, release) as journals:
        plan = _Plan.of(teachers, chosen, journals)
    bought = _stated([one for one in made if one.bought])
    in_dollars = any(one.reply.usage.cost is not None for one in made)
    return DryRun(
        recipe=teachers.recipe.name,
        queries=len(chosen.queries),
        requests=plan.requests,
        known=plan.known,
        loads=(*plan.loads(made, sum(one.text is not None for one in sampled), priced),),
        concurrency=settings.concurrency,
        seconds=plan.seconds(sampled, settings.concurrency),
        currency=priced.currency if priced else "USD" if in_dollars else None,
        priced_at=priced.date.isoformat() if priced else None,
        sampled=tuple(sampled),
        sample_cost=meter.spent if meter else sum(bought) if bought else None,
        sample_kept=journal is not None,
        evidence=() if share else (*HeldOutRows.of(teachers.recipe, chosen.queries).lines(),),
        notes=(*_notes(teachers.recipe, plan, sampled),),
    )


@dataclass(frozen=True)
class _SampledRequest:
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


class _RowClient:
    """Asks for one row, and remembers what was asked and what came."""

    def __init__(self, shared: CachedClient, expected: set[str] | None) -> None:
        """The requests that are `expected`, by their digests; None for every one."""
        self._shared, self._expected = shared, expected
        self.made: list[_SampledRequest] = []

    async def sample(
        self, sampler: Sampler, messages: Sequence[Message], sampling: Sampling
    ) -> Reply:
        """As the shared client does."""
        key = request_digest(sampler.identity, messages, sampling)
        known = self._shared.journal.entry(key) is not None
        reply = await self._shared.sample(sampler, messages, sampling)
        expected = self._expected is None or key in self._expected
        size = _size_of(messages, sampling)
        self.made.append(_SampledRequest(sampler, size, reply, not known, expected))
        return reply


def _draw(queries: "Dataset", count: int) -> list[dict[str, Any]]:
    """Some rows, by the hashes of their queries: queries often come in cycles."""
    drawn = ((sha256(text.encode()).digest(), n) for n, text in enumerate(query_texts(queries)))
    places = sorted(place for _, place in nsmallest(count, drawn))
    rows: list[dict[str, Any]] = queries.select(places).to_list()
    return rows


def _ask_some(
    teachers: Teachers,
    rows: Sequence[dict[str, Any]],
    journal: Path | None,
    settings: GenerateSettings,
    meter: Meter | None,
) -> tuple[list[SampledRow], list[_SampledRequest]]:
    """Ask rows for real, which costs: the rows, and every request that they took.

    A row that fails is one with a problem; raises what no row would escape.
    """
    if not rows:
        return [], []
    made: list[_SampledRequest] = []

    async def ask(row: dict[str, Any], shared: CachedClient) -> SampledRow:
        query, expected = row["query"], None
        if teachers.recipe.turns != "all":
            expected = {one.request_key(query) for one in teachers.asked(query)}
        client, began = _RowClient(shared, expected), time.monotonic()
        found = await outcome(teachers.answer(query, client, row["reference"]))
        made.extend(client.made)
        if isinstance(found, Exception):
            return SampledRow(query, None, None, f"{type(found).__name__}: {found}", None)
        bought = any(one.bought for one in client.made)
        seconds = time.monotonic() - began if bought else None
        shared.progress.advance(1)
        text, answer, problem = (found[0].get(name) for name in ("raw", "answer", "rejection"))
        return SampledRow(query, text, answer, problem, seconds)

    with ExitStack() as stack:
        path = journal or Path(stack.enter_context(tempfile.TemporaryDirectory()), "journal")
        answers = stack.enter_context(Journal(path))
        progress = stack.enter_context(Progress("sample", len(rows), meter=meter))
        client = CachedClient(answers, progress, limits=settings.limits, meter=meter)
        asked = run_in_thread(lambda: all_of(ask(row, client) for row in rows), stop=client.stop)
    return asked, made


@contextmanager
def _open_journals(journal: Path | None, release: str | Path | None) -> Iterator[list[Journal]]:
    """What a run will find: its journal, and the ledger of the release that its recipe is of."""
    with ExitStack() as stack:
        paths = [journal] if journal and journal.is_file() else []
        if release is not None:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            paths += [scratch / "journal.sqlite"] if take_over(release, scratch) else []
        yield [stack.enter_context(Journal(path)) for path in paths]


@dataclass
class _PlannedRequests:
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

    def add(self, request: Request, unknown: int, *, count: bool) -> None:
        """One request more, its tokens counted where the model has a tokenizer here."""
        sampling, size = request.sampling, _size_of(request.messages, request.sampling)
        self.unknown += unknown
        self.most_unknown += unknown * sampling.max_tokens
        self.requests += 1
        self.size += size
        self.samples += sampling.n
        self.most_tokens += sampling.n * sampling.max_tokens
        if count and (connection := _connection(self.sampler)):
            renderer, tools = connection.renderer, sampling.tools
            prompt = renderer.build_generation_prompt(request.messages, tools=tools)
            self.counted.append((size, int(prompt.length)))

    def load(self, made: Sequence[_SampledRequest], prices: Prices | None) -> ModelLoad:
        """What they come to, by those of them that were really made.

        A response is on disk three times, in the journal once and in the answers twice.
        """
        prompt, source = self._prompt(made)
        if self.unknown:
            source = f"{source}, and earlier answers"
            each = [one.response_tokens for one in made]
            answers = _each(each, self.unknown) if each else Span(0, None, self.most_unknown)
            prompt += answers.within(self.unknown, self.most_unknown)
        # From tokens where no response was seen; one has four bytes then, and two to six of them.
        most_bytes = self.most_tokens * _BYTES_A_TOKEN[1]
        response, texts = Span(self.samples, None, self.most_tokens), Span(0, None, most_bytes)
        if made:
            tokens = _each([one.response_tokens for one in made], self.requests)
            response = tokens.within(self.samples, self.most_tokens)
            sizes = [sum(len(said.text.encode()) for said in one.reply.samples) for one in made]
            texts = _each(sizes, self.requests).within(0, most_bytes)
        fixed = Span.exactly(self.requests * _STORED + self.samples * _ROW)
        disk = total([fixed, texts, texts, texts])
        load = ModelLoad(self.sampler.model, self.requests, prompt, response, source, disk)
        return _priced(load, self.sampler, made, prices)

    def _prompt(self, made: Sequence[_SampledRequest]) -> tuple[Span, str]:
        """The tokens of what is known of the prompts, and how that is known."""
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


@dataclass
class _Plan:
    """All requests, those that are `known` from the journals, and the rows left to ask.

    What is left is planned by the sampler's identity, and apart for rows of a `mix`. One prompt in
    `every` so many is counted.
    """

    journals: Sequence[Journal]
    every: int
    asked: set[str] = field(default_factory=set)
    planned: dict[tuple[str, bool], _PlannedRequests] = field(default_factory=dict)
    requests: int = 0
    known: int = 0
    rows_left: int = 0

    @classmethod
    def of(cls, teachers: Teachers, chosen: ChosenRows, journals: Sequence[Journal]) -> "_Plan":
        """Render every request."""
        asked = [(one.model, one.rows) for one in chosen.mixed if one.model]
        rows = len(chosen.queries) + sum(len(some) for _, some in asked)
        plan = cls(journals, max(1, -(-rows // _COUNTED)))
        with Progress("dry run", rows) as progress:
            for query in query_texts(chosen.queries):
                left = False
                for one in teachers.asked(query):
                    asks = plan._asks(teachers.recipe, one, query)
                    left |= plan._add(one, asks, mix=False)
                plan.rows_left += left
                progress.advance(1)
            for model, some in asked:
                for query in query_texts(some):
                    request = Request(model.request_key(query), *model.request(query))
                    plan._add(model, [(request, 0)], mix=True)
                    progress.advance(1)
        return plan

    def _asks(
        self, recipe: Recipe, model: PromptedModel, query: str
    ) -> Iterator[tuple[Request, int]]:
        """What a query asks of a model, and how many answers of turns before it aren't known.

        Empty ones are in the place of those.
        """
        asked, found = (model.identity, model.sampling), list[Request]()
        for request in known_requests(recipe, asked, query, self._reply):
            yield request, 0
            found.append(request)
        turns = recipe.turns_of(query)
        if len(found) < turns and self._reply(found[-1].key) is None:
            for turn in range(len(found), turns):
                asks = model.request(query, [""] * turn)
                yield Request(request_digest(found[-1].key, *asks), *asks), turn - len(found) + 1

    def _add(self, model: PromptedModel, asks: Iterable[tuple[Request, int]], *, mix: bool) -> bool:
        """The requests of a query; whether any is left to ask."""
        left = False
        for request, unknown in asks:
            self.requests += 1
            if request.key in self.asked or self._is_over(request.key):
                self.known += 1
                continue
            self.asked.add(request.key)  # who asks it again shares the answer
            planned = _PlannedRequests(model.sampler)
            planned = self.planned.setdefault((model.identity, mix), planned)
            planned.add(request, unknown, count=int(request.key[:8], 16) % self.every == 0)
            left = True
        return left

    def _reply(self, key: str) -> Reply | None:
        return next(filter(None, (one.get(key) for one in self.journals)), None)

    def _is_over(self, key: str) -> bool:
        """Whether a request was answered, or rejected for good."""
        return any(one.entry(key) or one.rejection(key) for one in self.journals)

    def loads(
        self, made: Sequence[_SampledRequest], asked: int, prices: Prices | None
    ) -> Iterator[ModelLoad]:
        """Those of the planned requests, then of models, like a judge, that nobody can plan for.

        Those are asked as in the rows that were `asked`.
        """
        found: dict[tuple[str, bool], list[_SampledRequest]] = {}
        for one in made:
            found.setdefault((one.sampler.identity, one.expected), []).append(one)
        for (identity, mix), planned in self.planned.items():
            load = planned.load([] if mix else found.get((identity, True), []), prices)
            yield replace(load, model=f"{load.model} (mix)") if mix else load
        for (_, expected), some in found.items():
            if expected or not self.rows_left:
                continue
            sampler, requests = some[0].sampler, round(len(some) * self.rows_left / asked)
            prompt = _bounded([one.prompt_tokens for one in some], requests)
            response = _bounded([one.response_tokens for one in some], requests)
            source = f"as in the {asked} rows asked"
            load = ModelLoad(sampler.model, requests, prompt, response, source)
            yield _priced(load, sampler, some, prices)

    def seconds(self, sampled: Sequence[SampledRow], concurrency: int) -> float | None:
        """How long the rows that are left take, by those that were asked."""
        times = [one.seconds for one in sampled if one.seconds is not None]
        if not times:
            return None
        mean = sum(times) / len(times)
        return mean * max(self.rows_left / concurrency, 1.0) if self.rows_left else 0.0


def _priced(
    load: ModelLoad, sampler: Sampler, made: Sequence[_SampledRequest], prices: Prices | None
) -> ModelLoad:
    """With its cost, as providers stated it for the requests made, else by the price file.

    By that, everything comes from the cache at best, and nothing at worst.
    """
    stated = _stated(made)
    if stated and (prices is None or prices.currency == "USD"):
        return replace(load, cost=_bounded(stated, load.requests))
    if prices is None:
        return load
    prompt, response = load.prompt, load.response
    price, expected = prices.of(sampler.identity), None
    if prompt.expected is not None and response.expected is not None:
        tokens = sum(one.prompt_tokens for one in made)
        share = sum(one.reply.usage.cached_tokens for one in made) / tokens if tokens else 0
        expected = price.of(prompt.expected, prompt.expected * share, response.expected)
    low = price.of(prompt.low, prompt.low, response.low)
    return replace(load, cost=Span(low, expected, price.of(prompt.high, 0, response.high)))


def _stated(made: Sequence[_SampledRequest]) -> list[float]:
    """What providers said that the requests cost, in dollars, where all of them did."""
    costs = [one.reply.usage.cost for one in made]
    known = [cost for cost in costs if cost is not None]
    return known if len(known) == len(costs) else []


def _size_of(messages: Sequence[Message], sampling: Sampling) -> int:
    """Bytes of what a request has a model read."""
    texts, written = request_parts(messages, sampling)
    return sum(len(text.encode()) for text in [*texts, *written])


def _connection(sampler: Sampler) -> Any:
    """What has a sampler's chat format and tokenizer here, to count as its server would, if any.

    Nothing is downloaded for others.
    """
    return getattr(sampler, "connection", None)


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
    if any(one.unknown for one in plan.planned.values()):
        yield "Later turns hold the answers to earlier ones, of one token to the most allowed each."
    if sampled and any(mix for _, mix in plan.planned):
        yield "Of the rows of the mix none is sampled: what they take is bounded, not scaled."
    failed = [one.problem for one in sampled if one.text is None]
    if failed:
        yield f"{len(failed)} of {len(sampled)} sampled rows failed: {failed[0]}"
    if any(_connection(one.sampler) is None for one in plan.planned.values()):
        yield (
            "A tokenizer that is not on this machine can't count: where tokens are guessed, a "
            "token is taken for four bytes, and for two to six in the bounds."
        )

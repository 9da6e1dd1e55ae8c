"""Estimates of tokens, money and bytes, with bounds, from a few requests that were made."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import sqrt

from distill_datasets.generation.pricing import Prices
from distill_datasets.models.sampler import Reply, Sampler, Sampling, request_parts
from distill_datasets.schema import Message

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

    def text(self, write: Callable[[float], str]) -> str:
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


def size_of(messages: Sequence[Message], sampling: Sampling) -> int:
    """Bytes of what a request has a model read."""
    texts, written = request_parts(messages, sampling)
    return sum(len(text.encode()) for text in [*texts, *written])


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
class ModelLoad:
    """What one model will be asked for and will cost, in what is left to ask."""

    model: str
    requests: int
    prompt: Span
    response: Span
    source: str
    cost: Span | None


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

"""What answers cost: a dated price file, a count of what is bought, and a budget to stay under."""

import asyncio
import csv
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import date as Date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from distill_datasets.errors import BudgetReached, PriceError, nearest
from distill_datasets.files import read_yaml
from distill_datasets.generation.cache import Journal
from distill_datasets.models.sampler import Reply, Sampler, Sampling, request_parts
from distill_datasets.schema import Message

if TYPE_CHECKING:
    import pyarrow as pa

HOURS_A_MONTH = 730  # a twelfth of 365 days

_PER = 1_000_000  # prices are for so many tokens
_STATED = "USD"  # what providers state costs in
_ROUNDING = 1 + 1e-9
_READ = 1  # token that a request must sample to have its prompt read
_FRAME = 16  # tokens that a chat format puts around a message
_CATALOGUE = 1000  # and around its tools
_JSON = 3  # times as many bytes as it may have elsewhere
_SEPARATORS = ("/", "@", " ", "|")  # between a reference and what else an identity names
_LARGEST_LIST = 50_000_000  # bytes of somebody's list of prices
_NAMES = ("model", "name", "id", "model_name", "model_id")
# What lists of prices call ours, and for how many tokens: a million, or one.
_COLUMNS = {
    **dict.fromkeys(("prompt", "input", "prefill"), ("prompt", 1.0)),
    **dict.fromkeys(("response", "output", "completion", "sample"), ("response", 1.0)),
    **dict.fromkeys(("cached", "cached_input", "cache_read"), ("cached", 1.0)),
    **dict.fromkeys(("train", "training"), ("train", 1.0)),
    "input_cost_per_token": ("prompt", float(_PER)),
    "output_cost_per_token": ("response", float(_PER)),
    "cache_read_input_token_cost": ("cached", float(_PER)),
}


class Price(BaseModel):
    """What a model takes for a million tokens; `batch` is the factor for a provider's batches.

    Tokens read from a cache cost as much as others where no price for them is given. `prefill`
    and `sample` are other names of `prompt` and `response`. `train` is for a million tokens that
    are trained on. What a model costs whether it is asked or not is `hosting_per_hour`, of all
    hours, or `hosting_per_month`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Annotated[float, Field(ge=0, validation_alias=AliasChoices("prompt", "prefill"))]
    response: Annotated[float, Field(ge=0, validation_alias=AliasChoices("response", "sample"))]
    cached: Annotated[float, Field(ge=0)] | None = None
    batch: Annotated[float, Field(gt=0, le=1)] = 1.0
    train: Annotated[float, Field(ge=0)] | None = None
    hosting_per_hour: Annotated[float, Field(ge=0)] | None = None
    hosting_per_month: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _hosting_is_said_once(self) -> Self:
        if self.hosting_per_hour is not None and self.hosting_per_month is not None:
            raise ValueError("name hosting_per_hour or hosting_per_month; found both")
        return self

    @property
    def hosting(self) -> float:
        """What it costs in a month whether it is asked or not."""
        if self.hosting_per_hour is not None:
            return self.hosting_per_hour * HOURS_A_MONTH
        return self.hosting_per_month or 0.0

    def of(self, prompt: float, cached: float, response: float, *, batch: bool = False) -> float:
        """What so many tokens cost; the `cached` ones are among those of the `prompt`."""
        whole = (prompt - cached) * self.prompt + response * self.response
        read = cached * (self.prompt if self.cached is None else self.cached)
        return (whole + read) / _PER * (self.batch if batch else 1)


class Prices(BaseModel):
    """Prices of models by their references, and the day on which they were looked up."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    date: Date
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")]
    models: Mapping[str, Price]

    @classmethod
    def load(cls, path: Path | str) -> "Prices":
        """Read a YAML or JSON file; raises `PriceError` that names what is wrong in it."""
        fields = read_yaml(path, PriceError, what="price file")
        if not isinstance(fields, Mapping):
            raise PriceError(f"The price file {str(path)!r} holds no keys: {_EXPECTED}.")
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise PriceError(_explain(error, path)) from error

    def text(self) -> str:
        """The prices as a file that `load` reads."""
        models = {
            name: price.model_dump(exclude_defaults=True) for name, price in self.models.items()
        }
        fields = {"date": self.date, "currency": self.currency, "models": models}
        return str(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))

    def of(self, model: str) -> Price:
        """The price of a model reference, or of an identity that begins with one.

        Raises `PriceError` that names those in the file.
        """
        for name in sorted(self.models, key=len, reverse=True):
            if model == name or (model.startswith(name) and model[len(name)] in _SEPARATORS):
                return self.models[name]
        raise PriceError(
            f"The price file names no price for {model!r}; it has {sorted(self.models)}."
            f"{nearest(model, list(self.models))} Add one under `models`: {_EXPECTED}."
        )


_EXPECTED = (
    "expected `date: 2026-11-01`, `currency: USD` and "
    "`models: {openai:name: {prompt: 2.5, cached: 0.25, response: 10.0}}`, for a million tokens"
)


class Meter:
    """Counts what is spent, and keeps it under a budget.

    Requests go as they come while the budget has room for the most that they could cost. Nearer
    to its end, what is in flight is reckoned with at the dearest request of its model so far, and
    is never much more than what is known: the budget is passed only by a request that costs more
    than all before it. A provider's own statement of a cost stands before the price file, where
    both are in dollars.
    """

    def __init__(self, prices: Prices | None = None, *, budget: float | None = None) -> None:
        """Without `prices`, only replies whose provider states a cost can be counted."""
        if budget is not None and not budget > 0:
            raise PriceError(f"A budget is more than 0, found {budget!r}.")
        self.prices, self.budget = prices, budget
        self.spent = 0.0
        self._dearest: dict[str, float] = {}
        self._seen: Counter[str] = Counter()
        self._in_flight: Counter[str] = Counter()
        self._most_in_flight = 0.0
        self._changed = asyncio.Event()

    @property
    def currency(self) -> str:
        """Of everything this counts, in three letters."""
        return self.prices.currency if self.prices else _STATED

    @property
    def priced_at(self) -> str | None:
        """The day of the price file."""
        return self.prices.date.isoformat() if self.prices else None

    def check(self, models: Iterable[str]) -> None:
        """Raises `PriceError` for the first model that the price file doesn't name."""
        if self.prices:
            for model in models:
                self.prices.of(model)

    def resume(self, journal: Journal) -> None:
        """Count what a run's folder has bought before; answers that came with a release are free.

        Costs about ten seconds for a million answers.
        """
        for identity, times, reply, batch in journal.bought():
            self._add(identity, self.cost(identity, Reply.from_json(reply), batch=batch), times)

    def cost(self, identity: str, reply: Reply, *, batch: bool = False) -> float:
        """What one reply of a sampler cost; raises `PriceError` where nobody says so."""
        stated = reply.usage.cost
        if stated is not None and self.currency == _STATED:
            return stated
        if self.prices is None:
            raise PriceError(
                f"{identity!r} doesn't state what it costs, so nothing can be counted: name a "
                f"price file with --prices ({_EXPECTED})."
            )
        usage, response = reply.usage, reply.response_tokens
        if usage.prompt_tokens is None or response is None:
            raise PriceError(
                f"{identity!r} doesn't count the tokens of an answer, so nobody can say what it "
                "costs. Run without a budget and prices, or ask a server that counts (`usage`)."
            )
        price = self.prices.of(identity)
        return price.of(usage.prompt_tokens, usage.cached_tokens, response, batch=batch)

    def statement(self, answers: Iterable["pa.Table"], journal: Journal) -> dict[str, Any]:
        """What raw answers cost whoever paid for them; see `ledger.raw_answers`."""
        amount = 0.0
        for some in answers:
            for row in some.to_pylist():
                reply, batch = Reply.from_json(row["reply"]), journal.in_batch(row["digest"])
                amount += self.cost(row["model"], reply, batch=batch)
        return {"amount": amount, "currency": self.currency, "priced_at": self.priced_at}

    def count(self, sampler: Sampler, reply: Reply, *, batch: bool = False) -> None:
        """Add a reply that was just bought, alone or in a provider's `batch`."""
        self._add(sampler.identity, self.cost(sampler.identity, reply, batch=batch))

    def read(self, identity: str, prompts: Sequence[int]) -> None:
        """Count requests that only read prompts of so many tokens, before they are sent: all or
        none.

        Raises `BudgetReached` where they don't fit together, and `PriceError` for a model without
        a price. Nothing is known of the server's cache: a prompt costs as much as uncached.
        """
        if self.prices is None:
            raise PriceError(f"No price is known for {identity!r}: name a price file (--prices).")
        price = self.prices.of(identity)
        costs = [price.of(tokens, 0, _READ) for tokens in prompts]
        if self.budget is not None and self.spent + sum(costs) > self.budget * _ROUNDING:
            raise BudgetReached(self._stopped())
        for cost in costs:
            self._add(identity, cost)

    @asynccontextmanager
    async def room(
        self, sampler: Sampler, messages: Sequence[Message], sampling: Sampling
    ) -> AsyncIterator[None]:
        """Wait until a request fits into the budget, and hold its place until it was counted.

        Raises `BudgetReached` once none will fit, and `PriceError` before the first request to a
        model without a price.
        """
        model = sampler.identity
        if model not in self._seen:
            self.check([model])
        most = self._most(model, messages, sampling)
        while not self._fits(model, most):
            left = (self.budget or 0.0) * _ROUNDING - self.spent
            if left < min(self._dearest.values(), default=0.0) or not self._in_flight:
                raise BudgetReached(self._stopped())
            await self._changed.wait()
        self._in_flight[model] += 1
        self._most_in_flight += most or 0.0
        try:
            yield
        finally:
            self._most_in_flight -= most or 0.0
            self._in_flight[model] -= 1
            if not self._in_flight[model]:
                del self._in_flight[model]
            self._changed.set()
            self._changed = asyncio.Event()

    def _add(self, identity: str, cost: float, times: int = 1) -> None:
        self.spent += times * cost
        self._seen[identity] += 1
        self._dearest[identity] = max(cost, self._dearest.get(identity, 0.0))

    def _most(self, model: str, messages: Sequence[Message], sampling: Sampling) -> float | None:
        """The most that a request can cost, where the price file says so."""
        if self.budget is None or self.prices is None:
            return None
        # No tokenizer makes more tokens than bytes; a chat format adds a few to a message, says
        # what tools are, and may write JSON with blanks and escapes.
        texts, written = request_parts(messages, sampling)
        prompt = sum(len(text.encode()) + _FRAME for text in texts)
        prompt += sum(_JSON * len(text.encode()) + _CATALOGUE for text in written)
        return self.prices.of(model).of(prompt, 0, sampling.n * sampling.max_tokens)

    def _fits(self, model: str, most: float | None) -> bool:
        if self.budget is None:
            return True
        if most is not None and self.spent + self._most_in_flight + most <= self.budget:
            return True
        known, flying = self._dearest, self._in_flight
        held = self.spent + sum(known.get(name, 0.0) * count for name, count in flying.items())
        if flying[model] > 2 * self._seen[model]:
            return False
        if model in known:
            return held + known[model] <= self.budget * _ROUNDING
        return held < self.budget

    def _stopped(self) -> str:
        return (
            f"The budget of {self.budget:g} {self.currency} has no room for another request: "
            f"{self.spent:.4g} {self.currency} are spent. Everything that was paid for is kept: "
            "run again with a higher budget to go on."
        )


def open_meter(
    prices: Prices | Path | str | None, *, budget: float | None, journal: Path
) -> Meter | None:
    """A meter that knows what the run of a journal has spent; None where nobody wants one."""
    if prices is None and budget is None:
        return None
    known = Prices.load(prices) if isinstance(prices, (str, Path)) else prices
    meter = Meter(known, budget=budget)
    if journal.is_file():
        with Journal(journal) as answers:
            meter.resume(answers)
    return meter


def import_prices(
    path: Path | str, models: Mapping[str, str], *, date: Date | None = None
) -> Prices:
    """Prices out of a list of prices in dollars, as providers and others publish them.

    `models` says for each model reference how the list names it. The list is a CSV file with a
    column of names and, for a million tokens, columns such as `input` and `output`, or JSON in
    which each name has its prices, for a token, as LiteLLM's model_prices file. The day is that on
    which the file was last changed, unless it is given. Raises `PriceError`.

        import_prices("model_prices.json", {"openai:gpt-5-mini": "gpt-5-mini"})
    """
    file = Path(path)
    try:
        if file.stat().st_size > _LARGEST_LIST:
            raise PriceError(f"{str(path)!r} is larger than {_LARGEST_LIST:,} bytes.")
        text = file.read_text(encoding="utf-8-sig")
        listed = _listed_csv(text) if file.suffix.lower() == ".csv" else json.loads(text)
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        if isinstance(error, PriceError):
            raise
        raise PriceError(f"The list of prices {str(path)!r} can't be read: {error}") from error
    if not isinstance(listed, Mapping):
        raise PriceError(f"{str(path)!r} holds no prices by name: expected CSV or a JSON object.")
    found = {one: _listed_price(listed, name, path) for one, name in models.items()}
    day = date or Date.fromtimestamp(file.stat().st_mtime)
    return Prices(date=day, currency=_STATED, models=found)


def _listed_csv(text: str) -> dict[str, Any]:
    rows = list(csv.DictReader(text.splitlines()))
    names = [name for name in (rows[0] if rows else ()) if _word(name) in _NAMES]
    if not names:
        raise PriceError(f"The CSV file has no column of models: expected one of {list(_NAMES)}.")
    return {row[names[0]].strip(): row for row in rows if row[names[0]]}


def _listed_price(listed: Mapping[str, Any], name: str, path: Path | str) -> Price:
    row = listed.get(name)
    if not isinstance(row, Mapping):
        raise PriceError(
            f"{str(path)!r} has no prices of {name!r}.{nearest(name, list(map(str, listed)))} Name "
            "it as the list does: --model openai:gpt-5-mini=gpt-5-mini."
        )
    found = dict[str, float]()
    for column, value in row.items():
        field, factor = _COLUMNS.get(_word(column), (None, 1.0))
        if field and field not in found and value not in (None, ""):
            try:
                found[field] = round(float(str(value).strip().lstrip("$")) * factor, 9)
            except ValueError as error:
                raise PriceError(
                    f"{str(path)!r} says {value!r} for {column!r} of {name!r}: expected a number."
                ) from error
    try:
        return Price.model_validate(found)
    except ValidationError as error:
        raise PriceError(
            f"{str(path)!r} has no complete price of {name!r}: expected one for the prompt and one "
            f"for the response, each 0 or more; found {found}."
        ) from error


def _word(column: Any) -> str:
    return str(column).strip().lower().replace(" ", "_").replace("-", "_")


def _explain(error: ValidationError, path: Path | str) -> str:
    lines = [f"The price file {str(path)!r} can't be used; {_EXPECTED}:"]
    for problem in error.errors():
        place = [str(part) for part in problem["loc"]]
        where = ".".join(place)
        if problem["type"] == "missing":
            lines.append(f"  the key {where!r} is missing.")
        elif problem["type"] == "extra_forbidden":
            valid = list(Prices.model_fields if len(place) == 1 else Price.model_fields)
            hint = nearest(place[-1], valid)
            lines.append(f"  unknown key {where!r}.{hint} Valid keys: {', '.join(valid)}.")
        else:
            found = json.dumps(problem["input"], default=str)
            lines.append(f"  {where}: {problem['msg']} (found {found}).")
    return "\n".join(lines)

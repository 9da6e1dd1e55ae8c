"""Asks every system every query: says first what it costs, and asks nothing that is known."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from distill_datasets.conversations import readable
from distill_datasets.errors import GenerationError, PriceError
from distill_datasets.evaluation.settings import MeasureSettings
from distill_datasets.evaluation.systems import HeldOut, as_released
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient, estimated_tokens
from distill_datasets.generation.ledger import LEDGER, find_replies
from distill_datasets.generation.pricing import Meter, Prices
from distill_datasets.generation.rate_limit import Limits
from distill_datasets.generation.rows import ask
from distill_datasets.generation.teachers import Answerer, PromptedModel
from distill_datasets.hub.references import find_release
from distill_datasets.progress import amount_text
from distill_datasets.schema import failure_text

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Asking:
    """What a system is asked: requests in all, those that nobody has answered, and their tokens.

    `most` is how many tokens the answers can have, `cost` the most that all can cost; None where
    the price file doesn't name the model, or there is none.
    """

    requests: int
    left: int
    prompt: float = 0.0
    most: int = 0
    cost: float | None = None


@dataclass(frozen=True)
class AnswersOfAll:
    """The rows of each system by its name, how many seconds they took, and what was spent.

    `meters` are those that count what a system is asked: one in all, for systems with a price.
    """

    rows: "Mapping[str, Dataset]"
    seconds: float
    meter: Meter | None
    meters: Mapping[str, Meter | None]


def ask_all(
    held_out: HeldOut,
    systems: Mapping[str, Answerer],
    path: Path,
    settings: MeasureSettings,
    then: str,
) -> AnswersOfAll:
    """Every system's answer to every query, out of the journal at `path` where that has it.

    What is asked is said on standard error first, with what is asked `then`.
    """
    meter = open_meter(settings, systems)
    prices = meter.prices if meter else None
    rows, began = {}, monotonic()
    with Journal(path) as journal:
        _take_released(held_out, systems, journal)
        planned = {
            name: _planned(held_out, system, journal, prices) for name, system in systems.items()
        }
        print("\n".join(_said(held_out, planned, prices, then)), file=sys.stderr)
        meters = {name: None if one.cost is None else meter for name, one in planned.items()}
        for name, system in systems.items():
            limits = Limits(settings.concurrency)
            client = CachedClient(journal, limits=limits, meter=meters[name])
            rows[name] = _complete(ask(held_out.rows, system, client, title=name), name)
    return AnswersOfAll(rows, monotonic() - began, meter, meters)


def open_meter(settings: MeasureSettings, systems: Mapping[str, Answerer]) -> Meter | None:
    """What counts what is asked, by the settings' price file; None without one."""
    if settings.prices is None:
        return None
    return Meter(_named(Prices.load(settings.prices), systems), budget=settings.budget)


def _named(prices: Prices, systems: Mapping[str, Answerer]) -> Prices:
    """The same, with a price for each system that has one under its role, or by its base.

    A student costs what it was trained from does, unless the file says otherwise.
    """
    models = dict(prices.models)
    for name, system in systems.items():
        role = name.partition(" ")[0]
        others = [
            role,
            *([systems["base"].model] if role == "student" and "base" in systems else []),
        ]
        for model in (system.identity, *others):
            with suppress(PriceError):
                models.setdefault(system.identity, prices.of(model))
    return prices.model_copy(update={"models": models})


def _take_released(held_out: HeldOut, systems: Mapping[str, Answerer], journal: Journal) -> None:
    """Put into the journal what the release's ledger knows of what is to be asked."""
    missing = {
        one.request_key(query): one.identity
        for system in systems.values()
        if as_released(system, held_out.recipe)
        for query in held_out.rows["query"]
        for one in system.asked(query)
    }
    missing = {key: name for key, name in missing.items() if journal.entry(key) is None}
    if not missing or not (release := find_release(held_out.reference, (LEDGER,))):
        return
    known = find_replies(release.path, missing)
    journal.add((key, missing[key], reply.to_json()) for key, reply in known.items())


def _planned(
    held_out: HeldOut, system: Answerer, journal: Journal, prices: Prices | None
) -> Asking:
    asked = {
        one.request_key(query): (one, query)
        for query in held_out.rows["query"]
        for one in system.asked(query)
    }
    left = [pair for key, pair in asked.items() if journal.entry(key) is None]
    loads = [_load(one, query) for one, query in left]
    found = Asking(
        len(asked), len(left), sum(prompt for prompt, _ in loads), sum(most for _, most in loads)
    )
    if prices is None:
        return found
    try:
        members = [system] if isinstance(system, PromptedModel) else system.members
        for member in members:
            prices.of(member.identity)
        cost = sum(
            prices.of(one.identity).of(prompt, 0, most)
            for (one, _), (prompt, most) in zip(left, loads, strict=True)
        )
    except PriceError:
        return found
    return Asking(found.requests, found.left, found.prompt, found.most, cost)


def _load(one: PromptedModel, query: str) -> tuple[float, int]:
    """About how many tokens a request reads, and how many it can write."""
    messages, sampling = one.request(query)
    return estimated_tokens(messages, sampling), sampling.n * sampling.max_tokens


def _said(
    held_out: HeldOut, planned: Mapping[str, Asking], prices: Prices | None, then: str
) -> Iterator[str]:
    """What is asked of whom, and what it costs."""
    counted = [f"{one.left:,} of {one.requests:,} to the {name}" for name, one in planned.items()]
    judged = " (and its judge's)" if held_out.recipe.judge else ""
    yield (f"measure: asks {', '.join(counted)}{judged}; the others are answered already.{then}")
    currency = prices.currency if prices else ""
    for name, one in planned.items():
        if one.left:
            money = f", at most {amount_text(one.cost)} {currency}" if one.cost is not None else ""
            unpriced = " (the price file has no price)" if prices and one.cost is None else ""
            yield (
                f"measure:   {name}: about {one.prompt:,.0f} tokens to read, at most "
                f"{one.most:,} to write{money}{unpriced}"
            )


def _complete(rows: "Dataset", system: str) -> "Dataset":
    pairs = zip(rows["query"], rows["error"], strict=True)
    failed = [(query, error) for query, error in pairs if error]
    if failed:
        query, error = readable(failed[0][0])[:80], failed[0][1]
        raise GenerationError(
            f"{len(failed)} of {len(rows)} rows of the {system} failed, the first for the query "
            f"{query!r}: {failure_text(error)}. No report is written without them. Run "
            "again: what was paid is kept, and only those are asked."
        )
    # Of several samples of one request the first is the answer.
    if not any(rows["sample"]):
        return rows
    return rows.select([place for place, number in enumerate(rows["sample"]) if not number])

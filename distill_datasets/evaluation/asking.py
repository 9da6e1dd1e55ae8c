"""Asks every system every query: says first what it costs, and asks nothing that is known."""

import sys
from collections.abc import Iterable, Mapping, Sequence
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
from distill_datasets.generation.client import CachedClient, ManyRequests
from distill_datasets.generation.ledger import LEDGER, find_replies
from distill_datasets.generation.pricing import Meter, Prices
from distill_datasets.generation.rate_limit import Limits
from distill_datasets.generation.rows import ask
from distill_datasets.generation.teachers import Answerer, PromptedModel
from distill_datasets.hub.references import find_release
from distill_datasets.models.sampler import Reply, Sampler
from distill_datasets.schema import failure_text

if TYPE_CHECKING:
    from datasets import Dataset


class PartialMeter(Meter):
    """Counts what has a price; without a budget, asks of the others what they may cost uncounted.

    With a budget it is `check` that refuses a model without a price.
    """

    def check(self, models: Iterable[str]) -> None:
        """Raises `PriceError` for a model that a budget can't count."""
        if self.budget is not None:
            super().check(models)

    def cost(self, identity: str, reply: Reply, *, batch: bool = False) -> float:
        """What one reply cost, 0 where nobody says so; raises `PriceError` for lack of a count."""
        try:
            return super().cost(identity, reply, batch=batch)
        except PriceError:
            if self._has_price(identity):
                raise
            return 0.0

    def read(self, identity: str, prompts: Sequence[int]) -> None:
        """Count requests that only read prompts, of a model that has a price."""
        if self._has_price(identity):
            super().read(identity, prompts)

    def _has_price(self, identity: str) -> bool:
        with suppress(PriceError):
            super().check([identity])
            return True
        return False


@dataclass(frozen=True)
class AnswersOfAll:
    """The rows of each system by its name, and how many seconds they took."""

    rows: "Mapping[str, Dataset]"
    seconds: float


def ask_all(
    held_out: HeldOut,
    systems: Mapping[str, Answerer],
    path: Path,
    *,
    concurrency: int,
    meter: Meter | None,
    then: str,
) -> AnswersOfAll:
    """Every system's answer to every query, out of the journal at `path` where that has it.

    What is asked is said on standard error first, with what is asked `then`.
    """
    rows, began = {}, monotonic()
    with Journal(path) as journal:
        _take_released(held_out, systems, journal)
        prices = meter.prices if meter else None
        for name, system in systems.items():
            said = _requests(held_out, system).said(journal, prices)
            judged = ", and its judge" if name == "teacher" and held_out.recipe.judge else ""
            print(f"measure: {name}{judged}: {said}", file=sys.stderr)
        if then:
            print(f"measure: {then}", file=sys.stderr)
        for name, system in systems.items():
            client = CachedClient(journal, limits=Limits(concurrency), meter=meter)
            rows[name] = _complete(ask(held_out.rows, system, client, title=name), name)
    return AnswersOfAll(rows, monotonic() - began)


def open_meter(
    settings: MeasureSettings, systems: Mapping[str, Answerer], others: Iterable[Sampler]
) -> Meter | None:
    """What counts all that is asked, by the settings' price file; None without one.

    Raises `PriceError` where there is a budget and a system, or one of the `others`, has no price.
    """
    if settings.prices is None:
        return None
    meter = PartialMeter(_named(Prices.load(settings.prices), systems), budget=settings.budget)
    meter.check(
        [
            *(model for system in systems.values() for model in _models(system)),
            *(one.identity for one in others),
        ]
    )
    return meter


def _models(system: Answerer) -> list[str]:
    return [system.identity] if isinstance(system, PromptedModel) else system.models


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
        for model in _models(system):
            for priced in (model, *others):
                with suppress(PriceError):
                    models.setdefault(model, prices.of(priced))
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


def _requests(held_out: HeldOut, system: Answerer) -> ManyRequests:
    return ManyRequests(
        [
            (one.sampler, *one.request(query))
            for query in held_out.rows["query"]
            for one in system.asked(query)
        ]
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

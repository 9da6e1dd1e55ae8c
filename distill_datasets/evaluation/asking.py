"""Asks every system every query: says first what it costs, and asks nothing that is known."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from distill_datasets.conversations import readable
from distill_datasets.errors import GenerationError, PriceError
from distill_datasets.evaluation.settings import MeasureSettings
from distill_datasets.evaluation.systems import HeldOut, as_released
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient, ManyRequests
from distill_datasets.generation.ledger import LEDGER, find_replies
from distill_datasets.generation.pricing import Meter, Prices
from distill_datasets.generation.rows import ask
from distill_datasets.generation.teachers import Answerer, Teachers
from distill_datasets.hub.references import find_release
from distill_datasets.models.sampler import Reply, Sampler
from distill_datasets.schema import failure_text

if TYPE_CHECKING:
    from datasets import Dataset


class PartialMeter(Meter):
    """Counts what has a price; without a budget, asks of the others what they may cost uncounted.

    With a budget every model has one: see `open_meter`.
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


def ask_all(
    held_out: HeldOut,
    systems: Mapping[str, Answerer],
    clients: Callable[[], CachedClient],
    then: str,
) -> "dict[str, Dataset]":
    """Every system's answer to every query, out of the clients' journal where that has it.

    What is asked is said on standard error first, with what is asked `then`.
    """
    client = clients()
    _take_released(held_out, systems, client.journal)
    prices = client.meter.prices if client.meter else None
    for name, system in systems.items():
        said = _requests(held_out, system).said(client.journal, prices)
        judged = ", and its judge" if name == "teacher" and held_out.recipe.judge else ""
        print(f"measure: {name}{judged}: {said}", file=sys.stderr)
    if then:
        print(f"measure: {then}", file=sys.stderr)
    return {
        name: _complete(ask(held_out.rows, system, clients(), title=name), name)
        for name, system in systems.items()
    }


def open_meter(settings: MeasureSettings, asked: Mapping[str, Answerer | Sampler]) -> Meter | None:
    """What counts all that is `asked`, by the settings' price file; None without one.

    The file names a model, or its role, such as `student` or `judge`; a student costs what it was
    trained from does, unless the file says otherwise. Raises `PriceError` where there is a budget
    and a model has no price.
    """
    if settings.prices is None:
        return None
    prices = Prices.load(settings.prices)
    models, base = dict(prices.models), asked.get("base")
    for name, one in asked.items():
        role = name.partition(" ")[0]
        others = [role, *([base.model] if role == "student" and base else [])]
        for model in one.models if isinstance(one, Teachers) else [one.identity]:
            for known in (model, *others):
                with suppress(PriceError):
                    models.setdefault(model, prices.of(known))
            if settings.budget is not None and model not in models:
                raise PriceError(
                    f"A budget counts all that is asked, and {str(settings.prices)!r} has no price "
                    f"for the {name}, {one.model!r}; it has {sorted(prices.models)}. Add one under "
                    f"`models`, by that name or as {role!r}, or leave out the budget."
                )
    return PartialMeter(prices.model_copy(update={"models": models}), budget=settings.budget)


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
            f"{query!r}: {failure_text(error).removesuffix('.')}. No report is written "
            "without them. Run again: what was paid is kept, and only those are asked."
        )
    # Of several samples of one request the first is the answer.
    if not any(rows["sample"]):
        return rows
    return rows.select([place for place, number in enumerate(rows["sample"]) if not number])

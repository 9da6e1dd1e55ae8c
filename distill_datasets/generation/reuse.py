"""Answers that a run takes out of a release's ledger: whose, how many, and whether they hold."""

import asyncio
import json
import tempfile
from collections.abc import Iterator, Mapping
from heapq import nsmallest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.files import write_file
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient, run_in_thread
from distill_datasets.generation.ledger import LEDGER, asked_requests, replay
from distill_datasets.generation.pricing import Meter
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.generation.teachers import PromptedModel, Teachers
from distill_datasets.hub.references import find_release
from distill_datasets.models.sampler import Reply
from distill_datasets.progress import Progress

if TYPE_CHECKING:
    from datasets import Dataset

_ORIGIN = "ledger.json"


def take_over(release: Path | str, folder: Path) -> None:
    """Put the answers in a release's ledger into a run's journal, and note where they are from."""
    new = replay(release, folder)
    found = find_release(release, (LEDGER,))
    if found is None or not (new or not (folder / _ORIGIN).exists()):
        return
    manifest = json.loads((found.path / "manifest.json").read_text(encoding="utf-8"))
    source = str(release).split("@")[0] if found.commit else str(release)
    origin = {"source": source, "revision": found.commit or manifest["version"]}
    write_file(folder / _ORIGIN, json.dumps(origin, ensure_ascii=False) + "\n")


def reused(journal: Journal, rows: "Dataset", teachers: Teachers) -> dict[str, Any] | None:
    """How many of the answers behind rows came out of which ledger, and how many were bought.

    None where none did.
    """
    note = journal.path.with_name(_ORIGIN)
    if not note.is_file():
        return None
    origin = json.loads(note.read_text(encoding="utf-8"))
    taken, seen = _taken(journal), set[str]()
    for requests in asked_requests(rows, teachers.recipe, teachers.facts):
        seen.update(requests)
    answers = len(seen & taken)
    bought = sum(journal.get(key) is not None for key in seen - taken)
    return {**origin, "answers": answers, "bought": bought} if answers else None


def ask_again(
    queries: "Dataset",
    teachers: Teachers,
    journal: Journal,
    settings: GenerateSettings,
    meter: Meter | None,
) -> dict[str, int] | None:
    """Buy some of the answers that came out of a ledger once more: how many, and how many agree.

    Two answers agree when they are read alike. What is bought here is kept nowhere. None where
    the settings want no such check.
    """
    if not settings.verify_ledger:
        return None
    drawn = nsmallest(settings.verify_ledger, _takeable(queries, teachers, _taken(journal)))
    if not drawn:
        return {"asked": 0, "agree": 0}
    texts = [query for _, _, query in drawn]
    models = [teachers.asked(query)[place] for _, place, query in drawn]
    with (
        tempfile.TemporaryDirectory() as scratch,
        Journal(Path(scratch, "journal")) as fresh,
        Progress("verify", len(drawn), meter=meter) as progress,
    ):
        client = CachedClient(fresh, progress, limits=settings.limits, meter=meter)

        async def ask_all() -> list[Reply]:
            requests = (
                client.sample(model.sampler, model.messages(query), model.sampling)
                for model, query in zip(models, texts, strict=True)
            )
            return await asyncio.gather(*requests)

        replies = run_in_thread(ask_all, stop=client.stop)
        progress.advance(len(drawn))
    agree = sum(
        _answers(model, journal.get(key)) == _answers(model, reply)
        for (key, _, _), model, reply in zip(drawn, models, replies, strict=True)
    )
    return {"asked": len(drawn), "agree": agree}


def reuse_text(found: Mapping[str, Any]) -> str:
    """What `reused` found, in a sentence."""
    revision = str(found["revision"])
    short = revision[:7] if len(revision) == 40 else revision
    text = (
        f"{found['answers']:,} answers from {found['source']}@{short}, {found['bought']:,} bought"
    )
    if checked := found.get("verified"):
        text += f"; of {checked['asked']:,} asked again {checked['agree']:,} agree"
    return text


def _taken(journal: Journal) -> set[str]:
    """The requests of which the answer was never bought here."""
    return {digest for digest, times in journal if not times}


def _takeable(
    queries: "Dataset", teachers: Teachers, taken: set[str]
) -> Iterator[tuple[str, int, str]]:
    for some in queries.select_columns(["query"]).iter(batch_size=1_000):
        for query in some["query"]:
            for place, model in enumerate(teachers.asked(query)):
                if (key := model.request_key(query)) in taken:
                    yield key, place, query


def _answers(model: PromptedModel, reply: Reply | None) -> list[str | None]:
    samples = reply.samples if reply else ()
    return [model.reader.read(one.text, one.stop_reason).answer for one in samples]

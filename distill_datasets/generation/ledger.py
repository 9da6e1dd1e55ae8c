"""The raw answers that a release carries, so that nobody pays for them a second time.

A run that takes them over says whose they are and how many, and can ask for some of them again.
"""

import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import DatasetError
from distill_datasets.files import write_file
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient, ManyRequests
from distill_datasets.generation.pricing import Meter
from distill_datasets.generation.rows import query_texts
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.generation.teachers import (
    PromptedModel,
    Request,
    Teachers,
    known_requests,
)
from distill_datasets.hub.references import find_release
from distill_datasets.models.sampler import Reply, Sampling, request_digest
from distill_datasets.parquet import ROWS_PER_BATCH, read_batches
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.schema import SOURCE

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

LEDGER = "ledger"
_ORIGIN = "ledger.json"  # in a run's folder: whose answers it took over
_COLUMNS = ("digest", "model", "reply")


@dataclass(frozen=True)
class JournaledRows:
    """Answer rows, and the journal that holds what they were read from."""

    rows: "Dataset"
    journal: Path


def ledger_features() -> "Features":
    """One row a request: its digest, the sampler's identity, and what came back as JSON.

    The teacher's prompt is in the digest alone.
    """
    from datasets import Features, Value

    return Features({name: Value("string") for name in _COLUMNS})


def raw_answers(
    sources: Iterable[JournaledRows], recipe: Recipe, generation: Mapping[str, Any]
) -> Iterator["pa.Table"]:
    """What the sources' journals hold of their rows, each answer once; see `ledger_features`."""
    import pyarrow as pa

    schema, seen = ledger_features().arrow_schema, set[bytes]()
    for source in sources:
        with Journal(source.journal) as journal:
            for keys in asked_requests(source.rows, recipe, generation, journal):
                new = [key for key in dict.fromkeys(keys) if bytes.fromhex(key) not in seen]
                entries = [entry for key in new if (entry := journal.entry(key)) is not None]
                seen.update(bytes.fromhex(key) for key, *_ in entries)
                if entries:
                    columns = map(list, zip(*entries, strict=True))
                    yield pa.Table.from_arrays([pa.array(one) for one in columns], schema=schema)


def take_over(source: Path | str, folder: Path) -> int:
    """Put the answers in a release's ledger into a run's journal, and note where they are from.

    Of a `source` that `load_recipe` takes and that carries no ledger there are none, and nothing
    is made in the folder. Returns how many answers were new to the run, whose own stay. Raises
    `DatasetError` for a ledger that can't be read.
    """
    try:
        release = find_release(source, (LEDGER,))
    except DatasetError as error:
        raise DatasetError(f"{error} Run without the ledger to buy every answer.") from error
    if release is None or not any((release.path / LEDGER).glob("*.parquet")):
        return 0
    with Journal(folder / "journal.sqlite") as journal:
        new = sum(journal.add(_checked(batch, path)) for path, batch in _batches(release.path))
    if new or not (folder / _ORIGIN).exists():
        manifest = json.loads((release.path / "manifest.json").read_text(encoding="utf-8"))
        named = str(source).split("@")[0] if release.commit else str(source)
        origin = {"source": named, "revision": release.commit or manifest["version"]}
        write_file(folder / _ORIGIN, json.dumps(origin, ensure_ascii=False) + "\n")
    return new


def find_replies(release: Path, digests: Collection[str]) -> dict[str, Reply]:
    """Those of the raw answers in a release's folder that its ledger holds."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted, found = pa.array(sorted(digests), pa.string()), {}
    for path, batch in _batches(release):
        held = batch.filter(pc.is_in(batch["digest"], value_set=wanted))
        for digest, _, reply in _checked(held, path):
            found[digest] = Reply.from_json(reply)
    return found


def answering_requests(
    rows: "Dataset", recipe: Recipe, generation: Mapping[str, Any]
) -> Iterator[str]:
    """The digest of what each row's text answers; the samples of one request share it.

    Of a row that was chosen among several answers it is none in particular, and of one that nobody
    was asked for it is empty.
    """
    asked = who_was_asked(recipe, generation)
    key = ""
    for batch in _asked_for(rows):
        for query, sample, requests, source in batch:
            if requests or source:
                key = requests[-1] if requests else ""
            elif not sample:
                identity, how = asked[0]
                how = recipe.fitted(query, how)
                key = request_digest(identity, recipe.messages(query), how)
            yield key


def asked_requests(
    rows: "Dataset", recipe: Recipe, generation: Mapping[str, Any], journal: Journal
) -> Iterator[list[str]]:
    """The digests of what was asked for the rows, a batch of rows at a time.

    The answers in the `journal` say what was asked for a row that failed after some of its turns.
    """
    asked = who_was_asked(recipe, generation)
    for batch in _asked_for(rows):
        found: list[str] = []
        for query, sample, requests, source in batch:
            if requests:
                found += requests
            elif not sample and not source:  # the samples of one query came with one request
                for one in asked:
                    found += [each.key for each in known_requests(recipe, one, query, journal.get)]
        yield found


def _asked_for(
    rows: "Dataset",
) -> Iterator[Iterable[tuple[str, int, list[str] | None, str | None]]]:
    """Each row's query, sample and requests, and the part of the mix that it is of."""
    names = ["query", "sample", "requests", *({SOURCE} & {*rows.column_names})]
    for batch in rows.select_columns(names).iter(batch_size=ROWS_PER_BATCH):
        none = [None] * len(batch["query"])
        yield zip(*(batch.get(name, none) for name in (*names[:3], SOURCE)), strict=True)


def who_was_asked(recipe: Recipe, generation: Mapping[str, Any]) -> Sequence[tuple[str, Sampling]]:
    """Whose answers a row may have that doesn't say it: of one teacher, or of a row that failed."""
    panel = generation.get("panel")
    if panel is None:
        return [(generation["identity"], recipe.sampling_parameters)]
    identities = [teacher["identity"] for teacher in panel["teachers"]]
    sampling = [recipe.sampling_of(teacher) for teacher in recipe.all_teachers]
    return list(zip(identities, sampling, strict=True))


def reused(journal: Journal, rows: "Dataset", teachers: Teachers) -> dict[str, Any] | None:
    """How many of the answers behind rows came out of which ledger, and how many were bought.

    None where none did.
    """
    note = journal.path.with_name(_ORIGIN)
    if not note.is_file():
        return None
    try:
        origin = json.loads(note.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DatasetError(
            f"{str(note)!r} is damaged: expected whose answers were taken over. Delete it and run "
            "again: it is written anew."
        ) from error
    taken, seen = _taken(journal), set[str]()
    for requests in asked_requests(rows, teachers.recipe, teachers.facts, journal):
        seen.update(requests)
    answers = len(seen & taken)
    bought = sum(journal.get(key) is not None for key in seen - taken)
    return {**origin, "answers": answers, "bought": bought} if answers else None


def verify_answers(
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

    def takeable() -> Iterator[tuple[Request, PromptedModel, str]]:
        taken = _taken(journal)
        for query in query_texts(queries):
            for model in teachers.asked(query):
                asked = model.identity, model.sampling
                for request in known_requests(teachers.recipe, asked, query, journal.get):
                    if request.key in taken:
                        taken.discard(request.key)  # turns of several rows may be the same
                        yield request, model, query

    drawn = nsmallest(settings.verify_ledger, takeable(), key=lambda one: one[0].key)
    if not drawn:
        return {"asked": 0, "agree": 0}
    requests = ManyRequests(
        [(model.sampler, request.messages, request.sampling) for request, model, _ in drawn]
    )
    with tempfile.TemporaryDirectory() as scratch, Journal(Path(scratch, "journal")) as fresh:
        client = CachedClient(fresh, limits=settings.limits, meter=meter)
        replies = requests.ask(client, title="verify")
    agree = sum(
        _answers(model, query, journal.get(request.key)) == _answers(model, query, reply)
        for (request, model, query), reply in zip(drawn, replies, strict=True)
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


def _batches(release: Path) -> Iterator[tuple[Path, "pa.RecordBatch"]]:
    for path in sorted((release / LEDGER).glob("*.parquet")):
        try:
            for batch in read_batches(path, _COLUMNS):
                yield path, batch
        except DatasetError as error:
            raise _unreadable(path, error) from error


def _checked(batch: "pa.RecordBatch", path: Path) -> list[tuple[str, str, str]]:
    try:
        entries = list(zip(*(batch[name].to_pylist() for name in _COLUMNS), strict=True))
        for _, _, reply in entries:
            Reply.from_json(reply)
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error
    return entries


def _unreadable(path: Path, error: Exception) -> DatasetError:
    return DatasetError(
        f"{str(path)!r} is not a ledger that `publish` wrote ({error!r}). Run without the "
        "ledger, which buys every answer, or get the release again."
    )


def _taken(journal: Journal) -> set[str]:
    """The requests of which the answer was never bought here."""
    return {digest for digest, times in journal if not times}


def _answers(model: PromptedModel, query: str, reply: Reply | None) -> list[str | None]:
    samples = reply.samples if reply else ()
    return [model.read(query, None, one.text, one.stop_reason).answer for one in samples]

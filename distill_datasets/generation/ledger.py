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
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.generation.teachers import (
    PromptedModel,
    Request,
    Teachers,
    known_requests,
)
from distill_datasets.hub.references import Pinned, find_release
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
    seen: set[bytes] = set()
    for source in sources:
        with Journal(source.journal) as journal:
            asked = asked_requests(source.rows, recipe, generation, journal)
            yield from _entries(journal, asked, seen)


def replay(source: Path | str, out: Path | str, *, config: str | None = None) -> int:
    """Let a run in `out` start with the answers of the release that its recipe comes from.

    `source` and `config` are what `load_recipe` takes; one that carries no ledger gives none.
    Returns how many answers were new to the run, whose own stay. Nothing in `out` is made without
    any. Raises `DatasetError` for a ledger that can't be read.
    """
    release = _find(source, config)
    return _replayed(release, Path(out)) if release else 0


def _replayed(release: Pinned, out: Path) -> int:
    with Journal(out / "journal.sqlite") as journal:
        return sum(journal.add(_checked(batch, path)) for path, batch in _batches(release.path))


def find_replies(release: Path, digests: Collection[str]) -> dict[str, Reply]:
    """Those of the raw answers in a release's folder that its ledger holds."""
    found = {}
    for path, batch in _batches(release):
        for digest, _, reply in _checked(batch.filter(_within(batch["digest"], digests)), path):
            found[digest] = Reply.from_json(reply)
    return found


def _within(column: "pa.Array", wanted: Collection[str]) -> "pa.Array":
    import pyarrow as pa
    import pyarrow.compute as compute

    return compute.is_in(column, value_set=pa.array(sorted(wanted), pa.string()))


def ledger_digests(source: Path | str, *, config: str | None = None) -> set[str]:
    """The requests whose answers `replay` would bring; empty for one without a ledger."""
    release = _find(source, config)
    batches = _batches(release.path) if release else ()
    return {digest for _, batch in batches for digest in batch["digest"].to_pylist()}


def _find(source: Path | str, config: str | None = None) -> Pinned | None:
    """The release that a source is, where it carries a ledger."""
    try:
        release = find_release(source, (LEDGER,), config)
    except DatasetError as error:
        raise DatasetError(f"{error} Run without the ledger to buy every answer.") from error
    return release if release and any((release.path / LEDGER).glob("*.parquet")) else None


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


def take_over(release: Path | str, folder: Path) -> None:
    """Put the answers in a release's ledger into a run's journal, and note where they are from."""
    found = _find(release)
    if found is None:
        return
    new = _replayed(found, folder)
    if not new and (folder / _ORIGIN).exists():
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
    takeable = _takeable(queries, teachers, journal)
    drawn = nsmallest(settings.verify_ledger, takeable, key=lambda one: one[0].key)
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


def _entries(
    journal: Journal, requests: Iterable[list[str]], seen: set[bytes]
) -> Iterator["pa.Table"]:
    import pyarrow as pa

    schema = ledger_features().arrow_schema
    for batch in requests:
        found = []
        for key in batch:
            entry = None if bytes.fromhex(key) in seen else journal.entry(key)
            if entry is not None:
                seen.add(bytes.fromhex(key))
                found.append(dict(zip(_COLUMNS, entry, strict=True)))
        if found:
            yield pa.Table.from_pylist(found, schema=schema)


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


def _takeable(
    queries: "Dataset", teachers: Teachers, journal: Journal
) -> Iterator[tuple[Request, PromptedModel, str]]:
    taken = _taken(journal)
    for some in queries.select_columns(["query"]).iter(batch_size=1_000):
        for query in some["query"]:
            for model in teachers.asked(query):
                asked = model.identity, model.sampling
                for request in known_requests(teachers.recipe, asked, query, journal.get):
                    if request.key in taken:
                        taken.discard(request.key)  # turns of several rows may be the same
                        yield request, model, query


def _answers(model: PromptedModel, query: str, reply: Reply | None) -> list[str | None]:
    samples = reply.samples if reply else ()
    return [model.read(query, None, one.text, one.stop_reason).answer for one in samples]

"""Writes the requests that the journal can't answer into the files of batches."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from distill_datasets.errors import OutputError, RequestError
from distill_datasets.generation.batch_book import BatchBook
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import Buyer
from distill_datasets.generation.teachers import Answerer
from distill_datasets.models.batches import BatchProvider, new_key
from distill_datasets.models.sampler import Reply, Sampler, Sampling, request_digest
from distill_datasets.progress import Progress
from distill_datasets.schema import Message

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_PER_BATCH = 1_000


def provider_of(sampler: Sampler) -> BatchProvider | None:
    """Whoever takes a sampler's requests in batches, if its provider does."""
    provider: BatchProvider | None = getattr(sampler, "batches", None)
    return provider


class BatchFiles(Buyer):
    """Answers from the journal, and buys nothing: what is missing becomes lines of a file.

    A full file is a planned batch in the book. `samplers` are those asked, by identity, and
    `needed` the keys of all batches that must be over before another answer can be given, those
    `planned` here among them.
    Requests to a sampler that has no batches are left to be asked one by one, and are `others`.
    """

    def __init__(self, journal: Journal, book: BatchBook, progress: Progress, *, most: int) -> None:
        """`most` requests go into one file, or fewer where the provider says so."""
        super().__init__(journal, progress)
        self.book, self.most = book, most
        self.samplers: dict[str, Sampler] = {}
        self.needed: set[str] = set()
        self.planned: set[str] = set()
        self.others = 0
        self._files: dict[tuple[str, Sampling], _File] = {}

    async def buy(self, sampler: Sampler, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """The journal's answer; raises `InterruptedError` for what waits for its batch."""
        key = request_digest(sampler.identity, messages, sampling)
        if known := self._known(key):
            return known
        provider = provider_of(sampler)
        if provider is None:
            self.others += 1
        else:
            self.samplers[sampler.identity] = sampler
            if found := self.book.batch_of(key):
                self.needed.add(found)
            else:
                line = provider.line(key, messages, sampling)
                self._add(key, line, (sampler.identity, sampling), provider)
        raise InterruptedError("waits for its batch")

    async def fill(self, queries: "Dataset", answering: Answerer) -> None:
        """Write whatever answering these queries needs, as far as it can be known now."""
        columns = queries.select_columns(["query", "reference"])
        for batch in columns.iter(batch_size=_ROWS_PER_BATCH):
            for query, reference in zip(batch["query"], batch["reference"], strict=True):
                with suppress(InterruptedError, RequestError):
                    await answering.answer(query, self, reference)
                self.progress.advance(1)
        for place in list(self._files):
            self._plan(place)

    def _add(
        self, key: str, line: bytes, place: tuple[str, Sampling], provider: BatchProvider
    ) -> None:
        file = self._files.get(place)
        if file is not None and key in file.digests:
            return
        full = min(self.most, provider.most_requests)
        if file and (len(file.digests) >= full or file.size + len(line) > provider.most_bytes):
            self._plan(place)
            file = None
        if file is None:
            file = self._files[place] = _File(self.book.folder)
        file.add(key, line)

    def _plan(self, place: tuple[str, Sampling]) -> None:
        file = self._files.pop(place)
        file.close()
        self.book.plan(file.key, *place, file.digests)
        self.needed.add(file.key)
        self.planned.add(file.key)


class _File:
    """Lines that will be one batch, under its key; `size` is in bytes."""

    def __init__(self, folder: Path) -> None:
        self.key, self.size = new_key(), 0
        self.digests: set[str] = set()
        self.path = folder / f"{self.key}.jsonl"
        self._lines = self.path.open("wb")

    def add(self, key: str, line: bytes) -> None:
        try:
            self._lines.write(line)
        except OSError as error:
            raise OutputError(
                f"Can't write {str(self.path)!r}: {error}. Free some space, and run again."
            ) from error
        self.size += len(line)
        self.digests.add(key)

    def close(self) -> None:
        self._lines.close()

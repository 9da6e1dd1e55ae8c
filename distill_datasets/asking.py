"""Queries to answered rows: `datasets.map` over an async function, a row's failure a value."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from distill_datasets.buying import Buyer
from distill_datasets.errors import (
    AccessError,
    DistillError,
    GenerationError,
    ModelError,
    OutputError,
    ServiceError,
)
from distill_datasets.journal import Journal
from distill_datasets.parsing import Parsed, Reader
from distill_datasets.progress import Progress
from distill_datasets.sampler import Message, Reply, Sample, Sampler, Sampling, digest
from distill_datasets.schema import answer_features

if TYPE_CHECKING:
    from datasets import Dataset

_VERSION = 1  # goes into every fingerprint: raise it when rows come out differently
_ROWS_PER_BATCH = 128
_ALIKE = 20


class Answering(Protocol):
    """How one query becomes rows: whom to ask, and how to read what they say."""

    @property
    def parts(self) -> Sequence[Any]:
        """JSON values that name everything the rows depend on but the queries."""
        ...

    @property
    def model(self) -> str:
        """Whom a row names that nobody answered."""
        ...

    async def answer(self, query: str, buyer: Buyer) -> list[dict[str, Any]]:
        """The columns of every row of a query that asking decides; raises what `buy` raises."""
        ...


@dataclass(frozen=True)
class Asking:
    """One teacher: with which messages, and how to read and rewrite the text."""

    sampler: Sampler
    sampling: Sampling
    messages: Callable[[str], list[Message]]
    reader: Reader
    write: Callable[[str, str], str]

    @property
    def parts(self) -> Sequence[Any]:
        """The sampler, how it samples, and how its text is read."""
        reader = self.reader
        return [self.sampler.identity, asdict(self.sampling), reader.pattern, reader.choices]

    @property
    def model(self) -> str:
        """The sampler's."""
        return self.sampler.model

    async def answer(self, query: str, buyer: Buyer) -> list[dict[str, Any]]:
        """A row a sample."""
        reply = await buyer.buy(self.sampler, self.messages(query), self.sampling)
        return [self.row(sample, reply, index) for index, sample in enumerate(reply.samples)]

    def row(self, sample: Sample, reply: Reply, index: int) -> dict[str, Any]:
        """The columns that one sample decides."""
        parsed: Parsed = self.reader.read(sample.text, sample.stop_reason)
        written = None
        if parsed.answer is not None:
            written = self.write(sample.text, parsed.answer)
        return {
            "teacher": self.sampler.model,
            "sample": index,
            "raw": sample.text,
            "stop_reason": sample.stop_reason,
            "teacher_prompt_tokens": reply.usage.prompt_tokens,
            "teacher_cached_tokens": reply.usage.cached_tokens,
            "teacher_response_tokens": sample.tokens,
            "answer": parsed.answer,
            "response": written,
            "rejection": parsed.rejection,
        }


def ask(
    queries: "Dataset",
    asking: Answering,
    *,
    journal: Journal,
    concurrency: int = 256,
    title: str,
) -> "Dataset":
    """Answer rows of `id`, `query`, `group`, `reference`, `split`, in their order.

    One row a sample, with `schema.answer_features()`; at most `concurrency` requests in flight.
    Safe inside a running event loop: the sampling runs on a loop of its own in another thread.
    Ctrl-C waits for the requests in flight, so that what was paid is kept.
    """
    with Progress(title, len(queries)) as progress:
        rows = _Rows(asking, Buyer(journal, progress), concurrency, progress)
        with ThreadPoolExecutor(1) as thread:
            mapped = thread.submit(rows.map, queries)
            try:
                answered = mapped.result()
            except BaseException:
                rows.stop()
                raise
    if rows.fatal is not None:
        raise rows.fatal
    return answered


class _Rows:
    """The map function: a bound coroutine method over one shared semaphore.

    `datasets` starts up to a thousand batches at once; the semaphore is what bounds requests, so
    that a slow row never holds back rows of other batches.
    """

    def __init__(
        self, asking: Answering, buyer: Buyer, concurrency: int, progress: Progress
    ) -> None:
        self.asking, self.buyer, self.progress = asking, buyer, progress
        self.fatal: DistillError | None = None
        self._seen: Counter[str] = Counter()
        self._answered = 0
        self._turn = asyncio.Semaphore(concurrency)
        self._starting = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def map(self, queries: "Dataset") -> "Dataset":
        """Answer all queries on an event loop of this thread's own."""
        from datasets.utils import (
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )

        # Its bar counts whole batches in order, and would cut through ours.
        shown = not are_progress_bars_disabled()
        disable_progress_bars()
        try:
            return queries.map(
                self.answer,
                batched=True,
                batch_size=_ROWS_PER_BATCH,
                remove_columns=queries.column_names,
                features=answer_features(),
                new_fingerprint=self.fingerprint(queries),
                load_from_cache_file=False,
                keep_in_memory=not queries.cache_files,
            )
        finally:
            if shown:
                enable_progress_bars()
            # `datasets` leaves the loop that it made open.
            if self._loop is not None:
                self._loop.close()

    def fingerprint(self, queries: "Dataset") -> str:
        """Names what the rows depend on, since `datasets` can't hash a client."""
        return digest([_VERSION, queries._fingerprint, *self.asking.parts])[:32]

    def stop(self, reason: DistillError | None = None) -> None:
        """Ask nothing more; the first reason stands."""
        self.buyer.stop()
        self.fatal = self.fatal or reason

    async def answer(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """All samples of a batch of queries, as columns."""
        self._loop = asyncio.get_running_loop()
        queries = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
        tasks = []
        # Rows start in order, each when it is its turn: ten thousand tasks that wait for the
        # semaphore would hold back the first request, and every later one a little.
        async with self._starting:
            for query in queries:
                await self._turn.acquire()
                tasks.append(asyncio.create_task(self._one(query)))
        lists = await asyncio.gather(*tasks)
        rows = [row for samples in lists for row in samples]
        return {name: [row.get(name) for row in rows] for name in answer_features()}

    async def _one(self, query: dict[str, Any]) -> list[dict[str, Any]]:
        asked = {**query, "teacher": self.asking.model, "sample": 0}
        try:
            rows = await self.asking.answer(query["query"], self.buyer)
        except (AccessError, ModelError, OutputError, ServiceError) as error:
            self.stop(error)
            return [{**asked, "error": str(error)}]
        except Exception as error:
            # A row's failure is a value: raised out of `map` it would throw away every other row.
            return [{**asked, "error": self._failed(error)}]
        finally:
            self._turn.release()
        self.progress.advance(1)
        self._answered += 1
        return [{**asked, **row} for row in rows]

    def _failed(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"
        if not isinstance(error, InterruptedError):
            self.progress.advance(1)
            self._seen[text] += 1
            if self._answered == 0 and self._seen[text] >= _ALIKE:
                self.stop(
                    GenerationError(
                        f"The first {_ALIKE} rows all failed alike, so nothing more was asked: "
                        f"{text}. Mend the cause and run again; paid answers are kept."
                    )
                )
        return text

"""The function that `datasets.map` runs over queries: every row when it is its turn."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import FATAL, DistillError, GenerationError, RequestError
from distill_datasets.generation.answers import without_bars
from distill_datasets.generation.client import Buyer
from distill_datasets.progress import Progress
from distill_datasets.schema import answer_features, failure_text

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    # A query, whom to buy from, and the answer known beforehand; gives the rows of the query.
    Answer = Callable[[str, Buyer, str | None], Awaitable[list[dict[str, Any]]]]

_ROWS_PER_BATCH = 128
_BATCHES = 900  # from a thousand on, `datasets` holds every result until the last one
_ALIKE = 20


class RowMap:
    """Runs `datasets.map` over the turns of one buyer.

    `datasets` starts all batches at once; the turns are what bounds the work, so that a slow row
    never holds back rows of other batches.
    """

    def __init__(self, answer: "Answer", model: str, buyer: Buyer, progress: Progress) -> None:
        """`model` is whom a row names that nobody answered."""
        self.buyer, self.progress = buyer, progress
        self.fatal: DistillError | None = None
        self._answer, self._model = answer, model
        self._alike: Counter[tuple[object, ...]] = Counter()
        self._started = self._answered = 0
        self._starting = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def map(self, queries: "Dataset", fingerprint: str, file: Path | None) -> "Dataset":
        """Answer all queries on an event loop of this thread's own, into memory or a file."""
        from datasets import Dataset

        if not len(queries):
            return Dataset.from_dict({n: [] for n in answer_features()}, answer_features())
        size = max(_ROWS_PER_BATCH, -(-len(queries) // _BATCHES))
        # `datasets` reads every batch before the first is answered: a batch of these is a place.
        places = Dataset.from_dict({"first": range(0, len(queries), size)})

        async def answer(batch: Mapping[str, list[int]]) -> "pa.Table":
            (first,) = batch["first"]
            return await self._answer_rows(queries, slice(first, first + size))

        try:
            with without_bars():
                return places.map(
                    answer,
                    batched=True,
                    batch_size=1,
                    remove_columns=places.column_names,
                    features=answer_features(),
                    new_fingerprint=fingerprint,
                    load_from_cache_file=False,
                    keep_in_memory=file is None,
                    cache_file_name=str(file) if file else None,
                )
        finally:
            # `datasets` leaves the loop that it made open.
            if self._loop is not None:
                # A sampler's connections end with their loop.
                self._loop.run_until_complete(self._loop.shutdown_asyncgens())
                self._loop.close()

    def stop(self, reason: DistillError | None = None) -> None:
        """Ask nothing more; the first reason stands."""
        self.buyer.stop()
        self.fatal = self.fatal or reason

    async def _answer_rows(self, queries: "Dataset", part: slice) -> "pa.Table":
        """All samples of some queries, which are read when it is their turn."""
        import pyarrow as pa

        self._loop = asyncio.get_running_loop()
        tasks = []
        # Rows start in order, each when it is its turn: ten thousand tasks that wait for it would
        # hold back the first request, and every later one a little.
        async with self._starting:
            batch = queries[part]
            for row in zip(*batch.values(), strict=True):
                await self.buyer.turns.acquire()
                self._started += 1
                query = dict(zip(batch, row, strict=True))
                tasks.append(asyncio.create_task(self._one(query)))
        rows = [row for task in tasks for row in await task]
        return pa.Table.from_pylist(rows, schema=answer_features().arrow_schema)

    async def _one(self, query: dict[str, Any]) -> list[dict[str, Any]]:
        asked = {**query, "teacher": self._model, "sample": 0}
        try:
            rows = await self._answer(query["query"], self.buyer, query["reference"])
        except FATAL as error:
            self.stop(error)
            return [{**asked, "error": _failure(error)}]
        except Exception as error:
            # A row's failure is a value: raised out of `map` it would throw away every other row.
            failed = _failure(error)
            if not isinstance(error, InterruptedError):
                self.progress.advance(1)
                self._look(error, failed)
            return [{**asked, "error": failed}]
        finally:
            self.buyer.turns.release()
        self.progress.advance(1)
        self._answered += 1
        return [{**asked, **row} for row in rows]

    def _look(self, error: Exception, failed: dict[str, Any]) -> None:
        """Whether to go on after a failure: not if nothing else was ever seen."""
        alike = tuple(failed[part] for part in ("type", "status", "message"))
        self._alike[alike] += 1
        # Failures may be quicker than answers, which are still to come.
        if self._answered or self._alike[alike] < max(_ALIKE, self._started // 2):
            return
        self.stop(
            GenerationError(
                f"The first {self._alike[alike]} rows all failed alike, so nothing more was "
                f"asked: {failure_text(failed)}. Mend the cause and run again; paid answers are "
                "kept."
            )
        )


def _failure(error: Exception) -> dict[str, Any]:
    """The value of a row's `error`."""
    if isinstance(error, RequestError):
        facts: tuple[str, int | None, int] = (error.type, error.status, error.attempts)
    else:
        facts = (type(error).__name__, None, 1)
    return {"type": facts[0], "status": facts[1], "message": str(error), "attempts": facts[2]}

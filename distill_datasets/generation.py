"""Queries to answers: `datasets.map` with async batched sampling, every answer journaled."""

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets import __version__
from distill_datasets.errors import (
    AccessError,
    DistillError,
    GenerationError,
    ModelError,
    OutputError,
    ServiceError,
)
from distill_datasets.journal import Journal
from distill_datasets.ledger import replay
from distill_datasets.parsing import Parsed, Reader
from distill_datasets.progress import Progress
from distill_datasets.queries import load_queries
from distill_datasets.recipe import Recipe, load_recipe
from distill_datasets.sampler import (
    Message,
    Reply,
    Sample,
    Sampler,
    Sampling,
    digest,
    request_digest,
)
from distill_datasets.schema import answer_features

if TYPE_CHECKING:
    from datasets import Dataset

_VERSION = 1  # goes into every fingerprint: raise it when rows come out differently
_ROWS_PER_BATCH = 128
_ALIKE = 20


@dataclass(frozen=True)
class Asking:
    """One way to ask: whom, with which messages, and how to read and rewrite the text."""

    sampler: Sampler
    sampling: Sampling
    messages: Callable[[str], list[Message]]
    reader: Reader
    write: Callable[[str, str], str]


@dataclass(frozen=True)
class Generated:
    """What `generate` wrote: the run's folder, the rows, and what became of them."""

    path: Path
    rows: "Dataset"
    kept: int
    rejected: Mapping[str, int]
    errors: int


def generate(
    recipe: Recipe | str | Path,
    *,
    teacher: Sampler | str | None = None,
    out: str | Path,
    concurrency: int = 256,
    limit: int | None = None,
    ledger: bool = True,
) -> Generated:
    """Ask the teacher every query of the recipe; continue where an earlier call stopped.

    Writes `out/journal.sqlite` (raw answers, as they arrive) and `out/answers/` (all rows in the
    queries' order, once every row has been asked). A row that fails is a row with an `error`,
    asked again by the next call; answers in the journal are never asked again. `limit` takes the
    first queries only. A release is a recipe too: the answers in its ledger are not asked for
    again, unless `ledger` is False. Costs one request a query. Raises `GenerationError` when the
    first rows all fail alike, and whatever `load_recipe` and `open_sampler` raise, before any
    request.
    """
    source = None if isinstance(recipe, Recipe) else recipe
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if isinstance(teacher, str):
        recipe, teacher = recipe.replace(teacher=teacher), None
    queries = load_queries(recipe)
    if limit is not None:
        queries = queries.select(range(min(limit, len(queries))))
    out = writable_folder(out)
    if source is not None and ledger:
        replay(source, out)
    sampler = teacher or _open(recipe.teacher, recipe.renderer)
    recipe = recipe.replace(teacher=sampler.model)
    asking = Asking(
        sampler,
        recipe.sampling_parameters,
        recipe.messages,
        recipe.teacher_reader,
        recipe.write_response,
    )
    with Journal(out / "journal.sqlite") as journal:
        rows = ask(queries, asking, journal=journal, concurrency=concurrency, title="generate")
    return _save(rows, recipe, sampler, out)


def ask(
    queries: "Dataset",
    asking: Asking,
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
        rows = _Rows(asking, journal, concurrency, progress)
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
        self, asking: Asking, journal: Journal, concurrency: int, progress: Progress
    ) -> None:
        self.asking, self.journal, self.progress = asking, journal, progress
        self.fatal: DistillError | None = None
        self._stopped = False
        self._seen: Counter[str] = Counter()
        self._answered = 0
        self._turn = asyncio.Semaphore(concurrency)
        self._starting = asyncio.Lock()
        self._asked: dict[str, asyncio.Event] = {}
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
        reader, sampling = self.asking.reader, self.asking.sampling
        parts = [_VERSION, queries._fingerprint, self.asking.sampler.identity, asdict(sampling)]
        return digest([*parts, reader.pattern, reader.choices])[:32]

    def stop(self, reason: DistillError | None = None) -> None:
        """Ask nothing more; the first reason stands."""
        self._stopped = True
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
        asked = {**query, "teacher": self.asking.sampler.model, "sample": 0}
        try:
            reply, tokens = await self._reply(query["query"])
        except (AccessError, ModelError, OutputError, ServiceError) as error:
            self.stop(error)
            return [{**asked, "error": str(error)}]
        except Exception as error:
            # A row's failure is a value: raised out of `map` it would throw away every other row.
            return [{**asked, "error": self._failed(error)}]
        finally:
            self._turn.release()
        self.progress.advance(1, tokens=tokens)
        self._answered += 1
        return [
            {**asked, **self._row(sample, reply, index)}
            for index, sample in enumerate(reply.samples)
        ]

    async def _reply(self, query: str) -> tuple[Reply, int]:
        """The journal's answer, or a bought one; two rows that ask the same share one request."""
        if self._stopped:
            raise InterruptedError("stopped before this row was asked")
        messages = self.asking.messages(query)
        key = request_digest(self.asking.sampler.identity, messages, self.asking.sampling)
        if known := self.journal.get(key):
            return known, 0
        reply = await self._buy(key, messages)
        return reply, reply.usage.prompt_tokens + sum(sample.tokens for sample in reply.samples)

    async def _buy(self, key: str, messages: list[Message]) -> Reply:
        while key in self._asked:
            await self._asked[key].wait()
            if known := self.journal.get(key):
                return known
        self._asked[key] = asyncio.Event()
        try:
            reply = await self.asking.sampler.sample(messages, self.asking.sampling)
            self.journal.put(key, self.asking.sampler.identity, reply)
        finally:
            self._asked.pop(key).set()
        return reply

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

    def _row(self, sample: Sample, reply: Reply, index: int) -> dict[str, Any]:
        parsed: Parsed = self.asking.reader.read(sample.text, sample.stop_reason)
        written = None
        if parsed.answer is not None:
            written = self.asking.write(sample.text, parsed.answer)
        return {
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


def _open(reference: str, renderer: str | None) -> Sampler:
    from distill_datasets.samplers import open_sampler

    return open_sampler(reference, renderer=renderer)


def writable_folder(path: str | Path) -> Path:
    """The folder, made if need be; raises `OutputError` where nothing can be written."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"Can't write to {str(folder)!r}: {error}. Choose another --out, or free it."
        ) from error
    return folder


def _tokens(rows: "Dataset") -> dict[str, int]:
    """What the answers cost; all samples of one request share its prompt."""
    columns = {kind: rows[f"teacher_{kind}_tokens"][:] for kind in ("prompt", "cached", "response")}
    first = [sample == 0 for sample in rows["sample"][:]]
    return {
        kind: sum(
            tokens or 0
            for tokens, counts in zip(column, first, strict=True)
            if counts or kind == "response"
        )
        for kind, column in columns.items()
    }


def _save(rows: "Dataset", recipe: Recipe, sampler: Sampler, out: Path) -> Generated:
    rejections = Counter(reason for reason in rows["rejection"][:] if reason)
    errors = sum(error is not None for error in rows["error"][:])
    kept = len(rows) - errors - sum(rejections.values())
    summary = {
        "recipe": recipe.name,
        "recipe_digest": recipe.digest,
        "teacher": sampler.model,
        "identity": sampler.identity,
        "renderer": getattr(getattr(sampler, "connection", None), "renderer_name", None),
        "sampling": asdict(recipe.sampling_parameters),
        "rows": len(rows),
        "kept": kept,
        "rejected": dict(rejections),
        "errors": errors,
        "tokens": _tokens(rows),
        "created": datetime.now(UTC).date().isoformat(),
        "versions": {"distill-datasets": __version__, "datasets": version("datasets")},
    }
    folder, building = out / "answers", out / "answers.partial"
    shutil.rmtree(building, ignore_errors=True)
    try:
        rows.save_to_disk(str(building))
        recipe.dump(building / "recipe")
        text = json.dumps(summary, indent=2, ensure_ascii=False)
        (building / "generation.json").write_text(text + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    except OSError as error:
        raise OutputError(
            f"Can't write {str(folder)!r}: {error}. The answers are in {out / 'journal.sqlite'}; "
            "free some space and run again: nothing is asked twice."
        ) from error
    return Generated(out, rows, kept, rejections, errors)

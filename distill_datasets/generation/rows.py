"""Turns queries into answered rows with `datasets.map`; a failure is a value in its row.

The map goes over places, each the start of a few queries, rather than over the queries: `datasets`
reads every batch and makes a task of it before the first is answered, and from a thousand on it
holds every result until the last one. With at most 900 places a million queries cost no memory
beforehand, and their rows are written while they come. The queries of a place are read when it is
their turn, and a slow one holds back no other place.
"""

import asyncio
import gc
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import SEEK_END
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from distill_datasets.conversations import readable
from distill_datasets.errors import FATAL, DistillError, GenerationError, RequestError
from distill_datasets.generation.client import CachedClient, outcome, work_in_thread
from distill_datasets.generation.teachers import (
    CALLS,
    NO_MAJORITY,
    NO_SCORE,
    NONE_PARSED,
    REFUSED,
    Answerer,
)
from distill_datasets.models.sampler import digest
from distill_datasets.progress import Progress, without_bars
from distill_datasets.recipes.checks import FAILED
from distill_datasets.recipes.parsing import (
    EMPTY,
    OFF_SCHEMA,
    OUTSIDE_CHOICES,
    TRUNCATED,
    UNPARSABLE,
)
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.schema import answer_features, failure_text
from distill_datasets.tables import shortened

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    Look = Callable[[Sequence[dict[str, Any]]], None]  # sees the rows of a query

ROWS_FILE = "data-00000-of-00001.arrow"  # as `datasets` names it
MIX_FILES = "mix-*.arrow"  # of rows that stand behind them
_VERSION = 2  # goes into every fingerprint: raise it when rows come out differently
_QUERIES_AT_A_PLACE, _PLACES = 128, 900
_ROWS_AT_ONCE = 1_000  # that are read back
_ALIKE = 20  # failures that end a run in which nothing was answered
_OBJECTS = 50_000  # made between two searches for cycles; Python's own number is 700
_MOST_TOKENS = 2**31 - 1
_TOKENS = ("prompt", "cached", "response")
_SHOWN, _LONGEST = 2, 400  # rejected answers in a message, and characters of each
_SUMMARY = {"recipe_digest", "rows", "errors"}  # what `generation.json` has at least
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream of Arrow's


def ask(
    queries: "Dataset",
    teachers: Answerer,
    client: CachedClient,
    *,
    title: str,
    file: Path | None = None,
    look: "Look | None" = None,
) -> "Dataset":
    """Answer rows of `id`, `query`, `group`, `reference`, `split`, in their order.

    One row a sample, with `schema.answer_features`, in memory or in an Arrow `file`. Safe inside
    a running event loop: the sampling runs on a loop of its own in another thread. Ctrl-C waits
    for the requests in flight, so that what was paid is kept. Raises what no row would escape,
    such as `AccessError` and `BudgetReached`, and `GenerationError` where the first rows all fail
    alike. `look` sees the rows of each query when they come, and may raise one to end the run.
    """
    with _collect_rarely(), Progress(title, len(queries), meter=client.meter) as progress:
        client.progress = progress
        rows = _Rows(queries, teachers, client, look)
        answered = work_in_thread(lambda: rows.map(file), stop=rows.stop)
        if client.rejected_before:
            note = f"{client.rejected_before} rejected for good before: --ask-again asks them again"
            progress.advance(0, note=note)
    if rows.fatal is not None:
        raise rows.fatal
    return answered


class _Rows:
    """The rows of all queries, each started when the client has a place for it."""

    def __init__(
        self, queries: "Dataset", teachers: Answerer, client: CachedClient, look: "Look | None"
    ) -> None:
        self._look_at = look
        self.queries, self.teachers, self.client = queries, teachers, client
        self.fatal: DistillError | None = None
        self._alike: Counter[tuple[object, ...]] = Counter()
        self._started = self._answered = 0
        self._starting = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def map(self, file: Path | None) -> "Dataset":
        """Answer all queries on an event loop of this thread's own, into memory or a file."""
        from datasets import Dataset

        count, features = len(self.queries), answer_features(self.teachers.columns)
        if not count:
            return Dataset.from_dict({name: [] for name in features}, features)
        size = max(_QUERIES_AT_A_PLACE, -(-count // _PLACES))
        places = Dataset.from_dict({"first": range(0, count, size)})

        async def answer(batch: Mapping[str, list[int]]) -> "pa.Table":
            (first,) = batch["first"]
            return await self._answer_rows(slice(first, first + size))

        try:
            with without_bars():
                return places.map(
                    answer,
                    batched=True,
                    batch_size=1,
                    remove_columns=places.column_names,
                    features=features,
                    new_fingerprint=digest(
                        [_VERSION, self.queries._fingerprint, *self.teachers.parts]
                    )[:32],
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
        self.client.stop()
        self.fatal = self.fatal or reason

    async def _answer_rows(self, part: slice) -> "pa.Table":
        """All samples of some queries, which are read when it is their turn."""
        import pyarrow as pa

        self._loop = asyncio.get_running_loop()
        tasks = []
        # Rows start in order, each when it is its turn: ten thousand tasks that wait for it would
        # hold back the first request, and every later one a little.
        async with self._starting:
            batch = self.queries[part]
            for row in zip(*batch.values(), strict=True):
                await self.client.places.acquire()
                self._started += 1
                query = dict(zip(batch, row, strict=True))
                tasks.append(asyncio.create_task(self._one(query)))
        rows = [row for task in tasks for row in await task]
        schema = answer_features(self.teachers.columns).arrow_schema
        try:
            return pa.Table.from_pylist(rows, schema=schema)
        except (ValueError, OverflowError):  # an answer of an earlier version, or a sampler's own
            return pa.Table.from_pylist([_storable(row) for row in rows], schema=schema)

    async def _one(self, query: dict[str, Any]) -> list[dict[str, Any]]:
        asked = {**query, "teacher": self.teachers.model, "sample": 0}
        answering = self.teachers.answer(query["query"], self.client, query["reference"])
        try:
            rows = await outcome(answering)
            if self._look_at and not isinstance(rows, Exception):
                self._look_at([{**asked, **row} for row in rows])
        except (*FATAL, GenerationError) as error:
            self.stop(error)
            return [{**asked, "error": _failure(error)}]
        finally:
            self.client.places.release()
        if isinstance(rows, Exception):
            failed = _failure(rows)
            if not isinstance(rows, InterruptedError):
                self.client.progress.advance(1)
                self._look(failed)
            return [{**asked, "error": failed}]
        self.client.progress.advance(1)
        self._answered += 1
        return [{**asked, **row} for row in rows]

    def _look(self, failed: dict[str, Any]) -> None:
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


def _storable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without counts that nobody can have counted, and with text that can be written."""
    fields = dict(row)
    for name, value in row.items():
        if isinstance(value, int) and abs(value) > _MOST_TOKENS:
            fields[name] = None
        elif isinstance(value, str):
            fields[name] = value.encode(errors="replace").decode()
        elif isinstance(value, Mapping):
            fields[name] = _storable(value)
        elif isinstance(value, list):
            fields[name] = [text.encode(errors="replace").decode() for text in value]
    return fields


@contextmanager
def _collect_rarely() -> Iterator[None]:
    """Search for unreachable cycles less often: much is made here, and little of it is cyclic.

    A quarter more rows a second; costs some megabytes. What was set before is set again.
    """
    before = gc.get_threshold()
    if 0 < before[0] < _OBJECTS:
        gc.set_threshold(_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _failure(error: Exception) -> dict[str, Any]:
    """The value of a row's `error`."""
    if isinstance(error, RequestError):
        facts: tuple[str, int | None, int] = (error.type, error.status, error.attempts)
    else:
        facts = (type(error).__name__, None, 1)
    return {"type": facts[0], "status": facts[1], "message": str(error), "attempts": facts[2]}


def query_texts(queries: "Dataset") -> Iterator[str]:
    """The queries in their order, a few of them in memory."""
    for some in queries.select_columns(["query"]).iter(batch_size=_ROWS_AT_ONCE):
        yield from some["query"]


def stream(rows: "Dataset") -> Iterator["pa.Table"]:
    """The rows in their order, a few at a time and without mapping the files into memory.

    Mapped pages count as this process's memory until the system takes them back.
    """
    import pyarrow as pa

    if rows._indices is not None or not rows.cache_files:
        yield from rows.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE)
        return
    for file in rows.cache_files:
        with pa.OSFile(file["filename"]) as source, pa.ipc.open_stream(source) as batches:
            for batch in batches:
                for start in range(0, len(batch), _ROWS_AT_ONCE):
                    yield pa.Table.from_batches([batch.slice(start, _ROWS_AT_ONCE)])


def finish(rows: "Dataset", folder: Path) -> None:
    """Make a folder that `load_from_disk` reads of the rows, which are in its files already: its
    `ROWS_FILE`, which there is none of without queries, and its `MIX_FILES` behind it.
    """
    import pyarrow as pa

    mixed = sorted(path.name for path in folder.glob(MIX_FILES))
    schema = rows.features.arrow_schema
    if not (folder / ROWS_FILE).is_file():
        with pa.OSFile(str(folder / ROWS_FILE), "wb") as file, pa.ipc.new_stream(file, schema):
            pass
    # A dataset can't be saved over its own file: one without rows has the same description.
    empty = type(rows)(schema.empty_table(), fingerprint=rows._fingerprint)
    with without_bars(), TemporaryDirectory(dir=folder) as description:
        empty.save_to_disk(description)
        shutil.move(Path(description, "dataset_info.json"), folder)
        state = json.loads(Path(description, "state.json").read_text(encoding="utf-8"))
    files = [{"filename": name} for name in (ROWS_FILE, *mixed)]
    state |= {"_data_files": files, "_fingerprint": rows._fingerprint}
    text = json.dumps(state, indent=2, sort_keys=True)
    (folder / "state.json").write_text(text + "\n", encoding="utf-8")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """What a run's folder says of its answers; None where its files are not as it says.

    Whatever is missing, torn or unreadable is written anew from the journal.
    """
    answers = folder / "answers"
    recipe = [answers / "recipe" / name for name in ("recipe.yaml", "prompt.md")]
    try:
        summary, state, _ = (
            json.loads((answers / name).read_text(encoding="utf-8"))
            for name in ("generation.json", "state.json", "dataset_info.json")
        )
        files = [answers / one["filename"] for one in state["_data_files"]]
        whole = all(map(Path.is_file, recipe)) and files and all(map(_has_its_end, files))
        return summary if whole and summary.keys() >= _SUMMARY else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _has_its_end(rows: Path) -> bool:
    """Whether a file of rows ends as it was written to its end; without a library to read it."""
    with rows.open("rb") as file:
        file.seek(-len(_END), SEEK_END)
        return file.read() == _END


def tally(rows: "Dataset") -> dict[str, Any]:
    """What became of rows, for `generation.json`: those that can be used, rejections by their
    reason, failures, and tokens as they were paid for.
    """
    import pyarrow.compute as pc

    count, errors = 0, 0
    rejected, tokens = Counter[str](), dict.fromkeys(_TOKENS, 0)
    for some in stream(rows):
        count += len(some)
        errors += len(some) - some["error"].null_count
        for reason in pc.value_counts(some["rejection"].drop_null()).to_pylist():
            rejected[reason["values"]] += reason["counts"]
        # All samples of one request share its prompt.
        first = some.filter(pc.equal(some["sample"], 0))
        for kind in _TOKENS:
            counted = some if kind == "response" else first
            tokens[kind] += pc.sum(counted[f"teacher_{kind}_tokens"]).as_py() or 0
    return {
        "rows": count,
        "kept": count - errors - rejected.total(),
        "rejected": dict(rejected),
        "errors": errors,
        "tokens": tokens,
    }


class FirstRows:
    """Ends a run of which the first `most` queries give no row that can be used; 0: never."""

    def __init__(self, recipe: Recipe, most: int) -> None:
        """Looks at rows as they come, in whatever order."""
        self._recipe, self._most = recipe, most
        self._rejected: list[Mapping[str, Any]] = []
        self._done = not most

    def look(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """See the rows of one query; raises `GenerationError` for the last of `most` bad ones."""
        if self._done:
            return
        if any(row.get("rejection") is None for row in rows):
            self._done = True
            return
        self._rejected.append(rows[0])
        if len(self._rejected) == self._most:
            self._done = True
            raise GenerationError(
                f"Of the first {self._most} rows none can be used, so nothing more was asked. "
                f"{explain_rejections(self._rejected, self._recipe)} What was paid is kept: "
                "mend the recipe and run again."
            )


def explain_rejections(rejected: Sequence[Mapping[str, Any]], recipe: Recipe) -> str:
    """Why rows were rejected, what was said in two of them, and what would help."""
    reasons = Counter(str(row["rejection"]) for row in rejected)
    counted = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    shown = ""
    for row in rejected[:_SHOWN]:
        # A `repr` is one line, and nothing in it steers a terminal.
        texts = (shortened(repr(text), _LONGEST) for text in (readable(row["query"]), row["raw"]))
        shown += "\n  {}\n    -> {}".format(*texts)
    help = "; ".join(_remedy(reason, recipe) for reason in reasons)
    return f"Rejected: {counted}. The teacher said:{shown}\nWhat would help: {help}."


def _remedy(reason: str, recipe: Recipe) -> str:
    reason, answer = re.sub(r"^turn \d+: ", "", reason), recipe.answer
    if reason.startswith(FAILED):
        name = reason.removeprefix(FAILED)
        # One prompt of several names its checks for itself.
        check = {one.name: one for one in recipe.all_checks.values()}[name]
        rule = f" ({check.covers})" if check.covers else ""
        return (
            f"ask for what the check {name} demands{rule} in prompt.md, mend the check, "
            f"{check.demand}, or leave it out of `keep`"
        )
    unread = "ask in prompt.md for nothing but the JSON, or change answer.json_schema"
    if answer.pattern:
        unread = (
            f"answer.pattern {answer.pattern!r} never matches: change it, or ask in prompt.md for "
            "that form"
        )
    remedies = {
        TRUNCATED: f"raise sampling.max_tokens, which is {recipe.sampling.max_tokens}",
        OUTSIDE_CHOICES: f"ask in prompt.md for one of answer.choices {list(answer.choices or ())} "
        "word for word, or add what is said to them",
        OFF_SCHEMA: "ask in prompt.md for JSON of the form in answer.json_schema, or change the "
        "schema",
        UNPARSABLE: unread,
        NONE_PARSED: unread,
        EMPTY: "look at prompt.md, and raise sampling.max_tokens where the model thinks first",
        CALLS: "say `turns: last`, or leave out such rows: what the tool returns isn't known",
        NO_MAJORITY: "lower `agreement`, or ask more teachers",
        REFUSED: "look at `verifier`, which holds for none of them",
        NO_SCORE: "look at `judge.pattern`, `judge.scale` and the judge's prompt",
    }
    return remedies.get(reason, "look at prompt.md and at `answer:` in recipe.yaml")

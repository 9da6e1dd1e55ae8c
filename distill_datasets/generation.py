"""Queries to answers: a recipe's teacher asked, every answer journaled, the rows saved."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from distill_datasets import __version__
from distill_datasets.answers import ROWS_FILE, Tally, finish
from distill_datasets.asking import ask
from distill_datasets.batching.purchase import Patience, buy_in_batches
from distill_datasets.errors import DistillError, OutputError
from distill_datasets.journal import Journal
from distill_datasets.ledger import Source, raw_answers, replay
from distill_datasets.limits import Limits
from distill_datasets.money import Meter
from distill_datasets.panel import Teachers, models_of, open_teachers
from distill_datasets.queries import load_queries
from distill_datasets.recipe import Recipe, load_recipe
from distill_datasets.sampler import Sampler
from distill_datasets.shares import Share

if TYPE_CHECKING:
    from datasets import Dataset


_BUILDING = "answers.partial"


@dataclass(frozen=True)
class Generated:
    """What `generate` wrote: the run's folder, the rows, and what became of them."""

    path: Path
    rows: "Dataset"
    kept: int
    rejected: Mapping[str, int]
    errors: int


def generate(  # noqa: PLR0913 (whom to ask what, how fast, and where it goes)
    recipe: Recipe | str | Path,
    *,
    teacher: Sampler | str | None = None,
    out: str | Path,
    concurrency: int = 256,
    requests_per_minute: float | None = None,
    tokens_per_minute: float | None = None,
    meter: Meter | None = None,
    limit: int | None = None,
    ledger: bool = True,
    share: Share | None = None,
    batch: Patience | None = None,
    stream: bool = False,
    processes: int = 1,
) -> Generated:
    """Ask the recipe's teachers every query; continue where an earlier call stopped.

    Writes `out/journal.sqlite` (raw answers, as they arrive) and `out/answers/` (all rows in the
    queries' order, once every row has been asked). A row that fails is a row with an `error`,
    asked again by the next call; answers in the journal are never asked again, nor is what a
    teacher rejected for good. At most `concurrency` requests are in flight to each teacher, and as
    many as it takes gladly. With a `meter`, a spent budget ends the run: everything bought is
    kept, and a later call goes on. `limit` takes the first queries only. A release is a recipe
    too: the answers in its ledger are not asked for again, unless `ledger` is False. A `teacher`
    takes the place of all that the recipe names.
    With a `share`, only that of the queries is asked, in a part's own folder in `out`: `publish`
    joins the parts. With `batch`, answers come out of the provider's batches where it has them.
    With `stream`, every answer that is bought is journaled with the time to its first token; with
    `processes`, those of a Tinker teacher are asked for by so many.
    Costs one request a query and teacher asked. Raises `GenerationError` when the first rows all
    fail alike, `BudgetReached`, and whatever `load_recipe` and `open_sampler` raise, before any
    request.
    """
    source = None if isinstance(recipe, Recipe) else recipe
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if isinstance(teacher, str):
        recipe, teacher = recipe.with_teacher(teacher), None
    queries = load_queries(recipe)
    if limit is not None:
        queries = queries.select(range(min(limit, len(queries))))
    if share is not None:
        queries, out = share.of(queries), share.folder(out)
    out = writable_folder(out)
    if source is not None and ledger:
        replay(source, out)
    teachers = open_teachers(recipe, teacher, stream=stream, processes=processes)
    if meter is not None:
        meter.check(models_of(teachers.recipe))
    limits = Limits(concurrency, requests_per_minute, tokens_per_minute)
    with Journal(out / "journal.sqlite") as journal, _writing(out):
        if batch is not None:
            buy_in_batches(queries, teachers.answering, journal, patience=batch, meter=meter)
        rows = ask(
            queries,
            teachers.answering,
            journal=journal,
            title="generate",
            limits=limits,
            meter=meter,
            file=out / _BUILDING / ROWS_FILE,
        )
        record = partial(share.record, queries) if share else None
        return _save(rows, teachers, out, meter, record)


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


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Where the disk doesn't take the rows, the answers are safe all the same."""
    shutil.rmtree(out / _BUILDING, ignore_errors=True)
    try:
        yield
    except DistillError:
        raise
    except OSError as error:
        raise OutputError(
            f"Can't write {str(out / 'answers')!r}: {error}. The answers are in "
            f"{out / 'journal.sqlite'}; free some space and run again: nothing is asked twice."
        ) from error


def _save(
    rows: "Dataset",
    teachers: Teachers,
    out: Path,
    meter: Meter | None,
    record: Callable[[Path], None] | None,
) -> Generated:
    from datasets import Dataset

    recipe = teachers.recipe
    tally = Tally.of(rows)
    summary = {
        "recipe": recipe.name,
        "recipe_digest": recipe.digest,
        **teachers.facts,
        "rows": tally.rows,
        "kept": tally.kept,
        "rejected": dict(tally.rejected),
        "errors": tally.errors,
        "tokens": dict(tally.tokens),
        "created": datetime.now(UTC).date().isoformat(),
        "versions": {"distill-datasets": __version__, "datasets": version("datasets")},
    }
    if meter is not None:
        source = Source(rows, out / "journal.sqlite")
        with Journal(source.journal) as journal:
            answers = raw_answers([source], recipe, summary)
            summary["cost"] = meter.statement(answers, journal)
    folder, building = out / "answers", out / _BUILDING
    finish(rows, building)
    recipe.dump(building / "recipe")
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    (building / "generation.json").write_text(text + "\n", encoding="utf-8")
    if record is not None:
        record(building)
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)
    rows = Dataset.load_from_disk(str(folder))
    return Generated(out, rows, tally.kept, tally.rejected, tally.errors)

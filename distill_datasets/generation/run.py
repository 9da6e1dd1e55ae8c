"""Queries to answers: a recipe's teacher asked, every answer journaled, the rows saved."""

import json
import math
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets import __version__
from distill_datasets.errors import DistillError, OutputError
from distill_datasets.files import writable_folder
from distill_datasets.generation.batch_api import BatchSettings, buy_in_batches
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient
from distill_datasets.generation.ledger import JournaledRows, raw_answers, replay
from distill_datasets.generation.pricing import Meter
from distill_datasets.generation.rate_limit import Limits
from distill_datasets.generation.rows import ROWS_FILE, Tally, ask, finish
from distill_datasets.generation.shards import Share
from distill_datasets.generation.teachers import Teachers, open_teachers
from distill_datasets.models.sampler import Sampler, digest
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.queries import load_queries
from distill_datasets.recipes.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset


_BUILDING = "answers.partial"
_SUMMARY = "generation.json"


@dataclass(frozen=True)
class Generated:
    """What `generate` wrote: the run's folder, and what became of the rows.

    `first_token` has the `median` and the `p95` of the seconds to the first token, over all
    `answers` of the folder's journal that were streamed.
    """

    path: Path
    kept: int
    rejected: Mapping[str, int]
    errors: int
    first_token: Mapping[str, float] | None = None

    @cached_property
    def rows(self) -> "Dataset":
        """All rows, in the queries' order."""
        from datasets import Dataset

        return Dataset.load_from_disk(str(self.path / "answers"))


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
    batch: BatchSettings | None = None,
    stream: bool = False,
    processes: int = 1,
) -> Generated:
    """Ask the recipe's teachers every query; continue where an earlier call stopped.

    Writes `out/journal.sqlite` (raw answers, as they arrive) and `out/answers/` (all rows in the
    queries' order, once every row has been asked). A row that fails is a row with an `error`,
    asked again by the next call; answers in the journal are never asked again, nor is what a
    teacher rejected for good; a finished run is returned as it is. At most `concurrency` requests
    are in flight to each teacher, and as many as it takes gladly. With a `meter`, a spent budget
    ends the run: everything bought is kept, and a later call goes on. `limit` takes the first
    queries only. A release is a recipe too: the answers in its ledger are not asked for again,
    unless `ledger` is False. A `teacher` takes the place of all that the recipe names.
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
    teachers = open_teachers(recipe, teacher, stream=stream, processes=processes)
    folder = share.folder(out) if share else Path(out)
    run = _Run(teachers, folder, limit, share, meter, stream)
    limits = Limits(concurrency, requests_per_minute, tokens_per_minute)
    return run.finished() or run.go_on(source if ledger else None, limits, batch)


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


@dataclass(frozen=True)
class _Run:
    """What is asked of whom, and the folder that says what came of it."""

    teachers: Teachers
    folder: Path
    limit: int | None
    share: Share | None
    meter: Meter | None
    stream: bool

    @property
    def journal(self) -> Path:
        """The file of raw answers."""
        return self.folder / "journal.sqlite"

    def queries(self) -> "Dataset":
        """Those that are asked here."""
        queries = load_queries(self.teachers.recipe)
        if self.limit is not None:
            queries = queries.select(range(min(self.limit, len(queries))))
        return self.share.of(queries) if self.share else queries

    @cached_property
    def fingerprint(self) -> str | None:
        """Names everything that the folder depends on; None where the queries are not pinned."""
        recipe = self.teachers.recipe
        if not recipe.queries.pinned:
            return None
        described = recipe.model_dump(mode="json")
        parts = [recipe.digest, described, *self.teachers.parts]
        return digest([__version__, self.limit, str(self.share), parts])

    def finished(self) -> Generated | None:
        """What an equal run made, where no row failed and none is priced: nothing is left to do."""
        path = self.folder / "answers" / _SUMMARY
        if self.meter or not self.fingerprint or not (path.is_file() and self.journal.is_file()):
            return None
        summary = json.loads(path.read_text(encoding="utf-8"))
        if summary.get("fingerprint") != self.fingerprint:
            return None
        if summary["errors"] or "cost" in summary:
            return None
        kept, rejected = summary["kept"], summary["rejected"]
        return Generated(self.folder, kept, rejected, 0, summary["first_token"])

    def go_on(
        self, release: str | Path | None, limits: Limits, batch: BatchSettings | None
    ) -> Generated:
        """Ask whatever neither the journal nor the ledger of a `release` holds."""
        queries = self.queries()
        folder = writable_folder(self.folder)
        if release is not None:
            replay(release, folder)
        if self.meter is not None:
            self.meter.check(self.teachers.models)
        with Journal(self.journal) as journal, _writing(folder):
            if batch is not None:
                buy_in_batches(queries, self.teachers, journal, settings=batch, meter=self.meter)
            client = CachedClient(journal, limits=limits, meter=self.meter)
            file = folder / _BUILDING / ROWS_FILE
            rows = ask(queries, self.teachers, client, title="generate", file=file)
            return self.save(queries, rows, journal)

    def save(self, queries: "Dataset", rows: "Dataset", journal: Journal) -> Generated:
        """Put the folder of answers in its place, all at once."""
        tally = Tally.of(rows)
        first = _quantiles(journal.first_tokens()) if self.stream else None
        summary = {**self._summary(tally), "first_token": first}
        if self.meter is not None:
            answered = [JournaledRows(rows, self.journal)]
            answers = raw_answers(answered, self.teachers.recipe, summary)
            summary["cost"] = self.meter.statement(answers, journal)
        folder, building = self.folder / "answers", self.folder / _BUILDING
        finish(rows, building)
        self.teachers.recipe.dump(building / "recipe")
        text = json.dumps(summary, indent=2, ensure_ascii=False)
        (building / _SUMMARY).write_text(text + "\n", encoding="utf-8")
        if self.share:
            self.share.record(queries, building)
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
        return Generated(self.folder, tally.kept, tally.rejected, tally.errors, first)

    def _summary(self, tally: Tally) -> dict[str, Any]:
        recipe = self.teachers.recipe
        return {
            "recipe": recipe.name,
            "recipe_digest": recipe.digest,
            **self.teachers.facts,
            "rows": tally.rows,
            "kept": tally.kept,
            "rejected": dict(tally.rejected),
            "errors": tally.errors,
            "tokens": dict(tally.tokens),
            "created": datetime.now(UTC).date().isoformat(),
            "versions": {"distill-datasets": __version__, "datasets": version("datasets")},
            "fingerprint": self.fingerprint,
        }


def _quantiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """Of what is sorted already."""
    if not seconds:
        return None
    late = seconds[math.ceil(0.95 * len(seconds)) - 1]
    return {"answers": len(seconds), "median": statistics.median(seconds), "p95": late}

"""Queries to answers: a recipe's teachers asked, every answer journaled, the rows saved."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets import __version__, html
from distill_datasets.errors import DistillError, OutputError
from distill_datasets.files import one_writer, replacing
from distill_datasets.generation.batch_api import buy_in_batches
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient
from distill_datasets.generation.examples import choose_examples
from distill_datasets.generation.ledger import (
    JournaledRows,
    raw_answers,
    reused,
    take_over,
    verify_answers,
)
from distill_datasets.generation.mix import (
    MixedRows,
    UntouchedModel,
    answer_mix,
    draw_rows,
    open_untouched,
)
from distill_datasets.generation.pricing import Meter
from distill_datasets.generation.rows import ROWS_FILE, FirstRows, Tally, ask, finish, read_summary
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.generation.shards import Share
from distill_datasets.generation.teachers import Teachers, open_teachers
from distill_datasets.models.sampler import Sampler, digest
from distill_datasets.notebooks import interruptible
from distill_datasets.recipes.evidence import keep_for_evidence
from distill_datasets.recipes.queries import load_queries
from distill_datasets.recipes.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame


_SHOWN = 5  # rows in a notebook


@dataclass(frozen=True)
class Generated:
    """What `generate` wrote: the run's folder, and what became of the rows.

    `first_token` has the `median` and the `p95` of the seconds to the first token, over all
    `answers` of the folder's journal that were streamed. `from_ledger` says how many `answers`
    came out of which release's ledger, its `source` at a `revision`, and how many were `bought`.
    """

    path: Path
    kept: int
    rejected: Mapping[str, int]
    errors: int
    first_token: Mapping[str, float] | None = None
    from_ledger: Mapping[str, Any] | None = None

    @cached_property
    def rows(self) -> "Dataset":
        """All rows, in the queries' order."""
        from datasets import Dataset

        return Dataset.load_from_disk(str(self.path / "answers"))

    def to_pandas(self) -> "DataFrame":
        """All rows, in the queries' order."""
        return self.rows.to_pandas()

    def _repr_html_(self) -> str:
        counts = {"kept": self.kept, **self.rejected, "failed": self.errors}
        total = max(1, sum(counts.values()))
        shares = [[name, rows, f"{rows / total:.1%}"] for name, rows in counts.items() if rows]
        first = self.rows.select(range(min(len(self.rows), _SHOWN)))
        names = [name for name in ("query", "answer", "response") if name in first.column_names]
        cells = [[row[name] for name in names] for row in first]
        return html.card(
            f"Generated: {self.kept:,} rows in {self.path}",
            html.table(shares, ["rows", "", "of all"]),
            html.table(cells, names),
        )


@interruptible
def generate(
    recipe: Recipe | str | Path,
    *,
    out: str | Path,
    teacher: Sampler | str | None = None,
    settings: GenerateSettings | None = None,
    meter: Meter | None = None,
    share: Share | None = None,
) -> Generated:
    """Ask the recipe's teachers every query; continue where an earlier call stopped.

        generate("language_id", teacher="pocket", out="runs/demo")

    Writes `out/journal.sqlite` (raw answers, as they arrive) and `out/answers/` (all rows in the
    queries' order, then those of the recipe's mix, once all were asked). A row that fails has an
    `error`, and is asked again by the next call; nothing else is asked twice, and a finished run is
    returned as it is. A `teacher` takes the place of all that the recipe names. Answers in the
    ledger of a release are taken over. The parts that each `share` of the queries makes are joined
    by `publish`.

    Costs one request a query and teacher asked. Raises `OutputError` where another process is at
    work in the folder, `GenerationError` when the first rows all fail alike or are all rejected,
    `BudgetReached`, and what `load_recipe` and `open_sampler` raise, before any request.
    """
    settings = settings or GenerateSettings()
    teachers = open_teachers(recipe, teacher, trust=settings.trust, **settings.opening)
    folder = share.folder(out) if share else Path(out)
    untouched = open_untouched(teachers.recipe, settings)
    if meter is not None:
        meter.check([*teachers.models, *(one.model for one in untouched.values())])
    teachers, found = _with_examples(teachers, folder, settings, meter)
    fingerprint = _fingerprint(teachers, untouched, settings, share)
    if meter is None and (summary := _finished(folder, fingerprint, settings)):
        return _generated(folder, summary)
    chosen = select_rows(teachers.recipe, untouched, settings, share)
    with one_writer(folder, "run"), _new_answers(folder) as building:
        if settings.ledger and not isinstance(recipe, Recipe):
            take_over(recipe, folder)
        with Journal(folder / "journal.sqlite", bought_only=not settings.ledger) as journal:
            verified = verify_answers(chosen.queries, teachers, journal, settings, meter)
            rows = _answer(chosen, teachers, journal, settings, meter, building)
            summary = _summary(teachers, rows, journal, meter) | chosen.facts
        summary |= {"fingerprint": fingerprint, **found}
        summary["first_token"] = summary["first_token"] if settings.stream else None
        if verified and "from_ledger" in summary:
            summary["from_ledger"]["verified"] = verified
        _write(building, rows, teachers.recipe, summary)
        if share:
            share.record(chosen.queries, building, whole=chosen.whole, more=chosen.more)
    return _generated(folder, summary)


def _with_examples(
    teachers: Teachers, folder: Path, settings: GenerateSettings, meter: Meter | None
) -> tuple[Teachers, dict[str, Any]]:
    """Teachers whose recipe has its examples chosen, and what the summary says of the choice."""
    if teachers.recipe.examples is None or teachers.recipe.examples.choose is None:
        return teachers, {}
    with one_writer(folder, "run"):
        chosen, found = choose_examples(teachers, folder / "journal.sqlite", settings, meter)
    return chosen, {"examples": found}


def _answer(
    chosen: "ChosenRows",
    teachers: Teachers,
    journal: Journal,
    settings: GenerateSettings,
    meter: Meter | None,
    folder: Path,
) -> "Dataset":
    """The rows of the queries, and behind them those of the mix, in files of a folder."""
    from datasets import concatenate_datasets

    if settings.batch:
        buy_in_batches(chosen.queries, teachers, journal, settings=settings, meter=meter)
    again = settings.ask_again
    client = CachedClient(journal, limits=settings.limits, meter=meter, ask_rejected_again=again)
    look = FirstRows(teachers.recipe, settings.stop_after_rejected).look
    file = folder / ROWS_FILE
    rows = ask(chosen.queries, teachers, client, title="generate", file=file, look=look)
    more = answer_mix(chosen.mixed, teachers, journal, settings, meter, folder)
    return concatenate_datasets([rows, *more]) if more else rows


def _finished(
    folder: Path, fingerprint: str | None, settings: GenerateSettings
) -> dict[str, Any] | None:
    """What an equal run made, where no row failed and none is priced: nothing is left to do."""
    if fingerprint is None or not (folder / "journal.sqlite").is_file():
        return None
    if (summary := read_summary(folder)) is None:
        return None
    if summary.get("fingerprint") != fingerprint or summary["errors"] or "cost" in summary:
        return None
    unwanted = settings.verify_ledger or not settings.ledger
    return None if unwanted and "from_ledger" in summary else summary


def _generated(folder: Path, summary: Mapping[str, Any]) -> Generated:
    return Generated(
        folder,
        summary["kept"],
        summary["rejected"],
        summary["errors"],
        summary["first_token"],
        summary.get("from_ledger"),
    )


@dataclass(frozen=True)
class ChosenRows:
    """The queries to ask, and the rows of the recipe's mix; of a share, out of the `whole` run's
    number of queries.
    """

    queries: "Dataset"
    mixed: Sequence[MixedRows]
    whole: int

    @property
    def more(self) -> int:
        """How many rows stand behind those of the queries."""
        return sum(len(one.rows) for one in self.mixed)

    @property
    def facts(self) -> dict[str, Any]:
        """What `generation.json` says of the mix."""
        return {"mix": [one.facts for one in self.mixed]} if self.mixed else {}


def select_queries(recipe: Recipe, settings: GenerateSettings) -> "Dataset":
    """A recipe's queries, those of them that the settings ask for."""
    return _asked(recipe, load_queries(recipe), settings)


def select_rows(
    recipe: Recipe,
    untouched: Mapping[str, UntouchedModel],
    settings: GenerateSettings,
    share: Share | None,
) -> ChosenRows:
    """What `generate` answers: of the queries asked for the share, then the mix beside them."""
    every = load_queries(recipe)
    asked = _asked(recipe, every, settings)
    mixed = draw_rows(recipe, untouched, every, asked, share)
    return ChosenRows(share.of(asked) if share else asked, mixed, len(asked))


def _asked(recipe: Recipe, queries: "Dataset", settings: GenerateSettings) -> "Dataset":
    if settings.limit is not None:
        queries = queries.select(range(min(settings.limit, len(queries))))
    return keep_for_evidence(recipe, queries) if settings.for_evidence else queries


def _fingerprint(
    teachers: Teachers,
    untouched: Mapping[str, UntouchedModel],
    settings: GenerateSettings,
    share: Share | None,
) -> str | None:
    """Names everything that the answers depend on; None where the queries are not pinned."""
    recipe = teachers.recipe
    if not recipe.pinned:
        return None
    parts = [recipe.digest, recipe.model_dump(mode="json"), *teachers.parts]
    parts += [one.parts for one in untouched.values()]
    parts += ["for evidence"] if settings.for_evidence else []
    return digest([__version__, settings.limit, str(share), parts])


@contextmanager
def _new_answers(folder: Path) -> Iterator[Path]:
    """The folder of answers to fill; where the disk doesn't take it, the journal is safe."""
    with replacing(folder / "answers") as building:
        try:
            yield building
        except DistillError:
            raise
        except OSError as error:
            raise OutputError(
                f"Can't write {str(folder / 'answers')!r}: {error}. The answers are in "
                f"{folder / 'journal.sqlite'}; free some space and run again: nothing is asked "
                "twice."
            ) from error


def _write(answers: Path, rows: "Dataset", recipe: Recipe, summary: Mapping[str, Any]) -> None:
    finish(rows, answers)
    recipe.dump(answers / "recipe")
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    (answers / "generation.json").write_text(text + "\n", encoding="utf-8")


def _summary(
    teachers: Teachers, rows: "Dataset", journal: Journal, meter: Meter | None
) -> dict[str, Any]:
    tally = Tally.of(rows)
    summary = {
        "recipe": teachers.recipe.name,
        "recipe_digest": teachers.recipe.digest,
        **teachers.facts,
        "rows": tally.rows,
        "kept": tally.kept,
        "rejected": dict(tally.rejected),
        "errors": tally.errors,
        "tokens": dict(tally.tokens),
        "created": datetime.now(UTC).date().isoformat(),
        "versions": {"distill-datasets": __version__, "datasets": version("datasets")},
        "first_token": _quantiles(journal.first_tokens()),
    }
    if taken := reused(journal, rows, teachers):
        summary["from_ledger"] = taken
    if meter is not None:
        answers = raw_answers([JournaledRows(rows, journal.path)], teachers.recipe, summary)
        summary["cost"] = meter.statement(answers, journal)
    return summary


def _quantiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """Of what is sorted already."""
    if not seconds:
        return None
    late = seconds[math.ceil(0.95 * len(seconds)) - 1]
    return {"answers": len(seconds), "median": statistics.median(seconds), "p95": late}

"""Queries to answers: a recipe's teachers asked, every answer journaled, the rows saved.

Behind the queries come the rows of the recipe's mix; on a Ray cluster each part is such a run.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets import __version__
from distill_datasets.conversations import has_calls
from distill_datasets.errors import DistillError, GenerationError, OutputError, SettingsError
from distill_datasets.files import one_writer, replacing, writable_folder
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
from distill_datasets.generation.pricing import Meter
from distill_datasets.generation.rows import (
    MIX_FILES,
    ROWS_FILE,
    FirstRows,
    ask,
    finish,
    read_summary,
    tally,
)
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.generation.shards import Share
from distill_datasets.generation.teachers import PromptedModel, Teachers, open_teachers
from distill_datasets.models.sampler import Sampler, Sampling, digest
from distill_datasets.progress import Progress, interruptible
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.mix import draw_mix, mixed_messages
from distill_datasets.recipes.parsing import EMPTY, TRUNCATED, UNKNOWN_TOOL, Reading
from distill_datasets.recipes.queries import keep_for_evidence, load_queries
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.recipes.sections import MixPart
from distill_datasets.schema import answer_features
from distill_datasets.tables import html_card, html_table

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from pandas import DataFrame


_FAILURES = 3  # failures that a message quotes
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
        return html_card(
            f"Generated: {self.kept:,} rows in {self.path}",
            html_table(shares, ["rows", "", "of all"]),
            html_table(cells, names),
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
    teachers, found = choose_examples(teachers, folder, settings, meter)
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
            summary = _summary(teachers, rows, journal, settings, meter, verified)
        summary |= {**chosen.facts, **found, "fingerprint": fingerprint}
        finish(rows, building)
        teachers.recipe.dump(building / "recipe")
        text = json.dumps(summary, indent=2, ensure_ascii=False)
        (building / "generation.json").write_text(text + "\n", encoding="utf-8")
        if share:
            share.record(chosen.queries, building, whole=chosen.whole, more=chosen.more)
    return _generated(folder, summary)


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
    counts = summary["kept"], summary["rejected"], summary["errors"]
    return Generated(folder, *counts, summary["first_token"], summary.get("from_ledger"))


def _fingerprint(
    teachers: Teachers,
    untouched: Mapping[str, PromptedModel],
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


@dataclass(frozen=True)
class MixedRows:
    """The rows of one part of a mix, as `draw_mix` gives them; `model` answers them, if any."""

    part: MixPart
    rows: "Dataset"
    model: PromptedModel | None = None


@dataclass(frozen=True)
class ChosenRows:
    """The queries to ask, and the rows of the recipe's mix; of a share, out of the `whole` run's
    number of queries.
    """

    queries: "Dataset"
    whole: int
    mixed: Sequence[MixedRows] = ()

    @property
    def more(self) -> int:
        """How many rows stand behind those of the queries."""
        return sum(len(one.rows) for one in self.mixed)

    @property
    def facts(self) -> dict[str, Any]:
        """What `generation.json` says of the mix."""
        parts = [
            {
                "name": one.part.name,
                "share": one.part.share,
                "rows": len(one.rows),
                **({"identity": one.model.identity} if one.model else {}),
            }
            for one in self.mixed
        ]
        return {"mix": parts} if parts else {}


def select_queries(
    recipe: Recipe, settings: GenerateSettings, queries: "Dataset | None" = None
) -> "Dataset":
    """A recipe's queries, those of them that the settings ask for."""
    queries = load_queries(recipe) if queries is None else queries
    if settings.limit is not None:
        queries = queries.select(range(min(settings.limit, len(queries))))
    return keep_for_evidence(recipe, queries) if settings.for_evidence else queries


def select_rows(
    recipe: Recipe,
    untouched: Mapping[str, PromptedModel],
    settings: GenerateSettings,
    share: Share | None,
) -> ChosenRows:
    """What `generate` answers: of the queries asked for the share, then the mix beside them.

    No row of the mix is among the recipe's queries. A run in several shares has it in the first.
    """
    every = load_queries(recipe)
    asked = select_queries(recipe, settings, every)
    chosen = share.of(asked) if share else asked
    if not recipe.mix or (share and share.number > 1):
        return ChosenRows(chosen, len(asked))
    samples = recipe.sampling.n if recipe.choose == "route" else 1
    own = samples * sum(split == "train" for split in asked["split"])
    drawn = zip(recipe.mix, draw_mix(recipe, every, own), strict=True)
    mixed = [MixedRows(part, rows, untouched.get(part.name)) for part, rows in drawn]
    return ChosenRows(chosen, len(asked), mixed)


def open_untouched(recipe: Recipe, settings: GenerateSettings) -> dict[str, PromptedModel]:
    """The models that answer rows of a recipe's mix, by the parts' names; asks nobody.

    They answer without a prompt and without tools, and their text is taken as it is.
    """
    from distill_datasets.models.references import open_sampler

    sampling = Sampling(temperature=0.0, max_tokens=recipe.sampling.max_tokens)
    return {
        part.name: PromptedModel(
            open_sampler(part.model, lazily=True, timeout=settings.timeout),
            sampling,
            mixed_messages,
            _as_it_is,
            ["as it is"],
            lambda query, sampling: sampling,
            columns=recipe.answer_columns,
            says_request=True,
        )
        for part in recipe.mix
        if part.model
    }


def _as_it_is(query: str, reference: str | None, text: str, stop_reason: str) -> Reading:
    """A text that is the response; calls of tools that nobody offered are none."""
    if stop_reason == "length":
        return Reading(rejection=TRUNCATED)
    if not text.strip():
        return Reading(rejection=EMPTY)
    return Reading(rejection=UNKNOWN_TOOL) if has_calls(text) else Reading(response=text)


def _answer(
    chosen: ChosenRows,
    teachers: Teachers,
    journal: Journal,
    settings: GenerateSettings,
    meter: Meter | None,
    folder: Path,
) -> "Dataset":
    """The rows of the queries, and behind them those of the mix, in files of a folder."""
    from datasets import Dataset, concatenate_datasets

    def client() -> CachedClient:
        """One for each event loop, which `ask` makes anew."""
        again = settings.ask_again
        return CachedClient(journal, limits=settings.limits, meter=meter, ask_rejected_again=again)

    look = FirstRows(teachers.recipe, settings.stop_after_rejected).look
    if settings.batch:
        buy_in_batches(chosen.queries, teachers, journal, settings=settings, meter=meter)
    file = folder / ROWS_FILE
    found = [ask(chosen.queries, teachers, client(), title="generate", file=file, look=look)]
    for number, one in enumerate(chosen.mixed):
        file = folder / MIX_FILES.replace("*", f"{number:05d}")
        if not len(one.rows):
            continue
        if one.model is None:
            _write_answered(one.rows, teachers.columns, file)
            found.append(Dataset.from_file(str(file)))
            continue
        if settings.batch and getattr(one.model.sampler, "batches", None) is not None:
            buy_in_batches(one.rows, one.model, journal, settings=settings, meter=meter)
        found.append(ask(one.rows, one.model, client(), title="generate mix", file=file))
    return concatenate_datasets(found) if len(found) > 1 else found[0]


def _write_answered(rows: "Dataset", columns: Sequence[str], file: Path) -> None:
    """Write rows that have their response as rows of answers, which nobody was asked for."""
    import pyarrow as pa

    schema = answer_features(columns).arrow_schema
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in rows.with_format("arrow").iter(batch_size=1_000):
            lines = [{**row, "sample": 0} for row in batch.to_pylist()]
            writer.write_table(pa.Table.from_pylist(lines, schema=schema))


def _summary(
    teachers: Teachers,
    rows: "Dataset",
    journal: Journal,
    settings: GenerateSettings,
    meter: Meter | None,
    verified: Mapping[str, int] | None,
) -> dict[str, Any]:
    summary = {
        "recipe": teachers.recipe.name,
        "recipe_digest": teachers.recipe.digest,
        **teachers.facts,
        **tally(rows),
        "created": datetime.now(UTC).date().isoformat(),
        "versions": {"distill-datasets": __version__, "datasets": version("datasets")},
        "first_token": _quantiles(journal.first_tokens() if settings.stream else ()),
    }
    if taken := reused(journal, rows, teachers):
        summary["from_ledger"] = {**taken, **({"verified": verified} if verified else {})}
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


@dataclass(frozen=True)
class RayRun:
    """The folder of the parts, for `publish`; how many rows they have, and how many failed."""

    path: Path
    rows: int
    errors: int


def generate_on_ray(
    recipe: Recipe | str | Path,
    *,
    out: Path | str,
    parts: int,
    teacher: Sampler | str | None = None,
    settings: GenerateSettings | None = None,
) -> RayRun:
    """Ask the recipe's teachers every query, in so many `parts` on the Ray cluster that is joined.

    `out` must be one folder for all machines; each part writes its own there, with a journal that
    one worker at a time holds. A later call skips parts that are done and goes on with the
    others, where nothing is asked twice. `settings` are those of a part, which takes one CPU. A
    `teacher` is pickled, or opened by each worker. Needs the extra `ray`. Raises `GenerationError`
    that names the parts that failed, once all others are done.
    """
    if parts < 1:
        raise SettingsError(f"A run has at least one part, found parts={parts!r}.")
    folder = writable_folder(out).resolve()
    source = recipe if isinstance(recipe, Recipe) else str(recipe)
    settings = settings or GenerateSettings()
    asked = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, trust=settings.trust)
    if teacher is not None:
        asked = asked.with_teacher(teacher if isinstance(teacher, str) else teacher.model)
    left, rows, errors, problems = list[int](), 0, 0, dict[int, str]()
    for number in range(1, parts + 1):
        summary = read_summary(Share(number, parts).folder(folder))
        if summary and not summary["errors"] and summary["recipe_digest"] == asked.digest:
            rows += summary["rows"]
        else:
            left.append(number)
    part = {"recipe": source, "teacher": teacher, "out": folder, "settings": settings}
    with Progress("ray", parts, unit="parts", start=parts - len(left)) as progress:
        for one in _answer_parts(left, {**part, "parts": parts}):
            rows, errors = rows + one["rows"], errors + one["errors"]
            if one["problem"]:
                problems[one["number"]] = one["problem"]
            progress.advance(1, note=f"part {one['number']}: {one['problem'] or 'done'}")
    if problems:
        said = [f"part {number}: {problem}" for number, problem in sorted(problems.items())]
        more = f"; and {len(said) - _FAILURES} more" if len(said) > _FAILURES else ""
        raise GenerationError(
            f"{len(said)} of {parts} parts failed: {'; '.join(said[:_FAILURES])}{more}. What they "
            "bought is kept: run again to go on with them."
        )
    return RayRun(folder, rows, errors)


def _answer_part(numbers: "pa.Table", *, parts: int, **asked: Any) -> "pa.Table":
    """What became of a part: a failure is a value here, so that the others go on."""
    import pyarrow as pa

    (number,) = numbers["number"].to_pylist()
    rows, errors, problem = 0, 0, ""
    try:
        made = generate(share=Share(number, parts), **asked)
        rows, errors = len(made.rows), made.errors
    except DistillError as error:
        problem = f"{type(error).__name__}: {error}"
    found = {"number": number, "rows": rows, "errors": errors, "problem": problem}
    return pa.Table.from_pylist([found])


def _answer_parts(numbers: Sequence[int], asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What becomes of parts, as they come; a block a part: Ray can run any part anywhere."""
    if not numbers:
        return
    import pyarrow as pa

    try:
        data = import_module("ray.data")
    except ImportError as error:
        raise SettingsError(
            "Running on Ray needs the extra: `pip install 'distill-datasets[ray]'`."
        ) from error
    data.DataContext.get_current().enable_progress_bars = False
    outcomes = data.from_arrow([pa.table({"number": [one]}) for one in numbers]).map_batches(
        _answer_part,
        fn_kwargs=dict(asked),
        batch_size=1,
        # The default makes pickled objects of nested columns, which `datasets` can't read.
        batch_format="pyarrow",
    )
    for table in outcomes.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
        yield from table.to_pylist()

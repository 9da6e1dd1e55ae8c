"""Queries to answers: a recipe's teacher asked, every answer journaled, the rows saved."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from distill_datasets import __version__
from distill_datasets.asking import Asking, ask
from distill_datasets.errors import OutputError
from distill_datasets.journal import Journal
from distill_datasets.ledger import replay
from distill_datasets.queries import load_queries
from distill_datasets.recipe import Recipe, load_recipe
from distill_datasets.sampler import Sampler

if TYPE_CHECKING:
    from datasets import Dataset


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

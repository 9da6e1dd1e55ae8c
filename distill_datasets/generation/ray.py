"""A run on a Ray cluster: Ray Data hands out the parts, and each is an ordinary `generate`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import DistillError, GenerationError, SettingsError
from distill_datasets.files import writable_folder
from distill_datasets.generation.rows import read_summary
from distill_datasets.generation.run import generate
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.generation.shards import Share
from distill_datasets.models.sampler import Sampler
from distill_datasets.progress import Progress
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe

if TYPE_CHECKING:
    import pyarrow as pa

_SHOWN = 3  # failures that a message quotes


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
    workers: int | None = None,
) -> RayRun:
    """Ask the recipe's teachers every query, in so many `parts` on the Ray cluster that is joined.

    `out` must be one folder for all machines; each part writes its own there, with a journal that
    one worker at a time holds. A later call skips parts that are done and goes on with the
    others, where nothing is asked twice. `settings` are those of a part, and at most `workers`
    parts run at once (a part takes one CPU). A `teacher` is pickled, or opened by each worker.
    Needs the extra `ray`. Raises `GenerationError` that names the parts that failed, once all
    others are done.
    """
    if parts < 1:
        raise SettingsError(f"A run has at least one part, found parts={parts!r}.")
    folder = writable_folder(out).resolve()
    source = recipe if isinstance(recipe, Recipe) else str(recipe)
    settings = settings or GenerateSettings()
    asked = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, trust=settings.trust)
    if teacher is not None:
        asked = asked.with_teacher(teacher if isinstance(teacher, str) else teacher.model)
    shares = [Share(number, parts) for number in range(1, parts + 1)]
    known = [found for share in shares if (found := _finished(share, folder, asked))]
    done = {one["number"] for one in known}

    part = {
        "recipe": source,
        "teacher": teacher,
        "out": folder,
        "settings": settings,
        "parts": parts,
    }
    with Progress("ray", parts, unit="parts", start=len(known)) as progress:
        left = [share.number for share in shares if share.number not in done]
        for outcome in _run(left, part, workers):
            known.append(outcome)
            note = f"part {outcome['number']}: {outcome['problem'] or 'done'}"
            progress.advance(1, note=note)
    failed = sorted((one for one in known if one["problem"]), key=itemgetter("number"))
    if failed:
        raise GenerationError(_explain(failed, parts))
    return RayRun(folder, sum(one["rows"] for one in known), sum(one["errors"] for one in known))


def _finished(share: Share, folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """What a part holds that needs no other look; None where rows are missing or failed."""
    summary = read_summary(share.folder(folder))
    if summary is None or summary["errors"] or summary["recipe_digest"] != recipe.digest:
        return None
    return {"number": share.number, "rows": summary["rows"], "errors": 0, "problem": ""}


def _answer(numbers: "pa.Table", *, parts: int, **asked: Any) -> "pa.Table":
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


def _run(
    numbers: Sequence[int], asked: Mapping[str, Any], workers: int | None
) -> Iterator[dict[str, Any]]:
    """What becomes of parts, as they come; a block a part: Ray can run any part anywhere."""
    if not numbers:
        return
    import pyarrow as pa

    data = _ray_data()
    outcomes = data.from_arrow([pa.table({"number": [one]}) for one in numbers]).map_batches(
        _answer,
        fn_kwargs=dict(asked),
        batch_size=1,
        # The default makes pickled objects of nested columns, which `datasets` can't read.
        batch_format="pyarrow",
        compute=data.TaskPoolStrategy(size=workers),
    )
    for table in outcomes.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
        yield from table.to_pylist()


def _ray_data() -> Any:
    try:
        data = import_module("ray.data")
    except ImportError as error:
        raise SettingsError(
            "Running on Ray needs the extra: `pip install 'distill-datasets[ray]'`."
        ) from error
    data.DataContext.get_current().enable_progress_bars = False
    return data


def _explain(failed: Sequence[Mapping[str, Any]], parts: int) -> str:
    said = "; ".join(f"part {one['number']}: {one['problem']}" for one in failed[:_SHOWN])
    more = f"; and {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
    return (
        f"{len(failed)} of {parts} parts failed: {said}{more}. What they bought is kept: run again "
        "to go on with them."
    )

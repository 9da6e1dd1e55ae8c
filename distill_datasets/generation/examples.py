"""Which examples stand before a recipe's queries, and in which order: found on development rows."""

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import RecipeError, RejectedError
from distill_datasets.files import one_writer
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient, all_of, run_in_thread
from distill_datasets.generation.pricing import Meter
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.generation.teachers import Teachers
from distill_datasets.progress import Progress
from distill_datasets.recipes.queries import load_queries
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.recipes.sections import Examples

if TYPE_CHECKING:
    from datasets import Dataset

Choice = tuple[int, ...]  # places in the file of examples, from 1

_MOST_ROWS = 60  # of development, that one choice is tried on
_FIRST_ROWS = 15  # that every choice is tried on; only the best go on
_FINALISTS = 4


def development_rows(recipe: Recipe) -> "Dataset":
    """The rows that a choice is tried on; raises `RecipeError` where there are none.

    They are of the split `validation`, and have references: never of `test`.
    """
    queries = load_queries(recipe)
    rows = queries.filter(
        lambda row: row["split"] == "validation" and row["reference"] is not None,
        load_from_cache_file=False,
        keep_in_memory=True,
    )
    if not len(rows):
        raise RecipeError(
            "examples.choose needs development rows: expected queries of the split `validation` "
            "with a reference, found none. Add references, give `validation` a share under "
            "`split:`, or name the examples yourself with `rows:`."
        )
    return rows.select(range(min(_MOST_ROWS, len(rows))))


def choices(examples: Examples, available: int) -> list[Choice]:
    """What is tried: the first examples as they stand in the file, then drawn ones, each once."""
    wanted = examples.choose or 0
    if wanted > available:
        raise RecipeError(
            f"examples.choose is {wanted}, and {examples.file!r} has {available} examples."
        )
    draw = random.Random(f"{examples.file} {wanted} {available}")
    found = [tuple(range(1, wanted + 1))]
    for _ in range(20 * examples.trials):  # where few differ, fewer are tried
        one = tuple(draw.sample(range(1, available + 1), wanted))
        if one not in found and len(found) < examples.trials:
            found.append(one)
    return found


def choose_examples(
    teachers: Teachers, folder: Path, settings: GenerateSettings, meter: Meter | None
) -> tuple[Teachers, dict[str, Any]]:
    """Teachers whose recipe has the best of the choices tried, and what the summary says of it.

    Every choice answers the first development rows, and the best of them, with the file's own
    order, answer all. A choice's score is the share of rows whose answer is the reference; of
    equals the earlier is kept. Every answer is journaled: another call asks for nothing, and the
    rows of the split `validation` are not paid again. Those of a recipe that names its examples, or
    has none, are returned as they are.
    """
    recipe = teachers.recipe
    if recipe.examples is None or recipe.examples.choose is None:
        return teachers, {}
    rows = development_rows(recipe)
    tried = choices(recipe.examples, len(recipe.all_examples))
    with (
        one_writer(folder, "run"),
        Journal(folder / "journal.sqlite") as kept,
        Progress("choose examples", _answers(len(tried), len(rows)), meter=meter) as progress,
    ):
        client = CachedClient(kept, progress, limits=settings.limits, meter=meter)

        search = partial(_scores, teachers, tried, rows, client)
        found = run_in_thread(search, stop=client.stop)
    chosen = max(found, key=found.__getitem__)
    facts = {
        "chosen": list(chosen),
        "tried": len(tried),
        "rows": len(rows),
        "score": found[chosen],
        "score_in_the_files_order": found[tried[0]],
        "answers": _answers(len(tried), len(rows), len(found)),
    }
    said = (
        f"{list(chosen)} of {len(recipe.all_examples)}: {found[chosen]:.3f} of {len(rows)} "
        f"development rows right, {found[tried[0]]:.3f} in the file's order ({len(tried)} choices "
        "tried)"
    )
    print(f"examples: {said}", file=sys.stderr)
    return _with(teachers, chosen), {"examples": facts}


def _answers(tried: int, rows: int, finalists: int | None = None) -> int:
    """How many answers a search takes; at most, where it isn't known how many go on."""
    first = min(_FIRST_ROWS, rows)
    finalists = min(tried, _FINALISTS + 1) if finalists is None else finalists
    return tried * first + finalists * (rows - first)


def most_answers(recipe: Recipe) -> int:
    """The most answers that choosing a recipe's examples takes; 0 where none are chosen."""
    if recipe.examples is None or recipe.examples.choose is None:
        return 0
    tried = choices(recipe.examples, len(recipe.all_examples))
    return _answers(len(tried), len(development_rows(recipe)))


def _with(teachers: Teachers, choice: Choice) -> Teachers:
    recipe = teachers.recipe
    assert recipe.examples is not None
    recipe = recipe.replace(examples=Examples(file=recipe.examples.file, rows=choice))
    members = tuple(replace(one, messages=recipe.messages) for one in teachers.members)
    return replace(teachers, recipe=recipe, members=members)


async def _scores(
    teachers: Teachers, tried: Sequence[Choice], rows: "Dataset", client: CachedClient
) -> dict[Choice, float]:
    """The shares of rows that are answered rightly, of the choices that went on to all rows."""

    async def right(some: Sequence[Choice], part: range) -> dict[Choice, int]:
        asked = rows.select([*part])  # of a list, since it takes no empty range at the end
        return {one: await _right(_with(teachers, one), client, asked) for one in some}

    few = min(_FIRST_ROWS, len(rows))
    first = await right(tried, range(few))
    best = sorted(tried, key=lambda one: -first[one])[:_FINALISTS]
    rest = await right([*dict.fromkeys([tried[0], *best])], range(few, len(rows)))
    return {one: (first[one] + more) / len(rows) for one, more in rest.items()}


async def _right(teachers: Teachers, client: CachedClient, rows: "Dataset") -> int:
    """How many rows are answered rightly; what the provider rejects for good is wrong."""

    async def right(query: str, reference: str) -> bool:
        try:
            first, *_ = await teachers.answer(query, client, reference)
        except RejectedError:  # of other failures no choice is the worse
            return False
        finally:
            client.progress.advance(1)
        return bool(first.get("answer") == reference)

    return sum(await all_of(map(right, rows["query"], rows["reference"])))

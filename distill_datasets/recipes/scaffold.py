"""Starts a recipe's folder that runs as it is, and knows its samples again."""

from collections.abc import Iterable
from functools import cache
from itertools import chain
from pathlib import Path

from distill_datasets import resources
from distill_datasets.conversations import read_messages, to_text
from distill_datasets.errors import OutputError, RecipeError, nearest
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.query_files import TableFormat, read_rows
from distill_datasets.resources import KINDS


def new_recipe(name: str, folder: Path | None = None, *, like: str = "labels") -> Path:
    """Write a recipe whose answers are `like` one of `KINDS` into a folder that isn't there yet.

    Raises `RecipeError` for a name that no recipe may have and an unknown kind, `OutputError`
    where the folder exists or can't be written.
    """
    if like not in KINDS:
        raise RecipeError(
            f"There is no kind {like!r} of recipes: expected one of {[*KINDS]}."
            f"{nearest(like, [*KINDS])}"
        )
    if (
        not name.replace("-", "").replace("_", "").replace(".", "").isalnum()
        or not name[0].isalnum()
    ):
        raise RecipeError(f"{name!r} can't name a recipe: use letters, digits, '.', '_' and '-'.")
    target = folder or Path(name)
    try:
        target.mkdir(parents=True)
        for source in sorted(_sample(like).iterdir()):
            text = source.read_text(encoding="utf-8")
            named = text.replace("name: NAME", f"name: {name}", 1)
            (target / source.name).write_text(named, encoding="utf-8")
    except FileExistsError as error:
        raise OutputError(f"{str(target)!r} is there already: choose another name.") from error
    except OSError as error:
        raise OutputError(f"Can't write {str(target)!r}: {error}.") from error
    load_recipe(target)
    return target


def samples_among(queries: Iterable[str], prompt: str) -> list[str]:
    """Those of the queries that `new` wrote for its own prompt, where the recipe has another."""
    known = [texts for sample, texts in map(_sample_texts, KINDS) if sample != prompt]
    own = [texts for sample, texts in map(_sample_texts, KINDS) if sample == prompt]
    others = frozenset(chain(*known)) - frozenset(chain(*own))
    return [query for query in queries if query in others]


def _sample(kind: str) -> Path:
    return resources.builders() / "_template" / kind


@cache
def _sample_texts(kind: str) -> tuple[str, frozenset[str]]:
    """The prompt of a sample, and its queries."""
    folder = _sample(kind)
    rows = chain.from_iterable(read_rows(folder / "queries.jsonl", TableFormat()))
    queries = (
        row["query"] if "query" in row else to_text(read_messages(row["messages"])) for row in rows
    )
    return (folder / "prompt.md").read_text(encoding="utf-8").strip(), frozenset(queries)

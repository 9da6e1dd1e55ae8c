"""Starts a recipe's folder that runs as it is."""

from pathlib import Path

from distill_datasets import resources
from distill_datasets.errors import OutputError, RecipeError
from distill_datasets.recipes.loading import load_recipe


def new_recipe(name: str, folder: Path | None = None) -> Path:
    """Write `recipe.yaml`, `prompt.md` and `queries.jsonl` into a folder that isn't there yet.

    Raises `RecipeError` for a name that no recipe may have, `OutputError` where the folder exists
    or can't be written.
    """
    if (
        not name.replace("-", "").replace("_", "").replace(".", "").isalnum()
        or not name[0].isalnum()
    ):
        raise RecipeError(f"{name!r} can't name a recipe: use letters, digits, '.', '_' and '-'.")
    target = folder or Path(name)
    try:
        target.mkdir(parents=True)
        for source in sorted((resources.builders() / "_template").iterdir()):
            text = source.read_text(encoding="utf-8")
            named = text.replace("name: NAME", f"name: {name}", 1)
            (target / source.name).write_text(named, encoding="utf-8")
    except FileExistsError as error:
        raise OutputError(f"{str(target)!r} is there already: choose another name.") from error
    except OSError as error:
        raise OutputError(f"Can't write {str(target)!r}: {error}.") from error
    load_recipe(target)
    return target

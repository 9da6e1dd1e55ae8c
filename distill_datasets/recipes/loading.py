"""Finds recipes by name, folder or release, and says in sentences what is wrong with one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from distill_datasets import resources
from distill_datasets.errors import RecipeError, nearest
from distill_datasets.hub.references import find_release
from distill_datasets.recipes.recipe import Recipe


def load_recipe(source: str | Path, *, config: str | None = None) -> Recipe:
    """A recipe by its name (of those that ship), its folder, or a release that carries it.

    A release is a folder or a Hub dataset such as `me/name@v1.0.0`, of which only the recipe and
    the manifest are downloaded; `config` names one of several in one repository. Raises
    `RecipeError` that names the wrong key and the closest valid one.
    """
    folder = _find(source, config)
    prompt = folder / "prompt.md"
    if not prompt.is_file():
        if without_prompt(folder.parent):
            raise RecipeError(
                f"The release {str(folder.parent)!r} was published without its prompt, so its "
                "recipe can't be run. Ask its author for prompt.md, and put it into "
                f"{str(folder)!r}; or train on the release, which needs no prompt."
            )
        raise RecipeError(f"Recipe {str(folder)!r} has no prompt.md; write the teacher's prompt.")
    return _load(folder, prompt.read_text(encoding="utf-8").strip())


def load_released_recipe(release: Path) -> Recipe:
    """A release's recipe to be described, with a stand-in for a prompt that wasn't published."""
    folder = release / "recipe"
    hidden = not (folder / "prompt.md").is_file() and without_prompt(release)
    return _load(folder, "(not published)") if hidden else load_recipe(release)


def without_prompt(release: Path) -> bool:
    """Whether a folder holds a release that was published without its prompt."""
    path = release / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("prompt") is False
    except (OSError, ValueError, AttributeError):
        return False


def _load(folder: Path, prompt: str) -> Recipe:
    fields = _read_yaml(folder / "recipe.yaml")
    try:
        return Recipe(**{**fields, "prompt": prompt, "folder": folder})
    except ValidationError as error:
        raise RecipeError(_explain(error, folder)) from error


def shipped_recipes() -> list[Recipe]:
    """Every recipe that comes with the package, by name."""
    return [load_recipe(folder) for folder in _shipped()]


def _shipped() -> list[Path]:
    return sorted(path.parent for path in resources.builders().glob("[!_]*/recipe.yaml"))


def _find(source: str | Path, config: str | None) -> Path:
    given = Path(source)
    candidates = (resources.builders() / str(source), given, given / "recipe")
    if isinstance(source, Path) or given.is_dir() or len(given.parts) > 1:
        candidates = (given, given / "recipe", given / "release" / "recipe")
    for folder in candidates if config is None else ():
        if (folder / "recipe.yaml").is_file():
            return folder
    release = find_release(source, (), config)
    if release and (release.path / "recipe" / "recipe.yaml").is_file():
        return release.path / "recipe"
    names = [folder.name for folder in _shipped()]
    found_in = f" as its configuration {config!r}" if config else ""
    raise RecipeError(
        f"No recipe {str(source)!r}: expected one of {names}, a folder with recipe.yaml and "
        f"prompt.md, or a release that carries one{found_in}.{nearest(str(source), names)}"
    )


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(fields, Mapping):
        raise RecipeError(f"{path}: expected keys and values, found {type(fields).__name__}.")
    for reserved in ("prompt", "folder"):
        if reserved in fields:
            raise RecipeError(f"{path}: {reserved!r} is not a key; the prompt is in prompt.md.")
    return fields


def _explain(error: ValidationError, folder: Path) -> str:
    """Every problem on a line, with the closest valid key for one that is unknown."""
    lines = [f"Recipe {str(folder)!r} can't be used:"]
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"]) or "recipe"
        if problem["type"] == "extra_forbidden":
            valid = _keys_at(problem["loc"][:-1])
            hint = nearest(str(problem["loc"][-1]), valid)
            lines.append(f"  unknown key {where!r}.{hint} Valid keys: {', '.join(valid)}.")
        elif problem["type"] == "missing":
            lines.append(f"  the key {where!r} is missing.")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = f" (found {problem['input']!r:.300})" if problem["loc"] else ""
            lines.append(f"  {where}: {message}{found}.")
    return "\n".join(lines)


def _keys_at(location: Sequence[str | int]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, str):
            model = _section(model.model_fields[part].annotation)
    return [name for name, field in model.model_fields.items() if not field.exclude]


def _section(annotation: Any) -> type[BaseModel]:
    """The section in an annotation such as `Judge | None` or `tuple[Teacher, ...]`."""
    for found in (annotation, *get_args(annotation)):
        if isinstance(found, type) and issubclass(found, BaseModel):
            return found
    raise TypeError(f"{annotation} holds no section")

"""What is wrong with a recipe, in sentences."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from distill_datasets.errors import nearest

Location = Sequence[str | int]


def explain(error: ValidationError, folder: Path, recipe: type[BaseModel]) -> str:
    """Every problem on a line, with the closest valid key for one that is unknown."""
    lines = [f"Recipe {str(folder)!r} can't be used:"]
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"]) or "recipe"
        if problem["type"] == "extra_forbidden":
            valid = _keys_at(recipe, problem["loc"][:-1])
            hint = nearest(str(problem["loc"][-1]), valid)
            lines.append(f"  unknown key {where!r}.{hint} Valid keys: {', '.join(valid)}.")
        elif problem["type"] == "missing":
            lines.append(f"  the key {where!r} is missing.")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = f" (found {problem['input']!r:.300})" if problem["loc"] else ""
            lines.append(f"  {where}: {message}{found}.")
    return "\n".join(lines)


def _keys_at(recipe: type[BaseModel], location: Location) -> list[str]:
    model = recipe
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

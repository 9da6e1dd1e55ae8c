"""Writes docs/recipe.md, the reference of every key, out of the recipe's sections.

python -m tests.reference
"""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from distill_datasets.recipes import keys as keys_of_recipes
from distill_datasets.recipes import sections
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.recipes.sections import Check, MixPart, Range, Section, Teacher
from tests.support.source import parse

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"
_BEGIN, _END = "<!-- keys -->", "<!-- /keys -->"


def meanings(module: ModuleType) -> dict[tuple[str, str], str]:
    """What stands under each field of a module's classes, by class and field."""
    found = {}
    for node in parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            for field, below in zip(node.body, node.body[1:], strict=False):
                match field, below:
                    case (
                        ast.AnnAssign(target=ast.Name(id=name)),
                        ast.Expr(value=ast.Constant(value=str(text))),
                    ):
                        found[node.name, name] = " ".join(text.split())
    return found


def keys() -> Iterator[tuple[str, FieldInfo, str]]:
    """Every key of a recipe with its field and meaning, `a.b` within `a`."""
    said = meanings(sections) | meanings(keys_of_recipes)

    def of(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo, str]]:
        for name, field in section.model_fields.items():
            if field.exclude:
                continue
            homes = [one.__name__ for one in section.__mro__ if (one.__name__, name) in said]
            assert homes, f"{section.__name__}.{name} has no text under it that says what it means"
            yield f"{prefix}{field.alias or name}", field, said[homes[0], name]
            for inner in _sections(field.annotation):
                # The sampling of one teacher has the keys of everybody's; a range says its own.
                if inner is not Range and (name != "sampling" or not prefix):
                    yield from of(
                        inner,
                        f"{prefix}{name}{'[]' if inner in (Teacher, Check, MixPart) else ''}.",
                    )

    return of(Recipe, "")


def table() -> str:
    """The keys as a Markdown table."""
    lines = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for key, field, meaning in keys():
        taken = _takes(field.annotation, field.metadata)
        lines.append(f"| `{key}` | {taken} | {_default(field)} | {meaning} |")
    return "\n".join(lines)


def page() -> str:
    """The page with its table made anew."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    return f"{before}{_BEGIN}\n\n{table()}\n\n{_END}{rest.partition(_END)[2]}"


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [inner for part in get_args(annotation) for inner in _sections(part)]


def _takes(annotation: Any, metadata: Any = ()) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _takes(parts[0], parts[1:])
    if origin in (Union, UnionType):
        return " or ".join(_takes(part, metadata) for part in parts if part is not type(None))
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin is tuple:
        return f"list of {_takes(parts[0])}"
    if annotation is Range:
        return "whole number or {min, max}"
    if _sections(annotation):
        return "section"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return f"{names.get(annotation, 'mapping')}{_range(metadata)}"


def _range(metadata: Any) -> str:
    words = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "below {}"}
    said = [
        text.format(value)
        for one in metadata
        for name, text in words.items()
        if isinstance(value := getattr(one, name, None), int | float)
    ]
    return f", {' '.join(said)}" if said else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.default
    if value is None or value in ((), "") or isinstance(value, Section):
        return ""
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    said = (text.lower() if isinstance(value, bool) else text).replace("|", r"\|")
    return f"`{said}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""Changes keys of a recipe's YAML, and leaves the comments and everything else as they are."""

from collections.abc import Mapping
from typing import Any

import yaml

from distill_datasets.errors import RecipeError


def set_keys(text: str, section: str, changes: Mapping[str, str]) -> str:
    """The text of `recipe.yaml` with some keys of a section set; the same where they are so.

    Raises `RecipeError` for a text that can't be changed in place.
    """
    before = yaml.safe_load(text)
    wanted = {**before, section: {**before[section], **changes}}
    for key, value in changes.items():
        if before[section].get(key) != value:
            text = _set(text, section, key, value)
    if _parsed(text) != wanted:
        lines = ", ".join(f"{key}: {value}" for key, value in changes.items())
        raise RecipeError(
            f"recipe.yaml can't be changed in place: write {lines} under {section!r}."
        )
    return text


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _set(text: str, section: str, key: str, value: str) -> str:
    node = _child(yaml.compose(text), section)
    written = yaml.safe_dump(value, allow_unicode=True).removesuffix("...\n").strip()
    if known := _child(node, key):
        begin, end = int(known.start_mark.index), int(known.end_mark.index)
        return text[:begin] + " " * (begin == end) + written + text[end:]
    assert isinstance(node, yaml.MappingNode)
    first = node.value[0][0].start_mark
    between = ", " if node.flow_style else "\n" + " " * first.column
    return f"{text[: first.index]}{key}: {written}{between}{text[first.index :]}"


def _child(node: Any, name: str) -> Any:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for key, value in pairs if key.value == name), None)

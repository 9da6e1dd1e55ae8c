"""Reads files of JSON lines a few rows at a time, and values as they are written.

`datasets` makes dates of texts that look like them, and keeps a copy of every file.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from distill_datasets.errors import RecipeError

ROWS = 1_000


def read_lines(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Some rows, again and again; a row may leave columns out.

    Raises `RecipeError` with the line that is no object.
    """
    objects = _objects(path)
    while rows := list(islice(objects, ROWS)):
        yield rows


def read_names(path: Path) -> list[str]:
    """The columns of all rows; costs as much as reading them."""
    return list(dict.fromkeys(name for row in _objects(path) for name in row))


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except ValueError as error:
                raise _unreadable(path, number, str(error)) from error
            if not isinstance(found, dict):
                raise _unreadable(path, number, f"found {line.strip()[:80]!r}")
            yield found


def _unreadable(path: Path, number: int, found: str) -> RecipeError:
    return RecipeError(
        f"Line {number} of {str(path)!r} can't be read: expected a JSON object, {found}. Mend the "
        "line, or name a file of another kind."
    )

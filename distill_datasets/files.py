"""A folder that changes all at once, or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill_datasets.errors import OutputError


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to fill; it takes `folder`'s place when all went well, and else disappears.

    Whatever a crash leaves beside `folder` the next call removes, or puts back where it belongs.
    """
    building, old = _sibling(folder, "building"), _sibling(folder, "old")
    with _writing(folder):
        try:
            building.parent.mkdir(parents=True, exist_ok=True)
            for leftover in (building, old):
                shutil.rmtree(leftover, ignore_errors=True)
            building.mkdir()
            yield building
            if folder.exists():
                folder.rename(old)
            building.rename(folder)
        finally:
            _put_back(folder, old)
            shutil.rmtree(building, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Put back what a crash has left between the two renames of `replacing`."""
    with _writing(folder):
        _put_back(folder, _sibling(folder, "old"))


def _put_back(folder: Path, old: Path) -> None:
    if old.exists() and not folder.exists():
        old.rename(folder)


def _sibling(folder: Path, role: str) -> Path:
    place = folder.resolve()
    return place.with_name(f".{place.name}.{role}")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"Can't write {str(folder)!r}: {error}. Free some space or choose another folder; "
            "what lay there before is still there."
        ) from error

"""Files and folders that change all at once or not at all, and one writer a folder.

What is written here is on disk before it takes its place, so that a power loss leaves the old
content or the new, never half of one. And where files lie: those that come with the package, and
those of a run's report.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from distill_datasets.errors import DatasetError, DistillError, OutputError

_LOCK = ".lock"
_PACKAGE = Path(str(files("distill_datasets")))
_LARGEST_REPORT = 100_000_000  # bytes
# The recipes that `new` copies, and what an answer is like in each.
TEMPLATES = {
    "labels": "one of a few labels",
    "text": "free text in a house style, with checks",
    "json": "JSON by a schema",
    "tools": "calls of tools",
    "chat": "the next turn of a conversation",
}


def read_yaml(path: Path | str, error: type[DistillError], *, what: str, limit: int = -1) -> Any:
    """What a YAML file of the user's own holds, or its first `limit` characters.

    Raises the `error` where it can't be read, which calls the file by `what` it is.
    """
    import yaml

    try:
        with Path(path).open(encoding="utf-8") as file:
            return yaml.safe_load(file.read(limit))
    except (OSError, ValueError, yaml.YAMLError) as problem:
        raise error(f"The {what} {str(path)!r} can't be read: {problem}") from problem


def write_file(path: Path, content: str | bytes) -> None:
    """Put content in a file's place all at once; raises `OutputError` where it can't be written.

    Each process has a draft of its own, so that two never write into one.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
            sync_folder(path.parent)
        finally:
            draft.unlink(missing_ok=True)


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
            _sync_tree(building)
            if folder.exists():
                folder.rename(old)
            building.rename(folder)
            sync_folder(building.parent)
        finally:
            _put_back(folder, old)
            shutil.rmtree(building, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Put back what a crash has left between the two renames of `replacing`."""
    with _writing(folder):
        _put_back(folder, _sibling(folder, "old"))


def writable_folder(path: str | Path) -> Path:
    """The folder, made if need be; raises `OutputError` where nothing can be written."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()  # nameless: whoever looks on sees no file come and go
    except OSError as error:
        raise OutputError(
            f"Can't write to {str(folder)!r}: {error}. Choose another --out, or free it."
        ) from error
    return folder


@contextmanager
def one_writer(
    folder: Path, work: str, *, beside: bool = False, waiting: str = ""
) -> Iterator[None]:
    """Hold a folder, made if need be, against every other process that would write there.

    `work` names what is done there, in the message for the others. The lock is in the folder, or
    `beside` one that is to be replaced as a whole. Where another holds it, says `waiting` and
    waits, or raises `OutputError` at once if that is empty; the system lets go of it when a process
    dies, however it does.
    """
    from filelock import FileLock, Timeout

    if beside:
        writable_folder(folder.resolve().parent)
    place = _sibling(folder, "lock") if beside else writable_folder(folder) / _LOCK
    lock = FileLock(place, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        if not waiting:
            raise OutputError(
                f"Another process is at work in {str(folder)!r}: wait until it is done, or choose "
                f"another --out for this {work}."
            ) from None
        print(waiting, file=sys.stderr)
        lock.acquire(timeout=-1)
    try:
        yield
    finally:
        lock.release()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder outlast a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            with (Path(place) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


def _put_back(folder: Path, old: Path) -> None:
    if old.exists() and not folder.exists():
        old.rename(folder)


def _sibling(folder: Path, role: str) -> Path:
    place = folder.resolve()
    return place.with_name(f".{place.name}.{role}")


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except DistillError:
        raise
    except OSError as error:
        raise OutputError(
            f"Can't write {str(place)!r}: {error}. Free some space or choose another folder; "
            "what lay there before is still there."
        ) from error


def _shipped() -> Path:
    """The folder of builders/ and cards/: the package in a wheel, the checkout in a clone."""
    return _PACKAGE if (_PACKAGE / "cards").is_dir() else _PACKAGE.parent


def builders_folder() -> Path:
    """The folder of the recipes that ship, one folder each."""
    return _shipped() / "builders"


def cards_folder() -> Path:
    """The folder of the Jinja templates of dataset and model cards."""
    return _shipped() / "cards"


def pocket_folder() -> Path:
    """The folder of the pocket model: weights, tokenizer, card."""
    return _PACKAGE / "embedded" / "pocket"


def report_file(run: Path | str) -> Path:
    """`report.json` in a run's folder; any other path is that of the file itself."""
    path = Path(run)
    return path / "report.json" if path.is_dir() else path


def split_report(folder: Path, split: str) -> Path:
    """The report of a split: `report.json` is that of `test`, `report-edge.json` that of `edge`."""
    return folder / ("report.json" if split == "test" else f"report-{split}.json")


def rows_file(report: Path) -> Path:
    """Where the rows of a report are: `rows.jsonl` beside `report.json`."""
    return report.with_name(f"rows{report.stem.removeprefix('report')}.jsonl")


def gate_file(report: Path) -> Path:
    """Where what a gate found is kept: `gate.json` beside `report.json`."""
    return report.with_name(f"gate{report.stem.removeprefix('report')}.json")


def calibration_file(report: Path) -> Path:
    """Where thresholds of a student's confidence are kept: `calibration.json` beside the report."""
    return report.with_name(f"calibration{report.stem.removeprefix('report')}.json")


def coverage_file(report: Path) -> Path:
    """Where the coverage of a run's prompt is kept, by default."""
    return report.with_name("coverage") / "coverage.json"


def read_report(run: Path | str) -> dict[str, Any]:
    """What `measure` wrote into a run's folder, or the file itself; raises `DatasetError`."""
    path = report_file(run)
    if not path.is_file():
        folder = path.parent if path.suffix == ".json" else path
        raise DatasetError(
            f"There is no report {str(path)!r}: run `distill-datasets measure {folder}` first."
        )
    known = read_object(path) if path.stat().st_size <= _LARGEST_REPORT else {}
    systems = known.get("systems")
    if not isinstance(systems, dict) or not {"teacher", "student"} <= set(systems):
        raise DatasetError(f"{str(path)!r} is no report of `measure`: measure the run again.")
    return known


def read_rows(report: Path) -> Iterator[dict[str, Any]]:
    """Every row of a report, as each system said it; raises `DatasetError` for a damaged one."""
    file = rows_file(report)
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = as_object(line)
                if not {"id", "systems"} <= row.keys() or not isinstance(row["systems"], dict):
                    raise DatasetError(
                        f"{str(file)!r}, line {number} is no row of a report: measure the run "
                        "again."
                    )
                yield row
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{str(file)!r} can't be read ({error}): expected the rows of a report, which "
            "`measure` writes beside it. Measure again."
        ) from error


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none, or no such file."""
    try:
        return as_object(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def as_object(text: str) -> dict[str, Any]:
    """The object that a text is as JSON; empty where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}

"""Where a report's files are, and how they are read again."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distill_datasets.errors import DatasetError

_LARGEST = 100_000_000  # bytes of a report


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
        raise DatasetError(
            f"There is no report {str(path)!r}: run `distill-datasets measure {path.parent}` first."
        )
    known = (read_object(path) if path.stat().st_size <= _LARGEST else None) or {}
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
                yield _row(line, f"{str(file)!r}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{str(file)!r} can't be read ({error}): expected the rows of a report, which "
            "`measure` writes beside it. Measure again."
        ) from error


def _row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("systems"), Mapping) or "id" not in row:
        raise DatasetError(f"{place} is no row of a report: measure the run again.")
    return row


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none, or no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None

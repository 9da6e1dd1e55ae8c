"""The folder of all answered rows: written while they come, read back a few at a time."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

ROWS_FILE = "data-00000-of-00001.arrow"  # as `datasets` names it
_ROWS_PER_BATCH = 1_000
_KINDS = ("prompt", "cached", "response")


def stream(rows: "Dataset") -> Iterator["pa.Table"]:
    """The rows in their order, a few at a time and without mapping the files into memory.

    Mapped pages count as this process's memory until the system takes them back.
    """
    import pyarrow as pa

    if rows._indices is not None or not rows.cache_files:
        yield from rows.with_format("arrow").iter(batch_size=_ROWS_PER_BATCH)
        return
    for file in rows.cache_files:
        with pa.OSFile(file["filename"]) as source, pa.ipc.open_stream(source) as batches:
            for batch in batches:
                for start in range(0, len(batch), _ROWS_PER_BATCH):
                    yield pa.Table.from_batches([batch.slice(start, _ROWS_PER_BATCH)])


@contextmanager
def without_bars() -> Iterator[None]:
    """The bars of `datasets` count batches and files, and would cut through ours."""
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def finish(rows: "Dataset", folder: Path) -> None:
    """Make a folder that `load_from_disk` reads of the rows, which are in its `ROWS_FILE` already.

    Rows that are not are written.
    """
    if not (folder / ROWS_FILE).is_file():
        if len(rows):
            rows.save_to_disk(str(folder))
            return
        _write_nothing(rows, folder / ROWS_FILE)
    # A dataset can't be saved over its own file: one without rows has the same description.
    empty = type(rows).from_dict({name: [] for name in rows.features}, features=rows.features)
    with without_bars(), TemporaryDirectory(dir=folder) as description:
        empty.save_to_disk(description)
        shutil.move(Path(description, "dataset_info.json"), folder)
        state = json.loads(Path(description, "state.json").read_text(encoding="utf-8"))
    state |= {"_data_files": [{"filename": ROWS_FILE}], "_fingerprint": rows._fingerprint}
    text = json.dumps(state, indent=2, sort_keys=True)
    (folder / "state.json").write_text(text + "\n", encoding="utf-8")


def _write_nothing(rows: "Dataset", path: Path) -> None:
    """A file without rows, which `save_to_disk` leaves out and `load_from_disk` wants."""
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.features.arrow_schema):
        pass


@dataclass
class Tally:
    """What became of rows; rejections by their reason, and tokens as they were paid for."""

    rows: int = 0
    errors: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)

    @property
    def kept(self) -> int:
        """Rows that can be used."""
        return self.rows - self.errors - self.rejected.total()

    @classmethod
    def of(cls, rows: "Dataset") -> "Tally":
        """Count all rows, in one pass."""
        tally = cls(tokens=Counter(dict.fromkeys(_KINDS, 0)))
        for some in stream(rows):
            tally._add(some)
        return tally

    def _add(self, some: "pa.Table") -> None:
        import pyarrow.compute as pc

        self.rows += len(some)
        self.errors += len(some) - some["error"].null_count
        for reason in pc.value_counts(some["rejection"].drop_null()).to_pylist():
            self.rejected[reason["values"]] += reason["counts"]
        # All samples of one request share its prompt.
        first = some.filter(pc.equal(some["sample"], 0))
        for kind in _KINDS:
            counted = some if kind == "response" else first
            self.tokens[kind] += pc.sum(counted[f"teacher_{kind}_tokens"]).as_py() or 0

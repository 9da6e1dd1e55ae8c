"""One split as Parquet files, written a few megabytes at a time."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

# Files of this size are what the Hub's viewer and its uploads are made for; a row group is what
# a reader holds in memory at once. Both are counted in Arrow bytes, before compression.
_SHARD_BYTES = 500_000_000
_ROW_GROUP_BYTES = 32_000_000


@dataclass(frozen=True)
class Size:
    """How large a written split is: rows, bytes as Arrow, bytes on disk."""

    rows: int
    arrow_bytes: int
    file_bytes: int


class Shards:
    """Takes the rows of one split in order; `close` names the files by how many there are."""

    def __init__(self, folder: Path, split: str, schema: "pa.Schema") -> None:
        self._folder, self._split, self._schema = folder, split, schema
        self._waiting: list[pa.Table] = []
        self._waiting_bytes = self._shard_bytes = self._rows = self._arrow_bytes = 0
        self._paths: list[Path] = []
        self._writer: Any = None
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, rows: "pa.Table") -> None:
        """Append rows; they reach the disk once a row group is full."""
        self._waiting.append(rows)
        self._waiting_bytes += rows.nbytes
        if self._waiting_bytes >= _ROW_GROUP_BYTES:
            self._write_row_group()

    def close(self) -> Size:
        """Write what is waiting and give the files their final names."""
        if self._waiting:
            self._write_row_group()
        self._close_file()
        count = len(self._paths)
        for index, path in enumerate(self._paths):
            name = f"{self._split}-{index:05d}-of-{count:05d}.parquet"
            self._paths[index] = path.rename(self._folder / name)
        on_disk = sum(path.stat().st_size for path in self._paths)
        return Size(self._rows, self._arrow_bytes, on_disk)

    def _write_row_group(self) -> None:
        import pyarrow as pa

        if self._writer is None or self._shard_bytes >= _SHARD_BYTES:
            self._close_file()
            self._open_file()
        rows = pa.concat_tables(self._waiting)
        self._writer.write_table(rows)
        self._rows += len(rows)
        self._arrow_bytes += self._waiting_bytes
        self._shard_bytes += self._waiting_bytes
        self._waiting, self._waiting_bytes = [], 0

    def _open_file(self) -> None:
        from pyarrow.parquet import ParquetWriter

        path = self._folder / f"{self._split}-{len(self._paths):05d}.parquet"
        self._paths.append(path)
        # Content-defined chunks let the Hub store only what a new version changed.
        self._writer = ParquetWriter(
            str(path), self._schema, use_content_defined_chunking=True, write_page_index=True
        )
        self._shard_bytes = 0

    def _close_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

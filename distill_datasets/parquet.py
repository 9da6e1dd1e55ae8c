"""Parquet files: written a few megabytes at a time, and read a thousand rows at a time.

A file that somebody else wrote is read within limits: a few hundred bytes can declare gigabytes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import DatasetError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

# Files of this size are what the Hub's viewer and its uploads are made for; a row group is what
# a reader holds in memory at once. Both are counted in Arrow bytes, before compression.
_SHARD_BYTES = 500_000_000
_ROW_GROUP_BYTES = 32_000_000
ROWS_PER_BATCH = 1_000
# Limits for files of others: what is small in all does no harm. Text shrinks tenfold when it is
# compressed, and repeated text a hundredfold; a value that is stored once may stand in many rows.
_MOST_ROWS = 1_000_000, 100  # in all, and beyond that for each byte of the file
_MOST_STORED = 16_000_000, 300  # bytes before compression
_MOST_READ = 256_000_000, 1_000  # bytes in memory, one after another
_BATCH_BYTES = 1_000_000_000  # of a column at once, if each row had its largest possible value


class Shards:
    """Takes the rows of one split in order; `close` names the files by how many there are."""

    def __init__(self, folder: Path, split: str, schema: "pa.Schema") -> None:
        self._folder, self._split, self._schema = folder, split, schema
        self._waiting: list[pa.Table] = []
        self._waiting_bytes = self._shard_bytes = self._rows = 0
        self._paths: list[Path] = []
        self._writer: Any = None
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, rows: "pa.Table") -> None:
        """Append rows; they reach the disk once a row group is full."""
        self._waiting.append(rows)
        self._waiting_bytes += rows.nbytes
        if self._waiting_bytes >= _ROW_GROUP_BYTES:
            self._write_row_group()

    def close(self) -> int:
        """Write what is waiting and give the files their final names; how many rows they have."""
        if self._waiting:
            self._write_row_group()
        self._close_file()
        for index, path in enumerate(self._paths):
            path.rename(
                self._folder / f"{self._split}-{index:05d}-of-{len(self._paths):05d}.parquet"
            )
        return self._rows

    def _write_row_group(self) -> None:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        if self._writer is None or self._shard_bytes >= _SHARD_BYTES:
            self._close_file()
            path = self._folder / f"{self._split}-{len(self._paths):05d}.parquet"
            self._paths.append(path)
            # Content-defined chunks let the Hub store only what a new version changed.
            self._writer = ParquetWriter(
                str(path), self._schema, use_content_defined_chunking=True, write_page_index=True
            )
            self._shard_bytes = 0
        rows = pa.concat_tables(self._waiting)
        self._writer.write_table(rows)
        self._rows += len(rows)
        self._shard_bytes += self._waiting_bytes
        self._waiting, self._waiting_bytes = [], 0

    def _close_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def open_parquet(path: Path) -> "ParquetFile":
    """A Parquet file whose footer declares no more than its size can honestly hold.

    Raises `DatasetError` for one that declares more, and for what is no Parquet file.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    _check(path, file.metadata.num_rows, "rows", _MOST_ROWS)
    _check(path, sum(one.total_byte_size for one in _row_groups(file)), "bytes", _MOST_STORED)
    return file


def _row_groups(file: "ParquetFile") -> Iterator[Any]:
    return map(file.metadata.row_group, range(file.metadata.num_row_groups))


def read_batches(path: Path, columns: Sequence[str] | None = None) -> Iterator["pa.RecordBatch"]:
    """A file's rows, at most a thousand at a time; raises `DatasetError` as `open_parquet` does."""
    from pyarrow import ArrowException

    file, read = open_parquet(path), 0
    chunks = (one.column(at) for one in _row_groups(file) for at in range(one.num_columns))
    # No value exceeds its column.
    largest = max((one.total_uncompressed_size for one in chunks), default=0) or 1
    rows = max(1, min(ROWS_PER_BATCH, _BATCH_BYTES // largest))
    try:
        for batch in file.iter_batches(rows, columns=list(columns) if columns else None):
            read += sum(map(_unpacked, batch.columns))
            _check(path, read, "bytes in memory", _MOST_READ)
            yield batch
    except (ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _unpacked(column: Any) -> int:
    """A column's bytes once every row has its own copy of a value that is stored once for many."""
    from pyarrow import compute, types

    kind = column.type
    if types.is_dictionary(kind):
        values, column = column.dictionary, column.indices
        if types.is_string(values.type) or types.is_binary(values.type):
            lengths = compute.binary_length(values).cast("int64").take(column)
            return int(column.nbytes + (compute.sum(lengths).as_py() or 0))
    if types.is_struct(kind):
        return sum(map(_unpacked, column.flatten()))
    if types.is_list(kind) or types.is_large_list(kind):
        return int(column.nbytes) + _unpacked(column.flatten())
    return int(column.nbytes)


def _check(path: Path, found: int, what: str, limit: tuple[int, int]) -> None:
    size = path.stat().st_size
    most = limit[0] + limit[1] * size
    if found > most:
        raise DatasetError(
            f"{str(path)!r} has {size:,} bytes and unpacks to {found:,} {what}: expected at most "
            f"{most:,}. It is not read: get it again from somebody you trust."
        )


def _unreadable(path: Path, error: Exception) -> DatasetError:
    return DatasetError(
        f"{str(path)!r} can't be read as Parquet ({error}). Get it again, or write it again."
    )

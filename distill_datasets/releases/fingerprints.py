"""What tells the rows of two releases apart: three short hashes for each, whatever its size."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Hashes = NDArray[np.uint64]

FINGERPRINTS = "fingerprints.parquet"
_COLUMNS = ("key", "row", "answer")


@dataclass(frozen=True)
class RowChanges:
    """Rows by id and sample: only in the new release, only in the old, in both with other cells.

    `answers` counts those of the changed rows whose response is another.
    """

    added: int
    removed: int
    changed: int
    answers: int

    def words(self) -> list[str]:
        """What happened, with numbers; empty where nothing did."""
        changed = _counted(self.changed, "row", "changed")
        if self.answers == self.changed:
            changed = _counted(self.changed, "answer", "changed")
        elif self.answers:
            changed += f", {self.answers:,} of them in the answer"
        words = (
            _counted(self.added, "row", "added"),
            _counted(self.removed, "row", "removed"),
            changed,
        )
        return [word for word in words if word]


class Fingerprints:
    """The hashes of a release's rows, 24 bytes a row; collects them, or reads them back."""

    def __init__(self) -> None:
        self._hashes = {name: array("Q") for name in _COLUMNS}

    def add(self, parts: Sequence[str], row: Mapping[str, Any], line: bytes) -> None:
        """Note a row that is in these parts and whose cells are `line`."""
        found = 0
        for part in parts:
            found ^= _hash(part.encode() + b"\n" + line)
        self._hashes["key"].append(_hash(f"{row['id']}\n{row['sample']}".encode()))
        self._hashes["row"].append(found)
        self._hashes["answer"].append(_hash((row.get("response") or "").encode()))

    def write(self, path: Path) -> None:
        """As a Parquet file of three columns, ordered by key."""
        import pyarrow as pa
        from pyarrow.parquet import write_table

        # Equal rows make equal files, in whatever order and parts they came.
        table = pa.table(dict(zip(_COLUMNS, self._sorted(), strict=True)))
        write_table(table, path, use_dictionary=False, compression="none")

    def changes(self, new: "Fingerprints") -> RowChanges:
        """What `new` has otherwise."""
        import numpy as np

        keys, rows, answers = self._sorted()
        new_keys, new_rows, new_answers = new._sorted()
        _, here, there = np.intersect1d(keys, new_keys, assume_unique=True, return_indices=True)
        changed = rows[here] != new_rows[there]
        return RowChanges(
            added=len(new_keys) - len(there),
            removed=len(keys) - len(here),
            changed=int(changed.sum()),
            answers=int((changed & (answers[here] != new_answers[there])).sum()),
        )

    def _sorted(self) -> "tuple[Hashes, Hashes, Hashes]":
        """By key, each once: a row that came once for each of its parts is put together."""
        import numpy as np

        keys, rows, answers = (
            np.frombuffer(self._hashes[name], dtype=np.uint64) for name in _COLUMNS
        )
        order = np.argsort(keys, kind="stable")
        keys, rows, answers = keys[order], rows[order], answers[order]
        if not len(keys):
            return keys, rows, answers
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        return keys[first], np.bitwise_xor.reduceat(rows, first), answers[first]


def read_fingerprints(path: Path) -> Fingerprints:
    """What `Fingerprints.write` wrote."""
    from pyarrow.parquet import read_table

    found, table = Fingerprints(), read_table(path, columns=list(_COLUMNS))
    for name in _COLUMNS:
        for chunk in table[name].chunks:
            found._hashes[name].frombytes(chunk.to_numpy().tobytes())
    return found


def _hash(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def _counted(count: int, noun: str, what: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'} {what}" if count else ""

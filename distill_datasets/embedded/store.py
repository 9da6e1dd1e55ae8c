"""Training runs and checkpoints on disk, as plain folders, with a log of what was executed.

    <store>/<run>/run.json
    <store>/<run>/weights/<name>/          adapter in PEFT's format, optimizer.safetensors
    <store>/<run>/sampler_weights/<name>/  adapter in PEFT's format
    <store>/log.jsonl                      a line of JSON for each training request

A folder is on disk before it takes its place: after a crash there is the old one or the new.
Checkpoints whose time is over are deleted when somebody looks at them, and when a server starts.

The log is in the order of execution:

    {"at": ..., "run": ..., "seq": 1, "did": "forward_backward", "batch": ..., "rows": 8, ...}
    {"at": ..., "run": ..., "seq": 2, "did": "optim_step", "learning_rate": 0.001}
    {"at": ..., "run": ..., "seq": 3, "did": "save_weights", "path": "tinker://..."}

`batch` is the same for the same rows, whatever run learns them. A line is written when its
request has been computed; a run that starts from a checkpoint begins with `load_weights`. So the
log tells which batches are in which weights.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from distill_datasets.errors import OutputError
from distill_datasets.files import one_writer, recover, replacing, sync_folder, write_file

from .wire import InvalidRequestError, MissingError

Kind = Literal["weights", "sampler_weights"]
KINDS: tuple[Kind, ...] = ("weights", "sampler_weights")
SCHEME = "tinker://"
RECORD = "checkpoint.json"
LORA_FIELDS = {"rank", "seed", "train_unembed", "train_mlp", "train_attn"}
LOG = "log.jsonl"
# The range that Tinker documents: an hour to ten years.
LEAST_TTL, MOST_TTL = 3600, 10 * 365 * 86_400
# A folder that nobody has finished for so long was left behind by a killed server.
STALE_SECONDS = 3600
Clock = Callable[[], datetime]
UTC_NOW: Clock = partial(datetime.now, UTC)
Record = TypeVar("Record", "StoredRun", "StoredCheckpoint")


@dataclass(frozen=True)
class StoredRun:
    """One training run; `weights` is the digest of its whole base, empty where none was kept."""

    run_id: str
    base_model: str
    fingerprint: str
    lora: dict[str, Any]
    created: str
    user_metadata: dict[str, Any] | None = None
    weights: str = ""


@dataclass(frozen=True)
class StoredCheckpoint:
    """One saved state of a run; it is gone after `expires_at`."""

    run_id: str
    kind: Kind
    name: str
    created: str
    size_bytes: int = 0
    user_metadata: dict[str, str] | None = None
    expires_at: str | None = None
    has_optimizer: bool = False

    @property
    def path(self) -> str:
        """The address that clients use."""
        return f"{SCHEME}{self.run_id}/{self.kind}/{self.name}"


def copy_checkpoint(path: str, source: Path, target: Path) -> None:
    """Put one checkpoint of a store, with the record of its run, into another; none is changed.

    Raises `FileNotFoundError` for one that isn't there.
    """
    place = _place(*path.removeprefix(SCHEME).split("/"))
    run = place.parts[0]
    recover(source / place)
    found = [source / run / "run.json", *(source / place).glob("*")]
    if not (source / place / RECORD).is_file() or any(file.is_symlink() for file in found):
        raise FileNotFoundError(f"{str(source)!r} has no checkpoint {path!r}")
    if (target / place).is_dir():
        return
    with replacing(target / place) as building:
        for file in found[1:]:
            shutil.copyfile(file, building / file.name)
    write_file(target / run / "run.json", found[0].read_bytes())
    sync_folder(target)


class Store:
    """The folder of runs; several servers may read it, one at a time should write to a run."""

    def __init__(self, folder: Path, clock: Clock = UTC_NOW) -> None:
        self.folder, self.clock = folder, clock
        folder.mkdir(parents=True, exist_ok=True)
        # Put back what a killed server had moved aside, and remove what it left unfinished.
        for kept in folder.glob("*/*/.*.old"):
            # Held by a server that is saving there: nothing was left behind.
            with suppress(OutputError), one_writer(kept.parent.parent, "training"):
                recover(kept.with_name(kept.name[1 : -len(".old")]))
        for draft in folder.glob("*/*/.*"):
            with suppress(FileNotFoundError):
                age = clock().timestamp() - draft.stat().st_mtime
                if draft.is_dir() and age > STALE_SECONDS:
                    shutil.rmtree(draft)
        self.checkpoints()

    def now(self) -> str:
        """The current time in ISO 8601, UTC."""
        return self.clock().isoformat()

    def expiry(self, ttl_seconds: int | None) -> str | None:
        """When something saved now expires."""
        if ttl_seconds is None:
            return None
        if type(ttl_seconds) is not int or not LEAST_TTL <= ttl_seconds <= MOST_TTL:
            raise InvalidRequestError(
                f"expected ttl_seconds in {LEAST_TTL}..{MOST_TTL}, an hour to ten years, or none "
                f"to keep it; found {ttl_seconds!r}"
            )
        return (self.clock() + timedelta(seconds=ttl_seconds)).isoformat()

    def add_run(self, run: StoredRun) -> None:
        """Record a run."""
        folder = self.folder / _run_folder(run.run_id)
        for kind in KINDS:
            (folder / kind).mkdir(parents=True, exist_ok=True)
        write_file(folder / "run.json", json.dumps(asdict(run), indent=2))
        sync_folder(self.folder)

    def runs(self) -> list[StoredRun]:
        """All runs whose record can be read, newest first."""
        found = _readable(StoredRun, self.folder.glob("*/run.json"))
        return sorted((run for _, run in found), key=lambda run: run.created, reverse=True)

    def run(self, run_id: str) -> StoredRun:
        """One run."""
        file = self.folder / _run_folder(run_id) / "run.json"
        if not file.is_file():
            names = [run.run_id for run in self.runs()[:5]]
            raise MissingError(f"found no training run {run_id!r}; the newest are {names}")
        return _read(StoredRun, file)

    def write(
        self, checkpoint: StoredCheckpoint, fill: Callable[[Path], None], *, overwrite: bool
    ) -> StoredCheckpoint:
        """Save a checkpoint whose files `fill` writes.

        Raises `OutputError` where they can't be written, or another process saves to this run.
        """
        place = self.folder / _place(checkpoint.run_id, checkpoint.kind, checkpoint.name)
        with one_writer(place.parent.parent, "training"):
            recover(place)
            if place.exists() and not overwrite:
                raise InvalidRequestError(
                    f"{checkpoint.path} exists: save under another name, delete it first, or pass "
                    "overwrite=True to save_state"
                )
            with replacing(place) as draft:
                fill(draft)
                size = sum(file.stat().st_size for file in draft.iterdir())
                final = replace(checkpoint, size_bytes=size)
                (draft / RECORD).write_text(json.dumps(asdict(final), indent=2), "utf-8")
        return final

    def checkpoints(self, run_id: str | None = None) -> list[StoredCheckpoint]:
        """The checkpoints of one run or of all, newest first, without those that are damaged."""
        run = "*" if run_id is None else _run_folder(run_id)
        files = [
            file
            for kind in KINDS
            for file in self.folder.glob(f"{run}/{kind}/*/{RECORD}")
            if not file.parent.name.startswith(".")
        ]
        found = [
            checkpoint
            for file, checkpoint in _readable(StoredCheckpoint, files)
            if not self._expire(checkpoint, file.parent)
        ]
        return sorted(found, key=lambda one: one.created, reverse=True)

    def find(self, path: str) -> tuple[StoredCheckpoint, Path]:
        """The checkpoint at a `tinker://` path, and its folder."""
        parts = path.removeprefix(SCHEME).split("/")
        if path.startswith(SCHEME) and len(parts) == 3 and parts[1] in KINDS:
            folder = self.folder / _place(*parts)
            if (folder / RECORD).is_file():
                checkpoint = _read(StoredCheckpoint, folder / RECORD)
                if not self._expire(checkpoint, folder):
                    return checkpoint, folder
                raise MissingError(
                    f"{path!r} expired at {checkpoint.expires_at} and was deleted: save with a "
                    "longer ttl_seconds, or with none to keep it"
                )
            if folder.is_dir():
                raise MissingError(
                    f"the checkpoint {path!r} is damaged: {str(folder / RECORD)!r} is missing; "
                    "load another one"
                )
        known = [one.path for one in self.checkpoints()[:5]]
        raise MissingError(
            f"found no checkpoint at {path!r}; expected {SCHEME}<run>/weights/<name> or "
            f"{SCHEME}<run>/sampler_weights/<name>; the newest here are {known}"
        )

    def delete(self, path: str) -> None:
        """Remove a checkpoint; deleting twice is an error that says what exists."""
        _remove(self.find(path)[1])

    def set_expiry(self, path: str, ttl_seconds: int | None) -> None:
        """Let a checkpoint expire so long from now, or never."""
        checkpoint, folder = self.find(path)
        kept = replace(checkpoint, expires_at=self.expiry(ttl_seconds))
        write_file(folder / RECORD, json.dumps(asdict(kept), indent=2))

    def _expire(self, checkpoint: StoredCheckpoint, folder: Path) -> bool:
        """Delete a checkpoint whose time is over."""
        end = checkpoint.expires_at
        over = end is not None and datetime.fromisoformat(end) <= self.clock()
        if over:
            # Another server may delete it at the same time.
            with suppress(FileNotFoundError):
                _remove(folder)
        return over


class ExecutionLog:
    """Appends to a store's log; several servers may share it."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._file, self._clock = folder / LOG, clock
        with suppress(OSError), self._file.open("r+b") as file:
            # A killed server may have left half a line: what follows stands on lines of its own.
            if size := file.seek(0, os.SEEK_END):
                file.seek(size - 1)
                file.write(b"" if file.read() == b"\n" else b"\n")

    def add(self, run_id: str, seq_id: int, did: str, **facts: Any) -> None:
        """Write a line; a full disk doesn't fail what has already been computed."""
        line = {"at": self._clock().isoformat(), "run": run_id, "seq": seq_id, "did": did, **facts}
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            print(f"{self._file} lacks {line}: {error}", file=sys.stderr)


def _read(kind: type[Record], file: Path) -> Record:
    """A run or a checkpoint as it was recorded; a damaged file is an error that names it."""
    try:
        record = kind(**json.loads(file.read_text("utf-8")))
        datetime.fromisoformat(record.created)
        if isinstance(record, StoredRun) and not set(record.lora) >= LORA_FIELDS:
            raise ValueError(f"expected lora with {sorted(LORA_FIELDS)}; found {record.lora!r}")
        end = getattr(record, "expires_at", None)
        if end is not None and datetime.fromisoformat(end).tzinfo is None:
            raise ValueError(f"expires_at has no time zone: {end!r}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise MissingError(
            f"the record {str(file)!r} is damaged: {error}; restore it, or load another checkpoint"
        ) from error
    return record


def _readable(kind: type[Record], files: Iterable[Path]) -> Iterator[tuple[Path, Record]]:
    """The records that can be read; the others are named on the error stream."""
    for file in files:
        try:
            yield file, _read(kind, file)
        except MissingError as error:
            print(error, file=sys.stderr)


def _place(run_id: str, kind: str, name: str) -> Path:
    """A checkpoint's folder in a store."""
    return Path(_run_folder(run_id)) / kind / _checked(name)


def _run_folder(run_id: str) -> str:
    return _checked(run_id.replace(":", "_"))


def _checked(name: str) -> str:
    """Names become folders: nothing that could lead out of the store."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
        raise InvalidRequestError(
            f"expected a name of letters, digits, '.', '_' and '-', at most 200; found {name!r}"
        )
    return name


def _remove(folder: Path) -> None:
    """Out of sight in one step, then deleted."""
    gone = folder.with_name(f".{uuid.uuid4().hex}")
    folder.rename(gone)
    shutil.rmtree(gone)

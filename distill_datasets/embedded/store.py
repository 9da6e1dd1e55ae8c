"""What survives a restart: runs and their checkpoints, as plain folders.

    <store>/<run>/run.json
    <store>/<run>/weights/<name>/          adapter in PEFT's format, optimizer.safetensors
    <store>/<run>/sampler_weights/<name>/  adapter in PEFT's format
    <store>/log.jsonl                      see executed.py

Each folder is written beside its place and renamed into it, so that it is there whole or not.
Checkpoints whose time is over are deleted when somebody looks at them, and when a server starts.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from .failures import MissingError, RequestError

Kind = Literal["weights", "sampler_weights"]
KINDS: tuple[Kind, ...] = ("weights", "sampler_weights")
SCHEME = "tinker://"
RECORD = "checkpoint.json"
# The range that Tinker documents: an hour to ten years.
LEAST_TTL, MOST_TTL = 3600, 10 * 365 * 86_400
# A folder that nobody has finished for so long was left behind by a killed server.
STALE_SECONDS = 3600
Clock = Callable[[], datetime]


@dataclass(frozen=True)
class Run:
    """One training run."""

    run_id: str
    base_model: str
    fingerprint: str
    lora: dict[str, Any]
    created: str
    user_metadata: dict[str, Any] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """One saved state of a run; it is gone after `expires_at`."""

    run_id: str
    kind: Kind
    name: str
    created: str
    size_bytes: int = 0
    user_metadata: dict[str, str] | None = None
    expires_at: str | None = None
    has_optimizer: bool = field(default=False)

    @property
    def path(self) -> str:
        """The address that clients use."""
        return f"{SCHEME}{self.run_id}/{self.kind}/{self.name}"


def utc_now() -> datetime:
    """The current time."""
    return datetime.now(UTC)


def copy_checkpoint(path: str, source: Path, target: Path) -> None:
    """Put one checkpoint of a store, with the record of its run, into another; none is changed.

    Raises `FileNotFoundError` for one that isn't there.
    """
    run_id, kind, name = path.removeprefix(SCHEME).split("/")
    run = _folder_name(run_id)
    place = Path(run) / kind / name
    if not (source / place / RECORD).is_file():
        raise FileNotFoundError(f"{str(source)!r} has no checkpoint {path!r}")
    if (target / place).is_dir():
        return
    building = target / run / kind / f".{name}.{uuid.uuid4().hex}"
    shutil.copytree(source / place, building)
    shutil.copyfile(source / run / "run.json", target / run / "run.json")
    building.rename(target / place)


class Store:
    """The folder of runs; several servers may read it, one at a time should write to a run."""

    def __init__(self, folder: Path, clock: Clock = utc_now) -> None:
        self.folder, self.clock = folder, clock
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints()
        self._remove_drafts()

    def now(self) -> str:
        """The current time in ISO 8601, UTC."""
        return self.clock().isoformat()

    def expiry(self, ttl_seconds: int | None) -> str | None:
        """When something saved now expires."""
        if ttl_seconds is None:
            return None
        if not LEAST_TTL <= ttl_seconds <= MOST_TTL:
            raise RequestError(
                f"expected ttl_seconds in {LEAST_TTL}..{MOST_TTL}, an hour to ten years, or none "
                f"to keep it; found {ttl_seconds}"
            )
        return (self.clock() + timedelta(seconds=ttl_seconds)).isoformat()

    def add_run(self, run: Run) -> None:
        """Record a run."""
        folder = self._run_folder(run.run_id)
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "run.json", asdict(run))

    def runs(self) -> list[Run]:
        """All runs, newest first."""
        found = [Run(**_read_json(file)) for file in self.folder.glob("*/run.json")]
        return sorted(found, key=lambda run: run.created, reverse=True)

    def run(self, run_id: str) -> Run:
        """One run."""
        file = self._run_folder(run_id) / "run.json"
        if not file.is_file():
            names = [run.run_id for run in self.runs()[:5]]
            raise MissingError(f"found no training run {run_id!r}; the newest are {names}")
        return Run(**_read_json(file))

    def write(
        self, checkpoint: Checkpoint, fill: Callable[[Path], None], *, overwrite: bool
    ) -> Checkpoint:
        """Save a checkpoint whose files `fill` writes."""
        _require_name(checkpoint.name)
        place = self._folder(checkpoint)
        if place.exists() and not overwrite:
            raise RequestError(
                f"{checkpoint.path} exists: save under another name, delete it first, or pass "
                "overwrite=True to save_state"
            )
        draft = place.with_name(f".{uuid.uuid4().hex}")
        draft.mkdir(parents=True)
        fill(draft)
        size = sum(file.stat().st_size for file in draft.iterdir())
        final = Checkpoint(**{**asdict(checkpoint), "size_bytes": size})
        _write_json(draft / RECORD, asdict(final))
        if place.exists():
            old = place.with_name(f".{uuid.uuid4().hex}")
            place.rename(old)
            draft.rename(place)
            shutil.rmtree(old)
        else:
            draft.rename(place)
        return final

    def checkpoints(self, run_id: str | None = None) -> list[Checkpoint]:
        """The checkpoints of one run or of all, newest first."""
        folder = "*" if run_id is None else self._run_folder(run_id).name
        found = [
            checkpoint
            for kind in KINDS
            for file in self.folder.glob(f"{folder}/{kind}/*/{RECORD}")
            if not file.parent.name.startswith(".")
            and not self._expire(checkpoint := Checkpoint(**_read_json(file)), file.parent)
        ]
        return sorted(found, key=lambda one: one.created, reverse=True)

    def find(self, path: str) -> tuple[Checkpoint, Path]:
        """The checkpoint at a `tinker://` path, and its folder."""
        parts = path.removeprefix(SCHEME).split("/")
        if path.startswith(SCHEME) and len(parts) == 3 and parts[1] in KINDS:
            file = self._run_folder(parts[0]) / parts[1] / parts[2] / RECORD
            if file.is_file():
                checkpoint = Checkpoint(**_read_json(file))
                if not self._expire(checkpoint, file.parent):
                    return checkpoint, file.parent
                raise MissingError(
                    f"{path!r} expired at {checkpoint.expires_at} and was deleted: save with a "
                    "longer ttl_seconds, or with none to keep it"
                )
        known = [one.path for one in self.checkpoints()[:5]]
        raise MissingError(
            f"found no checkpoint at {path!r}; expected {SCHEME}<run>/weights/<name> or "
            f"{SCHEME}<run>/sampler_weights/<name>; the newest here are {known}"
        )

    def delete(self, path: str) -> None:
        """Remove a checkpoint; deleting twice is an error that says what exists."""
        _, folder = self.find(path)
        _remove(folder)

    def set_expiry(self, path: str, ttl_seconds: int | None) -> None:
        """Let a checkpoint expire so long from now, or never."""
        checkpoint, folder = self.find(path)
        kept = {**asdict(checkpoint), "expires_at": self.expiry(ttl_seconds)}
        _write_json(folder / RECORD, kept)

    def _expire(self, checkpoint: Checkpoint, folder: Path) -> bool:
        """Delete a checkpoint whose time is over."""
        end = checkpoint.expires_at
        over = end is not None and datetime.fromisoformat(end) <= self.clock()
        if over:
            # Another server may delete it at the same time.
            with suppress(FileNotFoundError):
                _remove(folder)
        return over

    def _remove_drafts(self) -> None:
        for draft in self.folder.glob("*/*/.*"):
            with suppress(FileNotFoundError):
                if self.clock().timestamp() - draft.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(draft)

    def _folder(self, checkpoint: Checkpoint) -> Path:
        return self._run_folder(checkpoint.run_id) / checkpoint.kind / checkpoint.name

    def _run_folder(self, run_id: str) -> Path:
        return self.folder / _folder_name(run_id)


def _folder_name(run_id: str) -> str:
    name = run_id.replace(":", "_")
    _require_name(name)
    return name


def _require_name(name: str) -> None:
    """Names become folders: nothing that could lead out of the store."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
        raise RequestError(
            f"expected a name of letters, digits, '.', '_' and '-', at most 200; found {name!r}"
        )


def _remove(folder: Path) -> None:
    """Out of sight in one step, then deleted."""
    gone = folder.with_name(f".{uuid.uuid4().hex}")
    folder.rename(gone)
    shutil.rmtree(gone)


def _read_json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    draft = file.with_name(f".{file.name}-{uuid.uuid4().hex}")
    draft.write_text(json.dumps(value, indent=2), "utf-8")
    draft.rename(file)

"""What was executed, in order: <store>/log.jsonl, a line of JSON for each training request.

    {"at": ..., "run": ..., "seq": 1, "did": "forward_backward", "batch": ..., "rows": 8, ...}
    {"at": ..., "run": ..., "seq": 2, "did": "optim_step", "learning_rate": 0.001}
    {"at": ..., "run": ..., "seq": 3, "did": "save_weights", "path": "tinker://..."}

`batch` is the same for the same rows, whatever run learns them. A line is written when its
request has been computed; a run that starts from a checkpoint begins with `load_weights`. So the
log tells which batches are in which weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

FILE = "log.jsonl"


class Log:
    """Appends to a store's log; several servers may share it."""

    def __init__(self, folder: Path, clock: Callable[[], datetime]) -> None:
        self._file, self._clock = folder / FILE, clock

    def add(self, run_id: str, seq_id: int, did: str, **facts: Any) -> None:
        """Write a line; a full disk doesn't fail what has already been computed."""
        line = {"at": self._clock().isoformat(), "run": run_id, "seq": seq_id, "did": did, **facts}
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            print(f"{self._file} lacks {line}: {error}", file=sys.stderr)

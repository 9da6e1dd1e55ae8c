"""What the embedded server's log says of the weights at a path: see embedded/store.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_log(store: Path) -> list[dict[str, Any]]:
    """All lines of a store's log, in the order of execution; a torn last line is left out."""
    *lines, _ = (store / "log.jsonl").read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines]


def trained_batches(store: Path, path: str) -> list[str]:
    """The batches in the weights saved at a `tinker://` path, first to last, by their digests.

    Follows the run back through the checkpoints it was resumed from. A batch counts once an
    optimizer step has applied it.
    """
    return _batches(read_log(store), path)


def _batches(lines: list[dict[str, Any]], path: str) -> list[str]:
    saves = [n for n, one in enumerate(lines) if one["did"] == "save_weights"]
    (end,) = [n for n in saves if lines[n]["path"] == path][-1:]
    applied: list[str] = []
    gathered: list[str] = []
    for n, line in enumerate(lines[:end]):
        if line["run"] != lines[end]["run"]:
            continue
        if line["did"] == "load_weights":
            # A name may be saved again: what counts is what was there when it was loaded.
            applied, gathered = _batches(lines[:n], line["path"]), []
        elif line["did"] == "forward_backward":
            gathered.append(line["batch"])
        elif line["did"] == "optim_step":
            applied, gathered = applied + gathered, []
    return applied

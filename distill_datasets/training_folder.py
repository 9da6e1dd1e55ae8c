"""The folder of one training: its configuration, its losses, and its checkpoints.

config.json         what is trained on what, and how; written before the first step
metrics.jsonl       a line a step, and a line an evaluation
checkpoints.jsonl   a line a checkpoint that the server has confirmed
loss.png            both losses over the steps
checkpoints/        the weights, where the server is this machine's
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill_datasets.errors import OutputError

_SAME = ("student", "identity", "settings", "dataset.revision", "dataset.files")


@dataclass(frozen=True)
class Checkpoint:
    """Saved weights after `step` steps: `state` resumes training, `sampler` answers."""

    name: str
    step: int
    state: str
    sampler: str
    validation_loss: float | None
    best: bool
    final: bool


class TrainingFolder:
    """One training's files; one process at a time writes them."""

    def __init__(self, path: str | Path) -> None:
        """Make the folder; raises `OutputError` where it can't be written."""
        self.path = Path(path)
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            self._write(".writable", "")
            (self.path / ".writable").unlink()

    @property
    def store(self) -> Path:
        """Where a local server keeps the weights."""
        return self.path / "checkpoints"

    @property
    def config(self) -> dict[str, Any] | None:
        """What `start` wrote, or None in a new folder."""
        file = self.path / "config.json"
        if not file.is_file():
            return None
        config = json.loads(file.read_text("utf-8"))
        if not isinstance(config, dict) or not {"student", "dataset", "settings"} <= set(config):
            raise OutputError(
                f"{str(self.path)!r} holds something else: expected a training's config.json. "
                "Choose another --out."
            )
        return config

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process out; a killed one leaves no lock behind."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / ".lock", timeout=0)
        with self._writing():
            try:
                lock.acquire()
            except Timeout:
                raise OutputError(
                    f"Another training writes to {str(self.path)!r}: wait for it, or choose "
                    "another --out."
                ) from None
        try:
            yield
        finally:
            lock.release()

    def require_same(self, wanted: Mapping[str, Any]) -> None:
        """Refuse to continue what was begun otherwise; the message names each difference."""
        config = self.config
        if config is None:
            return
        there, here = _flat(config), _flat(wanted)
        differences = [
            f"{name} is {there.get(name)!r} there, {here[name]!r} now"
            for name in here
            if name.startswith(_SAME) and there.get(name) != here[name]
        ]
        if differences:
            raise OutputError(
                f"{str(self.path)!r} holds another training: {'; '.join(differences)}. Choose "
                "another --out, or delete that folder."
            )

    def start(self, config: Mapping[str, Any]) -> int:
        """Write the configuration, and go back to the last checkpoint; the steps done there."""
        step = self.checkpoints[-1].step if self.checkpoints else 0
        kept = [line for line in self.metrics if line["step"] <= step]
        with self._writing():
            self._write("config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
            self._write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
            lines = [json.dumps(asdict(checkpoint)) + "\n" for checkpoint in self.checkpoints]
            if lines:
                self._write("checkpoints.jsonl", "".join(lines))
        return step

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return self._lines("metrics.jsonl")

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """All confirmed checkpoints, the oldest first."""
        return [Checkpoint(**line) for line in self._lines("checkpoints.jsonl")]

    def log(self, line: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        self._append("metrics.jsonl", line)

    def add(self, checkpoint: Checkpoint) -> None:
        """Add a checkpoint that the server has confirmed."""
        self._append("checkpoints.jsonl", asdict(checkpoint))

    def draw(self) -> None:
        """Draw loss.png."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for key, label in (("loss", "training"), ("validation_loss", "validation")):
            points = [(line["step"], line[key]) for line in self.metrics if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="o" if "v" in key else "")
        axes.set(xlabel="step", ylabel="loss per response token")
        axes.legend()
        with self._writing():
            figure.savefig(self.path / "loss.png", dpi=150)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """A killed process may leave half a line at the end: it was not confirmed to anyone."""
        file = self.path / name
        if not file.is_file():
            return []
        whole, _, _ = file.read_text("utf-8").rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        with self._writing(), (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        draft = self.path / f".{name}.partial"
        draft.write_text(text, encoding="utf-8")
        draft.replace(self.path / name)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(
                f"Can't write to {str(self.path)!r}: {error}. Free it or choose another --out, "
                "and run again: it continues from the last checkpoint."
            ) from error


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        flat |= _flat(inner, f"{name}.") if isinstance(inner, Mapping) else {name: inner}
    return flat

"""The folder of one training: its configuration, its losses, and its checkpoints.

config.json         what is trained on what, and how; written before the first step
metrics.jsonl       a line a step, and a line a measurement of the validation rows
checkpoints.jsonl   a line a checkpoint that the server has confirmed and still keeps
loss.png            the losses, the learning rate and the gradient over the steps
checkpoints/        the weights, where the server is this machine's
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from distill_datasets.errors import OutputError
from distill_datasets.files import one_writer
from distill_datasets.training.selection import Selection
from distill_datasets.training.settings import TrainSettings, decisive

_SAME = ("student", "identity", "settings", "dataset.revision", "dataset.files", "resumed", "start")


@dataclass(frozen=True)
class Checkpoint:
    """Saved weights after `step` steps: `state` resumes training, `sampler` answers.

    `best` of all up to here, `final` the last of the training; what is not `kept` is deleted when
    a later one is confirmed. `scores` are all numbers measured on the validation rows.
    """

    name: str
    step: int
    state: str
    sampler: str | None
    validation_loss: float | None = None
    best: bool = False
    final: bool = False
    kept: bool = True
    scores: Mapping[str, float] = field(default_factory=dict)


class TrainingFolder:
    """One training's files; one process at a time writes them."""

    def __init__(self, path: str | Path) -> None:
        """Make the folder; raises `OutputError` where it can't be written."""
        self.path = Path(path)
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            # Nameless, so that a look at a training that runs takes nothing from it.
            TemporaryFile(dir=self.path).close()

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
        with one_writer(self.path, "training"):
            yield

    def require_same(self, wanted: Mapping[str, Any]) -> None:
        """Refuse to continue what was begun otherwise; the message names each difference."""
        config = self.config
        if config is None:
            return
        there, here = _comparable(config), _comparable(wanted)
        differences = [
            f"{name} is {there.get(name)!r} there, {here.get(name)!r} now"
            for name in [*here, *(name for name in there if name.startswith("start."))]
            if name.startswith(_SAME) and there.get(name) != here.get(name)
        ]
        if differences:
            raise OutputError(
                f"{str(self.path)!r} holds another training: {'; '.join(differences)}. Choose "
                "another --out, or delete that folder."
            )

    def start(
        self,
        config: Mapping[str, Any],
        checkpoints: Sequence[Checkpoint] = (),
    ) -> int:
        """Write the configuration, and go back to the last checkpoint; the steps done there.

        A new folder begins with the given checkpoints.
        """
        metrics: list[dict[str, Any]] = []
        if self.config is not None:
            metrics, checkpoints = self.metrics, self.checkpoints
        step = checkpoints[-1].step if checkpoints else 0
        with self._writing():
            self._rewrite("metrics.jsonl", [line for line in metrics if line["step"] <= step])
            self._rewrite("checkpoints.jsonl", [asdict(one) for one in checkpoints])
            self._write("config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        return step

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return self._lines("metrics.jsonl")

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """All confirmed checkpoints, the oldest first."""
        return [Checkpoint(**line) for line in self._lines("checkpoints.jsonl")]

    def selection(self, settings: TrainSettings) -> Selection:
        """What the measurements so far say, those before a resumed state included."""
        begun = (self.config or {}).get("begun")
        return Selection.of(settings, self.metrics, Selection(**begun) if begun else None)

    def measured(self, step: int) -> bool:
        """Whether the validation rows were measured after this step."""
        return any(line["step"] == step and "loss" not in line for line in self.metrics)

    def log(self, line: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        self._append("metrics.jsonl", line)

    def add(self, checkpoint: Checkpoint) -> None:
        """Add a checkpoint that the server has confirmed."""
        self._append("checkpoints.jsonl", asdict(checkpoint))

    def forget(self, names: Collection[str]) -> None:
        """Take checkpoints out that the server is about to delete."""
        left = [asdict(one) for one in self.checkpoints if one.name not in names]
        with self._writing():
            self._rewrite("checkpoints.jsonl", left)

    def draw(self) -> None:
        """Draw loss.png."""
        from distill_datasets.training.plots import draw_curves

        with self._writing():
            draw_curves(self.metrics, self.path / "loss.png")

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

    def _rewrite(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        if lines or (self.path / name).exists():
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            self._write(name, text)

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


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    return _flat({**config, "settings": decisive(config["settings"])})


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        flat |= _flat(inner, f"{name}.") if isinstance(inner, Mapping) else {name: inner}
    return flat


def installed_versions() -> dict[str, str]:
    """What decides the losses; a checkout that isn't installed has no version of its own."""
    names = ("distill-datasets", "tinker", "tinker-cookbook", "datasets", "torch")
    versions = {}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions

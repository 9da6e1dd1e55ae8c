"""The folder of one training: its configuration, its losses, its checkpoints, and its result.

config.json         what is trained on what, and how; written before the first step
metrics.jsonl       a line a step, and a line a measurement of the validation rows
checkpoints.jsonl   a line a checkpoint that the server has confirmed and still keeps
loss.png            the losses, the learning rate and the gradient over the steps
checkpoints/        the weights, where the server is this machine's

Beside it what every checkpoint says of its training, how long a server keeps it, and which is the
best: training stops for want of improvement, or where the student's answers collapse, which is that
they become one, don't end where the teacher's do, or are empty.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from distill_datasets.errors import ModelError, OtherTrainingError, OutputError
from distill_datasets.files import read_object, writable_folder, write_file
from distill_datasets.models.sampler import digest
from distill_datasets.tables import html_card, html_facts
from distill_datasets.training import tell
from distill_datasets.training.plots import draw_curves, panels_html
from distill_datasets.training.schedule import FEW_ANSWERS
from distill_datasets.training.settings import (
    VALIDATION_LOSS,
    decisive,
    unlike_default,
)

if TYPE_CHECKING:
    from pandas import DataFrame

    from distill_datasets.models.tinker import Connection

_SAME = ("student", "identity", "settings", "dataset.revision", "dataset.files", "resumed", "start")
T = TypeVar("T")
_RENDERER = "renderer_name"  # the cookbook's name: its tools find a checkpoint's renderer by it
_DECISIVE = ("learning_rate", "max_length", "steps", "base_model", "renderer")
_DELETION = 10.0  # seconds for the server to delete what nobody needs
_KEEPING = 60.0  # seconds for it to keep one for good
_NOT_DELETED = "checkpoints that nobody needs any more stay on the server"
_NOT_KEPT = (
    "how long checkpoints stay on the server can't be changed: save the student (`push`, or "
    "`export`) before it expires"
)
_WEEK = 7 * 24 * 3600
_IN_A_ROW = 2  # measurements that show a collapse before training stops
_COLLAPSES = {
    "empty": "its answers are empty",
    "loops": "its answers repeat themselves without end",
    "endless": "its answers don't end where the teacher's do",
    "one": "its answers to different queries have become one",
}
# What is measured of sampled answers, and the share of them from which it is a collapse.
_SHARES = {
    "empty": ("answers_empty", 0.5),
    "loops": ("answers_looping", 0.5),
    "endless": ("answers_unending", 0.75),
}
_CLEAN = 0.25  # up to which share there is none
_VARIED = 8  # times as many different answers of the teacher, or one alone, are a collapse
_DOMINANT = 0.5  # a larger share of one response of the teacher's leaves nothing to be said
_FREE_TEXT = 0.5  # share of responses that occur once: fewer are labels


@dataclass(frozen=True)
class Selection:
    """The measurements up to a step, as far as a decision needs them.

    `mark` is the last value that was better than the mark before by `min_improvement`; `stale`
    counts the measurements since. `base` is the untrained student's value, `lowest` the lowest
    validation loss. `sign` is the collapse that the last `struck` measurements show; an earlier
    one was clearly `clean` of these signs.
    """

    metric: str = VALIDATION_LOSS
    min_improvement: float = 0.0
    best: float | None = None
    best_step: int = 0
    mark: float | None = None
    mark_step: int = 0
    stale: int = 0
    base: float | None = None
    lowest: float | None = None
    clean: Sequence[str] = field(default_factory=list)
    sign: str = ""
    struck: int = 0

    def read(self, metrics: Iterable[Mapping[str, Any]]) -> "Selection":
        """With all measurements among the lines of a metrics.jsonl."""
        selection = self
        for line in metrics:
            if selection.metric in line or VALIDATION_LOSS in line:
                selection = selection.measured(line["step"], line)
        return selection

    def measured(self, step: int, scores: Mapping[str, Any]) -> "Selection":
        """With one measurement more; that of step 0 is of the untrained student.

        A collapse counts where an earlier measurement was without it, or where the validation loss
        doesn't improve: many a base never ends an answer, and every student of few labels says the
        commonest first. What shows one is never the best.
        """
        loss = scores.get(VALIDATION_LOSS)
        improves = loss is not None and (self.lowest is None or loss < self.lowest)
        clean = sorted({*self.clean, *_clean_signs(scores)})
        found = replace(self, clean=clean, lowest=loss if improves else self.lowest)
        if step == 0:
            return replace(found, base=scores.get(self.metric))
        labels = scores.get("teacher_once", 0.0) < _FREE_TEXT
        for sign in collapse_signs(scores):
            if not improves or (sign in self.clean and not (labels and sign == "one")):
                return replace(found, sign=sign, struck=self.struck + 1, stale=self.stale + 1)
        found = replace(found, sign="", struck=0)
        value = scores.get(self.metric)
        return found if value is None else found.after(step, value)

    @property
    def collapsed(self) -> bool:
        """Whether the last measurements show that the student's answers have collapsed."""
        return self.struck >= _IN_A_ROW

    @property
    def collapse(self) -> str:
        """What the collapse looks like, in words."""
        return (
            f"the student collapsed: {_COLLAPSES[self.sign]}, in {self.struck} validations in a row"
        )

    @property
    def doubt(self) -> str:
        """What speaks against the best checkpoint, in words; empty where nothing does."""
        found = []
        if self.struck and not self.collapsed:
            found.append(f"of the last weights {_COLLAPSES[self.sign]}")
        base, best = self.base, self.best
        if base is not None and best is not None and not self._gain(base, best) > 0:
            found.append(
                "the best checkpoint is no better than the student before training "
                f"({self.metric} {base:.4g})"
            )
        return "; ".join(found)

    def after(self, step: int, value: float) -> "Selection":
        """With one measurement more; of equal ones, the first stays the best."""
        found = self
        if self.best is None or self._gain(self.best, value) > 0:
            found = replace(found, best=value, best_step=step)
        gain = None if self.mark is None else self._gain(self.mark, value)
        if gain is None or (gain > 0 and gain >= self.min_improvement):
            return replace(found, mark=value, mark_step=step, stale=0)
        return replace(found, stale=self.stale + 1)

    def exhausted(self, patience: int | None) -> bool:
        """Whether it hasn't got better for so many measurements."""
        return patience is not None and self.stale >= patience

    def _gain(self, before: float, now: float) -> float:
        return before - now if self.metric.endswith("loss") else now - before


def collapse_signs(scores: Mapping[str, Any]) -> list[str]:
    """What a measurement's sampled answers show that the teacher's responses don't."""

    if scores.get("answers", 0) < FEW_ANSWERS:
        return []
    found = [sign for sign, (name, most) in _SHARES.items() if scores.get(name, 0.0) >= most]
    varied = max(_VARIED, scores.get("teacher_distinct", 0.0))
    alike = scores.get("answers_distinct", 0.0) * _VARIED <= varied
    return found + (["one"] if alike and scores.get("teacher_commonest", 0.0) <= _DOMINANT else [])


def _clean_signs(scores: Mapping[str, Any]) -> set[str]:
    """Those that a measurement is clearly without."""
    if not scores.get("answers"):
        return set()
    found = {sign for sign, (name, _) in _SHARES.items() if scores.get(name, 0.0) <= _CLEAN}
    varied = 2 * scores.get("answers_distinct", 0) >= scores.get("teacher_distinct", 0)
    return found | ({"one"} if varied else set())


def why_it_ended(selection: Selection, patience: int | None, done: int, planned: int) -> str:
    """The reason, in words."""
    if selection.collapsed:
        return selection.collapse
    if done < planned and selection.exhausted(patience):
        least = f" of {selection.min_improvement:g}" if selection.min_improvement else ""
        times = "validation" if patience == 1 else "validations"
        return f"no improvement{least} in {patience} {times} (best at step {selection.best_step})"
    return f"all {planned} steps done"


@dataclass(frozen=True)
class SavedCheckpoint:
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


@dataclass(frozen=True)
class TrainingResult:
    """A finished training: `path` can be sampled wherever a model is named.

    `final_loss` is per response token, after the last step on the validation rows, or without
    those the last batch's; `best` may be of an earlier step. `why` says what ended it, `doubt`
    what speaks against the best weights, if anything does. `rows` and `skipped` count the training
    split, `tokens` everything that was learned from.
    """

    path: Path
    best: SavedCheckpoint
    final: SavedCheckpoint
    final_loss: float
    steps: int
    rows: int
    skipped: int
    tokens: int
    seconds: float
    why: str
    doubt: str = ""

    @property
    def verdict(self) -> str:
        """Which weights won, and by what; and what speaks against them."""

        def scores(checkpoint: SavedCheckpoint) -> str:
            # What is measured of sampled answers chooses no checkpoint.
            return ", ".join(
                f"{name} {value:.4g}"
                for name, value in checkpoint.scores.items()
                if not name.startswith(("answers", "teacher_"))
            )

        if not self.final.scores:
            return f"step {self.best.step} is the last; there are no validation rows to choose by"
        said = f"the final weights won ({scores(self.final)})"
        if self.best.step != self.final.step:
            said = (
                f"step {self.best.step} won ({scores(self.best)}); the final weights, of step "
                f"{self.final.step}, have {scores(self.final)}"
            )
        return f"{said}; but {self.doubt}" if self.doubt else said

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A line a step, and a line a measurement of the validation rows."""
        return TrainingFolder(self.path).metrics

    def to_pandas(self) -> "DataFrame":
        """The history: a row a line of `metrics`."""
        from pandas import DataFrame

        return DataFrame(self.metrics)

    def _repr_html_(self) -> str:
        numbers = {
            "loss": self.final_loss,
            "steps": self.steps,
            "rows": self.rows,
            "skipped": self.skipped or None,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "ended": self.why,
        }
        drawn = panels_html(self.metrics, self.best.step)[:1]
        return html_card(f"Trained: {self.verdict}", html_facts(numbers), *drawn, str(self.path))


class TrainingFolder:
    """One training's files; one process at a time writes them."""

    def __init__(self, path: str | Path) -> None:
        """Make the folder; raises `OutputError` where it can't be written."""
        self.path = writable_folder(path)
        self._damaged: set[tuple[str, int]] = set()

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
        config = read_object(file) or {}
        if {"student", "dataset", "settings"} <= set(config):
            return config
        raise OutputError(
            f"{str(self.path)!r} holds something else: expected a training's config.json. "
            f"Choose another --out, for example {str(next_folder(self.path))!r}."
        )

    def require_same(self, wanted: Mapping[str, Any]) -> None:
        """Refuse to continue what was begun otherwise; the message names each difference."""
        config = self.config
        if config is None:
            return
        there, here = (
            _flat({**one, "settings": decisive(one["settings"])}) for one in (config, wanted)
        )
        differences = [
            f"{name} is {there.get(name)!r} there, {here.get(name)!r} now"
            for name in [*here, *(name for name in there if name.startswith("start."))]
            if name.startswith(_SAME) and there.get(name) != here.get(name)
        ]
        if differences:
            raise OtherTrainingError(
                f"{str(self.path)!r} holds another training: {'; '.join(differences)}. Train into "
                f"a new folder (--out {next_folder(self.path)}), or delete that one."
            )

    def start(self, config: Mapping[str, Any], checkpoints: Sequence[SavedCheckpoint]) -> None:
        """Write the configuration, and go back to the last of the checkpoints."""
        step, lines = (
            checkpoints[-1].step if checkpoints else 0,
            self.metrics if self.config else [],
        )
        self._rewrite("metrics.jsonl", [line for line in lines if line["step"] <= step])
        self._rewrite("checkpoints.jsonl", [asdict(one) for one in checkpoints])
        write_file(
            self.path / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        )

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return self._lines("metrics.jsonl", lambda line: {**line, "step": int(line["step"])})

    @property
    def checkpoints(self) -> list[SavedCheckpoint]:
        """All confirmed checkpoints, the oldest first."""
        return self._lines("checkpoints.jsonl", lambda line: SavedCheckpoint(**line))

    @property
    def best(self) -> SavedCheckpoint | None:
        """The last confirmed checkpoint that was the best of all up to it."""
        return next((one for one in reversed(self.checkpoints) if one.best), None)

    @property
    def finished(self) -> bool:
        """Whether the final checkpoint is confirmed."""
        return self.config is not None and any(one.final for one in self.checkpoints)

    @property
    def selection(self) -> Selection:
        """What the measurements so far say, those before a resumed state included."""
        return _selection(self.config or {}, self.metrics)

    def measured(self, step: int) -> bool:
        """Whether the validation rows were measured after this step."""
        return any(line["step"] == step and "loss" not in line for line in self.metrics)

    def log(self, line: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        try:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise OutputError(
                f"Can't write to {str(self.path)!r}: {error}. Free it or choose another --out, "
                "and run again: it continues from the last checkpoint."
            ) from error

    def add(self, checkpoint: SavedCheckpoint) -> list[SavedCheckpoint]:
        """Add a checkpoint that the server has confirmed; those that nobody needs since then."""
        known, best = self.checkpoints, checkpoint if checkpoint.best else self.best
        needed = [one for one in known if one.kept or one == best]
        self._rewrite("checkpoints.jsonl", [asdict(one) for one in (*needed, checkpoint)])
        return [one for one in known if one not in needed]

    def draw(self) -> None:
        """Draw loss.png."""
        config = self.config or {}
        rows = config.get("dataset", {}).get("rows", {}).get("train", 0)
        title = f"{config.get('student', 'student')}, trained on {rows:,} rows"
        step = self.best.step if self.best else None
        draw_curves(self.metrics, self.path / "loss.png", title=title, best=step)

    def result(self) -> TrainingResult:
        """The result that a finished training's files hold.

        Raises `ModelError` where the student's answers collapsed before any checkpoint was good.
        """
        config, selection, best = self.config or {}, self.selection, self.best
        steps, final = [line for line in self.metrics if "loss" in line], self.checkpoints[-1]
        patience = config["settings"].get("patience")
        why = why_it_ended(selection, patience, final.step, config["steps"])
        if selection.collapsed and best is None:
            raise ModelError(
                f"Training in {str(self.path)!r} stopped at step {final.step}: {why}, and no "
                "checkpoint before is good. Look at the responses of the training split, lower "
                "the learning rate, and train again into another folder; answered_rows=0 "
                "(--answered-rows 0) trains to the end whatever the student answers."
            )
        loss = final.validation_loss
        return TrainingResult(
            path=self.path,
            best=best or final,
            final=final,
            final_loss=steps[-1]["loss"] if loss is None else loss,
            steps=final.step,
            rows=config["dataset"]["rows"]["train"],
            skipped=config["dataset"]["skipped"]["train"],
            tokens=sum(line["tokens"] for line in steps),
            seconds=round(sum(line["seconds"] for line in steps), 2),
            why=why,
            doubt=selection.doubt,
        )

    def _lines(self, name: str, read: Callable[[dict[str, Any]], T]) -> list[T]:
        """A killed process may leave half a line at the end: it was not confirmed to anyone."""
        file = self.path / name
        if not file.is_file():
            return []
        whole, _, _ = file.read_text("utf-8", "replace").rpartition("\n")
        found = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                found.append(read(json.loads(line)))
            except (ValueError, TypeError, KeyError):
                if (name, number) not in self._damaged:
                    tell(f"{str(file)!r}, line {number} is damaged: left out")
                self._damaged.add((name, number))
        return found

    def _rewrite(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        if lines or (self.path / name).exists():
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_file(self.path / name, text)


def _selection(config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> Selection:
    settings = config.get("settings", {})
    metric, least = settings.get("select", VALIDATION_LOSS), settings.get("min_improvement", 0.0)
    begun = config.get("begun") or {"metric": metric, "min_improvement": least}
    return Selection(**begun).read(metrics)


def training_warnings(config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """What speaks against a training's best weights: a collapse, or no gain over before."""
    found = _selection(config, metrics)
    return [one for one in (found.collapse if found.collapsed else "", found.doubt) if one]


def next_folder(out: Path) -> Path:
    """The first of `out`-2, `out`-3, … that isn't there."""
    numbered = (out.with_name(f"{out.name}-{number}") for number in itertools.count(2))
    return next(folder for folder in numbered if not folder.exists())


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


def describe(config: Mapping[str, Any]) -> dict[str, str]:
    """What every checkpoint of a training says, as far as the training's configuration goes."""
    return {
        "made_by": f"distill_datasets {config['versions'].get('distill-datasets', 'unreleased')}",
        "dataset": str(config["dataset"]["path"]),
        "dataset_revision": config["dataset"]["revision"],
        "dataset_files": config["dataset"]["files"],
        "base_model": config["base_model"],
        _RENDERER: config["renderer"],
        "settings": _compact(unlike_default(config["settings"])),
        "config_digest": _config_digest(decisive(config["settings"]), config),
    }


def describe_progress(
    step: int, selection: Selection, best: SavedCheckpoint | None
) -> dict[str, str]:
    """What one checkpoint adds: enough to go on as if the local folder were still there."""
    found = {"step": str(step), "selection": _compact(asdict(selection))}
    return found | ({"best": _compact(asdict(best))} if best else {})


def read_progress(
    connection: "Connection", path: str, config: Mapping[str, Any]
) -> tuple[Selection, list[SavedCheckpoint]]:
    """Where a training that the server knows stands: the measurements, and the checkpoints to
    begin a folder with, the one at `path` last.

    Raises `ModelError` where it was trained on something else or otherwise; the message says what.
    """
    from distill_datasets.training.student import read_metadata

    found, here = read_metadata(connection, path), describe(config)
    missing = {"step", "selection", "config_digest", "dataset_revision"} - set(found)
    if missing:
        raise ModelError(
            f"{path!r} can't be resumed from: expected a checkpoint of `distill-datasets train`; "
            f"its metadata lacks {sorted(missing)}. Start from its weights instead (--from)."
        )
    # What version 0.1 wrote may name the defaults of its settings.
    said = _compact(unlike_default(json.loads(found.get("settings", "{}"))))
    there = {**found, "settings": said}
    names = ("dataset_revision", "dataset_files", "base_model", _RENDERER, "settings")
    others = [name for name in names if there.get(name) != here[name]]
    old = _config_digest({**decisive(config["settings"]), "preset": "production"}, config)
    if not others and there["config_digest"] not in (here["config_digest"], old):
        others = ["config_digest"]
    if others:
        differences = "; ".join(
            f"{one} is {there.get(one)!r} there, {here[one]!r} now" for one in others
        )
        raise ModelError(
            f"{path!r} is of another training: {differences}. Give the dataset and the "
            "settings that it was begun with, or start from its weights instead (--from)."
        )
    step = int(found["step"])
    if step >= config["steps"]:
        raise ModelError(
            f"{path!r} is of step {step} of {config['steps']}: nothing is left to train. Measure "
            "it by its sampler path, or train longer from its weights (--from)."
        )
    # All belong to another training, which may still need them: they are kept.
    known = [json.loads(found["best"]) | {"kept": True}] if "best" in found else []
    known.append({"name": "resumed", "step": step, "state": path, "sampler": None})
    selection = Selection(**json.loads(found["selection"]))
    return selection, [SavedCheckpoint(**one) for one in known]


class CheckpointRetention:
    """How long the server keeps checkpoints. Requests run beside the training."""

    def __init__(self, connection: "Connection", ttl_seconds: int | None) -> None:
        """`ttl_seconds` as in the settings."""
        self._connection = connection
        default = None if connection.server else _WEEK
        self.ttl = default if ttl_seconds is None else ttl_seconds or None
        self._pending: list[tuple[Any, str]] = []

    def delete(self, checkpoints: Iterable[SavedCheckpoint]) -> None:
        """Begin to delete; what fails expires by itself."""
        rest = self._connection.rest
        self._pending += [
            (rest.delete_checkpoint_from_tinker_path(path), _NOT_DELETED)
            for path in _paths(checkpoints)
        ]

    def replace_best(self, old: Iterable[SavedCheckpoint], new: SavedCheckpoint) -> None:
        """Begin to keep the new one without end; the old ones get the usual time to live."""
        for request in (*self._set_ttl(old, self.ttl), *self._set_ttl([new], None)):
            self._pending.append((request, _NOT_KEPT))

    def keep(self, checkpoints: Iterable[SavedCheckpoint]) -> None:
        """Keep them for good; waits until the server has confirmed it, or says that it doesn't."""
        from distill_datasets.models.tinker import explained, try_to

        with explained(self._connection.reference):
            for request in self._set_ttl(checkpoints, None):
                try_to(request, _NOT_KEPT, timeout=_KEEPING)

    def _set_ttl(self, checkpoints: Iterable[SavedCheckpoint], ttl: int | None) -> list[Any]:
        if self.ttl is None:
            return []
        rest = self._connection.rest
        return [rest.set_checkpoint_ttl_from_tinker_path(path, ttl) for path in _paths(checkpoints)]

    def close(self) -> None:
        """Give what was begun a few seconds."""
        import tinker

        from distill_datasets.models.tinker import optional

        end = time.monotonic() + _DELETION
        for request, without in self._pending:
            with suppress(tinker.TinkerError, TimeoutError):
                request.future().exception(max(0.0, end - time.monotonic()))
                optional(request, without)


def _paths(checkpoints: Iterable[SavedCheckpoint]) -> list[str]:
    return [path for one in checkpoints for path in (one.state, one.sampler) if path]


def _config_digest(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    return digest([settings, *(config[name] for name in _DECISIVE)])[:32]


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

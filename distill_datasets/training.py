"""Train a student on a dataset: one flat loop that can be stopped and continued anywhere."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import OutputError
from distill_datasets.progress import Progress
from distill_datasets.training_folder import Checkpoint, TrainingFolder
from distill_datasets.training_plan import Step, TrainSettings, default_learning_rate, plan_steps
from distill_datasets.trainset import Rendered, Source, Split, locate, open_splits

if TYPE_CHECKING:
    from distill_datasets.connection import Connection
    from distill_datasets.student import PendingStep, Student

_LONGEST = 4096  # tokens a row: what a local machine holds; more must be asked for
_MOST_STEPS_LOST = 100

__all__ = ["TrainSettings", "Training", "train"]


@dataclass(frozen=True)
class Training:
    """A finished training: `path` can be sampled wherever a model is named.

    `final_loss` is per response token, after the last step on the validation rows, or without
    those the last batch's. `rows` and `skipped` count the training split, `tokens` everything
    that was learned from.
    """

    path: Path
    best: Checkpoint
    final_loss: float
    steps: int
    rows: int
    skipped: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class _Run:
    """What the loop needs, all decided before the first step."""

    folder: TrainingFolder
    settings: TrainSettings
    train: Rendered
    validation: Rendered | None
    steps: Sequence[Step]

    def evaluates(self, done: int) -> bool:
        """Whether the validation loss is due after so many steps."""
        every = self.settings.evaluate_every or max(1, len(self.steps) // 10)
        return done % every == 0 or self.saves(done)

    def saves(self, done: int) -> bool:
        """Whether a checkpoint is due after so many steps."""
        every = self.settings.save_every or min(max(1, len(self.steps) // 5), _MOST_STEPS_LOST)
        return done % every == 0 or done == len(self.steps)


def train(
    dataset: str | Path,
    *,
    student: str,
    out: str | Path,
    settings: TrainSettings | None = None,
) -> Training:
    """Train a student on a release, a folder, a file, or a Hub dataset `name@revision`.

    Called again with the same `out`, it continues from the last checkpoint to the same losses,
    and does nothing where the training is finished. The best checkpoint is the one with the
    lowest validation loss, without a validation split the last. Raises `DatasetError`,
    `ModelError`, `AccessError`, `ServiceError` or `OutputError`, each with what to do.
    """
    settings = settings or TrainSettings()
    source = locate(dataset, settings.config)
    if Path(out).resolve().is_relative_to(source.path.resolve()):
        raise OutputError(
            f"{str(out)!r} lies inside the dataset, which it would change: choose another --out."
        )
    folder = TrainingFolder(out)
    request: dict[str, Any] = {
        "student": str(student),
        "settings": asdict(settings),
        "dataset": {"path": source.reference, "revision": source.revision, "files": source.files},
    }
    with folder.locked():
        folder.require_same(request)
        if any(checkpoint.final for checkpoint in folder.checkpoints):
            return _training(folder)
        splits = open_splits(source, settings)
        connection = _connect(str(student), source, settings, folder)
        with _session(connection):
            run, config = _prepare(splits, connection, settings, folder)
            config = {**request, **config, "dataset": {**request["dataset"], **config["dataset"]}}
            folder.require_same(config)
            start = folder.start(config)
            try:
                _learn(run, _student(connection, run), start)
            except KeyboardInterrupt as interrupt:
                interrupt.add_note(f"Train again with out={str(out)!r} to continue.")
                raise
        folder.draw()
        return _training(folder)


def _learn(run: _Run, student: "Student", start: int) -> None:
    """The loop. One batch is always queued behind the one that is being learned."""
    pending: deque[tuple[Step, PendingStep]] = deque()
    began = time.monotonic()
    with Progress("train", len(run.steps) - start, unit="steps") as progress:
        for step in run.steps[start:]:
            examples = run.train.examples(step.places)
            learning = student.submit(examples, step.learning_rate, run.settings.normalization)
            pending.append((step, learning))
            evaluates, saves = run.evaluates(step.number), run.saves(step.number)
            validation = None
            if evaluates and run.validation is not None:
                validation = student.loss(list(run.validation.batches(run.settings.batch_size)))
            while len(pending) > (0 if evaluates else 1):
                finished, learning = pending.popleft()
                learned = learning.result()
                now = time.monotonic()
                run.folder.log(
                    {
                        "step": finished.number,
                        "epoch": finished.epoch,
                        "learning_rate": finished.learning_rate,
                        **asdict(learned),
                        "seconds": round(now - began, 4),
                        "tokens_per_second": round(learned.tokens / max(now - began, 1e-9), 1),
                    }
                )
                began = now
                progress.advance(1, tokens=learned.tokens, note=f"loss {learned.loss:.4f}")
            loss = None
            if validation is not None:
                loss = validation.result()
                run.folder.log({"step": step.number, "epoch": step.epoch, "validation_loss": loss})
            if saves:
                _save(run, student, step.number, loss)


def _save(run: _Run, student: "Student", done: int, loss: float | None) -> None:
    final = done == len(run.steps)
    name = "final" if final else f"step-{done:06d}"
    saved = student.save(name, {"step": str(done)})
    best = [one.validation_loss for one in run.folder.checkpoints if one.best]
    run.folder.add(
        Checkpoint(
            name=name,
            step=done,
            state=saved.state,
            sampler=saved.sampler,
            validation_loss=loss,
            best=loss is None or not best or best[-1] is None or loss < best[-1],
            final=final,
        )
    )


def _training(folder: TrainingFolder) -> Training:
    config, metrics, checkpoints = folder.config or {}, folder.metrics, folder.checkpoints
    steps = [line for line in metrics if "loss" in line]
    final = checkpoints[-1].validation_loss
    return Training(
        path=folder.path,
        best=[checkpoint for checkpoint in checkpoints if checkpoint.best][-1],
        final_loss=steps[-1]["loss"] if final is None else final,
        steps=len(steps),
        rows=config["dataset"]["rows"]["train"],
        skipped=config["dataset"]["skipped"]["train"],
        tokens=sum(line["tokens"] for line in steps),
        seconds=round(sum(line["seconds"] for line in steps), 2),
    )


def _connect(
    student: str, source: Source, settings: TrainSettings, folder: TrainingFolder
) -> "Connection":
    """A release names the renderer that its teacher was read with; the same model keeps it."""
    from distill_datasets.connection import connect

    renderer = settings.renderer
    if renderer is None and source.manifest.get("teacher") == student:
        renderer = source.manifest.get("renderer")
    return connect(student, renderer=renderer, store=folder.store)


@contextmanager
def _session(connection: "Connection") -> Iterator[None]:
    """Ends the session with the server; a failed one is not waited for, it may be what failed."""
    try:
        yield
    except BaseException as error:
        connection.service.close("errored" if isinstance(error, Exception) else "interrupted")
        raise
    connection.service.close("success").result()


def _student(connection: "Connection", run: _Run) -> "Student":
    from distill_datasets.student import Student

    if run.folder.checkpoints:
        return Student.resume(connection, run.folder.checkpoints[-1].state)
    return Student.create(connection, rank=run.settings.rank, seed=run.settings.seed)


def _prepare(
    splits: dict[str, Split],
    connection: "Connection",
    settings: TrainSettings,
    folder: TrainingFolder,
) -> tuple[_Run, dict[str, Any]]:
    """Render the splits and plan the steps: the run, and what is worth recording of it."""
    longest = settings.max_length or min(connection.max_context or _LONGEST, _LONGEST)
    rendered = {role: split.render(connection, longest) for role, split in splits.items()}
    learning_rate = settings.learning_rate or default_learning_rate(connection)
    steps = plan_steps(len(rendered["train"]), settings, learning_rate)
    run = _Run(folder, settings, rendered["train"], rendered.get("validation"), steps)
    return run, {
        "base_model": connection.base_model,
        "renderer": connection.renderer_name,
        "identity": connection.identity,
        "learning_rate": learning_rate,
        "max_length": longest,
        "steps": len(steps),
        "dataset": {
            "splits": {role: split.name for role, split in splits.items()},
            "rows": {role: len(rows) for role, rows in rendered.items()},
            "skipped": {role: rows.skipped for role, rows in rendered.items()},
        },
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    """What decides the losses; a checkout that isn't installed has no version of its own."""
    names = ("distill-datasets", "tinker", "tinker-cookbook", "datasets", "torch")
    versions = {}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions

"""Train a student on a dataset: one flat loop that can be stopped and continued anywhere."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import ModelError, OutputError
from distill_datasets.progress import Progress
from distill_datasets.training.data import Rendered, Source, Split, locate, open_splits
from distill_datasets.training.folder import TrainingFolder
from distill_datasets.training.settings import TrainSettings
from distill_datasets.training.tracking import open_tracker, require_tracker
from distill_datasets.training.training_result import Training, read_result
from distill_datasets.training.training_run import Run, prepare_run

if TYPE_CHECKING:
    from distill_datasets.models.connection import Connection
    from distill_datasets.training.in_flight import InFlight
    from distill_datasets.training.objectives import TrainingTask
    from distill_datasets.training.predecessor import Predecessor
    from distill_datasets.training.validation import Validator

__all__ = ["TrainSettings", "Training", "train"]


def train(  # noqa: PLR0913 (what is taught to whom, how, and from where)
    dataset: str | Path,
    *,
    student: str,
    out: str | Path,
    settings: TrainSettings | None = None,
    resume: str | None = None,
    start: str | Path | None = None,
    only_new: bool = False,
    validators: "Sequence[Callable[[TrainingTask, Rendered], Validator]]" = (),
) -> Training:
    """Train a student on a release, a folder, a file, or a Hub dataset `name@revision`.

    Called again with the same `out`, it continues from the last checkpoint to the same losses,
    and does nothing where the training is finished. `resume` is a server's path of a training
    state, to continue in a new folder. `start` is a student whose weights to begin with, a
    training folder or a server's path of its state; with `only_new`, rows that it was trained on
    are left out. The best checkpoint is the one with the lowest validation loss, or as
    `settings.select` says, and without a validation split the last; `validators` measure more on
    that split. Raises `DatasetError`, `ModelError`, `AccessError`, `ServiceError`,
    `SettingsError` or `OutputError`, each with what to do.
    """
    from distill_datasets.training.predecessor import find_predecessor

    settings = settings or TrainSettings()
    _require_state(str(student), resume)
    require_tracker(settings.track)
    source = locate(dataset, settings.config)
    before = find_predecessor(start, str(student), only_new=only_new)
    settings = before.settled(settings) if before else settings
    _require_outside(Path(out), source)
    folder = TrainingFolder(out)
    request = _request(str(student), source, settings)
    request |= {"resumed": resume} if resume else {}
    request |= {"start": {"path": before.path, "only_new": only_new}} if before else {}
    with folder.locked():
        folder.require_same(request)
        if any(checkpoint.final for checkpoint in folder.checkpoints):
            return read_result(folder, settings)
        splits = open_splits(source, settings)
        if before and only_new:
            splits["train"] = splits["train"].without(before.learned)
        connection = _connect(str(student), source, settings, folder)
        with _session(connection), _resumable(out):
            run, found = prepare_run(splits, connection, source, settings, folder)
            config = {**request, **found, "dataset": {**request["dataset"], **found["dataset"]}}
            done = _start(run, connection, config, splits["train"], before)
            _learn(run, _task(run, connection, before), done, validators)
        folder.draw()
        return read_result(folder, settings)


def _learn(
    run: Run,
    task: "TrainingTask",
    start: int,
    validators: "Sequence[Callable[[TrainingTask, Rendered], Validator]]",
) -> None:
    """The loop. Batches are always queued behind the one that is being learned."""
    from distill_datasets.training.objectives import open_objective

    steps = run.steps[start:]
    with closing(open_objective(task)) as objective, _flight(run, task, validators) as flight:
        if start and run.schedule.measures(start) and not run.folder.measured(start):
            flight.save(run.steps[start - 1])
        objective.prepare(steps[0])
        for step, coming in zip_longest(steps, steps[1:]):
            if flight.exhausted():
                break
            # After a save a continued run has nothing prepared: nor must this one.
            if coming and not run.schedule.saves(step.number):
                objective.prepare(coming)
            flight.learn(step, objective.submit(step))
            if run.schedule.saves(step.number):
                flight.save(step)
            flight.settle(run.settings.ahead)
        flight.settle_all()
        flight.close()


@contextmanager
def _flight(
    run: Run,
    task: "TrainingTask",
    validators: "Sequence[Callable[[TrainingTask, Rendered], Validator]]",
) -> "Iterator[InFlight]":
    from distill_datasets.training.checkpoints import describe
    from distill_datasets.training.in_flight import Desk, InFlight
    from distill_datasets.training.validation import open_validators

    config = run.folder.config or {}
    measures = open_validators(task, run.validation, validators)
    done = run.folder.checkpoints[-1].step if run.folder.checkpoints else 0
    with (
        closing(open_tracker(run.settings.track, run.folder.path, config)) as tracker,
        Progress("train", len(run.steps), unit="steps", start=done) as progress,
    ):
        progress.advance(0, note=f"the loss weighs {config['normalization']}")
        desk = Desk(
            student=task.student,
            folder=run.folder,
            settings=run.settings,
            schedule=run.schedule,
            validators=measures,
            described=describe(config),
            tracker=tracker,
            progress=progress,
        )
        yield InFlight(desk)


def _start(
    run: Run,
    connection: "Connection",
    config: dict[str, Any],
    split: Split,
    before: "Predecessor | None",
) -> int:
    """Write which rows are learned and the configuration; the steps that are done already."""
    from distill_datasets.training.checkpoints import read_progress
    from distill_datasets.training.predecessor import write_learned

    run.folder.require_same(config)
    if run.folder.config is None:
        write_learned(run.folder.path, run.keys(split), before)
    if "resumed" not in config or run.folder.config is not None:
        begun = (run.folder.config or {}).get("begun")
        return run.folder.start({**config, **({"begun": begun} if begun else {})})
    selection, checkpoints = read_progress(connection, config["resumed"], config)
    return run.folder.start({**config, "begun": asdict(selection)}, checkpoints)


def _request(student: str, source: Source, settings: TrainSettings) -> dict[str, Any]:
    """What is known without asking a server, as the folder's configuration begins."""
    return {
        "student": student,
        "settings": asdict(settings),
        "dataset": {"path": source.reference, "revision": source.revision, "files": source.files},
    }


def _require_outside(out: Path, source: Source) -> None:
    if out.resolve().is_relative_to(source.path.resolve()):
        raise OutputError(
            f"{str(out)!r} lies inside the dataset, which it would change: choose another --out."
        )


def _require_state(student: str, resume: str | None) -> None:
    if student.startswith("tinker://"):
        raise ModelError(
            f"{student!r} is already trained: expected a base model to train, for example "
            "'tinker:<base model>'. To go on with its training, name that base model and give "
            "the path of its state, tinker://<run>/weights/<name>, to --resume."
        )
    if resume is not None:
        from distill_datasets.training.checkpoints import require_state

        require_state(resume)


def _connect(
    student: str, source: Source, settings: TrainSettings, folder: TrainingFolder
) -> "Connection":
    """A release names the renderer that its teacher was read with; the same model keeps it."""
    from distill_datasets.models.connection import connect

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


@contextmanager
def _resumable(out: str | Path) -> Iterator[None]:
    """Tells who interrupts a training how to go on."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f"Train again with out={str(out)!r} to continue.")
        raise


def _task(run: Run, connection: "Connection", before: "Predecessor | None") -> "TrainingTask":
    """Opens the student: new, with another's weights, or as the last checkpoint left it."""
    from distill_datasets.training.checkpoints import describe
    from distill_datasets.training.objectives import TrainingTask
    from distill_datasets.training.student import Adapted, Student

    settings, metadata = run.settings, describe(run.folder.config or {})
    if run.folder.checkpoints:
        student = Student.resume(connection, run.folder.checkpoints[-1].state, metadata)
    elif before:
        before.bring(run.folder.store)
        student = Student.continue_from(connection, before.path, metadata)
    else:
        adapted = Adapted(
            rank=settings.rank,
            seed=settings.seed if settings.lora_seed is None else settings.lora_seed,
            attention=settings.train_attention,
            mlp=settings.train_mlp,
            unembed=settings.train_unembed,
        )
        student = Student.create(connection, adapted, metadata)
    return TrainingTask(student, run.train, run.source, settings, run.folder.path)

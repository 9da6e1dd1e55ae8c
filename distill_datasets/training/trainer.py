"""Train a student on a dataset: one flat loop that can be stopped and continued anywhere."""

import math
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distill_datasets.errors import ModelError, OutputError, SettingsError
from distill_datasets.files import one_writer, write_file
from distill_datasets.progress import Progress, interruptible
from distill_datasets.training import tell
from distill_datasets.training.checkpoints import (
    CheckpointRetention,
    SavedCheckpoint,
    TrainingFolder,
    TrainingResult,
    describe,
    describe_progress,
    installed_versions,
    read_progress,
)
from distill_datasets.training.data import (
    DatasetSource,
    DatasetSplit,
    locate,
    open_splits,
    require_turns,
)
from distill_datasets.training.plots import open_tracker, require_tracker, sparkline
from distill_datasets.training.schedule import Schedule, Step, TrainingPlan, plan_training
from distill_datasets.training.settings import VALIDATION_LOSS, TrainSettings, Turns

if TYPE_CHECKING:
    from distill_datasets.models.tinker import Connection
    from distill_datasets.training.objectives import Objective, TrainingTask
    from distill_datasets.training.student import Learned, Predecessor, Saved, Student, Submitted
    from distill_datasets.training.validation import PendingScores

__all__ = ["TrainSettings", "Trainer", "TrainingResult", "require_settings", "train"]

_SHOWN = 64  # of the last losses in the live line


@interruptible
def train(  # noqa: PLR0913 (what is taught to whom, how, and from where)
    dataset: str | Path,
    *,
    out: str | Path,
    student: str | None = None,
    settings: TrainSettings | None = None,
    resume: str | None = None,
    start: str | Path | None = None,
    only_new: bool = False,
) -> TrainingResult:
    """Train a student on a release, a folder, a file, or a Hub dataset `name@revision`.

    `student` is a model reference; without it the model that `start` or `resume` was trained from,
    or that of the release's teacher, where it can be trained.
    Called again with the same `out`, it continues from the last checkpoint to the same losses,
    and does nothing where the training is finished. `resume` is a server's path of a training
    state, to continue in a new folder. `start` is a student whose weights to begin with, a
    training folder or a server's path of its state; with `only_new`, rows that it was trained on
    are left out. The best checkpoint is the one with the lowest validation loss, or as
    `settings.select` says, and without a validation split the last.
    Raises `DatasetError`, `ModelError`, `ServiceError`, `SettingsError`, `OutputError`.

        trained = train("runs/demo/release", student="pocket", out="runs/student")
    """
    from distill_datasets.training.student import choose_student, find_predecessor

    settings = settings or TrainSettings()
    require_tracker(settings.track)
    _require_one_beginning(student, resume, start, only_new=only_new)
    source = locate(dataset, settings.config)
    student = student or choose_student(source, start or resume)
    settings = replace(settings, config=source.config)
    before = find_predecessor(start, student, renderer=settings.renderer) if start else None
    settings = before.settled(settings) if before else settings
    folder = _open_folder(Path(out), source)
    # What is known without asking a server, as the folder's configuration begins.
    request = {
        "student": student,
        "settings": asdict(settings),
        "dataset": {"path": source.reference, "revision": source.revision, "files": source.files},
        **({"resumed": resume} if resume else {}),
        **({"start": {"path": before.path, "only_new": only_new}} if before else {}),
    }
    with one_writer(folder.path, "training"):
        folder.require_same(request)
        if not folder.finished:
            _train(folder, request, source, settings, before)
        return folder.result()


def _train(
    folder: TrainingFolder,
    request: Mapping[str, Any],
    source: DatasetSource,
    settings: TrainSettings,
    before: "Predecessor | None",
) -> None:
    """To the end, from wherever the folder's training stands."""
    from distill_datasets.models.references import connect

    only_new = before if request.get("start", {}).get("only_new") else None
    splits = _open_splits(source, settings, only_new)
    renderer = settings.renderer
    if renderer is None and source.manifest.get("teacher") == request["student"]:
        renderer = source.manifest.get("renderer")  # that its teacher was read with
    connection = connect(request["student"], renderer=renderer, store=folder.store)
    with _session(connection, folder):
        _require_validation("validation" in splits, repr(source.reference), settings)
        plan = plan_training(splits, connection, settings, folder.config)
        if folder.config is None:
            _write_learned(folder, splits, plan, before)
        config = {
            **request,
            **plan.found,
            "dataset": {**request["dataset"], **plan.found["dataset"]},
            "versions": installed_versions(),
        }
        student = _open_student(folder, config, connection, before)
        Trainer(student, plan, source, folder, settings).fit()
    folder.draw()


def _write_learned(
    folder: TrainingFolder,
    splits: Mapping[str, DatasetSplit],
    plan: TrainingPlan,
    before: "Predecessor | None",
) -> None:
    """Write down which rows are learned, and were by a predecessor; says how many of them teach
    nothing, or are measured too.
    """
    import numpy as np

    from distill_datasets.training.student import LEARNED

    keys, blank = splits["train"].keys_and_blank()
    learned = every = keys[plan.chosen]
    if before and before.folder and (before.folder / LEARNED).is_file():
        every = np.concatenate([learned, np.load(before.folder / LEARNED)])
    content = BytesIO()
    np.save(content, np.unique(every))
    write_file(folder.path / LEARNED, content.getvalue())
    if blank:
        tell(
            f"warning: {blank:,} of {len(keys):,} training rows have a blank response, "
            "which teaches to say nothing: leave them out (`dataset.filter`)."
        )
    held_out = splits["validation"].keys if "validation" in splits else ()
    if seen := int(np.isin(held_out, learned).sum()):
        tell(
            f"{seen:,} of {len(held_out):,} validation rows are "
            "training rows too: what is measured on them says little of new queries."
        )


def require_settings(
    student: str,
    settings: TrainSettings,
    *,
    splits: Collection[str] | None = None,
    turns: Turns = "all",
    store: Path | None = None,
) -> None:
    """Refuse what `train` would refuse, before a dataset is paid for.

    Checks the student, its rank, context and objective on its server, and the tracker; with the
    names of the `splits` that the dataset will have, also what is measured. `turns` are those that
    its recipe answers, `store` is where a local server keeps checkpoints. Raises what `train`
    raises.
    """
    from distill_datasets.models.references import connect
    from distill_datasets.training.student import require_trainable

    _require_one_beginning(student)
    require_tracker(settings.track)
    require_turns(settings.turns, turns, "The dataset")
    if splits is not None:
        _require_validation(settings.validation_split in splits, "The dataset", settings)
    require_trainable(connect(student, renderer=settings.renderer, store=store), settings)


@dataclass(frozen=True)
class _SubmittedSave:
    """A save on its way to the server, and what is measured of it.

    Without a `save` it is the untrained student that is measured.
    """

    step: Step
    save: "Submitted[Saved] | None"
    scores: "Sequence[PendingScores]"

    @property
    def ready(self) -> bool:
        """Whether what runs beside the training has ended."""
        return all(one.done() for one in self.scores if isinstance(one, Future))


class Trainer:
    """Fits a student to a dataset, and saves and measures it on the way.

    Several steps are queued on the server while one is learned. What the server has confirmed is
    written down in the order in which it was submitted.
    """

    def __init__(
        self,
        student: "Student",
        plan: TrainingPlan,
        source: DatasetSource,
        folder: TrainingFolder,
        settings: TrainSettings,
    ) -> None:
        """Goes on from the last checkpoint in the folder, whose weights the student has."""
        from distill_datasets.training.objectives import TrainingTask

        config = folder.config or {}
        self.student, self.plan, self.folder, self.settings = student, plan, folder, settings
        self._new = "start" not in config
        warm = settings.objective.warm_steps(len(plan.steps)) if self._new else 0
        self.task = TrainingTask(
            student, plan.train, source, settings, folder.path, warm, self._say
        )
        every = plan.measured.every if plan.measured else None
        self.schedule = Schedule(len(plan.steps), settings, every)
        self.selection = folder.selection
        self._retention = CheckpointRetention(student.connection, settings.ttl_seconds)
        self._described = describe(config)
        self._learning: deque[tuple[Step, Submitted[Learned]]] = deque()
        self._saves: deque[_SubmittedSave] = deque()
        self._losses: deque[float] = deque(maxlen=_SHOWN)
        self._tokens = sum(line.get("tokens", 0) for line in folder.metrics)

    def fit(self) -> None:
        """Learn all steps that are left, or until the measurements don't get better any more."""
        from distill_datasets.training.validation import open_validators

        checkpoints, config = self.folder.checkpoints, self.folder.config or {}
        done = checkpoints[-1].step if checkpoints else 0
        steps = self.plan.steps[done:]
        if not steps:
            return
        with ExitStack() as opened:
            objective = opened.enter_context(closing(_open_objective(self.task)))
            self._validators = open_validators(self.task, self.plan.validation, self.plan.measured)
            tracker = open_tracker(self.settings.track, self.folder.path, config)
            self._track = opened.enter_context(tracker)
            shown = Progress("train", self.schedule.total, unit="steps", start=done)
            self._progress = opened.enter_context(shown)
            self._say(f"the loss weighs {config['normalization']}")
            self._began = time.monotonic()
            if not self.folder.measured(done):
                self._measure_first(done)
            objective.prepare(steps[0])
            for step, coming in zip_longest(steps, steps[1:]):
                if self.settings.patience is not None:
                    self._confirm(saves=0)
                if self._stopped:
                    break
                # After a save a continued run has nothing prepared: nor must this one.
                if coming and not self.schedule.saves(step.number):
                    objective.prepare(coming)
                self._learning.append((step, objective.submit(step)))
                if self.schedule.saves(step.number):
                    self.checkpoint(step)
                self._confirm(steps=self.settings.ahead)
            self._confirm(steps=0, saves=0)
            self._retention.close()

    def checkpoint(self, step: Step) -> None:
        """Save the weights as the steps submitted so far leave them, and measure them where that
        is due. What the save says of itself holds all measurements of earlier ones.
        """
        self._confirm(saves=0)
        if self._stopped:  # what was learned since then is not kept
            return
        done = step.number
        final = done == self.schedule.total
        measured = self.schedule.measures(done)
        name = "final" if final else f"step-{done:06d}"
        progress = describe_progress(done, self.selection, self.folder.best)
        saved = self.student.save(
            name,
            {**self._described, **progress},
            sampler=measured or self.schedule.keeps(done),
            ttl_seconds=None if final else self._retention.ttl,
        )
        measuring = self._validators if measured else []
        scores = [validator.submit(self.student, saved) for validator in measuring]
        self._saves.append(_SubmittedSave(step, saved, scores))

    def _measure_first(self, done: int) -> None:
        """Measure the student before its next step: as it was saved after step `done`, or before
        the very first step.
        """
        if done and self.schedule.measures(done):
            self.checkpoint(self.plan.steps[done - 1])
        elif not done and self._validators:
            # A new student answers as its base; weights that training starts from can't be sampled
            # before they are saved.
            measuring = self._validators if self._new else self._validators[:1]
            scores = [validator.submit(self.student, None) for validator in measuring]
            self._saves.append(_SubmittedSave(Step(0, 0, (), 0.0), None, scores))

    def _say(self, note: str) -> None:
        self._progress.advance(0, note=note)

    @property
    def _stopped(self) -> bool:
        return self.selection.collapsed or self.selection.exhausted(self.settings.patience)

    def _confirm(self, *, steps: float = math.inf, saves: float = math.inf) -> None:
        """Wait until at most so many steps and saves are submitted and not confirmed.

        Steps don't wait for a save before them whose answers are still being sampled.
        """
        while (too_many := len(self._saves) > saves) or len(self._learning) > steps:
            learned = self._learning[0][0].number if self._learning else math.inf
            save = self._saves[0] if self._saves else None
            if save and save.step.number < learned and (too_many or save.ready):
                self._confirm_save(self._saves.popleft())
            else:
                self._confirm_step(*self._learning.popleft())

    def _confirm_step(self, step: Step, pending: "Submitted[Learned]") -> None:
        """Write down what a step has learned, and show it."""
        learned = pending.result()
        now = time.monotonic()
        seconds, self._began = now - self._began, now
        self._tokens += learned.tokens
        price = self.settings.price_per_million
        line = {
            "loss": learned.loss,
            "nll": learned.nll,
            "bits_per_byte": learned.bits_per_byte,
            "learning_rate": step.learning_rate,
            "gradient_norm": learned.gradient_norm,
            "response_tokens": learned.response_tokens,
            "tokens": learned.tokens,
            "tokens_per_second": round(learned.tokens / max(seconds, 1e-9), 1),
            "seconds": round(seconds, 4),
            **learned.extra,
            "spent": None if price is None else round(self._tokens * price / 1e6, 6),
        }
        self._log(step, {name: value for name, value in line.items() if value is not None})
        self._losses.append(learned.loss)
        note = f"loss {learned.loss:.4f} {sparkline(self._losses)}"
        self._progress.advance(1, tokens=learned.tokens, note=note)

    def _confirm_save(self, submitted: _SubmittedSave) -> None:
        """Write down what was measured of the validation rows, and the checkpoint."""
        done = submitted.step.number
        scores = {name: v for one in submitted.scores for name, v in one.result().items()}
        if scores:
            self._log(submitted.step, scores)
            self.selection = self.selection.measured(done, scores)
        if submitted.save is None:
            return
        saved, kept = submitted.save.result(), self.schedule.keeps(done)
        final = done == self.schedule.total or self._stopped
        # Without any measurement that speaks for one, the last weights are the best there are.
        last = final and self.selection.best is None and not self.selection.collapsed
        best = self.selection.best_step == done if self._validators else kept
        checkpoint = SavedCheckpoint(
            **asdict(saved),
            step=done,
            validation_loss=scores.get(VALIDATION_LOSS),
            best=last or best,
            final=final,
            kept=kept,
            scores=scores,
        )
        before = self.folder.best
        if final:
            # Once this is written down, nobody comes back to it.
            self._retention.keep(
                [checkpoint, *([before] if before and not checkpoint.best else [])]
            )
        superseded = self.folder.add(checkpoint)
        if checkpoint.best:
            self._retention.replace_best([before] if before and before.kept else [], checkpoint)
        self._retention.delete(superseded)

    def _log(self, step: Step, values: Mapping[str, Any]) -> None:
        self.folder.log({"step": step.number, "epoch": step.epoch, **values})
        self._track(step.number, values)


def _open_student(
    folder: TrainingFolder,
    config: Mapping[str, Any],
    connection: "Connection",
    before: "Predecessor | None",
) -> "Student":
    """The student as the newest checkpoint left it that is there, or at its start.

    Writes the configuration, and forgets what was learned after that checkpoint.
    """
    from distill_datasets.training.student import Student

    folder.require_same(config)
    written, checkpoints, metadata = folder.config, folder.checkpoints, describe(config)
    begun = (written or {}).get("begun")
    if written is None:
        checkpoints = []
        if "resumed" in config:
            selection, checkpoints = read_progress(connection, config["resumed"], config)
            begun = asdict(selection)
    while checkpoints:
        newest = checkpoints[-1]
        try:
            student = Student.resume(connection, newest.state, metadata)
            break
        except ModelError as error:
            if newest.name == "resumed":
                raise
            checkpoints.pop()
            tell(
                f"the checkpoint of step {newest.step} can't be loaded, training goes back "
                f"to step {checkpoints[-1].step if checkpoints else 0}: {error}"
            )
    else:
        if before:
            before.bring(folder.store)
            student = Student.resume(connection, before.path, metadata, optimizer=False)
        else:
            student = Student.create(connection, _lora(config["settings"]), metadata)
    folder.start({**config, **({"begun": begun} if begun else {})}, checkpoints)
    return student


def _lora(settings: Mapping[str, Any]) -> Any:
    import tinker

    seed = settings["lora_seed"]
    return tinker.LoraConfig(
        rank=settings["rank"],
        seed=settings["seed"] if seed is None else seed,
        train_attn=settings["train_attention"],
        train_mlp=settings["train_mlp"],
        train_unembed=settings["train_unembed"],
    )


def _open_objective(task: "TrainingTask") -> "Objective":
    """The objective that the settings name; raises `DatasetError` or `ModelError` where a teacher
    that it asks again can't be asked.
    """
    if task.settings.objective.name == "soft":
        from distill_datasets.training.soft_labels import SoftObjective

        return SoftObjective(task)
    if task.settings.objective.name == "on_policy":
        from distill_datasets.training.on_policy import OnPolicyObjective

        return OnPolicyObjective(task)
    from distill_datasets.training.objectives import SupervisedObjective

    return SupervisedObjective(task)


def _open_splits(
    source: DatasetSource, settings: TrainSettings, before: "Predecessor | None"
) -> dict[str, DatasetSplit]:
    """The splits, without rows that `before` has learned; says what the release warns of."""
    require_turns(settings.turns, source.turns, repr(source.reference))
    splits = open_splits(source, settings)
    if settings.objective.name != "sft":
        splits["train"], every = splits["train"].own_rows(), len(splits["train"].rows)
        if left := every - len(splits["train"].rows):
            tell(
                f"{left:,} of {every:,} rows are of the recipe's mix, and left out: the "
                f"objective {settings.objective.name!r} asks the teacher, who never saw them."
            )
    if before:
        splits["train"] = splits["train"].without(before.learned)
    if "validation" in splits:
        splits["validation"] = splits["validation"].at_most(settings.validation_rows)
    warnings = source.manifest.get("warnings")
    for warning in warnings if isinstance(warnings, list) else ():
        text = "".join(one if one.isprintable() else " " for one in str(warning))
        tell(f"{source.reference} warns: {text}")
    return splits


def _open_folder(out: Path, source: DatasetSource) -> TrainingFolder:
    if out.resolve().is_relative_to(source.path.resolve()):
        raise OutputError(
            f"{str(out)!r} lies inside the dataset, which it would change: choose another --out."
        )
    return TrainingFolder(out)


def _require_one_beginning(
    student: str | None,
    resume: str | None = None,
    start: str | Path | None = None,
    *,
    only_new: bool = False,
) -> None:
    if student and student.startswith("tinker://"):
        raise ModelError(
            f"{student!r} is already trained: expected a base model to train, for example "
            "'tinker:<base model>'. To go on with its training, name that base model and give "
            "the path of its state, tinker://<run>/weights/<name>, to --resume."
        )
    if only_new and not start:
        raise SettingsError("only_new needs a student to start from: name it as start (--from).")
    if resume and start:
        raise SettingsError(
            "resume (--resume) continues a training, and start (--from) begins another: name one."
        )
    if resume is not None:
        from distill_datasets.training.student import require_state

        require_state(resume)


def _require_validation(there: bool, dataset: str, settings: TrainSettings) -> None:
    if not there and (settings.patience or settings.select != VALIDATION_LOSS):
        raise SettingsError(
            f"patience and select need validation rows: {dataset} has no split "
            f"{settings.validation_split!r}. Name another, or leave both out."
        )


@contextmanager
def _session(connection: "Connection", folder: TrainingFolder) -> Iterator[None]:
    """Ends the session with the server; a failed one is not waited for, it may be what failed."""
    from distill_datasets.models.tinker import try_to

    ending: Literal["success", "errored", "interrupted"] = "errored"
    try:
        yield
        ending = "success"
    except KeyboardInterrupt as interrupt:
        ending = "interrupted"
        step = saved[-1].step if (saved := folder.checkpoints) else 0
        interrupt.add_note(
            f"Train again with out={str(folder.path)!r}: it goes on after step {step}."
        )
        raise
    finally:
        closed = connection.service.close(ending)
        if ending == "success":
            try_to(closed, "the session of the training stays open on the server", timeout=60)

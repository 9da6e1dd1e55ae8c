"""A grid of trainings on one dataset: which settings are worth their time and size."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.drawing import whisker
from distill_datasets.errors import ModelError, SettingsError, nearest
from distill_datasets.files import one_writer, write_file
from distill_datasets.progress import interruptible
from distill_datasets.tables import aligned, html_card, html_plot, html_table
from distill_datasets.training import tell

if TYPE_CHECKING:
    from pandas import DataFrame

    from distill_datasets.training.trainer import TrainingResult, TrainSettings


@dataclass(frozen=True)
class SweepTrial:
    """One cell of the grid.

    `loss` is the best checkpoint's on the validation rows, per response token, and without those
    the last batch's; `parameters` are the adapter's, None where the server doesn't say. `error`
    says why a training could not be finished, for example because it diverged.
    """

    values: Mapping[str, Any]
    folder: str
    loss: float | None = None
    best_step: int | None = None
    steps: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    parameters: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Sweep:
    """All trials, in the grid's order; `path` holds sweep.json, sweep.png and their folders."""

    path: Path
    trials: Sequence[SweepTrial]

    @property
    def best(self) -> SweepTrial:
        """The trial with the lowest loss; raises `ModelError` where none was finished."""
        finished = [trial for trial in self.trials if trial.loss is not None]
        if not finished:
            raise ModelError(
                f"No training of {str(self.path)!r} was finished; the first failed with: "
                f"{self.trials[0].error}"
            )
        return min(finished, key=lambda trial: trial.loss or 0.0)

    def to_pandas(self) -> "DataFrame":
        """A row a trial."""
        from pandas import DataFrame

        facts = [{**asdict(trial), **trial.values} for trial in self.trials]
        return DataFrame(facts).drop(columns="values")

    def _repr_html_(self) -> str:
        losses = [trial.loss for trial in self.trials if trial.loss is not None]
        best = self.best if losses else None
        bounds = min([0.0, *losses]), max([1e-9, *losses])
        names = list(self.trials[0].values) if self.trials else []
        lines = [
            [
                *trial.values.values(),
                trial.loss,
                "" if trial.loss is None else html_plot(whisker(trial.loss, bounds=bounds)),
                trial.best_step,
                trial.seconds,
                trial.parameters,
                trial.error or ("best" if trial is best else ""),
            ]
            for trial in self.trials
        ]
        head = [*names, "loss", "0 to the highest", "best step", "seconds", "parameters", ""]
        said = f"Best: {best.folder}" if best else "No training was finished"
        return html_card(f"{said}, of {len(self.trials)} in {self.path}", html_table(lines, head))

    def table(self) -> str:
        """A line a trial, the best one marked."""
        best = self.best
        lines = [[*best.values, "loss", "best step", "seconds", "tokens", "parameters", ""]]
        for trial in self.trials:
            mark = "best" if trial is best else trial.error or ""
            found = (trial.loss, trial.best_step, trial.seconds, trial.tokens, trial.parameters)
            lines.append([*map(_cell, (*trial.values.values(), *found)), mark])
        return aligned(lines, right=True)


@interruptible
def sweep(
    dataset: str | Path,
    *,
    out: str | Path,
    grid: Mapping[str, Sequence[Any]],
    student: str | None = None,
    settings: "TrainSettings | None" = None,
) -> Sweep:
    """Train `student` once for every combination of the grid's values, one after another.

    The grid's keys are fields of `TrainSettings`; the other settings are shared. Each training
    has its folder in `out`, so that a sweep that was stopped goes on where it was, and a larger
    grid trains only what is new. A training that diverges is a trial with an error. Raises
    `SettingsError` for a key that is none, before anything is trained, and what `train` raises.
    """
    from distill_datasets.models.references import disconnect
    from distill_datasets.training.trainer import TrainSettings, train

    shared = settings or TrainSettings()
    cells = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    planned = [(values, _settings(shared, values)) for values in cells]
    if not cells or not grid:
        raise SettingsError("The grid is empty: name values, for example rank=[8, 16, 32].")
    path = Path(out)
    trials = []
    with one_writer(path, "sweep"):
        for values, wanted in planned:
            folder = path / "_".join(f"{name}-{value}" for name, value in values.items())
            try:
                trained = train(dataset, student=student, out=folder, settings=wanted)
            except ModelError as error:
                if not (folder / "metrics.jsonl").is_file():
                    raise  # nothing was learned yet: the next combination would fail alike
                trials.append(SweepTrial(values, folder.name, error=str(error)))
            else:
                trials.append(_trial(values, trained))
                if len(trials) == 1 and trained.best.validation_loss is None:
                    tell(
                        "there are no validation rows: the loss of the last batch is compared, "
                        "which says little of new queries."
                    )
            finally:
                disconnect(folder / "checkpoints")
            text = json.dumps([asdict(trial) for trial in trials], indent=2, ensure_ascii=False)
            write_file(path / "sweep.json", text + "\n")
        made = Sweep(path, trials)
        _draw(made)
    return made


def _settings(shared: "TrainSettings", values: Mapping[str, Any]) -> "TrainSettings":
    known = [field.name for field in fields(shared)]
    for name in values:
        if name not in known:
            hint = nearest(name, known)
            raise SettingsError(f"{name!r} is no training setting.{hint} Known: {known}")
    return replace(shared, **values)


def _trial(values: Mapping[str, Any], trained: "TrainingResult") -> SweepTrial:
    best = trained.best
    return SweepTrial(
        values,
        trained.path.name,
        loss=trained.final_loss if best.validation_loss is None else best.validation_loss,
        best_step=best.step,
        steps=trained.steps,
        seconds=trained.seconds,
        tokens=trained.tokens,
        parameters=_parameters(trained.path),
    )


def _parameters(training: Path) -> int | None:
    """Counted in a local server's checkpoint; for hosted models the cookbook's table knows."""
    from safetensors import safe_open

    config = json.loads((training / "config.json").read_text(encoding="utf-8"))
    saved = sorted((training / "checkpoints").rglob("adapter_model.safetensors"))
    if saved:
        with safe_open(str(saved[0]), "numpy") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
            return sum(map(math.prod, shapes))
    from tinker_cookbook.exceptions import ConfigurationError
    from tinker_cookbook.hyperparam_utils import get_lora_param_count

    try:
        return int(get_lora_param_count(config["base_model"], config["settings"]["rank"]))
    except ConfigurationError:
        return None


def _draw(made: Sweep) -> None:
    """Loss against each setting that varies, time and size; logarithmic where it helps."""
    from matplotlib.figure import Figure

    finished = [trial for trial in made.trials if trial.loss is not None]
    axes: dict[str, list[Any]] = {
        name: [trial.values[name] for trial in finished]
        for name, value in made.best.values.items()
        if _number(value)
    }
    axes["seconds"] = [trial.seconds for trial in finished]
    axes["trainable parameters"] = [trial.parameters for trial in finished]
    shown = {name: values for name, values in axes.items() if None not in values}
    figure = Figure(figsize=(4 * len(shown), 3.5), layout="constrained")
    for place, (name, values) in zip(
        figure.subplots(1, len(shown), squeeze=False, sharey=True)[0], shown.items(), strict=True
    ):
        place.scatter(values, [trial.loss for trial in finished])
        place.set(xlabel=name.replace("_", " "), ylabel="loss per response token")
        if min(values, default=0) > 0 and max(values) > 4 * min(values):
            place.set_xscale("log")
    drawing = BytesIO()
    figure.savefig(drawing, dpi=150)
    write_file(made.path / "sweep.png", drawing.getvalue())


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if not _number(value):
        return "-" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"

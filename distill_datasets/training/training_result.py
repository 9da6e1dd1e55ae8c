"""What came out of a training."""

from dataclasses import dataclass
from pathlib import Path

from distill_datasets.training.folder import Checkpoint, TrainingFolder
from distill_datasets.training.selection import why_it_ended
from distill_datasets.training.settings import TrainSettings


@dataclass(frozen=True)
class Training:
    """A finished training: `path` can be sampled wherever a model is named.

    `final_loss` is per response token, after the last step on the validation rows, or without
    those the last batch's; `best` may be of an earlier step. `why` says what ended it. `rows` and
    `skipped` count the training split, `tokens` everything that was learned from;
    `normalization` says what the loss weighs alike.
    """

    path: Path
    best: Checkpoint
    final: Checkpoint
    final_loss: float
    steps: int
    rows: int
    skipped: int
    tokens: int
    seconds: float
    why: str
    normalization: str

    @property
    def verdict(self) -> str:
        """Which weights won, and by what."""
        if not self.final.scores:
            return f"step {self.best.step} is the last; there are no validation rows to choose by"
        if self.best.step == self.final.step:
            return f"the final weights won ({_scores(self.final)})"
        return (
            f"step {self.best.step} won ({_scores(self.best)}); the final weights, of step "
            f"{self.final.step}, have {_scores(self.final)}"
        )


def read_result(folder: TrainingFolder, settings: TrainSettings) -> Training:
    """The result that a finished training's files hold."""
    config, metrics, checkpoints = folder.config or {}, folder.metrics, folder.checkpoints
    steps, final = [line for line in metrics if "loss" in line], checkpoints[-1]
    selection = folder.selection(settings)
    return Training(
        path=folder.path,
        best=[checkpoint for checkpoint in checkpoints if checkpoint.best][-1],
        final=final,
        final_loss=steps[-1]["loss"] if final.validation_loss is None else final.validation_loss,
        steps=final.step,
        rows=config["dataset"]["rows"]["train"],
        skipped=config["dataset"]["skipped"]["train"],
        tokens=sum(line["tokens"] for line in steps),
        seconds=round(sum(line["seconds"] for line in steps), 2),
        # A folder without the words has the setting.
        normalization=config.get("normalization", config["settings"]["normalization"]),
        why=why_it_ended(selection, settings, final.step, config.get("steps", final.step)),
    )


def _scores(checkpoint: Checkpoint) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in checkpoint.scores.items())

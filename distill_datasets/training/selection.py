"""Which weights are the best so far, and whether it still gets better."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from distill_datasets.training.settings import TrainSettings

VALIDATION_LOSS = "validation_loss"


@dataclass(frozen=True)
class Selection:
    """The measurements up to a step, as far as a decision needs them.

    `mark` is the last value that was better than the mark before by `min_improvement`; `stale`
    counts the measurements since.
    """

    metric: str = VALIDATION_LOSS
    min_improvement: float = 0.0
    best: float | None = None
    best_step: int = 0
    mark: float | None = None
    mark_step: int = 0
    stale: int = 0

    @classmethod
    def of(
        cls,
        settings: TrainSettings,
        metrics: Iterable[Mapping[str, Any]],
        begun: "Selection | None" = None,
    ) -> "Selection":
        """What the lines of a metrics.jsonl say, after what was known when they began."""
        selection = begun or cls(settings.select, settings.min_improvement)
        for line in metrics:
            if selection.metric in line:
                selection = selection.after(line["step"], line[selection.metric])
        return selection

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


def why_it_ended(selection: Selection, settings: TrainSettings, done: int, planned: int) -> str:
    """The reason, in words."""
    if done < planned and selection.exhausted(settings.patience):
        least = f" of {settings.min_improvement:g}" if settings.min_improvement else ""
        times = "validation" if settings.patience == 1 else "validations"
        return (
            f"no improvement{least} in {settings.patience} {times} "
            f"(best at step {selection.best_step})"
        )
    return f"all {planned} steps done"

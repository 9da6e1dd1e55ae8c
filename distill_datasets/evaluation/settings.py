"""What `measure` takes beside the release and the three systems."""

from dataclasses import dataclass
from typing import Any

from distill_datasets.settings import check, setting


@dataclass(frozen=True)
class MeasureSettings:
    """Which rows are measured, how fast, and with which metrics.

    `MeasureSettings(limit=50, metrics=("metrics.py:Rouge",))` measures the first 50 queries of the
    test split with a metric of your own besides the recipe's. Such a metric is a function of two
    lists of texts, predictions and references, that returns a number or numbers by name; an
    `evaluate.Metric`; or `path.py:Name` of either, which is run as your own code. No answer is an
    empty text to it.
    """

    split: str = setting("test", "the held-out split", flag=False)
    limit: int | None = setting(None, "measure only the first N queries", at_least=1, unset="all")
    concurrency: int = setting(256, "most requests at once to each system", at_least=1)
    metrics: tuple[Any, ...] = setting(
        (), "a metric of your own, as path.py:Name; may be given several times", flag="metric"
    )

    def __post_init__(self) -> None:
        """Raises `SettingsError` for a value out of its range."""
        check(self)

"""What `measure` takes beside the release and the models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distill_datasets.errors import SettingsError
from distill_datasets.settings import check, setting

SystemName = Literal[
    "base", "base+short", "base+prompt", "teacher", "teacher-again", "student", "student+prompt"
]


@dataclass(frozen=True)
class MeasureSettings:
    """Which rows of which systems are measured, how fast, and with which metrics.

    `MeasureSettings(limit=50, metrics=("metrics.py:Rouge",))` measures the first 50 queries of the
    test split with a metric of your own besides the recipe's. Such a metric is a function of two
    lists of texts, predictions and references, that returns a number or numbers by name; an
    `evaluate.Metric`; or `path.py:Name` of either, which is run as your own code. No answer is an
    empty text to it.

    The `systems` are the untrained model, alone, with the student's short prompt, and with the
    teacher's prompt; the teacher, and its second answer, which says how alike two of its answers
    are; the student, alone and with the teacher's prompt.
    """

    split: str = setting("test", "the held-out split", flag=False)
    limit: int | None = setting(None, "measure only the first N queries", at_least=1, unset="all")
    systems: tuple[SystemName, ...] = setting(
        (),
        "who is asked; teacher and student always are",
        unset="base, teacher and student; and teacher-again where the release has it, since the "
        "recipe's temperature is above 0, and where answers are free text",
    )
    concurrency: int = setting(256, "most requests at once to each system", at_least=1)
    metrics: tuple[Any, ...] = setting(
        (), "a metric of your own, as path.py:Name; may be given several times", flag="metric"
    )
    latency: bool = setting(True, "don't time the systems")
    internalisation: bool = setting(
        True, "don't ask how likely base, teacher and student find the teacher's answers"
    )
    rubrics: tuple[str, ...] = setting(
        (),
        "by what the judge scores: quality, persona, period, faithfulness, recipe, or a YAML file "
        "of criteria; may be given several times",
        group="judge",
        flag="rubric",
        unset="recipe, its judge's prompt, if it has one; else quality",
    )
    judge_labels: Path | None = setting(
        None,
        "a CSV file of people's labels, better or worse (the student than the teacher) or good or "
        "bad, by id or query, which correct the judge",
        group="judge",
    )
    residue: bool = setting(
        False,
        "also test what the training left behind: whether the student tells its prompt, does its "
        "task where nobody asks for it, obeys other prompts, and what it forgot",
    )
    paraphraser: str | None = setting(
        None,
        "with --residue, a model that says held-out queries in other words, or teacher: the "
        "release's",
    )
    prices: Path | None = setting(None, "a file with a date and prices of models", group="money")
    budget: float | None = setting(
        None, "with --prices, ask nothing more once so much is spent here", group="money", above=0
    )

    def __post_init__(self) -> None:
        """Raises `SettingsError` for a value out of its range."""
        check(self)
        if self.budget is not None and self.prices is None:
            raise SettingsError("A budget is counted with prices: name a price file (--prices).")
        if self.paraphraser and not self.residue:
            raise SettingsError("A paraphraser is for the tests of residue: add --residue.")

"""The numbers of a report, from what base, teacher and student answered on the same rows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_datasets.evaluation.metrics import estimate, load_metric
from distill_datasets.statistics import Estimate

if TYPE_CHECKING:
    from datasets import Dataset

TEACHER, BASE, STUDENT = "teacher", "base", "student"
_ALWAYS = ("answered", "agreement")
_MOST_LABELS = 50
_MOST_ROWS = 30  # so few are worth reading one by one


def load_metrics(names: Iterable[str]) -> dict[str, Any]:
    """The recipe's metrics, and those that need no reference; raises `RecipeError`."""
    return {name: load_metric(name) for name in dict.fromkeys((*names, *_ALWAYS))}


@dataclass(frozen=True)
class Comparison:
    """Answers of each system, row by row the same queries; the teacher is one of them."""

    answers: Mapping[str, "Dataset"]
    metrics: Mapping[str, Any]

    @cached_property
    def references(self) -> list[str | None]:
        """What is right, where known."""
        return list(self.answers[TEACHER]["reference"])

    @cached_property
    def labelled(self) -> list[int]:
        """The rows with a reference."""
        return [row for row, reference in enumerate(self.references) if reference]

    @cached_property
    def predictions(self) -> dict[str, list[str | None]]:
        """Each system's answers; None where it gave none."""
        return {system: list(rows["answer"]) for system, rows in self.answers.items()}

    @cached_property
    def estimates(self) -> dict[str, dict[str, Estimate]]:
        """Each system's metrics; those that need references are absent where there are none."""
        found: dict[str, dict[str, Estimate]] = {system: {} for system in self.answers}
        everywhere = list(range(len(self.references)))
        groups = list(self.answers[TEACHER]["group"])
        for name, metric in self.metrics.items():
            expected = self.predictions[TEACHER] if name == "agreement" else self.references
            rows = everywhere if name in _ALWAYS else self.labelled
            if not rows:
                continue
            for system, answers in self.predictions.items():
                found[system] |= estimate(
                    metric,
                    [answers[row] for row in rows],
                    [expected[row] for row in rows],
                    [groups[row] for row in rows],
                )
        return found

    def metrics_of(self, system: str) -> dict[str, dict[str, float]]:
        """A system's metrics with their intervals."""
        return {name: found.interval() for name, found in self.estimates[system].items()}

    def differences(self) -> dict[str, dict[str, dict[str, float]]]:
        """Student minus another system, from the same resamples of the same rows."""
        return {
            f"{STUDENT}-{other}": {
                name: (self.estimates[STUDENT][name] - self.estimates[other][name]).interval()
                for name in self.estimates[STUDENT]
                # A teacher always agrees with itself where it answers.
                if (other, name) != (TEACHER, "agreement")
            }
            for other in (TEACHER, BASE)
        }

    def tokens(self, system: str) -> dict[str, float]:
        """Mean tokens of a request, as the server counted them."""
        rows = self.answers[system]
        return {
            f"{kind}_mean": float(np.mean(rows[f"teacher_{kind}_tokens"]))
            for kind in ("prompt", "response")
        }

    def labels(self) -> dict[str, dict[str, float]]:
        """Rows and recall of each reference label; empty where references are free text."""
        rows_of: dict[str, list[int]] = {}
        for row in self.labelled:
            rows_of.setdefault(str(self.references[row]), []).append(row)
        if len(rows_of) > min(_MOST_LABELS, len(self.labelled) - 1):
            return {}
        return {
            label: {
                "n": len(rows),
                **{
                    system: sum(answers[row] == label for row in rows) / len(rows)
                    for system, answers in self.predictions.items()
                },
            }
            for label, rows in sorted(rows_of.items())
        }

    def rows(self) -> list[dict[str, str | None]]:
        """Every row, where there are few."""
        queries = list(self.answers[TEACHER]["query"])
        if len(queries) > _MOST_ROWS:
            return []
        return [
            {
                "query": query,
                "expected": self.references[row],
                **{system: self.predictions[system][row] for system in (TEACHER, BASE, STUDENT)},
            }
            for row, query in enumerate(queries)
        ]

    def notes(self) -> list[str]:
        """What a reader must know to read the numbers."""
        total, known = len(self.references), len(self.labelled)
        missing = [name for name in self.metrics if name not in _ALWAYS]
        notes = []
        if missing and known == 0:
            notes.append(f"No row has a reference label, so {', '.join(missing)} are left out.")
        elif missing and known < total:
            notes.append(f"{', '.join(missing)} are over the {known} of {total} rows with a label.")
        groups = len(set(self.answers[TEACHER]["group"]))
        unit = "rows" if groups == total else f"the {groups} groups of related rows"
        notes.append(
            f"Intervals: 95 %, bootstrap over {unit}. One without width says that no such row "
            "differs here, not that none exists."
        )
        return notes

"""What a report says of texts, for which no label is right: how alike, how long, how varied.

A text is what a system would have the student say: of one that is asked with the prompt, the
response that the recipe makes of its answer; of any other, its own words.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from distill_datasets.evaluation.comparison import STUDENT, TEACHER, Comparison
from distill_datasets.evaluation.metrics import mean_of, ratio_of
from distill_datasets.evaluation.systems import PROMPTED, SYSTEMS, is_free_text
from distill_datasets.recipes.keys import METRICS
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.similarity import chrf, equal, rouge_l
from distill_datasets.statistics import Bootstrap, Proportion

_ALIKE = {"chrf": chrf, "rouge_l": rouge_l, "exact_match": equal}
_COMPARED = ("base", SYSTEMS["base+prompt"], SYSTEMS["teacher-again"])  # with the student


def metric_names(recipe: Recipe, references: Sequence[str | None]) -> tuple[list[str], list[str]]:
    """A recipe's metrics, and those that need no references.

    Where a recipe of free text names none, those of labels, which would all be 0, give way.
    """
    if recipe.metrics == METRICS and is_free_text(recipe, references):
        return ["chrf", "rouge_l"], ["answered"]
    return list(recipe.metrics), ["answered", "agreement"]


class Texts:
    """The texts of each system, row by row, and their numbers."""

    def __init__(self, comparison: Comparison, recipe: Recipe) -> None:
        """`comparison` has the rows of every system."""
        self.comparison, self._recipe = comparison, recipe
        self._groups = comparison.groups

    @cached_property
    def said(self) -> dict[str, list[str]]:
        """What each system says, as the student would."""
        return {name: list(self._said(name)) for name in self.comparison.answers}

    def _said(self, system: str) -> Iterator[str]:
        rows = self.comparison.answers[system].select_columns(["query", "raw", "answer"])
        for row in rows:
            if system in PROMPTED and row["answer"] is not None:
                part, _ = self._recipe.part(row["query"])
                yield part.write_response(row["raw"], row["answer"]).strip()
            else:
                yield (row["raw"] or "").strip()

    @cached_property
    def _targets(self) -> dict[str, list[str | None]]:
        """What texts are compared with: the teacher's usable ones, and what is known to be right.

        Where that is a label, it is compared with the label that was read out of a text.
        """
        answers = self.comparison.predictions[TEACHER]
        pairs = zip(self.said[TEACHER], answers, strict=True)
        taught = [None if answer is None else text for text, answer in pairs]
        return {"teacher": taught, "reference": self.comparison.references}

    @cached_property
    def scores(self) -> dict[tuple[str, str, str], list[float]]:
        """Of each row, by system, what it is compared with, and how; NaN without that."""
        scores: dict[tuple[str, str, str], list[float]] = {}
        for row in range(len(self._groups)):
            for name, texts in self.said.items():
                found = {
                    "teacher": texts[row],
                    "reference": self.comparison.predictions[name][row] or "",
                }
                for target, wanted in self._targets.items():
                    right = wanted[row]
                    for how, score in _ALIKE.items():
                        known = np.nan if right is None else score(found[target], right)
                        scores.setdefault((name, target, how), []).append(known)
        return scores

    @cached_property
    def _alike(self) -> dict[tuple[str, str, str], Bootstrap]:
        return {
            key: mean_of(np.array(values), self._groups)
            for key, values in self.scores.items()
            if np.isfinite(values).any() and key[:2] != (TEACHER, TEACHER)
        }

    def section(self) -> dict[str, dict[str, Any]]:
        """By system: likeness to the teacher's texts and to the references, length, variety."""
        return {name: self._of(name) for name in self.said}

    def _of(self, system: str) -> dict[str, Any]:
        texts = self.said[system]
        (commonest, times), *_ = Counter(texts).most_common(1)
        ended = self.comparison.answers[system]["stop_reason"]
        shares = {
            "ended": [float(reason == "stop") for reason in ended],
            "commonest_share": [float(text == commonest) for text in texts],
        }
        found: dict[str, Any] = {
            **self._length_ratio(system),
            **{
                name: {**Proportion(share, self._groups).interval(), "rows": len(share)}
                for name, share in shares.items()
            },
            "distinct": len(set(texts)),
            "commonest": commonest,
            "commonest_rows": times,
        }
        for (name, target, how), estimate in self._alike.items():
            if name == system:
                rows = sum(one is not None for one in self._targets[target])
                found.setdefault(target, {})[how] = {**estimate.interval(), "rows": rows}
        return found

    def _length_ratio(self, system: str) -> dict[str, dict[str, float]]:
        """Characters of all texts, for one of the teacher's; nothing where it says nothing."""
        taught = self._targets["teacher"]
        rows = [row for row, text in enumerate(taught) if text]
        if not rows:
            return {}
        lengths = [float(len(self.said[system][row])) for row in rows]
        theirs = [float(len(taught[row] or "")) for row in rows]
        groups = [self._groups[row] for row in rows]
        ratio = ratio_of(lengths, theirs, groups).interval()
        return {"length_ratio": {**ratio, "rows": len(rows)}}

    def differences(self) -> dict[str, dict[str, dict[str, float]]]:
        """How much nearer the student is to the teacher's texts than others are, row by row.

        Than the teacher's own second answer, too, which is as near as anybody comes.
        """
        found: dict[str, dict[str, dict[str, float]]] = {}
        for other in _COMPARED:
            for how in _ALIKE:
                mine, theirs = (self._alike.get((name, TEACHER, how)) for name in (STUDENT, other))
                if mine and theirs:
                    pair = found.setdefault(f"{STUDENT}-{other}", {})
                    pair[how] = (mine - theirs).interval()
        return found

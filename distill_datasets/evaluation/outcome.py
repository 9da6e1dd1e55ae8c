"""The verdict and the alerts of a report, from the rows of its systems."""

from typing import Any

import numpy as np

from distill_datasets.conversations import readable
from distill_datasets.evaluation.alerts import SystemRows, find_alerts
from distill_datasets.evaluation.comparison import STUDENT, TEACHER, Comparison
from distill_datasets.evaluation.systems import SYSTEMS
from distill_datasets.evaluation.texts import Texts
from distill_datasets.evaluation.verdict import PairedRows, decide, main_metric
from distill_datasets.recipes.checks import field_share
from distill_datasets.recipes.recipe import Recipe

Values = list[float | None]
_AGAIN = SYSTEMS["teacher-again"]
_NEED_SECOND = (
    "Texts are compared with the teacher's, and only a second answer of the teacher says how near "
    "to them anybody comes: measure with --systems base teacher teacher-again student, or add "
    "references or checks."
)


def judge_rows(texts: Texts, recipe: Recipe, *, free_text: bool) -> dict[str, Any]:
    """Whether the student replaces the prompt, by the recipe's margin on its main metric."""
    comparison = texts.comparison
    metric = main_metric(recipe, comparison.references)
    if metric == "chrf" and not free_text:
        metric = "accuracy"  # the references are labels, whatever the recipe says of the answer
    teacher, student = _values(texts, metric)
    ids = list(comparison.answers[TEACHER]["id"])
    rows = PairedRows(metric, ids, comparison.groups, teacher, student)
    found = decide(rows, recipe.margin, trained_on=recipe.split.same_rows)
    if metric == "chrf" and not comparison.labelled and _AGAIN not in comparison.answers:
        found |= {"rule": _NEED_SECOND, "rows_needed": None}
    return found


def alerts_of(texts: Texts, verdict: dict[str, Any]) -> list[str]:
    """What a reader must know first."""
    comparison = texts.comparison
    systems = {
        name: SystemRows(said, comparison.predictions[name]) for name, said in texts.said.items()
    }
    queries = [readable(query) for query in comparison.queries]
    return find_alerts(systems, queries, comparison.references, verdict)


def _values(texts: Texts, metric: str) -> tuple[Values, Values]:
    """What teacher and student reach in each row; None where a row says nothing of it."""
    comparison = texts.comparison
    if metric == "checks":
        first, second = (_passed(comparison, name) for name in (TEACHER, STUDENT))
    elif metric == "agreement":
        first, second = (_agreeing(comparison, name) for name in (_AGAIN, STUDENT))
    elif metric == "chrf":
        target = "reference" if comparison.labelled else "teacher"
        other = TEACHER if comparison.labelled else _AGAIN
        empty = [np.nan] * len(comparison.groups)
        first, second = (
            [
                None if np.isnan(one) else one
                for one in texts.scores.get((name, target, metric), empty)
            ]
            for name in (other, STUDENT)
        )
    else:
        first, second = (_right(comparison, name, metric) for name in (TEACHER, STUDENT))
    return first, second


def _passed(comparison: Comparison, system: str) -> Values:
    """The share of the checks that a row passes, of those that say something of it."""
    rows = zip(*comparison.checked[system].values(), strict=True)
    said = [[one for one in row if one is not None] for row in rows]
    return [sum(row) / len(row) if row else None for row in said]


def _agreeing(comparison: Comparison, system: str) -> Values:
    """Whether a row's answer is the teacher's; of a teacher that wasn't asked again it is."""
    taught = comparison.predictions[TEACHER]
    answers = comparison.predictions.get(system, taught)
    pairs = zip(answers, taught, strict=True)
    return [None if right is None else float(answer == right) for answer, right in pairs]


def _right(comparison: Comparison, system: str, metric: str) -> Values:
    pairs = zip(comparison.predictions[system], comparison.references, strict=True)
    if metric == "field_match":
        return [field_share(answer, right) if right else None for answer, right in pairs]
    return [float(answer == right) if right else None for answer, right in pairs]

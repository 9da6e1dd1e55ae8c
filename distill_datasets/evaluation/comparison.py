"""Systems on the same rows: every metric, check and text, with what sets them apart."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_datasets.conversations import read_calls, readable
from distill_datasets.evaluation.metrics import (
    ALWAYS,
    CALIBRATIONS,
    Metrics,
    chrf,
    equal,
    mean_of,
    ratio_of,
    rouge_l,
)
from distill_datasets.evaluation.systems import PROMPTED, SYSTEMS, is_free_text
from distill_datasets.recipes.keys import METRICS
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.statistics import FEW, Bootstrap, Estimate, Proportion, compare_subgroups

if TYPE_CHECKING:
    from datasets import Dataset

Answers = Sequence[str | None]
_SAID = ("raw", "answer", "stop_reason", "teacher_response_tokens")
_CHECKED = ("query", "reference", "raw", "stop_reason", "answer")

TEACHER, BASE, STUDENT = "teacher", "base", "student"
_OTHERS = (TEACHER, BASE, "base + prompt")  # with whom the student is compared
_LIKENESS = {"chrf": chrf, "rouge_l": rouge_l, "exact_match": equal}
# With whom the student's texts are compared.
_OTHERS_OF_TEXTS = (BASE, SYSTEMS["base+prompt"], SYSTEMS["teacher-again"])
_MOST_LABELS = 50
_MOST_ROWS = 30  # so few are worth reading one by one


@dataclass(frozen=True)
class Comparison:
    """Answers of each system, row by row the same queries; the teacher is one of them.

    Checks and confidences are those that the `recipe` names.
    """

    answers: Mapping[str, "Dataset"]
    metrics: Metrics
    recipe: Recipe

    @cached_property
    def references(self) -> list[str | None]:
        """What is right, where known."""
        return list(self.answers[TEACHER]["reference"])

    @cached_property
    def queries(self) -> list[str]:
        """What was asked."""
        return list(self.answers[TEACHER]["query"])

    @cached_property
    def groups(self) -> list[str]:
        """Which rows are related."""
        return list(self.answers[TEACHER]["group"])

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
        found: dict[str, dict[str, Estimate]] = {}
        rows = self.labelled
        groups = [self.groups[row] for row in rows]
        for system, answers in self.predictions.items():
            given, right = ([texts[row] for row in rows] for texts in (answers, self.references))
            mine = found[system] = {}
            for name, metric in self.metrics.ours.items():
                if name in ALWAYS:
                    mine[name] = metric(answers, self.predictions[TEACHER], self.groups)
                elif name not in CALIBRATIONS and rows:
                    mine[name] = metric(given, right, groups)
                elif estimate := self._calibration(name, system):
                    mine[name] = estimate
            for own in self.metrics.own if rows else ():
                mine |= own.estimates(given, right, groups)
        return found

    def _calibration(self, name: str, system: str, beside: str | None = None) -> Estimate | None:
        """A system's calibration, on the rows where it, and another `beside` it, is confident."""
        mine, others = self.confidences[system], self.confidences[beside or system]
        said = [None if others[row] is None else mine[row] for row in self.labelled]
        if all(one is None for one in said):
            return None
        answers = self.predictions[system]
        correct = [float(answers[row] == self.references[row]) for row in self.labelled]
        groups = [self.groups[row] for row in self.labelled]
        return self.metrics.ours[name](said, correct, groups)

    @property
    def _others(self) -> list[str]:
        return [name for name in _OTHERS if name in self.answers]

    def metrics_of(self, system: str) -> dict[str, dict[str, float]]:
        """A system's metrics with their intervals."""
        return {name: found.interval() for name, found in self.estimates[system].items()}

    def differences(self) -> dict[str, dict[str, dict[str, float]]]:
        """Student minus another system, on the same rows."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for other in self._others:
            pairs = found[f"{STUDENT}-{other}"] = {}
            for name, mine in self.estimates[STUDENT].items():
                if name in CALIBRATIONS:
                    pair = (STUDENT, other), (other, STUDENT)
                    first, second = (self._calibration(name, *systems) for systems in pair)
                else:
                    first, second = mine, self.estimates[other].get(name)
                # A teacher always agrees with itself where it answers.
                if first and second and (other, name) != (TEACHER, "agreement"):
                    pairs[name] = (first - second).interval()
        return found

    @cached_property
    def confidences(self) -> dict[str, list[float | None]]:
        """Each system's confidence in its answers; None where it gave none."""
        found = {}
        for system, rows in self.answers.items():
            said = found[system] = list[float | None]()
            for row in rows.select_columns(["query", "raw", "answer"]):
                part, _ = self.recipe.part(row["query"])
                reader = part.teacher_reader if system in PROMPTED else part.student_reader
                asked = part.answer.confidence if row["answer"] is not None else None
                said.append(None if asked is None else reader.confidence(row["raw"], asked))
        return found

    @cached_property
    def checked(self) -> dict[str, dict[str, list[bool | None]]]:
        """By system and check, whether each row passes; None where the check says nothing of it."""
        found = {}
        for system, said in self.answers.items() if self.recipe.all_checks else ():
            asked = zip(*(said[column] for column in _CHECKED), strict=True)
            rows = [self.recipe.check(*row) for row in asked]
            names = self.recipe.all_checks
            found[system] = {name: [row.get(name) for row in rows] for name in names}
        return found

    def checks_of(self, system: str) -> dict[str, dict[str, float]]:
        """The share of rows that pass each check among those it applies to, and how many they are.

        A check that applies to no row is absent.
        """
        return {
            name: {**share.interval(), "rows": len(share.rows)}
            for name, passed in self.checked.get(system, {}).items()
            for share in self._shares(passed)
        }

    def check_differences(self) -> dict[str, dict[str, dict[str, float]]]:
        """Student minus another system, on the rows where a check applies to both."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for other in self._others if self.checked else ():
            pairs = found[f"{STUDENT}-{other}"] = {}
            for name, passed in self.checked[STUDENT].items():
                shares = self._shares(passed, self.checked[other][name])
                if shares:
                    pairs[name] = (shares[0] - shares[1]).interval()
        return found

    def _shares(self, *results: Sequence[bool | None]) -> list[Proportion]:
        """The share of each that passes, on the rows where all say something; none without rows."""
        rows = [row for row, found in enumerate(zip(*results, strict=True)) if None not in found]
        groups = [self.groups[row] for row in rows]
        if not rows:
            return []
        return [Proportion([float(bool(one[row])) for row in rows], groups) for one in results]

    def tokens(self, system: str) -> dict[str, float | None]:
        """Mean tokens of a request, as the server counted them; None where it doesn't."""
        found = {}
        for kind in ("prompt", "cached", "response"):
            counts = [n for n in self.answers[system][f"teacher_{kind}_tokens"] if n is not None]
            found[f"{kind}_mean"] = float(np.mean(counts)) if counts else None
        return found

    def variety(self, system: str) -> dict[str, Any]:
        """How many different answers a system gives, its commonest, and the share of that."""
        counted = Counter(self.predictions[system])
        commonest, times = counted.most_common(1)[0]
        share = times / len(self.predictions[system])
        return {"distinct": len(counted), "commonest": commonest, "commonest_share": share}

    @cached_property
    def _labels(self) -> dict[int, str]:
        """The label of each row that has one, where those are few; of calls the tools' names."""
        found = {}
        for row in self.labelled:
            found[row] = reference = str(self.references[row])
            if self.recipe.part(self.queries[row])[0].tools:
                called = sorted(call.name for call in read_calls(reference))
                found[row] = " + ".join(called) or "no call"
        few = len({*found.values()}) <= min(_MOST_LABELS, len(found) - 1)
        return found if few else {}

    def labels(self) -> dict[str, dict[str, float]]:
        """Rows and recall of each reference label; empty where references are free text.

        Calls of tools go by the tools' names alone; the share is still of equal calls.
        """
        found: dict[str, dict[str, float]] = {}
        for label in sorted({*self._labels.values()}):
            rows = [row for row, one in self._labels.items() if one == label]
            found[label] = {"n": len(rows)}
            for system, answers in self.predictions.items():
                right = sum(answers[row] == self.references[row] for row in rows)
                found[label][system] = right / len(rows)
        return found

    @cached_property
    def subgroups(self) -> dict[str, dict[str, Any]]:
        """What sets student and teacher apart on each reference label; see `compare_subgroups`."""
        mine, theirs = (
            [float(self.predictions[name][row] == self.references[row]) for row in self._labels]
            for name in (STUDENT, TEACHER)
        )
        groups = [self.groups[row] for row in self._labels]
        apart = np.subtract(mine, theirs).tolist()
        return compare_subgroups(apart, [*self._labels.values()], groups)

    def rows(self) -> list[dict[str, str | None]]:
        """Every row, where there are few."""
        if len(self.queries) > _MOST_ROWS:
            return []
        return [
            {
                "query": readable(query),
                "expected": self.references[row],
                **{system: answers[row] for system, answers in self.predictions.items()},
            }
            for row, query in enumerate(self.queries)
        ]

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every row with all that every system said to it, as it said it."""
        asked = self.answers[TEACHER].select_columns(["id", "query", "group", "reference"])
        said = [rows.select_columns([*_SAID]) for rows in self.answers.values()]
        for place, (row, *found) in enumerate(zip(asked, *said, strict=True)):
            systems = {
                name: {
                    "text": one["raw"],
                    "answer": one["answer"],
                    "stop_reason": one["stop_reason"],
                    "tokens": one["teacher_response_tokens"],
                    "checks": {
                        check: passed[place] for check, passed in self.checked.get(name, {}).items()
                    },
                }
                for name, one in zip(self.answers, found, strict=True)
            }
            yield {**row, "query": readable(row["query"]), "systems": systems}

    def notes(self) -> list[str]:
        """What a reader must know to read the numbers."""
        total, known = len(self.references), len(self.labelled)
        missing = self.metrics.names
        notes = []
        if missing and known == 0:
            notes.append(f"No row has a reference label, so {', '.join(missing)} are left out.")
        elif missing and known < total:
            notes.append(f"{', '.join(missing)} are over the {known} of {total} rows with a label.")
        notes += [
            *self._notes_on_confidence(),
            *self._notes_on_checks(),
            *self._notes_on_labels(),
        ]
        groups = len(set(self.groups))
        notes.append(
            "Intervals: 95 %, Wilson's for shares, Tango's for paired differences, a bootstrap for "
            "the others." + (self._note_on_groups(groups) if groups < total else "")
        )
        return notes

    def _note_on_groups(self, groups: int) -> str:
        metrics = self.metrics_of(TEACHER).values()
        found = sorted({round(one["n"]) for one in metrics if "n" in one})
        worth = " to ".join(map(str, dict.fromkeys((found[0], found[-1]))))
        return (
            f" The {len(self.groups)} rows are of {groups} groups of related ones, and worth "
            f"{worth} independent rows, by how alike those of a group are."
        )

    def _notes_on_confidence(self) -> Iterator[str]:
        named = [name for name in self.metrics.ours if name in CALIBRATIONS]
        if not named or not self.labelled:
            return
        said = {
            system: sum(texts[row] is not None for row in self.labelled)
            for system, texts in self.confidences.items()
        }
        counted = ", ".join(f"{system} {rows}" for system, rows in said.items())
        yield (
            f"{' and '.join(named)} are over the rows with a right answer known where a system "
            f"gave an answer and a confidence: {counted} of {len(self.labelled)}. Lower is better; "
            "ece is over ten bins of equal width."
        )

    def _notes_on_labels(self) -> Iterator[str]:
        told = {label: one for label, one in self.subgroups.items() if "p" in one}
        if not told:
            return
        apart = [
            f"{label} ({one['difference']['value']:+.3f}, p {one['p_adjusted']:.3f})"
            for label, one in told.items()
            if one["significant"]
        ]
        few = len(self.subgroups) - len(told)
        yield (
            f"By label, student and teacher differ beyond chance on {', '.join(apart) or 'none'} "
            f"of the {len(told)} with {FEW} rows or more (McNemar's mid-p, adjusted by Benjamini "
            f"and Hochberg{f'; too few rows: {few} others' if few else ''})."
        )

    def _notes_on_checks(self) -> Iterator[str]:
        if not self.checked:
            return
        yield (
            "A check's share is of the rows that it applies to, on each system's own text as it "
            "stands."
        )
        idle = [
            name
            for name in self.checked[TEACHER]
            if all(one is None for found in self.checked.values() for one in found[name])
        ]
        if idle:
            yield f"These checks apply to no row here: {', '.join(idle)}."


def metric_names(recipe: Recipe, references: Sequence[str | None]) -> tuple[list[str], list[str]]:
    """A recipe's metrics, and those that need no references.

    Where a recipe of free text names none, those of labels, which would all be 0, give way.
    """
    if recipe.metrics == METRICS and is_free_text(recipe, references):
        return ["chrf", "rouge_l"], ["answered"]
    return list(recipe.metrics), ["answered", "agreement"]


@dataclass(frozen=True)
class Texts:
    """The texts of each system, row by row, and their numbers: how alike, how long, how varied.

    A text is what a system would have the student say: of one that is asked with the prompt, the
    response that the recipe makes of its answer; of any other, its own words.
    """

    comparison: Comparison

    @cached_property
    def said(self) -> dict[str, list[str]]:
        """What each system says, as the student would."""
        part = self.comparison.recipe.part
        return {
            system: [
                part(row["query"])[0].write_response(row["raw"], row["answer"]).strip()
                if system in PROMPTED and row["answer"] is not None
                else (row["raw"] or "").strip()
                for row in rows.select_columns(["query", "raw", "answer"])
            ]
            for system, rows in self.comparison.answers.items()
        }

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
        found: dict[tuple[str, str, str], list[float]] = {}
        # Row by row, while the runs and words of the row's texts are still known.
        for row in range(len(self.comparison.groups)):
            for system, texts in self.said.items():
                answer = self.comparison.predictions[system][row] or ""
                mine = {"teacher": texts[row], "reference": answer}
                for target, wanted in self._targets.items():
                    right = wanted[row]
                    for how, score in _LIKENESS.items():
                        known = np.nan if right is None else score(mine[target], right)
                        found.setdefault((system, target, how), []).append(known)
        return found

    @cached_property
    def _alike(self) -> dict[tuple[str, str, str], Bootstrap]:
        return {
            key: mean_of(np.array(values), self.comparison.groups)
            for key, values in self.scores.items()
            if np.isfinite(values).any() and key[:2] != (TEACHER, TEACHER)
        }

    def section(self) -> dict[str, dict[str, Any]]:
        """By system: likeness to the teacher's texts and to the references, length, variety."""
        found = {name: self._of(name) for name in self.said}
        for (system, target, how), estimate in self._alike.items():
            rows = sum(one is not None for one in self._targets[target])
            found[system].setdefault(target, {})[how] = {**estimate.interval(), "rows": rows}
        return found

    def _of(self, system: str) -> dict[str, Any]:
        texts, groups = self.said[system], self.comparison.groups
        ended = [one == "stop" for one in self.comparison.answers[system]["stop_reason"]]
        (commonest, times), *_ = Counter(texts).most_common(1)
        found: dict[str, Any] = {}
        taught = self._targets["teacher"]
        if rows := [row for row, text in enumerate(taught) if text]:
            # Characters of all texts, for one of the teacher's.
            mine, theirs = (
                [float(len(many[row] or "")) for row in rows] for many in (texts, taught)
            )
            ratio = ratio_of(mine, theirs, [groups[row] for row in rows])
            found["length_ratio"] = {**ratio.interval(), "rows": len(rows)}
        shares = {"ended": ended, "commonest_share": [text == commonest for text in texts]}
        for name, share in shares.items():
            interval = Proportion([*map(float, share)], groups).interval()
            found[name] = {**interval, "rows": len(share)}
        counted = {"commonest": commonest, "commonest_rows": times}
        return {**found, "distinct": len(set(texts)), **counted}

    def differences(self) -> dict[str, dict[str, dict[str, float]]]:
        """How much nearer the student is to the teacher's texts than others are, row by row.

        Than the teacher's own second answer, too, which is as near as anybody comes.
        """
        found: dict[str, dict[str, dict[str, float]]] = {}
        for other in _OTHERS_OF_TEXTS:
            for how in _LIKENESS:
                mine, theirs = (self._alike.get((name, TEACHER, how)) for name in (STUDENT, other))
                if mine and theirs:
                    pair = found.setdefault(f"{STUDENT}-{other}", {})
                    pair[how] = (mine - theirs).interval()
        return found

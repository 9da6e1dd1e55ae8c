"""What in a release's rows can't teach a student: counted in one pass, said in sentences."""

from array import array
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from distill_datasets.recipes.checks import FAILED
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.tables import one_line

_FREE_SHARE = 0.1  # of the distinct queries that one answer may be for, where any text is allowed
_CHOICE_SHARE = 0.95
_REJECTED_SHARE = 0.5
_FAILED_SHARE = 0.1
_FEWEST = 3  # equal answers, and rows that can't be used
_FEWEST_CHOSEN = 10  # queries, before equal answers out of a closed set say anything
_TEXTS = 1_000  # that are kept to be shown
_SHOWN = 60  # signs of one
_NAMED = 10  # choices


class AnswerTally:
    """Hashes of the queries and answers of kept rows, 16 bytes a row.

    `choices` are the only answers, where the recipe names them; else a row's response counts.
    """

    def __init__(self, choices: Sequence[str] = ()) -> None:
        self.choices = choices
        self._queries, self._answers = array("Q"), array("Q")
        self._first = array("b")
        self._texts: dict[int, str] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a kept row."""
        text = str(row["answer"] if self.choices else row["response"])
        answer = _hash(text)
        self._queries.append(_hash(row["query"]))
        self._answers.append(answer)
        self._first.append(row["sample"] == 0)
        if len(self._texts) < _TEXTS:
            self._texts.setdefault(answer, text)

    def warnings(self, rejected: Mapping[str, int], errors: int) -> list[str]:
        """What to know before training on the rows; `rejected` counts rows by their reason."""
        found = [
            self._alike(),
            self._contradicting(),
            self._absent(),
            _unusable(rejected, errors, len(self._queries)),
        ]
        return [warning for warning in found if warning]

    def _alike(self) -> str | None:
        """One answer for too many queries."""
        import numpy as np

        queries, answers = self._arrays()
        pairs = np.unique(np.stack([queries, answers]), axis=1)
        distinct = len(np.unique(queries))
        values, counts = np.unique(pairs[1], return_counts=True)
        if not distinct:
            return None
        most = int(counts.max())
        text = self._texts.get(int(values[counts.argmax()]))
        shown = f"the answer {one_line(text, _SHOWN)!r}" if text is not None else "one answer"
        share = f"{most:,} of {distinct:,} distinct queries ({most / distinct:.0%})"
        if self.choices:
            if distinct >= _FEWEST_CHOSEN and most >= _CHOICE_SHARE * distinct:
                return f"nearly all answers are alike: {shown} stands for {share}"
        elif most >= _FEWEST and most > _FREE_SHARE * distinct:
            return f"{shown} stands for {share}: is it an excuse, or an error text?"
        return None

    def _contradicting(self) -> str | None:
        """Equal queries, asked as rows of their own, with different answers."""
        import numpy as np

        queries, answers = self._arrays()
        first = np.frombuffer(self._first, np.int8).astype(bool)
        pairs = np.unique(np.stack([queries[first], answers[first]]), axis=1)
        _, counts = np.unique(pairs[0], return_counts=True)
        several = int((counts > 1).sum())
        if not several:
            return None
        are = "query is" if several == 1 else "queries are"
        return f"{several:,} {are} there more than once, with different answers"

    def _absent(self) -> str | None:
        """Choices that no kept row has."""
        seen = set(self._answers)
        absent = [choice for choice in self.choices if _hash(choice) not in seen]
        if not absent:
            return None
        named = ", ".join(repr(one_line(choice, _SHOWN)) for choice in absent[:_NAMED])
        more = f" and {len(absent) - _NAMED:,} more" if len(absent) > _NAMED else ""
        return f"{len(absent):,} of {len(self.choices):,} choices never occur: {named}{more}"

    def _arrays(self) -> tuple[Any, Any]:
        import numpy as np

        return np.frombuffer(self._queries, np.uint64), np.frombuffer(self._answers, np.uint64)


class CheckTally:
    """How many kept rows each check applies to, and how many of them pass it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.facts = {name: {"rows": 0, "passed": 0} for name in recipe.all_checks}

    def add(self, row: Mapping[str, Any]) -> None:
        """Count an answered row, with the teacher's text as it stands; only a kept one counts."""
        if row["rejection"] is not None or row["error"] is not None:
            return
        said = (row[name] for name in ("query", "reference", "raw", "stop_reason", "answer"))
        for name, passed in self.recipe.check(*said).items():
            if passed is not None:
                self.facts[name]["rows"] += 1
                self.facts[name]["passed"] += passed

    @property
    def warnings(self) -> list[str]:
        """Which checks many kept rows fail, and which say nothing of any."""
        found = []
        for name, fact in self.facts.items():
            rows, failed = fact["rows"], fact["rows"] - fact["passed"]
            rule = self.recipe.all_checks[name].covers
            named = f"the check {name}" + (f" ({one_line(rule, _SHOWN)})" if rule else "")
            if not rows:
                found.append(f"{named} applies to none of the rows")
            elif failed >= _FEWEST and failed > _FAILED_SHARE * rows:
                found.append(
                    f"{failed:,} of {rows:,} rows fail {named}: `keep` leaves such rows out"
                )
        return found


def _unusable(rejected: Mapping[str, int], errors: int, kept: int) -> str | None:
    reasons = {**rejected, **({"not answered": errors} if errors else {})}
    dropped = sum(reasons.values())
    if dropped < _FEWEST or dropped <= _REJECTED_SHARE * (dropped + kept):
        return None
    by_reason = sorted(reasons.items(), key=lambda reason: -reason[1])
    told = ", ".join(f"{rows:,} {reason}" for reason, rows in by_reason)
    hint = ": raise sampling.max_tokens" if by_reason[0][0] == "truncated" else ""
    if by_reason[0][0].startswith(FAILED):
        hint = ": ask for it in prompt.md, mend the check, or leave it out of `keep`"
    return f"{dropped:,} of {dropped + kept:,} rows can't be used ({told}){hint}"


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")

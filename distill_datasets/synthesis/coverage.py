"""Which rules of a prompt its queries exercise."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

Exercised = tuple[int, ...]


class Coverage:
    """Counts queries by rule; rules are numbered from 1, in the prompt's order."""

    def __init__(self, rules: Sequence[str]) -> None:
        """`unjudged` counts queries of which nobody said what they exercise."""
        self.rules = tuple(rules)
        self.unjudged = 0
        self._queries: Counter[int] = Counter()

    def add(self, exercised: Exercised | None) -> None:
        """Count one query."""
        self.unjudged += self._unknown(exercised)
        self._queries.update(exercised or ())

    def spare(self, exercised: Exercised | None) -> bool:
        """Whether every rule would keep a query without one that exercises these."""
        return all(self._queries[number] > 1 for number in exercised or ())

    def remove(self, exercised: Exercised | None) -> None:
        """Count one query no more."""
        self.unjudged -= self._unknown(exercised)
        self._queries.subtract(exercised or ())

    def _unknown(self, exercised: Exercised | None) -> bool:
        return exercised is None and bool(self.rules)

    @property
    def uncovered(self) -> list[int]:
        """The numbers of the rules that no query exercises."""
        return [number for number, _ in enumerate(self.rules, 1) if not self._queries[number]]

    def table(self) -> list[dict[str, Any]]:
        """Every rule with its number and how many queries exercise it."""
        return [
            {"number": number, "rule": rule, "queries": self._queries[number]}
            for number, rule in enumerate(self.rules, 1)
        ]

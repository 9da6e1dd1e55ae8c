"""Balances what synthesized queries differ in, and tells which rules of the prompt they test."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from random import Random
from typing import Any

from distill_datasets.recipes.recipe import Recipe

AXES = ("topic", "style", "length", "language", "difficulty", "turns")

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


def axes_of(recipe: Recipe, topics: Sequence[str]) -> dict[str, Sequence[str]]:
    """The values of every attribute; one without values is left to the teacher."""
    given = recipe.synthesis
    values = (
        topics,
        given.styles,
        given.lengths,
        given.languages or recipe.languages,
        given.difficulties,
        [str(count) for count in given.turns] if recipe.holds_conversations else (),
    )
    return {name: found for name, found in zip(AXES, values, strict=True) if found}


def size_of(axes: Mapping[str, Sequence[str]]) -> int:
    """How many combinations there are."""
    size = 1
    for values in axes.values():
        size *= len(values)
    return size


def combinations(axes: Mapping[str, Sequence[str]], seed: object) -> Iterator[dict[str, str]]:
    """Every combination once, then every one again, without end, in an order of the seed's.

    Of whatever many are taken, each value has had its share: first of the combinations that
    begin alike, then of all.
    """
    random = Random(str(seed))
    beginnings: Counter[tuple[str, ...]] = Counter()
    values: Counter[tuple[str, str]] = Counter()

    def choose(axis: str, before: tuple[str, ...]) -> str:
        options = list(axes[axis])
        random.shuffle(options)
        return min(options, key=lambda one: (beginnings[(*before, one)], values[axis, one]))

    while True:
        chosen: tuple[str, ...] = ()
        for axis in axes:
            value = choose(axis, chosen)
            chosen = (*chosen, value)
            beginnings[chosen] += 1
            values[axis, value] += 1
        yield dict(zip(axes, chosen, strict=True))


def balance(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """How many rows have each value of each attribute, the most frequent first."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in AXES}
    for row in rows:
        for name in AXES:
            if row.get(name) is not None:
                counts[name][row[name]] += 1
    return {name: dict(found.most_common()) for name, found in counts.items() if found}

"""What the queries of a synthesis differ in, crossed so that any number of them is balanced."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from random import Random
from typing import Any

from distill_datasets.recipes.recipe import Recipe

AXES = ("topic", "style", "length", "language", "difficulty")


def axes_of(recipe: Recipe, topics: Sequence[str]) -> dict[str, Sequence[str]]:
    """The values of every attribute; one without values is left to the teacher."""
    given = recipe.synthesis
    values = (
        topics,
        given.styles,
        given.lengths,
        given.languages or recipe.languages,
        given.difficulties,
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

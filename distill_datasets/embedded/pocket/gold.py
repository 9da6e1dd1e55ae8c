"""The right labels of the recipes' queries, and how answers are scored against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .formats import Format
from .labels import LABELS, label_of
from .tokenizer import TURN_END

CYCLE = (
    *("ar", "bg", "de", "el", "en", "es", "fr", "hi"),
    *("ru", "sw", "th", "tr", "ur", "vi", "zh"),
)
CYCLED = 2000
# Lines that break the cycle, counted from 1: romanised Urdu, and one untranslated sentence.
EXCEPTIONS = {223: "ot", 718: "ot", 1573: "ot", 1858: "ot", 1933: "ot", 291: "en"}
# Gold of the hundred edge cases behind the cycle, by the rules of the prompts.
EDGE_GOLD = (
    ["ar", "ur"] * 5
    + [label for label in ("el", "ru", "zh") for _ in range(10)]
    + [label for label in ("fr", "es", "de", "tr", "vi") for _ in range(3)]
    + ["en"] * 10
    + ["hi"] * 5
    + ["ur", "ar", "ur", "ar", "ur"]
    + ["en", "en", "fr", "es", "ot", "de", "tr", "vi", "ru", "zh"]
    + ["ot"] * 12
    + ["fr", "es", "ot"]
)
TUTORIAL_LINES = (1, *range(3, 10), *range(12, 16))


@dataclass(frozen=True)
class Score:
    """Shares of right and of well-formed answers."""

    accuracy: float
    well_formed: float
    count: int

    def numbers(self) -> dict[str, float]:
        """Return the score for JSON."""
        return {
            "accuracy": round(self.accuracy, 4),
            "well_formed": round(self.well_formed, 4),
            "count": self.count,
        }


def recipe_gold() -> list[str]:
    """Return the label of every recipe query, by its position and the prompts' rules."""
    cycle = [label_of(CYCLE[place % len(CYCLE)]) for place in range(CYCLED)]
    for line, label in EXCEPTIONS.items():
        cycle[line - 1] = label
    return cycle + EDGE_GOLD


def score(replies: Sequence[str], gold: Sequence[str], format: Format) -> Score:
    """Compare answers with the gold labels, written in a format."""
    allowed = {format.answer(label) + TURN_END for label in LABELS}
    right = sum(
        reply == format.answer(label) + TURN_END for reply, label in zip(replies, gold, strict=True)
    )
    formed = sum(reply in allowed for reply in replies)
    return Score(right / len(gold), formed / len(gold), len(gold))

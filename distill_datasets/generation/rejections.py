"""Rows that are all rejected: what the teacher said, and what would help."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from distill_datasets.conversations import readable
from distill_datasets.errors import GenerationError
from distill_datasets.generation.voting import NO_MAJORITY, NO_SCORE, NONE_PARSED, REFUSED
from distill_datasets.recipes.checks import FAILED
from distill_datasets.recipes.parsing import (
    EMPTY,
    OFF_SCHEMA,
    OUTSIDE_CHOICES,
    TRUNCATED,
    UNPARSABLE,
)
from distill_datasets.recipes.recipe import Recipe

_SHOWN, _LONGEST = 2, 400  # answers in a message, and characters of each


class FirstRows:
    """Ends a run of which the first `most` queries give no row that can be used; 0: never."""

    def __init__(self, recipe: Recipe, most: int) -> None:
        """Looks at rows as they come, in whatever order."""
        self._recipe, self._most = recipe, most
        self._rejected: list[Mapping[str, Any]] = []
        self._done = not most

    def look(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """See the rows of one query; raises `GenerationError` for the last of `most` bad ones."""
        if self._done:
            return
        if any(row.get("rejection") is None for row in rows):
            self._done = True
            return
        self._rejected.append(rows[0])
        if len(self._rejected) == self._most:
            self._done = True
            raise GenerationError(
                f"Of the first {self._most} rows none can be used, so nothing more was asked. "
                f"{explain_rejections(self._rejected, self._recipe)} What was paid is kept: "
                "mend the recipe and run again."
            )


def explain_rejections(rejected: Sequence[Mapping[str, Any]], recipe: Recipe) -> str:
    """Why rows were rejected, what was said in two of them, and what would help."""
    reasons = Counter(str(row["rejection"]) for row in rejected)
    counted = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    shown = "".join(
        f"\n  {_short(readable(row['query']))}\n    -> {_short(row['raw'])}"
        for row in rejected[:_SHOWN]
    )
    help = "; ".join(filter(None, (_remedy(reason, recipe) for reason in reasons)))
    return f"Rejected: {counted}. The teacher said:{shown}\nWhat would help: {help}."


def _remedy(reason: str, recipe: Recipe) -> str:
    reason = re.sub(r"^turn \d+: ", "", reason)
    answer = recipe.answer
    if reason == TRUNCATED:
        return f"raise sampling.max_tokens, which is {recipe.sampling.max_tokens}"
    if reason.startswith(FAILED):
        return _failed_check(reason.removeprefix(FAILED), recipe)
    if reason == OUTSIDE_CHOICES:
        return (
            f"ask in prompt.md for one of answer.choices {list(answer.choices)} word for word, or "
            "add what is said to them"
        )
    if reason == OFF_SCHEMA:
        return "ask in prompt.md for JSON of the form in answer.json_schema, or change the schema"
    if reason in (UNPARSABLE, NONE_PARSED):
        if answer.pattern:
            return (
                f"answer.pattern {answer.pattern!r} never matches: change it, or ask in prompt.md "
                "for that form"
            )
        return "ask in prompt.md for nothing but the JSON, or change answer.json_schema"
    return _OTHERS.get(reason, "look at prompt.md and at `answer:` in recipe.yaml")


def _failed_check(name: str, recipe: Recipe) -> str:
    """The checks of that name, of this recipe's or of those behind its handles."""
    every = {check.name: check for check in recipe.all_checks.values()}
    check = every[name]
    rule = f" ({check.covers})" if check.covers else ""
    return (
        f"ask for what the check {name} demands{rule} in prompt.md, mend the check, "
        f"{check.demand}, or leave it out of `keep`"
    )


_OTHERS = {
    EMPTY: "look at prompt.md, and raise sampling.max_tokens where the model thinks first",
    NO_MAJORITY: "lower `agreement`, or ask more teachers",
    REFUSED: "look at `verifier`, which holds for none of them",
    NO_SCORE: "look at `judge.pattern`, `judge.scale` and the judge's prompt",
}


def _short(text: Any) -> str:
    """A text on one line, without what could steer a terminal."""
    shown = repr(str(text))
    return shown if len(shown) <= _LONGEST else shown[:_LONGEST] + "…"

"""A judge: another model that scores a teacher's answer."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from distill_datasets.models.sampler import Sample, Sampler, Sampling
from distill_datasets.recipes.prompt import render
from distill_datasets.schema import Message


@dataclass(frozen=True)
class Judging:
    """Whom to ask for a score, with which template, and how to read what it says.

    The score is the last match of `pattern`'s group `score`; what is outside of `scale` is none.
    """

    sampler: Sampler
    sampling: Sampling
    prompt: str
    pattern: str
    scale: tuple[float, float]

    @property
    def parts(self) -> Sequence[Any]:
        """JSON values that name everything a score depends on."""
        sampling = asdict(self.sampling)
        return [self.sampler.identity, sampling, self.prompt, self.pattern, list(self.scale)]

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        return re.compile(self.pattern)

    def messages(self, **fields: str | None) -> list[Message]:
        """What the judge sees for one answer."""
        return [{"role": "user", "content": render(self.prompt, **fields)}]

    def score(self, verdict: Sample) -> float | None:
        """The score in what the judge said; a verdict that was cut off holds none."""
        found = [match["score"] for match in self._expression.finditer(verdict.text)]
        if verdict.stop_reason == "length" or not found:
            return None
        try:
            score = float(found[-1])
        except (TypeError, ValueError):
            return None
        low, high = self.scale
        return score if low <= score <= high else None

"""What is learned: a dataset's responses, its teacher's probabilities, or its corrections."""

import math
from dataclasses import dataclass
from typing import Literal

from distill_datasets.errors import SettingsError

_CHOICES = {
    "name": ("sft", "soft", "on_policy"),
    "labels": ("auto", "choices", "stored", "scored"),
    "kl": ("reverse", "forward"),
}


@dataclass(frozen=True)
class ObjectiveSettings:
    """How a prompt is distilled.

    `name`: "sft" learns the responses; "soft" the teacher's `top_k` probabilities at each of their
    tokens; "on_policy" has the student answer without the prompt, and the teacher, who sees it,
    judge every token.

    `teacher` scores: a model reference; None is the release's own teacher. It must have the
    student's tokenizer, but for the labels "choices".

    For "soft": `temperature` softens the teacher, `alpha` is the share of the hard labels, and
    `labels` says where the probabilities come from. "choices" are the exact ones of a closed
    answer set, "stored" those that generation kept, "scored" the teacher reads each response under
    its prompt; "auto" takes the first of these that the release allows.

    For "on_policy": `kl` "reverse" corrects the student's `top_k` probabilities at each place that
    it reaches, or with 0 the sampled token alone; "forward" teaches the teacher's `top_k` there.
    `samples` answers of at most `max_tokens` (the recipe's, when None) are sampled for each query,
    with weights that are at most `stale` steps old (0 or 1): with 1 the next batch is sampled while
    this one is learned.
    """

    name: Literal["sft", "soft", "on_policy"] = "sft"
    teacher: str | None = None
    top_k: int = 20
    temperature: float = 1.0
    alpha: float = 0.0
    labels: Literal["auto", "choices", "stored", "scored"] = "auto"
    kl: Literal["reverse", "forward"] = "reverse"
    samples: int = 1
    max_tokens: int | None = None
    stale: int = 1

    def __post_init__(self) -> None:
        """Refuse what can't be trained, before anything is spent."""
        for field, known in _CHOICES.items():
            if getattr(self, field) not in known:
                found = getattr(self, field)
                raise SettingsError(f"objective.{field} must be one of {known}; found {found!r}.")
        shifts = self.name == "on_policy" and self.kl == "reverse"
        wanted = {
            "top_k": (
                self.policy_gradient or self.top_k > shifts,
                "at least 2, between which the reverse KL shifts probability, or 0 for the sampled "
                "token alone"
                if shifts
                else "at least 1",
            ),
            "samples": (self.samples >= 1, "at least 1"),
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            "temperature": (0 < self.temperature < math.inf, "above 0"),
            "alpha": (0 <= self.alpha <= 1, "from 0 to 1"),
            "stale": (self.stale in (0, 1), "0 or 1"),
        }
        for field, (holds, said) in wanted.items():
            if not holds:
                found = getattr(self, field)
                raise SettingsError(f"objective.{field} must be {said}; found {found!r}.")

    @property
    def policy_gradient(self) -> bool:
        """Whether the sampled tokens alone are corrected, which has a loss of its own."""
        return (self.name, self.kl, self.top_k) == ("on_policy", "reverse", 0)

"""From a response's text to an answer, or to a rejection with its reason."""

import re
from dataclasses import dataclass
from functools import cached_property

TRUNCATED = "truncated"
EMPTY = "empty"
UNPARSABLE = "unparsable"
OUTSIDE_CHOICES = "outside choices"


@dataclass(frozen=True, slots=True)
class Parsed:
    """Exactly one of the two is set."""

    answer: str | None = None
    rejection: str | None = None


@dataclass(frozen=True)
class Reader:
    """Reads answers out of responses.

    `pattern` is a regular expression with a group named `answer`, searched for in the text;
    None takes the whole text. `choices`, when given, are the only answers.
    """

    pattern: str | None = None
    choices: tuple[str, ...] = ()

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        return re.compile(self.pattern or r"(?s)(?P<answer>.*)")

    def read(self, text: str, stop_reason: str) -> Parsed:
        """The answer in `text`; a response cut off by the token limit is never an answer."""
        if stop_reason == "length":
            return Parsed(rejection=TRUNCATED)
        if not text.strip():
            return Parsed(rejection=EMPTY)
        match = self._expression.search(text.strip())
        if match is None or not (match["answer"] or "").strip():
            return Parsed(rejection=UNPARSABLE)
        answer = match["answer"].strip()
        if self.choices and answer not in self.choices:
            return Parsed(rejection=OUTSIDE_CHOICES)
        return Parsed(answer=answer)

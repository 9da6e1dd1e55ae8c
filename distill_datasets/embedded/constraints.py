"""Holds a sample to a JSON schema: before each token, which ones may come."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .wire import InvalidRequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher

LONGEST_SCHEMA = 1 << 17
# Between the parts of a JSON text: without a limit, a small model writes blanks for ever.
_BLANKS = r"[\x20\x0A\x0D\x09]{1,16}"


class Constraint(Protocol):
    """Which tokens one sample may be made of; `allowed` and `accept` alternate."""

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens of the vocabulary may be drawn next; at least one."""

    def accept(self, token: int) -> None:
        """Take note of the token that was drawn."""


# Makes the constraint of each sample.
Constrain = Callable[[], Constraint]


class Grammars:
    """Compiles schemas for one tokenizer; `ends` are the tokens that may follow a whole answer."""

    def __init__(self, tokenizer: str, vocabulary: int, ends: Sequence[int]) -> None:
        """`tokenizer` is the text of tokenizer.json; raises `InvalidRequestError` without
        llguidance.
        """
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise InvalidRequestError(
                "an answer is held to a JSON schema by llguidance, which is not installed where "
                "this server runs: pip install 'distill-datasets[serve]'"
            ) from error
        self._tokenizer = LLTokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(ends))

    def compile(self, schema: Any) -> Constrain:
        """What makes a constraint for each sample; raises `InvalidRequestError` for a schema that
        can't be held, such as one with look-ahead in a pattern.
        """
        from llguidance import LLMatcher

        text = json.dumps(schema)
        if len(text) > LONGEST_SCHEMA:
            raise InvalidRequestError(
                f"expected a schema of at most {LONGEST_SCHEMA} characters; found {len(text)}"
            )
        grammar = LLMatcher.grammar_from_json_schema(
            text, overrides={"whitespace_pattern": _BLANKS}
        )
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidRequestError(
                f"expected a JSON schema that an answer can be held to: {matcher.get_error()}"
            )
        return lambda: SchemaConstraint(matcher.deep_copy(), self._tokenizer.vocab_size)


class SchemaConstraint:
    """The state of one sample that is held to a schema."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._bits = np.zeros((1, (vocabulary + 31) // 32), np.int32)

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens of the vocabulary may come next."""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._bits)
        self._require_sound()
        bits = np.unpackbits(self._bits.view(np.uint8)[0], bitorder="little")
        return bits[: self._vocabulary].astype(bool)

    def accept(self, token: int) -> None:
        """Go on with the token that was drawn."""
        if not self._matcher.is_stopped():  # else nothing but an end may come
            self._matcher.consume_token(token)
            self._require_sound()

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise InvalidRequestError(
                f"the schema can't be held any further: {self._matcher.get_error()}: simplify it"
            )

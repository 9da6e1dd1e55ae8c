"""Prompt prefixes that requests have in common, computed once.

Nothing in the protocol names a prefix: it is the longest run of tokens that a prompt shares
with a cached one, or with a prompt seen a moment ago.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .prefix_attention import KeyValues
from .wire import Ints

# Below this length a prefix costs more to keep apart than to compute again.
SHORTEST = 24
RECENT_PROMPTS = 64
MOST_PREFIXES = 32
MOST_HEADS = 1024
MOST_BYTES = 2 << 30


@dataclass(frozen=True)
class Prefix:
    """The tokens of a prompt's start and what each layer computed for them."""

    tokens: Ints
    layers: Sequence[KeyValues]

    def cut(self, length: int) -> Sequence[KeyValues]:
        """The first tokens' keys and values, without a copy."""
        return [(key[:, :, :length], value[:, :, :length]) for key, value in self.layers]

    @property
    def size(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for pair in self.layers for part in pair)


def head(prompt: Ints) -> bytes:
    """What prompts have in common if they share anything worth caching: cheap to compare."""
    return prompt[:SHORTEST].tobytes()


def common_length(left: Ints, right: Ints) -> int:
    """How many leading tokens two prompts share."""
    size = min(len(left), len(right))
    differ = np.flatnonzero(left[:size] != right[:size])
    return int(differ[0]) if len(differ) else size


class Prefixes:
    """Cached prefixes of each version of the weights, least recently used out first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, bytes], Prefix] = OrderedDict()
        self._recent: OrderedDict[tuple[str, bytes], deque[Ints]] = OrderedDict()

    def best(self, weights: str, prompt: Ints) -> tuple[Prefix | None, int]:
        """The cached prefix that shares most with a prompt, and how much it shares."""
        found: tuple[Prefix | None, int] = (None, 0)
        for (owner, _), prefix in self._kept.items():
            if owner == weights:
                shared = common_length(prefix.tokens, prompt)
                if shared > found[1]:
                    found = (prefix, shared)
        return found if found[1] >= SHORTEST else (None, 0)

    def learn(
        self, weights: str, prompt: Ints, others: Sequence[Ints], build: Callable[[Ints], Prefix]
    ) -> None:
        """Cache what a prompt shares with others, if that is new and longer than what is cached."""
        key = (weights, head(prompt))
        recent = self._recent.setdefault(key, deque(maxlen=RECENT_PROMPTS))
        self._recent.move_to_end(key)
        if len(self._recent) > MOST_HEADS:
            self._recent.popitem(last=False)
        # A request that still waits is looked at again: it must not be found to repeat itself.
        seen = [other for other in recent if other is not prompt]
        if len(seen) == len(recent):
            recent.append(prompt)
        shared = max((common_length(prompt, other) for other in [*others, *seen]), default=0)
        _, cached = self.best(weights, prompt)
        if shared >= max(SHORTEST, cached + cached // 4 + 1):
            tokens = prompt[:shared]
            self._kept[weights, tokens.tobytes()] = build(tokens)
            self._trim()

    def touch(self, weights: str, prefix: Prefix) -> None:
        """Mark a prefix as used."""
        self._kept.move_to_end((weights, prefix.tokens.tobytes()))

    def forget(self, weights: str) -> None:
        """Drop all prefixes of weights that are gone."""
        for kept in (self._kept, self._recent):
            for key in [key for key in kept if key[0] == weights]:
                del kept[key]

    def _trim(self) -> None:
        while len(self._kept) > 1 and (
            len(self._kept) > MOST_PREFIXES
            or sum(prefix.size for prefix in self._kept.values()) > MOST_BYTES
        ):
            self._kept.popitem(last=False)

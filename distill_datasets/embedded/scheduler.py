"""Which of the waiting sample requests run together, and behind which cached prefix.

Nothing in the protocol names a prefix: it is the longest run of tokens that a prompt shares
with a cached one, or with a prompt seen a moment ago.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .wire import Ints, SampleRequest

if TYPE_CHECKING:
    from .prefix_attention import KeyValues

# A finished request: protobuf bytes or JSON.
Payload = bytes | dict[str, Any]
Resolve = Callable[[Payload], None]

# Called on the compute thread with a sample's index, each token as it is drawn, and its logprob.
Watch = Callable[[int, int, float], bool]


class Constraint(Protocol):
    """Which tokens one sample may be made of."""

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens of the vocabulary may be drawn next; at least one."""

    def accept(self, token: int) -> None:
        """Take note of the token that was drawn."""


@dataclass(frozen=True)
class SampleJob:
    """A sample request from one version of the weights.

    `watch` sees each token as it is drawn, and gives a sample up by returning False;
    `constrain` makes the constraint of each sample. Logprobs are the model's own all the same.
    """

    weights: str
    request: SampleRequest
    resolve: Resolve
    watch: Watch | None = None
    constrain: Callable[[], Constraint] | None = None

    def joins(self, other: SampleJob) -> bool:
        """Whether both may run in one batch.

        Scores cost as much as the most that any request of a batch asks for.
        """
        own, others = self.request.scoring, other.request.scoring
        alike = own.asked == others.asked and own.top == others.top
        wide = [1 if one.targets is None else one.targets.ids.shape[1] for one in (own, others)]
        return alike and self.weights == other.weights and (wide[0] == wide[1] or max(wide) <= 256)


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


MOST_ROWS = 64
# Padded prompt tokens in one pass.
MOST_TOKENS = 32_768
# Cells of the mask that padding needs.
MOST_MASK = 1 << 26
# A step of decoding costs about what reading this many prompt tokens does: rows of another
# length join a batch only while their padding costs less than decoding them apart. How many
# steps that would be is unknown; most answers are short.
STEP_TOKENS = 64
USUAL_STEPS = 6
# Requests looked at when a batch is formed.
WINDOW = 4 * MOST_ROWS


@dataclass(frozen=True)
class SampleBatch:
    """Positions of the requests to run, and the prefix that all of them share."""

    chosen: list[int]
    prefix: Prefix | None
    length: int


@dataclass(frozen=True)
class _Member:
    index: int
    rows: int
    suffix: int
    steps: int
    prefix: Prefix | None
    shared: int


def usable(request: SampleRequest) -> int:
    """How much of a prompt may come from the cache: what is scored has to be computed."""
    length = len(request.prompt)
    return max(0, length - 1 - request.scoring.reach(length))


def plan(
    weights: str,
    requests: Sequence[SampleRequest],
    prefixes: Prefixes,
    build: Callable[[Ints], Prefix],
) -> SampleBatch:
    """Choose the batch that the first request runs in; the other requests may join it."""
    window = requests[:WINDOW]
    _learn(weights, window, prefixes, build)
    candidates = [
        _candidate(weights, index, request, prefixes) for index, request in enumerate(window)
    ]
    first = candidates[0]
    similar = [
        other
        for other in candidates
        if other.prefix is first.prefix and 4 * other.shared >= 3 * first.shared
    ]
    chosen = _fill(first, similar)
    if first.prefix is not None:
        prefixes.touch(weights, first.prefix)
    return SampleBatch(
        [one.index for one in chosen], first.prefix, min(one.shared for one in chosen)
    )


def _learn(
    weights: str,
    window: Sequence[SampleRequest],
    prefixes: Prefixes,
    build: Callable[[Ints], Prefix],
) -> None:
    """Look for a new prefix if a cached one covers less than half of the first prompt.

    Only the first request is sure to run now: a prefix computed for others might be dropped
    from the cache before their turn.
    """
    first = window[0]
    most = usable(first)
    _, cached = prefixes.best(weights, first.prompt)
    if most < SHORTEST or 2 * cached >= most:
        return
    start = head(first.prompt)
    others = [one.prompt for one in window[1:] if head(one.prompt) == start][:MOST_ROWS]
    if first.num_samples > 1:
        others.append(first.prompt)
    prefixes.learn(weights, first.prompt, others, build)


def _candidate(weights: str, index: int, request: SampleRequest, prefixes: Prefixes) -> _Member:
    prefix, shared = prefixes.best(weights, request.prompt)
    shared = min(shared, usable(request))
    if shared < SHORTEST:
        prefix, shared = None, 0
    suffix = len(request.prompt) - shared
    steps = min(request.max_tokens or USUAL_STEPS, USUAL_STEPS)
    return _Member(index, request.num_samples, suffix, steps, prefix, shared)


def _fill(first: _Member, similar: list[_Member]) -> list[_Member]:
    """Take requests of similar length around the first one until the batch is full."""
    ordered = sorted(similar, key=lambda one: (one.suffix, one.index))
    low = high = ordered.index(first)
    rows, tokens = first.rows, first.rows * first.suffix
    while True:
        left = ordered[low - 1] if low > 0 else None
        right = ordered[high + 1] if high + 1 < len(ordered) else None
        nearest = _nearer(first, left, right)
        if nearest is None:
            return ordered[low : high + 1]
        longest = max(ordered[high].suffix, nearest.suffix)
        rows, tokens = rows + nearest.rows, tokens + nearest.rows * nearest.suffix
        if not _fits(rows, longest) or (rows * longest - tokens > STEP_TOKENS * nearest.steps):
            return ordered[low : high + 1]
        low, high = (low - 1, high) if nearest is left else (low, high + 1)


def _fits(rows: int, longest: int) -> bool:
    padded = rows * longest
    return rows <= MOST_ROWS and padded <= MOST_TOKENS and padded * longest <= MOST_MASK


def _nearer(first: _Member, left: _Member | None, right: _Member | None) -> _Member | None:
    if left is None or right is None:
        return left or right
    return left if first.suffix - left.suffix <= right.suffix - first.suffix else right

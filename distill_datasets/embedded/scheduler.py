"""Which of the waiting sample requests run together, and behind which cached prefix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .prefix_cache import SHORTEST, Prefix, Prefixes, head
from .sample_wire import SampleRequest
from .wire import Ints

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
class Batch:
    """Positions of the requests to run, and the prefix that all of them share."""

    chosen: list[int]
    prefix: Prefix | None
    length: int


@dataclass(frozen=True)
class _Candidate:
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
) -> Batch:
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
    return Batch([one.index for one in chosen], first.prefix, min(one.shared for one in chosen))


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


def _candidate(weights: str, index: int, request: SampleRequest, prefixes: Prefixes) -> _Candidate:
    prefix, shared = prefixes.best(weights, request.prompt)
    shared = min(shared, usable(request))
    if shared < SHORTEST:
        prefix, shared = None, 0
    suffix = len(request.prompt) - shared
    steps = min(request.max_tokens or USUAL_STEPS, USUAL_STEPS)
    return _Candidate(index, request.num_samples, suffix, steps, prefix, shared)


def _fill(first: _Candidate, similar: list[_Candidate]) -> list[_Candidate]:
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


def _nearer(
    first: _Candidate, left: _Candidate | None, right: _Candidate | None
) -> _Candidate | None:
    if left is None or right is None:
        return left or right
    return left if first.suffix - left.suffix <= right.suffix - first.suffix else right

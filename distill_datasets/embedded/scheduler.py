"""Which of the waiting samples join the running batch, when, with which of the weights in memory,
and behind which cached prefix.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .model import TokenBytes
from .wire import DrawnSample, Ints, MissingError, PromptScores, SampleRequest

if TYPE_CHECKING:
    from .logits import Constrain
    from .lora import Adapters
    from .model import LoadedModel
    from .prefix_attention import KeyValues, Slots

# Requests looked at when rows join a batch.
WINDOW = 256
# Tokens that the smallest slots of a row hold; the others are twice as wide as the ones before.
NARROWEST = 64
# Tokens of an answer that slots have place for from the start.
USUAL_ANSWER = 64
# The first request of an idle server is slowed by others to this many times what it takes alone,
# while its first tokens are drawn.
PROMISE = 1.75
PROMISED_TOKENS = 128
# The key of the base model's own weights.
BASE = "base"
# Adapters kept in memory for sampling; others are read again when needed.
MOST_SAMPLERS = 8
# Unnamed weights kept for sampling; a training that samples at every step makes one each time.
MOST_SNAPSHOTS = 64
# Below this length a prefix costs more to keep apart than to compute again.
SHORTEST = 24
RECENT_PROMPTS = 64
MOST_PREFIXES = 32
MOST_HEADS = 1024
# A finished request: protobuf bytes or JSON.
Payload = bytes | dict[str, Any]
Resolve = Callable[[Payload], None]
# Called on the compute thread with a sample's index, each token as it is drawn, and its logprob.
Watch = Callable[[int, int, float], bool]


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
    constrain: Constrain | None = None


def worthwhile(shared: int, cached: int) -> bool:
    """Whether a prefix is worth computing where a part of it is cached."""
    return shared >= max(SHORTEST, cached + cached // 4 + 1)


@dataclass(eq=False)
class OpenRequest:
    """A request that was accepted: its samples join the batch one by one and end as they do."""

    job: SampleJob
    limit: int
    joined: int = 0
    cache_hit: int = 0
    samples: dict[int, DrawnSample] = field(default_factory=dict)
    scores: PromptScores = field(default_factory=PromptScores)

    @property
    def request(self) -> SampleRequest:
        """What was asked."""
        return self.job.request

    @property
    def usable(self) -> int:
        """How much of the prompt may come from the cache: what is scored has to be computed."""
        length = len(self.request.prompt)
        return max(0, length - 1 - self.request.scoring.reach(length))

    @property
    def waiting(self) -> int:
        """How many samples have not joined yet."""
        return self.request.num_samples - self.joined


def slot_width(tokens: int) -> int:
    """The width of the slots that hold a row of so many tokens."""
    return max(NARROWEST, 1 << (tokens - 1).bit_length())


def most_held(suffix: int, limit: int) -> int:
    """The tokens that a row's slots hold at most: while they widen, there are the old ones too."""
    last = slot_width(suffix + limit)
    return last if limit <= USUAL_ANSWER else last + last // 2


class Kind(NamedTuple):
    """What rows that attend alike have in common: a prefix, how much of it, their slots' width."""

    weights: str
    prefix: Prefix | None
    shared: int
    width: int


@dataclass(frozen=True)
class Newcomer:
    """A sample that joins the batch: it reads its prompt behind `shared` tokens of a prefix."""

    request: OpenRequest
    index: int
    prefix: Prefix | None
    shared: int

    @property
    def suffix(self) -> Ints:
        """The tokens to read."""
        return self.request.request.prompt[self.shared :]

    @property
    def kind(self) -> Kind:
        """The rows that it joins; its slots have no width if only one token is drawn."""
        limit = self.request.limit
        width = 0 if limit == 1 else slot_width(len(self.suffix) + min(limit, USUAL_ANSWER))
        return Kind(self.request.job.weights, self.prefix, self.shared, width)

    @property
    def reserved(self) -> int:
        """The tokens that its slots may come to hold."""
        return most_held(len(self.suffix), self.request.limit)


@dataclass
class Build:
    """A prefix that is being computed, for one request first; `done` of its tokens are."""

    owner: OpenRequest
    tokens: Ints
    begin: Prefix | None
    done: int
    slots: Slots | None = None


@dataclass
class Room:
    """What may still join a batch: rows, requests, tokens to read now, and bytes to hold."""

    rows: int
    requests: int
    reading: int
    holding: int
    token: TokenBytes
    joined: int = 0

    def take(self, one: Newcomer) -> bool:
        """Give a sample its place, if there is one; the first has however long its prompt is."""
        needed = self.token.kept * one.reserved + self.token.computed * len(one.suffix)
        if needed > self.holding or (len(one.suffix) > self.reading and self.joined):
            return False
        self.rows, self.reading = self.rows - 1, self.reading - len(one.suffix)
        self.holding, self.joined = self.holding - needed, self.joined + 1
        return True

    def build(self, tokens: int, reading: int) -> bool:
        """Give a prefix its place, if there is one; so much of it is read at once."""
        needed = self.token.kept * tokens + self.token.computed * reading
        if needed > self.holding:
            return False
        self.holding -= needed
        return True


class Admission:
    """The requests that wait for one version of the weights, in the order they came.

    Nothing in the protocol names a prefix: it is the longest run of tokens that a prompt shares
    with a cached one, or with a prompt seen a moment ago. A prompt that is longer than a pass may
    read has one of its own.
    """

    def __init__(self, weights: str, prefixes: Prefixes, longest: int) -> None:
        self.weights, self._prefixes, self._longest = weights, prefixes, longest
        self.waiting: deque[OpenRequest] = deque()
        self.build: Build | None = None

    def pick(self, room: Room) -> Iterator[Newcomer]:
        """The samples that join now; starts a prefix where one is worthwhile."""
        for request in list(islice(self.waiting, WINDOW)):
            if not (room.rows and room.requests):
                return
            room.requests -= 1
            place = self._place(request, room)
            if place is None:
                continue
            while request.waiting and room.rows:
                one = Newcomer(request, request.joined, *place)
                if not room.take(one):
                    return
                request.cache_hit = one.shared if not one.index else request.cache_hit
                request.joined += 1
                yield one
            if not request.waiting:
                self.waiting.remove(request)

    def built(self, layers: Sequence[KeyValues]) -> None:
        """Keep the prefix that was computed."""
        if self.build is not None:
            self._prefixes.keep(self.weights, Prefix(self.build.tokens, layers))
            self.build = None

    def drop(self, request: OpenRequest) -> None:
        """Forget a request that failed."""
        if request in self.waiting:
            self.waiting.remove(request)
        if self.build is not None and self.build.owner is request:
            self.build = None

    def _place(self, request: OpenRequest, room: Room) -> tuple[Prefix | None, int] | None:
        """The prefix that a request stands behind and how much of it; None: not ready."""
        prompt, usable = request.request.prompt, request.usable
        prefix, cached = self._prefixes.best(self.weights, prompt)
        cached = min(cached, usable)
        if self.build is not None:
            coming = min(common_length(self.build.tokens, prompt), usable)
            if worthwhile(coming, cached):
                return None
        tokens = self._missing(request, usable, cached)
        if tokens:
            if self.build is None and room.build(tokens, min(tokens, self._longest)):
                begin = prefix if cached >= SHORTEST else None
                self.build = Build(request, prompt[:tokens], begin, cached if begin else 0)
            return None
        if prefix is None or cached < SHORTEST:
            return None, 0
        return prefix, self._length(prefix, cached)

    def _missing(self, request: OpenRequest, usable: int, cached: int) -> int:
        """How long a prefix is worth computing before the request reads its prompt, or 0."""
        prompt = request.request.prompt
        if usable >= SHORTEST and 2 * cached < usable and not request.joined:
            start = head(prompt)
            near = (one.request.prompt for one in self.waiting if one is not request)
            others = [other for other in islice(near, WINDOW) if head(other) == start]
            if request.request.num_samples > 1:
                others.append(prompt)
            shared = min(usable, self._prefixes.repeated(self.weights, prompt, others))
            if worthwhile(shared, cached):
                return shared
        return usable if len(prompt) - cached > self._longest and usable > cached else 0

    def _length(self, prefix: Prefix, shared: int) -> int:
        """A length that rows already use of a prefix, if that loses little."""
        used = max((one for one in prefix.lengths if one <= shared), default=0)
        if 4 * used >= 3 * shared:
            return used
        others = (one.request.prompt for one in islice(self.waiting, WINDOW))
        common = [common_length(prefix.tokens, other) for other in others]
        length = min([shared, *(one for one in common if 4 * one >= 3 * shared)])
        prefix.lengths.append(length)
        return length


class Pace:
    """How many requests may join while the first one of an idle server runs.

    Prompts take a hundred times longer to read than a token takes to draw: if all that came at
    once joined at once, the first answer would wait for the last prompt.
    """

    def __init__(self, first: OpenRequest | None = None) -> None:
        self._first, self._steps, self._joining = first, 0, 1
        self._alone, self._credit = math.inf, 0.0

    def drop(self, request: OpenRequest) -> None:
        """Forget a request that failed."""
        if self._first is request:
            self._first = None

    def requests(self) -> int:
        """How many requests may join now."""
        if self._first is None:
            return WINDOW
        if not self._first.joined:
            return 1
        return self._joining if self._credit > 0 else 0

    def stepped(self, seconds: float, joined: int) -> None:
        """Take note of a step: how long it took, and how many rows joined in it."""
        if self._first is None or not self._first.joined:
            return
        if not joined:
            self._alone = min(self._alone, seconds)
            self._steps += 1
        if math.isfinite(self._alone):
            self._credit += PROMISE * self._alone - seconds
        self._joining = 2 * self._joining if joined and self._credit > 0 else 1
        done = len(self._first.samples) == self._first.request.num_samples
        if done or self._steps > PROMISED_TOKENS:
            self._first = None


@dataclass(frozen=True, eq=False)
class Prefix:
    """The tokens of a prompt's start and what each layer computed for them."""

    tokens: Ints
    layers: Sequence[KeyValues]
    # How much of it rows use: few lengths, so that many rows use the same.
    lengths: list[int] = field(default_factory=list)

    def cut(self, length: int) -> Sequence[KeyValues]:
        """The first tokens' keys and values, without a copy."""
        return [(key[:, :length], value[:, :length]) for key, value in self.layers]

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

    def __init__(self, most_bytes: int = 2 << 30) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[tuple[str, bytes], Prefix] = OrderedDict()
        self._recent: OrderedDict[tuple[str, bytes], deque[Ints]] = OrderedDict()

    def best(self, weights: str, prompt: Ints) -> tuple[Prefix | None, int]:
        """The cached prefix that shares most with a prompt, and how much it shares."""
        best, most = None, SHORTEST - 1
        for key, prefix in self._kept.items():
            if key[0] == weights and (shared := common_length(prefix.tokens, prompt)) > most:
                best, most = key, shared
        if best is None:
            return None, 0
        self._kept.move_to_end(best)
        return self._kept[best], most

    def repeated(self, weights: str, prompt: Ints, others: Sequence[Ints]) -> int:
        """How much a prompt shares with others, and with those seen a moment ago."""
        key = (weights, head(prompt))
        recent = self._recent.setdefault(key, deque(maxlen=RECENT_PROMPTS))
        self._recent.move_to_end(key)
        if len(self._recent) > MOST_HEADS:
            self._recent.popitem(last=False)
        # A request that still waits is looked at again: it must not be found to repeat itself.
        seen = [other for other in recent if other is not prompt]
        if len(seen) == len(recent):
            recent.append(prompt)
        return max((common_length(prompt, other) for other in [*others, *seen]), default=0)

    def keep(self, weights: str, prefix: Prefix) -> None:
        """Cache a prefix."""
        self._kept[weights, prefix.tokens.tobytes()] = prefix
        while len(self._kept) > 1 and (
            len(self._kept) > MOST_PREFIXES
            or sum(one.size for one in self._kept.values()) > self._most_bytes
        ):
            self._kept.popitem(last=False)

    def keeps(self, weights: str, prefix: Prefix) -> bool:
        """Whether a prefix is cached, rather than only used by rows that stand behind it."""
        return self._kept.get((weights, prefix.tokens.tobytes())) is prefix

    def forget(self, weights: str) -> None:
        """Drop all prefixes of weights that are gone."""
        for kept in (self._kept, self._recent):
            for key in [key for key in kept if key[0] == weights]:
                del kept[key]


class SampledWeights:
    """The versions of the weights that samples are drawn from, by their keys; `saved` says where.

    An adapter is read when it is needed, and read again when others took its place.
    """

    def __init__(self, base: LoadedModel, saved: Mapping[str, Path]) -> None:
        self._base, self._saved = base, saved
        self.prefixes = Prefixes(base.memory // 4)
        # The adapters in memory, least recently used first.
        self._loaded: OrderedDict[str, str] = OrderedDict()

    @cached_property
    def adapters(self) -> Adapters:
        """The adapters over the base: importing peft takes seconds, and the base needs none."""
        from .lora import Adapters

        return Adapters(self._base)

    def load(self, key: str, used: Collection[str]) -> bool:
        """Have the weights in memory; False while rows use as many others as there may be."""
        if key == BASE:
            return True
        if key not in self._loaded and len(self._loaded) >= MOST_SAMPLERS:
            gone = next((one for one in self._loaded if one not in used), None)
            if gone is None:
                return False
            self.adapters.drop(self._loaded.pop(gone))
            self.prefixes.forget(gone)
        if key not in self._loaded:
            if not self._saved[key].is_dir():
                raise MissingError(
                    f"the weights of this client were deleted: {key}; of unnamed ones the last "
                    f"{MOST_SNAPSHOTS} are kept, named ones (save_weights_for_sampler) until their "
                    "time is over"
                )
            self._loaded[key] = self.adapters.load(self._saved[key])
        self._loaded.move_to_end(key)
        return True

    def use(self, runs: Sequence[tuple[str, int]]) -> None:
        """Compute so many tokens of a pass with each of the weights, which are in memory."""
        if "adapters" in vars(self):
            self.adapters.sample(
                [(None if key == BASE else self._loaded[key], tokens) for key, tokens in runs]
            )

"""The weights that samples are drawn from, and what each has computed of prompts' beginnings."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .wire import Ints, MissingError

if TYPE_CHECKING:
    from .lora import Adapters
    from .model import AdapterLayout, LoadedModel
    from .prefix_attention import KeyValues

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
        found: tuple[Prefix | None, int] = (None, 0)
        for (owner, _), prefix in self._kept.items():
            if owner == weights:
                shared = common_length(prefix.tokens, prompt)
                if shared > found[1]:
                    found = (prefix, shared)
        return found if found[1] >= SHORTEST else (None, 0)

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

    def touch(self, weights: str, prefix: Prefix) -> None:
        """Mark a prefix as used."""
        key = (weights, prefix.tokens.tobytes())
        if key in self._kept:
            self._kept.move_to_end(key)

    def keeps(self, weights: str, prefix: Prefix) -> bool:
        """Whether a prefix is cached, rather than only used by rows that stand behind it."""
        return self._kept.get((weights, prefix.tokens.tobytes())) is prefix

    def forget(self, weights: str) -> None:
        """Drop all prefixes of weights that are gone."""
        for kept in (self._kept, self._recent):
            for key in [key for key in kept if key[0] == weights]:
                del kept[key]


@dataclass(frozen=True)
class SavedWeights:
    """Where an adapter that can be sampled lies, and its layout."""

    folder: Path
    lora: dict[str, Any] | AdapterLayout


class SampledWeights:
    """The versions of the weights that samples are drawn from, by their keys.

    An adapter is read when it is needed, and read again when others took its place.
    """

    def __init__(self, base: LoadedModel, saved: Mapping[str, SavedWeights]) -> None:
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
            self._loaded[key] = self._read(key)
        self._loaded.move_to_end(key)
        return True

    def use(self, runs: Sequence[tuple[str, int]]) -> None:
        """Compute so many tokens of a pass with each of the weights, which are in memory."""
        if "adapters" in vars(self):
            self.adapters.sample(
                [(None if key == BASE else self._loaded[key], tokens) for key, tokens in runs]
            )

    def _read(self, key: str) -> str:
        from .lora import LoraSpec

        saved = self._saved[key]
        if not saved.folder.is_dir():
            raise MissingError(
                f"the weights of this client were deleted: {key}; of unnamed ones the last "
                f"{MOST_SNAPSHOTS} are kept, named ones (save_weights_for_sampler) until their "
                "time is over"
            )
        layout = saved.lora
        spec = LoraSpec.read(layout) if isinstance(layout, dict) else layout
        return self.adapters.load(saved.folder, spec)

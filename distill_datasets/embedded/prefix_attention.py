"""Attention of rows of many lengths in one pass, which reads what they share once.

The tokens of a pass lie one after the other, without padding. A prompt of hundreds of tokens that
rows share would be copied into every row's keys and values. Here it exists once: the queries of
all rows attend to it in one large product, and to their own rows' tokens in small ones; the
softmaxes are joined by their normalisers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "distill_shared_prefix"
# Keys and values of a layer: (rows, tokens, heads, width), so that a token's lie side by side.
KeyValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class CacheShape:
    """What the keys and values of a model's tokens take."""

    layers: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device


class Slots:
    """The keys and values of rows of up to `width` tokens each, by layer."""

    def __init__(self, shape: CacheShape, width: int, rows: int = 0) -> None:
        self.shape, self.width, self.rows = shape, width, rows
        self.layers = [self._allocate(rows) for _ in range(shape.layers)]

    def _allocate(self, rows: int) -> KeyValues:
        one = self.shape
        sizes = (2, rows, self.width, one.heads, one.width)
        # Zeros: what is masked must still be a number.
        keys, values = torch.zeros(sizes, dtype=one.dtype, device=one.device)
        return keys, values

    def resize(self, rows: int, kept: int) -> None:
        """Have place for so many rows, of which the first `kept` stay as they are.

        Layer by layer, so that hardly more than one of them exists twice.
        """
        # Where memory ends amid them, all have place for as many rows as are counted.
        self.rows = min(rows, self.rows)
        for layer, old in enumerate(self.layers):
            self.layers[layer] = self._allocate(rows)
            for part, own in zip(self.layers[layer], old, strict=True):
                part[:kept] = own[:kept]
        self.rows = rows

    def copy(self, row: int, source: Slots, source_row: int, length: int) -> None:
        """Take over a row."""
        for own, other in zip(self.layers, source.layers, strict=True):
            for part, from_part in zip(own, other, strict=True):
                part[row, :length] = from_part[source_row, :length]

    def fill(self, layers: Sequence[KeyValues], length: int) -> None:
        """Begin the first row with the first tokens of a prefix."""
        for (keys, values), (own_keys, own_values) in zip(layers, self.layers, strict=True):
            own_keys[:1, :length], own_values[:1, :length] = keys[:, :length], values[:, :length]


class Segment(Protocol):
    """Tokens of a pass that stand side by side and attend alike."""

    size: int

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Keep the tokens' keys and values, and attend; all are (tokens, heads, width)."""


class NextTokens:
    """One token for each of the first rows of some slots, behind `lengths` tokens of its own."""

    def __init__(
        self, slots: Slots, lengths: Sequence[int], prefix: Sequence[KeyValues] | None
    ) -> None:
        self.size, self._slots, self._prefix = len(lengths), slots, prefix
        self._width = max(lengths) + 1
        device, dtype = slots.shape.device, slots.shape.dtype
        columns = torch.tensor(lengths, device=device)
        self._places = columns + torch.arange(self.size, device=device) * slots.width
        self._bias: Tensor | None = None
        if min(lengths) + 1 < self._width:
            unseen = torch.arange(self._width, device=device) > columns.unsqueeze(1)
            bias = torch.zeros(unseen.shape, dtype=dtype, device=device)
            self._bias = bias.masked_fill_(unseen, float("-inf"))[:, None, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Keep the tokens' keys and values, and attend."""
        rows, heads, width = query.shape
        kept = self._slots.layers[layer]
        for all_rows, new in zip(kept, (key, value), strict=True):
            all_rows.view(-1, *new.shape[1:]).index_copy_(0, self._places, new)
        near_key, near_value = (part[:rows, : self._width].transpose(1, 2) for part in kept)
        # The queries that share a key's head are its queries, so that no key is repeated.
        grouped = query.view(rows, key.shape[1], -1, width)
        out, norm = _attend_with_norm(grouped, near_key, near_value, scale, bias=self._bias)
        out = out.reshape(rows, heads, width)
        if self._prefix is not None:
            far = _attend_shared(query, *self._prefix[layer], scale)
            out, _ = _join((out, norm.reshape(rows, heads)), far)
        return out


class PromptTokens:
    """`lengths` tokens for each of the rows from `first` on, behind `past` of their own.

    `slots` None keeps nothing: nobody asks for the token after the next.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        prefix: Sequence[KeyValues] | None,
        slots: Slots | None,
        device: torch.device,
        *,
        first: int = 0,
        past: int = 0,
    ) -> None:
        self.size, self._rows, self._longest = sum(lengths), len(lengths), max(lengths)
        self._slots, self._first, self._prefix, self._past = slots, first, prefix, past
        self._spread: Tensor | None = None
        if min(lengths) < self._longest:
            # Padding stands behind: causality alone keeps it from any real token.
            counts = np.array(lengths)
            ends = counts.cumsum()
            inside = np.arange(self._longest) < counts[:, None]
            spread = (ends - counts)[:, None] + np.where(inside, np.arange(self._longest), 0)
            self._spread = torch.from_numpy(spread).to(device)
            self._packed = torch.from_numpy(np.flatnonzero(inside)).to(device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Keep the tokens' keys and values, and attend."""
        own = [self._pad(part) for part in (query, key, value)]
        if self._slots is not None:
            rows = slice(self._first, self._first + self._rows)
            columns = slice(self._past, self._past + self._longest)
            for kept, new in zip(self._slots.layers[layer], own[1:], strict=True):
                kept[rows, columns] = new
        groups = query.shape[1] // key.shape[1]
        near_query, near_key, near_value = (part.transpose(1, 2) for part in own)
        repeated = _repeat(near_key, groups), _repeat(near_value, groups)
        if self._prefix is None and not self._past:
            out = F.scaled_dot_product_attention(near_query, *repeated, is_causal=True, scale=scale)
            return self._unpad(out)
        out, norm = _attend_with_norm(near_query, *repeated, scale, causal=True)
        found = self._unpad(out), self._unpad(norm)
        if self._past and self._slots is not None:
            keys, values = (part[rows, : self._past] for part in self._slots.layers[layer])
            found = _join(found, _attend_shared(query, keys, values, scale))
        if self._prefix is not None:
            found = _join(found, _attend_shared(query, *self._prefix[layer], scale))
        return found[0]

    def _pad(self, part: Tensor) -> Tensor:
        if self._spread is None:
            return part.view(self._rows, self._longest, *part.shape[1:])
        return part[self._spread]

    def _unpad(self, part: Tensor) -> Tensor:
        """From (rows, heads, tokens, ...) to (tokens, heads, ...)."""
        flat = part.transpose(1, 2).flatten(0, 1)
        return flat if self._spread is None else flat[self._packed]


def register() -> str:
    """Make the attention known to transformers, and return its name."""
    AttentionInterface.register(NAME, attend)
    return NAME


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks, by the `segments` in the call's keywords; causal without."""
    scale, segments = options["scaling"], options.get("segments")
    if segments is None:
        groups = query.shape[1] // key.shape[1]
        key, value = _repeat(key, groups), _repeat(value, groups)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        return out.transpose(1, 2).contiguous(), None
    layer: int = module.layer_idx  # type: ignore[assignment]
    parts = [part[0].transpose(0, 1).contiguous() for part in (query, key, value)]
    found, start = [], 0
    for segment in segments:
        own = (part[start : start + segment.size] for part in parts)
        found.append(segment.attend(layer, *own, scale))
        start += segment.size
    return (torch.cat(found) if len(found) > 1 else found[0]).unsqueeze(0), None


def _repeat(part: Tensor, groups: int) -> Tensor:
    """Give every query head its key/value head."""
    return part if groups == 1 else part.repeat_interleave(groups, dim=1)


def _join(near: KeyValues, far: KeyValues) -> KeyValues:
    """The softmax over both, from the outputs and normalisers over each."""
    (out, norm), (far_out, far_norm) = near, far
    share = torch.sigmoid(far_norm - norm).unsqueeze(-1).to(out.dtype)
    return torch.lerp(out, far_out, share), torch.logaddexp(norm, far_norm)


def _attend_shared(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> KeyValues:
    """Attend to keys that all queries see: they are folded into one long row."""
    tokens, heads, width = query.shape
    kept = keys.shape[2]
    folded = query.view(tokens, kept, -1, width).transpose(0, 1).reshape(1, kept, -1, width)
    out, norm = _attend_with_norm(folded, keys.transpose(1, 2), values.transpose(1, 2), scale)
    out = out.reshape(kept, tokens, -1, width).transpose(0, 1).reshape(tokens, heads, width)
    return out, norm.reshape(kept, tokens, -1).transpose(0, 1).reshape(tokens, heads)


def _attend_with_norm(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
) -> KeyValues:
    """Softmax attention and the log of its normaliser, which public torch does not return."""
    if query.device.type == "cpu":
        out, norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=scale
        )
        return out, norm
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if bias is not None:
        scores = scores + bias
    if causal:
        ones = scores.new_ones(scores.shape[-2:], dtype=torch.bool)
        scores = scores.masked_fill(~ones.tril(), float("-inf"))
    norm = scores.logsumexp(dim=-1)
    return (scores - norm.unsqueeze(-1)).exp().to(value.dtype) @ value, norm

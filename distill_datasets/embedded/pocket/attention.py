"""Exact attention for training on one CPU core, where many suffixes share a prefix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Queries per block of causal attention: blocks skip most keys that lie in the future.
BLOCK = 256
# Rows of scores computed at once: with 768 keys in bfloat16 they fill about 1 MB of cache.
CACHED_ROWS = 640


@dataclass(frozen=True)
class Heads:
    """Queries (rows, key heads, group * time, size), keys and values (rows, key heads, time, size).

    The group is the query heads that share a key head.
    """

    query: Tensor
    key: Tensor
    value: Tensor


def attend(heads: Heads, shared: Heads | None = None, present_PT: Tensor | None = None) -> Tensor:
    """Attend to the causal past, and before it to the `present` positions of a shared prefix.

    Scores are bounded, because queries and keys are normalised, so the softmax needs no running
    maximum: it is a sum of exponentials, which prefix and past add to separately. A column of
    ones behind the values makes that sum come out of the same product. On one CPU core this is
    four times as fast, forward and backward, as `scaled_dot_product_attention` with a mask.
    """
    rows, size = len(heads.query), heads.query.shape[-1]
    total = _causal_mass(heads, chunk=1 if shared is None else rows // len(shared.key))
    if shared is not None and present_PT is not None:
        total = total + _prefix_mass(heads.query, shared, present_PT)
    return total[..., :size] / total[..., size:]


def _causal_mass(heads: Heads, *, chunk: int) -> Tensor:
    """Return what the causal past adds to numerator and denominator, `chunk` rows at a time."""
    time = heads.key.shape[2]
    # Added inside the product, minus infinity costs no pass of its own.
    future = torch.full((time, time), -torch.inf, dtype=heads.key.dtype).triu(1)
    parts = (heads.query, heads.key, _with_ones(heads.value))
    return torch.cat(
        [
            _causal_block(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), future)
            for q, k, v in zip(*(torch.split(part, chunk) for part in parts), strict=True)
        ]
    ).view(*heads.query.shape[:3], -1)


def _causal_block(query: Tensor, key: Tensor, value: Tensor, future: Tensor) -> Tensor:
    """Do `_causal_mass` for some rows; later queries read more keys than earlier ones."""
    time = key.shape[1]
    query = torch.unflatten(query, 1, (-1, time))
    blocks = []
    for start in range(0, time, BLOCK):
        end = min(start + BLOCK, time)
        part = query[:, :, start:end].flatten(1, 2)
        bias = future[start:end, :end].repeat(query.shape[1], 1)
        scores = torch.baddbmm(bias, part, key[:, :end].mT).exp()
        mass = scores @ value[:, :end]
        blocks.append(torch.unflatten(mass, 1, (-1, end - start)))
    return torch.cat(blocks, dim=2).flatten(1, 2)


def _prefix_mass(query: Tensor, shared: Heads, present_PT: Tensor) -> Tensor:
    """Return what the prefix adds to the numerator and to the denominator of the softmax."""
    prefixes, key_heads = shared.key.shape[:2]
    value = (_with_ones(shared.value) * present_PT[:, None, :, None]).flatten(0, 1)
    grouped = torch.unflatten(query, 0, (prefixes, -1)).transpose(1, 2)
    mass = []
    for q, k, v in zip(grouped.flatten(0, 1), shared.key.flatten(0, 1), value, strict=True):
        parts = torch.split(q.flatten(0, 1), CACHED_ROWS)
        mass.append(torch.cat([(part @ k.mT).exp() @ v for part in parts]))
    split = torch.stack(mass).view(prefixes, key_heads, -1, query.shape[2], value.shape[-1])
    return split.transpose(1, 2).flatten(0, 1)


def _with_ones(value: Tensor) -> Tensor:
    return torch.cat((value, torch.ones_like(value[..., :1])), dim=-1)

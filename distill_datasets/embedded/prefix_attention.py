"""Attention in which all rows of a batch share one cached prefix.

A prompt of hundreds of tokens repeated over a batch would be copied into every row's cache.
Here its keys and values exist once: every query attends to them in one large product, and to
its own row's suffix in a small one; the two softmaxes are joined by their normalisers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "distill_shared_prefix"
KeyValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AttentionPlan:
    """What the rows of a batch may attend to beyond plain causality.

    `mask` is (rows, 1, queries, keys), True where a query sees a key of its own suffix, None
    for plain causality; `prefix` holds (1, heads, length, width) keys and values for each
    layer, seen by all.
    """

    mask: Tensor | None = None
    prefix: Sequence[KeyValues] | None = None


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
    """Attend as transformers asks, by the `plan` in the call's keywords; causal without one."""
    scale, plan = options["scaling"], options.get("plan")
    groups = query.shape[1] // key.shape[1]
    key, value = _repeat(key, groups), _repeat(value, groups)
    if plan is None or plan.prefix is None:
        mask = None if plan is None else plan.mask
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    else:
        layer: int = module.layer_idx  # type: ignore[assignment]
        far_key, far_value = (_repeat(part, groups) for part in plan.prefix[layer])
        far, far_norm = _attend_prefix(query, far_key, far_value, scale)
        near, near_norm = _attend_suffix(query, key, value, plan.mask, scale)
        share = torch.sigmoid(far_norm - near_norm).unsqueeze(-1)
        out = (near + share * (far - near)).to(query.dtype)
    return out.transpose(1, 2).contiguous(), None


def _repeat(part: Tensor, groups: int) -> Tensor:
    """Give every query head its key/value head."""
    return part if groups == 1 else part.repeat_interleave(groups, dim=1)


def _attend_prefix(query: Tensor, key: Tensor, value: Tensor, scale: float) -> KeyValues:
    """Attend to the shared keys: the rows are folded into one long sequence of queries."""
    rows, heads, length, width = query.shape
    folded = query.transpose(0, 1).reshape(1, heads, rows * length, width)
    out, norm = _attend_with_norm(folded, key, value, None, scale)
    out = out.reshape(heads, rows, length, width).transpose(0, 1)
    return out, norm.reshape(heads, rows, length).transpose(0, 1)


def _attend_suffix(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> KeyValues:
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()
    bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    return _attend_with_norm(query, key, value, bias, scale)


def _attend_with_norm(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> KeyValues:
    """Softmax attention and the log of its normaliser, which public torch does not return."""
    if query.device.type == "cpu":
        out, norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=bias, scale=scale
        )
        return out, norm
    scores = query @ key.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias
    return torch.softmax(scores, dim=-1) @ value, torch.logsumexp(scores, dim=-1)

"""From logits to a token: greedy, or drawn by temperature, top-k and top-p."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass
class Choosers:
    """How each row of a batch picks its tokens; `uniforms` drives the draws, step by step."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    uniforms: Tensor

    def select(self, rows: Tensor) -> Choosers:
        """Keep some rows."""
        return Choosers(
            self.temperature[rows], self.top_k[rows], self.top_p[rows], self.uniforms[rows]
        )


def uniforms(seed: int, sample: int, count: int) -> NDArray[np.float64]:
    """Random numbers of one sample: the same for a seed and index in whatever batch they run."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, sample])).random(count)


def choose(logits: Tensor, choosers: Choosers, step: int) -> Tensor:
    """Pick one token per row."""
    tokens = logits.argmax(dim=-1)
    drawn = (choosers.temperature > 0).nonzero().squeeze(-1)
    if len(drawn):
        some = choosers.select(drawn)
        # Scaling and sums in float64 keep a draw at a boundary from depending on the batch.
        weights = torch.softmax(logits[drawn].double() / some.temperature.unsqueeze(-1), dim=-1)
        filtered = ((some.top_k > 0) | (some.top_p < 1)).nonzero().squeeze(-1)
        if len(filtered):
            weights[filtered] = _keep_top(weights[filtered], some.select(filtered))
        tokens[drawn] = _draw(weights, some.uniforms[:, step])
    return tokens


def _keep_top(weights: Tensor, choosers: Choosers) -> Tensor:
    """Zero what top-k and then top-p leave out."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    size = ordered.shape[-1]
    limit = torch.where(choosers.top_k > 0, choosers.top_k.clamp(max=size), size)
    ranks = torch.arange(size, device=weights.device)
    ordered = ordered.masked_fill(ranks >= limit.unsqueeze(-1), 0.0)
    ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    before = ordered.cumsum(dim=-1) - ordered
    ordered = ordered.masked_fill(before >= choosers.top_p.unsqueeze(-1), 0.0)
    return torch.zeros_like(weights).scatter(-1, order, ordered)


def _draw(weights: Tensor, numbers: Tensor) -> Tensor:
    """Invert the cumulative distribution at one uniform number per row."""
    totals = weights.cumsum(dim=-1)
    found = torch.searchsorted(totals, (numbers * totals[:, -1]).unsqueeze(-1), right=True)
    # Rounding may land beyond the last token with any weight.
    last = (totals < totals[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(found, last).squeeze(-1)

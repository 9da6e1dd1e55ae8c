"""How a token is chosen from logits: greedily, or drawn by temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .wire import SampleRequest


def uniforms(seed: int, sample: int, count: int) -> NDArray[np.float64]:
    """Random numbers of one sample: the same for a seed and index in whatever batch they run."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, sample])).random(count)


def penalize(logits: Tensor, asked: SampleRequest, tokens: Sequence[int]) -> None:
    """Lower the logits of a sample's own tokens, by OpenAI's documented formula."""
    if tokens and asked.penalized:
        ids, counts = np.unique(tokens, return_counts=True)
        lost = torch.from_numpy(counts * asked.frequency_penalty + asked.presence_penalty)
        logits[torch.from_numpy(ids).to(logits.device)] -= lost.to(logits)


def choose(logits: Tensor, requests: Sequence[SampleRequest], numbers: Sequence[float]) -> Tensor:
    """Pick a token for each row of logits."""
    tokens = logits.argmax(dim=-1)
    rows = [index for index, one in enumerate(requests) if one.temperature > 0]
    if rows:
        asked = [(requests[row], numbers[row]) for row in rows]
        settings = torch.tensor(
            [(one.temperature, one.top_k, one.top_p, number) for one, number in asked],
            dtype=torch.float64,
            device=logits.device,
        )
        index = torch.tensor(rows, device=logits.device)
        tokens[index] = _draw(logits[index], *settings.unbind(1))
    return tokens


def _draw(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, drawn: Tensor
) -> Tensor:
    # Scaling and sums in float64 keep a draw at a boundary from depending on the batch.
    weights = torch.softmax(logits.double() / temperature.unsqueeze(-1), dim=-1)
    filtered = ((top_k > 0) | (top_p < 1)).nonzero().squeeze(-1)
    if len(filtered):
        weights[filtered] = _keep_top(weights[filtered], top_k[filtered], top_p[filtered])
    return _invert(weights, drawn)


def _keep_top(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Zero what top-k and then top-p leave out."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    limit = torch.where(top_k > 0, top_k, ordered.shape[-1])
    ranks = torch.arange(ordered.shape[-1], device=weights.device)
    ordered = ordered.masked_fill(ranks >= limit.unsqueeze(-1), 0.0)
    ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    before = ordered.cumsum(dim=-1) - ordered
    ordered = ordered.masked_fill(before >= top_p.unsqueeze(-1), 0.0)
    return torch.zeros_like(weights).scatter(-1, order, ordered)


def _invert(weights: Tensor, numbers: Tensor) -> Tensor:
    """Invert the cumulative distribution at one uniform number per row."""
    totals = weights.cumsum(dim=-1)
    found = torch.searchsorted(totals, (numbers * totals[:, -1]).unsqueeze(-1), right=True)
    # Rounding may land beyond the last token with any weight.
    last = (totals < totals[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(found, last).squeeze(-1)

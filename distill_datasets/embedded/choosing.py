"""How a token is chosen from logits: greedily, or drawn by temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .wire import SampleRequest


@dataclass
class RowSettings:
    """How some rows pick a token; the draw of each is driven by a number in [0, 1)."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    numbers: Tensor

    def select(self, rows: Tensor) -> RowSettings:
        """Keep some rows."""
        return RowSettings(
            self.temperature[rows], self.top_k[rows], self.top_p[rows], self.numbers[rows]
        )

    def to(self, device: torch.device) -> RowSettings:
        """The same on a device."""
        parts = (self.temperature, self.top_k, self.top_p, self.numbers)
        return RowSettings(*(part.to(device) for part in parts))


def uniforms(seed: int, sample: int, count: int) -> NDArray[np.float64]:
    """Random numbers of one sample: the same for a seed and index in whatever batch they run."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, sample])).random(count)


def choose(logits: Tensor, requests: Sequence[SampleRequest], numbers: Sequence[float]) -> Tensor:
    """Pick a token for each row of logits."""
    tokens = logits.argmax(dim=-1)
    rows = [index for index, one in enumerate(requests) if one.temperature > 0]
    if rows:
        drawn = [(requests[index], numbers[index]) for index in rows]
        settings = RowSettings(
            torch.tensor([one.temperature for one, _ in drawn], dtype=torch.float64),
            torch.tensor([one.top_k for one, _ in drawn]),
            torch.tensor([one.top_p for one, _ in drawn], dtype=torch.float64),
            torch.tensor([number for _, number in drawn], dtype=torch.float64),
        ).to(logits.device)
        index = torch.tensor(rows, device=logits.device)
        tokens[index] = _draw(logits[index], settings)
    return tokens


def _draw(logits: Tensor, settings: RowSettings) -> Tensor:
    # Scaling and sums in float64 keep a draw at a boundary from depending on the batch.
    weights = torch.softmax(logits.double() / settings.temperature.unsqueeze(-1), dim=-1)
    filtered = ((settings.top_k > 0) | (settings.top_p < 1)).nonzero().squeeze(-1)
    if len(filtered):
        weights[filtered] = _keep_top(weights[filtered], settings.select(filtered))
    return _invert(weights, settings.numbers)


def _keep_top(weights: Tensor, settings: RowSettings) -> Tensor:
    """Zero what top-k and then top-p leave out."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    size = ordered.shape[-1]
    limit = torch.where(settings.top_k > 0, settings.top_k.clamp(max=size), size)
    ranks = torch.arange(size, device=weights.device)
    ordered = ordered.masked_fill(ranks >= limit.unsqueeze(-1), 0.0)
    ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    before = ordered.cumsum(dim=-1) - ordered
    ordered = ordered.masked_fill(before >= settings.top_p.unsqueeze(-1), 0.0)
    return torch.zeros_like(weights).scatter(-1, order, ordered)


def _invert(weights: Tensor, numbers: Tensor) -> Tensor:
    """Invert the cumulative distribution at one uniform number per row."""
    totals = weights.cumsum(dim=-1)
    found = torch.searchsorted(totals, (numbers * totals[:, -1]).unsqueeze(-1), right=True)
    # Rounding may land beyond the last token with any weight.
    last = (totals < totals[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(found, last).squeeze(-1)

"""How likely a prompt's own tokens are, for the requests of a batch that ask for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .sample_wire import SampleRequest, Scores
from .wire import Array, Ints

# Logits that exist at once: few enough that they are still in a core's cache when they are
# read again.
MOST_LOGITS = 1 << 20
# From hidden states to logits.
Project = Callable[[Tensor], Tensor]


def score(
    requests: Sequence[SampleRequest], rows: Sequence[int], hidden: Tensor, project: Project
) -> list[Scores]:
    """What each request asked for, from the last layer's states of the prompts.

    `rows` says in which row a request's prompt stands, aligned at its end. Only the states
    before scored tokens are projected to logits, those of all requests together.
    """
    if not any(one.scoring.asked for one in requests):
        return [Scores()] * len(requests)
    reaches = [one.scoring.reach(len(one.prompt)) for one in requests]
    last = hidden.shape[1] - 1
    before = [hidden[row, last - reach : last] for row, reach in zip(rows, reaches, strict=True)]
    ids = torch.from_numpy(_wanted(requests, reaches)).to(hidden.device)
    found = _look_up(torch.cat(before), ids, max(one.scoring.top for one in requests), project)
    ends = np.cumsum(reaches)
    return [
        _told(request, *(array[end - reach : end] for array in found))
        for request, reach, end in zip(requests, reaches, ends, strict=True)
    ]


def _wanted(requests: Sequence[SampleRequest], reaches: Sequence[int]) -> Ints:
    """The ids to look up at each position: the prompt's own, then the targets."""
    targets = [one.scoring.targets for one in requests]
    most = max((one.ids.shape[1] for one in targets if one is not None), default=0)
    ids = np.zeros((sum(reaches), 1 + most), np.int64)
    end = 0
    for request, reach in zip(requests, reaches, strict=True):
        part = ids[end : end + reach]
        end += reach
        part[:, 0] = request.prompt[len(request.prompt) - reach :]
        if request.scoring.targets is not None:
            named = request.scoring.targets.ids
            part[:, 1 : 1 + named.shape[1]] = named[len(named) - reach :].clip(min=0)
    return ids


def _look_up(states: Tensor, ids: Tensor, most: int, project: Project) -> list[Array]:
    """Logprobs of the ids; the likeliest ids and their logprobs; each a row per state."""
    vocabulary = project(states[:1]).shape[-1]
    size = max(1, MOST_LOGITS // vocabulary)
    found = []
    for start in range(0, len(states), size):
        logits = project(states[start : start + size]).float()
        norm = logits.logsumexp(dim=-1, keepdim=True)
        top = logits.topk(min(most, vocabulary), dim=-1)
        named = logits.gather(1, ids[start : start + size]) - norm
        found.append((named, top.indices, top.values - norm))
    return [torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True)]


def _told(request: SampleRequest, named: Array, top_ids: Array, top_logprobs: Array) -> Scores:
    """Cut what was found for all requests to what one of them asked for."""
    scoring = request.scoring
    own = slice(len(named) - scoring.own(len(request.prompt)), None)
    columns = 0 if scoring.targets is None else scoring.targets.ids.shape[1]
    return Scores(
        named[own, 0] if scoring.logprobs else None,
        (top_ids[own, : scoring.top], top_logprobs[own, : scoring.top]) if scoring.top else None,
        named[:, 1 : 1 + columns] if columns else None,
    )

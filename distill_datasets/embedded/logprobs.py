"""How likely the tokens of prompts are, for the requests that ask for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from .wire import Array, Ints, PromptScores, SampleRequest

# From hidden states to logits.
Project = Callable[[Tensor], Tensor]
# Logits that exist at once: few enough that they are still in a core's cache when they are
# read again.
MOST_LOGITS = 1 << 20


def score(
    requests: Sequence[SampleRequest], states: Sequence[Tensor], project: Project
) -> list[PromptScores]:
    """What each request asked for, from the last layer's states before its scored tokens.

    Only these are projected to logits; those of requests that ask for about as much, together.
    """
    found: list[PromptScores] = [PromptScores()] * len(requests)
    order = sorted(range(len(requests)), key=lambda index: _asked(requests[index]))
    for _, same in groupby(order, key=lambda index: _asked(requests[index])):
        alike = list(same)
        scores = _score_alike(
            [requests[index] for index in alike], [states[index] for index in alike], project
        )
        for index, one in zip(alike, scores, strict=True):
            found[index] = one
    return found


def _asked(request: SampleRequest) -> tuple[int, int]:
    """How much is asked at each token: the likeliest, and the targets to a power of two."""
    targets = request.scoring.targets
    return request.scoring.top, 0 if targets is None else targets.ids.shape[1].bit_length()


def _score_alike(
    requests: Sequence[SampleRequest], states: Sequence[Tensor], project: Project
) -> list[PromptScores]:
    reaches = [len(before) for before in states]
    ids = torch.from_numpy(_wanted(requests, reaches)).to(states[0].device)
    found = _look_up(torch.cat(list(states)), ids, requests[0].scoring.top, project)
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
    found, start, size = [], 0, 1
    while start < len(states):
        logits = project(states[start : start + size]).float()
        vocabulary = logits.shape[1]
        norm = logits.logsumexp(dim=-1, keepdim=True)
        top = logits.topk(min(most, vocabulary), dim=-1)
        named = logits.gather(1, ids[start : start + size]) - norm
        found.append((named, top.indices, top.values - norm))
        start += size
        size = max(1, MOST_LOGITS // vocabulary)
    return [torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True)]


def _told(
    request: SampleRequest, named: Array, top_ids: Array, top_logprobs: Array
) -> PromptScores:
    """Cut what was found for all requests to what one of them asked for."""
    scoring = request.scoring
    own = slice(len(named) - scoring.own(len(request.prompt)), None)
    columns = 0 if scoring.targets is None else scoring.targets.ids.shape[1]
    return PromptScores(
        named[own, 0] if scoring.logprobs else None,
        (top_ids[own, : scoring.top], top_logprobs[own, : scoring.top]) if scoring.top else None,
        named[:, 1 : 1 + columns] if columns else None,
    )

"""Batched sampling: one pass over the prompts, then one token per row and step.

Tokens are greedy, or drawn by temperature, top-k and top-p. The pass over the prompts also tells
how likely their own tokens are, for the requests that ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from .model import LoadedModel
from .prefix_attention import AttentionPlan, KeyValues
from .scheduler import Constraint, Prefix, SampleJob, Watch
from .wire import (
    MOST_SCORES,
    Array,
    DrawnSample,
    Ints,
    InvalidRequestError,
    PromptScores,
    SampleRequest,
    SampleResult,
)

Finish = Callable[[int, SampleResult], None]
# From hidden states to logits.
Project = Callable[[Tensor], Tensor]
# Logits that exist at once: few enough that they are still in a core's cache when they are
# read again.
MOST_LOGITS = 1 << 20
# Memory per logit while a token is drawn: float64 and several copies.
LOGIT_BYTES = 40


@dataclass
class RowSettings:
    """How each row of a batch picks its tokens; `uniforms` drives the draws, step by step."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    uniforms: Tensor

    def select(self, rows: Tensor) -> RowSettings:
        """Keep some rows."""
        return RowSettings(
            self.temperature[rows], self.top_k[rows], self.top_p[rows], self.uniforms[rows]
        )


def uniforms(seed: int, sample: int, count: int) -> NDArray[np.float64]:
    """Random numbers of one sample: the same for a seed and index in whatever batch they run."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, sample])).random(count)


def choose(logits: Tensor, settings: RowSettings, step: int) -> Tensor:
    """Pick one token per row."""
    tokens = logits.argmax(dim=-1)
    drawn = (settings.temperature > 0).nonzero().squeeze(-1)
    if len(drawn):
        some = settings.select(drawn)
        # Scaling and sums in float64 keep a draw at a boundary from depending on the batch.
        weights = torch.softmax(logits[drawn].double() / some.temperature.unsqueeze(-1), dim=-1)
        filtered = ((some.top_k > 0) | (some.top_p < 1)).nonzero().squeeze(-1)
        if len(filtered):
            weights[filtered] = _keep_top(weights[filtered], some.select(filtered))
        tokens[drawn] = _draw(weights, some.uniforms[:, step])
    return tokens


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


def _draw(weights: Tensor, numbers: Tensor) -> Tensor:
    """Invert the cumulative distribution at one uniform number per row."""
    totals = weights.cumsum(dim=-1)
    found = torch.searchsorted(totals, (numbers * totals[:, -1]).unsqueeze(-1), right=True)
    # Rounding may land beyond the last token with any weight.
    last = (totals < totals[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(found, last).squeeze(-1)


def check_context(request: SampleRequest, base: LoadedModel) -> None:
    """Refuse a request that model or memory can't hold, before it reaches a batch."""
    length, most = len(request.prompt), base.card.max_context
    asked = 1 if request.max_tokens is None else request.max_tokens
    if length + asked > most:
        raise InvalidRequestError(
            f"expected prompt and max_tokens within the context of {most} tokens; found "
            f"{length} prompt tokens and max_tokens={asked}, together {length + asked}: "
            "shorten the prompt or lower max_tokens"
        )
    require_tokens(request.prompt, base, "prompt")
    if (targets := request.scoring.targets) is not None:
        require_tokens(targets.ids[targets.ids >= 0], base, "target")
        if targets.ids.shape[1] > base.vocabulary:
            raise InvalidRequestError(
                f"expected at most {base.vocabulary} targets a position, the vocabulary; found "
                f"{targets.ids.shape[1]}"
            )
    drawn = request.num_samples * _limit(request, base)
    scored = min(request.scoring.top, base.vocabulary) * request.scoring.own(length)
    scores = max(scored, min(request.top_logprobs, base.vocabulary) * drawn)
    if scores > MOST_SCORES:
        raise InvalidRequestError(
            f"expected at most {MOST_SCORES} of the likeliest tokens in a response; found "
            f"{scores}: ask for fewer per position, or for fewer positions"
        )
    _require_memory(request.num_samples, length, drawn, base)


def _require_memory(rows: int, length: int, drawn: int, base: LoadedModel) -> None:
    needed = base.token_bytes * (rows * length + drawn) + LOGIT_BYTES * rows * base.vocabulary
    if needed > base.memory:
        raise InvalidRequestError(
            f"expected samples that fit into {base.memory >> 20} MiB of memory; found {rows} of "
            f"a prompt of {length} tokens, which may take {needed >> 20} MiB: lower num_samples "
            "or max_tokens"
        )


def require_tokens(tokens: Ints, base: LoadedModel, name: str) -> None:
    """Refuse token ids that the model has no embedding for."""
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < base.vocabulary:
        raise InvalidRequestError(
            f"expected {name} token ids in 0..{base.vocabulary - 1}; found "
            f"{int(tokens.min())}..{int(tokens.max())}: tokenize with the model's own tokenizer"
        )


@torch.inference_mode()
def compute_prefix(base: LoadedModel, tokens: Ints) -> Prefix:
    """Run the model over tokens that prompts share, and keep what each layer computed."""
    cache = DynamicCache()
    ids = torch.from_numpy(tokens).to(base.device).unsqueeze(0)
    base.network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers: list[Any] = cache.layers
    return Prefix(tokens, [(layer.keys, layer.values) for layer in layers])


@dataclass
class _OpenSample:
    """One sample in the making."""

    owner: int
    index: int
    request: SampleRequest
    limit: int
    ends: frozenset[int]
    watch: Watch | None
    constraint: Constraint | None
    drawn: DrawnSample = field(default_factory=lambda: DrawnSample([], [], [], False))

    def add(self, token: int, logprob: float, base: LoadedModel) -> bool:
        """Append a token; True when the sample is complete."""
        self.drawn.tokens.append(token)
        self.drawn.logprobs.append(logprob)
        if self.constraint is not None:
            self.constraint.accept(token)
        if self.watch is not None and not self.watch(self.index, token, logprob):
            return True
        self.drawn.stopped = token in self.ends or self._at_stop_text(base)
        return self.drawn.stopped or len(self.drawn.tokens) >= self.limit

    def _at_stop_text(self, base: LoadedModel) -> bool:
        texts = [text for text in self.request.stop or () if isinstance(text, str)]
        if not texts:
            return False
        # A token holds at least one byte, so that a stop text can't reach further back.
        reach = max(len(text.encode()) for text in texts) + 4
        tail = base.tokenizer.decode(self.drawn.tokens[-reach:], skip_special_tokens=False)
        return any(text in tail for text in texts)


def _ends(request: SampleRequest, base: LoadedModel) -> frozenset[int]:
    if request.stop is None:
        return base.end_tokens
    return frozenset(item for item in request.stop if isinstance(item, int))


class _Decoding:
    """The tensors of a batch while it decodes; rows leave as their samples are complete."""

    def __init__(
        self,
        base: LoadedModel,
        jobs: Sequence[SampleJob],
        shared: Sequence[KeyValues] | None,
    ) -> None:
        self.base, self.shared = base, shared
        self.offset = shared[0][0].shape[2] if shared else 0
        self.rows = [
            _OpenSample(
                owner,
                index,
                job.request,
                _limit(job.request, base),
                _ends(job.request, base),
                job.watch,
                None if job.constrain is None else job.constrain(),
            )
            for owner, job in enumerate(jobs)
            for index in range(job.request.num_samples)
        ]
        self.live = list(range(len(self.rows)))
        counts = [job.request.num_samples for job in jobs]
        self.firsts = [end - count for end, count in zip(accumulate(counts), counts, strict=True)]
        self.settings = _settings(self.rows, base.device)
        self.cache = DynamicCache()
        self.seen, self.position = torch.empty(0), torch.empty(0)

    def read_prompts(self) -> Tensor:
        """Run over the prompts behind the shared prefix; the last layer's states."""
        suffixes = [row.request.prompt[self.offset :] for row in self.rows]
        width = max(len(suffix) for suffix in suffixes)
        ids = np.zeros((len(suffixes), width), np.int64)
        seen = np.zeros((len(suffixes), width), bool)
        for index, suffix in enumerate(suffixes):
            ids[index, width - len(suffix) :] = suffix
            seen[index, width - len(suffix) :] = True
        self.seen = torch.from_numpy(seen).to(self.base.device)
        position = self.offset + (self.seen.cumsum(dim=1) - 1).clamp(min=0)
        self.position = position[:, -1]
        mask = None if seen.all() else self._prompt_mask()
        return self._forward(torch.from_numpy(ids).to(self.base.device), position, mask)

    def _prompt_mask(self) -> Tensor:
        ones = self.seen.new_ones(self.seen.shape[1], self.seen.shape[1])
        # Padding sees itself: a softmax over nothing is not a number.
        itself = torch.eye(len(ones), dtype=torch.bool, device=ones.device)
        return (ones.tril() & self.seen.unsqueeze(1) | itself).unsqueeze(1)

    def read_tokens(self, tokens: Tensor) -> Tensor:
        """Run over the tokens just drawn; logits of the next."""
        self.position = self.position + 1
        self.seen = torch.cat([self.seen, self.seen.new_ones(len(tokens), 1)], dim=1)
        mask = self.seen[:, None, None]
        return self.project(
            self._forward(tokens.unsqueeze(1), self.position.unsqueeze(1), mask)[:, -1]
        )

    def _forward(self, ids: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        out = self.base.network.base_model(
            input_ids=ids,
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
            plan=AttentionPlan(mask, self.shared),
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def project(self, hidden: Tensor) -> Tensor:
        """The logits of hidden states."""
        network: Any = self.base.network
        logits: Tensor = network.get_output_embeddings()(hidden)
        return logits

    def allow(self, logits: Tensor) -> Tensor:
        """The logits with what a row's constraint forbids left out."""
        rows = [(at, self.rows[index].constraint) for at, index in enumerate(self.live)]
        bound = [(at, one.allowed()) for at, one in rows if one is not None]
        if not bound:
            return logits
        if not all(allowed.any() for _, allowed in bound):
            raise InvalidRequestError("expected a constraint that allows a token; found none")
        index = torch.tensor([at for at, _ in bound], device=logits.device)
        mask = torch.from_numpy(np.stack([allowed for _, allowed in bound])).to(logits.device)
        left = logits[index].masked_fill(~mask, float("-inf"))
        return logits.index_copy(0, index, left)

    def samples(self, owner: int) -> list[DrawnSample]:
        """What was drawn for one request."""
        return [row.drawn for row in self.rows if row.owner == owner]

    def keep_rows(self, kept: list[int]) -> Tensor:
        """Go on with some of the rows only; returns their indices."""
        self.live = [self.live[row] for row in kept]
        index = torch.tensor(kept, dtype=torch.long, device=self.base.device)
        self.settings = self.settings.select(index)
        self.seen, self.position = self.seen[index], self.position[index]
        self.cache.batch_select_indices(index)
        return index


def _limit(request: SampleRequest, base: LoadedModel) -> int:
    return request.max_tokens or base.card.max_context - len(request.prompt)


def _settings(rows: Sequence[_OpenSample], device: torch.device) -> RowSettings:
    drawn = [row.limit for row in rows if row.request.temperature > 0]
    numbers = np.zeros((len(rows), max(drawn, default=0)))
    for index, row in enumerate(rows):
        if row.request.temperature > 0:
            numbers[index, : row.limit] = uniforms(row.request.seed, row.index, row.limit)
    requests = [row.request for row in rows]
    return RowSettings(
        torch.tensor([one.temperature for one in requests], dtype=torch.float64, device=device),
        torch.tensor([one.top_k for one in requests], device=device),
        torch.tensor([one.top_p for one in requests], dtype=torch.float64, device=device),
        torch.from_numpy(numbers).to(device),
    )


@torch.inference_mode()
def decode(
    base: LoadedModel,
    jobs: Sequence[SampleJob],
    shared: Sequence[KeyValues] | None,
    done: Finish,
) -> None:
    """Sample for all requests with the active adapter; `done` is called as each is complete."""
    run, requests = _Decoding(base, jobs, shared), [job.request for job in jobs]
    hidden = run.read_prompts()
    scores = score(requests, run.firsts, hidden, run.project)
    logits = run.project(hidden[:, -1])
    waiting = [request.num_samples for request in requests]
    step = 0
    while run.live:
        tokens = choose(run.allow(logits), run.settings, step)
        over = _record(run, logits, tokens)
        for row in over:
            owner = run.rows[run.live[row]].owner
            waiting[owner] -= 1
            if not waiting[owner]:
                done(owner, SampleResult(run.samples(owner), scores[owner], run.offset))
        if over:
            tokens = tokens[run.keep_rows([row for row in range(len(run.live)) if row not in over])]
        if run.live:
            logits = run.read_tokens(tokens)
        step += 1


def _record(run: _Decoding, logits: Tensor, tokens: Tensor) -> set[int]:
    """Add one token to every row; returns the rows that are complete."""
    values = torch.log_softmax(logits.float(), dim=-1)
    logprobs = values.gather(1, tokens.unsqueeze(1)).squeeze(1).tolist()
    rows = [run.rows[index] for index in run.live]
    most = max(row.request.top_logprobs for row in rows)
    if most:
        top = values.topk(min(most, values.shape[1]), dim=-1)
        for row, ids, scores in zip(rows, top.indices.tolist(), top.values.tolist(), strict=True):
            if wanted := row.request.top_logprobs:
                row.drawn.top.append((ids[:wanted], scores[:wanted]))
    return {
        index
        for index, (row, token, logprob) in enumerate(
            zip(rows, tokens.tolist(), logprobs, strict=True)
        )
        if row.add(token, logprob, run.base)
    }


def score(
    requests: Sequence[SampleRequest], rows: Sequence[int], hidden: Tensor, project: Project
) -> list[PromptScores]:
    """What each request asked for, from the last layer's states of the prompts.

    `rows` says in which row a request's prompt stands, aligned at its end. Only the states
    before scored tokens are projected to logits, those of all requests together.
    """
    if not any(one.scoring.asked for one in requests):
        return [PromptScores()] * len(requests)
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

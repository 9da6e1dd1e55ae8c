"""Batched sampling: one pass over the prompts, then one token per row and step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from .choosing import Choosers, choose, uniforms
from .failures import RequestError
from .logprobs import score
from .model import Base
from .prefix_attention import KeyValues, Plan
from .prefix_cache import Prefix
from .sample_wire import Drawn, SampleRequest, SampleResult
from .wire import Ints

Finish = Callable[[int, SampleResult], None]


def check_context(request: SampleRequest, base: Base) -> None:
    """Refuse a request that the model can't hold, before it reaches a batch."""
    length, most = len(request.prompt), base.card.max_context
    asked = 1 if request.max_tokens is None else request.max_tokens
    if length + asked > most:
        raise RequestError(
            f"expected prompt and max_tokens within the context of {most} tokens; found "
            f"{length} prompt tokens and max_tokens={asked}, together {length + asked}: "
            "shorten the prompt or lower max_tokens"
        )
    require_tokens(request.prompt, base, "prompt")
    if (targets := request.scoring.targets) is not None:
        require_tokens(targets.ids[targets.ids >= 0], base, "target")


def require_tokens(tokens: Ints, base: Base, name: str) -> None:
    """Refuse token ids that the model has no embedding for."""
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < base.vocabulary:
        raise RequestError(
            f"expected {name} token ids in 0..{base.vocabulary - 1}; found "
            f"{int(tokens.min())}..{int(tokens.max())}: tokenize with the model's own tokenizer"
        )


@torch.inference_mode()
def compute_prefix(base: Base, tokens: Ints) -> Prefix:
    """Run the model over tokens that prompts share, and keep what each layer computed."""
    cache = DynamicCache()
    ids = torch.from_numpy(tokens).to(base.device).unsqueeze(0)
    base.network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers: list[Any] = cache.layers
    return Prefix(tokens, [(layer.keys, layer.values) for layer in layers])


@dataclass
class _Row:
    """One sample in the making."""

    owner: int
    request: SampleRequest
    limit: int
    ends: frozenset[int]
    drawn: Drawn = field(default_factory=lambda: Drawn([], [], [], False))

    def add(self, token: int, logprob: float, base: Base) -> bool:
        """Append a token; True when the sample is complete."""
        self.drawn.tokens.append(token)
        self.drawn.logprobs.append(logprob)
        self.drawn.stopped = token in self.ends or self._at_stop_text(base)
        return self.drawn.stopped or len(self.drawn.tokens) >= self.limit

    def _at_stop_text(self, base: Base) -> bool:
        texts = [text for text in self.request.stop or () if isinstance(text, str)]
        if not texts:
            return False
        # A token holds at least one byte, so that a stop text can't reach further back.
        reach = max(len(text.encode()) for text in texts) + 4
        tail = str(base.tokenizer.decode(self.drawn.tokens[-reach:]))
        return any(text in tail for text in texts)


def _ends(request: SampleRequest, base: Base) -> frozenset[int]:
    if request.stop is None:
        return base.end_tokens
    return frozenset(item for item in request.stop if isinstance(item, int))


class _Run:
    """The tensors of a batch while it decodes; rows leave as their samples are complete."""

    def __init__(
        self, base: Base, requests: Sequence[SampleRequest], shared: Sequence[KeyValues] | None
    ) -> None:
        self.base, self.shared = base, shared
        self.offset = shared[0][0].shape[2] if shared else 0
        self.rows = [
            _Row(owner, request, _limit(request, base), _ends(request, base))
            for owner, request in enumerate(requests)
            for _ in range(request.num_samples)
        ]
        self.live = list(range(len(self.rows)))
        counts = [request.num_samples for request in requests]
        self.firsts = [end - count for end, count in zip(accumulate(counts), counts, strict=True)]
        self.choosers = _choosers(self.rows, base.device)
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
            plan=Plan(mask, self.shared),
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def project(self, hidden: Tensor) -> Tensor:
        """The logits of hidden states."""
        network: Any = self.base.network
        logits: Tensor = network.get_output_embeddings()(hidden)
        return logits

    def samples(self, owner: int) -> list[Drawn]:
        """What was drawn for one request."""
        return [row.drawn for row in self.rows if row.owner == owner]

    def keep_rows(self, kept: list[int]) -> Tensor:
        """Go on with some of the rows only; returns their indices."""
        self.live = [self.live[row] for row in kept]
        index = torch.tensor(kept, dtype=torch.long, device=self.base.device)
        self.choosers = self.choosers.select(index)
        self.seen, self.position = self.seen[index], self.position[index]
        self.cache.batch_select_indices(index)
        return index


def _limit(request: SampleRequest, base: Base) -> int:
    return request.max_tokens or base.card.max_context - len(request.prompt)


def _choosers(rows: Sequence[_Row], device: torch.device) -> Choosers:
    drawn = [row.limit for row in rows if row.request.temperature > 0]
    numbers = np.zeros((len(rows), max(drawn, default=0)))
    sample = 0
    for index, row in enumerate(rows):
        sample = sample + 1 if index and rows[index - 1].owner == row.owner else 0
        if row.request.temperature > 0:
            numbers[index, : row.limit] = uniforms(row.request.seed, sample, row.limit)
    requests = [row.request for row in rows]
    return Choosers(
        torch.tensor([one.temperature for one in requests], dtype=torch.float64, device=device),
        torch.tensor([one.top_k for one in requests], device=device),
        torch.tensor([one.top_p for one in requests], dtype=torch.float64, device=device),
        torch.from_numpy(numbers).to(device),
    )


@torch.inference_mode()
def decode(
    base: Base, requests: Sequence[SampleRequest], shared: Sequence[KeyValues] | None, done: Finish
) -> None:
    """Sample for all requests with the active adapter; `done` is called as each is complete."""
    run = _Run(base, requests, shared)
    hidden = run.read_prompts()
    scores = score(requests, run.firsts, hidden, run.project)
    logits = run.project(hidden[:, -1])
    waiting = [request.num_samples for request in requests]
    step = 0
    while run.live:
        tokens = choose(logits, run.choosers, step)
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


def _record(run: _Run, logits: Tensor, tokens: Tensor) -> set[int]:
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

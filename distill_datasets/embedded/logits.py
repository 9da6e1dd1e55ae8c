"""What is made of logits: the next token, which a schema may hold, and how likely a prompt is."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .wire import Array, Ints, InvalidRequestError, PromptScores, SampleRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher

# From hidden states to logits.
Project = Callable[[Tensor], Tensor]
# Logits that exist at once: few enough that they are still in a core's cache when they are
# read again.
MOST_LOGITS = 1 << 20
LONGEST_SCHEMA = 1 << 17
# Between the parts of a JSON text: without a limit, a small model writes blanks for ever.
_BLANKS = r"[\x20\x0A\x0D\x09]{1,16}"


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
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, numbers: Tensor
) -> Tensor:
    # Scaling and sums in float64 keep a draw at a boundary from depending on the batch.
    weights = torch.softmax(logits.double() / temperature.unsqueeze(-1), dim=-1)
    filtered = ((top_k > 0) | (top_p < 1)).nonzero().squeeze(-1)
    if len(filtered):
        weights[filtered] = _keep_top(weights[filtered], top_k[filtered], top_p[filtered])
    totals = weights.cumsum(dim=-1)
    found = torch.searchsorted(totals, (numbers * totals[:, -1]).unsqueeze(-1), right=True)
    # Rounding may land beyond the last token with any weight.
    last = (totals < totals[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(found, last).squeeze(-1)


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


def score(
    requests: Sequence[SampleRequest], states: Sequence[Tensor], project: Project
) -> list[PromptScores]:
    """What each request asked for, from the last layer's states before its scored tokens.

    Only these are projected to logits; those of requests that ask for about as much, together.
    """
    groups = defaultdict[tuple[int, int], list[int]](list)
    for index, request in enumerate(requests):
        # As many of the likeliest, and targets to a power of two.
        width = _targets(request).shape[1].bit_length()
        groups[request.scoring.top, width].append(index)
    found: dict[int, PromptScores] = {}
    for (top, _), alike in groups.items():
        most = max(_targets(requests[index]).shape[1] for index in alike)
        named = [_named(requests[index], len(states[index]), most) for index in alike]
        ids = torch.from_numpy(np.concatenate(named)).to(states[0].device)
        rows = _look_up(torch.cat([states[index] for index in alike]), ids, top, project)
        end = 0
        for index in alike:
            start, end = end, end + len(states[index])
            found[index] = _told(requests[index], *(array[start:end] for array in rows))
    return [found[index] for index in range(len(requests))]


def _targets(request: SampleRequest) -> Ints:
    targets = request.scoring.targets
    return np.zeros((len(request.prompt) - 1, 0), np.int64) if targets is None else targets


def _named(request: SampleRequest, reach: int, most: int) -> Ints:
    """The ids to look up at each position: the prompt's own, then the targets."""
    targets = _targets(request)
    ids = np.zeros((reach, 1 + most), np.int64)
    ids[:, 0] = request.prompt[len(request.prompt) - reach :]
    ids[:, 1 : 1 + targets.shape[1]] = targets[len(targets) - reach :].clip(min=0)
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
    scoring, columns = request.scoring, _targets(request).shape[1]
    own = slice(len(named) - scoring.own(len(request.prompt)), None)
    return PromptScores(
        named[own, 0] if scoring.logprobs else None,
        (top_ids[own], top_logprobs[own]) if scoring.top else None,
        named[:, 1 : 1 + columns] if columns else None,
    )


# A sample that is held to a JSON schema: before each token, which ones may come.


class Grammars:
    """Compiles schemas for one tokenizer; `ends` are the tokens that may follow a whole answer."""

    def __init__(self, tokenizer: str, vocabulary: int, ends: Sequence[int]) -> None:
        """`tokenizer` is the text of tokenizer.json; raises `InvalidRequestError` without
        llguidance.
        """
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise InvalidRequestError(
                "an answer is held to a JSON schema by llguidance, which is not installed where "
                "this server runs: pip install 'distill-datasets[serve]'"
            ) from error
        self._tokenizer = LLTokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(ends))

    def compile(self, schema: Any) -> Constrain:
        """What makes a constraint for each sample; raises `InvalidRequestError` for a schema that
        can't be held, such as one with look-ahead in a pattern.
        """
        from llguidance import LLMatcher

        text = json.dumps(schema)
        if len(text) > LONGEST_SCHEMA:
            raise InvalidRequestError(
                f"expected a schema of at most {LONGEST_SCHEMA} characters; found {len(text)}"
            )
        grammar = LLMatcher.grammar_from_json_schema(
            text, overrides={"whitespace_pattern": _BLANKS}
        )
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidRequestError(
                f"expected a JSON schema that an answer can be held to: {matcher.get_error()}"
            )
        return lambda: Constraint(matcher.deep_copy(), self._tokenizer.vocab_size)


class Constraint:
    """The state of one sample that is held to a schema; `allowed` and `accept` alternate."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._bits = np.zeros((1, (vocabulary + 31) // 32), np.int32)

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens of the vocabulary may be drawn next."""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._bits)
        self._require_sound()
        bits = np.unpackbits(self._bits.view(np.uint8)[0], bitorder="little")
        return bits[: self._vocabulary].astype(bool)

    def accept(self, token: int) -> None:
        """Take note of the token that was drawn."""
        if not self._matcher.is_stopped():  # else nothing but an end may come
            self._matcher.consume_token(token)
            self._require_sound()

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise InvalidRequestError(
                f"the schema can't be held any further: {self._matcher.get_error()}: simplify it"
            )


# Makes the constraint of each sample.
Constrain = Callable[[], Constraint]

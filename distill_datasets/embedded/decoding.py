"""A running batch: each step draws a token for every row, and reads the prompts of newcomers.

Rows join and leave between steps. What they share of their prompts is computed once, and stands
in no row's own keys and values.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .choosing import choose, uniforms
from .logprobs import score
from .model import LoadedModel
from .prefix_attention import CacheShape, NextTokens, PromptTokens, Segment, Slots
from .scheduler import (
    Admission,
    Build,
    Constraint,
    Newcomer,
    OpenRequest,
    Pace,
    Payload,
    Prefix,
    Prefixes,
    Room,
    SampleJob,
    slot_width,
)
from .wire import (
    MOST_SCORES,
    DrawnSample,
    Ints,
    InvalidRequestError,
    PromptScores,
    SampleRequest,
    SampleResult,
    write_sample_result,
)

MOST_ROWS = 64
# Memory per logit while a token is drawn: float64 and several copies.
LOGIT_BYTES = 40
# What one step may read of prompts, in tokens times parameters: about a second on a laptop's core.
STEP_WORK = 7 * 10**10
GPU_FACTOR = 100
LEAST_READ, MOST_READ = 256, 8192


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
    drawn = request.num_samples * limit_of(request, base)
    scored = min(request.scoring.top, base.vocabulary) * request.scoring.own(length)
    scores = max(scored, min(request.top_logprobs, base.vocabulary) * drawn)
    if scores > MOST_SCORES:
        raise InvalidRequestError(
            f"expected at most {MOST_SCORES} of the likeliest tokens in a response; found "
            f"{scores}: ask for fewer per position, or for fewer positions"
        )
    held, most = slot_width(length + limit_of(request, base)), held_tokens(base)
    if held > most:
        raise InvalidRequestError(
            f"expected a prompt and an answer that fit into {base.memory >> 20} MiB of memory, "
            f"about {most} tokens; found {length} and max_tokens={request.max_tokens}, which take "
            f"{held}: lower max_tokens, shorten the prompt, or serve a smaller model"
        )


def held_tokens(base: LoadedModel) -> int:
    """How many tokens of rows fit into memory beside logits and cached prefixes."""
    logits = LOGIT_BYTES * most_rows(base) * base.vocabulary
    return max(0, 3 * base.memory // 4 - logits) // base.token_bytes


def most_rows(base: LoadedModel) -> int:
    """How many rows run at once: on a GPU a step takes about as long for many as for few."""
    return MOST_ROWS if base.device.type == "cpu" else 4 * MOST_ROWS


def require_tokens(tokens: Ints, base: LoadedModel, name: str) -> None:
    """Refuse token ids that the model has no embedding for."""
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < base.vocabulary:
        raise InvalidRequestError(
            f"expected {name} token ids in 0..{base.vocabulary - 1}; found "
            f"{int(tokens.min())}..{int(tokens.max())}: tokenize with the model's own tokenizer"
        )


def limit_of(request: SampleRequest, base: LoadedModel) -> int:
    """How many tokens a sample has at most."""
    return request.max_tokens or base.card.max_context - len(request.prompt)


@dataclass(eq=False)
class Row:
    """One sample in the making; `length` of its tokens are in its slots, behind the prefix's."""

    newcomer: Newcomer
    ends: frozenset[int]
    numbers: NDArray[np.float64] | None
    constraint: Constraint | None
    length: int = 0
    drawn: DrawnSample = field(default_factory=lambda: DrawnSample([], [], [], False))

    @classmethod
    def open(cls, newcomer: Newcomer, ends: frozenset[int]) -> Row:
        """A sample whose prompt is to be read."""
        job, request = newcomer.request.job, newcomer.request.request
        if request.stop is not None:
            ends = frozenset(one for one in request.stop if isinstance(one, int))
        numbers = None
        if request.temperature > 0:
            numbers = uniforms(request.seed, newcomer.index, newcomer.request.limit)
        constraint = None if job.constrain is None else job.constrain()
        return cls(newcomer, ends, numbers, constraint)

    @property
    def request(self) -> OpenRequest:
        """The request that it is a sample of."""
        return self.newcomer.request

    @property
    def unread(self) -> Ints:
        """The tokens to read next: what is left of the prompt, or the token drawn last."""
        return np.array(self.drawn.tokens[-1:]) if self.drawn.tokens else self.newcomer.suffix

    @property
    def number(self) -> float:
        """What drives the next draw."""
        return 0.0 if self.numbers is None else float(self.numbers[len(self.drawn.tokens)])

    def add(self, token: int, logprob: float, tokenizer: Any) -> bool:
        """Append a token; True when the sample is complete."""
        self.drawn.tokens.append(token)
        self.drawn.logprobs.append(logprob)
        if self.constraint is not None:
            self.constraint.accept(token)
        watch = self.request.job.watch
        if watch is not None and not watch(self.newcomer.index, token, logprob):
            return True
        self.drawn.stopped = token in self.ends or self._at_stop_text(tokenizer)
        return self.drawn.stopped or len(self.drawn.tokens) >= self.request.limit

    def _at_stop_text(self, tokenizer: Any) -> bool:
        texts = [text for text in self.request.request.stop or () if isinstance(text, str)]
        if not texts:
            return False
        # A token holds at least one byte, so that a stop text can't reach further back.
        reach = max(len(text.encode()) for text in texts) + 4
        tail = tokenizer.decode(self.drawn.tokens[-reach:], skip_special_tokens=False)
        return any(text in tail for text in texts)


# What rows that attend alike have in common: a prefix, how much of it, the width of their slots.
Kind = tuple[Prefix | None, int, int]


class Group:
    """Rows behind one prefix, with about as many tokens of their own."""

    def __init__(self, shape: CacheShape, kind: Kind) -> None:
        prefix, shared, self.width = kind
        self.kind, self.rows = kind, list[Row]()
        self._prefix = None if prefix is None else prefix.cut(shared)
        self._slots = Slots(shape, self.width)

    def segments(self, joining: Sequence[Row]) -> Iterator[tuple[Segment, Sequence[Row]]]:
        """The parts of a pass that read the rows' last tokens and the prompts of new rows."""
        if self.rows:
            lengths = [row.length for row in self.rows]
            yield NextTokens(self._slots, lengths, self._prefix), self.rows
        if joining:
            if self.width:
                self._slots.reserve(len(self.rows) + len(joining))
            lengths = [len(row.unread) for row in joining]
            slots = self._slots if self.width else None
            yield PromptTokens(lengths, self._prefix, slots, first=len(self.rows)), joining

    def take(self, row: Row, source: Group) -> None:
        """Move a row here, to wider slots."""
        self._slots.reserve(len(self.rows) + 1)
        self._slots.copy(len(self.rows), source._slots, source.rows.index(row), row.length)
        self.rows.append(row)
        source.remove(row)

    def remove(self, row: Row) -> None:
        """Let a row go; the last one takes its place."""
        index, last = self.rows.index(row), self.rows.pop()
        if last is not row:
            if self.width:
                self._slots.copy(index, self._slots, len(self.rows), last.length)
            self.rows[index] = last


@dataclass
class _Pass:
    """The tokens of one pass, side by side; each of `rows` draws from the state at its `last`."""

    segments: list[Segment] = field(default_factory=list)
    ids: list[Ints] = field(default_factory=list)
    positions: list[Ints] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    size: int = 0

    def add(self, segment: Segment, rows: Sequence[Row]) -> None:
        """Read what is unread of some rows."""
        self.segments.append(segment)
        for row in rows:
            self.add_tokens(row.unread, row.newcomer.shared + row.length)
            self.rows.append(row)
            self.last.append(self.size - 1)

    def add_tokens(self, ids: Ints, start: int) -> None:
        """Read tokens from a position on."""
        self.ids.append(ids)
        self.positions.append(np.arange(start, start + len(ids)))
        self.size += len(ids)


# A token that was drawn for a row, its logprob, and its likeliest rivals.
_Drawn = tuple[Row, int, float, tuple[list[int], list[float]] | None]


class RunningBatch:
    """The samples of one version of the weights that run together, and those that wait for them.

    A step that failed may be repeated: nothing is changed before every row has its token.
    """

    def __init__(self, base: LoadedModel, weights: str, prefixes: Prefixes) -> None:
        self._base, self._shape = base, CacheShape.of(base.network)
        self._longest = longest_reading(base)
        self._admission = Admission(weights, prefixes, self._longest)
        self._pace = Pace()
        self._groups: dict[Kind, Group] = {}
        self._build: Slots | None = None
        # Rows whose prompt is read in the next pass; tokens that nobody was told of yet.
        self._joining: list[Row] = []
        self._drawn: deque[_Drawn] = deque()
        # Whom a failure is told. Until that is known, newcomers are tried one by one.
        self._blamed: list[OpenRequest] = []
        self._one_by_one = False

    @property
    def _rows(self) -> list[Row]:
        return [row for group in self._groups.values() for row in group.rows]

    @property
    def held(self) -> int:
        """The tokens that its rows may come to hold."""
        return sum(row.newcomer.reserved for row in [*self._rows, *self._joining])

    @property
    def running(self) -> bool:
        """Whether any row runs."""
        return bool(self._groups or self._joining)

    @property
    def busy(self) -> bool:
        """Whether anything runs or waits."""
        return bool(self.running or self._admission.waiting)

    def add(self, job: SampleJob) -> None:
        """Queue a request; raises `InvalidRequestError` where it can't be served."""
        check_context(job.request, self._base)
        request = OpenRequest(job, limit_of(job.request, self._base))
        if not self.busy:
            self._pace = Pace(request)
        self._admission.waiting.append(request)

    def blame_all(self) -> None:
        """Let the next failure be everybody's."""
        running = [row.request for row in [*self._rows, *self._joining]]
        self._blamed = list(dict.fromkeys([*running, *self._admission.waiting]))

    def fail(self, payload: Payload) -> None:
        """Answer the requests that made a step fail, and go on without them."""
        if not self._blamed and len(self._joining) > 1 and not self._one_by_one:
            self._one_by_one = True
            return
        newest = [row.request for row in self._joining[:1] or self._rows[-1:]]
        if self._admission.build is not None and not self._joining:
            newest = [self._admission.build.owner]
        for request in self._blamed or newest:
            self._pace.drop(request)
            self._admission.drop(request)
            self._joining = [row for row in self._joining if row.request is not request]
            self._drawn = deque(one for one in self._drawn if one[0].request is not request)
            for group in self._groups.values():
                for row in [row for row in group.rows if row.request is request]:
                    group.remove(row)
            request.job.resolve(payload)
        self._forget_empty()

    @torch.inference_mode()
    def step(self, holding: int) -> None:
        """Draw a token for each row; rows that may hold so many tokens more may join."""
        self._record()
        began, running, requests = time.perf_counter(), len(self._rows), self._pace.requests()
        if not self._joining:
            self._one_by_one = False
            room = Room(most_rows(self._base) - running, requests, self._longest, holding)
            for newcomer in self._admission.pick(room):
                self._blamed = [newcomer.request]
                self._joining.append(Row.open(newcomer, self._base.end_tokens))
        joining = self._joining[:1] if self._one_by_one else list(self._joining)
        building = self._admission.build if requests or not running else None
        self._run(joining, building)
        self._pace.stepped(time.perf_counter() - began, len(joining) + (building is not None))
        self._record()

    def _run(self, joining: Sequence[Row], building: Build | None) -> None:
        """One pass: the rows' last tokens, new rows' prompts, and a part of a prefix."""
        one = self._gather(joining)
        masks = self._masks(one.rows)
        self._blamed = []
        read = 0 if building is None else self._add_build(one, building)
        if not one.size:
            return
        hidden = self._forward(one)
        scores = self._score(one, hidden)
        drawn = self._choose(one, hidden, masks) if one.rows else []
        # Nothing is changed before this line.
        self._advance(building, read)
        for row in one.rows:
            row.length += len(row.unread)
        for row in joining:
            self._groups[row.newcomer.kind].rows.append(row)
            row.request.scores = scores.get(row, row.request.scores)
        self._joining = self._joining[len(joining) :]
        self._drawn.extend(drawn)

    def _gather(self, joining: Sequence[Row]) -> _Pass:
        one = _Pass()
        for group in list(self._groups.values()):
            for row in [row for row in group.rows if row.length >= group.width]:
                self._group((*group.kind[:2], 2 * group.width)).take(row, group)
        for row in joining:
            self._group(row.newcomer.kind)
        for kind, group in self._groups.items():
            fresh = [row for row in joining if row.newcomer.kind == kind]
            for segment, rows in group.segments(fresh):
                one.add(segment, rows)
        return one

    def _group(self, kind: Kind) -> Group:
        if kind not in self._groups:
            self._groups[kind] = Group(self._shape, kind)
        return self._groups[kind]

    def _forget_empty(self) -> None:
        self._groups = {kind: group for kind, group in self._groups.items() if group.rows}

    def _masks(self, rows: Sequence[Row]) -> list[tuple[int, NDArray[np.bool_]]]:
        """What the constraints of rows allow."""
        masks = []
        for index, row in enumerate(rows):
            if row.constraint is not None:
                self._blamed = [row.request]
                masks.append((index, row.constraint.allowed()))
                if not masks[-1][1].any():
                    raise InvalidRequestError(
                        "expected a constraint that allows a token; found none"
                    )
        return masks

    def _add_build(self, one: _Pass, building: Build) -> int:
        """Read a part of a prefix; how many tokens."""
        if building.slots is None:
            building.slots = Slots(self._shape, len(building.tokens))
            building.slots.reserve(1)
            if building.begin is not None:
                building.slots.fill(building.begin.layers, building.done)
        rest = building.tokens[building.done :]
        rest = rest[: max(0, self._longest - one.size)]
        if len(rest):
            segment = PromptTokens([len(rest)], None, building.slots, past=building.done)
            one.segments.append(segment)
            one.add_tokens(rest, building.done)
        return len(rest)

    def _advance(self, building: Build | None, read: int) -> None:
        if building is not None and building.slots is not None:
            building.done += read
            if building.done == len(building.tokens):
                self._admission.built(building.slots.layers)

    def _forward(self, one: _Pass) -> Tensor:
        """The last layer's states of all tokens."""
        ids, positions = (
            torch.from_numpy(np.concatenate(parts)).to(self._base.device).unsqueeze(0)
            for parts in (one.ids, one.positions)
        )
        out = self._base.network.base_model(
            input_ids=ids, position_ids=positions, use_cache=False, segments=one.segments
        )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def _project(self, hidden: Tensor) -> Tensor:
        network: Any = self._base.network
        logits: Tensor = network.get_output_embeddings()(hidden)
        return logits

    def _score(self, one: _Pass, hidden: Tensor) -> dict[Row, PromptScores]:
        """What new rows ask of their prompts."""
        rows, states = [], []
        for row, last in zip(one.rows, one.last, strict=True):
            scoring = row.request.request.scoring
            if scoring.asked and not row.drawn.tokens and not row.newcomer.index:
                rows.append(row)
                states.append(hidden[last - scoring.reach(len(row.request.request.prompt)) : last])
        found = score([row.request.request for row in rows], states, self._project)
        return dict(zip(rows, found, strict=True))

    def _choose(
        self, one: _Pass, hidden: Tensor, masks: Sequence[tuple[int, NDArray[np.bool_]]]
    ) -> list[_Drawn]:
        """A token for each row."""
        index = torch.tensor(one.last, device=hidden.device)
        logits = self._project(hidden[index]).float()
        requests, bound = [row.request.request for row in one.rows], logits
        if masks:
            bound = logits.clone()
            for row, mask in masks:
                bound[row, torch.from_numpy(~mask).to(logits.device)] = float("-inf")
        tokens = choose(bound, requests, [row.number for row in one.rows])
        values = torch.log_softmax(logits, dim=-1)
        logprobs = values.gather(1, tokens.unsqueeze(1)).squeeze(1)
        rivals: list[Any] = [None] * len(requests)
        if most := max(request.top_logprobs for request in requests):
            top = values.topk(min(most, values.shape[1]), dim=-1)
            for row, request in enumerate(requests):
                if wanted := request.top_logprobs:
                    found = (part[row, :wanted].tolist() for part in (top.indices, top.values))
                    rivals[row] = tuple(found)
        return list(zip(one.rows, tokens.tolist(), logprobs.tolist(), rivals, strict=True))

    def _record(self) -> None:
        """Tell of the tokens that were drawn; complete rows leave."""
        while self._drawn:
            row, token, logprob, rivals = self._drawn.popleft()
            self._blamed = [row.request]
            if rivals is not None:
                row.drawn.top.append(rivals)
            if row.add(token, logprob, self._base.tokenizer):
                next(group for group in self._groups.values() if row in group.rows).remove(row)
                self._complete(row)
        self._blamed = []
        self._forget_empty()

    def _complete(self, row: Row) -> None:
        request = row.request
        request.samples[row.newcomer.index] = row.drawn
        if len(request.samples) == request.request.num_samples:
            samples = [request.samples[index] for index in range(len(request.samples))]
            result = SampleResult(samples, request.scores, request.cache_hit)
            request.job.resolve(write_sample_result(request.request, result))


def longest_reading(base: LoadedModel) -> int:
    """How many tokens of prompts a step reads at most: rows that run wait for them."""
    work = STEP_WORK * (1 if base.device.type == "cpu" else GPU_FACTOR)
    return max(LEAST_READ, min(MOST_READ, work // base.card.size.active))

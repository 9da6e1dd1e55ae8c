"""The running batch: each step draws a token for every row, and reads the prompts of newcomers.

Rows join and leave between steps, each with weights of its own: the base's products are computed
for all of them together. What they share of their prompts is computed once, and stands in no row's
own keys and values.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .logits import Constraint, choose, penalize, score, uniforms
from .model import LoadedModel, heads_of
from .prefix_attention import CacheShape, NextTokens, PromptTokens, Segment, Slots
from .scheduler import (
    Admission,
    Build,
    Kind,
    Newcomer,
    OpenRequest,
    Pace,
    Payload,
    Room,
    SampledWeights,
    SampleJob,
    most_held,
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


def cache_shape(base: LoadedModel) -> CacheShape:
    """What the keys and values of a model's tokens take."""
    config = base.network.config
    _, heads, width = heads_of(config.to_dict())
    return CacheShape(config.num_hidden_layers, heads, width, base.network.dtype, base.device)


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
        require_tokens(targets[targets >= 0], base, "target")
        if targets.shape[1] > base.vocabulary:
            raise InvalidRequestError(
                f"expected at most {base.vocabulary} targets a position, the vocabulary; found "
                f"{targets.shape[1]}"
            )
    drawn = request.num_samples * limit_of(request, base)
    scored = min(request.scoring.top, base.vocabulary) * request.scoring.own(length)
    scores = max(scored, min(request.top_logprobs, base.vocabulary) * drawn)
    if scores > MOST_SCORES:
        raise InvalidRequestError(
            f"expected at most {MOST_SCORES} of the likeliest tokens in a response; found "
            f"{scores}: ask for fewer per position, or for fewer positions"
        )
    token, most = base.token, held_bytes(base)
    held = most_held(length, limit_of(request, base))
    if token.kept * held + token.computed * length > most:
        raise InvalidRequestError(
            f"expected a prompt and an answer that fit into {base.memory >> 20} MiB of memory, "
            f"about {most // token.kept} tokens; found {length} and "
            f"max_tokens={request.max_tokens}, which take {held}: lower max_tokens, shorten the "
            "prompt, or serve a smaller model"
        )


def held_bytes(base: LoadedModel) -> int:
    """What rows may hold of memory, beside logits and cached prefixes."""
    return max(0, 3 * base.memory // 4 - LOGIT_BYTES * most_rows(base) * base.vocabulary)


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
    def weights(self) -> str:
        """What it is drawn from."""
        return self.request.job.weights

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
        texts = [text for text in self.request.request.stop or () if isinstance(text, str)]
        if texts:
            # A token holds at least one byte, so that a stop text can't reach further back.
            reach = max(len(text.encode()) for text in texts) + 4
            tail = tokenizer.decode(self.drawn.tokens[-reach:], skip_special_tokens=False)
            self.drawn.stopped = any(text in tail for text in texts)
        self.drawn.stopped = self.drawn.stopped or token in self.ends
        return self.drawn.stopped or len(self.drawn.tokens) >= self.request.limit


class Group:
    """Rows behind one prefix, with about as many tokens of their own."""

    def __init__(self, shape: CacheShape, kind: Kind) -> None:
        self.kind, self.rows = kind, list[Row]()
        self._prefix = None if kind.prefix is None else kind.prefix.cut(kind.shared)
        self.slots = Slots(shape, kind.width)

    def read(self, joining: Sequence[Row], device: torch.device) -> list[Part]:
        """The rows' last tokens, and the prompts of new rows, in a pass."""
        parts, slots = [], self.slots if self.kind.width else None
        if self.rows:
            lengths = [row.length for row in self.rows]
            parts.append(self._part(NextTokens(self.slots, lengths, self._prefix), self.rows))
        if joining:
            lengths = [len(row.unread) for row in joining]
            segment = PromptTokens(lengths, self._prefix, slots, device, first=len(self.rows))
            parts.append(self._part(segment, joining))
        return parts

    def _part(self, segment: Segment, rows: Sequence[Row]) -> Part:
        starts = [row.newcomer.shared + row.length for row in rows]
        return Part(self.kind.weights, segment, [row.unread for row in rows], starts, rows)

    def take(self, row: Row, source: Group) -> None:
        """Move a row here, where there is place for it."""
        self.slots.copy(len(self.rows), source.slots, source.rows.index(row), row.length)
        self.rows.append(row)
        source.remove(row)

    def remove(self, row: Row) -> None:
        """Let a row go; the last one takes its place."""
        index, last = self.rows.index(row), self.rows.pop()
        if last is not row:
            if self.kind.width:
                self.slots.copy(index, self.slots, len(self.rows), last.length)
            self.rows[index] = last


class Part(NamedTuple):
    """What is unread of some rows with the same weights, or the next tokens of a prefix."""

    weights: str
    segment: Segment
    ids: Sequence[Ints]
    starts: Sequence[int]
    rows: Sequence[Row] = ()


class _Pass:
    """The tokens of one pass, side by side; each of `rows` draws from the state at its `last`."""

    def __init__(self, parts: Sequence[Part]) -> None:
        parts = sorted(parts, key=lambda part: part.weights)
        self.segments = [part.segment for part in parts]
        self.ids, self.positions = list[Ints](), list[Ints]()
        self.rows, self.last = list[Row](), list[int]()
        size = 0
        for part in parts:
            for place, (ids, start) in enumerate(zip(part.ids, part.starts, strict=True)):
                self.ids.append(ids)
                self.positions.append(np.arange(start, start + len(ids)))
                size += len(ids)
                if part.rows:
                    self.rows.append(part.rows[place])
                    self.last.append(size - 1)
        # Which weights so many tokens, and so many rows, are computed with.
        self.reading = _runs((part.weights, part.segment.size) for part in parts)
        self.drawing = _runs((part.weights, len(part.rows)) for part in parts)


def _runs(counts: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Neighbours with the same weights together."""
    return [
        (weights, sum(count for _, count in alike))
        for weights, alike in groupby(counts, key=lambda one: one[0])
    ]


# A token that was drawn for a row, its logprob, and its likeliest rivals.
_Drawn = tuple[Row, int, float, tuple[list[int], list[float]] | None]


class RunningBatch:
    """The samples that run together, and those that wait for them.

    A step that failed may be repeated: nothing is changed before every row has its token.
    """

    def __init__(self, base: LoadedModel, weights: SampledWeights) -> None:
        self._base, self._shape, self._weights = base, cache_shape(base), weights
        # How many tokens of prompts a step reads at most: rows that run wait for them.
        work = STEP_WORK * (1 if base.device.type == "cpu" else GPU_FACTOR)
        self._longest = max(LEAST_READ, min(MOST_READ, work // base.card.size.active))
        self._most_bytes = held_bytes(base)
        self._admissions: dict[str, Admission] = {}
        # Weights that make place for others.
        self._leaving: str | None = None
        self._pace = Pace()
        self._groups: dict[Kind, Group] = {}
        # Rows whose prompt is read in the next pass; tokens that nobody was told of yet.
        self._joining: list[Row] = []
        self._drawn: deque[_Drawn] = deque()
        # Whom a failure is told. Until that is known, newcomers are tried one by one.
        self._blamed: list[OpenRequest] = []
        self._one_by_one = False

    @property
    def busy(self) -> bool:
        """Whether anything runs or waits."""
        return bool(self._groups or self._joining or self._admissions)

    @property
    def _rows(self) -> list[Row]:
        return [row for group in self._groups.values() for row in group.rows]

    @property
    def _builds(self) -> list[tuple[Admission, Build]]:
        return [(one, one.build) for one in self._admissions.values() if one.build is not None]

    @property
    def _uncached(self) -> int:
        """Bytes of prefixes that are computed now, or that only rows still stand behind."""
        cached, used = self._weights.prefixes, {kind[:2] for kind in self._groups}
        left = sum(one.size for key, one in used if one is not None and not cached.keeps(key, one))
        return left + self._base.token.kept * sum(len(one.tokens) for _, one in self._builds)

    def add(self, job: SampleJob) -> None:
        """Queue a request; raises `InvalidRequestError` where it can't be served."""
        check_context(job.request, self._base)
        request = OpenRequest(job, limit_of(job.request, self._base))
        if not self.busy:
            self._pace = Pace(request)
        if job.weights not in self._admissions:
            found = Admission(job.weights, self._weights.prefixes, self._longest)
            self._admissions[job.weights] = found
        self._admissions[job.weights].waiting.append(request)

    def fail(self, payload: Payload) -> None:
        """Answer the requests that made a step fail, and go on without them."""
        if not self._blamed and len(self._joining) > 1 and not self._one_by_one:
            self._one_by_one = True
            return
        newest = [row.request for row in self._joining[:1] or self._rows[-1:]]
        if self._builds and not self._joining:
            newest = [self._builds[0][1].owner]
        for request in self._blamed or newest:
            self._pace.drop(request)
            if (admission := self._admissions.get(request.job.weights)) is not None:
                admission.drop(request)
            self._joining = [row for row in self._joining if row.request is not request]
            self._drawn = deque(one for one in self._drawn if one[0].request is not request)
            for group in self._groups.values():
                for row in [row for row in group.rows if row.request is request]:
                    group.remove(row)
            request.job.resolve(payload)
        self._forget_idle()

    def _forget_idle(self) -> None:
        self._groups = {kind: group for kind, group in self._groups.items() if group.rows}
        for key in [key for key, one in self._admissions.items() if not (one.waiting or one.build)]:
            del self._admissions[key]

    @torch.inference_mode()
    def step(self) -> None:
        """Draw a token for each row, and let more rows join."""
        self._record()
        began, running, requests = time.perf_counter(), len(self._rows), self._pace.requests()
        if not self._joining:
            self._one_by_one = False
            self._admit(requests)
        joining = self._joining[:1] if self._one_by_one else list(self._joining)
        builds = self._builds if requests or not running else []
        self._run(joining, builds)
        self._pace.stepped(time.perf_counter() - began, len(joining) + len(builds))
        self._record()

    def _admit(self, requests: int) -> None:
        """Let waiting samples join, each time one of the weights that fewest rows run with."""
        rows, token = self._rows, self._base.token
        reserved = token.kept * sum(row.newcomer.reserved for row in rows)
        holding = self._most_bytes - reserved - self._uncached
        room = Room(most_rows(self._base) - len(rows), requests, self._longest, holding, token)
        running = Counter(row.weights for row in rows)
        picking = self._picking(room, running) if room.rows and requests else {}
        while picking:
            weights = min(picking, key=lambda key: running[key])
            newcomer = next(picking[weights], None)
            if newcomer is None:
                del picking[weights]
            else:
                self._blamed = [newcomer.request]
                self._joining.append(Row.open(newcomer, self._base.end_tokens))
                running[weights] += 1
        self._blamed = []

    def _picking(self, room: Room, running: Collection[str]) -> dict[str, Iterator[Newcomer]]:
        """What may join of each of the weights that are in memory, or find place there.

        Where some find none, nobody joins those that came first until their rows are done.
        """
        picking: dict[str, Iterator[Newcomer]] = {}
        used, crowded = {*running, *(one.weights for one, _ in self._builds)}, False
        for key, one in list(self._admissions.items()):
            self._blamed = list(one.waiting)
            if key == self._leaving and key in used:
                continue
            if self._weights.load(key, used):
                picking[key] = one.pick(room)
                used.add(key)
                continue
            crowded = True
            if self._leaving not in used:
                self._leaving = next((first for first in picking if first in running), None)
                if self._leaving is not None:
                    del picking[self._leaving]
                    self._admissions[self._leaving] = self._admissions.pop(self._leaving)
        if not crowded:
            self._leaving = None
        return picking

    def _run(self, joining: Sequence[Row], builds: Sequence[tuple[Admission, Build]]) -> None:
        """One pass: the rows' last tokens, new rows' prompts, and parts of prefixes."""
        parts = self._gather(joining)
        reads = self._read(builds, self._longest - sum(part.segment.size for part in parts))
        one = _Pass([*parts, *(part for *_, part in reads)])
        masks = self._masks(one.rows)
        self._blamed = []
        if not one.ids:
            return
        hidden = self._forward(one)
        scores = self._score(one, hidden)
        drawn = self._choose(one, hidden, masks) if one.rows else []
        # Nothing is changed before this line.
        for admission, build, part in reads:
            build.done += part.segment.size
            if build.done == len(build.tokens) and build.slots is not None:
                admission.built(build.slots.layers)
        for row in one.rows:
            row.length += len(row.unread)
        for row in joining:
            self._groups[row.newcomer.kind].rows.append(row)
            row.request.scores = scores.get(row, row.request.scores)
        self._joining = self._joining[len(joining) :]
        self._drawn.extend(drawn)

    def _gather(self, joining: Sequence[Row]) -> list[Part]:
        """What is unread of all rows; those whose slots are full move to wider ones."""
        full = [
            (row, group, kind._replace(width=2 * kind.width))
            for kind, group in self._groups.items()
            for row in group.rows
            if row.length >= kind.width
        ]
        fresh = Counter([row.newcomer.kind for row in joining] + [kind for *_, kind in full])
        self._make_place(fresh)
        for row, group, kind in full:
            self._groups[kind].take(row, group)
        parts = []
        for kind, group in self._groups.items():
            own = [row for row in joining if row.newcomer.kind == kind]
            parts += group.read(own, self._base.device)
        return parts

    def _make_place(self, fresh: Counter[Kind]) -> None:
        """Have slots for more rows: some to spare, or no more than needed where memory ends."""
        for kind in fresh:
            if kind not in self._groups:
                self._groups[kind] = Group(self._shape, kind)
        groups = [(kind, one, len(one.rows) + fresh[kind]) for kind, one in self._groups.items()]
        sizes = {
            kind: needed + needed // 2 if needed > group.slots.rows else group.slots.rows
            for kind, group, needed in groups
        }
        tokens = sum(kind.width * rows for kind, rows in sizes.items())
        if self._base.token.kept * tokens + self._uncached > self._most_bytes:
            sizes = {kind: needed for kind, _, needed in groups}
        # What shrinks comes first.
        for kind, group, _ in sorted(groups, key=lambda one: sizes[one[0]] - one[1].slots.rows):
            if kind.width and sizes[kind] != group.slots.rows:
                group.slots.resize(sizes[kind], len(group.rows))

    def _read(
        self, builds: Sequence[tuple[Admission, Build]], reading: int
    ) -> list[tuple[Admission, Build, Part]]:
        """Read so many tokens of prefixes at most."""
        found = []
        for admission, build in builds:
            ids = build.tokens[build.done :][: max(0, reading)]
            if len(ids):
                if build.slots is None:
                    build.slots = Slots(self._shape, len(build.tokens), 1)
                    if build.begin is not None:
                        build.slots.fill(build.begin.layers, build.done)
                segment = PromptTokens(
                    [len(ids)], None, build.slots, self._base.device, past=build.done
                )
                part = Part(admission.weights, segment, [ids], [build.done])
                found.append((admission, build, part))
                reading -= len(ids)
        return found

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

    def _forward(self, one: _Pass) -> Tensor:
        """The last layer's states of all tokens."""
        self._weights.use(one.reading)
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
        asked = [
            (row, last)
            for row, last in zip(one.rows, one.last, strict=True)
            if row.request.request.scoring.asked and not (row.drawn.tokens or row.newcomer.index)
        ]
        found: dict[Row, PromptScores] = {}
        for weights, group in groupby(asked, key=lambda one: one[0].weights):
            alike = list(group)
            requests = [row.request.request for row, _ in alike]
            states = [
                hidden[last - one.scoring.reach(len(one.prompt)) : last]
                for (_, last), one in zip(alike, requests, strict=True)
            ]
            self._weights.use([(weights, sum(map(len, states)))])
            scores = score(requests, states, self._project)
            found |= zip((row for row, _ in alike), scores, strict=True)
        return found

    def _choose(
        self, one: _Pass, hidden: Tensor, masks: Sequence[tuple[int, NDArray[np.bool_]]]
    ) -> list[_Drawn]:
        """A token for each row."""
        self._weights.use(one.drawing)
        index = torch.tensor(one.last, device=hidden.device)
        logits = self._project(hidden[index]).float()
        requests, bound = [row.request.request for row in one.rows], logits
        if masks or any(request.penalized for request in requests):
            bound = logits.clone()
            for own, drawn_for in zip(bound, one.rows, strict=True):
                penalize(own, drawn_for.request.request, drawn_for.drawn.tokens)
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
            request = row.request
            self._blamed = [request]
            if rivals is not None:
                row.drawn.top.append(rivals)
            if not row.add(token, logprob, self._base.tokenizer):
                continue
            next(group for group in self._groups.values() if row in group.rows).remove(row)
            request.samples[row.newcomer.index] = row.drawn
            if len(request.samples) == request.request.num_samples:
                samples = [request.samples[index] for index in range(len(request.samples))]
                result = SampleResult(samples, request.scores, request.cache_hit)
                request.job.resolve(write_sample_result(request.request, result))
        self._blamed = []
        self._forget_idle()

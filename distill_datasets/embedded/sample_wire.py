"""Sample requests on the wire: prompts and what to score in, samples and scores out."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .failures import RequestError
from .wire import Array, Floats, Ints, Layout, pb, read_json_tensor

# As the SDK reads it: a row of the top-k matrix that was not asked for.
NO_TOKEN, NO_LOGPROB = 0, -99999.0


@dataclass(frozen=True)
class Targets:
    """Token ids to score at each prompt position but the first, (len(prompt) - 1, K).

    -1 asks for nothing; a sparse request is answered in its own layout.
    """

    ids: Ints
    layout: Layout | None

    @cached_property
    def first(self) -> int:
        """The first row that names an id."""
        return int((self.ids >= 0).any(axis=1).argmax())


@dataclass(frozen=True)
class Scoring:
    """What to say of the prompt's own tokens: of all, or of the last `last_n`."""

    logprobs: bool = False
    top: int = 0
    last_n: int | None = None
    targets: Targets | None = None

    @property
    def asked(self) -> bool:
        """Whether anything is."""
        return self.logprobs or bool(self.top) or self.targets is not None

    def own(self, length: int) -> int:
        """How many tokens at the end of a prompt of some length are scored themselves."""
        if not (self.logprobs or self.top):
            return 0
        return length - 1 if self.last_n is None else self.last_n

    def reach(self, length: int) -> int:
        """The same, and those where a target is named."""
        if self.targets is None:
            return self.own(length)
        return max(self.own(length), length - 1 - self.targets.first)


@dataclass(frozen=True)
class SampleRequest:
    """One request for samples; `stop` None means the model's own end tokens."""

    prompt: Ints
    num_samples: int
    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: tuple[str, ...] | tuple[int, ...] | None
    top_logprobs: int
    scoring: Scoring


@dataclass
class Drawn:
    """The tokens drawn for one sample, the logprob of each, and optionally its rivals."""

    tokens: list[int]
    logprobs: list[float]
    top: list[tuple[list[int], list[float]]]
    stopped: bool


@dataclass(frozen=True)
class Scores:
    """Of the last prompt tokens, those in reach: the logprob of each, the K likeliest and their
    logprobs, and the logprobs of the targets; each only if asked for."""

    logprobs: Floats | None = None
    top: tuple[Ints, Floats] | None = None
    targets: Floats | None = None


@dataclass(frozen=True)
class SampleResult:
    """What a sample request returns."""

    sequences: list[Drawn]
    scores: Scores
    cache_hit_tokens: int


def read_sample_request(body: Mapping[str, Any]) -> SampleRequest:
    """Read the JSON of `asample`."""
    if body.get("prompt_alt_tokens_k"):
        raise RequestError(
            "the embedded server does not compute prompt_alt_tokens_k: leave it out, or sample "
            "with num_samples"
        )
    params = body.get("sampling_params") or {}
    seed = params.get("seed")
    request = SampleRequest(
        prompt=_prompt_tokens(body["prompt"]["chunks"]),
        num_samples=int(body.get("num_samples", 1)),
        max_tokens=params.get("max_tokens"),
        temperature=float(params.get("temperature", 1.0)),
        top_k=int(params.get("top_k", -1)),
        top_p=float(params.get("top_p", 1.0)),
        seed=secrets.randbits(63) if seed is None else int(seed),
        stop=_read_stop(params.get("stop")),
        top_logprobs=int(body.get("topk_sample_logprobs") or 0),
        scoring=_read_scoring(body),
    )
    _check(request)
    return request


def _read_scoring(body: Mapping[str, Any]) -> Scoring:
    targets = body.get("target_prompt_logprobs")
    return Scoring(
        bool(body.get("prompt_logprobs")),
        int(body.get("topk_prompt_logprobs") or 0),
        body.get("prompt_logprobs_last_n"),
        None if targets is None else Targets(*read_json_tensor(targets, "target_prompt_logprobs")),
    )


def _check(request: SampleRequest) -> None:
    length, scoring = len(request.prompt), request.scoring
    rules = {
        "a prompt of at least one token": length > 0,
        "num_samples of 1 or more": request.num_samples >= 1,
        "max_tokens of 1 or more": request.max_tokens is None or request.max_tokens >= 1,
        "temperature of 0 or more": 0.0 <= request.temperature < float("inf"),
        "top_p in (0, 1]": 0.0 < request.top_p <= 1.0,
        "top_k of -1 (off) or 1 and more": request.top_k == -1 or request.top_k >= 1,
        "topk_sample_logprobs of 0 or more": request.top_logprobs >= 0,
        "topk_prompt_logprobs of 0 or more": scoring.top >= 0,
        f"prompt_logprobs_last_n in 1..{length - 1}, with prompt_logprobs": scoring.last_n is None
        or (scoring.logprobs and 1 <= scoring.last_n <= length - 1),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise RequestError(f"expected {'; '.join(broken)}; found {request!r}")
    if scoring.targets is not None:
        _check_targets(scoring.targets.ids, length)


def _check_targets(ids: Ints, length: int) -> None:
    if len(ids) != length - 1 or not (ids >= 0).any() or ids.min() < -1:
        raise RequestError(
            f"expected target_prompt_logprobs of {length - 1} rows, one for each prompt token but "
            "the first, of token ids or -1, and at least one id; found shape "
            f"{ids.shape} with {int((ids >= 0).sum())} ids"
        )


def _read_stop(stop: str | Sequence[Any] | None) -> tuple[str, ...] | tuple[int, ...] | None:
    if stop is None:
        return None
    if isinstance(stop, str):
        return (stop,)
    if all(isinstance(item, str) for item in stop) or all(isinstance(item, int) for item in stop):
        return tuple(stop)
    raise RequestError(f"expected stop as strings or as token ids, not mixed; found {stop!r}")


def _prompt_tokens(chunks: Sequence[Mapping[str, Any]]) -> Ints:
    other = {chunk.get("type") for chunk in chunks} - {"encoded_text"}
    if other:
        raise RequestError(f"expected text chunks only; found {', '.join(map(str, other))}")
    parts = [np.array(chunk["tokens"], dtype=np.int64) for chunk in chunks]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def write_sample_result(request: SampleRequest, result: SampleResult) -> bytes:
    """Encode samples and scores as the SDK expects them."""
    message = pb.SampleResponse(prompt_cache_hit_tokens=result.cache_hit_tokens)
    for sequence in result.sequences:
        _write_sequence(message.sequences.add(), sequence)
    scores, length = result.scores, len(request.prompt)
    if scores.logprobs is not None:
        message.prompt_logprobs = _behind(length, scores.logprobs, np.nan).tobytes()
    if scores.top is not None:
        ids, logprobs = scores.top
        _write_top(
            message.topk_prompt_logprobs,
            _behind(length, ids, NO_TOKEN),
            _behind(length, logprobs, NO_LOGPROB),
        )
    if scores.targets is not None and request.scoring.targets is not None:
        whole = _behind(length - 1, scores.targets, 0.0)
        _write_targets(message.target_prompt_logprobs, whole, request.scoring.targets)
    return bytes(message.SerializeToString())


def _write_sequence(part: pb.SampledSequence, sequence: Drawn) -> None:
    part.stop_reason = pb.STOP_REASON_STOP if sequence.stopped else pb.STOP_REASON_LENGTH
    part.tokens = np.array(sequence.tokens, np.int32).tobytes()
    part.logprobs = np.array(sequence.logprobs, np.float32).tobytes()
    if sequence.top:
        ids, logprobs = zip(*sequence.top, strict=True)
        _write_top(part.topk_sampled_logprobs, np.array(ids), np.array(logprobs))


def _write_top(part: pb.TopkLogprobs, ids: Array, logprobs: Array) -> None:
    part.token_ids = ids.astype(np.int32).tobytes()
    part.logprobs = logprobs.astype(np.float32).tobytes()
    part.length, part.k = ids.shape


def _write_targets(part: pb.Tensor, values: Floats, targets: Targets) -> None:
    """In the layout of the request; 0 where it asked for nothing."""
    part.dtype = pb.DTYPE_FLOAT32
    part.shape.extend(values.shape)
    layout = targets.layout
    if layout is None:
        part.dense = np.where(targets.ids >= 0, values, 0.0).astype(np.float32).tobytes()
        return
    part.sparse_csr.values = values[layout.rows, layout.columns].astype(np.float32).tobytes()
    part.sparse_csr.crow_indices = layout.row_starts.tobytes()
    part.sparse_csr.col_indices = layout.columns.tobytes()


def _behind(length: int, known: Array, filler: float) -> Array:
    """Rows for all positions, of which only the last ones are known."""
    whole = np.full((length, *known.shape[1:]), filler, known.dtype)
    if len(known):
        whole[-len(known) :] = known
    return whole

"""What goes over the wire: the SDK's protobuf and JSON as plain dataclasses, and back.

Whatever a request says of its size is held against a limit before memory is taken for it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distill_datasets.errors import DistillError

if TYPE_CHECKING:
    from tinker.proto import tinker_public_pb2 as pb
else:
    pb = sys.modules.get("tinker.proto.tinker_public_pb2")
    if pb is None:
        # The SDK's messages alone: importing `tinker` itself takes seconds.
        _package = importlib.util.find_spec("tinker")
        _file = Path(_package.submodule_search_locations[0]) / "proto" / "tinker_public_pb2.py"
        _name = f"{__package__}._tinker_public_pb2"
        _spec = importlib.util.spec_from_file_location(_name, _file)
        pb = sys.modules[_name] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(pb)

__all__ = ["pb"]  # beside what is defined here

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Array = NDArray[Any]
Body = Mapping[str, Any]

# Bytes of a request; the SDK cuts its own at a few MB.
LARGEST_BODY = 64 << 20
LARGEST_JSON = 16 << 20
# Values of all tensors of a request, spread out: 12 bytes each while it is computed.
MOST_VALUES = 1 << 25
MOST_SAMPLES = 1024
# Logprobs of a response: positions times the likeliest tokens of each.
MOST_SCORES = 1 << 22
MOST_STOPS = 1024
LONGEST_TEXT = 4096
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-6, 1e6

# What each loss reads of a row beside its targets. The first is the factor: where it is zero,
# a token is scored and teaches nothing.
LOSSES: Mapping[str, tuple[str, ...]] = {
    "cross_entropy": ("weights",),
    "importance_sampling": ("advantages", "logprobs"),
}
# As the SDK reads it: a row of the top-k matrix that was not asked for.
NO_TOKEN, NO_LOGPROB = 0, -99999.0

_KINDS = {pb.DTYPE_FLOAT32: np.float32, pb.DTYPE_INT64: np.int64, pb.DTYPE_INT32: np.int32}
_REQUIRED: Any = object()


class InvalidRequestError(DistillError, ValueError):
    """A request that can't be served as it is; reaches the client as a user error."""


class MissingError(InvalidRequestError):
    """A run or a checkpoint that is not here, or no more: HTTP 404."""


# Fields of JSON bodies


def read_json(content: bytes) -> dict[str, Any]:
    """An object of JSON, as the SDK sends it: no NaN, no infinity, not nested without end."""
    if len(content) > LARGEST_JSON:
        raise InvalidRequestError(
            f"expected at most {LARGEST_JSON} bytes of JSON; found {len(content)}: split it"
        )
    try:
        body = json.loads(content, parse_constant=_refuse_constant)
    except RecursionError:
        raise InvalidRequestError("expected flat JSON; found it nested too deeply") from None
    except ValueError as error:
        raise InvalidRequestError(f"expected JSON; found what can't be read: {error}") from None
    if not isinstance(body, dict):
        raise InvalidRequestError(f"expected a JSON object; found {type(body).__name__}")
    return body


def _refuse_constant(name: str) -> float:
    raise InvalidRequestError(f"expected finite numbers; found {name}")


def whole(body: Body, name: str, low: int, high: int, default: Any = _REQUIRED) -> Any:
    """A whole number of a body within a range; `default` where it is absent or null."""
    return _number(body, name, (low, high), default, int)


def number(body: Body, name: str, low: float, high: float, default: Any = _REQUIRED) -> Any:
    """A finite number of a body within a range; `default` where it is absent or null."""
    found = _number(body, name, (low, high), default, int, float)
    return found if found is default else float(found)


def _number(body: Body, name: str, limits: tuple[float, float], default: Any, *types: type) -> Any:
    found: Any = body.get(name)
    if found is None and default is not _REQUIRED:
        return default
    (low, high), wrong = limits, ", a whole number" if types == (int,) else ", a number"
    kind = "" if type(found) in types else wrong
    if kind or not low <= found <= high:
        raise InvalidRequestError(f"expected {name} in {low}..{high}{kind}; found {shown(found)}")
    return found


def text(body: Body, name: str, default: Any = _REQUIRED) -> Any:
    """A text of a body, of at most `LONGEST_TEXT` characters."""
    found = body.get(name)
    if found is None and default is not _REQUIRED:
        return default
    if not isinstance(found, str) or len(found) > LONGEST_TEXT:
        raise InvalidRequestError(
            f"expected {name} as a text of at most {LONGEST_TEXT} characters; found {shown(found)}"
        )
    return found


def section(body: Body, name: str) -> Body:
    """An object in a body; empty where it is absent or null."""
    found = body.get(name)
    if found is not None and not isinstance(found, dict):
        raise InvalidRequestError(f"expected {name} as an object; found {shown(found)}")
    return found or {}


def texts(body: Body, name: str) -> dict[str, str] | None:
    """An object of texts in a body, such as `user_metadata`; None where it is absent."""
    found = section(body, name)
    for key in found:
        text(found, key)
    return dict(found) if body.get(name) is not None else None


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    if isinstance(value, (list, tuple, dict)):
        return f"{type(value).__name__} of {len(value)}"
    # Python writes no whole numbers of thousands of digits.
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    written = repr(value)
    return written if len(written) <= 80 else f"{written[:77]}..."


def token_ids(values: Any, name: str) -> Ints:
    """A list of whole numbers of 64 bits."""
    if not isinstance(values, list) or not all(type(one) is int for one in values):
        raise InvalidRequestError(
            f"expected {name} as a list of whole numbers; found {shown(values)}"
        )
    try:
        return np.array(values, np.int64)
    except OverflowError:
        raise InvalidRequestError(
            f"expected {name} as numbers of 64 bits; found larger ones"
        ) from None


# Tensors


def _require_shape(shape: Sequence[Any], name: str) -> tuple[int, ...]:
    """A shape of one or two dimensions whose values fit into a request."""
    if not 1 <= len(shape) <= 2 or not all(type(one) is int and one >= 0 for one in shape):
        found = ", ".join(map(shown, shape[:3]))
        raise InvalidRequestError(
            f"expected {name} of shape (N,) or (N, K); found {len(shape)} dimensions, ({found})"
        )
    if math.prod(shape) > MOST_VALUES:
        raise InvalidRequestError(
            f"expected {name} of at most {MOST_VALUES} values; found shape "
            f"({', '.join(map(shown, shape))}): send fewer rows, or fewer targets a token"
        )
    return tuple(shape)


def _shaped(values: Array, shape: tuple[int, ...], name: str) -> Array:
    if math.prod(shape) != len(values):
        raise InvalidRequestError(
            f"expected {name} with as many values as its shape {shape} says; found {len(values)}"
        )
    return values.reshape(shape)


def read_buffer(content: bytes, kind: Any, name: str) -> Array:
    """The numbers in a field of bytes."""
    size = np.dtype(kind).itemsize
    if len(content) % size:
        raise InvalidRequestError(
            f"expected {name} as values of {size} bytes each; found {len(content)} bytes"
        )
    return np.frombuffer(content, kind)


def tensor_shape(tensor: pb.Tensor, name: str) -> tuple[int, ...]:
    """What a tensor says of its shape; a dense one may leave it out."""
    if tensor.dtype not in _KINDS:
        raise InvalidRequestError(f"expected {name} as float32 or int64; found {tensor.dtype}")
    size = np.dtype(_KINDS[tensor.dtype]).itemsize
    return _require_shape(tensor.shape[:] or [len(tensor.dense) // size], name)


def read_tensor(tensor: pb.Tensor, name: str) -> Array:
    """A tensor of one or two dimensions; what a sparse one doesn't list is 0."""
    shape, kind = tensor_shape(tensor, name), _KINDS[tensor.dtype]
    if not tensor.HasField("sparse_csr"):
        return _shaped(read_buffer(tensor.dense, kind, name), shape, name)
    if len(shape) != 2:
        raise InvalidRequestError(f"expected {name} of shape (N, K); found shape {shape}")
    part, (rows, width) = tensor.sparse_csr, shape
    values = read_buffer(part.values, kind, name)
    starts = read_buffer(part.crow_indices, np.int64, name)
    columns = read_buffer(part.col_indices, np.int64, name)
    # Indices lead nowhere outside the matrix, and number the values.
    sound = (
        len(starts) == rows + 1
        and starts[0] == 0
        and starts[-1] == len(values) == len(columns)
        and bool((np.diff(starts) >= 0).all())
        and bool(((columns >= 0) & (columns < width)).all())
    )
    if not sound:
        raise InvalidRequestError(
            f"expected {name} in CSR: {rows + 1} ascending row pointers that end at the number of "
            f"values, and columns below {width}; found {len(starts)} row pointers, {len(values)} "
            f"values and {len(columns)} columns"
        )
    dense = np.zeros(shape, kind)
    dense[np.repeat(np.arange(rows), np.diff(starts)), columns] = values
    return dense


# Sampling


@dataclass(frozen=True)
class PromptScoring:
    """What to say of the prompt's own tokens, of all or of the last `last_n`, and of others.

    `targets` are token ids to score at each position but the first, (len(prompt) - 1, K); -1 asks
    for nothing.
    """

    logprobs: bool = False
    top: int = 0
    last_n: int | None = None
    targets: Ints | None = None

    @property
    def asked(self) -> bool:
        """Whether any score is asked for."""
        return self.logprobs or bool(self.top) or self.targets is not None

    def own(self, length: int) -> int:
        """How many tokens at the end of a prompt of some length are scored themselves."""
        if not (self.logprobs or self.top):
            return 0
        return length - 1 if self.last_n is None else self.last_n

    def reach(self, length: int) -> int:
        """How many at the end are scored, or have a target named for them."""
        own = self.own(length)
        return own if self.targets is None else max(own, length - 1 - self._first)

    @cached_property
    def _first(self) -> int:
        """The first row of targets that names an id."""
        return 0 if self.targets is None else int((self.targets >= 0).any(axis=1).argmax())


@dataclass(frozen=True)
class SampleRequest:
    """One request for samples; `stop` None means the model's own end tokens, which texts and token
    ids take the place of. Penalties lower the logits of tokens that a sample has already.
    """

    prompt: Ints
    num_samples: int
    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: tuple[str | int, ...] | None
    top_logprobs: int
    scoring: PromptScoring
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    @property
    def penalized(self) -> bool:
        """Whether a token depends on those before it in other ways than the model's own."""
        return bool(self.frequency_penalty or self.presence_penalty)


@dataclass
class DrawnSample:
    """The tokens drawn for one sample, the logprob of each, and optionally its rivals."""

    tokens: list[int]
    logprobs: list[float]
    top: list[tuple[list[int], list[float]]]
    stopped: bool


@dataclass(frozen=True)
class PromptScores:
    """Of the last prompt tokens, those in reach: the logprob of each, the K likeliest and their
    logprobs, and the logprobs of the targets; each only if asked for."""

    logprobs: Floats | None = None
    top: tuple[Ints, Floats] | None = None
    targets: Floats | None = None


@dataclass(frozen=True)
class SampleResult:
    """What a sample request returns."""

    sequences: list[DrawnSample]
    scores: PromptScores
    cache_hit_tokens: int


def read_sample_request(body: Body) -> SampleRequest:
    """Read the JSON of `asample`; what the model can hold is checked where it is known."""
    if body.get("prompt_alt_tokens_k"):
        raise InvalidRequestError(
            "the embedded server does not compute prompt_alt_tokens_k: leave it out, or sample "
            "with num_samples"
        )
    params, prompt = section(body, "sampling_params"), _prompt_tokens(section(body, "prompt"))
    temperature = number(params, "temperature", 0.0, MOST_TEMPERATURE, 1.0)
    seed = whole(params, "seed", -(2**63), 2**64 - 1, None)
    top_k, top_p = whole(params, "top_k", -1, 2**31, -1), number(params, "top_p", 0.0, 1.0, 1.0)
    if top_k == 0 or top_p == 0 or 0 < temperature < LEAST_TEMPERATURE:
        raise InvalidRequestError(
            "expected top_k of -1 (off) or 1 and more, top_p in (0, 1], and temperature of 0 or "
            f"from {LEAST_TEMPERATURE}; found {top_k}, {top_p} and {temperature}"
        )
    return SampleRequest(
        prompt=prompt,
        num_samples=whole(body, "num_samples", 1, MOST_SAMPLES, 1),
        max_tokens=whole(params, "max_tokens", 1, 2**31, None),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=secrets.randbits(63) if seed is None else seed,
        stop=_read_stop(params.get("stop")),
        top_logprobs=whole(body, "topk_sample_logprobs", 0, MOST_SCORES, 0),
        scoring=_read_scoring(body, len(prompt)),
        # Of OpenAI's protocol alone.
        frequency_penalty=number(params, "frequency_penalty", -2.0, 2.0, 0.0),
        presence_penalty=number(params, "presence_penalty", -2.0, 2.0, 0.0),
    )


def _prompt_tokens(prompt: Body) -> Ints:
    chunks = prompt.get("chunks")
    if not isinstance(chunks, list) or not all(isinstance(one, dict) for one in chunks):
        raise InvalidRequestError(f"expected prompt.chunks as a list; found {shown(chunks)}")
    if other := {chunk.get("type") for chunk in chunks} - {"encoded_text"}:
        raise InvalidRequestError(
            f"expected text chunks only; found {', '.join(sorted(map(shown, other)))}"
        )
    parts = [token_ids(chunk.get("tokens"), "the tokens of a prompt's chunk") for chunk in chunks]
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    if not len(tokens):
        raise InvalidRequestError("expected a prompt of at least one token; found none")
    return tokens


def _read_stop(stop: Any) -> tuple[str, ...] | tuple[int, ...] | None:
    if stop is None:
        return None
    if isinstance(stop, str):
        stop = [stop]
    alike = isinstance(stop, list) and len(stop) <= MOST_STOPS
    for kind in (str, int):
        if alike and all(type(one) is kind for one in stop):
            for one in stop:
                if kind is str:
                    text({"stop": one}, "stop")
            return tuple(stop)
    raise InvalidRequestError(
        f"expected stop as at most {MOST_STOPS} strings or token ids, not mixed; found "
        f"{shown(stop)}"
    )


def _read_scoring(body: Body, length: int) -> PromptScoring:
    logprobs, top = bool(body.get("prompt_logprobs")), "topk_prompt_logprobs"
    last_n = body.get("prompt_logprobs_last_n")
    if last_n is not None and not (logprobs and type(last_n) is int and 1 <= last_n <= length - 1):
        raise InvalidRequestError(
            f"expected prompt_logprobs_last_n in 1..{length - 1}, with prompt_logprobs; found "
            f"{shown(last_n)}"
        )
    targets = section(body, "target_prompt_logprobs")
    return PromptScoring(
        logprobs,
        whole(body, top, 0, MOST_SCORES, 0),
        last_n,
        _read_targets(targets, length) if targets else None,
    )


def _read_targets(body: Body, length: int) -> Ints:
    """A matrix of ids, -1 where none is, in the SDK's JSON."""
    name, shape = "target_prompt_logprobs", body.get("shape")
    shape = _require_shape(shape if isinstance(shape, list) else [], name)
    wide = len(shape) == 2 and shape[0] == length - 1 and shape[1]
    if not wide or math.prod(shape) > MOST_SCORES or body.get("sparse_crow_indices") is not None:
        raise InvalidRequestError(
            f"expected {name}, not sparse, of {length - 1} rows, one for each prompt token but the "
            f"first, and of at most {MOST_SCORES} values; found shape {shape}"
        )
    ids = _shaped(token_ids(body.get("data"), name), shape, name)
    if not (ids >= 0).any() or ids.min() < -1:
        raise InvalidRequestError(
            f"expected {name} of token ids or -1, and at least one id; found "
            f"{int((ids >= 0).sum())} ids, the lowest {int(ids.min())}"
        )
    return ids


def write_sample_result(request: SampleRequest, result: SampleResult) -> bytes:
    """Encode samples and scores as the SDK expects them."""
    message = pb.SampleResponse(prompt_cache_hit_tokens=result.cache_hit_tokens)
    for sequence in result.sequences:
        part = message.sequences.add()
        part.stop_reason = pb.STOP_REASON_STOP if sequence.stopped else pb.STOP_REASON_LENGTH
        part.tokens = np.array(sequence.tokens, np.int32).tobytes()
        part.logprobs = np.array(sequence.logprobs, np.float32).tobytes()
        if sequence.top:
            ids, logprobs = map(np.array, zip(*sequence.top, strict=True))
            _write_top(part.topk_sampled_logprobs, ids, logprobs)
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
        values, found = _behind(length - 1, scores.targets, 0.0), message.target_prompt_logprobs
        found.dtype = pb.DTYPE_FLOAT32
        found.shape.extend(values.shape)
        asked = request.scoring.targets >= 0
        found.dense = np.where(asked, values, 0.0).astype(np.float32).tobytes()
    return bytes(message.SerializeToString())


def _write_top(part: pb.TopkLogprobs, ids: Array, logprobs: Array) -> None:
    part.token_ids = ids.astype(np.int32).tobytes()
    part.logprobs = logprobs.astype(np.float32).tobytes()
    part.length, part.k = ids.shape


def _behind(length: int, known: Array, filler: float) -> Array:
    """Rows for all positions, of which only the last ones are known."""
    every = np.full((length, *known.shape[1:]), filler, known.dtype)
    if len(known):
        every[-len(known) :] = known
    return every

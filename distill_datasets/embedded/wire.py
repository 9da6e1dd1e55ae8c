"""The wire format: protobuf and JSON of the SDK to plain dataclasses, and back."""

from __future__ import annotations

import importlib.util
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .failures import RequestError

if TYPE_CHECKING:
    from tinker.proto import tinker_public_pb2 as pb
else:

    def _public_proto() -> Any:
        """Load the SDK's messages alone: importing `tinker` itself takes seconds."""
        loaded = sys.modules.get("tinker.proto.tinker_public_pb2")
        if loaded is not None:
            return loaded
        package = importlib.util.find_spec("tinker")
        folder = Path(package.submodule_search_locations[0])
        name = f"{__package__}._tinker_public_pb2"
        spec = importlib.util.spec_from_file_location(
            name, folder / "proto" / "tinker_public_pb2.py"
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    pb = _public_proto()

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

SUPPORTED_LOSS = "cross_entropy"
UNSUPPORTED_SAMPLING = ("topk_prompt_logprobs", "target_prompt_logprobs", "prompt_alt_tokens_k")


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
    prompt_logprobs: bool
    last_n: int | None
    top_logprobs: int


@dataclass
class Drawn:
    """The tokens drawn for one sample, the logprob of each, and optionally its rivals."""

    tokens: list[int]
    logprobs: list[float]
    top: list[tuple[list[int], list[float]]]
    stopped: bool


@dataclass(frozen=True)
class SampleResult:
    """What a sample request returns."""

    sequences: list[Drawn]
    prompt_logprobs: Floats | None
    cache_hit_tokens: int


@dataclass(frozen=True)
class Datum:
    """One training row: inputs, the token to predict at each position, and its weight."""

    tokens: Ints
    targets: Ints
    weights: Floats


@dataclass(frozen=True)
class TrainRequest:
    """Rows to learn from, or only to score when `forward_only`."""

    data: list[Datum]
    forward_only: bool


@dataclass(frozen=True)
class TrainResult:
    """Logprob of every target, row by row, and metrics named `name:reduction`."""

    logprobs: list[Floats]
    metrics: dict[str, float]


def read_sample_request(body: Mapping[str, Any]) -> SampleRequest:
    """Read the JSON of `asample`."""
    _refuse_unsupported(body)
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
        prompt_logprobs=bool(body.get("prompt_logprobs")),
        last_n=body.get("prompt_logprobs_last_n"),
        top_logprobs=int(body.get("topk_sample_logprobs") or 0),
    )
    _check_sampling(request)
    return request


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    asked = [name for name in UNSUPPORTED_SAMPLING if body.get(name)]
    if asked:
        raise RequestError(
            f"the embedded server does not compute {', '.join(asked)}: leave it out, or ask for "
            "prompt_logprobs or topk_sample_logprobs"
        )


def _check_sampling(request: SampleRequest) -> None:
    length = len(request.prompt)
    rules = {
        "a prompt of at least one token": length > 0,
        "num_samples of 1 or more": request.num_samples >= 1,
        "max_tokens of 1 or more": request.max_tokens is None or request.max_tokens >= 1,
        "temperature of 0 or more": 0.0 <= request.temperature < float("inf"),
        "top_p in (0, 1]": 0.0 < request.top_p <= 1.0,
        "top_k of -1 (off) or 1 and more": request.top_k == -1 or request.top_k >= 1,
        "topk_sample_logprobs of 0 or more": request.top_logprobs >= 0,
        f"prompt_logprobs_last_n in 1..{length - 1}": (
            request.last_n is None or 1 <= request.last_n <= length - 1
        ),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise RequestError(f"expected {'; '.join(broken)}; found {request!r}")


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
    return np.array([token for chunk in chunks for token in chunk["tokens"]], dtype=np.int64)


def read_train_message(body: bytes) -> pb.ForwardBackwardRequest:
    """Read the protobuf of `forward_backward`, without looking into its rows."""
    message = pb.ForwardBackwardRequest()
    message.ParseFromString(body)
    return message


def read_train_request(message: pb.ForwardBackwardRequest) -> TrainRequest:
    """Read the rows of a training request."""
    if message.loss_fn != SUPPORTED_LOSS:
        raise RequestError(
            f"the embedded server supports loss_fn={SUPPORTED_LOSS!r}; found {message.loss_fn!r}"
        )
    if not message.data:
        raise RequestError("expected at least one datum; found none")
    return TrainRequest([_read_datum(datum) for datum in message.data], message.forward_only)


def _read_datum(datum: pb.Datum) -> Datum:
    if any(not chunk.HasField("encoded_text") for chunk in datum.model_input):
        raise RequestError("expected text chunks only; found an image or audio chunk")
    parts = [np.frombuffer(chunk.encoded_text.tokens, np.int32) for chunk in datum.model_input]
    tokens = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
    missing = {"target_tokens", "weights"} - set(datum.loss_fn_inputs)
    if missing:
        raise RequestError(
            f"{SUPPORTED_LOSS} expects loss_fn_inputs target_tokens and weights; "
            f"{', '.join(sorted(missing))} missing, found {sorted(datum.loss_fn_inputs)}"
        )
    targets = _read_row(datum.loss_fn_inputs["target_tokens"], "target_tokens")
    weights = _read_row(datum.loss_fn_inputs["weights"], "weights")
    if not len(tokens) == len(targets) == len(weights) or not len(tokens):
        raise RequestError(
            "expected model_input, target_tokens and weights of one length, at least 1; "
            f"found {len(tokens)}, {len(targets)} and {len(weights)}"
        )
    return Datum(tokens, targets.astype(np.int64), weights.astype(np.float32))


def _read_row(tensor: pb.Tensor, name: str) -> NDArray[Any]:
    """A one-dimensional tensor; soft (N, K) targets are refused."""
    if tensor.HasField("sparse_csr") or len(tensor.shape) > 1:
        raise RequestError(
            f"the embedded server supports one hard target per position: expected {name} of "
            f"shape (N,); found shape {tuple(tensor.shape)}"
        )
    kinds = {pb.DTYPE_FLOAT32: np.float32, pb.DTYPE_INT64: np.int64, pb.DTYPE_INT32: np.int32}
    if tensor.dtype not in kinds:
        raise RequestError(f"expected {name} as float32 or int64; found {tensor.dtype}")
    return np.frombuffer(tensor.dense, kinds[tensor.dtype])


def write_sample_result(result: SampleResult) -> bytes:
    """Encode samples as the SDK expects them."""
    message = pb.SampleResponse(prompt_cache_hit_tokens=result.cache_hit_tokens)
    for sequence in result.sequences:
        part = message.sequences.add()
        part.stop_reason = pb.STOP_REASON_STOP if sequence.stopped else pb.STOP_REASON_LENGTH
        part.tokens = np.array(sequence.tokens, np.int32).tobytes()
        part.logprobs = np.array(sequence.logprobs, np.float32).tobytes()
        if sequence.top:
            top = part.topk_sampled_logprobs
            top.token_ids = np.array([ids for ids, _ in sequence.top], np.int32).tobytes()
            top.logprobs = np.array([values for _, values in sequence.top], np.float32).tobytes()
            top.length, top.k = len(sequence.top), len(sequence.top[0][0])
    if result.prompt_logprobs is not None:
        message.prompt_logprobs = result.prompt_logprobs.tobytes()
    return bytes(message.SerializeToString())


def write_train_result(result: TrainResult) -> bytes:
    """Encode logprobs and metrics as the SDK expects them."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics=result.metrics)
    record = message.loss_fn_outputs.add(num_datums=len(result.logprobs))
    field = record.fields["logprobs"]
    field.dtype = pb.DTYPE_FLOAT32
    field.data = b"".join(row.astype(np.float32).tobytes() for row in result.logprobs)
    ends = np.cumsum([0] + [4 * len(row) for row in result.logprobs])
    field.offsets = ends.astype(np.int64).tobytes()
    return bytes(message.SerializeToString())

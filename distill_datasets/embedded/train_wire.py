"""Training requests on the wire: rows in, the logprobs of their targets out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from .failures import RequestError
from .wire import Array, Floats, Ints, pb, read_tensor

# What each loss reads of a row beside its targets. The first is the factor: where it is zero,
# a token is scored and teaches nothing.
LOSSES: Mapping[str, tuple[str, ...]] = {
    "cross_entropy": ("weights",),
    "importance_sampling": ("advantages", "logprobs"),
    "ppo": ("advantages", "logprobs"),
    "cispo": ("advantages", "logprobs"),
}
# Only here does a position have more than one target.
SOFT = "cross_entropy"
_CLIPPING = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
DEFAULTS: Mapping[str, Mapping[str, float]] = {"ppo": _CLIPPING, "cispo": _CLIPPING}


@dataclass(frozen=True)
class Datum:
    """One training row: inputs, the (N, K) tokens to predict at each position, and what the
    loss reads beside them, in the order of `LOSSES` and each (N, K) too.

    `hard` rows came with (N,) targets: their logprobs go back in that shape.
    """

    tokens: Ints
    targets: Ints
    inputs: tuple[Floats, ...]
    hard: bool


@dataclass(frozen=True)
class TrainRequest:
    """Rows to learn from, or only to score when `forward_only`."""

    data: list[Datum]
    loss: str
    config: Mapping[str, float]
    forward_only: bool

    @property
    def digest(self) -> str:
        """The same for the same rows, whoever sends them; 16 hexadecimal digits."""
        content = hashlib.blake2b(self.loss.encode(), digest_size=8)
        for row in self.data:
            arrays: tuple[Array, ...] = (row.tokens, row.targets, *row.inputs)
            for array in arrays:
                content.update(f"{array.shape}".encode())
                content.update(array.tobytes())
        return content.hexdigest()


@dataclass(frozen=True)
class TrainResult:
    """Logprob of every target, row by row, and metrics named `name:reduction`."""

    logprobs: list[Floats]
    metrics: dict[str, float]


def read_train_message(body: bytes) -> pb.ForwardBackwardRequest:
    """Read the protobuf of `forward_backward`, without looking into its rows."""
    message = pb.ForwardBackwardRequest()
    message.ParseFromString(body)
    return message


def read_train_request(message: pb.ForwardBackwardRequest) -> TrainRequest:
    """Read the rows of a training request."""
    if message.loss_fn not in LOSSES:
        raise RequestError(
            f"the embedded server has the losses {', '.join(LOSSES)}; found "
            f"loss_fn={message.loss_fn!r}"
        )
    if not message.data:
        raise RequestError("expected at least one datum; found none")
    rows = [_read_datum(datum, message.loss_fn) for datum in message.data]
    return TrainRequest(rows, message.loss_fn, _read_config(message), message.forward_only)


def _read_config(message: pb.ForwardBackwardRequest) -> dict[str, float]:
    known = DEFAULTS.get(message.loss_fn, {})
    sent = dict(message.loss_fn_config)
    sent |= {name: value.number for name, value in message.loss_fn_config_v2.items()}
    if unknown := sorted(set(sent) - set(known)):
        raise RequestError(
            f"expected loss_fn_config of {message.loss_fn} with {sorted(known) or 'no keys'}; "
            f"found {', '.join(unknown)}"
        )
    return {**known, **sent}


def _read_datum(datum: pb.Datum, loss: str) -> Datum:
    if any(not chunk.HasField("encoded_text") for chunk in datum.model_input):
        raise RequestError("expected text chunks only; found an image or audio chunk")
    parts = [np.frombuffer(chunk.encoded_text.tokens, np.int32) for chunk in datum.model_input]
    tokens = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
    names = ("target_tokens", *LOSSES[loss])
    if set(datum.loss_fn_inputs) != set(names):
        raise RequestError(
            f"{loss} expects loss_fn_inputs {', '.join(names)} and no others; found "
            f"{sorted(datum.loss_fn_inputs)}"
        )
    arrays = [read_tensor(datum.loss_fn_inputs[name], name) for name in names]
    _require_shapes(tokens, dict(zip(names, arrays, strict=True)), loss)
    targets, *inputs = (array.reshape(len(tokens), -1) for array in arrays)
    floats = tuple(array.astype(np.float32) for array in inputs)
    return Datum(tokens, targets.astype(np.int64), floats, arrays[0].ndim == 1)


def _require_shapes(tokens: Ints, arrays: Mapping[str, Array], loss: str) -> None:
    shapes = {array.shape for array in arrays.values()}
    shape = next(iter(shapes))
    most = 2 if loss == SOFT else 1
    if len(shapes) > 1 or not len(tokens) or len(shape) > most or shape[0] != len(tokens):
        found = {name: array.shape for name, array in arrays.items()}
        allowed = "(N,) or (N, K)" if loss == SOFT else "(N,)"
        raise RequestError(
            f"{loss} expects its inputs of one shape, {allowed} for a model_input of N tokens, "
            f"at least 1; found N={len(tokens)} and {found}"
        )


def write_train_result(result: TrainResult) -> bytes:
    """Encode logprobs and metrics as the SDK expects them."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics=result.metrics)
    for shape, rows in _of_one_shape(result.logprobs):
        record = message.loss_fn_outputs.add(num_datums=len(rows))
        field = record.fields["logprobs"]
        field.dtype = pb.DTYPE_FLOAT32
        field.data = b"".join(row.astype(np.float32).tobytes() for row in rows)
        field.trailing_shape.extend(shape)
        ends = np.cumsum([0] + [4 * row.size for row in rows])
        field.offsets = ends.astype(np.int64).tobytes()
    return bytes(message.SerializeToString())


def _of_one_shape(rows: Sequence[Floats]) -> Iterator[tuple[tuple[int, ...], list[Floats]]]:
    """Neighbours with as many targets per position: the SDK reads records in order."""
    for shape, same in groupby(rows, key=lambda row: row.shape[1:]):
        yield shape, list(same)

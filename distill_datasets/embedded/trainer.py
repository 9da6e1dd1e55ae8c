"""Learning: rows as the SDK sends them, the loss, its gradients, and Adam."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .batching import require_tokens
from .lora import Adapters, LoraSpec, load_tensors, save_tensors
from .model import LoadedModel
from .wire import (
    LOSSES,
    MOST_VALUES,
    Array,
    Floats,
    Ints,
    InvalidRequestError,
    number,
    pb,
    read_buffer,
    read_tensor,
    shown,
    tensor_shape,
)

MOST_ROWS = 16_384
# Only here does a position have more than one target.
SOFT = "cross_entropy"
# Logits held at once, a few times over: more are computed in parts, and again for their gradients.
MOST_LOGITS = 1 << 26
MOST_PART = 1 << 27
# Of the memory that requests may use: what the rows of a part hold for their gradients together,
# and what one row does before its layers are computed again for them.
PART_SHARE, ROW_SHARE = 8, 2
# A part costs some time of its own, so that few rows go together whatever their lengths.
MOST_PADDED, LEAST_ROWS = 1.25, 8
OPTIMIZER_FILE = "optimizer.safetensors"
# Settings of Adam stay within float32, and its betas below one.
MOST_RATE, BELOW_ONE = 1e30, math.nextafter(1.0, 0.0)
recomputed = partial(checkpoint, use_reentrant=False)
# From the logprobs of the targets and the loss's inputs to an objective per target.
Objective = Callable[[Tensor, Sequence[Tensor]], Tensor]


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


def read_train_request(message: pb.ForwardBackwardRequest) -> TrainRequest:
    """Read the rows of a training request."""
    loss = message.loss_fn
    if loss not in LOSSES:
        raise InvalidRequestError(
            f"the embedded server has the losses {', '.join(LOSSES)}; found loss_fn={loss!r}"
        )
    if not 1 <= len(message.data) <= MOST_ROWS:
        raise InvalidRequestError(
            f"expected at least one datum and at most {MOST_ROWS}; found {len(message.data)}"
        )
    if message.loss_fn_config or message.loss_fn_config_v2:
        names = sorted({*message.loss_fn_config, *message.loss_fn_config_v2})
        raise InvalidRequestError(
            f"{loss} has no settings: expected no loss_fn_config; found "
            f"{', '.join(map(shown, names[:5]))}"
        )
    left, rows = MOST_VALUES, []
    for datum in message.data:
        rows.append(_read_datum(datum, loss, left))
        left -= rows[-1].targets.size
    return TrainRequest(rows, loss, message.forward_only)


def _read_datum(datum: pb.Datum, loss: str, left: int) -> Datum:
    """A row; `left` values are what the tensors of the rows behind may still have."""
    if any(not chunk.HasField("encoded_text") for chunk in datum.model_input):
        raise InvalidRequestError("expected text chunks only; found an image or audio chunk")
    parts = [
        read_buffer(chunk.encoded_text.tokens, np.int32, "model_input")
        for chunk in datum.model_input
    ]
    tokens = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
    names = ("target_tokens", *LOSSES[loss])
    if set(datum.loss_fn_inputs) != set(names):
        raise InvalidRequestError(
            f"{loss} expects loss_fn_inputs {', '.join(names)} and no others; found "
            f"{', '.join(map(shown, sorted(datum.loss_fn_inputs)[:8]))}"
        )
    tensors = {name: datum.loss_fn_inputs[name] for name in names}
    found = {name: tensor_shape(tensor, name) for name, tensor in tensors.items()}
    shape = found["target_tokens"]
    most = 2 if loss == SOFT else 1
    fits = len(tokens) and shape[0] == len(tokens) and math.prod(shape)
    if set(found.values()) != {shape} or not fits or len(shape) > most:
        allowed = "(N,) or (N, K)" if loss == SOFT else "(N,)"
        raise InvalidRequestError(
            f"{loss} expects its inputs of one shape, {allowed} for a model_input of N tokens, "
            f"at least 1; found N={len(tokens)} and {found}"
        )
    if math.prod(shape) > left:
        raise InvalidRequestError(
            f"expected at most {MOST_VALUES} targets in a request; found more: send fewer rows, "
            "or fewer targets a token"
        )
    arrays = [read_tensor(tensor, name) for name, tensor in tensors.items()]
    if arrays[0].dtype.kind != "i":
        raise InvalidRequestError("expected target_tokens as int64; found float32")
    targets, *inputs = (array.reshape(len(tokens), -1) for array in arrays)
    floats = tuple(array.astype(np.float32) for array in inputs)
    return Datum(tokens, targets.astype(np.int64), floats, arrays[0].ndim == 1)


def write_train_result(logprobs: Sequence[Floats], metrics: Mapping[str, float]) -> bytes:
    """Encode the logprob of every target, row by row, and metrics named `name:reduction`."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics=metrics)
    # Neighbours with as many targets per position: the SDK reads records in order.
    for shape, same in groupby(logprobs, key=lambda row: row.shape[1:]):
        rows = list(same)
        record = message.loss_fn_outputs.add(num_datums=len(rows))
        field = record.fields["logprobs"]
        field.dtype = pb.DTYPE_FLOAT32
        field.data = b"".join(row.astype(np.float32).tobytes() for row in rows)
        field.trailing_shape.extend(shape)
        ends = np.cumsum([0] + [4 * row.size for row in rows])
        field.offsets = ends.astype(np.int64).tobytes()
    return bytes(message.SerializeToString())


def _cross_entropy(logprobs: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    (weights,) = inputs
    return logprobs * weights


def _importance_sampling(logprobs: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The advantage, times how much likelier the token is than where it was sampled."""
    advantages, sampled = inputs
    return (logprobs - sampled).exp() * advantages


OBJECTIVES: Mapping[str, Objective] = {
    "cross_entropy": _cross_entropy,
    "importance_sampling": _importance_sampling,
}


@dataclass(frozen=True)
class AdamParams:
    """One step's settings, named and defaulted as the SDK does."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> AdamParams:
        """Read and check what the SDK sends."""
        most = {"beta1": BELOW_ONE, "beta2": BELOW_ONE}
        return cls(
            *(
                number(body, one.name, 0.0, most.get(one.name, MOST_RATE), one.default)
                for one in fields(cls)
            )
        )


class Trainee:
    """One adapter being trained, with its gradients and Adam's moments."""

    def __init__(self, base: LoadedModel, adapters: Adapters, spec: LoraSpec) -> None:
        self.spec = spec
        self.name = adapters.create(spec)
        self._base, self._adapters = base, adapters
        self._weights = adapters.parameters(self.name)
        self._parameters = list(self._weights.values())
        self._adam = torch.optim.AdamW(self._parameters, lr=0.0)

    def forward_backward(self, request: TrainRequest) -> tuple[list[Floats], dict[str, float]]:
        """Logprobs of the targets and metrics; adds gradients unless `forward_only`.

        What stands before the first weighted target of a row is not computed then: its logprobs
        are 0, as their products with the weights are. A row without weights is only scored.
        """
        for row in request.data:
            self._check(row, request)
        self._adapters.train(self.name)
        backwards, memory, token = not request.forward_only, self._base.memory, self._base.token
        held = token.learned if backwards else token.kept + token.computed
        logprobs: dict[int, Floats] = {}
        sums: list[Tensor] | None = None
        total = 0.0
        # Products are in the base's number format; the adapter itself keeps all its digits.
        mixed = self._base.dtype != torch.float32
        precision = torch.autocast(self._base.device.type, self._base.dtype, enabled=mixed)
        for part in _parts(request.data, self._base.vocabulary, memory // PART_SHARE // held):
            rows = [request.data[index] for index in part]
            longest = max(len(row.tokens) for row in rows)
            again = backwards and longest * token.learned > memory // ROW_SHARE
            with (
                torch.set_grad_enabled(backwards),
                precision,
                checkpointing(self._base.network, again),
            ):
                scored, loss = self._score(rows, request)
            total += float(loss.detach())
            logprobs |= zip(part, scored, strict=True)
            if backwards:
                own = torch.autograd.grad(loss, self._parameters)
                sums = list(own if sums is None else torch._foreach_add(sums, own))
        _require_finite(total, "the loss")
        if sums is not None:
            for one, found in zip(self._parameters, sums, strict=True):
                one.grad = found if one.grad is None else one.grad + found
        return [logprobs[index] for index in range(len(request.data))], {"loss:sum": total}

    @property
    def _least_bytes(self) -> int:
        """What a token holds whose layers are computed again: their inputs, and one in whole."""
        config = self._base.network.config
        layers = int(config.num_hidden_layers)
        inputs = layers * int(config.hidden_size) * self._base.dtype.itemsize
        return self._base.token.learned // layers + inputs

    def step(self, params: AdamParams) -> dict[str, float]:
        """Apply the gradients gathered since the last step."""
        gradients = [one.grad for one in self._parameters if one.grad is not None]
        if not gradients:
            raise InvalidRequestError(
                "expected a forward_backward before optim_step; found no gradients since the "
                "last step: send data first"
            )
        norm = float(nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self._adam.zero_grad()
            _require_finite(norm, "the gradient norm")
        if params.grad_clip_norm > 0:
            nn.utils.clip_grad_norm_(self._parameters, params.grad_clip_norm)
        self._adam.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        self._adam.step()
        self._adam.zero_grad()
        return {"grad_norm": norm}

    def save(self, folder: Path, *, optimizer: bool) -> None:
        """Write the adapter, and Adam's moments if training is to resume; not the gradients."""
        self._adapters.save(self.name, folder)
        if optimizer:
            state = {
                f"{key}/{name}": value
                for name, weight in self._weights.items()
                for key, value in self._adam.state.get(weight, {}).items()
            }
            save_tensors(state, folder / OPTIMIZER_FILE)

    def restore(self, folder: Path, *, optimizer: bool) -> None:
        """Continue from a saved folder; Adam starts anew unless `optimizer`."""
        # Read whole before anything changes: a torn file leaves the adapter as it was.
        file = folder / OPTIMIZER_FILE
        moments = load_tensors(file) if optimizer else {}
        wrong = [key for key, value in moments.items() if not self._is_moment(key, value)]
        if wrong:
            raise InvalidRequestError(
                f"expected Adam's moments of this adapter in {str(file)!r}; found {wrong[:3]}: "
                "load another checkpoint, or this one without its optimizer"
            )
        self._adapters.restore(self.name, folder)
        self._adam.state.clear()
        self._adam.zero_grad()
        for key, value in moments.items():
            kind, name = key.split("/", 1)
            weight = self._weights[name]
            # Adam counts its steps on the CPU.
            self._adam.state[weight][kind] = value if kind == "step" else value.to(weight.device)

    def _is_moment(self, key: str, value: Tensor) -> bool:
        kind, _, name = key.partition("/")
        weight = self._weights.get(name)
        if weight is None or kind not in ("step", "exp_avg", "exp_avg_sq"):
            return False
        return value.shape == (weight.shape if kind != "step" else torch.Size([]))

    def _check(self, row: Datum, request: TrainRequest) -> None:
        most = self._base.card.max_context
        if len(row.tokens) > most:
            raise InvalidRequestError(
                f"expected rows of at most {most} tokens, the model's context; "
                f"found {len(row.tokens)}: shorten the row"
            )
        if row.targets.shape[1] > self._base.vocabulary:
            raise InvalidRequestError(
                f"expected at most {self._base.vocabulary} targets a token, the vocabulary; "
                f"found {row.targets.shape[1]}"
            )
        require_tokens(row.tokens, self._base, "model_input")
        require_tokens(row.targets, self._base, "target")
        needed = len(row.tokens) * self._least_bytes
        if not request.forward_only and needed > self._base.memory // ROW_SHARE:
            raise InvalidRequestError(
                f"expected rows that can be learned in {self._base.memory // ROW_SHARE >> 20} MiB "
                f"of memory; found {len(row.tokens)} tokens, which take {needed >> 20} MiB: "
                "shorten the row"
            )
        for name, values in zip(LOSSES[request.loss], row.inputs, strict=True):
            if not np.isfinite(values).all():
                raise InvalidRequestError(f"expected finite {name}; found NaN or infinity")

    def _score(self, rows: Sequence[Datum], request: TrainRequest) -> tuple[list[Floats], Tensor]:
        """Logprobs of the targets, and the loss."""
        device = self._base.device
        ids = _pad([row.tokens for row in rows]).to(device)
        targets = _pad([row.targets for row in rows]).to(device)
        inputs = [
            _pad(values).to(device) for values in zip(*(row.inputs for row in rows), strict=True)
        ]
        # Padding is on the right: causality alone keeps it from any real token.
        hidden = self._base.network.base_model(input_ids=ids, use_cache=False).last_hidden_state
        # Most tokens of a prompt are not learned from: their logits need no gradient.
        learned = (inputs[0] != 0).any(dim=-1)
        logprobs = self._project(hidden[learned], targets[learned])
        objective = OBJECTIVES[request.loss]
        loss = -objective(logprobs, [one[learned] for one in inputs]).sum()
        values = torch.zeros_like(inputs[0])
        values[learned] = logprobs.detach()
        rest = ~learned & _asked(learned, rows, request)
        with torch.no_grad():
            values[rest] = self._project(hidden[rest], targets[rest])
        return _unpad(values.cpu().numpy(), rows), loss

    def _project(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Logprob of each of the (n, K) targets from the hidden state before it."""
        size = max(1, MOST_LOGITS // self._base.vocabulary)
        if len(hidden) <= size:
            return self._look_up(hidden, targets)
        parts = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
        return torch.cat([recomputed(self._look_up, *part) for part in parts])

    def _look_up(self, hidden: Tensor, targets: Tensor) -> Tensor:
        network: Any = self._base.network
        logits = network.get_output_embeddings()(hidden).float()
        if targets.shape[1] == 1:
            return -F.cross_entropy(logits, targets[:, 0], reduction="none").unsqueeze(1)
        return torch.log_softmax(logits, dim=-1).gather(1, targets)


@contextmanager
def checkpointing(network: Any, on: bool) -> Iterator[None]:
    """Let each layer keep nothing but its input, and be computed again for its gradients."""
    found = [one for one in network.modules() if isinstance(one, GradientCheckpointingLayer)]
    layers: list[Any] = found if on else []
    for layer in layers:
        layer._gradient_checkpointing_func = recomputed
        layer.gradient_checkpointing = layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False


def _asked(learned: Tensor, rows: Sequence[Datum], request: TrainRequest) -> Tensor:
    """The places whose logprobs somebody reads: of a prompt that is learned behind, none."""
    device = learned.device
    lengths = torch.tensor([len(row.tokens) for row in rows], device=device)
    inside = torch.arange(learned.shape[1], device=device) < lengths[:, None]
    # Elsewhere a token that was sampled may have no advantage, and still a ratio that is watched.
    if request.forward_only or request.loss != SOFT:
        return inside
    whole = ~learned.any(dim=1, keepdim=True)
    return inside & (whole | (learned.cumsum(dim=1) > 0))


def _parts(rows: Sequence[Datum], vocabulary: int, most: int) -> Iterator[list[int]]:
    """Rows of similar length together, each part of at most so many tokens and little padding."""
    most = min(most, MOST_PART // vocabulary)
    part: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index].tokens)):
        width = len(rows[index].tokens)
        too_wide = part and width > MOST_PADDED * len(rows[part[0]].tokens)
        if part and ((len(part) + 1) * width > most or (too_wide and len(part) >= LEAST_ROWS)):
            yield part
            part = []
        part.append(index)
    yield part


def _pad(rows: Sequence[Array]) -> Tensor:
    """Rows of (N,) or (N, K) numbers as one tensor, filled up with zeros."""
    width = max(len(row) for row in rows)
    depths = [max(row.shape[1] for row in rows)] if rows[0].ndim > 1 else []
    padded = np.zeros((len(rows), width, *depths), rows[0].dtype)
    for index, row in enumerate(rows):
        if depths:
            padded[index, : len(row), : row.shape[1]] = row
        else:
            padded[index, : len(row)] = row
    return torch.from_numpy(padded)


def _unpad(values: Floats, rows: Sequence[Datum]) -> list[Floats]:
    """The shape that each row's targets came in."""
    kept = [values[index, : len(row.targets)] for index, row in enumerate(rows)]
    return [
        own[:, 0] if row.hard else own[:, : row.targets.shape[1]]
        for own, row in zip(kept, rows, strict=True)
    ]


def _require_finite(value: float, name: str) -> None:
    if not math.isfinite(value):
        raise InvalidRequestError(
            f"expected {name} to be finite; found {value}: nothing was added, lower the "
            "learning rate or load an earlier checkpoint"
        )

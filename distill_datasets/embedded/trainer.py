"""Learning: the loss of rows, its gradients, and Adam."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .decoding import require_tokens
from .failures import RequestError
from .lora import Adapters, LoraSpec, save_tensors
from .losses import OBJECTIVES
from .model import Base
from .train_wire import LOSSES, Datum, TrainRequest, TrainResult
from .wire import Array, Floats

# Logits held at once: longer requests are computed in parts, their gradients added up.
MOST_LOGITS = 1 << 27
# A part costs some time of its own, so that few rows go together whatever their lengths.
MOST_PADDED, LEAST_ROWS = 1.25, 8
OPTIMIZER_FILE = "optimizer.safetensors"


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
        names = cls.__dataclass_fields__
        params = cls(**{name: float(body[name]) for name in names if name in body})
        bounds = {name: math.inf for name in names} | {"beta1": 1.0, "beta2": 1.0}
        for name, bound in bounds.items():
            value = getattr(params, name)
            if not 0 <= value < bound:
                raise RequestError(f"expected {name} in [0, {bound}); found {value!r}")
        return params


class Trainee:
    """One adapter being trained, with its gradients and Adam's moments."""

    def __init__(self, base: Base, adapters: Adapters, spec: LoraSpec) -> None:
        self.spec = spec
        self.name = adapters.create(spec)
        self._base, self._adapters = base, adapters
        self._weights = adapters.parameters(self.name)
        self._adam = torch.optim.AdamW(self._parameters, lr=0.0)
        self._has_gradients = False

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return list(self._weights.values())

    def forward_backward(self, request: TrainRequest) -> TrainResult:
        """Score rows and, unless `forward_only`, add the gradients of the weighted sum."""
        for row in request.data:
            self._check(row, request.loss)
        self._adapters.activate(self.name)
        logprobs: list[Floats | None] = [None] * len(request.data)
        sums: list[Tensor] | None = None
        total = 0.0
        for part in _parts(request.data, self._base.vocabulary):
            with torch.set_grad_enabled(not request.forward_only):
                scored, loss = self._score([request.data[index] for index in part], request)
            total += float(loss.detach())
            for index, values in zip(part, scored, strict=True):
                logprobs[index] = values
            if not request.forward_only:
                found = torch.autograd.grad(loss, self._parameters)
                sums = list(found if sums is None else torch._foreach_add(sums, found))
        _require_finite(total, "the loss")
        if sums is not None:
            self._accumulate(sums)
        scored_rows = [values for values in logprobs if values is not None]
        return TrainResult(scored_rows, {"loss:sum": total})

    def step(self, params: AdamParams) -> dict[str, float]:
        """Apply the gradients gathered since the last step."""
        if not self._has_gradients:
            raise RequestError(
                "expected a forward_backward before optim_step; found no gradients since the "
                "last step: send data first"
            )
        norm = float(nn.utils.get_total_norm([_gradient(one) for one in self._parameters]))
        if not math.isfinite(norm):
            self._clear()
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
        self._clear()
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
        self._adapters.restore(self.name, folder)
        self._adam.state.clear()
        self._clear()
        if not optimizer:
            return
        for key, value in load_file(folder / OPTIMIZER_FILE).items():
            kind, name = key.split("/", 1)
            weight = self._weights[name]
            # Adam counts its steps on the CPU.
            moved = value if kind == "step" else value.to(weight.device)
            self._adam.state[weight][kind] = moved

    def _check(self, row: Datum, loss: str) -> None:
        most = self._base.card.max_context
        if len(row.tokens) > most:
            raise RequestError(
                f"expected rows of at most {most} tokens, the model's context; "
                f"found {len(row.tokens)}: shorten the row"
            )
        require_tokens(row.tokens, self._base, "model_input")
        require_tokens(row.targets, self._base, "target")
        for name, values in zip(LOSSES[loss], row.inputs, strict=True):
            if not np.isfinite(values).all():
                raise RequestError(f"expected finite {name}; found NaN or infinity")

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
        loss = -objective(logprobs, [one[learned] for one in inputs], request.config).sum()
        values = torch.empty_like(inputs[0])
        values[learned] = logprobs.detach()
        lengths = torch.tensor([len(row.tokens) for row in rows], device=device)
        rest = ~learned & (torch.arange(ids.shape[1], device=device) < lengths[:, None])
        with torch.no_grad():
            values[rest] = self._project(hidden[rest], targets[rest])
        return _unpad(values.cpu().numpy(), rows), loss

    def _project(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Logprob of each of the (n, K) targets from the hidden state before it."""
        network: Any = self._base.network
        logits = network.get_output_embeddings()(hidden).float()
        if targets.shape[1] == 1:
            return -F.cross_entropy(logits, targets[:, 0], reduction="none").unsqueeze(1)
        return torch.log_softmax(logits, dim=-1).gather(1, targets)

    def _accumulate(self, sums: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(self._parameters, sums, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._has_gradients = True

    def _clear(self) -> None:
        self._adam.zero_grad(set_to_none=True)
        self._has_gradients = False


def _parts(rows: Sequence[Datum], vocabulary: int) -> Iterator[list[int]]:
    """Rows of similar length together, each part within MOST_LOGITS and with little padding."""
    part: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index].tokens)):
        width = len(rows[index].tokens)
        too_wide = part and width > MOST_PADDED * len(rows[part[0]].tokens)
        if part and (
            (len(part) + 1) * width * vocabulary > MOST_LOGITS
            or (too_wide and len(part) >= LEAST_ROWS)
        ):
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


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("expected a gradient after forward_backward; found none")
    return parameter.grad


def _require_finite(value: float, name: str) -> None:
    if not math.isfinite(value):
        raise RequestError(
            f"expected {name} to be finite; found {value}: nothing was added, lower the "
            "learning rate or load an earlier checkpoint"
        )

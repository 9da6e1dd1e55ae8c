"""Low-rank adapters over the frozen base: one is trained at a time, many sampled in one pass."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .conversion import ADAPTER_FILE, AdapterLayout
from .model import MOST_RANK, LoadedModel
from .wire import InvalidRequestError, whole

# Layers that are kept for adapters to come.
MOST_FREE = 8
# Tinker's documented choice: the update is scaled by ALPHA / rank whatever the rank.
ALPHA = 32


@dataclass(frozen=True)
class LoraSpec:
    """Which layers get an adapter, and how it starts."""

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    @classmethod
    def read(cls, body: Mapping[str, Any] | None) -> LoraSpec:
        """Read the SDK's `lora_config`."""
        if not body:
            raise InvalidRequestError(
                "the embedded server trains LoRA only: expected a lora_config"
            )
        flags = {
            name: body[name]
            for name in ("train_unembed", "train_mlp", "train_attn")
            if name in body
        }
        if not all(type(on) is bool for on in flags.values()):
            raise InvalidRequestError(f"expected true or false; found {flags}")
        spec = cls(
            whole(body, "rank", 1, MOST_RANK),
            whole(body, "seed", -(2**63), 2**64 - 1, None),
            **flags,
        )
        if not (spec.train_unembed or spec.train_mlp or spec.train_attn):
            raise InvalidRequestError(
                "expected at least one of train_attn, train_mlp, train_unembed; found none"
            )
        return spec

    def dump(self) -> dict[str, Any]:
        """Write the spec as JSON values."""
        return asdict(self)


# A part of a pass: the adapter that its tokens are computed with, None for the base alone.
Run = tuple[str | None, int]


class Adapters:
    """The adapters of one base model; use from one thread only.

    On a model with tied embeddings `train_unembed` adapts the output side alone: the input
    embedding stays frozen, since the shared matrix itself never changes.
    """

    def __init__(self, base: LoadedModel) -> None:
        self._network = base.network
        self._device, self._dtype = base.device, base.dtype
        self._layers = _linear_layers(base.network)
        self._peft: PeftModel | None = None
        self._trained: str | None = None
        # Which tokens of a pass are sampled with which adapter; None while one is trained.
        self._parts: list[tuple[str, slice]] | None = []
        # What fits into the layers of loaded adapters, and of those that are gone, oldest first.
        self._shapes, self._free = dict[str, tuple[Any, ...]](), list[str]()
        self._count = 0

    def create(self, spec: LoraSpec) -> str:
        """Add an adapter that changes nothing yet, and return its name."""
        with torch.random.fork_rng():
            if spec.seed is None:
                torch.seed()
            else:
                torch.manual_seed(spec.seed)
            return self._add(self._config(spec))

    # Samples are drawn in inference mode, whose tensors could have no gradient later: PEFT asks it
    # of all adapters in turn.
    @torch.inference_mode(mode=False)
    def load(self, folder: Path) -> str:
        """Add a saved adapter, and return its name."""
        config = self._config(AdapterLayout.read(folder))
        shape = config.r, config.lora_alpha, *sorted(config.target_modules or ())
        # Making its layers takes ten times as long as filling them.
        name = next((one for one in self._free if self._shapes[one] == shape), None)
        if name is None:
            name = self._add(config)
            self._shapes[name] = shape
        else:
            self._free.remove(name)
        try:
            self.restore(name, folder)
        except InvalidRequestError:
            self.drop(name)
            raise
        for weight in self.parameters(name).values():
            # Only what is trained needs more digits than the base has.
            weight.data = weight.data.to(self._dtype)
        return name

    def restore(self, name: str, folder: Path) -> None:
        """Give an adapter the weights saved in a folder; a torn file changes nothing."""
        peft, file = self._require(), folder / ADAPTER_FILE
        weights = load_tensors(file)
        own = get_peft_model_state_dict(peft, adapter_name=name, save_embedding_layers=False)
        if {key: one.shape for key, one in weights.items()} != {
            key: one.shape for key, one in own.items()
        }:
            differ = sorted(set(weights) ^ set(own))[:3] or "other shapes"
            raise InvalidRequestError(
                f"the adapter in {str(file)!r} doesn't fit this model: {differ}; load it over "
                "the model it was trained on"
            )
        moved = {key: value.to(self._device) for key, value in weights.items()}
        set_peft_model_state_dict(peft, moved, adapter_name=name)

    def save(self, name: str, folder: Path) -> None:
        """Write an adapter as PEFT does: adapter_config.json and adapter_model.safetensors."""
        peft = self._require()
        weights = get_peft_model_state_dict(peft, adapter_name=name, save_embedding_layers=False)
        save_tensors(weights, folder / ADAPTER_FILE)
        config = peft.peft_config[name]
        config.inference_mode = True
        config.save_pretrained(str(folder))
        config.inference_mode = False

    @torch.inference_mode(mode=False)
    def drop(self, name: str) -> None:
        """Forget a loaded adapter; the next one of its shape takes its place."""
        self._free.append(name)
        if len(self._free) > MOST_FREE:
            gone = self._free.pop(0)
            del self._shapes[gone]
            with warnings.catch_warnings():
                # The one that happens to be active: which it is matters in training alone.
                warnings.filterwarnings("ignore", message=".*which is now deleted.*")
                self._require().delete_adapter(gone)
            self._trained = None

    def train(self, name: str) -> None:
        """Make the network compute with this adapter, and its gradients."""
        self._parts = None
        if name != self._trained:
            self._require().set_adapter(name)
            self._trained = name

    def sample(self, runs: Sequence[Run]) -> None:
        """Make the network compute the tokens of a pass with an adapter after the other."""
        parts, start = [], 0
        for name, tokens in runs:
            if name is not None:
                parts.append((name, slice(start, start + tokens)))
            start += tokens
        self._parts = parts

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The trainable weights of an adapter, by a name that holds in every process."""
        marker = f".{name}."
        return {
            key.replace(marker, "."): parameter
            for key, parameter in self._require().named_parameters()
            if marker in key
        }

    def _config(self, spec: LoraSpec | AdapterLayout) -> LoraConfig:
        alpha: Any = ALPHA
        if isinstance(spec, LoraSpec):
            wanted = {"attn": spec.train_attn, "mlp": spec.train_mlp, "unembed": spec.train_unembed}
            found = {path.rsplit(".", 1)[-1] for kind, path in self._layers if wanted[kind]}
            if not found:
                raise InvalidRequestError(
                    f"found no linear layers for {[kind for kind, on in wanted.items() if on]} "
                    f"in {type(self._network).__name__}"
                )
            targets = sorted(found)
        else:
            alpha, targets = spec.scale * spec.rank, list(spec.layers)
            if unknown := sorted({*targets} - {path for _, path in self._layers}):
                raise InvalidRequestError(
                    f"the adapter is for layers that this model lacks: {unknown[:5]}"
                )
        return LoraConfig(
            r=spec.rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM"
        )

    def _add(self, config: LoraConfig) -> str:
        self._count += 1
        name = f"adapter{self._count}"
        with warnings.catch_warnings():
            # Tied embeddings: a warning about merging, which never happens here.
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            if self._peft is None:
                # Only this call mutates the network; later adapters join its layers.
                self._peft = get_peft_model(self._network, config, adapter_name=name)
            else:
                self._peft.add_adapter(name, config)
        for module in self._peft.modules():
            if isinstance(module, LoraLayer):
                # Its weights have the base's number format, or get it by autocast.
                module.cast_input_dtype_enabled = False
                module.forward = partial(self._compute, module)
        self._trained = None
        return name

    def _compute(self, layer: Any, states: Tensor, *more: Any, **named: Any) -> Tensor:
        """A layer's product, shared by all tokens, and the change of each adapter to its own."""
        if self._parts is None:
            trained: Tensor = type(layer).forward(layer, states, *more, **named)
            return trained
        out: Tensor = layer.base_layer(states)
        rows, changed = states.flatten(0, -2), out.view(-1, out.shape[-1])
        for name, part in self._parts:
            if name in layer.scaling:
                down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
                changed[part].addmm_(rows[part] @ down.T, up.T, alpha=layer.scaling[name])
        return out

    def _require(self) -> PeftModel:
        if self._peft is None:
            raise RuntimeError("expected an adapter to exist; found none")
        return self._peft


def _linear_layers(network: Any) -> list[tuple[str, str]]:
    """Kind and path of each linear layer; read before adapters wrap them."""
    output = network.get_output_embeddings()
    kinds = {"attn": "attn", "attention": "attn", "mlp": "mlp", "feed_forward": "mlp"}
    return [
        (
            "unembed" if module is output else next(kinds[part] for part in kinds if part in path),
            path,
        )
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear)
        and (module is output or any(part in path for part in kinds))
    ]


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write named tensors; raises `OSError` on a full disk."""
    ready = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    try:
        save_file(ready, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file.name}: {error}") from error


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Read named tensors; a missing or torn file is an error that names it."""
    try:
        found: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InvalidRequestError(
            f"the checkpoint's file {str(file)!r} can't be read: {error}; load another checkpoint"
        ) from error
    return found

"""Low-rank adapters over the frozen base: many side by side, one active at a time."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from .failures import RequestError
from .model import MOST_RANK, Base

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
            raise RequestError("the embedded server trains LoRA only: expected a lora_config")
        spec = cls(**{name: body[name] for name in cls.__dataclass_fields__ if name in body})
        if not 1 <= spec.rank <= MOST_RANK:
            raise RequestError(f"expected a LoRA rank in 1..{MOST_RANK}; found {spec.rank}")
        if not (spec.train_unembed or spec.train_mlp or spec.train_attn):
            raise RequestError(
                "expected at least one of train_attn, train_mlp, train_unembed; found none"
            )
        return spec

    def dump(self) -> dict[str, Any]:
        """Write the spec as JSON values."""
        return asdict(self)


class Adapters:
    """The adapters of one base model; use from one thread only.

    On a model with tied embeddings `train_unembed` adapts the output side alone: the input
    embedding stays frozen, since the shared matrix itself never changes.
    """

    def __init__(self, base: Base) -> None:
        self._network = base.network
        self._device = base.device
        self._layers = _linear_layers(base.network)
        self._peft: PeftModel | None = None
        self._active: str | None = None
        self._free: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
        self._count = 0

    def create(self, spec: LoraSpec) -> str:
        """Add an adapter that changes nothing yet, and return its name."""
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=ALPHA,
            target_modules=self._targets(spec),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():
            if spec.seed is None:
                torch.seed()
            else:
                torch.manual_seed(spec.seed)
            return self._add(config)

    def load(self, folder: Path) -> str:
        """Add a saved adapter, and return its name."""
        config = LoraConfig.from_pretrained(str(folder))
        # Making its layers takes ten times as long as filling them.
        free = self._free[_shape(config)]
        name = free.pop() if free else self._add(config)
        self.restore(name, folder)
        return name

    def restore(self, name: str, folder: Path) -> None:
        """Give an adapter the weights saved in a folder."""
        weights = load_peft_weights(str(folder), device=str(self._device))
        outcome: Any = set_peft_model_state_dict(self._require(), weights, adapter_name=name)
        if outcome.unexpected_keys:
            raise RequestError(
                f"the adapter in {str(folder)!r} has weights that this model lacks: "
                f"{outcome.unexpected_keys[:3]}; load it over the model it was trained on"
            )

    def save(self, name: str, folder: Path) -> None:
        """Write an adapter as PEFT does: adapter_config.json and adapter_model.safetensors."""
        peft = self._require()
        weights = get_peft_model_state_dict(peft, adapter_name=name, save_embedding_layers=False)
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in weights.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        config = peft.peft_config[name]
        config.inference_mode = True
        config.save_pretrained(str(folder))
        config.inference_mode = False

    def drop(self, name: str) -> None:
        """Forget a loaded adapter; the next one of its shape takes its place."""
        self._free[_shape(self._require().peft_config[name])].append(name)

    def activate(self, name: str | None) -> None:
        """Make the network compute with this adapter, or with none."""
        if name == self._active:
            return
        peft = self._require()
        tuner: Any = peft.base_model
        if name is None:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            peft.set_adapter(name)
        self._active = name

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The trainable weights of an adapter, by a name that holds in every process."""
        marker = f".{name}."
        return {
            key.replace(marker, "."): parameter
            for key, parameter in self._require().named_parameters()
            if marker in key
        }

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
        self._active = "unknown"
        self.activate(None)
        return name

    def _require(self) -> PeftModel:
        if self._peft is None:
            raise RuntimeError("expected an adapter to exist; found none")
        return self._peft

    def _targets(self, spec: LoraSpec) -> list[str]:
        wanted = {"attn": spec.train_attn, "mlp": spec.train_mlp, "unembed": spec.train_unembed}
        found = [name for kind, name in self._layers if wanted[kind]]
        if not found:
            raise RequestError(
                f"found no linear layers for {[kind for kind, on in wanted.items() if on]} "
                f"in {type(self._network).__name__}"
            )
        return sorted(set(found))


def _shape(config: Any) -> tuple[Any, ...]:
    return config.r, config.lora_alpha, *sorted(config.target_modules)


def _linear_layers(network: Any) -> list[tuple[str, str]]:
    """Kind and last name of each linear layer; read before adapters wrap them."""
    output = network.get_output_embeddings()
    layers = []
    for path, module in network.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if module is output:
            layers.append(("unembed", path.rsplit(".", 1)[-1]))
        elif "attn" in path or "attention" in path:
            layers.append(("attn", path.rsplit(".", 1)[-1]))
        elif "mlp" in path or "feed_forward" in path:
            layers.append(("mlp", path.rsplit(".", 1)[-1]))
    return layers


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write named tensors beside an adapter."""
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, file)

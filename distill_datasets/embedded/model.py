"""The frozen base model: what a folder promises, and the network itself."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .failures import RequestError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The widest layers of the models that run here are a few times wider; beyond, a typing error is
# likelier than a wish.
MOST_RANK = 512
# Below this size a second thread costs more than it brings.
SMALL_MODEL = 50_000_000


@dataclass(frozen=True)
class ModelCard:
    """What can be said of a model folder without loading it."""

    name: str
    folder: Path
    max_context: int
    fingerprint: str

    @classmethod
    def read(cls, folder: Path, name: str) -> ModelCard:
        """Read a folder as `save_pretrained` writes it."""
        config_file = folder / "config.json"
        for pattern in ("config.json", "*.safetensors", "tokenizer_config.json"):
            if not any(folder.glob(pattern)):
                raise RequestError(
                    "expected a model folder with config.json, *.safetensors and a tokenizer, as "
                    f"save_pretrained writes them; found no {pattern} in {str(folder)!r}"
                )
        config = json.loads(config_file.read_text("utf-8"))
        if "max_position_embeddings" not in config:
            raise RequestError(
                f"expected max_position_embeddings in {str(config_file)!r}: a causal language "
                f"model states its context length there; found {sorted(config)}"
            )
        return cls(name, folder, int(config["max_position_embeddings"]), _fingerprint(folder))

    def answers_to(self, name: str) -> bool:
        """Whether a client means this model."""
        return name in (self.name, str(self.folder))

    def require(self, name: str) -> None:
        """Refuse a model that is not served here."""
        if not self.answers_to(name):
            raise RequestError(
                f"this server has one model, {self.name!r} (also {str(self.folder)!r}); "
                f"found base_model={name!r}"
            )


def _fingerprint(folder: Path) -> str:
    """Identify the weights by config and the start of each file: whole files may be many GB."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Base:
    """A loaded base model with its tokenizer; fp32, on the GPU if there is one."""

    card: ModelCard
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    end_tokens: frozenset[int]
    vocabulary: int


def load_base(card: ModelCard) -> Base:
    """Load a model folder; imports torch and transformers, hence seconds."""
    import torch
    import transformers.utils

    # transformers imports scikit-learn, a third of its import time, for a kind of generation
    # that is not used here.
    utilities: Any = transformers.utils
    utilities.is_sklearn_available = lambda: False
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from . import prefix_attention as attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = AutoModelForCausalLM.from_pretrained(
        card.folder, dtype=torch.float32, attn_implementation=attention.register()
    )
    _require_full_attention(network.config)
    if not _set_by_user() and network.num_parameters() < SMALL_MODEL:
        torch.set_num_threads(1)
    network.requires_grad_(False).train(False).to(device)
    _require_plain_head(network)
    tokenizer = AutoTokenizer.from_pretrained(card.folder)
    ends = frozenset(_end_tokens(network, tokenizer))
    vocabulary = int(network.config.vocab_size)
    return Base(card, network, tokenizer, device, ends, vocabulary)


def _set_by_user() -> bool:
    return "OMP_NUM_THREADS" in os.environ


def _require_full_attention(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "use_sliding_window", True) and getattr(
        config, "sliding_window", None
    )
    if kinds != {"full_attention"} or (windowed and not hasattr(config, "layer_types")):
        raise RequestError(
            "the embedded server runs models whose layers all use full attention "
            f"(Qwen3, Qwen2.5, Llama, SmolLM); found {sorted(kinds)} in {config.model_type!r}"
        )


def _require_plain_head(network: Any) -> None:
    """The trainer projects hidden states itself, and only where a gradient is needed."""
    import torch

    ids = torch.tensor([[0, 1]], device=network.device)
    with torch.inference_mode():
        hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
        projected = network.get_output_embeddings()(hidden)
        logits = network(input_ids=ids, use_cache=False).logits
    if not torch.allclose(projected, logits, atol=1e-4):
        raise RequestError(
            "the embedded server runs models whose logits are a plain projection of the hidden "
            f"states (Qwen3, Qwen2.5, Llama, SmolLM); {network.config.model_type!r} scales them"
        )


def _end_tokens(network: Any, tokenizer: Any) -> set[int]:
    found = network.generation_config.eos_token_id or network.config.eos_token_id or []
    ends = {found} if isinstance(found, int) else set(found)
    return ends | ({tokenizer.eos_token_id} - {None})

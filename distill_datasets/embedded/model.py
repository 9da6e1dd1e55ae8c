"""The frozen base model: checks a model folder, and loads its network.

A model folder is data from somebody else: nothing in it runs, and no file outside it is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import ModelError, OutputError
from distill_datasets.files import write_file

from .machine import (
    ModelSize,
    TokenBytes,
    choose_dtype,
    choose_threads,
    foretell,
    memory_of,
    torch_dtypes,
    user_cache,
)
from .wire import InvalidRequestError, shown

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

# The widest layers of the models that run here are a few times wider; beyond, a typing error is
# likelier than a wish.
MOST_RANK = 512
# Sizes in a config that a model which runs here may have: memory is taken by them.
MOST_OF = {
    "max_position_embeddings": 1 << 22,
    "vocab_size": 1 << 21,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "num_hidden_layers": 512,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 1024,
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), 4096),
    "moe_intermediate_size": 1 << 18,
}
SETTLED_SECONDS = 2.0  # after which a file that changes again has another time
ADAPTER_FILE = "adapter_model.safetensors"
FACTOR = "base_model.model.{}.lora_{}.weight"
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")
# Keys of an adapter's configuration that change no weight, or are read.
_ADAPTER_KEYS = {
    "peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "task_type", "lora_dropout",
    "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "init_lora_weights",
    "peft_version", "runtime_config", "loftq_config", "eva_config", "corda_config",
    "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying",
    "megatron_core", "qalora_group_size",
}  # fmt: skip
NEEDED_FILES = ("config.json", "*.safetensors", "tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class ModelCard:
    """What can be said of a model folder without loading it."""

    name: str
    folder: Path
    max_context: int
    fingerprint: str
    size: ModelSize
    asked_dtype: str = "auto"
    asked_threads: int | None = None

    @classmethod
    def read(
        cls, folder: Path, name: str, dtype: str = "auto", threads: int | None = None
    ) -> ModelCard:
        """Read a folder as `save_pretrained` writes it."""
        for pattern in NEEDED_FILES:
            if not any(folder.glob(pattern)):
                raise InvalidRequestError(
                    "expected a model folder with config.json, *.safetensors and a tokenizer, as "
                    f"save_pretrained writes them; found no {pattern} in {str(folder)!r}"
                )
        _require_own_files(folder)
        config = read_object(folder / "config.json")
        _require_plain_config(config, folder)
        known = config["max_position_embeddings"], _fingerprint(folder), ModelSize.read(config)
        return cls(name, folder, *known, dtype, threads)

    @cached_property
    def dtype(self) -> str:
        """The number format that it is computed in, `fp32` or `bf16`; may take seconds."""
        return choose_dtype(self.asked_dtype, self.size)

    @cached_property
    def weights(self) -> str:
        """The digest of all weights, read once and remembered: the fingerprint sees only starts."""
        return digest_weights(self.folder)

    def foretold(self) -> str:
        """What a large model takes on this machine, empty for others.

        Raises `InvalidRequestError` for one that can't be loaded.
        """
        return foretell(self.size, self.dtype, self.name)

    def answers_to(self, name: str) -> bool:
        """Whether a client means this model."""
        return name in (self.name, str(self.folder))

    def require(self, name: str) -> None:
        """Refuse a model that is not served here."""
        if not self.answers_to(name):
            raise InvalidRequestError(
                f"this server has one model, {self.name!r} (also {str(self.folder)!r}); "
                f"found base_model={name!r}"
            )


def read_object(file: Path) -> dict[str, Any]:
    """A file's JSON object; anything else is an error that names the file."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{str(file)!r} can't be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise InvalidRequestError(f"expected a JSON object in {str(file)!r}; found {shown(found)}")
    return found


@dataclass(frozen=True)
class AdapterLayout:
    """What a LoRA adapter that anybody may have saved in PEFT's format adds to which layers."""

    rank: int
    scale: float
    layers: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> AdapterLayout:
        """Read it; raises `ModelError` for one that does more than add to linear layers' products,
        by its configuration or its weights.
        """
        config = read_object(folder / "adapter_config.json")
        others = {key for key, value in config.items() if value and key not in _ADAPTER_KEYS}
        if config.get("bias") in (None, "none"):
            others.discard("bias")
        if config.get("peft_type") != "LORA" or others:
            raise ModelError(
                f"Expected a plain LoRA adapter in {str(folder)!r}; found "
                f"peft_type={config.get('peft_type')!r} with {sorted(others)[:5]}, which can't be "
                "applied: merge it into its base with PEFT first."
            )
        rank: Any = config.get("r")
        alpha: Any = config.get("lora_alpha")
        known = type(rank) is int and 1 <= rank <= MOST_RANK
        if not known or type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise ModelError(
                f"Expected a rank r in 1..{MOST_RANK} and a number lora_alpha in "
                f"{str(folder / 'adapter_config.json')!r}; found r={rank!r}, lora_alpha={alpha!r}."
            )
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return cls(rank, scale, _adapted_layers(folder / ADAPTER_FILE))


def _adapted_layers(file: Path) -> tuple[str, ...]:
    """The layers that the factors in an adapter's file belong to."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ModelError(
            f"Expected {ADAPTER_FILE} in {str(file.parent)!r}, as PEFT saves it; found none."
        )
    try:
        with safe_open(file, framework="np") as weights:
            named = {key: _FACTOR.fullmatch(key) for key in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{str(file)!r} can't be read: {error}. Save it again.") from error
    layers = tuple(sorted({match[1] for match in named.values() if match}))
    if odd := [key for key, match in named.items() if match is None]:
        raise ModelError(
            f"Expected the weights lora_A and lora_B of linear layers in {str(file)!r}; found "
            f"{odd[:3]}, which can't be applied: merge it into its base with PEFT first."
        )
    if len(named) != 2 * len(layers):
        raise ModelError(f"Expected lora_A and lora_B of each layer in {str(file)!r}; one lacks.")
    return layers


def _require_own_files(folder: Path) -> None:
    """Refuse links and names that lead out of the folder.

    The Hub's cache keeps the files of a snapshot in the blobs beside it.
    """
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parent.parent / "blobs")
    for file in folder.iterdir():
        if not any(file.resolve().is_relative_to(root) for root in roots):
            raise InvalidRequestError(
                f"{str(file)!r} is a link that leads out of the model's folder, to "
                f"{str(file.resolve())!r}: put a copy of that file in its place"
            )
    for index in folder.glob("*.index.json"):
        named = read_object(index).get("weight_map")
        shards = set(map(str, named.values())) if isinstance(named, dict) else set()
        for shard in sorted(shards):
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise InvalidRequestError(
                    f"expected {str(index)!r} to name files beside it; found {shown(shard)}"
                )


def _require_plain_config(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a config that names other files, needs more than weights, or is out of range."""
    if "max_position_embeddings" not in config:
        raise InvalidRequestError(
            f"expected max_position_embeddings in {str(folder / 'config.json')!r}: a causal "
            f"language model states its context length there; found {sorted(config)}"
        )
    for name, most in MOST_OF.items():
        size = config.get(name)
        if size is not None and (type(size) is not int or not 1 <= size <= most):
            raise InvalidRequestError(
                f"expected {name} in 1..{most} in {str(folder / 'config.json')!r}; found "
                f"{shown(size)}"
            )
    for name in ("quantization_config", "transformers_weights"):
        if config.get(name) is not None:
            raise InvalidRequestError(
                f"the embedded server runs plain weights in *.safetensors; found {name} in "
                f"{str(folder / 'config.json')!r}: use the model's unquantized folder"
            )
    if (folder / "adapter_config.json").exists():
        raise InvalidRequestError(
            f"expected a whole model in {str(folder)!r}; found an adapter over another one: "
            "merge the adapter into its base first"
        )


def require_fitting(file: Path) -> None:
    """Refuse a model by its config alone: what can't be served is not worth fetching."""
    config = read_object(file)
    _require_plain_config(config, file.parent)
    size = ModelSize.read(config)
    foretell(size, choose_dtype(os.environ.get("EMBEDDED_DTYPE", "auto"), size), file.parent.name)


def digest_weights(folder: Path) -> str:
    """What tells two models of one name apart: weights and tokenizer, in 12 digits."""
    return digest_files(sorted([*folder.glob("*.safetensors"), folder / "tokenizer.json"]))[:12]


def digest_files(paths: Sequence[Path]) -> str:
    """The digest of all bytes of some files, the first of which gives the note its name.

    Reads them once, and remembers the digest in the user's cache for as long as each file keeps its
    size and its times: a change in the middle that hides its own time still changes the file's.
    """
    stats = [path.stat() for path in paths]
    files = [
        [path.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        for path, stat in zip(paths, stats, strict=True)
    ]
    places = "\n".join(str(path.resolve()) for path in paths)
    name = hashlib.sha256(places.encode(errors="surrogateescape")).hexdigest()[:32]
    note = user_cache() / "weights" / f"{name}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["files"] == files:
            return str(known["digest"])
    content = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
    digest = content.hexdigest()
    # A file that is being written may change once more without another time or size.
    if time.time() - max(stat.st_mtime for stat in stats) > SETTLED_SECONDS:
        with suppress(OutputError):
            write_file(note, json.dumps({"files": files, "digest": digest}))
    return digest


def _fingerprint(folder: Path) -> str:
    """Identify the weights by config and the start of each file: whole files may be many GB."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class LoadedModel:
    """A base model with its tokenizer, on the GPU if there is one; `dtype` is its weights'.

    `token` is what each token takes of `memory`, which is what requests may use.
    """

    card: ModelCard
    network: PreTrainedModel
    tokenizer: Tokenizer
    device: torch.device
    end_tokens: frozenset[int]
    vocabulary: int
    token: TokenBytes
    memory: int
    dtype: torch.dtype


# transformers changes what the whole process does while it loads: two at once lack weights.
_LOADING = threading.RLock()
_COMPILER, _TRACER = "torch._dynamo", "torch._dynamo._trace_wrapped_higher_order_op"


class _CompilerStandIn(ModuleType):
    """What transformers takes of torch's compiler when it is imported: marks upon functions.

    Whatever else is asked for is the compiler's own.
    """

    __path__: list[str] = []

    def disable(self, function: Any = None, *_: Any, **__: Any) -> Any:
        """Leave a function as it is, also where it decorates."""
        return function or (lambda decorated: decorated)

    def allow_in_graph(self, function: Any) -> Any:
        """Leave a function as it is."""
        return function

    def __getattr__(self, name: str) -> Any:
        """Import what this stands in for."""
        if name.startswith("__"):
            raise AttributeError(name)
        for standing in (_COMPILER, _TRACER):
            if isinstance(sys.modules.get(standing), _CompilerStandIn):
                del sys.modules[standing]
        return getattr(import_module(self.__name__), name)


@contextmanager
def lean_transformers() -> Iterator[None]:
    """Import transformers, and load with it, without three quarters of what it would import.

    That is scikit-learn and torch's compiler, seconds that nothing here has a use for.
    """
    import transformers.utils

    utilities: Any = transformers.utils
    utilities.is_sklearn_available = lambda: False
    with _LOADING:
        if _COMPILER in sys.modules:
            yield
            return
        tracer = _CompilerStandIn(_TRACER)
        vars(tracer)["TransformGetItemToIndex"] = lambda: import_module(
            _TRACER
        ).TransformGetItemToIndex()
        sys.modules.update({_COMPILER: _CompilerStandIn(_COMPILER), _TRACER: tracer})
        try:
            yield
        finally:
            for name in (_COMPILER, _TRACER):
                if isinstance(sys.modules.get(name), _CompilerStandIn):
                    del sys.modules[name]


def load_model(card: ModelCard) -> LoadedModel:
    """Load a model folder; imports torch and transformers, hence seconds."""
    import torch
    from tokenizers import Tokenizer

    with lean_transformers():
        from transformers import AutoModelForCausalLM

        from . import prefix_attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch_dtypes()[card.dtype]
    # Each shape of a product in bf16 stays prepared: a thousand of them took gigabytes.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    loading: Any = AutoModelForCausalLM.from_pretrained
    with lean_transformers():
        network, read = loading(
            card.folder,
            dtype=dtype,
            attn_implementation=prefix_attention.register(),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := sorted(read["missing_keys"]):
        raise InvalidRequestError(
            f"expected all weights of a {network.config.model_type} in {str(card.folder)!r}; it "
            f"lacks {missing[:3]}: fetch or save it again"
        )
    config = network.config
    _require_full_attention(config)
    torch.set_num_threads(choose_threads(card.asked_threads, card.size))
    network.requires_grad_(False).train(False).to(device)
    _require_plain_head(network)
    # Read by the library of tokenizers alone: a class of transformers' may be any model's own.
    tokenizer = Tokenizer.from_file(str(card.folder / "tokenizer.json"))
    ends = frozenset(_end_tokens(network, tokenizer, card.folder))
    weights = card.size.parameters * dtype.itemsize
    memory = 3 * max(0, memory_of(device.type) - weights) // 4
    token = TokenBytes.read(config.to_dict(), dtype.itemsize)
    sizes = int(config.vocab_size), token, memory
    return LoadedModel(card, network, tokenizer, device, ends, *sizes, dtype)


def _require_full_attention(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "use_sliding_window", True) and getattr(
        config, "sliding_window", None
    )
    if kinds != {"full_attention"} or (windowed and not hasattr(config, "layer_types")):
        raise InvalidRequestError(
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
        raise InvalidRequestError(
            "the embedded server runs models whose logits are a plain projection of the hidden "
            f"states (Qwen3, Qwen2.5, Llama, SmolLM); {network.config.model_type!r} scales them"
        )


def _end_tokens(network: Any, tokenizer: Tokenizer, folder: Path) -> set[int]:
    found = network.generation_config.eos_token_id or network.config.eos_token_id or []
    ends = {found} if isinstance(found, int) else set(found)
    end = read_object(folder / "tokenizer_config.json").get("eos_token")
    written = end.get("content") if isinstance(end, dict) else end
    return ends | ({tokenizer.token_to_id(str(written))} - {None})

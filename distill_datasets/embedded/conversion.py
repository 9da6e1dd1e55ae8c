"""What is made into a model folder first: a GGUF file, or an adapter over its base.

Both are data from somebody else: nothing in them runs, and sizes are held against what the rest of
the file says. The folder is made once, in the user's cache, under a name that its content decides.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import ModelError
from distill_datasets.files import one_writer, replacing

from .model import MOST_RANK, digest_files, read_object, user_cache

if TYPE_CHECKING:
    from torch import Tensor

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
# Weights in one file of a folder; twice as much is in memory at once.
SHARD_BYTES = 2 << 30
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# How text is cut before pairs are merged, by the names that GGUF files give it.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _LLAMA3,
    "qwen2": _LLAMA3.replace("{1,3}", ""),
}
CONTROL, USER_DEFINED = 3, 4


def _made(source: Path, parts: Sequence[Path], fill: Callable[[Path], None]) -> Path:
    """The folder that `fill` makes of a source, whose content is in `parts`; made once."""
    folder = user_cache() / "models" / f"{source.stem}-{digest_files(parts)[:12]}"
    if not folder.is_dir():
        said = f"Waiting for another process, which makes {str(source)!r} into a model folder."
        with one_writer(folder, "conversion", beside=True, waiting=said):
            # Another process may have made it since, and use it now.
            if not folder.is_dir():
                with replacing(folder) as building:
                    fill(building)
    return folder


def _texts(base: Path) -> list[Path]:
    """What a model's folder holds beside its weights: configuration, tokenizer, template."""
    return sorted(one for one in base.iterdir() if one.suffix in (".json", ".jinja", ".txt"))


def open_gguf(file: Path) -> Path:
    """A GGUF file as a model folder, its weights in fp32.

    Raises `ModelError` for an architecture or a tokenizer that is not known, and for a torn file.
    """
    return _made(file, [file], lambda folder: _convert_gguf(file, folder))


def _convert_gguf(file: Path, folder: Path) -> None:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            f"Reading {str(file)!r} needs a package: pip install 'distill-datasets[gguf]'."
        ) from error
    try:
        reader = GGUFReader(file)
        content = _Gguf({name: one.contents() for name, one in reader.fields.items()}, file)
        tensors = {one.name: one for one in reader.tensors}
        content.require_known(tensors)
        _write_gguf(folder, content, tensors)
    except ModelError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ModelError(
            f"{str(file)!r} can't be read as a GGUF model: {error!r}. Fetch it again."
        ) from error


class _Gguf:
    """What a GGUF file says of its model, beside the weights."""

    def __init__(self, fields: Mapping[str, Any], file: Path) -> None:
        self.fields, self.file = fields, file
        self.architecture = str(fields.get("general.architecture"))

    def of(self, name: str, *default: Any) -> Any:
        """A field of the architecture's own."""
        key = f"{self.architecture}.{name}"
        return self.fields.get(key, *default) if default else self.fields[key]

    def require_known(self, tensors: Mapping[str, Any]) -> None:
        """Refuse what would be computed wrongly."""
        kind, cut = (self.fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
        others = [name for name in tensors if not _named(name)]
        scaled = self.of("rope.scaling.type", "none") != "none" or "rope_freqs.weight" in tensors
        biased = self.architecture != "qwen2" and any(name.endswith(".bias") for name in tensors)
        problems = {
            f"the architecture {self.architecture!r} (known: {', '.join(ARCHITECTURES)})": (
                self.architecture not in ARCHITECTURES
            ),
            f"a tokenizer of the kind {kind!r}, {cut!r} (known: gpt2 with {', '.join(SPLITS)})": (
                kind != "gpt2" or cut not in SPLITS
            ),
            "scaled rotary positions": scaled,
            "attention in windows": bool(self.of("attention.sliding_window", 0)),
            "biases": biased,
            f"the tensors {others[:3]}": bool(others) and not scaled,
        }
        if found := [problem for problem, is_so in problems.items() if is_so]:
            raise ModelError(
                f"{str(self.file)!r} has {found[0]}, which is not read from GGUF files: use the "
                "model's folder with safetensors ('embedded:<folder or Hub id>')."
            )

    def config(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration in the form that transformers reads."""
        heads, hidden = self.of("attention.head_count"), self.of("embedding_length")
        width = self.of("attention.key_length", self.of("rope.dimension_count", hidden // heads))
        rope = {"rope_theta": self.of("rope.freq_base", 10000.0), "rope_type": "default"}
        return {
            "architectures": [ARCHITECTURES[self.architecture]],
            "model_type": self.architecture,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": self.of("feed_forward_length"),
            "num_hidden_layers": self.of("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.of("attention.head_count_kv", heads),
            "head_dim": width,
            "max_position_embeddings": self.of("context_length"),
            "rms_norm_eps": self.of("attention.layer_norm_rms_epsilon"),
            "rope_parameters": rope,
            "vocab_size": int(tensors["token_embd.weight"].shape[1]),
            "tie_word_embeddings": "output.weight" not in tensors,
            **{f"{name}_token_id": self.token(name) for name in ("bos", "eos")},
            "dtype": "float32",
        }

    def token(self, name: str) -> int | None:
        """The id of a token with a role."""
        found: int | None = self.fields.get(f"tokenizer.ggml.{name}_token_id")
        return found

    def tokenizer(self) -> Any:
        """The tokenizer, from the file's own vocabulary and merges."""
        from tokenizers import AddedToken, Tokenizer, models

        tokens, kinds, merges = (
            self.fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges")
        )
        cut = self.fields["tokenizer.ggml.pre"]
        core = Tokenizer(
            models.BPE(
                vocab={token: place for place, token in enumerate(tokens)},
                merges=[tuple(pair.split(" ", 1)) for pair in merges],
                # A word that is a token is that token, whatever its merges are.
                ignore_merges=cut == "llama-bpe",
            )
        )
        _cut_text(core, cut)
        added = [(t, k) for t, k in zip(tokens, kinds, strict=True) if k in (CONTROL, USER_DEFINED)]
        core.add_tokens([AddedToken(t, special=k == CONTROL, normalized=False) for t, k in added])
        return core

    def tokenizer_config(self) -> dict[str, Any]:
        """What transformers reads beside the tokenizer."""
        tokens = self.fields["tokenizer.ggml.tokens"]
        roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        named = {role: self.token(name) for role, name in roles.items()}
        if named["pad"] is None:
            named["pad"] = named["eos"]
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.of("context_length"),
            "clean_up_tokenization_spaces": False,
            **{f"{role}_token": tokens[one] for role, one in named.items() if one is not None},
        }


def _cut_text(core: Any, cut: str) -> None:
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=SPLITS[cut] is None)
    first: list[Any] = []
    if cut == "smollm":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    elif pattern := SPLITS[cut]:
        first = [pre_tokenizers.Split(Regex(pattern), "isolated")]
    core.pre_tokenizer = pre_tokenizers.Sequence([*first, whole])
    if cut == "qwen2":
        core.normalizer = normalizers.NFC()
    core.decoder = decoders.ByteLevel()


def _named(tensor: str) -> str:
    """A tensor's name in the folder, empty where it has none."""
    *block, name, kind = (
        tensor.rsplit(".", 2) if tensor.count(".") > 1 else ["", *tensor.split(".")]
    )
    place = re.fullmatch(r"blk\.(\d+)", block[0]) if block and block[0] else None
    if name not in _NAMES or kind not in ("weight", "bias") or bool(block[0]) != bool(place):
        return ""
    return f"model.layers.{place[1]}.{_NAMES[name]}.{kind}" if place else f"{_NAMES[name]}.{kind}"


def _write_gguf(folder: Path, content: _Gguf, tensors: Mapping[str, Any]) -> None:
    config = content.config(tensors)
    _write_json(folder / "config.json", config)
    ends = dict.fromkeys(content.token(name) for name in ("eos", "eot", "eom"))
    known = [one for one in ends if one is not None]
    _write_json(folder / "generation_config.json", {"eos_token_id": known})
    _write_json(folder / "tokenizer_config.json", content.tokenizer_config())
    content.tokenizer().save(str(folder / "tokenizer.json"))
    template = content.fields.get("tokenizer.chat_template")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    save_shards(folder, _dequantized(config, tensors))


def _dequantized(
    config: Mapping[str, Any], tensors: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    import numpy as np
    import torch
    from gguf import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, tensor in tensors.items():
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))
        rotated = next((count for key, count in heads.items() if f".{key}." in name), 0)
        if rotated and config["model_type"] == "llama":
            # Pairs that rotate together are neighbours in the file, and half a head apart here.
            pairs = values.reshape(rotated, -1, 2, values.shape[-1])
            values = pairs.transpose(1, 2).reshape(values.shape)
        yield _named(name), values.contiguous()


def save_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write tensors as they come, in as many files as their size asks for, with an index."""
    from safetensors.torch import save_file

    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    count = size = total = 0

    def flush() -> None:
        name = f"model-{count:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush()
            count, size = count + 1, 0
        shard[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    _write_json(folder / "model.safetensors.index.json", index)


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


def open_adapter(folder: Path, find_base: Callable[[str], Path]) -> Path:
    """A LoRA adapter as PEFT saves it, added to its base: a model folder of its own.

    `find_base` finds the base by the name in the adapter's configuration, without fetching it.
    Raises `ModelError` for an adapter that does more than add to the products of linear layers.
    """
    config, layout = read_object(folder / "adapter_config.json"), AdapterLayout.read(folder)
    base = find_base(str(config.get("base_model_name_or_path") or ""))
    weights = sorted([*base.glob("*.safetensors"), *_texts(base)])
    parts = [*weights, folder / ADAPTER_FILE, folder / "adapter_config.json"]
    return _made(folder, parts, lambda new: _merge(new, base, folder, layout))


def _merge(folder: Path, base: Path, adapter: Path, layout: AdapterLayout) -> None:
    from safetensors.torch import load_file

    factors = load_file(adapter / ADAPTER_FILE)
    # The two factors of each layer's change, by the layer's name.
    pairs = {
        one: (factors[FACTOR.format(one, "A")], factors[FACTOR.format(one, "B")])
        for one in layout.layers
    }
    config = read_object(base / "config.json")
    untied = "lm_head" in pairs and bool(config.get("tie_word_embeddings"))
    if untied:
        # The output changes and the input doesn't: they are one matrix no longer.
        config["tie_word_embeddings"] = False
    for file in _texts(base):
        if "index" not in file.name:
            shutil.copyfile(file, folder / file.name)
    _write_json(folder / "config.json", config)
    tensors = _tensors(base, untied=untied)
    save_shards(folder, ((name, _changed(name, one, pairs, layout.scale)) for name, one in tensors))
    if pairs:
        raise ModelError(
            f"The adapter changes layers that its base {str(base)!r} lacks: {sorted(pairs)[:3]}. "
            "Is base_model_name_or_path the model that it was trained on?"
        )


def _tensors(base: Path, *, untied: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors; `untied` gives the input's matrix once more as the output's."""
    from safetensors import safe_open

    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a mapping)
                values = weights.get_tensor(name)
                if not (untied and name == "lm_head.weight"):
                    yield name, values
                if untied and name == "model.embed_tokens.weight":
                    yield "lm_head.weight", values.clone()


def _changed(
    name: str, values: Tensor, pairs: dict[str, tuple[Tensor, Tensor]], scale: float
) -> Tensor:
    """A layer's weights with its change, which is taken out of `pairs`, in fp32."""
    pair = pairs.pop(name.removesuffix(".weight"), None)
    if pair is None:
        return values
    down, up = (one.float() for one in pair)
    shapes = tuple(up.shape), tuple(down.shape)
    if len(shapes[0] + shapes[1]) != 4 or (up.shape[0], down.shape[1]) != values.shape:
        raise ModelError(
            f"The adapter's factors of {name!r} are {shapes[0]} and {shapes[1]}; the base's "
            f"weights are {tuple(values.shape)}: it was trained on another model."
        )
    if up.shape[1] != down.shape[0]:
        raise ModelError(f"The adapter's factors of {name!r} don't fit each other: {shapes}.")
    return values.float() + scale * (up @ down)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    kept = {key: value for key, value in content.items() if value is not None}
    file.write_text(json.dumps(kept, indent=2), "utf-8")

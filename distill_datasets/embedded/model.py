"""The frozen base model: what its folder may hold, what it takes on this machine, and its network.

A model folder is data from somebody else: nothing in it runs, and no file outside it is read. Its
number format and its threads are measured: a laptop and a server differ by an order of magnitude in
both, and neither the processor's name nor its number of cores tells, since another process may
hold the cores.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import OutputError
from distill_datasets.files import write_file

from .wire import InvalidRequestError, shown

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

DTYPES = ("fp32", "bf16")
BYTES = {"fp32": 4, "bf16": 2}
# Below this number of parameters most time goes elsewhere than into products of matrices: one
# thread and fp32 are best, whatever is measured.
SMALL_MODEL = 50_000_000
# Rows of a product that is measured: what a batch of samples has.
ROWS = 64
# How much faster bf16 must be to be worth its digits, and two threads to be worth both cores.
WORTH = 1.3
TRIES, SECONDS = 5, 0.02
# Prompt tokens a second, below which a model's pace is said before it starts.
SLOW = 200
# Weights beside what the system, the client and the keys and values take.
MOST_MEMORY = 0.9
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
NEEDED_FILES = ("config.json", "*.safetensors", "tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model by its config: all, those that one token uses, a layer's widths."""

    parameters: int
    active: int
    widths: tuple[int, int]

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> ModelSize:
        """Estimate what a checked config describes, within a hundredth for models of usual form."""
        hidden, layers = (config.get(name) or 0 for name in ("hidden_size", "num_hidden_layers"))
        inner = config.get("intermediate_size") or 4 * hidden
        heads, pairs, width = heads_of(config)
        ends = (config.get("vocab_size") or 0) * hidden
        outer = ends if config.get("tie_word_embeddings") else 2 * ends
        attention = 2 * hidden * width * (heads + pairs)
        experts = config.get("num_experts") or config.get("num_local_experts") or 0
        if experts:
            inner = config.get("moe_intermediate_size") or inner
        each = 3 * hidden * inner
        used = min(config.get("num_experts_per_tok") or 1, experts) if experts else 1
        return cls(
            outer + layers * (attention + max(experts, 1) * each),
            ends + layers * (attention + used * each),
            # What is measured takes little memory, and larger products are as fast.
            (min(max(hidden, 1), 2048), min(max(inner, 1), 8192)),
        )


def heads_of(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Heads of the queries, heads of keys and values, and the width of one."""
    heads = config.get("num_attention_heads") or 1
    pairs = config.get("num_key_value_heads") or heads
    return heads, pairs, config.get("head_dim") or (config.get("hidden_size") or 0) // heads


@dataclass(frozen=True)
class TokenBytes:
    """What a token takes: its keys and values, the layer's states while it is computed, and all
    layers' while it is learned from."""

    kept: int
    computed: int
    learned: int

    @classmethod
    def read(cls, config: Mapping[str, Any], size: int) -> TokenBytes:
        """Estimate it from a model's config, for numbers of so many bytes."""
        layers, hidden, inner = (
            config[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size")
        )
        heads, pairs, width = heads_of(config)
        states = 4 * hidden + 5 * inner + (5 * heads + 4 * pairs) * width
        return cls(
            2 * size * layers * pairs * width,
            4 * (8 * hidden + 4 * inner),
            # Norms keep their inputs in fp32.
            layers * (size * states + 16 * hidden),
        )


def user_cache() -> Path:
    """Where this package remembers what took long to find."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "distill-datasets"


def choose_dtype(asked: str, size: ModelSize) -> str:
    """`fp32` or `bf16`: what was asked for, or what is faster for a model of this size.

    On a GPU that is bf16 wherever the GPU has it. A CPU's speeds are measured once, and remembered
    so that a model answers the same tomorrow.
    """
    if asked not in ("auto", *DTYPES):
        raise InvalidRequestError(f"expected a dtype of auto, fp32 or bf16; found {asked!r}")
    if asked != "auto":
        return asked
    if size.parameters < SMALL_MODEL:
        return "fp32"
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    speeds = measured_speeds(size.widths)
    return "bf16" if speeds["bf16"] >= WORTH * speeds["fp32"] else "fp32"


def measured_speeds(widths: tuple[int, int]) -> dict[str, float]:
    """Billions of operations a second of one thread, by number format, in a layer's product."""
    import torch

    key = f"{_processor()} torch {torch.__version__} {widths[0]}x{widths[1]}"
    file = user_cache() / "speeds.json"
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        read = json.loads(file.read_text("utf-8"))
        known = read if isinstance(read, dict) else {}
    found = known.get(key)
    if not (isinstance(found, dict) and all(type(found.get(one)) is float for one in DTYPES)):
        known[key] = found = _measure_speeds(widths)
        with suppress(OutputError):
            write_file(file, json.dumps(known, indent=1))
    return {one: found[one] for one in DTYPES}


def choose_threads(asked: int | None, size: ModelSize) -> int:
    """How many threads compute: what was asked for, else as many as are measured to help.

    Each product waits for the last of its threads, so that one that has to share its core with
    another process slows all of them.
    """
    import torch

    if asked is not None:
        return asked
    most = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ or most == 1:
        return most
    if size.parameters < SMALL_MODEL:
        return 1
    product = _product(size.widths, torch.float32)
    # In turns: what comes and goes on the machine slows both.
    seconds = {1: float("inf"), most: float("inf")}
    slowest = 0.0
    for _ in range(TRIES):
        for threads in seconds:
            torch.set_num_threads(threads)
            took = _seconds(product)
            seconds[threads] = min(seconds[threads], took)
            slowest = max(slowest, took) if threads == most else slowest
    return most if slowest * WORTH <= seconds[1] else 1


def foretell(size: ModelSize, dtype: str, name: str) -> str:
    """What a large model takes on this machine, empty for others.

    Raises `InvalidRequestError` for one whose weights don't fit into its memory.
    """
    if size.parameters < SMALL_MODEL:
        return ""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    needed, memory = BYTES[dtype] * size.parameters, memory_of(device)
    said = f"{name!r} has about {size.parameters / 1e9:.1f} billion parameters"
    if needed > MOST_MEMORY * memory:
        other = " (bf16 takes half)" if dtype == "fp32" else ""
        raise InvalidRequestError(
            f"{said}, which take {needed / 1e9:.0f} GB in {dtype}{other}; this "
            f"{'GPU' if device == 'cuda' else 'machine'} has {memory / 1e9:.0f} GB: use a smaller "
            "model, or a server elsewhere (tinker:, openai:)"
        )
    if device == "cuda":
        return ""
    speed = 1e9 * measured_speeds(size.widths)[dtype]
    # A product multiplies and adds; learning computes backwards too, each layer's states twice.
    reads = speed / (2 * size.active)
    if reads > SLOW:
        return ""
    return (
        f"{said} ({needed / 1e9:.0f} GB in {dtype}): a core of this machine reads at most "
        f"{_rate(reads)} of a prompt and learns from at most {_rate(reads / 3)}"
    )


def _rate(tokens: float) -> str:
    if tokens >= 1:
        return f"{tokens:.0f} tokens a second"
    return f"one token in {1 / tokens:.0f} seconds"


def memory_of(device: str) -> int:
    """Bytes of the machine's memory, or of the GPU's: at most what this process may use."""
    if device == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # "max" is no limit
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text("utf-8")))
    return memory


def _measure_speeds(widths: tuple[int, int]) -> dict[str, float]:
    import torch

    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    products = {one: _product(widths, dtype) for one, dtype in torch_dtypes().items()}
    fastest = dict.fromkeys(products, float("inf"))
    for _ in range(TRIES):
        for one, product in products.items():
            fastest[one] = min(fastest[one], _seconds(product))
    torch.set_num_threads(kept)
    operations = 2 * ROWS * widths[0] * widths[1]
    return {one: operations / seconds / 1e9 for one, seconds in fastest.items()}


def torch_dtypes() -> dict[str, torch.dtype]:
    """The number formats, as torch names them."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}


def _product(widths: tuple[int, int], dtype: torch.dtype) -> Callable[[], object]:
    import torch

    states = torch.ones(ROWS, widths[0], dtype=dtype)
    weights = torch.ones(widths[1], widths[0], dtype=dtype)
    return lambda: torch.nn.functional.linear(states, weights)


def _seconds(run: Callable[[], object]) -> float:
    """Seconds of one call, over as many as take a while."""
    run()
    start, calls = time.perf_counter(), 0
    while (took := time.perf_counter() - start) < SECONDS:
        run()
        calls += 1
    return took / calls


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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

    def require(self, name: str) -> None:
        """Refuse a model that is not served here."""
        if name not in (self.name, str(self.folder)):
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
_LOADING = threading.Lock()


def load_model(card: ModelCard) -> LoadedModel:
    """Load a model folder; imports torch and transformers, hence seconds."""
    import torch
    import transformers.utils

    # transformers imports scikit-learn, a third of its import time, for a kind of generation
    # that is not used here.
    utilities: Any = transformers.utils
    utilities.is_sklearn_available = lambda: False
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    from . import prefix_attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch_dtypes()[card.dtype]
    # Each shape of a product in bf16 stays prepared: a thousand of them took gigabytes.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    loading: Any = AutoModelForCausalLM.from_pretrained
    with _LOADING:
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
    ends = _end_tokens(network, tokenizer, card.folder)
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


def _end_tokens(network: Any, tokenizer: Tokenizer, folder: Path) -> frozenset[int]:
    found = network.generation_config.eos_token_id or network.config.eos_token_id or []
    ends = {found} if isinstance(found, int) else set(found)
    end = read_object(folder / "tokenizer_config.json").get("eos_token")
    written = end.get("content") if isinstance(end, dict) else end
    return frozenset(ends | ({tokenizer.token_to_id(str(written))} - {None}))

"""What this machine does well: its number format and its threads, measured.

A laptop and a server differ by an order of magnitude in both, and neither its processor's name nor
its number of cores tells: another process may hold the cores.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import OutputError
from distill_datasets.files import write_file

from .wire import InvalidRequestError

if TYPE_CHECKING:
    import torch

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

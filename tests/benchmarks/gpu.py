"""The embedded server on a GPU: `python -m tests.benchmarks.gpu`.

A model of 1.7 billion random parameters samples, scores and trains as in `embedded`, and trains
against plain `peft` in the same run. Where no GPU is, it says so; `--tiny` tries it with a tiny
model anywhere.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

import torch

from distill_datasets.embedded.process import launch
from tests.benchmarks import embedded, plain_peft

QUERIES = 512
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 4_096,
}


def make_model(folder: Path, shape: dict[str, int]) -> Path:
    """Random weights of a shape, with the tests' tokenizer."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from tests.support.tiny_model import make_tiny_model

    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(folder / "tiny"))
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        **shape,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    network = Qwen3ForCausalLM(config)
    torch.set_default_device("cpu")
    torch.set_default_dtype(torch.float32)
    print(f"{network.num_parameters():,} random parameters")
    network.save_pretrained(folder)
    return folder


def main() -> None:
    """Make the model, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tiny", action="store_true", help="try it with a tiny shape, also on a CPU"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        sys.exit("No GPU here: torch finds no CUDA device. --tiny tries the same on a CPU.")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = make_model(Path(place), TINY if options.tiny else LARGE)
        with launch(folder, name="random") as server:
            asyncio.run(embedded.measure(server, QUERIES // 8 if options.tiny else QUERIES))
        plain_peft.compare(folder, steps=6)
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()

"""Builds the pocket model from nothing: python -m distill_datasets.embedded.pocket.build --out DIR.

Needs the `pocket` extra, for the texts of Django and CLDR.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from .batches import BatchSource
from .corpus import load_corpus, recipe_queries, split_corpus
from .evaluate import evaluate
from .network import Network, Shape
from .queries import QuerySource
from .tokenizer import train_tokenizer
from .training import train

DEFAULT_CPU_MINUTES = 17.0
# Without a bound, oneDNN keeps a compiled primitive for every shape of batch it ever saw.
PRIMITIVE_CACHE = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


def build(out: Path, *, cpu_minutes: float, seed: int) -> None:
    """Train tokenizer and model within a budget of processor time, and write them to `out`."""
    os.environ.setdefault(*PRIMITIVE_CACHE)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    corpus = load_corpus()
    tokenizer = train_tokenizer(corpus, seed=seed)
    training_corpus, _ = split_corpus(corpus)
    queries = QuerySource(training_corpus, forbidden=recipe_queries(), seed=seed + 1)
    network = Network(Shape(vocabulary=len(tokenizer)))
    _report(f"{len(list(corpus.lines()))} texts, {len(tokenizer)} tokens; training starts")
    progress = train(
        network,
        BatchSource(tokenizer, queries, seed=seed + 2),
        cpu_seconds=cpu_minutes * 60 - time.process_time(),
        report=_report,
    )
    _report(f"trained {progress.steps} steps in {time.process_time() / 60:.1f} CPU minutes in all")
    save(network, tokenizer, out)


def save(network: Network, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a model folder that transformers loads; each file appears complete or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    model = as_transformers(network, tokenizer).half()
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            path.chmod(0o644)  # safetensors writes files that only their owner may read
            path.replace(out / path.name)


def as_transformers(network: Network, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return the same model as transformers' own class."""
    shape = network.shape
    settings: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": shape.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "dtype": "float16",
    }
    untyped: Any = Qwen3ForCausalLM
    model = untyped(Qwen3Config(**settings))
    outcome = model.load_state_dict(network.state_dict(), strict=False)
    if outcome.unexpected_keys or set(outcome.missing_keys) - {"lm_head.weight"}:
        raise ValueError(f"expected the parameter names of Qwen3, found {outcome}: rename ours")
    model.tie_weights()
    return model.eval()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="train, write the model here, then evaluate it")
    target.add_argument("--evaluate", type=Path, help="only evaluate the model in this folder")
    parser.add_argument("--cpu-minutes", type=float, default=DEFAULT_CPU_MINUTES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--student", action="store_true", help="also distil a LoRA student")
    parser.add_argument("--json", type=Path, help="write the evaluation's numbers here")
    arguments = parser.parse_args()
    if arguments.out:
        build(arguments.out, cpu_minutes=arguments.cpu_minutes, seed=arguments.seed)
    torch.set_num_threads(1)
    results = evaluate(arguments.out or arguments.evaluate, student=arguments.student)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def _report(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


if __name__ == "__main__":
    main()

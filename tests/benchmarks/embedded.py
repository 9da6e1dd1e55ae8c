"""How fast the embedded server samples and trains: `python -m tests.benchmarks.embedded`.

With a folder as its argument it compares that model's samples with those of plain transformers
instead, and prints the ratios of CPU seconds in fp32 and bf16, and how long the first of 64
requests sent at once takes, measured in what one alone takes.

A random model of the pocket model's size answers queries of about 50 tokens behind a prompt of
700, once with the prompt shared (and so cached) and once with a different prompt per query; it
scores the last tokens of 60 behind a shared prompt of 800, as a teacher does; then it trains on
rows of 60 tokens, with one target a token and with 20. Times include the SDK's.
"""

from __future__ import annotations

import argparse
import asyncio
import queue
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tinker
from tinker import types

from distill_datasets.embedded.engine import ComputeThread, Engine
from distill_datasets.embedded.model import ModelCard
from distill_datasets.embedded.process import Server, launch
from distill_datasets.embedded.scheduler import BASE, SampleJob
from distill_datasets.embedded.store import Store
from distill_datasets.embedded.wire import pb, read_sample_request

VOCABULARY = 4096
PROMPT = 700
ADAM = types.AdamParams(learning_rate=1e-3)


def make_model(folder: Path) -> Path:
    """Write a random model of the pocket model's size with the tests' tokenizer."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from tests.support.tiny_model import make_tiny_model

    AutoTokenizer.from_pretrained(make_tiny_model(folder / "tiny")).save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def make_prompts(count: int, *, shared: bool) -> list[list[int]]:
    """Random queries behind one prompt, or each behind its own."""
    random = np.random.default_rng(0)
    prompt = random.integers(300, VOCABULARY, PROMPT).tolist()
    lengths = np.clip(random.normal(50, 15, count), 15, 120).astype(int)
    return [
        (prompt if shared else random.integers(300, VOCABULARY, PROMPT).tolist())
        + random.integers(300, VOCABULARY, length).tolist()
        for length in lengths
    ]


async def sample(server: Server, prompts: list[list[int]], concurrency: int) -> float:
    """Queries per second, with four greedy tokens each."""
    service = tinker.ServiceClient(base_url=server.url, api_key=server.api_key)
    client = await service.create_sampling_client(base_model=server.model)
    params = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])
    gate = asyncio.Semaphore(concurrency)

    async def one(prompt: list[int]) -> None:
        async with gate:
            await client.sample(types.ModelInput.from_ints(prompt), 1, params)

    await one(prompts[0])
    start = time.perf_counter()
    await asyncio.gather(*map(one, prompts[1:]))
    return (len(prompts) - 1) / (time.perf_counter() - start)


async def score(server: Server, rows: int, last_n: int) -> float:
    """Rows per second whose last tokens are scored, with the 20 likeliest in each place."""
    service = tinker.ServiceClient(base_url=server.url, api_key=server.api_key)
    client = await service.create_sampling_client(base_model=server.model)
    params = types.SamplingParams(max_tokens=1, temperature=0.0)
    random = np.random.default_rng(1)
    prompt = random.integers(300, VOCABULARY, 800).tolist()
    options = {"topk_prompt_logprobs": 20, "prompt_logprobs_last_n": last_n}

    async def one(suffix: list[int]) -> None:
        row = types.ModelInput.from_ints(prompt + suffix)
        await client.sample(row, 1, params, True, **options)

    suffixes = random.integers(300, VOCABULARY, (rows + 2, 60)).tolist()
    await one(suffixes[0])
    await one(suffixes[1])
    start = time.perf_counter()
    await asyncio.gather(*map(one, suffixes[2:]))
    return rows / (time.perf_counter() - start)


async def train(server: Server, steps: int, targets: int) -> float:
    """Steps per second, of 32 rows of 60 tokens."""
    service = tinker.ServiceClient(base_url=server.url, api_key=server.api_key)
    client = await service.create_lora_training_client(server.model, rank=16, seed=0)
    random = np.random.default_rng(0)
    rows = []
    for _ in range(32):
        tokens = random.integers(300, VOCABULARY, 61).tolist()
        weights = np.array([0.0] * 55 + [1.0] * 5, np.float32)
        inputs = {"target_tokens": np.array(tokens[1:]), "weights": weights}
        if targets > 1:
            soft = random.integers(300, VOCABULARY, (60, targets))
            inputs = {"target_tokens": soft, "weights": np.tile(weights[:, None], targets)}
        rows.append(
            types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
        )

    async def step() -> None:
        losses = client.forward_backward(rows, "cross_entropy")
        taken = client.optim_step(ADAM)
        await losses
        await taken

    await step()
    start = time.perf_counter()
    for _ in range(steps):
        await step()
    return steps / (time.perf_counter() - start)


async def latency(server: Server, *, shared: bool) -> float:
    """Milliseconds of one request at a time."""
    prompts = make_prompts(21, shared=shared)
    return 1e3 / await sample(server, prompts, 1)


async def measure(server: Server, queries: int) -> None:
    """Print one line per figure."""
    for shared in (True, False):
        kind = "shared prompt" if shared else "own prompts"
        prompts = make_prompts(queries if shared else queries // 8, shared=shared)
        for concurrency in (64, 256):
            rate = await sample(server, prompts, concurrency)
            took = len(prompts) / rate
            line = f"{kind:14} x{concurrency:<4} {rate:7.1f} queries/s"
            print(f"{line}  ({len(prompts)} in {took:.1f} s)")
        print(f"{kind:14} alone {await latency(server, shared=shared):6.1f} ms")
    for last_n in (5, 59):
        rate = await score(server, queries // 2, last_n)
        print(f"score last {last_n:<9} {rate:7.1f} rows/s")
    for targets in (1, 20):
        rate = await train(server, 20, targets)
        print(f"train 32 x 60 x {targets:<3} {rate:7.2f} steps/s   ({1 / rate:.3f} s)")


Answer = tuple[float, list[int]]


class Engines:
    """The server's engine in this process, whose CPU seconds are counted."""

    def __init__(self, folder: Path, dtype: str, store: Path) -> None:
        card = ModelCard.read(folder, "benchmark", dtype, 1)
        engine = Engine(card, Store(store))
        self._thread = ComputeThread(engine, engine.load)

    def ask(self, prompts: list[list[int]], tokens: int) -> list[Answer]:
        """Send all at once; when each was answered, from then on, and its tokens."""
        began, answers = time.perf_counter(), queue.SimpleQueue[tuple[int, float, Any]]()
        for index, prompt in enumerate(prompts):
            chunks = [{"type": "encoded_text", "tokens": prompt}]
            params = {"max_tokens": tokens, "temperature": 0.0, "stop": []}
            request = read_sample_request({"prompt": {"chunks": chunks}, "sampling_params": params})

            def resolve(payload: Any, index: int = index) -> None:
                answers.put((index, time.perf_counter() - began, payload))

            self._thread.submit(SampleJob(BASE, request, resolve))
        found: dict[int, Answer] = {}
        while len(found) < len(prompts):
            index, seconds, payload = answers.get()
            message = pb.SampleResponse()
            message.ParseFromString(payload)
            found[index] = seconds, np.frombuffer(message.sequences[0].tokens, np.int32).tolist()
        return [found[index] for index in range(len(prompts))]


def plain_answers(network: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Batched `generate`, padded on the left."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        found = network.generate(inputs=ids, attention_mask=mask, **settings)
    answers: list[list[int]] = found[:, longest:].tolist()
    return answers


def server_against_transformers(
    model: Path, dtypes: tuple[str, ...] = ("fp32", "bf16"), rows: int = 64, tokens: int = 24
) -> dict[str, float]:
    """CPU seconds of plain transformers by those of the server, in one thread: more is better.

    Both answer the same prompts with as many tokens. `... equal` is the share of equal answers,
    `... first` the time to the first of all answers by the time of one alone.
    """
    import torch
    from transformers import AutoModelForCausalLM

    random, found = np.random.default_rng(0), dict[str, float]()
    for dtype in dtypes:
        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
        network = AutoModelForCausalLM.from_pretrained(model, dtype=kinds[dtype]).eval()
        network.generation_config.eos_token_id = None
        high = network.config.vocab_size
        with tempfile.TemporaryDirectory() as store:
            engine = Engines(model, dtype, Path(store))
            engine.ask([[300]], 2)
            torch.set_num_threads(1)
            for kind, common in (("short", 0), ("shared", 800)):
                start = random.integers(300, high, common).tolist()
                lengths = np.clip(random.normal(30, 12, rows + 1), 8, 60).astype(int)
                alone, *prompts = (start + random.integers(300, high, n).tolist() for n in lengths)
                [(seconds, _)] = engine.ask([alone[::-1]], tokens)
                began = time.process_time()
                answers = engine.ask(prompts, tokens)
                own, began = time.process_time() - began, time.process_time()
                plain = plain_answers(network, prompts, tokens)
                name = f"{kind} {dtype}"
                found[name] = (time.process_time() - began) / own
                same = [one == other for (_, one), other in zip(answers, plain, strict=True)]
                found[f"{name} equal"] = sum(same) / rows
                found[f"{name} first"] = min(after for after, _ in answers) / seconds
                print(f"{name:12} server {own:6.1f} s of CPU, {found[name]:5.2f} times as fast,")
                print(f"{'':12} {found[f'{name} equal']:.0%} equal, ", end="")
                print(
                    f"first answer after {found[f'{name} first']:.2f} times one alone", flush=True
                )
    return found


def main() -> None:
    """Build, launch, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", help="compare this model with transformers")
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="this number format only")
    options = parser.parse_args()
    queries = options.queries
    if options.model is not None:
        dtypes = (options.dtype,) if options.dtype else ("fp32", "bf16")
        server_against_transformers(options.model, dtypes)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        with launch(model, name="benchmark") as server:
            asyncio.run(measure(server, queries))


if __name__ == "__main__":
    main()

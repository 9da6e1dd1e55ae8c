"""`generate` against a bare `asyncio.gather` with a semaphore, in one process, without HTTP.

    python -m tests.benchmarks.gathering [--rows 10000] [--concurrency 1000] [--runs 3]

The sampler sleeps a log-normal time (mean 0.5 s, capped at 3 s). Both sides call the same sampler
for the same queries; `generate` also renders, journals, parses and writes its folder.
"""

import argparse
import asyncio
import math
import random
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill_datasets.generation.run import generate
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.models.sampler import Reply, Sample, Sampling, Usage
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.schema import Message
from tests.benchmarks.clients import write_recipe


@dataclass
class LogNormal:
    """Answers after a latency that depends on the query alone."""

    mean: float = 0.5
    cap: float = 3.0
    model: str = "log-normal"
    identity: str = "log-normal"

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Sleep, then answer."""
        query = messages[-1]["content"]
        draw = random.Random(query).lognormvariate(math.log(self.mean) - 0.5, 1.0)
        await asyncio.sleep(min(draw, self.cap))
        return Reply((Sample("colour red", "stop", 3),), Usage(100, 90))


async def gather(queries: Sequence[str], sampler: LogNormal, concurrency: int) -> float:
    """Seconds that a bare gather takes."""
    turn = asyncio.Semaphore(concurrency)

    async def one(query: str) -> Reply:
        async with turn:
            return await sampler.sample([{"role": "user", "content": query}], Sampling())

    began = time.perf_counter()
    await asyncio.gather(*(one(query) for query in queries))
    return time.perf_counter() - began


def main() -> None:
    """Print seconds and the ratio of each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    queries = [f"thing {number}" for number in range(options.rows)]
    sampler = LogNormal()
    with tempfile.TemporaryDirectory() as scratch:  # imports are no part of either side
        recipe = load_recipe(write_recipe(Path(scratch) / "bench", 10))
        generate(recipe, teacher=sampler, out=Path(scratch) / "run")
    print("run  gather s  generate s  ratio  rows/s")
    for run in range(1, options.runs + 1):
        with tempfile.TemporaryDirectory() as scratch:
            recipe = load_recipe(write_recipe(Path(scratch) / "bench", options.rows))
            bare = asyncio.run(gather(queries, sampler, options.concurrency))
            settings = GenerateSettings(concurrency=options.concurrency)
            began = time.perf_counter()
            made = generate(
                recipe,
                teacher=sampler,
                out=Path(scratch) / "run",
                settings=settings,
            )
            ours = time.perf_counter() - began
            assert made.kept == options.rows
        rate = options.rows / ours
        print(f"{run:>3}  {bare:>8.2f}  {ours:>10.2f}  {ours / bare:>5.3f}  {rate:,.0f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {peak:,.0f} MB")


if __name__ == "__main__":
    main()

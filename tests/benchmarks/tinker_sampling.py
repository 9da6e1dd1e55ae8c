"""Calls per second of the Tinker sampler: `python -m tests.benchmarks.tinker_sampling`.

A loopback server answers every request alike, at once or after 200 ms. One run compares the SDK
called in a bare loop with tokens that are there already, our sampler, which renders messages and
reads text, and our sampler over processes. The server takes its share of the cores; CPU is that
of the asking process and its workers alone, and tells more where others share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import tinker
from tinker import types

from distill_datasets.files import pocket_folder
from distill_datasets.models.processes import ProcessSampler
from distill_datasets.models.sampler import Sampling
from distill_datasets.models.tinker import Connection, TinkerSampler
from distill_datasets.schema import Message
from tests.support import tinker_endpoint

RULES = "\n".join(
    f"- Rule {n}: of two labels that fit a sentence, take the one above." for n in range(45)
)
SAMPLING = Sampling(max_tokens=16, temperature=0.0)
WARM_UP = 64
Ask = Callable[[int], Awaitable[object]]


def messages(number: int) -> list[Message]:
    """A query behind a long prompt."""
    asked = f"Das ist der Satz mit der Nummer {number}, und noch einer."
    return [{"role": "system", "content": RULES}, {"role": "user", "content": asked}]


def connect(url: str) -> TinkerSampler:
    """A sampler of the pocket model's tokens, answered by nobody."""
    service = tinker.ServiceClient(base_url=url, api_key=tinker_endpoint.KEY)
    tokenizer = str(pocket_folder())
    return TinkerSampler(
        Connection("tinker:canned", service, "canned", tokenizer, "qwen3_instruct")
    )


def bare(sampler: TinkerSampler) -> Ask:
    """The SDK alone."""
    renderer = sampler.connection.renderer
    tokens = renderer.build_generation_prompt(messages(0)).to_ints()  # type: ignore[arg-type]
    stop = renderer.get_stop_sequences()
    params = types.SamplingParams(max_tokens=16, temperature=0.0, stop=stop)

    async def ask(_: int) -> object:
        return await sampler.client.sample(types.ModelInput.from_ints(tokens), 1, params)

    return ask


def ours(sampler: TinkerSampler | ProcessSampler) -> Ask:
    """From messages to text."""
    return lambda number: sampler.sample(messages(number), SAMPLING)


def cpu_seconds(pids: Sequence[int]) -> float:
    """What processes have used so far, in user and system mode."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def measure(
    ask: Ask, calls: int, concurrency: int, pids: Sequence[int]
) -> tuple[float, float]:
    """Calls per second, and milliseconds of CPU per call."""
    gate = asyncio.Semaphore(concurrency)

    async def one(number: int) -> None:
        async with gate:
            await ask(number)

    await asyncio.gather(*map(one, range(WARM_UP)))
    start, before = time.perf_counter(), cpu_seconds(pids)
    await asyncio.gather(*map(one, range(calls)))
    return calls / (time.perf_counter() - start), (cpu_seconds(pids) - before) / calls * 1e3


def compare(url: str, calls: int, concurrency: int) -> None:
    """Print a line for each way to ask."""
    sampler, own = connect(url), os.getpid()
    rates: dict[str, float] = {}

    def show(name: str, ask: Ask, pids: Sequence[int]) -> None:
        rates[name], cpu = asyncio.run(measure(ask, calls, concurrency, pids))
        ratio = rates[name] / rates["bare SDK loop"]
        print(
            f"{name:16} {rates[name]:7.0f} calls/s  {ratio:5.2f}x  {cpu:5.2f} ms CPU/call",
            flush=True,
        )

    show("bare SDK loop", bare(sampler), [own])
    show("our sampler", ours(sampler), [own])
    for count in (1, 2):
        with ProcessSampler(sampler, count) as spread:
            show(f"{count} process{'es' * (count > 1)}", ours(spread), [own, *spread.pids])
    show("bare SDK loop", bare(sampler), [own])


def main() -> None:
    """Measure against a server that answers at once, and one that takes its time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1500)
    parser.add_argument("--concurrency", type=int, default=256)
    options = parser.parse_args()
    os.environ["TINKER_TELEMETRY"] = "0"
    for delay in (0.0, 0.2):
        print(f"\nThe server answers {f'after {delay} s' if delay else 'at once'}:")
        with tinker_endpoint.running([70, 71, 2], delay=delay) as url:
            compare(url, options.calls, options.concurrency)


if __name__ == "__main__":
    main()

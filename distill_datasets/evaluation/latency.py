"""How long one request takes, seen from this client, with no other at the same time."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from uuid import uuid4

from distill_datasets.errors import DistillError, GenerationError, RequestError
from distill_datasets.evaluation.systems import HeldOut, changed, several
from distill_datasets.generation.client import outcome
from distill_datasets.generation.pricing import Meter
from distill_datasets.generation.teachers import Answerer, PromptedModel
from distill_datasets.models.sampler import Reply, Sampler, Sampling
from distill_datasets.progress import Progress
from distill_datasets.schema import Message
from distill_datasets.statistics import median_interval

Requests = Sequence[Callable[[], Awaitable[Any]]]  # the first warms up and isn't timed

UNCACHED = "teacher, uncached"
_TIMED = ("base", "teacher", "student")
_ROWS = 20


@dataclass(frozen=True)
class UncachedClient:
    """Asks as a `CachedClient` does, always anew, and within the budget of a meter."""

    meter: Meter | None = None

    async def sample(
        self, sampler: Sampler, messages: Sequence[Message], sampling: Sampling
    ) -> Reply:
        """What the sampler says; raises what it raises, and `BudgetReached`."""
        if self.meter is None:
            return await sampler.sample(messages, sampling)
        async with self.meter.room(sampler, messages, sampling):
            reply = await sampler.sample(messages, sampling)
            self.meter.count(sampler, reply)
        return reply


def timed_requests(
    held_out: HeldOut, systems: Mapping[str, Answerer], meter: Meter | None = None
) -> dict[str, Requests]:
    """What to time: the three, and the teacher with its prompt read anew each time."""

    def requests(system: Answerer) -> Requests:
        if several(system):
            return [partial(system.answer, query, client) for query in queries]
        asked = [(query, one) for query in queries for one in system.asked(query)]
        return [partial(client.sample, one.sampler, *one.request(query)) for query, one in asked]

    def uncached(asked: PromptedModel) -> PromptedModel:
        return replace(
            asked,
            messages=lambda query: uncacheable(asked.messages(query)),
            fitted=lambda query, sampling: uncacheable_tools(asked.fitted(query, sampling)),
        )

    client, rows = UncachedClient(meter), held_out.rows[:_ROWS]["query"]
    queries = [rows[-1], *rows]
    timed = {name: systems[name] for name in _TIMED if name in systems}
    timed[UNCACHED] = changed(systems["teacher"], uncached)
    return {name: requests(system) for name, system in timed.items()}


def measure_latency(timed: Mapping[str, Requests], *, seconds: float) -> dict[str, list[float]]:
    """The milliseconds that each row takes each system: one request at a time, in turns.

    As many rounds as end within the seconds, but always one. In turns, so that a machine that gets
    busy slows all of them alike. Asks anew, whatever a journal holds.
    """
    with (
        Progress("time", len(timed), unit="requests") as progress,
        ThreadPoolExecutor(1) as thread,
    ):
        times = thread.submit(asyncio.run, _times(timed, seconds, progress)).result()
    # The first round warms up, unless it took all the time that there is.
    return {name: found[1:] or found for name, found in times.items()}


def percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """The median, its interval, and the 95th percentile."""
    import numpy as np

    found = median_interval(milliseconds)
    ends = {f"p50_{end}": found[end] for end in ("low", "high") if end in found}
    return {"p50": found["value"], "p95": float(np.percentile(milliseconds, 95)), **ends}


def latency_note(times: Mapping[str, Sequence[float]]) -> str:
    """How the latencies came about."""
    rows, *_ = map(len, times.values())
    return (
        f"Latency is that of the first {rows} rows, {rows * len(times)} requests in all, one "
        "request at a time and the systems in turns, from this client. A server may keep the "
        "teacher's prompt in its cache; uncached requests put a new line before the prompt, so "
        "that it is read anew."
    )


async def _times(
    timed: Mapping[str, Requests], seconds: float, progress: Progress
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in timed}
    rounds, start = len(next(iter(timed.values()))), time.perf_counter()
    for place in range(rounds):
        began = time.perf_counter()
        for name, requests in timed.items():
            asked = time.perf_counter()
            failed = await outcome(requests[place]())
            if isinstance(failed, DistillError) and not isinstance(failed, RequestError):
                raise failed
            if isinstance(failed, Exception):
                raise GenerationError(
                    f"A request failed while timing the {name}: {failed}. Run again: answers are "
                    "kept, only the timing starts anew."
                ) from failed
            times[name].append(1000 * (time.perf_counter() - asked))
            progress.advance()
        now = time.perf_counter()
        room = (start + seconds - now) / max(now - began, 1e-9)
        # The next round may take what this one took; after the first, which warms up, less.
        left = min(rounds - 1 - place, max(int(room), int(not place and room > 0)))
        progress.total = progress.done + left * len(timed)
        if not left:
            break
    return times


def uncacheable(messages: Sequence[Message]) -> list[Message]:
    """The same messages behind a line that no server has seen, so that it keeps no prefix of them.

    No provider lets a client switch its prefix cache off; this holds with all of them.
    """
    first, *rest = messages
    return [{"role": first["role"], "content": f"{uuid4().hex}\n{first['content']}"}, *rest]


def uncacheable_tools(sampling: Sampling) -> Sampling:
    """The same tools, the first of them described as on no server: a format may begin with them."""
    if sampling.tools is None:
        return sampling
    tools = json.loads(sampling.tools)
    about = tools[0]["function"]
    about["description"] = f"{about['description']}\n{uuid4().hex}"
    return replace(sampling, tools=json.dumps(tools, ensure_ascii=False))

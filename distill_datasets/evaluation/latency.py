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

_TIMED = ("base", "teacher", "student")
UNCACHED = "teacher, uncached"
_TIMED_ROWS = 20


@dataclass(frozen=True)
class TimedSystem:
    """A system that is timed, and its requests; the first warms up and isn't timed."""

    model: str
    requests: Sequence[Callable[[], Awaitable[Any]]]


class UncachedClient:
    """Asks as a `CachedClient` does, and always anew."""

    def __init__(self, meter: Meter | None = None) -> None:
        """With a `meter`, within its budget."""
        self._meter = meter

    async def sample(
        self, sampler: Sampler, messages: Sequence[Message], sampling: Sampling
    ) -> Reply:
        """What the sampler says; raises what it raises, and `BudgetReached`."""
        if self._meter is None:
            return await sampler.sample(messages, sampling)
        async with self._meter.room(sampler, messages, sampling):
            reply = await sampler.sample(messages, sampling)
            self._meter.count(sampler, reply)
        return reply


@dataclass(frozen=True)
class Latency:
    """Median, its interval, and 95th percentile of each system in milliseconds, and of how many
    rows.
    """

    milliseconds: Mapping[str, Mapping[str, float]]
    rows: int


def measure_latency(timed: Mapping[str, TimedSystem], *, seconds: float) -> Latency:
    """One request at a time, in turns: as many rounds as end within the seconds, but always one.

    In turns, so that a machine that gets busy slows all of them alike. Asks anew, whatever a
    journal holds.
    """
    import numpy as np

    with (
        Progress("time", len(timed), unit="requests") as progress,
        ThreadPoolExecutor(1) as thread,
    ):
        times = thread.submit(asyncio.run, _times(timed, seconds, progress)).result()
    # The first round warms up, unless it took all the time that there is.
    counted = {name: found[1:] or found for name, found in times.items()}
    percentiles = {name: np.percentile(found, [50, 95]) for name, found in counted.items()}
    milliseconds = {
        name: {"p50": float(median), "p95": float(late), **_ends(counted[name])}
        for name, (median, late) in percentiles.items()
    }
    return Latency(milliseconds, len(next(iter(counted.values()))))


def _ends(milliseconds: Sequence[float]) -> dict[str, float]:
    """The interval of the median."""
    found = median_interval(milliseconds)
    return {f"p50_{end}": found[end] for end in ("low", "high") if end in found}


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


async def _times(
    timed: Mapping[str, TimedSystem], seconds: float, progress: Progress
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in timed}
    rounds, start = len(next(iter(timed.values())).requests), time.perf_counter()
    for place in range(rounds):
        began = time.perf_counter()
        for name, one in timed.items():
            asked = time.perf_counter()
            failed = await outcome(one.requests[place]())
            if isinstance(failed, Exception):
                if isinstance(failed, DistillError) and not isinstance(failed, RequestError):
                    raise failed
                raise GenerationError(
                    f"A request failed while timing {one.model!r}: {failed}. Run again: "
                    "answers are kept, only the timing starts anew."
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


def timed_systems(
    held_out: HeldOut, systems: Mapping[str, Answerer], meter: Meter | None = None
) -> dict[str, TimedSystem]:
    """What to time: the three, and the teacher with its prompt read anew each time."""
    rows = held_out.rows[:_TIMED_ROWS]["query"]
    queries = [rows[-1], *rows]
    timed = {name: systems[name] for name in _TIMED if name in systems}
    timed[UNCACHED] = changed(systems["teacher"], _uncached)
    return {name: _timed(system, queries, meter) for name, system in timed.items()}


def latency_note(found: Latency) -> str:
    """How the latencies came about."""
    requests = found.rows * len(found.milliseconds)
    return (
        f"Latency is that of the first {found.rows} rows, {requests} requests in all, one request "
        "at a time and the systems in turns, from this client. A server may keep the teacher's "
        "prompt in its cache; uncached requests put a new line before the prompt, so that it is "
        "read anew."
    )


def _uncached(asked: PromptedModel) -> PromptedModel:
    messages, fitted = asked.messages, asked.fitted
    return replace(
        asked,
        messages=lambda query: uncacheable(messages(query)),
        fitted=lambda query, sampling: uncacheable_tools(fitted(query, sampling)),
    )


def _timed(system: Answerer, queries: Sequence[str], meter: Meter | None) -> TimedSystem:
    client = UncachedClient(meter)
    if several(system):
        return TimedSystem(
            system.model, [partial(system.answer, query, client) for query in queries]
        )
    asked = [(query, one) for query in queries for one in system.asked(query)]
    return TimedSystem(
        system.model,
        [partial(client.sample, one.sampler, *one.request(query)) for query, one in asked],
    )

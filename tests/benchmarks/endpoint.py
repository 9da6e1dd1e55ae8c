"""A loopback `/chat/completions` with faults to order, in a process of its own.

It counts what it was asked, and which answers it sold twice.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from typing import Any
from urllib.request import urlopen

from aiohttp import web

ANSWER = "The colour is hard to tell from here, but it may well be: colour red. " * 3
TOKENS = 50


@dataclass(frozen=True)
class Faults:
    """What the endpoint does to requests; shares are of 1, times in seconds.

    `rejected` and each kind of `odd` answer are a share of the prompts, the other shares are of
    requests. `limit` is how many requests it answers in any one second. From `breaks` on, after
    the first request, everything is refused for the time of an `outage`. The `straggler` is a
    prompt's ending that takes `straggles` to answer.
    """

    latency: float = 0.2
    errors: float = 0.0
    refused: float = 0.0
    hangs: float = 0.0
    rejected: float = 0.0
    odd: float = 0.0
    limit: int = 0
    breaks: float = 0.0
    outage: float = 0.0
    straggler: str = ""
    straggles: float = 10.0
    hang: float = 30.0


class Endpoint:
    """Answers every prompt alike, after a while."""

    def __init__(self, faults: Faults) -> None:
        self.faults, self.dice = faults, random.Random(11)
        self.counts: Counter[str] = Counter()
        self.sold: Counter[bytes] = Counter()
        self.hopeless: Counter[bytes] = Counter()
        self.unreadable: set[bytes] = set()
        self.recent: deque[float] = deque()
        self.in_flight = self.most_in_flight = 0
        self.connections: set[asyncio.Transport] = set()
        self.first = self.last = self.last_other = 0.0
        self.body = completion()
        self.odd_ones = [completion(**changed) for changed in ODD]

    async def chat(self, request: web.Request) -> web.Response:
        """One completion, or a fault."""
        prompt = json.loads(await request.read())["messages"][-1]["content"]
        key = sha256(prompt.encode()).digest()[:8]
        self.counts["requests"] += 1
        self.first = self.first or time.monotonic()
        self.in_flight += 1
        if request.transport is not None:
            self.connections.add(request.transport)
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            answer = await self._answer(prompt, key)
            self.counts["abandoned"] += request.transport is None
            return answer
        finally:
            self.in_flight -= 1

    async def _answer(self, prompt: str, key: bytes) -> web.Response:
        faults = self.faults
        if int.from_bytes(key[:4], "big") / 2**32 < faults.rejected:
            self.hopeless[key] += 1
            return _refusal(400, "content_policy_violation", "against the content policy")
        broken = time.monotonic() - self.first - faults.breaks
        if 0 <= broken < faults.outage:
            self.counts["refused"] += 1
            return _refusal(503, "unavailable", "out of order", {})
        if faults.limit and not self._allowed():
            self.counts["refused"] += 1
            return _refusal(429, "rate_limit_exceeded", "too many requests")
        die = self.dice.random()
        if die < faults.refused:
            self.counts["refused"] += 1
            return _refusal(429, "rate_limit_exceeded", "too many requests")
        if die < faults.refused + faults.errors:
            self.counts["errors"] += 1
            return _refusal(500, "server_error", "out of order")
        if die < faults.refused + faults.errors + faults.hangs:
            self.counts["hangs"] += 1
            await asyncio.sleep(faults.hang)
        slow = faults.straggler and prompt.endswith(faults.straggler)
        await asyncio.sleep(faults.straggles if slow else faults.latency)
        self.sold[key] += 1
        self.counts["answered"] += 1
        self.last = time.monotonic()
        self.last_other = self.last_other if slow else self.last
        kind = int(int.from_bytes(key[4:], "big") / 2**32 / faults.odd) if faults.odd else len(ODD)
        if kind in (0, len(ODD) - 1):
            self.unreadable.add(key)
        body = self.odd_ones[kind] if kind < len(ODD) else self.body
        return web.Response(body=body, content_type="application/json")

    def _allowed(self) -> bool:
        now = time.monotonic()
        while self.recent and self.recent[0] <= now - 1:
            self.recent.popleft()
        if len(self.recent) >= self.faults.limit:
            return False
        self.recent.append(now)
        return True

    async def stats(self, request: web.Request) -> web.Response:
        """The counts so far; `abandoned` were answered when their client had gone."""
        self.connections = {one for one in self.connections if not one.is_closing()}
        return web.json_response(
            {
                **self.counts,
                "in_flight": self.in_flight,
                "connections": len(self.connections),
                "most_in_flight": self.most_in_flight,
                "most_sold": max(self.sold.values(), default=0),
                "sold_twice": sum(count - 1 for count in self.sold.values()),
                "unreadable": len(self.unreadable),
                "hopeless": len(self.hopeless),
                "hopeless_requests": sum(self.hopeless.values()),
                "seconds": self.last - self.first,
                "seconds_of_others": self.last_other - self.first,
            }
        )


def completion(usage: Any = None, **choice: Any) -> bytes:
    """A whole answer; `choice` changes its choice, and None leaves it without any."""
    message = {"role": "assistant", "content": ANSWER}
    fields = {"index": 0, "message": message, "finish_reason": "stop", **choice}
    usage = {
        "prompt_tokens": 160,
        "completion_tokens": TOKENS,
        "total_tokens": 210,
        **(usage or {}),
    }
    whole = {"id": "bench", "object": "chat.completion", "created": 0, "model": "bench"}
    choices = [] if choice.get("index", 0) is None else [fields]
    return json.dumps({**whole, "choices": choices, "usage": usage}).encode()


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# Answers that real servers give; the first and the last can't be read, all others can.
ODD: list[dict[str, Any]] = [
    {"index": None},
    *({"finish_reason": reason} for reason in ("eos_token", "", None, "STOP", "end_turn")),
    {"message": _said(f"{ANSWER} \ud83d")},
    {"message": _said(f"<think>Is it blue? No.</think>{ANSWER}")},
    {"usage": {"prompt_tokens": "160", "completion_tokens": None}},
    {"usage": {"prompt_tokens": 10**30}},
]


def _refusal(
    status: int, code: str, message: str, headers: dict[str, str] | None = None
) -> web.Response:
    if headers is None:
        headers = {"Retry-After": "1"} if status == 429 else {}
    error = {"error": {"message": message, "code": code, "type": code}}
    return web.json_response(error, status=status, headers=headers)


@dataclass(frozen=True)
class Served:
    """A running endpoint: its address, and its counts when asked."""

    url: str
    process: "subprocess.Popen[str]"

    def stats(self) -> Counter[str]:
        """What it counted so far."""
        with urlopen(self.url.removesuffix("/v1") + "/stats") as answer:  # noqa: S310
            found: dict[str, Any] = json.load(answer)
        return Counter(found)


@contextmanager
def serve(faults: Faults | None = None) -> Iterator[Served]:
    """An endpoint in a process of its own, which ends with the context."""
    arguments = [f"--{name}={value}" for name, value in asdict(faults or Faults()).items()]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.endpoint", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield Served(process.stdout.readline().strip(), process)
        finally:
            process.kill()


async def _main(faults: Faults) -> None:
    endpoint = Endpoint(faults)
    application = web.Application()
    application.router.add_post("/v1/chat/completions", endpoint.chat)
    application.router.add_get("/stats", endpoint.stats)
    runner = web.AppRunner(application, access_log=None, handler_cancellation=False)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    print(f"http://127.0.0.1:{port}/v1", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for one in fields(Faults):
        parser.add_argument(f"--{one.name}", type=type(one.default), default=one.default)
    asyncio.run(_main(Faults(**vars(parser.parse_args()))))

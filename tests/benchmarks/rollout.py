"""What a rollout's proxy adds, and survives: `python -m tests.benchmarks.rollout`.

Two servers of 20 ms answer for teacher and student, in processes of their own. The `openai` client
asks the proxy at a fixed rate over several connections, and one request in ten goes straight to a
server, to compare with. After a third of the time the student's server is killed and comes back
five seconds later, after two thirds the teacher's. Then come streams, with the proxy's memory on
the way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from aiohttp import web
from openai import AsyncOpenAI, OpenAIError

HOST = "127.0.0.1"
DELAY = 0.02
CLIENTS = 4
AWAY = 5.0  # seconds that a killed server stays away


async def answer(request: web.Request) -> web.StreamResponse:
    """An answer that echoes, whole or in three events."""
    body = await request.json()
    text = body["messages"][-1]["content"]
    await asyncio.sleep(DELAY)
    usage = {"prompt_tokens": 50, "completion_tokens": 2, "total_tokens": 52}
    shared = {"id": "x", "created": 0, "model": body["model"]}
    if not body.get("stream"):
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return web.json_response(
            {**shared, "object": "chat.completion", "choices": [choice], "usage": usage}
        )
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for delta, reason in (({"content": text}, None), ({"content": "!"}, None), ({}, "stop")):
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        event = {**shared, "object": "chat.completion.chunk", "choices": [choice]}
        await response.write(f"data: {json.dumps(event)}\n\n".encode())
    await response.write(b"data: [DONE]\n\n")
    return response


def serve(port: int) -> None:
    """One of the two servers."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    web.run_app(app, host=HOST, port=port, access_log=None, print=lambda *_: None)


class Servers:
    """The two servers and the proxy before them."""

    def __init__(self, folder: Path) -> None:
        from tests.support.releases import release_of

        release = release_of(folder / "made", range(4), teacher="openai:echo")
        self.run = release.path.parent
        student = {"metrics": {"agreement": {"value": 0.97}, "answered": {"value": 1.0}}}
        systems = {"teacher": {"metrics": {}}, "student": student}
        (self.run / "report.json").write_text(json.dumps({"systems": systems}))
        self.ports = {"teacher": 18_431, "student": 18_432}
        self.started = {name: self.start(name) for name in self.ports}
        self.proxy = self._start_proxy()

    def url(self, name: str) -> str:
        return f"http://{HOST}:{self.ports[name]}/v1"

    def start(self, name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", __spec__.name, "--serve", str(self.ports[name])]
        return subprocess.Popen(command, text=True)

    def _start_proxy(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "distill_datasets", "rollout", str(self.run), "--manual"]
        command += ["--port", "0", "--student-url", self.url("student"), "--stage", "half=0.5:0.1"]
        env = {**os.environ, "OPENAI_BASE_URL": self.url("teacher"), "OPENAI_API_KEY": "any-key"}
        return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)

    def address(self) -> str:
        assert self.proxy.stderr is not None
        found = re.search(r"http://\S+/v1", self.proxy.stderr.readline())
        assert found is not None
        return found[0]

    def memory(self) -> float:
        """MiB that the proxy holds."""
        status = Path(f"/proc/{self.proxy.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    async def break_off(self, name: str) -> None:
        """Kill a server, and start it again a little later."""
        self.started[name].kill()
        self.started[name].wait()
        await asyncio.sleep(AWAY)
        self.started[name] = self.start(name)

    def close(self) -> None:
        self.proxy.send_signal(signal.SIGINT)
        self.proxy.wait(20)
        for one in self.started.values():
            one.kill()


async def ask(client: AsyncOpenAI, number: int, *, stream: bool = False) -> float:
    """Seconds until an answer was there; raises where it is none."""
    began, text = time.perf_counter(), f"query {number}"
    asked = {"model": "mine", "messages": [{"role": "user", "content": text}]}
    if stream:
        said = ""
        async for chunk in await client.chat.completions.create(**asked, stream=True):
            said += chunk.choices[0].delta.content or ""
        assert said == text + "!", said
    else:
        made = await client.chat.completions.create(**asked)
        assert made.choices[0].message.content == text
    return time.perf_counter() - began


async def at_rate(servers: Servers, proxy: str, rate: int, seconds: int) -> None:
    """Ask at a rate, with both servers gone once, and print what came of it."""
    through = [AsyncOpenAI(base_url=proxy, api_key="any", max_retries=0) for _ in range(CLIENTS)]
    straight = AsyncOpenAI(base_url=servers.url("teacher"), api_key="any", max_retries=0)
    await asyncio.gather(*(ask(one, -1) for one in [*through, straight]))
    taken: dict[str, list[tuple[float, float]]] = {"proxy": [], "straight": []}
    failed: Counter[str] = Counter()
    began = time.perf_counter()

    async def one(number: int) -> None:
        at = time.perf_counter() - began
        direct = number % 10 == 0 and at < seconds / 3
        client = straight if direct else through[number % CLIENTS]
        try:
            spent = await ask(client, number)
            taken["straight" if direct else "proxy"].append((at, spent))
        except (OpenAIError, AssertionError) as error:
            failed[f"{type(error).__name__}: {error}"[:120]] += 1

    tasks, breaks = [], {"student": seconds / 3, "teacher": 2 * seconds / 3}
    for number in range(rate * seconds):
        due = number / rate
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        for name in [name for name, at in breaks.items() if due >= at]:
            del breaks[name]
            tasks.append(asyncio.create_task(servers.break_off(name)))
        tasks.append(asyncio.create_task(one(number)))
    await asyncio.gather(*tasks)
    quiet = {
        name: np.quantile([spent for at, spent in times if at < seconds / 3], [0.5, 0.99])
        for name, times in taken.items()
    }
    answered = sum(len(times) for times in taken.values())
    print(f"{answered:,} answered, {sum(failed.values())} failed {dict(failed)}")
    for place, name in enumerate(("median", "p99")):
        own, bare = quiet["proxy"][place] * 1000, quiet["straight"][place] * 1000
        print(f"{name}: {own:.1f} ms through the proxy, {bare:.1f} straight: {own - bare:+.1f} ms")


async def streams(servers: Servers, proxy: str, count: int) -> None:
    """Ask for many streams, and print the proxy's memory on the way."""
    client, gate = AsyncOpenAI(base_url=proxy, api_key="any", max_retries=0), asyncio.Semaphore(64)

    async def one(number: int) -> None:
        async with gate:
            await ask(client, number, stream=True)

    memory = []
    for part in range(5):
        await asyncio.gather(*(one(part * count + number) for number in range(count // 5)))
        memory.append(servers.memory())
    told = ", ".join(f"{one:.1f}" for one in memory)
    print(f"{count:,} streams: the proxy holds {told} MiB after each fifth")


async def measure(rate: int, seconds: int, count: int) -> None:
    """Both parts."""
    with tempfile.TemporaryDirectory() as folder:
        servers = Servers(Path(folder))
        try:
            proxy = await asyncio.to_thread(servers.address)
            await asyncio.sleep(1.0)
            await at_rate(servers, proxy, rate, seconds)
            await streams(servers, proxy, count)
        finally:
            servers.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", type=int)
    parser.add_argument("--rate", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--streams", type=int, default=10_000)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
    else:
        asyncio.run(measure(options.rate, options.seconds, options.streams))

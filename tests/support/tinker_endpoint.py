"""A server of Tinker's protocol that answers every sample request alike, at once or later.

For what doesn't need a model: how fast a client is, and what it does when requests fail. Run as
`python -m tests.support.tinker_endpoint`; it prints its port and ends when its standard input does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from tests.support.forks import ROOT, Process

KEY = "tml-canned"
NAME = "canned"
CATEGORIES = {1000: "user", 1001: "server"}
PROTOBUF = "application/x-protobuf"


class Endpoint:
    """Counts what it is asked. `max_tokens` chooses a failure: a request that asks for 400 is
    refused with that status, one for 1000 fails as the user's error, one for 1001 as the server's.
    """

    def __init__(self, reply: bytes, delay: float) -> None:
        self.reply, self.delay = reply, delay
        self.asked: Counter[str] = Counter()
        self.wanted: dict[str, int] = {}

    def routes(self) -> list[web.RouteDef]:
        """What the SDK needs to sample."""
        fixed = {
            "client/config": {},
            "client/dynamic_config": {},
            "telemetry": {"status": "accepted"},
            "create_session": {"session_id": "session"},
            "session_heartbeat": {"type": "session_heartbeat"},
            "create_sampling_session": {"sampling_session_id": "sampler"},
        }

        def answer(body: dict[str, object]) -> web.RouteDef:
            async def handle(_: web.Request) -> web.Response:
                return web.json_response(body)

            return handle  # type: ignore[return-value]

        posts = [web.post(f"/api/v1/{path}", answer(body)) for path, body in fixed.items()]
        return [
            *posts,
            web.post("/api/v1/asample", self.sample),
            web.post("/api/v1/retrieve_future", self.retrieve),
            web.get("/asked", self.count),
        ]

    async def sample(self, request: web.Request) -> web.Response:
        """Promise an answer."""
        body = json.loads(await request.read())
        self.asked["requests"] += 1
        request_id = f"{body['seq_id']}"
        most = self.wanted[request_id] = body["sampling_params"]["max_tokens"]
        if 400 <= most < 500:
            return web.json_response({"error": "canned refusal"}, status=most)
        samples = [f"{request_id}:{n}" for n in range(body["num_samples"])]
        return web.json_response({"request_id": request_id, "sample_sequence_ids": samples})

    async def retrieve(self, request: web.Request) -> web.Response:
        """Answer, or fail."""
        request_id = json.loads(await request.read())["request_id"]
        if self.delay:
            await asyncio.sleep(self.delay)
        category = CATEGORIES.get(self.wanted.pop(request_id))
        if category is not None:
            return web.json_response({"error": "canned failure", "category": category})
        return web.Response(body=self.reply, content_type=PROTOBUF)

    async def count(self, _: web.Request) -> web.Response:
        """How many requests came."""
        return web.json_response(self.asked)


def make_reply(tokens: list[int]) -> bytes:
    """One sample of these tokens."""
    import numpy as np
    from tinker.proto import tinker_public_pb2 as pb

    message = pb.SampleResponse(prompt_cache_hit_tokens=3)
    sequence = message.sequences.add()
    sequence.stop_reason = pb.STOP_REASON_STOP
    sequence.tokens = np.array(tokens, np.int32).tobytes()
    sequence.logprobs = np.full(len(tokens), -0.5, np.float32).tobytes()
    top = sequence.topk_sampled_logprobs
    top.length, top.k = len(tokens), 2
    top.token_ids = np.array([[token, 0] for token in tokens], np.int32).tobytes()
    top.logprobs = np.array([[-0.5, -99999.0]] * len(tokens), np.float32).tobytes()
    return bytes(message.SerializeToString())


async def _serve(endpoint: Endpoint) -> None:
    app = web.Application()
    app.router.add_routes(endpoint.routes())
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


@contextmanager
def running(tokens: list[int], *, delay: float = 0.0) -> Iterator[str]:
    """The address of an endpoint in a process of its own, that answers after `delay` seconds."""
    with Process(
        [sys.executable, "-m", "tests.support.tinker_endpoint", json.dumps([tokens, delay])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        try:
            yield f"http://127.0.0.1:{int(child.stdout.readline())}"
        finally:
            child.stdin.close()


def main() -> None:
    """Serve until the parent closes the pipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("options")
    tokens, delay = json.loads(parser.parse_args().options)
    asyncio.run(_serve(Endpoint(make_reply(tokens), delay)))
    os._exit(0)


if __name__ == "__main__":
    main()

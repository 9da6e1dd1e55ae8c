"""A worker process of `ProcessSampler`: requests on standard input, replies on standard output.

It ends when its input closes, however its parent ended.
"""

import asyncio
import os
import pickle
import sys
import threading
from typing import IO, cast

from distill_datasets.models.connection import Connection
from distill_datasets.models.pipes import Portable, read, write
from distill_datasets.models.sampler import Sampling
from distill_datasets.models.tinker import TinkerSampler
from distill_datasets.schema import Message


class _Answering:
    """The child's side: answers until its standard input closes."""

    def __init__(self, replies: IO[bytes], sampler: TinkerSampler) -> None:
        self._replies, self._sampler = replies, sampler
        self._running: set[asyncio.Task[None]] = set()

    async def run(self, requests: IO[bytes]) -> None:
        """Read requests on a thread, answer them on this loop."""
        loop, over = asyncio.get_running_loop(), asyncio.Event()

        def listen() -> None:
            while (content := read(requests)) is not None:
                loop.call_soon_threadsafe(self._start, content)
            loop.call_soon_threadsafe(over.set)

        threading.Thread(target=listen, name="requests", daemon=True).start()
        await over.wait()

    def _start(self, content: bytes) -> None:
        task = asyncio.create_task(self._answer(*pickle.loads(content)))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _answer(self, number: int, messages: list[Message], sampling: Sampling) -> None:
        reply, error = None, None
        try:
            reply = await self._sampler.sample(messages, sampling)
        except Exception as raised:  # it belongs to whoever asked, in the parent
            error = Portable(raised)
        write(self._replies, pickle.dumps((number, reply, error)))


def main() -> None:
    """Be a worker."""
    # Whatever prints must not get between the replies.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    state = read(sys.stdin.buffer)
    if state is not None:
        connection, client = pickle.loads(state)
        sampler = TinkerSampler(cast(Connection, connection), client)
        asyncio.run(_Answering(replies, sampler).run(sys.stdin.buffer))
    sys.stderr.flush()
    # The SDK's threads would be waited for.
    os._exit(0)


if __name__ == "__main__":
    main()

"""Spreads a sampler over processes, since a client of the Tinker SDK keeps one core busy.

What a worker needs, the key included, goes through a pipe, and so do the requests; it ends when
that closes, however its parent ended. Run as a module, with the pipe's number, this is the worker.
"""

import asyncio
import atexit
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection as Channel
from pathlib import Path
from typing import Any, cast

from distill_datasets.errors import DistillError, RetryableError, ServiceError, SettingsError
from distill_datasets.models.sampler import Reply, Sampling
from distill_datasets.models.tinker import TinkerSampler, answered
from distill_datasets.schema import Message

_CLOSE_SECONDS = 5.0
_LAST_WORDS = 500
_NAMED = ("type", "status", "attempts")  # what a RequestError is made with
_Error = tuple[type[Exception], tuple[Any, ...], dict[str, Any]]  # kind, arguments and state


class _WorkerEnded(Exception):  # noqa: N818 (what happened, not what is wrong)
    """A worker ended before it answered."""


class ProcessSampler:
    """Spreads requests over worker processes; each goes to the one that has the fewest.

    Close it, or let the exit of Python do it. A request whose worker ends is asked once more, of
    another.
    """

    def __init__(self, sampler: TinkerSampler, processes: int) -> None:
        """Starts the workers, and doesn't wait for them: they take seconds, and requests queue.

        Raises `SettingsError` for fewer than one process.
        """
        if processes < 1:
            raise SettingsError(f"Expected processes of 1 or more; found {processes}.")
        self.connection, self._sampler = sampler.connection, sampler
        # The service is the parent's: a worker has a client of the parent's session.
        connection = replace(self.connection, service=cast(Any, None), server=None)
        state = pickle.dumps((connection, sampler.client, sampler.timeout))
        self._workers = [_WorkerHandle(state) for _ in range(processes)]
        atexit.register(self.close)

    @property
    def model(self) -> str:
        """The reference, as written."""
        return self._sampler.model

    @property
    def identity(self) -> str:
        """That of the sampler: who asks decides nothing."""
        return self._sampler.identity

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Answer once, in a worker; raises `ServiceError` when all workers have ended."""
        for _ in range(2):
            request = self._least_busy().ask(messages, sampling)
            try:
                return cast(Reply, await answered(request, self.connection.ended))
            except _WorkerEnded as error:
                ended = error
        raise RetryableError(
            f"Two worker processes ended while they answered this request: {ended}",
            type="connection",
            attempts=2,
        )

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that run."""
        return [worker.child.pid for worker in self._workers if worker.alive]

    def _least_busy(self) -> "_WorkerHandle":
        alive = [worker for worker in self._workers if worker.alive]
        if not alive:
            raise ServiceError(
                f"All {len(self._workers)} worker processes of {self.model!r} ended. Run again, "
                f"with fewer if memory is short; paid answers are kept. The last words of one: "
                f"{self._workers[0].last_words!r}"
            )
        return min(alive, key=lambda worker: len(worker.pending))

    def close(self) -> None:
        """End the workers; safe to call again. Requests on their way fail."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.leave()
        for worker in self._workers:
            worker.close()


class _WorkerHandle:
    """A child process, as its parent sees it."""

    def __init__(self, state: bytes) -> None:
        # Lives as long as the child, hence no context manager.
        self._errors = tempfile.NamedTemporaryFile("w+", prefix="distill-worker-")  # noqa: SIM115
        self._pipe, there = Pipe()
        path = os.pathsep.join(
            [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        with there:
            number = there.fileno()
            self.child = subprocess.Popen(
                [sys.executable, "-m", "distill_datasets.models.processes", str(number)],
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                pass_fds=[number],
                env={**os.environ, "PYTHONPATH": path},  # so that this package is importable
                # Ctrl-C is the parent's to handle: it waits for the answers on their way.
                start_new_session=True,
            )
        self.pending: dict[int, Future[Reply]] = {}
        self._asked, self._lock = 0, threading.Lock()
        self.alive = True
        with suppress(OSError):
            self._pipe.send_bytes(state)
        self._reader = threading.Thread(target=self._read, name="worker-replies", daemon=True)
        self._reader.start()

    @property
    def last_words(self) -> str:
        """The end of what the child said on its error stream, while that is kept."""
        if self._errors.closed:
            return "it was closed"
        said = Path(self._errors.name).read_text("utf-8", errors="replace")
        return said.strip()[-_LAST_WORDS:]

    def ask(self, messages: Sequence[Message], sampling: Sampling) -> "Future[Reply]":
        """Send a request; the future raises what answering raised, or `_WorkerEnded`."""
        request: Future[Reply] = Future()
        with self._lock:
            number = self._asked = self._asked + 1
            self.pending[number] = request
            try:
                self._pipe.send_bytes(pickle.dumps((number, list(messages), sampling)))
            except OSError:
                # Gone, or closed; the reader fails those that were sent.
                self._fail([number])
        return request

    def _read(self) -> None:
        try:
            with suppress(EOFError, OSError):
                while True:
                    self._resolve(*pickle.loads(self._pipe.recv_bytes()))
        finally:
            with self._lock:
                self.alive = False
                self._fail(list(self.pending))

    def _resolve(self, number: int, reply: Reply | None, error: _Error | None) -> None:
        request = self.pending.pop(number)
        with suppress(InvalidStateError):  # whoever asked may have been cancelled
            if error is not None:
                request.set_exception(_rebuilt(*error))
            elif reply is not None:
                request.set_result(reply)

    def _fail(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if request := self.pending.pop(number, None):
                with suppress(InvalidStateError):
                    request.set_exception(_WorkerEnded(self.last_words or "it said nothing"))

    def leave(self) -> None:
        self.alive = False
        with suppress(OSError):
            self._pipe.send_bytes(b"")

    def close(self) -> None:
        try:
            self.child.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self._reader.join(_CLOSE_SECONDS)
        self._pipe.close()
        self._errors.close()


async def _answer_all(pipe: Channel, sampler: TinkerSampler) -> None:
    """The child's side: answers until the pipe closes, or brings nothing."""
    loop, over, running = asyncio.get_running_loop(), asyncio.Event(), set[asyncio.Task[None]]()

    async def answer(number: int, messages: list[Message], sampling: Sampling) -> None:
        reply, error = None, None
        try:
            reply = await sampler.sample(messages, sampling)
        except Exception as raised:  # it belongs to whoever asked, in the parent
            error = _portable(raised)
        with suppress(OSError):  # nobody waits for it any longer
            pipe.send_bytes(pickle.dumps((number, reply, error)))

    def start(content: bytes) -> None:
        task = asyncio.create_task(answer(*pickle.loads(content)))
        running.add(task)
        task.add_done_callback(running.discard)

    def listen() -> None:
        with suppress(EOFError, OSError):
            while content := pipe.recv_bytes():
                loop.call_soon_threadsafe(start, content)
        loop.call_soon_threadsafe(over.set)

    threading.Thread(target=listen, name="requests", daemon=True).start()
    await over.wait()


def _portable(error: Exception) -> _Error:
    """An exception for a pipe, since those with named arguments can't be pickled.

    Ours arrive as they are, others as a `RuntimeError` that names them.
    """
    if isinstance(error, DistillError):
        return type(error), error.args, vars(error)
    return RuntimeError, (f"{type(error).__name__}: {error}",), {}


def _rebuilt(kind: type[Exception], arguments: tuple[Any, ...], state: dict[str, Any]) -> Exception:
    error = kind(*arguments, **{name: state[name] for name in _NAMED if name in state})
    vars(error).update(state)
    return error


def run_worker(pipe: Channel) -> None:
    """Answers what comes through the pipe, and ends this process with it."""
    state = b""
    with suppress(EOFError, OSError):
        state = pipe.recv_bytes()
    if state:
        connection, client, timeout = pickle.loads(state)
        sampler = TinkerSampler(connection, client, timeout=timeout)
        asyncio.run(_answer_all(pipe, sampler))
    sys.stderr.flush()
    # The SDK's threads would be waited for.
    os._exit(0)


if __name__ == "__main__":
    # What is pickled must belong to the module by its name, as its parent knows it.
    from distill_datasets.models import processes

    processes.run_worker(Channel(int(sys.argv[1])))

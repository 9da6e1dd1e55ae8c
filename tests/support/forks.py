"""Python processes that begin where the slow imports are over: forks of one that has made them.

Run as `python -m tests.support.forks FOLDER`, it listens there at two sockets: forks from `PLAIN`
have imported nothing that reads the environment, those from `MODELS` what serves a model as well.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing.connection import wait as ready
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

from distill_datasets.embedded import process as embedded

ROOT = Path(__file__).parents[2]
PLAIN, MODELS = "plain", "models"
_NUMBER = 4  # bytes


class Process(subprocess.Popen[str]):
    """As `subprocess.Popen([sys.executable, "-c" or "-m", …])`, sooner."""

    def _execute_child(self, args: Sequence[str], *given: Any) -> None:
        """Let the process be forked, with this side's ends of the pipes."""
        cwd, env, *_ = given[4:]
        pipes, new_session = given[9:15], given[20]
        own = zip((pipes[0], pipes[3], pipes[5]), range(3), strict=True)
        arguments = [str(one) for one in args[1:]]
        self.connection, self.once = socket.socket(socket.AF_UNIX), threading.Lock()
        name = MODELS if embedded.__name__ in arguments else PLAIN
        self.connection.connect(str(first() / name))
        environment = {**(os.environ if env is None else env)}
        place = str(cwd or Path.cwd())
        wish = json.dumps([arguments, environment, place, new_session]).encode()
        files = [pipe if pipe != -1 else number for pipe, number in own]
        socket.send_fds(self.connection, [len(wish).to_bytes(_NUMBER, "big")], files)
        self.connection.sendall(wish)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]
        self.pid = self._number()

    def _number(self) -> int:
        return int.from_bytes(self.connection.recv(_NUMBER), "big", signed=True)

    def __del__(self, *_: object) -> None:
        """Leave the process alone: it is no child that has to be waited for."""

    def _internal_poll(self, *_: object, **__: object) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self._wait(0)
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            if not ready([self.connection], timeout):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            with self.once:
                if self.returncode is None:
                    self.returncode = self._number()
        return self.returncode


def run(
    arguments: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    begun: Callable[[Callable[[], None]], None] = lambda kill: None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Python with arguments ("-c", … or "-m", …), to its end; `begun` is told how to kill it."""
    command = [sys.executable, *arguments]
    # No pipes: what it began may outlive it, and holds them.
    opened = partial(tempfile.TemporaryFile, "w+", encoding="utf-8")
    with opened() as out, opened() as err:
        process = Process(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env, cwd=cwd, text=True
        )
        begun(process.kill)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
        code = process.wait()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), err.read())


def fork_servers() -> None:
    """From now on this process and its forks begin embedded servers as forks."""
    vars(embedded)["subprocess"] = SimpleNamespace(**{**vars(subprocess), "Popen": Process})


_FOLDER: list[Path] = []  # in a fork: that of the process it is of


@cache
def first() -> Path:
    """The folder where the first process listens, which ends with this one."""
    if _FOLDER:
        return _FOLDER[0]
    folder = tempfile.TemporaryDirectory(prefix="distill-forks-")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.forks", folder.name],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        },
        cwd=ROOT,
        stdin=subprocess.PIPE,  # its end is the end of the process
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    # Both are held until the end of this process.
    atexit.register(lambda: (folder.cleanup(), process.poll()))
    return Path(folder.name)


@dataclass
class _Forking:
    """Forks whenever somebody connects.

    What `others` listen for is served by a process that this one forks when the first arrives.
    """

    listener: socket.socket
    others: dict[socket.socket, Callable[[], None]] = field(default_factory=dict)
    waiting: dict[int, socket.socket] = field(default_factory=dict)

    def until_wanted(self) -> tuple[list[Any], list[int]]:
        """What is wanted of the process that this has become; ends where no more are wanted."""
        ended, woken = socket.socketpair()
        ended.setblocking(False)
        woken.setblocking(False)
        signal.set_wakeup_fd(woken.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        with selectors.DefaultSelector() as events:
            for source in (sys.stdin, ended, self.listener, *self.others):
                events.register(source, selectors.EVENT_READ)
            while True:
                for source in [key.fileobj for key, _ in events.select()]:
                    if source is sys.stdin:
                        os._exit(0)
                    elif source is ended:
                        ended.recv(1 << 10)
                        self._tell()
                    elif isinstance(source, socket.socket) and source in self.others:
                        events.unregister(source)
                        self._pass_on(source)
                    elif (wanted := self._fork()) is not None:
                        return wanted

    def _pass_on(self, listener: socket.socket) -> None:
        prepare = self.others.pop(listener)
        if not os.fork():
            for one in (self.listener, *self.others, *self.waiting.values()):
                one.close()
            prepare()
            _run(_become(*_Forking(listener).until_wanted()))

    def _fork(self) -> tuple[list[Any], list[int]] | None:
        connection, _ = self.listener.accept()
        size, files, *_ = socket.recv_fds(connection, _NUMBER, 3)
        with connection.makefile("rb") as file:
            wish = json.loads(file.read(int.from_bytes(size, "big")))
        process = os.fork()
        if not process:
            for one in (self.listener, connection, *self.others, *self.waiting.values()):
                one.close()
            return wish, list(files)
        for number in files:
            os.close(number)
        connection.sendall(process.to_bytes(_NUMBER, "big"))
        self.waiting[process] = connection
        return None

    def _tell(self) -> None:
        """Tell how processes ended to those who began them."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                process, status = ended
                if process in self.waiting:
                    with self.waiting.pop(process) as connection, suppress(BrokenPipeError):
                        code = os.waitstatus_to_exitcode(status)
                        connection.sendall(code.to_bytes(_NUMBER, "big", signed=True))


def _become(wish: list[Any], files: Sequence[int]) -> list[str]:
    arguments, environment, folder, new_session = wish
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if new_session:
        os.setsid()
    for number, opened in enumerate(files):
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    return list(arguments)


def _run(arguments: list[str]) -> NoReturn:
    """As `python` with these arguments does, but for taking apart what was imported beforehand."""
    kind, what, *rest = arguments
    sys.path[0] = ""
    code: object = None
    try:
        if kind == "-m":
            sys.argv = [what, *rest]
            sys.modules.pop(what, None)
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv = [kind, *rest]
            module = sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), module.__dict__)  # noqa: S102
    except SystemExit as end:
        code = end.code
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _import_models() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # as every server is started
    import peft  # noqa: F401
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import distill_datasets.embedded.app
    import distill_datasets.embedded.batching
    import distill_datasets.embedded.trainer  # noqa: F401

    gc.freeze()


def main(folder: Path) -> NoReturn:
    """Fork until standard input ends."""
    listeners = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    for listener, name in zip(listeners, (PLAIN, MODELS), strict=True):
        listener.bind(str(folder / name))
        listener.listen(64)
    print(flush=True)
    import fsspec  # noqa: F401
    import httpx  # noqa: F401
    import pandas  # noqa: F401
    import tinker  # noqa: F401
    import torch  # noqa: F401

    import distill_datasets.cli.main
    import distill_datasets.evaluation.report
    import distill_datasets.releases.push
    import distill_datasets.training.trainer  # noqa: F401

    fork_servers()
    assert not {"huggingface_hub", "datasets", "transformers"} & {*sys.modules}
    gc.freeze()  # no process copies the memory of what was imported by counting it
    plain, models = listeners
    _run(_become(*_Forking(plain, {models: _import_models}).until_wanted()))


if __name__ == "__main__":
    from tests.support import forks  # what a fork imports is this module under its own name

    forks._FOLDER.append(Path(sys.argv[1]))
    forks.main(Path(sys.argv[1]))

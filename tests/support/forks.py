"""Python processes that begin where the slow imports are over: forks of one that has made them.

Run as `python -m tests.support.forks`: each line of its input is a process to begin, as
`Forks.run` writes them. What is imported beforehand reads nothing of the environment.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from signal import SIGKILL
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import NoReturn

ROOT = Path(__file__).parents[2]


class Forks:
    """Begins processes, one at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.first = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forks"],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdin=subprocess.PIPE,  # its end is the end of the process
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        begun: Callable[[Callable[[], None]], None],
        timeout: float,
    ) -> subprocess.CompletedProcess[str]:
        """Python with arguments ("-c", … or "-m", …); `begun` is told how to kill it."""
        assert self.first.stdin is not None and self.first.stdout is not None
        with TemporaryDirectory() as folder, self.lock:
            out, err = Path(folder, "out"), Path(folder, "err")
            wanted = [list(arguments), dict(env), str(cwd), str(out), str(err)]
            self.first.stdin.write(json.dumps(wanted) + "\n")
            self.first.stdin.flush()
            process = int(self.first.stdout.readline())

            def kill() -> None:
                os.kill(process, SIGKILL)

            begun(kill)
            too_long = threading.Timer(timeout, kill)
            too_long.start()
            code = int(self.first.stdout.readline())
            too_long.cancel()
            texts = (file.read_text("utf-8") for file in (out, err))
            return subprocess.CompletedProcess(["python", *arguments], code, *texts)


@cache
def forks() -> Forks:
    """Those of this test process."""
    return Forks()


def wait_for_wish() -> list[str] | None:
    """The arguments of the process that this is; None in the first, when no more are wanted."""
    for line in sys.stdin:
        arguments, env, cwd, *files = json.loads(line)
        if not (child := os.fork()):
            for number, name in enumerate([os.devnull, *files]):
                opened = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
                os.dup2(opened, number)
                os.close(opened)
            os.environ.clear()
            os.environ.update(env)
            os.chdir(cwd)
            return list(arguments)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def run(arguments: list[str]) -> NoReturn:
    """As `python` with these arguments does, but for taking apart what was imported beforehand."""
    kind, what, *rest = arguments
    sys.path[0] = ""
    code: object = None
    try:
        if kind == "-m":
            sys.argv = [what, *rest]
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


if __name__ == "__main__":
    import aiohttp  # noqa: F401
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import tinker  # noqa: F401
    import torch  # noqa: F401

    assert not {"huggingface_hub", "datasets", "transformers"} & {*sys.modules}
    gc.freeze()  # no process copies the memory of what was imported by counting it
    if (wish := wait_for_wish()) is not None:
        run(wish)

import os
import signal
import subprocess
import sys
from pathlib import Path

from distill_datasets.generation.cache import Journal
from tests.support.forks import Process

_HUNG = """
import asyncio, os, signal, sys
from pathlib import Path
from distill_datasets.generation.run import generate
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.models.sampler import Echo

class Hung(Echo):
    async def sample(self, messages, sampling):
        if self.calls == 3:
            print("hangs", flush=True)
            await asyncio.Event().wait()
        return await super().sample(messages, sampling)

def interrupt(number, frame):
    os.write(1, b"caught\\n")  # one may come while another is told of
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, interrupt)  # a parent in the background hands down a deaf ear
generate(sys.argv[1], teacher=Hung(), out=sys.argv[2], settings=GenerateSettings(concurrency=1))
"""


def test_a_second_ctrl_c_leaves_a_request_alone_that_never_ends(
    recipe_folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", _HUNG, str(recipe_folder), str(tmp_path / "run")]
    with Process(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "hangs\n"
        caught, alive = 0, True
        while alive:  # one on the heels of another is one with it
            os.kill(process.pid, signal.SIGINT)
            alive = process.stdout.readline() == "caught\n"
            caught += alive
        said = process.stderr.read()
    assert caught >= 2
    assert "KeyboardInterrupt" in said
    with Journal(tmp_path / "run/journal.sqlite") as journal:
        assert len(journal) == 3

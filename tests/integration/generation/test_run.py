"""Runs in processes of their own: several on one folder, killed and interrupted ones."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distill_datasets.generation.cache import Journal
from distill_datasets.generation.run import generate
from distill_datasets.models.sampler import Echo
from tests.conftest import many
from tests.support import forks
from tests.support.forks import Process
from tests.support.openai_server import serving

_SCRIPT = """
import sys
from distill_datasets import DistillError, generate
sys.stdin.readline()
try:
    made = generate(sys.argv[1], teacher="openai:echo-small", out=sys.argv[2])
except DistillError as error:
    sys.exit(str(error))
print(made.kept)
"""


@pytest.mark.parametrize("processes", [2, 4])
def test_nothing_is_bought_twice_by_several_processes_on_one_folder(
    processes: int, recipe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "any")
        command = [sys.executable, "-c", _SCRIPT, str(recipe_folder), str(tmp_path / "run")]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started = [
            Process(command, text=True, **pipes)  # type: ignore[call-overload]
            for _ in range(processes)
        ]
        for one in started:
            one.stdin.write("go\n")
            one.stdin.flush()
        said = [one.communicate() for one in started]
        made = generate(recipe_folder, teacher="openai:echo-small", out=tmp_path / "run")
        assert set(server.asked.values()) == {1}
    assert made.kept == 4
    for one, (_, errors) in zip(started, said, strict=True):
        assert one.returncode == 0 or "Another process is at work in" in errors
    assert any(one.returncode == 0 for one in started)
    with Journal(tmp_path / "run/journal.sqlite") as journal:
        assert {times for _, times in journal} == {1}


_AGAIN = """
import sys
from pathlib import Path
from distill_datasets.generation.run import generate
from distill_datasets.models.sampler import Echo

made = generate(Path(sys.argv[1]), teacher=Echo(), out=Path(sys.argv[2]))
print(made.kept, dict(made.rejected), made.errors, "datasets" in sys.modules)
"""


def test_a_finished_run_is_known_by_its_summary_alone(recipe_folder: Path, tmp_path: Path) -> None:
    made = generate(recipe_folder, teacher=Echo(), out=tmp_path / "run")
    arguments = ["-c", _AGAIN, str(recipe_folder), str(tmp_path / "run")]
    said = forks.run(arguments, env=os.environ, cwd=tmp_path).stdout
    assert said.strip() == f"{made.kept} {dict(made.rejected)} 0 False"


_KILLED = """
import asyncio, sys
from pathlib import Path
from distill_datasets import GenerateSettings, generate
from distill_datasets.models.sampler import Echo

SETTINGS = GenerateSettings(concurrency=4)

class Slow(Echo):
    async def sample(self, messages, sampling):
        if self.calls == 150:
            print("half", flush=True)
            await asyncio.Event().wait()
        return await super().sample(messages, sampling)

generate(Path(sys.argv[1]), teacher=Slow(), out=Path(sys.argv[2]), settings=SETTINGS)
"""


def test_after_kill_9_only_the_requests_in_flight_are_asked_again(
    recipe_folder: Path, tmp_path: Path
) -> None:
    recipe = many(recipe_folder, 300)
    arguments = [sys.executable, "-c", _KILLED, str(recipe_folder), str(tmp_path / "run")]
    with Process(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        os.kill(process.pid, signal.SIGKILL)
    with Journal(tmp_path / "run/journal.sqlite") as journal:
        paid = len(journal)
    assert 140 <= paid <= 150
    teacher = Echo()
    made = generate(recipe, teacher=teacher, out=tmp_path / "run")
    assert teacher.calls == 300 - paid
    assert made.kept == 300
    with Journal(tmp_path / "run/journal.sqlite") as journal:
        assert {times for _, times in journal} == {1}


_INTERRUPTED = """
import asyncio, signal, sys
from pathlib import Path
from distill_datasets import GenerateSettings, generate
from distill_datasets.models.sampler import Echo

SETTINGS = GenerateSettings(concurrency=4)

class Held(Echo):
    said = False

    async def sample(self, messages, sampling):
        if self.calls == 150 and not self.said:
            self.said = True
            print("half", flush=True)
        while self.calls >= 150 and not Path(sys.argv[3]).exists():
            await asyncio.sleep(0.01)
        return await super().sample(messages, sampling)

def interrupt(number, frame):
    print("caught", flush=True)
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, interrupt)  # a parent in the background hands down a deaf ear
generate(Path(sys.argv[1]), teacher=Held(), out=Path(sys.argv[2]), settings=SETTINGS)
"""


def test_ctrl_c_keeps_the_answers_in_flight(recipe_folder: Path, tmp_path: Path) -> None:
    many(recipe_folder, 300)
    paths = [str(recipe_folder), str(tmp_path / "run"), str(tmp_path / "go on")]
    with Process(
        [sys.executable, "-c", _INTERRUPTED, *paths],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "half\n"
        os.kill(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "caught\n"
        (tmp_path / "go on").touch()
        assert "KeyboardInterrupt" in process.stderr.read()
    with Journal(tmp_path / "run/journal.sqlite") as journal:
        assert 150 <= len(journal) < 300

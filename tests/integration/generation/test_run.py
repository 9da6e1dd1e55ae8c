"""Several processes on one run's folder, against a real server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill_datasets.generation.cache import Journal
from distill_datasets.generation.run import generate
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
            subprocess.Popen(command, env=dict(os.environ), text=True, **pipes)  # type: ignore[call-overload]
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

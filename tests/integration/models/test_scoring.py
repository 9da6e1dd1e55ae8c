"""A process ends with the exit code that was chosen, whatever the SDK still has on its way."""

import json
import os
import subprocess
import sys

import pytest

from tests.support import tinker_endpoint


@pytest.mark.parametrize("count", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_a_process_that_ends_in_the_midst_of_requests_is_not_aborted(count: int) -> None:
    with tinker_endpoint.running([1, 2, 3], delay=0.02) as url:
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.abrupt_ends", url, str(count)],
            capture_output=True,
            text=True,
            cwd=tinker_endpoint.ROOT,
            env={**os.environ, "NO_COLOR": "1"},
            check=False,
        )
    assert json.loads(done.stdout) == [1, 130] * (count // 2), done.stderr[-2000:]
    told = [line for line in done.stderr.splitlines() if "rror" in line]
    assert all("what nobody catches" in line for line in told), "nothing else is complained of"

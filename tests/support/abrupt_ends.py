"""Processes that end in the midst of requests to Tinker's protocol; prints their exit codes.

Run as `python -m tests.support.abrupt_ends URL COUNT`: every other one is interrupted, the others
meet an error. The imports are made once:
each process is a fork of this one, whose threads begin later, and ends as every Python does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import tinker

from distill_datasets.models import tinker as sdk
from tests.support.tinker_endpoint import KEY

REQUESTS = 12


def end_processes(count: int) -> int | None:
    """The number of the process that this is; None in the first, when all others have ended."""
    codes = []
    for number in range(count):
        ready, begun = os.pipe()
        if not (child := os.fork()):
            os.close(ready)
            os.dup2(begun, 3)
            return number
        os.close(begun)
        os.read(ready, 1)
        time.sleep(0.005 * number)  # each is met at another point
        if number % 2:
            os.kill(child, signal.SIGINT)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        os.close(ready)
    print(json.dumps(codes))
    return None


def ask(url: str) -> list[object]:
    """Requests that are all on their way at once."""
    service = tinker.ServiceClient(base_url=url, api_key=KEY)
    client = service.create_sampling_client(base_model="canned").result()
    prompt, once = tinker.ModelInput.from_ints([1, 2, 3]), tinker.SamplingParams(max_tokens=8)
    return [client.sample(prompt, 1, once) for _ in range(REQUESTS)]


def main() -> None:
    """Ends with 130 where it was interrupted, and with 1 by an error that nobody caught."""
    _, url, count = sys.argv
    os.environ["TINKER_TELEMETRY"] = "0"
    if (number := end_processes(int(count))) is None:
        return
    try:
        requests = ask(url)
        os.write(3, b"!")
        sdk.wait(requests[0], lambda: None)
        if number % 2:
            signal.pause()
    except KeyboardInterrupt:
        sys.exit(130)
    raise ValueError("what nobody catches")


if __name__ == "__main__":
    main()

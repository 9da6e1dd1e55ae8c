"""The embedded server as a child process: `launch` for the parent, `main` for the child."""

from __future__ import annotations

import argparse
import asyncio
import atexit
import json
import os
import secrets
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

from distill_datasets.errors import ModelError

HOST = "127.0.0.1"
CLOSE_SECONDS = 5.0


def new_api_key() -> str:
    """A fresh key in the form that the SDK accepts."""
    return f"tml-{secrets.token_urlsafe(32)}"


class Server:
    """A running server; close it, use it as a context manager, or let the exit of Python do it."""

    def __init__(self, child: subprocess.Popen[str], errors: IO[str], **known: str) -> None:
        self._child, self._errors = child, errors
        self.url, self.api_key, self.model = known["url"], known["api_key"], known["model"]
        self.dtype = known["dtype"]
        self._owner = os.getpid()
        atexit.register(self.close)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    @property
    def alive(self) -> bool:
        """Whether the child runs."""
        return self._child.poll() is None

    @property
    def stderr(self) -> str:
        """What the child has said on its error stream."""
        self._errors.flush()
        return Path(self._errors.name).read_text("utf-8", errors="replace")

    def close(self) -> None:
        """End the child; safe to call again."""
        atexit.unregister(self.close)
        if os.getpid() != self._owner or self._child.stdin is None:
            return
        with suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            self._child.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()
        self._errors.close()

    def __enter__(self) -> Server:
        """Use the server for a block."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the server with the block."""
        self.close()


def launch(
    model: Path, *, name: str, store: Path | None = None, dtype: str | None = None
) -> Server:
    """Start a server for a model folder on a free loopback port, with a fresh key.

    Returns once it answers; the model itself loads while the first requests wait. Without a
    `store` its checkpoints are gone when it ends. `dtype` stands in the place of EMBEDDED_DTYPE.
    """
    command = [sys.executable, "-m", f"{__package__}.process", str(model.resolve()), "--name", name]
    if store is not None:
        command += ["--store", str(store.resolve())]
    # This package is importable there; the model is local, so the Hub stays out.
    path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
    # Lives as long as the server, hence no context manager.
    errors = tempfile.NamedTemporaryFile("w+", prefix="distill-embedded-")  # noqa: SIM115
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={
            **os.environ,
            **({"EMBEDDED_DTYPE": dtype} if dtype else {}),
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "HF_HUB_OFFLINE": "1",
        },
        # Ctrl-C is the parent's to handle: it closes the child when it ends.
        start_new_session=True,
    )
    api_key = new_api_key()
    assert child.stdin is not None and child.stdout is not None
    # The key goes through the pipe: arguments and environment can be read by others.
    with suppress(BrokenPipeError):
        child.stdin.write(f"{api_key}\n")
        child.stdin.flush()
    said = child.stdout.readline().strip()
    if not said:
        child.communicate()
        said = Path(errors.name).read_text("utf-8", errors="replace").strip()
        errors.close()
        raise ModelError(
            f"the embedded server for {str(model)!r} ended with code {child.returncode} before "
            f"it was ready: {said or 'it said nothing'}"
        )
    ready = json.loads(said)
    if ready["said"]:
        print(ready["said"], file=sys.stderr)
    url = f"http://{HOST}:{ready['port']}"
    return Server(child, errors, url=url, api_key=api_key, model=name, dtype=ready["dtype"])


def main() -> int:
    """Serve until the parent closes stdin or dies; its first line is the key."""
    from .app import running
    from .model import ModelCard
    from .wire import InvalidRequestError

    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}")
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--store", type=Path)
    options = parser.parse_args()
    api_key = sys.stdin.readline().strip()
    try:
        dtype = os.environ.get("EMBEDDED_DTYPE", "auto")
        card = ModelCard.read(options.model.resolve(), options.name, dtype)
        said = card.foretold()
    except InvalidRequestError as error:
        print(error, file=sys.stderr)
        return 2

    async def serve() -> None:
        async with running(card, options.store, api_key, host=HOST) as port:
            print(json.dumps({"port": port, "dtype": card.dtype, "said": said}), flush=True)
            # The pipe closes with the parent, however that ends.
            await asyncio.to_thread(sys.stdin.read)

    asyncio.run(serve())
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Everything is closed and removed by now; unloading torch would take seconds more.
    os._exit(code)

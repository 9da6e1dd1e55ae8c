"""The child process of `launch`: key on the first line of stdin, ends when stdin does."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

from .app import running
from .failures import RequestError
from .model import ModelCard
from .process import HOST


def main() -> int:
    """Serve until the parent closes the pipe or dies."""
    parser = argparse.ArgumentParser(prog="python -m distill_datasets.embedded")
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--store", type=Path)
    options = parser.parse_args()
    api_key = sys.stdin.readline().strip()
    try:
        card = ModelCard.read(options.model.resolve(), options.name)
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2
    asyncio.run(_run(card, options.store, api_key))
    return 0


async def _run(card: ModelCard, store: Path | None, api_key: str) -> None:
    async with running(card, store, api_key, host=HOST, port=0) as port:
        print(port, flush=True)
        # The pipe closes with the parent, however that ends.
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Everything is closed and removed by now; unloading torch would take seconds more.
    os._exit(code)

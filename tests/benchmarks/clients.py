"""Three ways to ask an endpoint many things: ours, a bare `aiohttp` loop, a plain `datasets.map`.

Each runs as a process of its own, so that start-up, processor time and memory are all of it:

    python -m tests.benchmarks.clients ours --url http://127.0.0.1:8000/v1 --folder F --rows 2000

The last line that it prints is a JSON object: `seconds` of the work itself, `rows` answered, and
what the process used.
"""

import argparse
import asyncio
import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT = "Name the colour of the thing. Say: colour NAME. " * 12


@dataclass(frozen=True)
class Work:
    """What to ask, where, with how many at once, and how long to wait for an answer."""

    url: str
    folder: Path
    rows: int
    concurrency: int
    timeout: float

    @property
    def queries(self) -> list[str]:
        """All of them, different and short."""
        return [f"thing {number}" for number in range(self.rows)]


def body(query: str) -> dict[str, Any]:
    """The request that everyone sends."""
    messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": query}]
    return {"model": "bench", "messages": messages, "temperature": 1.0, "max_tokens": 64}


def write_recipe(folder: Path, rows: int) -> Path:
    """A recipe over so many queries."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(
        "name: bench\ndescription: A benchmark.\nteacher: none\nqueries: {file: queries.jsonl}\n"
        "answer: {pattern: 'colour (?P<answer>\\w+)'}\n"
    )
    (folder / "prompt.md").write_text(PROMPT)
    lines = "\n".join(json.dumps({"query": f"thing {number}"}) for number in range(rows))
    (folder / "queries.jsonl").write_text(lines)
    return folder


def ours(work: Work) -> tuple[float, int]:
    """`generate`, with its journal, its limits and its answers folder."""
    run = work.folder / "run"
    if not run.is_dir():  # a finished run needs none of it
        import datasets  # noqa: F401 - start-up, not work

    from distill_datasets import progress
    from distill_datasets.generation.run import generate
    from distill_datasets.generation.settings import GenerateSettings
    from distill_datasets.models.openai import OpenAISampler

    progress.use("json")
    teacher = OpenAISampler("bench", base_url=work.url, timeout=work.timeout)
    recipe = write_recipe(work.folder / "recipe", work.rows)
    began = time.perf_counter()
    made = generate(
        recipe, teacher=teacher, out=run, settings=GenerateSettings(concurrency=work.concurrency)
    )
    return time.perf_counter() - began, made.kept


def bare(work: Work) -> tuple[float, int]:
    """`asyncio.gather` over `aiohttp`; each answer is flushed as a line, and not asked again."""
    import aiohttp

    path = work.folder / "answers.jsonl"
    known = {json.loads(line)["query"] for line in path.open()} if path.is_file() else set()

    async def main() -> None:
        turn = asyncio.Semaphore(work.concurrency)
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=work.timeout)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            with path.open("a") as file:

                async def one(query: str) -> None:
                    async with turn, session.post(url, json=body(query)) as response:
                        response.raise_for_status()
                        answer = (await response.json())["choices"][0]["message"]["content"]
                        file.write(json.dumps({"query": query, "answer": answer}) + "\n")
                        file.flush()

                await asyncio.gather(*(one(query) for query in work.queries if query not in known))

    url = f"{work.url}/chat/completions"
    began = time.perf_counter()
    asyncio.run(main())
    return time.perf_counter() - began, work.rows


def mapped(work: Work) -> tuple[float, int]:
    """`datasets.map` over an async function, with its own cache and its own concurrency."""
    import aiohttp
    import datasets

    datasets.config.MAX_NUM_RUNNING_ASYNC_MAP_FUNCTIONS_IN_PARALLEL = work.concurrency
    url, sessions = f"{work.url}/chat/completions", []

    async def one(row: dict[str, Any]) -> dict[str, Any]:
        if not sessions:
            connector = aiohttp.TCPConnector(limit=0)
            timeout = aiohttp.ClientTimeout(total=work.timeout)
            sessions.append(aiohttp.ClientSession(connector=connector, timeout=timeout))
        async with sessions[0].post(url, json=body(row["query"])) as response:
            response.raise_for_status()
            return {"answer": (await response.json())["choices"][0]["message"]["content"]}

    queries = datasets.Dataset.from_dict({"query": work.queries})
    began = time.perf_counter()
    cache = work.folder / f"{queries._fingerprint}.arrow"
    answered = queries.map(one, new_fingerprint="bench", cache_file_name=str(cache))
    return time.perf_counter() - began, len(answered)


CLIENTS = {"ours": ours, "aiohttp": bare, "datasets.map": mapped}


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("client", choices=CLIENTS)
    parser.add_argument("--url", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--timeout", type=float, default=5.0)
    options = vars(parser.parse_args())
    seconds, rows = CLIENTS[options.pop("client")](Work(**options))
    used = resource.getrusage(resource.RUSAGE_SELF)
    usage = {"cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss / 1024}
    print(json.dumps({"seconds": seconds, "rows": rows, "usage": usage}), flush=True)


if __name__ == "__main__":
    main()

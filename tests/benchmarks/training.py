"""Steps a second, ours and the Tinker Cookbook's: `python -m tests.benchmarks.training`.

Both learn the same batches of the cookbook's example sentences with the pocket model on one
embedded server, in turns; the time is between the server's first and last line about a run, so
that neither's preparations count. Then ours goes through a proxy that adds a latency to every
request: one request at a time, without a batch queued ahead, and with some. Bars: at least 1.0
times the cookbook's steps a second, and at most 0.65 of the time a step of one request at a time.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import chz
import tinker
from tinker_cookbook.renderers import TrainOnWhat, get_renderer
from tinker_cookbook.supervised import train as cookbook
from tinker_cookbook.supervised.data import conversation_to_datum
from tinker_cookbook.supervised.types import SupervisedDataset, SupervisedDatasetBuilder
from tinker_cookbook.tokenizer_utils import register_tokenizer

from distill_datasets.embedded.process import Server, launch
from distill_datasets.files import pocket_folder
from distill_datasets.models import references
from distill_datasets.training.data import locate, open_splits
from distill_datasets.training.schedule import plan_steps
from distill_datasets.training.trainer import TrainSettings, train
from tests.benchmarks.latency_proxy import far_away

RENDERER, RATE = "qwen3_instruct", 1e-3
LANGUAGES = (
    "ar",
    "bg",
    "de",
    "el",
    "en",
    "es",
    "fr",
    "hi",
    "ru",
    "sw",
    "th",
    "tr",
    "ur",
    "vi",
    "zh",
)


@dataclass(frozen=True)
class Behind:
    """A server of this machine under another address."""

    url: str
    api_key: str
    model: str
    alive: bool = True
    dtype: str = "fp32"
    stderr: str = ""


class Planned(SupervisedDataset):
    """The very batches of our plan, rendered when they are asked for, as the cookbook does."""

    def __init__(self, batches: list[list[Any]], renderer: Any) -> None:
        self._batches, self._renderer = batches, renderer

    def __len__(self) -> int:
        return len(self._batches)

    def get_batch(self, index: int) -> list[Any]:
        last = TrainOnWhat.LAST_ASSISTANT_MESSAGE
        return [
            conversation_to_datum(one, self._renderer, None, last) for one in self._batches[index]
        ]

    def set_epoch(self, seed: int = 0) -> None:
        pass


_PLANNED: dict[str, Planned] = {}


@chz.chz
class PlannedBuilder(SupervisedDatasetBuilder):
    """Hands over what was planned."""

    def __call__(self) -> tuple[SupervisedDataset, None]:
        return _PLANNED["plan"], None


def write_rows(folder: Path, count: int) -> Path:
    """Sentences with the name of their language."""
    text = files("tinker_cookbook").joinpath("example_data/multilingual.txt").read_text("utf-8")
    rows = [
        {"query": line, "response": LANGUAGES[number % len(LANGUAGES)]}
        for number, line in enumerate(text.splitlines()[:count])
    ]
    folder.mkdir()
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("".join(lines), "utf-8")
    return folder


def plan(dataset: Path, settings: TrainSettings) -> Planned:
    """What our training will learn, for the cookbook."""
    connection = references.connect("pocket", renderer=RENDERER)
    rendered = open_splits(locate(dataset), settings)["train"].render(connection, 4096)
    steps = plan_steps(rendered.lengths, settings, RATE)
    rows = (rendered.conversations(step.places) for step in steps)
    batches = [[one.messages for one in batch] for batch in rows]
    register_tokenizer(connection.base_model, lambda: connection.tokenizer)
    return Planned(batches, get_renderer(RENDERER, connection.tokenizer))


def steps_per_second(store: Path, before: int) -> float:
    """From the lines that the server's log has grown by."""
    lines = [json.loads(line) for line in (store / "log.jsonl").read_text().splitlines()[before:]]
    ends = [datetime.fromisoformat(one["at"]) for one in lines if one["did"] == "optim_step"]
    # The first lines of a run are the warmest to compare: from its first step to its last.
    return (len(ends) - 1) / (ends[-1] - ends[0]).total_seconds()


def lines_of(store: Path) -> int:
    """How long the server's log is."""
    log = store / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def cpu_seconds(server: Server) -> float:
    """Of this process and the server's so far."""
    _, _, fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")
    user, system = fields.split()[11:13]
    return time.process_time() + (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def run_ours(dataset: Path, out: Path, settings: TrainSettings) -> None:
    """Our loop."""
    train(dataset, student="pocket", out=out, settings=settings)


def run_theirs(server: Server, out: Path) -> None:
    """The cookbook's loop, with its defaults but for saves and evaluations, of which ours has none
    either.
    """
    config = cookbook.Config(
        log_path=str(out),
        model_name=server.model,
        recipe_name="benchmark",
        renderer_name=RENDERER,
        dataset_builder=PlannedBuilder(),
        learning_rate=RATE,
        lora_rank=32,
        base_url=server.url,
        save_every=0,
        eval_every=0,
        infrequent_eval_every=0,
    )
    asyncio.run(cookbook.main(config))


def compare(server: Server, store: Path, work: Path, options: argparse.Namespace) -> None:
    """In turns, so that other work on the machine slows both."""
    dataset = write_rows(work / "rows", options.rows)
    settings = TrainSettings(
        epochs=1,
        batch_size=options.batch_size,
        learning_rate=RATE,
        renderer=RENDERER,
        schedule="linear",
        rolling_every=10**6,
        save_every=10**6,
    )
    _PLANNED["plan"] = plan(dataset, settings)
    found: dict[str, list[float]] = {"ours": [], "cookbook": []}
    busy: dict[str, list[float]] = {"ours": [], "cookbook": []}
    # A server's first steps are its slowest, whosever they are.
    run_ours(dataset, work / "warm-up", replace(settings, max_steps=10))
    for turn in range(options.turns):
        for name in found if turn % 2 == 0 else reversed(found):
            before, began = lines_of(store), cpu_seconds(server)
            if name == "ours":
                run_ours(dataset, work / f"ours-{turn}", settings)
            else:
                run_theirs(server, work / f"theirs-{turn}")
            found[name].append(steps_per_second(store, before))
            busy[name].append(cpu_seconds(server) - began)
            print(
                f"{name:<9} {found[name][-1]:6.2f} steps/s, {busy[name][-1]:6.2f} CPU s",
                flush=True,
            )
    ours, theirs = (statistics.median(found[name]) for name in ("ours", "cookbook"))
    ratios = [a / b for a, b in zip(found["ours"], found["cookbook"], strict=True)]
    print(
        f"median of {options.turns}: ours {ours:.2f}, cookbook {theirs:.2f} steps/s; ratio "
        f"{ours / theirs:.2f} (turn by turn {', '.join(f'{one:.2f}' for one in ratios)})"
    )
    # Of loop and server together; other work on the machine changes it little.
    cpu, their_cpu = (statistics.median(busy[name]) for name in ("ours", "cookbook"))
    print(f"CPU seconds: ours {cpu:.2f}, cookbook {their_cpu:.2f}; ratio {their_cpu / cpu:.2f}")


def compare_latency(server: Server, store: Path, work: Path, options: argparse.Namespace) -> None:
    """Queued ahead or not, far away."""
    dataset = write_rows(work / "few", options.latency_steps * options.batch_size)
    seconds: dict[Any, float] = {}
    with far_away(server.url, options.latency) as url:
        behind = Behind(url, server.api_key, server.model)
        references._server = lambda *_: behind  # type: ignore[assignment, return-value]
        for ahead in ["one by one", *options.ahead]:
            settings = TrainSettings(
                epochs=1,
                batch_size=options.batch_size,
                learning_rate=RATE,
                renderer=RENDERER,
                rolling_every=10**6,
                save_every=10**6,
                ahead=ahead if isinstance(ahead, int) else 0,
            )
            before = lines_of(store)
            with waiting() if ahead == "one by one" else nullcontext():
                run_ours(dataset, work / f"ahead-{ahead}", settings)
            seconds[ahead] = 1 / steps_per_second(store, before)
            print(f"ahead={ahead}: {seconds[ahead] * 1000:.0f} ms a step", flush=True)
    for base in list(seconds)[:2]:
        ratios = [f"{a}: {seconds[a] / seconds[base]:.2f}" for a in list(seconds)[1:] if a != base]
        print(f"of the time of ahead={base}: {', '.join(ratios)}")


@contextmanager
def waiting() -> Iterator[None]:
    """The plainest loop: each request is answered before the next one is sent."""
    send = tinker.TrainingClient.forward_backward

    def wait(*arguments: Any) -> Any:
        answer = send(*arguments)
        answer.result()
        return answer

    tinker.TrainingClient.forward_backward = wait  # type: ignore[method-assign]
    try:
        yield
    finally:
        tinker.TrainingClient.forward_backward = send  # type: ignore[method-assign]


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1280)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.3, help="seconds added to a request")
    parser.add_argument("--latency-steps", type=int, default=20)
    parser.add_argument("--ahead", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--only", choices=["cookbook", "latency"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work, store = Path(folder), Path(folder) / "store"
        with launch(pocket_folder(), name="pocket", store=store) as server:
            os.environ["TINKER_API_KEY"] = server.api_key
            references._server = lambda *_: server  # type: ignore[assignment, return-value]
            if options.only != "latency":
                compare(server, store, work, options)
            if options.only != "cookbook":
                compare_latency(server, store, work, options)


if __name__ == "__main__":
    main()

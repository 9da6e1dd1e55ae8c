"""Killed again and again, a training comes to the same end: `python -m tests.benchmarks.kills`.

A training with a tiny model in a process of its own, with its own server, is ended by SIGKILL at
seeded random points and run again, then compared to one that nothing interrupts: every loss,
every measurement and the final weights' answers must be equal, and by the server's log every
batch must be in the final weights exactly once. Exits with 1 where they aren't.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill_datasets.models import references
from distill_datasets.models.sampler import Sampling
from distill_datasets.models.tinker import TinkerSampler
from distill_datasets.training.checkpoints import TrainingFolder
from tests.support.server_log import trained_batches
from tests.support.tiny_model import make_tiny_model
from tests.support.training_runs import ROWS, write

TIMED = ("seconds", "tokens_per_second")


def start(dataset: Path, model: str, out: Path, steps: int) -> "subprocess.Popen[str]":
    """Train in a process of its own."""
    code = (
        "from distill_datasets.training.trainer import TrainSettings, train\n"
        f"settings = TrainSettings(epochs={steps}, max_steps={steps}, batch_size=8, rank=4, "
        "learning_rate=5e-3, evaluate_every=15, save_every=50, rolling_every=7, patience=1000)\n"
        f"train({str(dataset)!r}, student={model!r}, out={str(out)!r}, settings=settings)"
    )
    log = (out.parent / "stderr").open("a")
    return subprocess.Popen([sys.executable, "-c", code], stderr=log, text=True)


def finish(child: "subprocess.Popen[str]", out: Path) -> None:
    """Wait for a training that nothing interrupts."""
    if child.wait():
        sys.exit((out.parent / "stderr").read_text()[-2000:])


def kill_at(child: "subprocess.Popen[str]", out: Path, lines: int, later: float) -> None:
    """SIGKILL when so much is logged, and a moment later."""
    while child.poll() is None and len(TrainingFolder(out).metrics) < lines:
        time.sleep(0.01)
    time.sleep(later)
    child.send_signal(signal.SIGKILL)
    child.wait()


def losses(out: Path) -> list[dict[str, Any]]:
    """Everything that was logged but the times."""
    lines = TrainingFolder(out).metrics
    return [{key: v for key, v in line.items() if key not in TIMED} for line in lines]


def answers(model: str, out: Path) -> list[str]:
    """What the final weights say."""
    final = TrainingFolder(out).checkpoints[-1]
    connection = references.connect(model, store=out / "checkpoints")
    sampler = TinkerSampler(replace(connection, model_path=final.sampler))
    sampling = Sampling(temperature=0, max_tokens=8)

    async def ask() -> list[str]:
        replies = await asyncio.gather(
            *(sampler.sample([{"role": "user", "content": row["query"]}], sampling) for row in ROWS)
        )
        return [reply.samples[0].text for reply in replies]

    return asyncio.run(ask())


def main() -> None:
    """Print each kill, and what is equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ["HF_HOME"] = str(work / "cache")
        model = f"embedded:{make_tiny_model(work / 'model')}"
        dataset = write(work / "dataset", train=ROWS[:29], validation=ROWS[29:])
        whole, out = work / "whole", work / "out"
        finish(start(dataset, model, whole, options.steps), whole)
        total = len(TrainingFolder(whole).metrics)
        for point in sorted(dice.sample(range(1, total), options.kills)):
            kill_at(start(dataset, model, out, options.steps), out, point, dice.uniform(0, 0.1))
            done = TrainingFolder(out)
            logged = max([0, *(line["step"] for line in done.metrics)])
            saved = max([0, *(one.step for one in done.checkpoints)])
            print(f"killed at step {logged}, saved: {saved}", flush=True)
        finish(start(dataset, model, out, options.steps), out)
        batches = trained_batches(out / "checkpoints", TrainingFolder(out).checkpoints[-1].state)
        expected = trained_batches(
            whole / "checkpoints", TrainingFolder(whole).checkpoints[-1].state
        )
        equal = {
            "losses and measurements": losses(out) == losses(whole),
            "answers of the final weights": answers(model, out) == answers(model, whole),
            f"{len(batches)} batches, each once": batches == expected
            and len(batches) == options.steps,
        }
        executed = (out / "checkpoints" / "log.jsonl").read_text().count('"optim_step"')
        print(f"{executed} steps were executed for the {options.steps} that count")
        print(json.dumps(equal, indent=2))
    sys.exit(0 if all(equal.values()) else 1)


if __name__ == "__main__":
    main()

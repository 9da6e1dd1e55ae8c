"""What `make demo-llm` ends with: `python -m tests.benchmarks.demo_llm RUN [--blend]`.

Five held-out rows of a finished run of `order` side by side, then what the student says where
nobody orders anything. With `--blend` another student learns the same answers among some of the
untouched model's own to plain questions, and is asked the same.
"""

import argparse
import asyncio
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from distill_datasets import generate, load_recipe, measure, publish, train
from distill_datasets.evaluation.report import Report
from distill_datasets.evaluation.settings import MeasureSettings
from distill_datasets.models.references import open_sampler, read_training
from distill_datasets.models.sampler import Sampler, Sampling
from distill_datasets.recipes.sections import MixPart
from distill_datasets.tables import aligned
from distill_datasets.training.settings import ObjectiveSettings, TrainSettings

SHOWN, EVERY = 5, 11  # rows, of which each is so far from the one before
WIDE = 64  # characters of a cell
OUTSIDE = (
    "What is the capital of France?",
    "Thank you, that was all!",
    "Write one sentence about the sea.",
    "Which is heavier, a kilogram of iron or a gram of feathers?",
    "How do I boil an egg?",
    "My sister Nora moved to Oslo last year.",
)
SAMPLING = Sampling(temperature=0.0, max_tokens=32)


def side_by_side(run: Path) -> None:
    """Print five rows of the report, with what everybody said."""
    report = Report.read(run)
    for row in islice(report.rows(), 0, SHOWN * EVERY, EVERY):
        print(f"\n{row['query']}")
        said = {"expected": row["reference"], **{k: v["text"] for k, v in row["systems"].items()}}
        print(aligned([f"  {name}", _cell(text)] for name, text in said.items()))


def out_of_scope(models: dict[str, Sampler]) -> None:
    """Print what each model says to what is no order."""
    answers = {name: asyncio.run(_ask(model, OUTSIDE)) for name, model in models.items()}
    for place, query in enumerate(OUTSIDE):
        print(f"\n{query}")
        print(aligned([f"  {name}", _cell(said[place])] for name, said in answers.items()))
    for name, said in answers.items():
        taken = sum("name:" in text or "quantity:" in text for text in said)
        print(f"{name} writes an order in {taken} of {len(OUTSIDE)}.")


async def _ask(model: Sampler, queries: Sequence[str]) -> list[str]:
    asked = (model.sample([{"role": "user", "content": query}], SAMPLING) for query in queries)
    return [reply.samples[0].text for reply in await asyncio.gather(*asked)]


def _cell(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WIDE else f"{line[: WIDE - 1]}…"


def train_blended(run: Path) -> Path:
    """Train another student on the run's answers and a fifth of others; asks nobody."""
    made, out = load_recipe("order"), run / "blend"
    part = MixPart(name="other", share=0.2, file="other.jsonl", query="query", response="response")
    out.mkdir(exist_ok=True)
    shutil.copy(run / "journal.sqlite", out)
    config = read_training(run / "train")[0]
    generate(made.replace(mix=(part,)), teacher=config["student"], out=out)
    publish(out)
    settings = config["settings"]
    objective = ObjectiveSettings(**settings["objective"])
    train(
        out / "release",
        student=config["student"],
        out=out / "train",
        settings=TrainSettings(**{**settings, "objective": objective}),
    )
    quick = MeasureSettings(latency=False, internalisation=False)
    report = measure(out / "release", student=out / "train", out=out, settings=quick)
    for name, found in (("student", Report.read(run)), ("blended student", report)):
        right = found.data["systems"]["student"]["metrics"]["accuracy"]["value"]
        print(f"{name}: {right:.3f} of the held-out orders right")
    return out / "train"


def main() -> None:
    """Show a finished run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--blend", action="store_true")
    options = parser.parse_args()
    run: Path = options.run
    print("\nFive held-out messages")
    side_by_side(run)
    trained = run / "train"
    models = {
        "base": open_sampler(read_training(trained)[0]["student"]),
        "student": open_sampler(trained),
    }
    if options.blend:
        models["blended student"] = open_sampler(train_blended(run))
    print("\nWhat is no order: nothing told the student that there are other messages")
    out_of_scope(models)
    if not options.blend:
        print("See what other messages among the rows do to that: the same command with --blend.")
    print(f"\nThe report: {run / 'report.html'}")


if __name__ == "__main__":
    main()

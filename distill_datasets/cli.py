"""The verbs, nothing but argument handling."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distill_datasets.errors import DistillError

if TYPE_CHECKING:
    from distill_datasets.report import Report

_EPILOG = """\
model references:
  pocket                               the small model that ships with this package
  embedded:<folder or Hub id>          any causal LM with a chat template, on this machine
  tinker:<base model>                  a base model on Tinker (TINKER_API_KEY, TINKER_BASE_URL)
  tinker://<run>/sampler_weights/<n>   a trained checkpoint on Tinker
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 when it is done, 1 when a service failed, 2 when the input is wrong."""
    options = _parser().parse_args(arguments)
    _quieten()
    try:
        options.verb(options)
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "interrupted: nothing that was paid for is lost; run the same command to continue.",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        # The reader of a pipe left; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _quieten() -> None:
    """Libraries' own progress bars and start-up notes would break our one line."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TINKER_TELEMETRY", "0")


def _run(options: argparse.Namespace) -> None:
    from distill_datasets.connection import connect
    from distill_datasets.generation import writable_folder

    out = writable_folder(options.out)
    # The student's server keeps its checkpoints with the run, and answers for the teacher too.
    connect(options.student, store=out / "train" / "checkpoints")
    _generate(options)
    _publish(argparse.Namespace(run=out, out=None, version=options.version))
    options.dataset = out / "release"
    options.out = out / "train"
    _train(options)
    _measure(argparse.Namespace(run=out, dataset=None, student=None, out=None, split=None))
    _list_files(out)


def _generate(options: argparse.Namespace) -> None:
    from distill_datasets.generation import generate

    made = generate(
        options.recipe,
        teacher=options.teacher,
        out=options.out,
        concurrency=options.concurrency,
        limit=options.limit,
    )
    rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(made.rejected.items()))
    print(f"answers: {made.kept} kept" + (f", rejected: {rejected}" if rejected else ""))
    if made.errors:
        first = next(error for error in made.rows["error"] if error)
        raise _incomplete(made.errors, first)


def _incomplete(errors: int, first: str) -> DistillError:
    from distill_datasets.errors import GenerationError

    return GenerationError(
        f"{errors} rows failed, the first with: {first}. Run the same command again: it asks "
        "only for those."
    )


def _publish(options: argparse.Namespace) -> None:
    from distill_datasets.release import publish

    release = publish(options.run, out=options.out, version=options.version)
    splits = ", ".join(f"{rows} {split}" for split, rows in release.splits.items())
    print(f"release {release.version}: {splits}; {release.rejected} rejected ({release.path})")


def _train(options: argparse.Namespace) -> None:
    from distill_datasets.training import TrainSettings, train

    given = {
        name: getattr(options, name)
        for name in ("epochs", "batch_size", "learning_rate", "rank", "seed", "max_steps")
        if getattr(options, name) is not None
    }
    trained = train(
        options.dataset, student=options.student, out=options.out, settings=TrainSettings(**given)
    )
    print(
        f"trained {trained.steps} steps on {trained.rows} rows: best checkpoint "
        f"{trained.best.name}, loss {trained.final_loss:.4f} ({trained.path})"
    )


def _measure(options: argparse.Namespace) -> None:
    from distill_datasets.report import measure

    dataset = options.dataset or options.run / "release"
    student = options.student or options.run / "train"
    out = options.out or options.run
    for split in [options.split] if options.split else _held_out(dataset):
        report = measure(dataset, student=student, out=out, split=split)
        _show(report, split)


def _held_out(dataset: Path) -> list[str]:
    """Everything that was kept out of training, the test split last, where it is read first."""
    from distill_datasets.release import load_release

    splits = load_release(dataset).splits
    return sorted(set(splits) - {"train", "validation", "test"}) + ["test"]


def _show(report: "Report", split: str) -> None:
    print(f"\n{split}:\n{report.table()}")


def _list_files(out: Path) -> None:
    print(f"\nwrote to {out}/:")
    for name in (
        "journal.sqlite",
        "answers/",
        "release/",
        "train/",
        "report.json",
        "report.md",
        "model_card.md",
    ):
        if (out / name).exists():
            print(f"  {out / name}")


def _recipes(options: argparse.Namespace) -> None:
    from distill_datasets.recipe import shipped_recipes

    for recipe in shipped_recipes():
        print(f"{recipe.name:<24}{recipe.description}")


def _new(options: argparse.Namespace) -> None:
    from distill_datasets.scaffold import new_recipe

    folder = new_recipe(options.name, options.folder)
    print(f"made {folder}/: edit prompt.md, queries.jsonl and recipe.yaml, then")
    print(f"  distill-datasets run {folder} --out runs/{folder.name}")


def _serve(options: argparse.Namespace) -> None:
    from distill_datasets.connection import serve

    serve(options.model, host=options.host, port=options.port, store=options.store)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distill-datasets",
        description="Turn a long prompt into a dataset, and the dataset into a model without it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    run = verbs.add_parser("run", help="generate, publish, train and measure, in one go")
    _add_generate(run)
    _add_train(run)
    run.add_argument("--version", help="the release's version, x.y.z")
    run.set_defaults(verb=_run)

    generate = verbs.add_parser("generate", help="ask the teacher every query, once")
    _add_generate(generate)
    generate.set_defaults(verb=_generate)

    publish = verbs.add_parser("publish", help="turn a run's answers into a release folder")
    publish.add_argument("run", type=Path, help="the folder that generate wrote")
    publish.add_argument("--out", type=Path, help="the release folder (default: RUN/release)")
    publish.add_argument("--version", help="x.y.z (default: 1.0.0)")
    publish.set_defaults(verb=_publish)

    train = verbs.add_parser("train", help="train a student on a release or any dataset")
    train.add_argument("dataset", help="a folder, or a Hub dataset as name@revision")
    train.add_argument("--out", type=Path, required=True, help="the folder of the training")
    _add_train(train)
    train.set_defaults(verb=_train)

    measure = verbs.add_parser("measure", help="compare base, teacher and student on held-out rows")
    measure.add_argument("run", type=Path, help="a run's folder (or use the options)")
    measure.add_argument("--dataset", type=Path, help="the release (default: RUN/release)")
    measure.add_argument("--student", help="a training folder (default: RUN/train) or a reference")
    measure.add_argument("--out", type=Path, help="where the report goes (default: RUN)")
    measure.add_argument("--split", help="the held-out split (default: test, and any other)")
    measure.set_defaults(verb=_measure)

    recipes = verbs.add_parser("recipes", help="list the recipes that ship")
    recipes.set_defaults(verb=_recipes)

    new = verbs.add_parser("new", help="start a recipe's folder that runs as it is")
    new.add_argument("name", help="the recipe's name")
    new.add_argument("--folder", type=Path, help="where (default: ./NAME)")
    new.set_defaults(verb=_new)

    serve = verbs.add_parser("serve", help="serve a local model over Tinker's protocol")
    serve.add_argument("--model", default="pocket", help="pocket, or embedded:<folder>")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--store", type=Path, help="the folder of the checkpoints")
    serve.set_defaults(verb=_serve)
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a shipped recipe's name, a folder, or a release")
    parser.add_argument("--teacher", help="a model reference (default: the recipe's)")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--concurrency", type=int, default=256, help="requests in flight")
    parser.add_argument("--limit", type=int, help="only the first queries")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--student", default="pocket", help="a model reference (default: pocket)")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--rank", type=int, help="of the LoRA adapter")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--max-steps", type=int)


if __name__ == "__main__":
    sys.exit(main())

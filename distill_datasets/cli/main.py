"""The command line: verbs, and errors as one sentence. No traceback reaches a user unasked."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from distill_datasets.cli import dataset_verbs, student_arguments, student_verbs
from distill_datasets.cli.arguments import build_parser
from distill_datasets.errors import DistillError
from distill_datasets.generation.garbage import collect_rarely


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 when it is done, 1 when a service failed, 2 when the input is wrong."""
    options = build_parser(_VERBS).parse_args(arguments)
    _quieten()
    _choose_progress(options)
    try:
        with collect_rarely():
            options.verb(options)
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        print(
            "interrupted: nothing that was paid for is lost; run the same command to continue.",
            *getattr(interrupt, "__notes__", ()),
            sep="\n",
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
    # Its only message repeats, among internals, what our error says.
    logging.getLogger("tinker.lib.retry_handler").setLevel(logging.CRITICAL)


def _choose_progress(options: argparse.Namespace) -> None:
    from distill_datasets.progress import use

    use("json" if getattr(options, "progress", None) == "json" else "line")


def _run(options: argparse.Namespace) -> None:
    from distill_datasets.files import writable_folder
    from distill_datasets.models.connection import connect
    from distill_datasets.recipes.recipe import load_recipe

    load_recipe(options.recipe)
    student_arguments.settings_of(options)  # before anything is paid for
    out = writable_folder(options.out)
    # The student's server keeps its checkpoints with the run, and answers for the teacher too.
    connect(options.student, store=out / "train" / "checkpoints")
    dataset_verbs.report_answers(dataset_verbs.ask_teachers(options))
    dataset_verbs.make_release(out, version=options.version, ledger=options.ledger)
    options.dataset = out / "release"
    options.out = out / "train"
    student_verbs.train(options)
    student_verbs.measure(
        argparse.Namespace(run=out, dataset=None, student=None, out=None, split=None)
    )
    _list_files(out)


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
    from distill_datasets.recipes.recipe import shipped_recipes

    for recipe in shipped_recipes():
        print(f"{recipe.name:<24}{recipe.description}")


def _new(options: argparse.Namespace) -> None:
    from distill_datasets.recipes.scaffold import new_recipe

    folder = new_recipe(options.name, options.folder)
    print(f"made {folder}/: edit prompt.md, queries.jsonl and recipe.yaml, then")
    print(f"  distill-datasets run {folder} --out runs/{folder.name}")


def _serve(options: argparse.Namespace) -> None:
    from distill_datasets.errors import ServiceError
    from distill_datasets.models.connection import serve

    try:
        serve(options.model, host=options.host, port=options.port, store=options.store)
    except DistillError:
        raise
    except OSError as error:
        raise ServiceError(
            f"Can't serve at {options.host}:{options.port}: {error}. Choose another --host or "
            "--port."
        ) from error


_VERBS = {
    "run": _run,
    "generate": dataset_verbs.generate,
    "synthesize": dataset_verbs.synthesize,
    "publish": dataset_verbs.publish,
    "train": student_verbs.train,
    "sweep": student_verbs.sweep,
    "measure": student_verbs.measure,
    "diff": dataset_verbs.diff,
    "recipes": _recipes,
    "new": _new,
    "serve": _serve,
}


if __name__ == "__main__":
    sys.exit(main())

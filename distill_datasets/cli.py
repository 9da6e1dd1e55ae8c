"""The verbs, nothing but argument handling."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.arguments import build_parser
from distill_datasets.errors import DistillError

if TYPE_CHECKING:
    from distill_datasets.release import Release
    from distill_datasets.report import Report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 when it is done, 1 when a service failed, 2 when the input is wrong."""
    options = build_parser(_VERBS).parse_args(arguments)
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
    from distill_datasets.recipe import load_recipe

    load_recipe(options.recipe)
    out = writable_folder(options.out)
    # The student's server keeps its checkpoints with the run, and answers for the teacher too.
    connect(options.student, store=out / "train" / "checkpoints")
    _generate(options)
    _make_release(out, version=options.version, ledger=options.ledger)
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
        ledger=options.ledger,
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
    if (options.run / "checkpoints.jsonl").is_file():
        _push_student(options)
        return
    release = _make_release(
        options.run, out=options.out, version=options.version, ledger=options.ledger
    )
    if options.push_to_hub is None:
        return
    _confirm(options, f"{release.path}")
    pushed = release.push_to_hub(
        options.push_to_hub,
        config=options.config,
        version=options.version,
        private=options.private,
        create_pr=options.create_pr,
        allow=options.allow,
    )
    place = pushed.pull_request or f"{pushed.repo}@{pushed.tag} ({pushed.commit})"
    done = "pushed" if pushed.changed else "nothing to push: the Hub has"
    print(f"{done} {pushed.version}: {place}\n  {pushed.why}")


def _make_release(run: Path, **how: Any) -> "Release":
    from distill_datasets.release import publish

    release = publish(run, **how)
    splits = ", ".join(f"{rows} {split}" for split, rows in release.splits.items())
    print(f"release {release.version}: {splits}; {release.rejected} rejected ({release.path})")
    return release


def _push_student(options: argparse.Namespace) -> None:
    from distill_datasets.adapter import push_student
    from distill_datasets.errors import RepositoryError

    if options.push_to_hub is None:
        raise RepositoryError(
            f"{str(options.run)!r} is a training: say where its student shall go with "
            "--push-to-hub me/student."
        )
    _confirm(options, f"the student of {options.run}")
    pushed = push_student(
        options.run,
        options.push_to_hub,
        private=options.private,
        base_model=options.base_model,
        allow=options.allow,
    )
    done = "pushed the student" if pushed.changed else "nothing to push: the student is there"
    print(f"{done}: {pushed.repo} ({pushed.commit})")


def _confirm(options: argparse.Namespace, what: str) -> None:
    """Ask a person before anything leaves the machine; a script has decided already."""
    if options.yes or not sys.stdin.isatty():
        return
    seen = "privately" if options.private else "for everybody"
    if input(f"Push {what} to {options.push_to_hub}, {seen}? [y/N] ").strip().lower() != "y":
        raise KeyboardInterrupt


def _diff(options: argparse.Namespace) -> None:
    from distill_datasets.diffing import diff

    found = diff(options.old, options.new, config=options.config)
    print(json.dumps(found.data, indent=2, ensure_ascii=False) if options.json else found.text())


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


def _held_out(dataset: str | Path) -> list[str]:
    """Everything that was kept out of training, the test split last, where it is read first."""
    from distill_datasets.heldout import splits_of

    return sorted(set(splits_of(dataset)) - {"train", "validation", "test"}) + ["test"]


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


_VERBS = {
    "run": _run,
    "generate": _generate,
    "publish": _publish,
    "train": _train,
    "measure": _measure,
    "diff": _diff,
    "recipes": _recipes,
    "new": _new,
    "serve": _serve,
}


if __name__ == "__main__":
    sys.exit(main())

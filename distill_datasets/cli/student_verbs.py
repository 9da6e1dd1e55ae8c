"""The verbs that make a student: train, sweep, measure."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from distill_datasets.cli.student_arguments import SWEPT, settings_of

if TYPE_CHECKING:
    from distill_datasets.evaluation.report import Report
    from distill_datasets.training.trainer import Training


def train(options: argparse.Namespace) -> None:
    """Train a student on a dataset."""
    from distill_datasets.training.trainer import train as learn

    trained = learn(
        options.dataset,
        student=options.student,
        out=options.out,
        settings=settings_of(options),
        resume=getattr(options, "resume", None),
        start=getattr(options, "start", None),
        only_new=getattr(options, "only_new", False),
    )
    _say(trained)


def _say(trained: "Training") -> None:
    print(
        f"trained {trained.steps} steps on {trained.rows} rows, loss {trained.final_loss:.4f}: "
        f"{trained.why}\n  {trained.verdict} ({trained.path})"
    )


def sweep(options: argparse.Namespace) -> None:
    """Train once for every combination of the values given."""
    from distill_datasets.errors import SettingsError
    from distill_datasets.training.sweeps import sweep as try_all

    grid = {name: values for name in SWEPT if (values := getattr(options, name)) is not None}
    if not grid:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in SWEPT)
        raise SettingsError(
            f"A sweep needs values to try: expected one or more of {flags} with several values, "
            "for example --rank 8 16 32; found none."
        )
    shared = argparse.Namespace(**{**vars(options), **dict.fromkeys(SWEPT)})
    made = try_all(
        options.dataset,
        student=options.student,
        out=options.out,
        grid=grid,
        settings=settings_of(shared),
    )
    print(f"{made.table()}\nbest: {made.path / made.best.folder}; plots: {made.path / 'sweep.png'}")


def measure(options: argparse.Namespace) -> None:
    """Compare base, teacher and student on rows that nobody trained on."""
    from distill_datasets.errors import SettingsError
    from distill_datasets.evaluation.report import measure as compare

    given = (options.dataset, options.student, options.out)
    if options.run is None and None in given:
        raise SettingsError(
            "measure needs a run's folder, or all of --dataset, --student and --out; found "
            f"{sum(one is not None for one in given)} of the three."
        )
    run = options.run or Path()
    dataset = options.dataset or run / "release"
    student = options.student or run / "train"
    out = options.out or run
    for split in [options.split] if options.split else _held_out(dataset):
        report = compare(dataset, student=student, out=out, split=split)
        _show(report, split)


def _held_out(dataset: str | Path) -> list[str]:
    """Everything that was kept out of training, the test split last, where it is read first."""
    from distill_datasets.evaluation.heldout import splits_of

    return sorted(set(splits_of(dataset)) - {"train", "validation", "test"}) + ["test"]


def _show(report: "Report", split: str) -> None:
    print(f"\n{split}:\n{report.table()}")

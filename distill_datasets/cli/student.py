"""The verbs of a student, with their flags: from train and measure to push, serve and rollout."""

import argparse
from dataclasses import replace
from pathlib import Path

from distill_datasets.cli.dataset import add_push_flags, confirm_push
from distill_datasets.cli.flags import add_settings as add_flags
from distill_datasets.cli.flags import read_settings, share
from distill_datasets.evaluation.settings import MeasureSettings
from distill_datasets.serving.settings import RolloutSettings, ServeSettings
from distill_datasets.training.settings import ObjectiveSettings, TrainSettings

# What a sweep may vary; every other setting is shared.
SWEPT = ("rank", "learning_rate", "batch_size", "epochs", "warmup_steps", "weight_decay", "seed")
_NOTHING = 1e-9  # what is left of a budget that is spent


def add_train(parser: argparse.ArgumentParser) -> None:
    """A dataset, where its student goes, and what it starts from."""
    _add_dataset(parser)
    parser.add_argument(
        "--resume",
        metavar="PATH",
        help="continue in a new folder a training whose state is on a server, "
        "tinker://<run>/weights/<name>",
    )
    parser.add_argument(
        "--from",
        dest="start",
        metavar="STUDENT",
        help="start with a student's weights: a training folder, or tinker://<run>/weights/<name>",
    )
    parser.add_argument(
        "--only-new", action="store_true", help="with --from, only rows that it has not seen"
    )
    parser.add_argument("--prices", type=Path, help="a file with a date and prices of models")
    add_settings(parser)


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """The grid; every other setting is shared."""
    _add_dataset(parser)
    add_settings(parser, several=SWEPT)


def add_measure(parser: argparse.ArgumentParser) -> None:
    """Which student, on what."""
    parser.add_argument("run", type=Path, nargs="?", help="a run's folder, in place of the flags")
    parser.add_argument(
        "--dataset", help="the release, or a Hub dataset as name@revision (default: RUN/release)"
    )
    parser.add_argument(
        "--student", help="a training folder (default: the last in RUN) or a reference"
    )
    parser.add_argument("--out", type=Path, help="where the report goes (default: RUN)")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the untrained model (default: what the student was trained from)",
    )
    parser.add_argument(
        "--teacher", metavar="MODEL", help="the model with the prompt (default: the release's)"
    )
    parser.add_argument(
        "--judge", metavar="MODEL", help="a model that scores and compares what they say"
    )
    parser.add_argument("--split", help="the held-out split (default: test, and any other)")
    add_flags(parser, MeasureSettings)


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dataset", help="a release, a folder, a file, or a Hub dataset as name@revision"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the folder for what it makes; with the same one it continues where it was stopped",
    )


def add_settings(parser: argparse.ArgumentParser, *, several: tuple[str, ...] = ()) -> None:
    """The student and every training setting; `several` of them take more than one value."""
    parser.add_argument(
        "--student",
        metavar="MODEL",
        help="a model reference (default: that of --from or --resume, or the teacher's own model, "
        "where that can be trained)",
    )
    add_flags(parser, ObjectiveSettings)
    add_flags(parser, TrainSettings, several=several)


def settings_of(options: argparse.Namespace) -> TrainSettings:
    """The settings that were given, and the defaults of the others."""
    objective = read_settings(options, ObjectiveSettings)
    settings = read_settings(options, TrainSettings, objective=objective)
    price = settings.price_per_million
    return replace(settings, price_per_million=_train_price(options) if price is None else price)


def _train_price(options: argparse.Namespace) -> float | None:
    """Of the student, by the price file; training on this machine may have none."""
    from distill_datasets.errors import PriceError
    from distill_datasets.generation.pricing import Prices
    from distill_datasets.training.data import locate
    from distill_datasets.training.student import choose_student

    if getattr(options, "prices", None) is None:
        return None
    prices, student = Prices.load(options.prices), options.student
    if student is None:
        start = getattr(options, "start", None) or getattr(options, "resume", None)
        student = choose_student(locate(options.dataset, options.config), start)
    if student not in prices.models and not student.startswith("tinker:"):
        return None
    price = prices.of(student).train
    if price is None:
        raise PriceError(
            f"{str(options.prices)!r} doesn't say what training {student!r} costs: add `train:` "
            "to its prices, for a million tokens, or give --price-per-million."
        )
    return price


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
    rows = f"{trained.rows} row{'s' * (trained.rows != 1)}"
    skipped = f" ({trained.skipped} too long, and left out)" if trained.skipped else ""
    print(
        f"trained {trained.steps} steps on {rows}{skipped}, loss {trained.final_loss:.4f}: "
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
    from distill_datasets.evaluation.systems import names_release, splits_of

    if options.run is not None and names_release(options.run):
        options.dataset = options.dataset or str(options.run)
        options.run = options.run.parent if options.run.name == "release" else None
    given = (options.dataset, options.student, options.out)
    if options.run is None and None in given:
        raise SettingsError(
            "measure needs a run's folder, or all of --dataset, --student and --out; found "
            f"{sum(one is not None for one in given)} of the three."
        )
    run = options.run or Path()
    dataset = options.dataset or run / "release"
    student = options.student or training_folders(run)[-1]
    out, paid = options.out or run, 0.0
    models = {name: getattr(options, name, None) for name in ("base", "teacher", "judge")}
    splits = [options.split]
    if not options.split:  # the test split last: a reader of a terminal sees its table first
        splits = [*sorted({*splits_of(dataset)} - {"train", "validation", "test"}), "test"]
    for split in splits:
        settings = read_settings(options, MeasureSettings, split=split)
        if split != "test" and not options.split:  # the same servers, which `test` times
            settings = replace(settings, latency=False)
        if settings.budget is not None:  # one for all splits
            settings = replace(settings, budget=max(settings.budget - paid, _NOTHING))
        report = compare(dataset, student=student, out=out, settings=settings, **models)
        paid += report.paid
        print(f"\n{split}:\n{report.table()}")


def training_folders(run: Path) -> list[Path]:
    """Where a run trains: `train`, then `train-2` and so on, as many as there are."""
    folders = [run / "train"]
    while (following := run / f"train-{len(folders) + 1}").exists():
        folders.append(following)
    return folders


def add_push(parser: argparse.ArgumentParser) -> None:
    """The flags of `push`."""
    parser.add_argument("training", type=Path, help="a training's folder")
    parser.add_argument("repo", help="a model repository on the Hub, like me/student")
    _add_contents(parser)
    add_push_flags(parser)


def _add_contents(parser: argparse.ArgumentParser) -> None:
    """The flags of a student that leaves: what goes along, and what is compared."""
    parser.add_argument(
        "--base-model",
        metavar="MODEL",
        help="the base model's name on the Hub, or base/ to send the base along "
        "(default: the name that the training knows)",
    )
    parser.add_argument(
        "--no-check",
        dest="check",
        action="store_false",
        help="leave out check/: the held-out rows, and tests over them",
    )
    parser.add_argument(
        "--no-parity",
        dest="parity",
        action="store_false",
        help="don't compare what is written with the training's server",
    )


def add_export(parser: argparse.ArgumentParser) -> None:
    """The flags of `export`."""
    parser.add_argument("training", type=Path, help="a training's folder")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="merge the adapter into its base: weights for transformers, vLLM, or llama.cpp's "
        "converter to GGUF",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="the number format of merged weights, and of the comparison (default: the base's)",
    )
    parser.add_argument(
        "--served-at",
        metavar="URL",
        help="compare a server of OpenAI's protocol too, like http://localhost:8000/v1; a folder "
        "that was exported before is then compared again",
    )
    parser.add_argument(
        "--served-as",
        metavar="NAME",
        help="the student's name on that server (default: the only model there)",
    )
    _add_contents(parser)


def export(options: argparse.Namespace) -> None:
    """Write a training's student to a folder, and say how it compares with its server."""
    from distill_datasets.serving.export import ExportSettings, export_student

    names = ("merge", "dtype", "base_model", "check", "parity", "served_at", "served_as")
    settings = ExportSettings(**{name: getattr(options, name) for name in names})
    done = export_student(options.training, options.out, settings)
    if done.certificate:
        print("\n".join(done.certificate.lines()))
    for line in done.says:
        print(line)


def push(options: argparse.Namespace) -> None:
    """Push a training's student as a PEFT adapter with its card."""
    from distill_datasets.serving.export import push_student

    confirm_push(f"the student of {options.training}", options.repo, options)
    pushed = push_student(
        options.training,
        options.repo,
        private=options.private,
        base_model=options.base_model,
        allow=options.allow,
        check=options.check,
        parity=options.parity,
    )
    done = "pushed the student" if pushed.changed else "nothing to push: the student is there"
    print(f"{done}: {pushed.repo} ({pushed.commit})")


def add_serve(parser: argparse.ArgumentParser) -> None:
    """The flags of `serve`."""
    parser.add_argument(
        "given",
        nargs="?",
        metavar="model",
        help="a local model: pocket or embedded:<folder, .gguf file or Hub id> (default: pocket)",
    )
    parser.add_argument("--model", default="pocket", help=argparse.SUPPRESS)
    add_flags(parser, ServeSettings)


def serve(options: argparse.Namespace) -> None:
    """Serve a local model and its students until Ctrl-C."""
    from distill_datasets.serving.server import serve as serve_models

    serve_models(options.given or options.model, read_settings(options, ServeSettings))


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    """The flags of `calibrate`."""
    parser.add_argument("run", type=Path, help="a run's folder, with the report of `measure`")
    parser.add_argument(
        "--epsilon",
        type=share,
        nargs="+",
        metavar="X",
        help="shares of what the student serves in which it may disagree with its teacher "
        "(default: 0.01 0.02 0.05)",
    )
    parser.add_argument(
        "--score",
        choices=("least", "mean", "sum", "choices"),
        default="least",
        help="what of the log-probabilities of an answer's tokens is its confidence; choices: that "
        "of the answer among the recipe's (default: least)",
    )
    parser.add_argument("--split", default="test", help="the held-out split (default: test)")
    parser.add_argument("--prices", type=Path, help="a file with a date and prices of models")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def calibrate(options: argparse.Namespace) -> None:
    """Choose when the student answers alone, and say what that saves."""
    from distill_datasets.generation.pricing import Prices
    from distill_datasets.serving.calibration import EPSILONS
    from distill_datasets.serving.calibration import calibrate as choose_thresholds

    found = choose_thresholds(
        options.run,
        epsilons=options.epsilon or EPSILONS,
        score=options.score,
        split=options.split,
        prices=Prices.load(options.prices) if options.prices else None,
    )
    if options.json:
        print(found.path.read_text(encoding="utf-8"), end="")
        return
    print(f"{found.text()}\n\nwrote {found.path}; the curve is in the report's page")


def add_rollout(parser: argparse.ArgumentParser) -> None:
    """The flags of `rollout`."""
    parser.add_argument("run", type=Path, help="a run's folder: its release, report and student")
    parser.add_argument(
        "--to", metavar="STAGE", help="go to a stage by hand, of a running proxy too, and end"
    )
    parser.add_argument(
        "--harvest",
        type=Path,
        metavar="PATH",
        help="write the queries that --keep-texts kept as a queries file, and end",
    )
    add_flags(parser, RolloutSettings)


def rollout(options: argparse.Namespace) -> None:
    """Answer for teacher and student, and move the traffic from one to the other."""
    from distill_datasets.serving.rollout import harvest
    from distill_datasets.serving.start import move
    from distill_datasets.serving.start import rollout as start

    if options.harvest:
        print(f"{harvest(options.run, options.harvest):,} queries: {options.harvest}")
        return
    settings = read_settings(options, RolloutSettings)
    if options.to:
        print(move(options.run, options.to, settings))
        return
    start(options.run, settings)

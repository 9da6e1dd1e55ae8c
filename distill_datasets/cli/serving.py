"""The verbs of a student in front of traffic: serve, calibrate and rollout."""

import argparse
from pathlib import Path

from distill_datasets.cli.flags import add_settings, read_settings, share
from distill_datasets.serving.settings import RolloutSettings, ServeSettings


def add_serve(parser: argparse.ArgumentParser) -> None:
    """The flags of `serve`."""
    parser.add_argument(
        "given",
        nargs="?",
        metavar="model",
        help="a local model: pocket or embedded:<folder, .gguf file or Hub id> (default: pocket)",
    )
    parser.add_argument("--model", default="pocket", help=argparse.SUPPRESS)
    add_settings(parser, ServeSettings)


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
    add_settings(parser, RolloutSettings)


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

"""The verbs of a student in front of traffic: serve, calibrate and rollout."""

import argparse
import os
from dataclasses import fields
from pathlib import Path

from distill_datasets.cli.flags import add_settings, read_settings
from distill_datasets.serving.settings import RolloutSettings


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535; found {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 1024):
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 1024; found {text!r}")
    return int(text)


def add_serve(parser: argparse.ArgumentParser) -> None:
    """The flags of `serve`."""
    parser.add_argument(
        "given",
        nargs="?",
        metavar="model",
        help="a local model: pocket or embedded:<folder, .gguf file or Hub id> (default: pocket)",
    )
    parser.add_argument("--model", default="pocket", help=argparse.SUPPRESS)
    parser.add_argument(
        "--student",
        dest="students",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="a folder of a training or a PEFT adapter, or a tinker:// path of --store; several "
        "times for several",
    )
    parser.add_argument(
        "--recipe",
        metavar="PATH",
        help="the recipe whose prompt a name with +prompt has (default: for a student that of its "
        "release)",
    )
    parser.add_argument(
        "--renderer", help="the base's chat format (default: that of its chat template)"
    )
    parser.add_argument(
        "--store",
        type=Path,
        help="the folder of the checkpoints (default: one that ends with the server)",
    )
    _add_place(parser)
    _add_computing(parser)


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen at (default: 127.0.0.1)"
    )
    parser.add_argument(
        "--port", type=_port, default=8000, metavar="N", help="the port (default: 8000)"
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="what clients have to send; Tinker's takes keys that begin with tml- (default: "
        "DISTILL_API_KEY, or a fresh one)",
    )


def _add_computing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        default=os.environ.get("EMBEDDED_DTYPE", "auto"),
        choices=["auto", "fp32", "bf16"],
        help="the number format of the weights (default: auto, bf16 where it is measured to be "
        "faster)",
    )
    parser.add_argument(
        "--threads",
        type=_count,
        metavar="N",
        help="threads that compute (default: OMP_NUM_THREADS, or as many as are measured to help)",
    )


def serve(options: argparse.Namespace) -> None:
    """Serve a local model and its students until Ctrl-C."""
    from distill_datasets.errors import DistillError, ServiceError
    from distill_datasets.serving.server import ServeSettings
    from distill_datasets.serving.server import serve as serve_models

    named = {one.name: getattr(options, one.name) for one in fields(ServeSettings)}
    try:
        serve_models(options.given or options.model, ServeSettings(**named))
    except DistillError:
        raise
    except OSError as error:
        raise ServiceError(
            f"Can't serve at {options.host}:{options.port}: {error}. Choose another --host or "
            "--port."
        ) from error


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    """The flags of `calibrate`."""
    parser.add_argument("run", type=Path, help="a run's folder, with the report of `measure`")
    parser.add_argument(
        "--epsilon",
        type=_share,
        nargs="+",
        metavar="X",
        help="shares of what the student serves in which it may disagree with its teacher "
        "(default: 0.01 0.02 0.05)",
    )
    parser.add_argument(
        "--score",
        choices=("least", "mean", "sum"),
        default="least",
        help="how the log-probabilities of an answer's tokens are its confidence (default: least)",
    )
    parser.add_argument("--split", default="test", help="the held-out split (default: test)")
    parser.add_argument("--prices", type=Path, help="a file with a date and prices of models")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def _share(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < 1:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1; found {text!r}")
    return found


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

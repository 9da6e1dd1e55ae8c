"""What may stand behind the verbs that make a dataset: generate, synthesize, publish, diff."""

import argparse
import math
from pathlib import Path


def count(text: str) -> int:
    """What a flag takes that counts something: a whole number from 1."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1; found {text!r}")
    return int(text)


def amount(text: str) -> float:
    """What a flag takes that measures something: a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0; found {text!r}")
    return number


def add_generate(parser: argparse.ArgumentParser) -> None:
    """What decides what is asked, of whom, how fast, and for how much."""
    parser.add_argument(
        "recipe",
        help="a shipped recipe's name, a folder, a release, or a Hub dataset as name@revision",
    )
    parser.add_argument(
        "--teacher", metavar="MODEL", help="a model reference (default: the recipe's)"
    )
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--limit", type=count, metavar="N", help="only the first queries")
    parser.add_argument(
        "--no-ledger",
        dest="ledger",
        action="store_false",
        help="buy every answer again, or publish without the raw answers",
    )
    add_speed(parser)
    add_money(parser)
    parser.add_argument(
        "--processes",
        type=count,
        metavar="N",
        default=1,
        help="so many make a Tinker teacher's requests (default: 1)",
    )


def add_speed(parser: argparse.ArgumentParser) -> None:
    """How fast a teacher may be asked; it is found out within these."""
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--concurrency",
        type=count,
        default=256,
        metavar="N",
        help="most requests in flight (default: 256)",
    )
    speed.add_argument("--rpm", type=amount, metavar="N", help="most requests a minute")
    speed.add_argument("--tpm", type=amount, metavar="N", help="most tokens a minute")


def add_money(parser: argparse.ArgumentParser) -> None:
    """What it costs, and how much it may."""
    money = parser.add_argument_group("money")
    money.add_argument("--prices", type=Path, help="a file with a date and prices of models")
    money.add_argument("--budget", type=float, help="stop cleanly before more is spent")


def add_generation_only(parser: argparse.ArgumentParser) -> None:
    """Other ways to generate than asking for everything, here and now."""
    ways = parser.add_argument_group("ways")
    ways.add_argument("--dry-run", action="store_true", help="only say what it would take")
    ways.add_argument(
        "--sample",
        type=count,
        default=0,
        metavar="N",
        help="with --dry-run, ask so many rows for real",
    )
    ways.add_argument("--batch", action="store_true", help="by the provider's batches, half price")
    ways.add_argument(
        "--no-wait",
        dest="wait",
        action="store_false",
        help="with --batch, don't stay until it ends",
    )
    ways.add_argument(
        "--poll",
        type=amount,
        default=60.0,
        metavar="SECONDS",
        help="with --batch, between two looks (default: 60)",
    )
    ways.add_argument("--shard", metavar="I/N", help="one of N parts, as 3/64; publish joins them")
    ways.add_argument("--ray", type=count, metavar="N", help="in so many parts, on a Ray cluster")
    ways.add_argument("--stream", action="store_true", help="journal the time to the first token")


def add_synthesize(parser: argparse.ArgumentParser) -> None:
    """How many queries, and where they go."""
    parser.add_argument("recipe", help="a recipe's folder, or a shipped one's name with --out")
    parser.add_argument("--n", type=int, required=True, help="queries; 0 only takes the coverage")
    parser.add_argument(
        "--out", type=Path, help="a copy of the recipe (default: the recipe itself)"
    )
    parser.add_argument(
        "--teacher", metavar="MODEL", help="a model reference (default: the recipe's)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the order of the attributes (default: 0)"
    )
    add_speed(parser)
    add_money(parser)


def add_publish(parser: argparse.ArgumentParser) -> None:
    """What becomes a release, and where it is pushed."""
    parser.add_argument(
        "run",
        type=Path,
        nargs="+",
        help="a run's folder, the folders of its parts, or a training's folder to push",
    )
    parser.add_argument("--out", type=Path, help="the release folder (default: RUN/release)")
    parser.add_argument("--version", metavar="X.Y.Z", help="(default: the next, by what changed)")
    parser.add_argument(
        "--no-ledger", dest="ledger", action="store_false", help="leave the raw answers out"
    )
    hub = parser.add_argument_group("the Hub")
    hub.add_argument("--push-to-hub", metavar="REPO", help="a repository, like me/language-id")
    hub.add_argument(
        "--config", default="default", help="its name in the repository (default: default)"
    )
    seen = hub.add_mutually_exclusive_group()
    seen.add_argument(
        "--private", dest="private", action="store_true", default=True, help="(the default)"
    )
    seen.add_argument("--public", dest="private", action="store_false", help="for everybody")
    hub.add_argument("--create-pr", action="store_true", help="as a pull request")
    hub.add_argument("--yes", action="store_true", help="don't ask before something is sent")
    hub.add_argument(
        "--allow", action="append", default=[], metavar="KEY", help="let a finding of the scan pass"
    )
    hub.add_argument(
        "--base-model", metavar="MODEL", help="a student's base on the Hub, or base/ to include it"
    )


def add_diff(parser: argparse.ArgumentParser) -> None:
    """Which two releases."""
    parser.add_argument("old", help="a release: a folder, or a Hub dataset as name@revision")
    parser.add_argument("new", help="another")
    parser.add_argument("--config", help="the configuration, where a repository has several")
    parser.add_argument("--json", action="store_true", help="print it for programs")

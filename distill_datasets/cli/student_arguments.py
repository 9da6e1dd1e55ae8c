"""What may stand behind the verbs that make a student: train, sweep, measure."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill_datasets.cli.training_arguments import add_training_arguments, read_settings
from distill_datasets.training.objective_settings import ObjectiveSettings
from distill_datasets.training.settings import TrainSettings

# What a sweep may vary; every other setting is shared.
SWEPT = ("rank", "learning_rate", "batch_size", "epochs", "warmup_steps", "weight_decay", "seed")
_OBJECTIVE: dict[str, tuple[Any, str]] = {
    "teacher": (str, "the model that scores (default: the release's teacher)"),
    "top_k": (int, "likely tokens in each place (default: 20; 0: the sampled one)"),
    "temperature": (float, "softens the teacher (default: 1)"),
    "alpha": (float, "the share of the hard labels (default: 0)"),
    "labels": (("auto", "choices", "stored", "scored"), "where soft labels come from"),
    "kl": (("reverse", "forward"), "on policy (default: reverse)"),
    "samples": (int, "a query, on policy (default: 1)"),
    "max_tokens": (int, "of a sample, on policy (default: the recipe's)"),
    "stale": (int, "steps that the sampling weights may be old: 0 or 1 (default: 1)"),
}
_FLAGS = {"teacher": "scorer"}  # `run` has a --teacher of another kind


def add_train(parser: argparse.ArgumentParser) -> None:
    """A dataset, where its student goes, and what it starts from."""
    _add_dataset(parser)
    parser.add_argument(
        "--resume", metavar="PATH", help="a server's state, tinker://<run>/weights/<name>"
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
    parser.add_argument("--student", help="a training folder (default: RUN/train) or a reference")
    parser.add_argument("--out", type=Path, help="where the report goes (default: RUN)")
    parser.add_argument("--split", help="the held-out split (default: test, and any other)")


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", help="a folder, or a Hub dataset as name@revision")
    parser.add_argument("--out", type=Path, required=True, help="the folder for what it makes")


def add_settings(parser: argparse.ArgumentParser, *, several: tuple[str, ...] = ()) -> None:
    """The student and every training setting; `several` of them take more than one value."""
    parser.add_argument(
        "--student", default="pocket", metavar="MODEL", help="a model reference (default: pocket)"
    )
    objective = parser.add_argument_group("objective")
    objective.add_argument(
        "--objective",
        choices=("sft", "soft", "on_policy"),
        help="learn responses, the teacher's probabilities, or its corrections (default: sft)",
    )
    for name, (kind, text) in _OBJECTIVE.items():
        flag = f"--{_FLAGS.get(name, name).replace('_', '-')}"
        takes: dict[str, Any] = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        objective.add_argument(flag, dest=f"objective_{name}", help=text, **takes)
    add_training_arguments(parser, several=several)


def settings_of(options: argparse.Namespace) -> TrainSettings:
    """The settings that were given, and the defaults of the others."""
    given = {name: getattr(options, f"objective_{name}") for name in _OBJECTIVE}
    given["name"] = options.objective
    objective = ObjectiveSettings(**{key: one for key, one in given.items() if one is not None})
    settings = read_settings(options, objective)
    price = settings.price_per_million
    return replace(settings, price_per_million=_train_price(options) if price is None else price)


def _train_price(options: argparse.Namespace) -> float | None:
    """Of the student, by the price file; training on this machine may have none."""
    from distill_datasets.errors import PriceError
    from distill_datasets.generation.pricing import Prices

    if getattr(options, "prices", None) is None:
        return None
    prices, student = Prices.load(options.prices), options.student
    if student not in prices.models and not student.startswith("tinker:"):
        return None
    price = prices.of(student).train
    if price is None:
        raise PriceError(
            f"{str(options.prices)!r} doesn't say what training {student!r} costs: add `train:` "
            "to its prices, for a million tokens, or give --price-per-million."
        )
    return price

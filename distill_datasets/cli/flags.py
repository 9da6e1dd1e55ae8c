"""Command-line flags out of settings: one flag a field, with its help, default and choices."""

import argparse
import math
import re
from collections.abc import Collection, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from distill_datasets.settings import Setting, described

T = TypeVar("T")

_FACTORS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
METAVARS: Mapping[Any, str] = {int: "N", float: "X", Path: "PATH"}


def add_settings(
    parser: argparse.ArgumentParser,
    settings: type,
    *,
    several: Collection[str] = (),
    skip: Collection[str] = (),
    only: Collection[str] | None = None,
) -> None:
    """A flag for each field that has one, in the groups that the fields name.

    The fields named by `several` take more than one value, for a grid; those in `skip`, and those
    that are not in `only` where that is given, get none.
    A value's place in the namespace is named like its flag, or like a field without a name of its
    own.
    What isn't given stays out of the namespace's way as None, so that `read_settings` leaves it to
    the class.
    """
    groups: dict[str, Any] = {"": parser}
    for name, known, kind, choices, default in _flagged(settings):
        if name in skip or (only is not None and name not in only):
            continue
        if known.group not in groups:
            groups[known.group] = parser.add_argument_group(known.group)
        takes: dict[str, Any] = {"type": kind, "metavar": METAVARS.get(kind, "NAME")}
        if kind is bool:
            takes = {"action": "store_const", "const": not default}
        elif kind is tuple and not choices:
            takes = {"action": "append", "metavar": "NAME"}
        elif choices:
            takes = {"choices": choices, **({"nargs": "+"} if kind is tuple else {})}
        takes |= {"dest": _place(name, known), "help": _help(known, default), "default": None}
        if name in several:
            takes["nargs"] = "+"
        groups[known.group].add_argument(flag_of(name, known, default), **takes)


def read_settings(options: argparse.Namespace, settings: type[T], **others: Any) -> T:
    """The settings that were given, and `others`; the class's defaults stand for the rest."""
    given = {
        name: tuple(value) if kind is tuple else value
        for name, known, kind, *_ in _flagged(settings)
        if (value := getattr(options, _place(name, known), None)) is not None
    }
    return settings(**{**given, **others})


def flags_of(settings: type, *, skip: Collection[str] = ()) -> dict[str, str]:
    """The flags of a class's fields, by their place in the namespace."""
    return {
        _place(name, known): flag_of(name, known, default)
        for name, known, _, _, default in _flagged(settings)
        if name not in skip
    }


def flag_of(name: str, known: Setting, default: Any) -> str:
    """A field's flag: `--no-x` turns off what is on by default."""
    word = known.flag or name.replace("_", "-")
    return f"--no-{word}" if default is True else f"--{word}"


def count(text: str) -> int:
    """What a flag takes that counts something: a whole number from 1."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1; found {text!r}")
    return int(text)


def amount(text: str) -> float:
    """What a flag takes that measures something: a number above 0."""
    if not 0 < (number := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0; found {text!r}")
    return number


def share(text: str) -> float:
    """What a flag takes that is a part of a whole: a number from 0 to 1."""
    if not 0 <= (number := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1; found {text!r}")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def quantity(text: str) -> int:
    """What a flag takes that counts many: `800`, `10k`, `2.5m` or `1,000,000`."""
    written = text.strip().lower().replace(",", "").replace("_", "")
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)([kmb]?)", written)
    found = Decimal(match[1]) * _FACTORS[match[2]] if match else Decimal(0)
    if not found or found != found.to_integral_value():
        raise argparse.ArgumentTypeError(
            f"expected a number such as 800, 10k or 2.5m; found {text!r}"
        )
    return int(found)


def _place(name: str, known: Setting) -> str:
    return known.flag.replace("-", "_") if known.flag else name


def _help(known: Setting, default: Any) -> str:
    if isinstance(default, bool):
        return known.help
    if default is None or default == ():
        return f"{known.help} (default: {known.unset})" if known.unset else known.help
    return f"{known.help} (default: {default})"


def _flagged(settings: type) -> Iterator[tuple[str, Setting, type, tuple[Any, ...], Any]]:
    for name, found in described(settings).items():
        if found[0].flag is not False:
            yield name, *found

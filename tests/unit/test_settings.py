"""Settings described once: their ranges are checked, and their flags derived."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from distill_datasets.cli.flags import add_settings, read_settings
from distill_datasets.errors import SettingsError
from distill_datasets.settings import check, setting


@dataclass(frozen=True)
class Cook:
    heat: int = setting(180, "degrees of the oven", group="oven", at_least=50, at_most=300)
    hours: float | None = setting(None, "how long", above=0, unset="until it is done")
    side: Literal["top", "bottom"] | None = setting(None, "which heat", unset="both")
    fan: bool = setting(True, "leave the fan off", flag="fan")
    book: Path | None = setting(None, "the recipe", flag="from-book")
    mood: str = setting("calm", "not on the command line", flag=False)
    herbs: tuple[Literal["basil", "dill", "mint"], ...] = setting((), "which herbs")

    def __post_init__(self) -> None:
        check(self)


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cook")
    add_settings(parser, Cook)
    return parser


def test_without_flags_the_defaults_stand(parser: argparse.ArgumentParser) -> None:
    assert read_settings(parser.parse_args([]), Cook) == Cook()


def test_every_flag_sets_its_field(parser: argparse.ArgumentParser) -> None:
    flags = ["--heat", "200", "--hours", "1.5", "--side", "top", "--no-fan", "--from-book", "a/b"]
    found = read_settings(parser.parse_args(flags), Cook, mood="wild")
    assert found == Cook(200, 1.5, "top", False, Path("a/b"), "wild")


def test_help_says_each_default_and_nothing_of_hidden_fields(
    parser: argparse.ArgumentParser,
) -> None:
    text = " ".join(parser.format_help().split())
    assert "--heat N degrees of the oven (default: 180)" in text
    assert "--hours X how long (default: until it is done)" in text
    assert "--side {top,bottom} which heat (default: both)" in text
    assert "--no-fan leave the fan off" in text
    assert "mood" not in text


def test_several_of_a_choice_stand_behind_one_flag(parser: argparse.ArgumentParser) -> None:
    given = read_settings(parser.parse_args(["--herbs", "dill", "basil"]), Cook)
    assert given.herbs == ("dill", "basil")
    assert "--herbs {basil,dill,mint}" in " ".join(parser.format_help().split())
    with pytest.raises(SystemExit):
        parser.parse_args(["--herbs", "parsley"])


def test_a_grid_takes_several_values() -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser, Cook, several=("heat",), skip=("fan",))
    assert parser.parse_args(["--heat", "100", "200"]).heat == [100, 200]
    with pytest.raises(SystemExit):
        parser.parse_args(["--no-fan"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heat": 20}, "heat must be at least 50; found 20"),
        ({"heat": 400}, "heat must be at most 300; found 400"),
        ({"heat": True}, "heat must be a number; found True"),
        ({"hours": 0}, "hours must be above 0; found 0"),
        ({"hours": float("nan")}, "hours must be a number; found nan"),
        ({"hours": float("inf")}, "hours must be above 0; found inf"),
        ({"side": "botom"}, "side must be one of .* Did you mean 'bottom'"),
        ({"herbs": ("dill", "mnt")}, "herbs must be one of .*; found 'mnt'. Did you mean 'mint'"),
    ],
)
def test_what_is_out_of_range_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Cook(**wrong)  # type: ignore[arg-type]

"""Flags derived from the settings of a training."""

import argparse
from dataclasses import fields

import pytest

from distill_datasets.cli.flags import add_settings, quantity, read_settings
from distill_datasets.errors import SettingsError
from distill_datasets.evaluation.settings import MeasureSettings
from distill_datasets.settings import described
from distill_datasets.training.settings import ObjectiveSettings, TrainSettings


def read(*words: str) -> TrainSettings:
    parser = argparse.ArgumentParser()
    add_settings(parser, ObjectiveSettings)
    add_settings(parser, TrainSettings)
    options = parser.parse_args(words)
    objective = read_settings(options, ObjectiveSettings)
    return read_settings(options, TrainSettings, objective=objective)


def test_every_setting_is_described_and_those_that_have_a_flag_get_one() -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser, TrainSettings)
    known = {name: known for name, (known, *_) in described(TrainSettings).items()}
    assert set(known) == {one.name for one in fields(TrainSettings)} - {"objective"}
    flagged = {name for name, one in known.items() if one.flag is not False}
    assert set(vars(parser.parse_args([]))) == flagged


def test_no_flag_is_every_default() -> None:
    assert read() == TrainSettings()


def test_flags_are_read_as_what_they_are() -> None:
    found = read(
        "--preset", "poc", "--max-rows", "20", "--learning-rate", "1e-4", "--patience", "3"
    )
    assert found == TrainSettings(preset="poc", max_rows=20, learning_rate=1e-4, patience=3)
    assert not read("--no-internalisation").internalisation


def test_an_objective_goes_with_them() -> None:
    found = read("--objective", "soft", "--scorer", "pocket", "--rank", "8")
    assert found == TrainSettings(
        rank=8, objective=ObjectiveSettings(name="soft", teacher="pocket")
    )


def test_a_help_text_says_the_default() -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser, TrainSettings)
    words = " ".join(parser.format_help().split())
    assert "--warmup-steps N linear warm-up steps (default: 0)" in words
    assert "(default: two, or as many as make 60 steps)" in words


def test_a_metric_of_ones_own_may_be_given_several_times() -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser, MeasureSettings)
    given = parser.parse_args(["--metric", "own.py:Length", "--metric", "own.py:Rouge"])
    settings = read_settings(given, MeasureSettings, split="edge")
    assert settings == MeasureSettings("edge", metrics=("own.py:Length", "own.py:Rouge"))
    assert read_settings(parser.parse_args([]), MeasureSettings) == MeasureSettings()
    assert "--split" not in parser.format_help()


@pytest.mark.parametrize(("flag", "value"), [("limit", 0), ("concurrency", 0), ("limit", -3)])
def test_rows_and_requests_are_counted_from_one(flag: str, value: int) -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser, MeasureSettings)
    with pytest.raises(SettingsError, match=f"{flag} must be at least 1; found {value}"):
        read_settings(parser.parse_args([f"--{flag}", str(value)]), MeasureSettings)


@pytest.mark.parametrize(
    ("text", "number"),
    [("800", 800), ("10k", 10_000), ("1M", 1_000_000), ("2.5m", 2_500_000), ("1,000", 1_000)],
)
def test_many_queries_may_be_written_short(text: str, number: int) -> None:
    assert quantity(text) == number


@pytest.mark.parametrize("text", ["", "0", "-5", "1.5", "k", "10kk", "nan", "1e999999"])
def test_what_is_no_number_of_queries_says_what_is(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="such as 800, 10k or 2.5m"):
        quantity(text)

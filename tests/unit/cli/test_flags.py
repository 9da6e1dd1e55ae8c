"""The settings of a training on the command line."""

import argparse
from dataclasses import fields

from distill_datasets.cli.training_arguments import add_training_arguments, read_settings
from distill_datasets.training.objective_settings import ObjectiveSettings
from distill_datasets.training.settings import TrainSettings


def read(*words: str) -> TrainSettings:
    parser = argparse.ArgumentParser()
    add_training_arguments(parser)
    return read_settings(parser.parse_args(words))


def test_every_setting_has_a_flag() -> None:
    parser = argparse.ArgumentParser()
    add_training_arguments(parser)
    settings = {one.name for one in fields(TrainSettings)} - {"objective"}
    assert set(vars(parser.parse_args([]))) == settings


def test_no_flag_is_every_default() -> None:
    assert read() == TrainSettings()


def test_flags_are_read_as_what_they_are() -> None:
    read_back = read("--preset", "poc", "--max-rows", "20", "--grad-clip", "1", "--no-mlp")
    assert read_back == TrainSettings(preset="poc", max_rows=20, grad_clip=1.0, train_mlp=False)


def test_an_objective_goes_with_them() -> None:
    parser = argparse.ArgumentParser()
    add_training_arguments(parser)
    soft = ObjectiveSettings(name="soft")
    assert read_settings(parser.parse_args(["--rank", "8"]), soft).objective == soft

import pytest

from distill_datasets.errors import SettingsError
from distill_datasets.serving.served import read_names


def test_students_are_named_by_their_runs_or_as_they_are_told() -> None:
    assert read_names(["runs/demo/train", "a=runs/b", "tinker://x/sampler_weights/y", "c=d"]) == {
        "demo": "runs/demo/train",
        "a": "runs/b",
        "tinker://x/sampler_weights/y": "tinker://x/sampler_weights/y",
        "c": "d",
    }
    with pytest.raises(SettingsError, match="Two students are called 'demo'"):
        read_names(["runs/demo", "demo=x"])

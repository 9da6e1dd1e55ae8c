from pathlib import Path
from typing import Any

from distill_datasets.evaluation.report import Report, measure
from distill_datasets.models.sampler import Sampling
from distill_datasets.releases.release import publish
from tests.support.panels import QUERIES, RIGHT, Model, Models, run


def measured(tmp_path: Path, **keys: Any) -> Report:
    everywhere = {"split": {"same_rows": True}}
    run(tmp_path, **keys, **everywhere)
    release = publish(tmp_path / "run")
    student = Model("student", lambda query, number: RIGHT(query, 0).removeprefix("colour: "))
    base = Model("base", lambda query, number: "hm")
    return measure(release.path, student=student, base=base, out=tmp_path / "run")


def test_the_teacher_in_a_report_is_the_whole_panel(tmp_path: Path, models: Models) -> None:
    report = measured(tmp_path, teachers=["red", "right", "blue"], choose="majority")
    teacher = report.data["systems"]["teacher"]
    assert teacher["model"] == "red + right + blue"
    assert teacher["metrics"]["accuracy"]["value"] == 1.0
    assert teacher["tokens"]["prompt_mean"] == 30
    assert teacher["latency_ms"]["p50"] > 0
    assert any("one answer is chosen (majority)" in note for note in report.data["notes"])
    # The run's journal has their answers; only the timing asks anew: warm-up and rows, twice.
    assert models.requests == 3 * len(QUERIES) + 3 * 2 * (len(QUERIES) + 1)


def test_the_teacher_of_a_routed_recipe_is_asked_at_temperature_zero(
    tmp_path: Path, models: Models
) -> None:
    teachers = [{"model": "right", "weight": 5}, "red"]
    sampling = {"temperature": 0.7, "n": 2, "stop": ["END"], "max_tokens": 9}
    report = measured(tmp_path, teachers=teachers, sampling=sampling)
    assert report.data["systems"]["teacher"]["model"] == "right + red"
    asked = {sampling for model in models.known.values() for _, sampling in model.asked}
    assert asked == {
        Sampling(temperature=0.7, max_tokens=9, n=2, stop=("END",)),
        Sampling(temperature=0.0, max_tokens=9, n=1, stop=("END",), seed=0),
    }


def test_a_report_says_that_its_teacher_was_told_what_is_right(
    tmp_path: Path, models: Models
) -> None:
    keys: dict[str, Any] = {"teachers": ["red", "blue"], "choose": "best"}
    report = measured(tmp_path, **keys, verifier="reference is none or answer == reference")
    assert any("is told what is right" in note for note in report.data["notes"])


def test_what_the_releases_ledger_knows_is_not_asked_again(tmp_path: Path, models: Models) -> None:
    """In another folder than the run's, whose journal has the answers too."""
    keys = {"split": {"same_rows": True}, "teachers": ["red", "right"], "choose": "majority"}
    run(tmp_path, **keys)
    release = publish(tmp_path / "run")
    bought = models.requests
    student = Model("student", lambda query, number: RIGHT(query, 0).removeprefix("colour: "))
    base = Model("base", lambda query, number: "hm")
    measure(release.path, student=student, base=base, out=tmp_path / "elsewhere")
    assert bought == 2 * len(QUERIES)
    assert models.requests - bought == 2 * 2 * (len(QUERIES) + 1)  # the timing

"""`calibrate` of a run that an echo taught a tiny student."""

import json
from pathlib import Path

import pytest

from distill_datasets.cli.main import main
from distill_datasets.serving.calibration import Thresholds
from tests.integration.cli.test_run import recipe_of, run
from tests.support.openai_server import OpenAIServer


def test_a_student_that_agrees_with_nobody_serves_nothing(
    named_server: OpenAIServer,
    model: str,
    recipe_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, out = recipe_of(recipe_folder, 40), tmp_path / "run"
    assert main(["calibrate", str(out)]) == 2
    assert "measure" in capsys.readouterr().err
    assert run(recipe, out, "--student", model) == 0
    asked = named_server.asked.total()
    rows = len((out / "rows.jsonl").read_text().splitlines())
    capsys.readouterr()
    assert main(["calibrate", str(out), "--epsilon", "0.05", "0.5"]) == 0
    assert "none: 59 groups tell at the least" in capsys.readouterr().out
    found = Thresholds.read(out)
    assert (found.rows, found.disagreements) == (rows, rows)
    assert [one.served for one in found.points] == [0.0, 0.0]
    page = (out / "report.html").read_text()
    assert 'id="calibration"' in page and "share served by the student" in page
    assert named_server.asked.total() == asked, "the teacher's answers are those of the report"
    assert main(["calibrate", str(out), "--score", "mean", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == "mean"
    (out / "train").rename(out / "student")
    (out / "train").mkdir()
    for name in ("config.json", "checkpoints.jsonl"):
        other = (out / "student" / name).read_text().replace("/sampler_weights/", "/of_another/")
        (out / "train" / name).write_text(other)
    (out / "again").mkdir()  # a training that was stopped before its first checkpoint
    (out / "again" / "checkpoints.jsonl").write_text("")
    assert main(["calibrate", str(out), "--json"]) == 0, "the student is that of the report"
    assert json.loads(capsys.readouterr().out)["student"] == found.student
    (out / "student").rename(tmp_path / "student")
    assert main(["calibrate", str(out)]) == 2
    assert f"measure {out / 'release'} --student {out / 'train'}" in capsys.readouterr().err

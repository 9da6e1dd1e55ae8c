"""What each verb returns is shown by a notebook as a small table, with nothing left unescaped."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.errors import DatasetError
from distill_datasets.evaluation.gate import GateFinding, GateResult
from distill_datasets.evaluation.money import RunCosts, money
from distill_datasets.evaluation.report import Report
from distill_datasets.generation.pricing import Prices
from distill_datasets.generation.run import Generated
from distill_datasets.releases.diff import Difference
from distill_datasets.releases.push import Pushed
from distill_datasets.releases.release import Release
from distill_datasets.serving.export import PushedStudent
from distill_datasets.synthesis.run import Synthesized
from distill_datasets.training.checkpoints import SavedCheckpoint, TrainingResult
from distill_datasets.training.sweeps import Sweep, SweepTrial

EVIL = "<script>alert(1)</script>"


def shown(result: Any) -> str:
    text: str = result._repr_html_()
    assert "<script" not in text
    return text


def test_generated_rows_are_counted_and_some_are_shown(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_dict({"query": [EVIL] * 9, "answer": ["a"] * 9, "tokens": [1] * 9})
    rows.save_to_disk(str(tmp_path / "answers"))
    made = Generated(tmp_path, kept=9, rejected={EVIL: 1}, errors=0)
    text = shown(made)
    assert "90.0%" in text and "10.0%" in text
    assert text.count("&lt;script") == 1 + 5
    assert made.to_pandas().shape == (9, 3)


def test_a_release_shows_its_splits_and_what_to_know_of_them(tmp_path: Path) -> None:
    made = Release(tmp_path, "1.0.0", "d1", {"train": 1200}, 3, warnings=(EVIL,))
    text = shown(made)
    assert "1,200" in text and "&lt;script" in text
    with pytest.raises(DatasetError, match="expected one of"):
        made.to_pandas("test")


def test_a_training_shows_its_loss_with_the_best_step_marked(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 3.0},
        {"step": 1, "validation_loss": 2.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "validation_loss": 2.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    first = SavedCheckpoint("1", 1, "s", "t", 2.0, best=True, scores={"validation_loss": 2.0})
    last = SavedCheckpoint("2", 2, "s", "t", 2.5, final=True, scores={"validation_loss": 2.5})
    made = TrainingResult(tmp_path, first, last, 2.5, 2, 10, 0, 100, 1.0, EVIL)
    text = shown(made)
    assert "step 1 won" in text and "best: step 1" in text
    assert made.to_pandas()["loss"].dropna().tolist() == [3.0, 1.0]


def test_a_sweep_shows_every_trial_and_marks_the_best(tmp_path: Path) -> None:
    trials = [
        SweepTrial({"rank": 8}, "rank-8", loss=0.5),
        SweepTrial({"rank": 16}, "rank-16", loss=0.25),
        SweepTrial({"rank": 32}, "rank-32", error=EVIL),
    ]
    text = shown(Sweep(tmp_path, trials))
    assert "Best: rank-16" in text and "&lt;script" in text
    assert Sweep(tmp_path, trials).to_pandas()["rank"].tolist() == [8, 16, 32]
    assert "No training was finished" in shown(Sweep(tmp_path, trials[2:]))


def test_synthesized_queries_are_shown_with_the_rules_they_exercise(tmp_path: Path) -> None:
    summary = {
        "unreadable": 0, "failed": 0, "wanted": 5, "by_hand": 2,
        "rules": [{"number": 1, "rule": EVIL, "queries": 4}],
    }  # fmt: skip
    made = Synthesized(tmp_path, 5, 5, {}, None, summary)
    assert "5 queries by the teacher" in shown(made)
    assert made.to_pandas()["queries"].tolist() == [4]


def test_a_difference_shows_its_counts_and_its_text() -> None:
    side = {"reference": EVIL, "version": "1.0.0", "content_digest": "d", "splits": {"train": 1}}
    data = {
        "old": {**side, "rejected": 0},
        "new": {**side, "version": "1.1.0", "content_digest": "e", "rejected": 0},
        "rows": {"added": 1234, "removed": 0, "changed": 0, "recounted": 0},
        "changed_columns": {},
        "moved": [],
        "labels": [],
        "lengths": {},
        "recipe": {"keys": {}, "files": [], "prompt": ""},
    }
    text = shown(Difference(data))
    assert "Changed: 1.0.0 to 1.1.0" in text and "1,234" in text


def test_a_report_shows_its_verdict_and_every_metric(tmp_path: Path) -> None:
    interval = {"value": 0.9, "low": 0.8, "high": 0.95}
    system = {"metrics": {"accuracy": interval}, "tokens": {"prompt_mean": 9.0}}
    data = {
        "recipe": "letters",
        "n": 4,
        "systems": {"base": system, "teacher": system, "student": system},
        "verdict": {"outcome": "not enough evidence", "rule": "Too few rows."},
        "alerts": [EVIL],
    }
    row = {"id": "r1", "systems": {"student": {"text": "a", "checks": {"short": True}}}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    made = Report(tmp_path / "report.json", data)
    text = shown(made)
    assert text.index("not enough evidence") < text.index("0.900 [0.800, 0.950]")
    assert made.to_pandas()["systems.student.checks.short"].tolist() == [True]


def test_a_gate_shows_whether_the_student_passes_and_each_rule() -> None:
    found = GateResult("runs/a", [GateFinding("loops", "FAILED", EVIL)])
    text = shown(found)
    assert "does not pass" in text and "loops" in text
    assert found.to_pandas().columns.tolist() == ["rule", "outcome", "said"]


def test_costs_show_the_advice_the_volumes_and_their_curves() -> None:
    tokens = {"prompt_mean": 600.0, "response_mean": 5.0}
    report = {
        "n": 10,
        "systems": {
            "teacher": {"model": "t", "tokens": tokens},
            "student": {"model": "s", "tokens": {**tokens, "prompt_mean": 50.0}},
        },
    }
    price = {"prompt": 3.0, "response": 15.0}
    prices = Prices.model_validate(
        {"date": "2026-11-01", "currency": "USD", "models": {"t": price, "s": price}}
    )
    found = RunCosts(money(report, prices))
    text = shown(found)
    assert "1,000,000" in text and "<svg" in text and "a query" in text
    assert len(found.to_pandas()) == 3


def test_a_push_shows_where_it_went() -> None:
    assert "me/student" in shown(PushedStudent("me/student", "c" * 40, changed=True))
    assert "v1.0.0" in shown(Pushed("me/it", "1.0.0", "c" * 40, "v1.0.0", True, EVIL))

import json
from pathlib import Path

import pytest

from distill_datasets.cli.main import main
from distill_datasets.evaluation.gate import GateRules
from distill_datasets.generation.pricing import Prices
from tests.unit.evaluation import test_gate, test_money


def test_the_cost_of_a_run_is_printed_with_its_arithmetic(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.json").write_text(json.dumps(test_money.report((600, 10), (100, 10))))
    prices = tmp_path / "prices.yaml"
    prices.write_text(test_money.LESSON.text())
    asked = ["cost", str(tmp_path), "--prices", str(prices)]
    assert main([*asked, "--queries-per-month", "10k", "2.5m", "--spent", "3"]) == 0
    printed = capsys.readouterr().out
    assert "2,500,000" in printed
    assert "teacher: (600 prompt x 3 + 10 response x 0) / 1M = 0.0018 USD a query" in printed
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [month["queries"] for month in found["volumes"]] == [10_000, 100_000, 1_000_000]
    assert main(["cost", str(tmp_path)]) == 2
    assert "cost --template" in capsys.readouterr().err


def test_a_price_file_starts_from_a_template_or_a_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cost", "--template"]) == 0
    (tmp_path / "prices.yaml").write_text(capsys.readouterr().out)
    Prices.load(tmp_path / "prices.yaml")
    (tmp_path / "report.json").write_text(json.dumps(test_money.report((600, 10), (100, 10))))
    (tmp_path / "list.csv").write_text("model,input,output\nlarge,3,15\nsmall,0.15,0.6\n")
    listed = ["--import", str(tmp_path / "list.csv"), "--date", "2026-11-03"]
    assert main(["cost", str(tmp_path), *listed]) == 0
    (tmp_path / "prices.yaml").write_text(capsys.readouterr().out)
    found = Prices.load(tmp_path / "prices.yaml")
    assert set(found.models) == {"openai:large", "tinker:small"}
    assert main(["cost", *listed, "--model", "openai:mine=large"]) == 0
    assert "openai:mine:" in capsys.readouterr().out
    assert main(["cost", *listed]) == 2


def test_a_gate_exits_with_1_and_the_reasons_or_with_0_and_what_was_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = test_gate.make(tmp_path / "good")
    bad = test_gate.make(tmp_path / "bad", test_gate.report(0.80))
    assert main(["gate", str(good)]) == 0
    printed = capsys.readouterr().out
    assert "passed  quality" in printed
    assert "none of 10 rules fails" in printed
    assert main(["gate", str(bad)]) == 1
    said = capsys.readouterr()
    assert "2 of 10 rules fail" in said.err
    assert "FAILED  quality" in said.out
    assert main(["gate", str(bad), "--against", str(bad), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True


def test_a_gates_rules_are_a_file_that_starts_from_a_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = test_gate.make(tmp_path / "run", test_gate.report(0.88, margin=0.05))
    assert main(["gate", "--template"]) == 0
    rules = tmp_path / "gate.yaml"
    rules.write_text(capsys.readouterr().out)
    assert GateRules.load(rules) == GateRules()
    assert main(["gate", str(run), "--rules", str(rules)]) == 0
    assert main(["gate", str(run), "--rules", str(rules), "--strict"]) == 1
    rules.write_text("qualty_drop: 1\n")
    assert main(["gate", str(run), "--rules", str(rules)]) == 2
    assert "Did you mean 'quality_drop'?" in capsys.readouterr().err

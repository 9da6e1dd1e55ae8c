import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.errors import DatasetError, GateError, SettingsError
from distill_datasets.evaluation.gate import (
    FAILED,
    MISSING,
    PASSED,
    UNSURE,
    GateRules,
    ends_in_a_loop,
    gate,
    is_broken,
)
from distill_datasets.files import cards_folder
from distill_datasets.statistics import Proportion

Report = dict[str, Any]
N = 200


def share(value: float, n: int = N) -> dict[str, float]:
    rows = [1.0] * round(value * n) + [0.0] * (n - round(value * n))
    return Proportion(rows, list(map(str, range(n)))).interval()


def system(right: float, *, commonest: float = 0.3) -> dict[str, Any]:
    return {
        "model": "pocket",
        "metrics": {"accuracy": share(right), "answered": share(1.0), "agreement": share(right)},
        "checks": {"brief": {**share(right), "rows": N}},
        "answers": {"distinct": 4, "commonest": "en", "commonest_share": commonest},
        "tokens": {"prompt_mean": 100.0, "response_mean": 5.0},
        "latency_ms": {"p50": 100.0, "p95": 140.0},
    }


def difference(value: float, margin: float) -> dict[str, float]:
    return {"value": value, "low": value - margin, "high": value + margin}


def report(student: float = 0.94, *, margin: float = 0.03) -> Report:
    lost = difference(student - 0.95, margin)
    return {
        "n": N,
        "systems": {"base": system(0.1), "teacher": system(0.95), "student": system(student)},
        "differences": {"student-teacher": {"accuracy": lost, "answered": difference(0.0, 0.01)}},
        "check_differences": {"student-teacher": {"brief": lost}},
    }


def answer(text: str = "en", **more: Any) -> dict[str, Any]:
    return {"text": text, "answer": text, "stop_reason": "stop", "tokens": 1, "checks": {}, **more}


def make(
    folder: Path,
    found: Report | None = None,
    student: Mapping[int, Mapping[str, Any]] | None = None,
) -> Path:
    """A run's report and its rows, of which some have other answers."""
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps(found or report()))
    rows = [
        {
            "id": f"row-{n}",
            "query": f"query {n}",
            "group": f"row-{n}",
            "reference": "en",
            "systems": {"teacher": answer(), "student": (student or {}).get(n) or answer()},
        }
        for n in range(N)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def outcomes(run: Path, **options: Any) -> dict[str, str]:
    return {one.rule: one.outcome for one in gate(run, **options).findings}


def test_a_student_as_good_as_its_teacher_passes_with_all_that_was_looked_at(
    tmp_path: Path,
) -> None:
    found = gate(make(tmp_path))
    found.require()
    assert found.passed
    assert {one.rule: one.outcome for one in found.findings} == dict.fromkeys(
        (
            *("quality", "answered", "check brief", "empty", "cut_off", "loops", "non_printing"),
            *("commonest answer", "response tokens", "latency"),
        ),
        PASSED,
    )
    assert "accuracy 0.940 against 0.950 of the teacher: -0.010 [-0.040, 0.020]" in found.text()


def test_a_drop_fails_where_the_whole_interval_lies_beyond_it(tmp_path: Path) -> None:
    # 5 % of 0.95 are 0.0475.
    sure = make(tmp_path / "sure", report(0.80, margin=0.05))
    unsure = make(tmp_path / "unsure", report(0.88, margin=0.05))
    assert outcomes(sure)["quality"] == FAILED
    assert outcomes(sure)["check brief"] == FAILED
    assert outcomes(unsure)["quality"] == UNSURE
    assert gate(unsure).passed
    assert outcomes(unsure, rules=GateRules(strict=True))["quality"] == FAILED
    assert outcomes(unsure, rules=GateRules(strict=True, quality_drop=0.1))["quality"] == PASSED
    with pytest.raises(
        GateError, match="(?s)2 of 10 rules fail.*quality: accuracy 0.800"
    ) as failure:
        gate(sure).require()
    assert failure.value.exit_code == 1


def test_a_pass_says_where_the_rows_are_too_few_to_be_sure(tmp_path: Path) -> None:
    few = gate(make(tmp_path / "few", report(0.94, margin=0.2))).findings[0]
    many = gate(make(tmp_path / "many", report(0.94, margin=0.03))).findings[0]
    assert (few.outcome, many.outcome) == (PASSED, PASSED)
    assert few.said.endswith("more can't be ruled out by these rows")
    assert many.said.endswith("(5 %)")


def test_the_quality_is_what_the_rules_or_the_verdict_name(tmp_path: Path) -> None:
    found = report()
    found["verdict"] = {"metric": "chrf", "difference": difference(-0.2, 0.01)}
    for name, value in (("teacher", 0.8), ("student", 0.6)):
        found["systems"][name]["metrics"]["chrf"] = {"value": value}
    run = make(tmp_path, found)
    assert outcomes(run)["quality"] == FAILED
    assert outcomes(run, rules=GateRules(metric="accuracy"))["quality"] == PASSED
    wrong = gate(run, rules=GateRules(metric="acuracy")).findings[0]
    assert (wrong.outcome, "Did you mean 'accuracy'?" in wrong.said) == (MISSING, True)


def test_free_texts_are_compared_by_what_the_verdict_says_of_them(tmp_path: Path) -> None:
    found = report()
    for name, value in (("teacher", 0.9), ("student", 0.6)):
        found.setdefault("texts", {})[name] = {"reference": {"chrf": share(value)}}
    found["verdict"] = {"metric": "chrf", "difference": difference(-0.3, 0.05)}
    first = gate(make(tmp_path, found)).findings[0]
    assert (first.outcome, first.said[:22]) == (FAILED, "chrf 0.600 against 0.9")
    lost = {
        "metric": "checks",
        "difference": difference(-0.3, 0.05),
        "teacher": 0.9,
        "student": 0.6,
    }
    found["verdict"] = lost
    first = gate(make(tmp_path, found)).findings[0]
    assert (first.outcome, first.said[:18]) == (FAILED, "checks 0.600 again")


def test_the_share_of_checks_is_compared_with_another_student_row_by_row(tmp_path: Path) -> None:
    found = report()
    half = {n: answer(checks={"brief": True, "polite": n % 2 == 0, "idle": None}) for n in range(N)}
    whole = {n: answer(checks={"brief": True, "polite": True}) for n in range(N)}
    for name, value, rows in (("now", 0.75, half), ("before", 1.0, whole)):
        verdict = {"metric": "checks", "difference": None, "teacher": 1.0, "student": value}
        make(tmp_path / name, {**found, "verdict": verdict}, rows)
    first = gate(tmp_path / "now", against=tmp_path / "before").findings[0]
    assert first.outcome == FAILED
    assert "checks 0.750 against 1.000" in first.said
    assert "-0.250 [-0.2" in first.said


def test_another_splits_report_has_rows_of_its_own(tmp_path: Path) -> None:
    run = make(tmp_path)
    for name in ("report.json", "rows.jsonl"):
        stem, ending = name.split(".")
        (run / name).rename(run / f"{stem}-edge.{ending}")
    assert outcomes(run / "report-edge.json")["empty"] == PASSED
    with pytest.raises(DatasetError, match="no report"):
        gate(run)


def test_agreement_is_held_against_a_teacher_that_agrees_with_itself(tmp_path: Path) -> None:
    found = report(0.5)
    for one in found["systems"].values():
        del one["metrics"]["accuracy"]
    first = gate(make(tmp_path, found)).findings[0]
    assert first.outcome == FAILED
    assert first.said.startswith("agreement 0.500 against 1.000 of the teacher")


def test_lower_calibration_errors_are_better(tmp_path: Path) -> None:
    found = report()
    for name, value in (("teacher", 0.1), ("student", 0.2)):
        found["systems"][name]["metrics"]["ece"] = {"value": value}
    found["differences"]["student-teacher"]["ece"] = difference(0.1, 0.02)
    run = make(tmp_path, found)
    assert outcomes(run, rules=GateRules(metric="ece"))["quality"] == FAILED
    found["differences"]["student-teacher"]["ece"] = difference(-0.05, 0.02)
    assert outcomes(make(tmp_path, found), rules=GateRules(metric="ece"))["quality"] == PASSED


def test_another_runs_student_is_compared_row_by_row(tmp_path: Path) -> None:
    wrong = {n: answer("de") for n in range(40)}
    before, now = make(tmp_path / "before"), make(tmp_path / "now", report(0.80), wrong)
    first = gate(now, against=before).findings[0]
    # Forty of two hundred rows are lost, and none is won.
    low, high = (
        Proportion([-1.0] * 40 + [0.0] * 160, list(map(str, range(N))), True).interval()["low"],
        0,
    )
    assert first.outcome == FAILED
    assert f"of the student of {str(before)!s}: -0.200 [{low:.3f}, " in first.said
    assert high == 0
    assert outcomes(before, against=now)["quality"] == PASSED


def test_students_of_other_rows_are_compared_by_their_own_intervals(tmp_path: Path) -> None:
    before, now = make(tmp_path / "before", report(0.94)), make(tmp_path / "now", report(0.88))
    (now / "rows.jsonl").unlink()
    rules = GateRules(empty=None, cut_off=None, loops=None, non_printing=None)
    first = gate(now, against=before, rules=rules).findings[0]
    # Newcombe's interval for 176 and 188 of 200.
    assert "-0.060 [-0.118, -0.003]" in first.said
    assert first.outcome == UNSURE


@pytest.mark.parametrize(
    ("rule", "odd"),
    [
        ("empty", answer(" \n", answer=None)),
        ("cut_off", answer("and so on and", stop_reason="length")),
        ("loops", answer("I am sure. " * 30)),
        ("non_printing", answer("e\x00n")),
    ],
)
def test_odd_answers_fail_by_their_share(rule: str, odd: dict[str, Any], tmp_path: Path) -> None:
    few, many = (
        make(tmp_path / "few", None, {1: odd}),
        make(tmp_path / "many", None, dict.fromkeys(range(30), odd)),
    )
    only = outcomes(many)
    assert {name for name, outcome in only.items() if outcome == FAILED} == {rule}
    assert outcomes(few)[rule] == (FAILED if rule == "non_printing" else PASSED)
    assert rule not in outcomes(many, rules=GateRules(**{rule: None}))


def test_loops_and_broken_characters_are_told_from_lists_and_emoji() -> None:
    lines = "\n".join(f"{n}. Step {n} of the recipe" for n in range(40))
    sentence = "The sun rises in the east, and it sets in the west, where the sea is. "
    assert not ends_in_a_loop(lines)
    assert not ends_in_a_loop("ha ha ha")
    assert not ends_in_a_loop("-" * 80)
    assert ends_in_a_loop(f"First. {sentence * 4}The sun ri")
    assert ends_in_a_loop("no " * 40)
    assert not is_broken("Grüße 👩‍👩‍👧 \u200f\u00a0\u3000 ok\r\n\t")
    assert is_broken("caf\ufffd")
    assert is_broken("\ue000")


def test_a_student_that_says_one_thing_fails(tmp_path: Path) -> None:
    found = report()
    found["systems"]["student"] = system(0.94, commonest=0.99)
    assert outcomes(make(tmp_path, found))["commonest answer"] == FAILED


def test_slow_and_long_answers_fail(tmp_path: Path) -> None:
    found = report()
    found["systems"]["student"]["latency_ms"] = {"p50": 151.0, "p95": 300.0}
    found["systems"]["student"]["tokens"]["response_mean"] = 10.5
    run = make(tmp_path, found, {n: answer(tokens=3) for n in range(N)})
    seen = outcomes(run, rules=GateRules(latency_p95_ms=299))
    assert [seen[one] for one in ("latency", "latency p95", "response tokens")] == [FAILED] * 3
    del found["systems"]["student"]["latency_ms"]
    assert outcomes(make(tmp_path, found))["latency"] == MISSING


def test_a_ratio_beyond_its_limit_fails_where_its_whole_interval_is(tmp_path: Path) -> None:
    def latency(p50: float, low: float, high: float) -> dict[str, float]:
        return {"p50": p50, "p50_low": low, "p50_high": high, "p95": high}

    found = report()
    found["systems"]["teacher"]["latency_ms"] = latency(100.0, 90.0, 110.0)
    found["systems"]["student"]["latency_ms"] = latency(160.0, 140.0, 190.0)
    some = {n: answer(tokens=40 if n < 8 else 1) for n in range(N)}
    run = make(tmp_path, found, some)
    seen = gate(run).findings
    said = {one.rule: one.said for one in seen if one.outcome == UNSURE}
    assert set(said) == {"latency", "response tokens"}
    assert "1.60 [1.36, 1.96] times the 100.0" in said["latency"]
    assert {outcomes(run, rules=GateRules(strict=True))[one] for one in said} == {FAILED}
    found["systems"]["student"]["latency_ms"] = latency(180.0, 170.0, 190.0)
    assert outcomes(make(tmp_path, found))["latency"] == FAILED


def judged(lost: float, margin: float, wins: float = 0.0) -> dict[str, Any]:
    scores = {"student": {"clarity": {**difference(8.0 + lost, margin), "rows": N}}}
    return {
        "model": "judge",
        "identity": "judge",
        "scales": {"clarity": [1.0, 10.0]},
        "scores": scores,
        "differences": {"student-teacher": {"clarity": difference(lost, margin)}},
        "preference": {"difference": difference(wins, 0.05)},
    }


def test_a_judge_that_was_asked_is_a_rule_on_wins_and_one_on_each_score(tmp_path: Path) -> None:
    run = make(tmp_path, {**report(), "judge": judged(-0.3, 0.1)})
    seen = outcomes(run)
    assert (seen["judge wins"], seen["judge clarity"]) == (PASSED, PASSED)
    worse = make(tmp_path, {**report(), "judge": judged(-1.0, 0.1, wins=-0.3)})
    assert {outcomes(worse)[one] for one in ("judge wins", "judge clarity")} == {FAILED}
    open_ = make(tmp_path, {**report(), "judge": judged(-0.5, 0.2, wins=-0.12)})
    assert {outcomes(open_)[one] for one in ("judge wins", "judge clarity")} == {UNSURE}
    off = outcomes(worse, rules=GateRules(judge_wins=None, judge_drop=None))
    assert not [rule for rule in off if rule.startswith("judge")]


def test_two_students_are_compared_by_the_same_judge_alone(tmp_path: Path) -> None:
    old = make(tmp_path / "old", {**report(), "judge": judged(0.0, 0.1)})
    new = make(tmp_path / "new", {**report(), "judge": judged(-1.0, 0.1)})
    assert outcomes(new, against=old)["judge clarity"] == FAILED
    other = make(tmp_path / "other", {**report(), "judge": {**judged(0.0, 0.1), "identity": "b"}})
    assert outcomes(new, against=other)["judge"] == MISSING


def test_what_was_not_measured_fails_where_a_rule_names_it(tmp_path: Path) -> None:
    run = make(tmp_path)
    (run / "rows.jsonl").unlink()
    found = gate(run, rules=GateRules(residue=("leak",), checks={"brif": 0.9}))
    missing = {one.rule: one.said for one in found.findings if one.outcome == MISSING}
    assert set(missing) == {
        *("empty", "cut_off", "loops", "non_printing"),
        *("residue leak", "check brif, at least"),
    }
    assert "Did you mean 'brief'?" in missing["check brif, at least"]
    assert "measure the run again" in missing["empty"]
    assert not found.passed
    assert outcomes(run, rules=GateRules(residue="all"))["residue"] == MISSING


def test_each_test_of_residue_is_a_rule_that_passes_or_fails(tmp_path: Path) -> None:
    tests = {
        "leak": {"passed": False, "said": "2 of 5 planted sentences are told"},
        "scope": {"passed": True, "said": ""},
    }
    found = gate(make(tmp_path, {**report(), "residue": tests})).findings
    seen = {one.rule: (one.outcome, one.said) for one in found if "residue" in one.rule}
    assert seen == {
        "residue leak": (FAILED, "2 of 5 planted sentences are told"),
        "residue scope": (PASSED, ""),
    }
    only = outcomes(tmp_path, rules=GateRules(residue=("scope", "scop")))
    assert (only["residue scope"], only["residue scop"]) == (PASSED, MISSING)
    assert "residue leak" not in only


def test_least_shares_of_checks_are_rules(tmp_path: Path) -> None:
    run = make(tmp_path)
    for least, outcome in ((0.9, PASSED), (0.95, UNSURE), (0.99, FAILED)):
        seen = outcomes(run, rules=GateRules(checks={"brief": least}))
        assert seen["check brief, at least"] == outcome


def edited(folder: Path, change: Callable[[str], str]) -> Path:
    text = (cards_folder() / "gate.yaml").read_text()
    (folder / "gate.yaml").write_text(change(text))
    return folder / "gate.yaml"


def test_the_template_has_every_rule_at_its_default(tmp_path: Path) -> None:
    assert GateRules.load(cards_folder() / "gate.yaml") == GateRules()
    text = (cards_folder() / "gate.yaml").read_text()
    assert all(f"\n{name}: " in text for name in GateRules.model_fields)
    other = edited(tmp_path, lambda text: text.replace("residue: measured", "residue: [leak]"))
    assert GateRules.load(other).residue == ("leak",)


def test_rules_that_can_not_be_read_say_what_was_meant(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="'quality_dropp'. Did you mean 'quality_drop'"):
        GateRules.load(
            edited(tmp_path, lambda text: text.replace("quality_drop:", "quality_dropp:"))
        )
    with pytest.raises(SettingsError, match="loops.*found 3"):
        GateRules.load(edited(tmp_path, lambda text: text.replace("loops: 0.01", "loops: 3")))
    with pytest.raises(SettingsError, match="hold no keys"):
        GateRules.load(edited(tmp_path, lambda _: "- 1"))
    with pytest.raises(SettingsError, match="can't be read"):
        GateRules.load(tmp_path / "none.yaml")


def test_damaged_rows_are_an_error(tmp_path: Path) -> None:
    run = make(tmp_path)
    (run / "rows.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(DatasetError, match=r"rows.jsonl', line 1"):
        gate(run)


def test_what_was_found_is_kept_beside_the_report_it_is_of(tmp_path: Path) -> None:
    run = make(tmp_path, {**report(), "digest": "d1"})
    found = gate(run)
    kept = json.loads(found.keep().read_text())
    assert kept == {"report": "d1", **found.to_json()}
    (run / "report-edge.json").write_text((run / "report.json").read_text())
    assert gate(run / "report-edge.json").keep() == run / "gate-edge.json"

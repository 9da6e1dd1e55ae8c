import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.errors import DatasetError
from distill_datasets.evaluation.page import page, write_page
from distill_datasets.evaluation.systems import TrainedStudent

EVIL = '</script><script>alert(1)</script><img src=x onerror=alert(2)> & "quoted" {{ 7 * 7 }}'
FORMATS = Path(__file__).parents[2] / "integration" / "formats"


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1), "n": 10}


def report(**more: Any) -> dict[str, Any]:
    systems = {
        name: {
            "model": "pocket",
            "identity": f"pocket/{name}",
            "prompt": name == "teacher",
            "metrics": {"accuracy": interval(value)},
            "answers": {"distinct": 2, "commonest": "a", "commonest_share": 0.5},
            "tokens": {"prompt_mean": prompt, "response_mean": 5.0},
        }
        for name, value, prompt in (("base", 0.2, 50), ("teacher", 0.9, 600), ("student", 0.8, 50))
    }
    return {
        "recipe": "letters",
        "dataset": {"path": "me/letters", "version": "1.0.0", "revision": "abc", "rows": 20},
        "split": "test",
        "n": 4,
        "systems": systems,
        "differences": {"student-teacher": {"accuracy": interval(-0.1) | {"low": -0.2}}},
        "internalisation": None,
        "prompt_tokens_saved": {"per_query": 550.0, "ratio": 12.0},
        "labels": {name: {"n": 2, "base": 0.0, "teacher": 1.0, "student": 0.5} for name in "ab"},
        "rows": [],
        "sampling": {"temperature": 0.0, "max_tokens": 64},
        "notes": ["Intervals: 95 %."],
        "digest": "d1",
        **more,
    }


def said(text: str, answer: str | None, **checks: bool | None) -> dict[str, Any]:
    return {"text": text, "answer": answer, "stop_reason": "stop", "tokens": 3, "checks": checks}


def row(number: int, right: str, teacher: str, student: str) -> dict[str, Any]:
    systems = {"base": said("?", None), "teacher": said(f"I say {teacher}", teacher)}
    systems["student"] = said(student, student)
    name = f"r{number}"
    return {
        "id": name,
        "query": f"query {number}",
        "group": name,
        "reference": right,
        "systems": systems,
    }


ROWS = [row(1, "a", "a", "a"), row(2, "a", "a", "b"), row(3, "b", "b", "x"), row(4, "b", "a", "b")]


class Read(HTMLParser):
    """What a browser would see: tags, attributes, the text outside scripts, and the rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.data = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style", "section", "table"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.text += data
        elif self.tags[-1][1].get("type") == "application/json":
            self.data += data

    @property
    def sections(self) -> list[str]:
        return [one["id"] or "" for tag, one in self.tags if tag == "section"]

    @property
    def rows(self) -> Any:
        return json.loads(self.data)


def verdict(outcome: str, **more: Any) -> dict[str, Any]:
    return {
        "outcome": outcome,
        "metric": "accuracy",
        "margin": 0.02,
        "difference": {"value": -0.1, "low": -0.2, "high": 0.01, "n": 4},
        "rule": "The interval reaches below the margin.",
        "rows_needed": None,
        "only_teacher": ["r2"],
        "only_student": ["r4"],
        **more,
    }


def test_a_page_asks_nothing_of_anybody() -> None:
    text = page(report(verdict=verdict("replaces the prompt")), ROWS)
    for tag, attributes in Read(text).tags:
        assert tag not in ("img", "iframe", "object", "embed", "audio", "video", "base")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|import\(", text)


def test_only_the_pages_own_script_may_run() -> None:
    text = page(report(), ROWS)
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert len(script) == 1
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_what_models_and_datasets_say_is_text_wherever_it_stands() -> None:
    evil = {**row(1, EVIL, EVIL, "b"), "query": EVIL, "id": EVIL, "group": EVIL}
    evil["systems"][EVIL] = said(EVIL, EVIL, **{EVIL: False})
    data = report(
        recipe=EVIL,
        alerts=[EVIL],
        notes=[EVIL],
        labels={EVIL: {"n": 1, "base": 0.0, "teacher": 1.0, "student": 0.0}},
        checks={EVIL: {"demands": EVIL, "covers": EVIL}},
        verdict=verdict("not enough evidence", rule=EVIL, only_teacher=[EVIL]),
        texts={EVIL: {"commonest": EVIL}},
        judge={EVIL: [EVIL, {EVIL: EVIL}]},
    )
    data["systems"][EVIL] = {**data["systems"]["base"], "checks": {EVIL: interval(0.5)}}
    data["systems"][EVIL]["metrics"] = {EVIL: interval(0.5)}
    record = TrainedStudent({"student": EVIL}, {"step": 1}, [{"step": 1, "loss": 1.0}])
    read = Read(page(data, [evil], training=record))
    assert [tag for tag, _ in read.tags].count("script") == 2
    assert not [tag for tag, _ in read.tags if tag == "img"]
    assert not [one for _, one in read.tags if any(name.startswith("on") for name in one)]
    assert EVIL in read.text
    assert read.rows["rows"][0][1] == EVIL
    assert "49" not in read.text


def test_the_verdict_stands_first_in_words_and_with_a_sign() -> None:
    for outcome, kind in (
        ("replaces the prompt", "good"),
        ("does not replace the prompt", "bad"),
        ("not enough evidence", "open"),
    ):
        text = page(report(verdict=verdict(outcome, rows_needed=1200)), ROWS)
        assert f'<div class="verdict {kind}">' in text
        assert text.index(outcome) < text.index("<section")
        assert "About 1,200 more rows are needed." in text


def test_a_verdict_says_which_interval_it_went_by_and_about_how_many_rows_it_lacks() -> None:
    difference = {"value": 0.0, "low": -0.13, "high": 0.13, "n": 21.0, "level": 0.9}
    told = verdict("not enough evidence", rows_needed=11785, difference=difference)
    text = page(report(verdict=told), ROWS)
    assert "About 12,000 more rows are needed." in text
    assert "90 % interval" in text


def test_tests_for_residue_are_told_apart_in_words_with_their_examples() -> None:
    residue = {
        "leak": {"what": "Does it tell?", "passed": False, "said": "3 of 20.", "examples": [EVIL]},
        "scope": {"what": "Elsewhere?", "passed": True, "said": "None."},
        "loss": {"what": "Other text?", "passed": None, "said": "No likelihoods."},
    }
    read = Read(page(report(residue=residue), ROWS))
    assert "✘ failed" in read.text and "✔ passed" in read.text and "? not told" in read.text
    assert EVIL in read.text and "3 of 20." in read.text
    assert "residue" in read.sections


def test_a_judges_summary_stands_before_its_numbers() -> None:
    judge = {"summary": ["Judge: openai:j, uncorrected."], "scores": {"student": interval(0.5)}}
    text = page(report(judge=judge), ROWS)
    assert text.index("uncorrected.") < text.index("All numbers") < text.index("0.500 [0.400")


def test_labels_say_where_student_and_teacher_differ_beyond_chance() -> None:
    apart = {"difference": {"value": -0.4, "low": -0.6, "high": -0.1}, "significant": True}
    text = page(report(subgroups={"a": apart}), ROWS)
    assert "-0.400 [-0.600, -0.100] beyond chance" in text
    assert "too few rows" in text


def test_alerts_stand_before_the_first_section() -> None:
    text = page(report(alerts=["The student copies the query."]), ROWS)
    assert text.index("The student copies the query.") < text.index("<section")


def test_sections_without_data_are_left_out() -> None:
    bare = report(labels={}, prompt_tokens_saved=None, differences={}, notes=[], free_text=True)
    assert Read(page(bare)).sections == ["quality", "reproduce"]
    assert Read(page(report(), ROWS)).sections == [
        "saves", "quality", "flips", "rows", "labels", "reproduce",
    ]  # fmt: skip


def test_every_system_has_its_interval_in_figures_and_drawn() -> None:
    text = page(report(), ROWS)
    assert "0.800 [0.700, 0.900]" in text
    assert 'aria-label="0.800, from 0.700 to 0.900"' in text


def test_rows_where_one_alone_is_right_are_listed_apart() -> None:
    read = Read(page(report(), ROWS))
    assert "2 where only the teacher is right, 1 where only the student is right." in read.text
    sides = {one[0]: one[4] for one in read.rows["rows"]}
    assert sides == {"r1": "", "r2": "teacher", "r3": "teacher", "r4": "student"}


def test_the_verdict_decides_whose_rows_they_are() -> None:
    read = Read(page(report(verdict=verdict("not enough evidence")), ROWS))
    assert "1 where only the teacher is right, 1 where only the student is right." in read.text


def test_rows_hold_all_that_every_system_said_with_its_checks() -> None:
    systems = {
        "base": said("?", None, short=None, polite=False),
        "student": {**said("a", "a", short=True, polite=True), "stop_reason": "length"},
        "teacher": said("So: a", "a", short=False, polite=True),
    }
    checks = {name: {"demands": "x", "covers": None} for name in ("short", "polite")}
    one = {**ROWS[0], "systems": systems}
    found = Read(page(report(checks=checks), [one])).rows
    assert found["systems"] == ["teacher", "student", "base"]
    assert found["rows"][0][5] == [
        ["So: a", "a", "stop", 3, "01"],
        ["a", 0, "length", 3, "11"],
        ["?", None, "stop", 3, "-0"],
    ]


def test_a_confusion_counts_answers_that_are_no_label_too() -> None:
    text = page(report(), ROWS)
    (student,) = re.findall(r"what the student answers.*?</table>", text, re.DOTALL)
    cells = re.findall(r'<td style="--s:([\d.]+)"( class="right")?>(\d*)</td>', student)
    assert [int(n or 0) for *_, n in cells] == [1, 1, 0, 0, 1, 1]
    assert [place for place, (_, right, _) in enumerate(cells) if right] == [0, 4]
    assert ">(other)</th>" in student


def test_a_trainings_curves_have_the_best_checkpoint_marked() -> None:
    metrics: list[dict[str, Any]] = [{"step": step, "loss": 9.0 / step} for step in range(1, 4)]
    metrics += [{"step": 1, "validation_loss": 5.0}, {"step": 3, "validation_loss": 6.0}]
    warned = ["the student collapsed"]
    record = TrainedStudent({"student": "pocket"}, {"step": 1}, metrics, warned)
    text = page(report(), ROWS, training=record)
    assert "best: step 1" in text and "⚠ the student collapsed." in text
    assert "training" in Read(text).sections


def test_costs_are_drawn_with_the_queries_that_they_take_to_be_back() -> None:
    money = {
        "currency": "USD",
        "priced_at": "2026-11-01",
        "per_query": {"teacher": 0.002, "teacher, cached": 0.001, "student": 0.0001},
        "hosting_per_month": {"teacher": 0.0, "student": 0.0},
        "spent": {"total": 1.9},
        "savings": {
            name: {"per_query": saved, "percent": 50.0, "break_even_queries": turn}
            | {"pays_from": None}
            for name, saved, turn in (("teacher", 0.0019, 1000), ("teacher, cached", 0.0009, 2112))
        },
        "volumes": [
            {
                "queries": 10_000,
                "cost": {"teacher": 20.0, "teacher, cached": 10.0, "student": 1.0},
                "cheapest": "student",
                "against": {
                    name: {"saving": saved, "percent": 95.0, "break_even_days": 6.4}
                    | {"first_year_return": 11.0}
                    for name, saved in (("teacher", 19.0), ("teacher, cached", 9.0))
                },
            }
        ],
        "advice": "The student is the cheapest at every volume.",
        "arithmetic": ["0.002 - 0.0001 = 0.0019"],
    }
    text = page(report(money=money), ROWS)
    assert "1k: break-even, teacher" in text
    assert "2.11k: break-even, teacher, cached" in text
    assert "0.002 - 0.0001 = 0.0019" in text
    assert "19.00 (95.0 %)" in text and "+1,100 %" in text


def test_what_trains_and_measures_it_again_is_quoted_for_a_shell() -> None:
    record = TrainedStudent({"student": "pocket", "dataset": {"path": "my runs/release"}}, {})
    text = Read(page(report(), ROWS, training=record)).text
    assert "distill-datasets train 'my runs/release' --student pocket --out student" in text
    dataset = {"path": "me/letters@v1.0.0", "commit": "c0ffee", "version": "1", "revision": "r"}
    text = Read(page(report(dataset=dataset))).text
    assert "measure --dataset me/letters@c0ffee --split test --student pocket" in text


def test_ten_thousand_rows_take_no_more_room_than_their_file() -> None:
    rows = [row(number, "a", "a", "b") for number in range(10_000)]
    text = page(report(labels={}), rows)
    assert len(text) < len("".join(map(json.dumps, rows)))
    assert text.count("<tr>") < 100


def test_more_rows_than_a_page_opens_are_said_to_be_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distill_datasets.evaluation.page._MOST_ROWS", 1_000)
    rows = [row(number, "a", "a", "a") for number in range(1_001)]
    read = Read(page(report(), rows))
    assert "The page holds the first 1,000 rows; rows.jsonl has all." in read.text
    assert len(read.rows["rows"]) == 1_000


def test_a_page_is_written_beside_its_report(tmp_path: Path) -> None:
    (tmp_path / "report-edge.json").write_text(json.dumps(report()))
    lines = "".join(json.dumps(one) + "\n" for one in ROWS)
    (tmp_path / "rows-edge.jsonl").write_text(lines)
    written = write_page(tmp_path / "report-edge.json")
    assert written == tmp_path / "report-edge.html"
    assert len(Read(written.read_text()).rows["rows"]) == 4


def test_a_report_of_the_first_version_has_a_page_too(tmp_path: Path) -> None:
    old = FORMATS / "v0.1" / "run" / "report.json"
    (tmp_path / "report.json").write_text(old.read_text())
    assert "quality" in Read(write_page(tmp_path / "report.json").read_text()).sections


def test_what_is_no_report_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="There is no report"):
        write_page(tmp_path)
    for missing in (tmp_path / "run", tmp_path / "run" / "report.json"):
        with pytest.raises(DatasetError, match=f"measure {tmp_path / 'run'}` first"):
            write_page(missing)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(DatasetError, match="is no report"):
        write_page(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(report()))
    with pytest.raises(DatasetError, match="is no training"):
        write_page(tmp_path, tmp_path)


def test_the_training_in_the_runs_folder_is_found_by_its_student(tmp_path: Path) -> None:
    data = report()
    data["systems"]["student"]["model"] = "tinker://two"
    (tmp_path / "report.json").write_text(json.dumps(data))
    for name, sampler in (("train", "tinker://one"), ("train-2", "tinker://two")):
        folder = tmp_path / name
        folder.mkdir()
        checkpoint = {"name": "final", "step": 2, "state": "s", "sampler": sampler, "best": True}
        (folder / "checkpoints.jsonl").write_text(json.dumps(checkpoint) + "\n")
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 2, "loss": 1.0}) + "\n")
        config = {"student": f"base of {name}", "renderer": "r", "settings": {}}
        (folder / "config.json").write_text(json.dumps(config))
    assert "base of train-2, 2 steps" in write_page(tmp_path).read_text()


def beside_report(folder: Path, *, digest: str = "d1", recipe: str = "letters") -> str:
    """The page of a run where a gate and a coverage were kept."""
    (folder / "report.json").write_text(json.dumps(report()))
    rules = [
        {"rule": "quality", "outcome": "passed", "said": "accuracy 0.8"},
        {"rule": "loops", "outcome": "FAILED", "said": EVIL},
    ]
    gate = {"report": digest, "run": "r", "passed": False, "rules": rules}
    (folder / "gate.json").write_text(json.dumps(gate))
    rule = {"rule": "Say please.", "changed": 2, "checks": {}, "examples": [{"query": EVIL}]}
    coverage = {
        "recipe": recipe,
        "teacher": "pocket",
        "queries": 5,
        "changed_by_chance": 1,
        "rules": [{"rule": "Be kind.", "changed": 0, "checks": {}, "examples": []}, rule],
    }
    (folder / "coverage").mkdir(exist_ok=True)
    (folder / "coverage" / "coverage.json").write_text(json.dumps(coverage))
    points = [
        {"epsilon": 0.01, "served": 0.0, "saved": -0.1},
        {"epsilon": 0.05, "served": 0.8, "saved": 0.7},
    ]
    calibration = {"report": digest, "level": 0.95, "rows": 1200, "groups": 800}
    calibration |= {"points": points, "curve": points}
    (folder / "calibration.json").write_text(json.dumps(calibration))
    return write_page(folder).read_text()


def test_what_a_gate_found_and_what_no_query_exercises_are_sections(tmp_path: Path) -> None:
    found = beside_report(tmp_path)
    assert "does not pass: 1 of 2 rules fail" in found
    assert found.index(">loops<") < found.index(">quality<", found.index('id="gate"'))
    assert "1 rule that no query of the sample exercises" in found
    assert found.index("<li>Be kind.</li>") < found.index("Say please.")
    calibration = found[found.index('id="calibration"') :]
    assert "1,200 held-out queries say so, in 800 groups that count as one each" in calibration
    assert "none: too few queries tell" in calibration and "70.0%" in calibration
    assert "<svg" in calibration[: calibration.index("</section>")]
    assert "<img src=x" not in found


def test_a_gate_of_another_report_and_a_coverage_of_another_prompt_are_not_shown(
    tmp_path: Path,
) -> None:
    found = beside_report(tmp_path, digest="d0", recipe="words")
    assert 'id="gate"' not in found and 'id="coverage"' not in found
    assert 'id="calibration"' not in found

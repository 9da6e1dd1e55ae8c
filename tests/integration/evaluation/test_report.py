import asyncio
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.cli.main import main
from distill_datasets.errors import (
    BudgetReached,
    DatasetError,
    GenerationError,
    ModelError,
    RejectedError,
    SettingsError,
)
from distill_datasets.evaluation.comparison import Comparison
from distill_datasets.evaluation.latency import uncacheable
from distill_datasets.evaluation.metrics import Metrics
from distill_datasets.evaluation.report import Report, measure
from distill_datasets.evaluation.settings import MeasureSettings
from distill_datasets.generation.run import generate
from distill_datasets.models.sampler import Reply, Sample, Sampling, Usage
from distill_datasets.releases.release import publish
from distill_datasets.schema import Message
from tests.conftest import edit
from tests.support.recipes import any_recipe

TEST = {  # query: what is right, what the teacher says, and the student
    "rose": ("red", "red", "red"),
    "poppy": ("red", "red", "red"),
    "blood": ("red", "red", "red"),
    "rust": ("red", "blue", "red"),
    "sky": ("blue", "blue", "blue"),
    "sea": ("blue", "blue", "blue"),
    "ink": ("blue", "blue", "blue"),
    "plum": ("blue", "no idea", "red"),
}
EDGE = {"red sky": ("red", "red", "blue")}
TRAIN = {"brick": ("red", "red", "red"), "lake": ("blue", "blue", "blue")}
ALL = {**TEST, **EDGE, **TRAIN}


class Lexicon:
    """Answers a query from a table, and anything else with nonsense. Tokens are words."""

    def __init__(self, model: str, answers: Mapping[str, str]) -> None:
        self.model, self.answers = model, answers
        self.asked: list[tuple[Sequence[Message], Sampling]] = []
        self.failing: set[str] = set()
        self.failure: Exception = RuntimeError("busy")

    @property
    def identity(self) -> str:
        return self.model

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        self.asked.append((messages, sampling))
        query = messages[-1]["content"]
        if query in self.failing:
            raise self.failure
        text = self.answers.get(query, "As a language model I like colours")
        words = sum(len(message["content"].split()) for message in messages)
        return Reply((Sample(text, "stop", len(text.split()) + 1),), Usage(words, 0))


def teacher() -> Lexicon:
    return Lexicon("teacher", {query: f"colour: {row[1]}" for query, row in ALL.items()})


def student() -> Lexicon:
    return Lexicon("student", {query: f"It is {row[2]}." for query, row in ALL.items()})


def base(model: str = "base") -> Lexicon:
    return Lexicon(model, {})


RECIPE = """\
name: colours
description: Which colour is it?
teacher: pocket
queries: {file: queries.jsonl, group: family, reference: colour, forced_split: split}
answer: {pattern: 'colour: (?P<answer>\\w+)$', choices: [red, blue]}
response: 'It is {{ answer }}.'
sampling: {max_tokens: 7, stop: [END]}
"""


def make_run(
    folder: Path,
    *,
    references: bool = True,
    forced: bool = True,
    changes: str = "",
    sampling: str = "",
    recipe: str = RECIPE,
) -> Path:
    """A run's folder with answers and a release."""
    lies = folder / "colours"
    lies.mkdir()
    text = recipe if forced else recipe.replace(", forced_split: split", "")
    text = text.replace("sampling: {", f"sampling: {{{sampling}")
    (lies / "recipe.yaml").write_text(text + changes)
    (lies / "prompt.md").write_text("Name the colour of the thing. Say: colour: NAME.\n")
    lines = [
        {
            "query": query,
            "family": None,
            "colour": row[0] if references else None,
            "split": "test" if query in TEST else "edge" if query in EDGE else "train",
        }
        for query, row in ALL.items()
    ]
    (lies / "queries.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    generate(lies, teacher=teacher(), out=folder / "run")
    publish(folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def compare(run: Path, **options: Any) -> Report:
    given = {"student": student(), "teacher": teacher(), "base": base(), "out": run, **options}
    return measure(run / "release", **given)


def values(report: Report, system: str) -> dict[str, float]:
    metrics = report.data["systems"][system]["metrics"]
    return {name: number["value"] for name, number in metrics.items()}


def test_every_number_equals_the_one_computed_by_hand(run: Path) -> None:
    report = compare(run)
    assert values(report, "teacher") == pytest.approx(
        {
            "accuracy": 6 / 8,
            "macro_f1": (2 * 3 / (4 + 3) + 2 * 3 / (4 + 4)) / 2,
            "answered": 7 / 8,
            "agreement": 7 / 8,
        }
    )
    assert values(report, "student") == pytest.approx(
        {
            "accuracy": 7 / 8,
            "macro_f1": (2 * 4 / (4 + 5) + 2 * 3 / (4 + 3)) / 2,
            "answered": 1.0,
            "agreement": 6 / 8,
        }
    )
    assert set(values(report, "base").values()) == {0.0}


def test_queries_that_the_teacher_could_not_answer_are_measured_too(run: Path) -> None:
    report = compare(run)
    assert report.data["n"] == len(TEST)
    assert {row["query"]: row["teacher"] for row in report.data["rows"]}["plum"] is None


def test_the_file_holds_what_the_report_says(run: Path) -> None:
    report = compare(run)
    assert report.path == run / "report.json"
    data = json.loads(report.path.read_text())
    assert data == report.data
    manifest = json.loads((run / "release" / "manifest.json").read_text())
    assert data["dataset"] == {
        "path": str(run / "release"),
        "version": "1.0.0",
        "revision": manifest["content_digest"],
        "rows": 10,
    }
    for system in data["systems"].values():
        for number in system["metrics"].values():
            assert number["low"] <= number["value"] <= number["high"]
            assert number["low"] < number["high"]
        assert 0 < system["latency_ms"]["p50"] <= system["latency_ms"]["p95"]


def test_every_text_stands_beside_the_report_as_it_was_said(run: Path) -> None:
    report = compare(run)
    lines = (run / "rows.jsonl").read_text().splitlines()
    rows = {row["query"]: row for row in map(json.loads, lines)}
    assert rows.keys() == TEST.keys()
    assert list(report.rows()) == list(rows.values())
    assert rows["plum"]["reference"] == "blue"
    assert rows["plum"]["systems"] == {
        "base": {
            "text": "As a language model I like colours",
            "answer": None,
            "stop_reason": "stop",
            "tokens": 8,
            "checks": {},
        },
        "teacher": {
            "text": "colour: no idea",
            "answer": None,
            "stop_reason": "stop",
            "tokens": 4,
            "checks": {},
        },
        "student": {
            "text": "It is red.",
            "answer": "red",
            "stop_reason": "stop",
            "tokens": 4,
            "checks": {},
        },
    }
    other = compare(run, settings=MeasureSettings("edge"))
    assert [row["query"] for row in other.rows()] == ["red sky"]
    assert (run / "rows-edge.jsonl").is_file()


def test_a_report_is_read_again_and_a_report_without_rows_says_so(run: Path) -> None:
    report = compare(run)
    assert Report.read(run) == Report.read(report.path) == report
    (run / "rows.jsonl").unlink()
    with pytest.raises(DatasetError, match=r"rows.jsonl' can't be read.*Measure again"):
        list(report.rows())
    with pytest.raises(DatasetError, match=r"report.md' is no report"):
        Report.read(run / "report.md")


ALL_SYSTEMS = (
    "base", "base+prompt", "teacher", "teacher-again", "student", "student+prompt",
)  # fmt: skip


def test_every_system_that_is_named_is_asked_with_the_prompt_or_without(run: Path) -> None:
    report = compare(run, settings=MeasureSettings(systems=ALL_SYSTEMS))
    systems = report.data["systems"]
    assert {name: one["prompt"] for name, one in systems.items()} == {
        "base": False,
        "base + prompt": True,
        "teacher": True,
        "teacher again": True,
        "student": False,
        "student + prompt": True,
    }
    assert systems["base + prompt"]["tokens"]["prompt_mean"] == 10.0
    assert [name for name, one in systems.items() if "latency_ms" in one] == [
        "base", "teacher", "student",
    ]  # fmt: skip
    # What the student says isn't what the teacher's prompt asks for.
    assert systems["student + prompt"]["metrics"]["answered"]["value"] == 0.0
    assert systems["teacher again"]["metrics"] == systems["teacher"]["metrics"]
    assert any(note.startswith("Teacher again is a second answer") for note in report.data["notes"])
    assert "student - (base + prompt): accuracy +0.875" in report.table()
    assert "student+prompt" not in report.path.with_suffix(".md").read_text()


def test_a_base_that_nobody_names_is_not_opened(run: Path) -> None:
    report = compare(run, base=None, settings=MeasureSettings(systems=("teacher", "student")))
    assert list(report.data["systems"]) == ["teacher", "student"]
    assert "teacher" in report.table() and "base" not in report.table()


def test_a_short_prompt_that_no_recipe_names_is_refused(run: Path) -> None:
    asked = teacher()
    with pytest.raises(SettingsError, match="the recipe names none"):
        compare(run, teacher=asked, settings=MeasureSettings(systems=("base+short",)))
    assert asked.asked == []


def test_the_untrained_model_is_asked_with_the_students_short_prompt_and_without(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path, changes="student: {prompt: '[colours]'}\n")
    asked = base()
    report = compare(run, base=asked, settings=MeasureSettings(systems=("base", "base+short")))
    assert list(report.data["systems"]) == ["base", "base + short prompt", "teacher", "student"]
    firsts = {messages[0]["content"] for messages, _ in asked.asked if len(messages) == 2}
    assert firsts == {"[colours]"}
    assert sum(len(messages) == 1 for messages, _ in asked.asked) == 2 * len(TEST) + 1


def test_a_teachers_second_answer_is_the_one_that_the_release_has(tmp_path: Path) -> None:
    run = make_run(tmp_path, sampling="temperature: 0.7, ")
    asked = teacher()
    report = compare(run, teacher=asked, out=tmp_path / "elsewhere")
    assert "teacher again" in report.data["systems"]
    assert {sampling.temperature for _, sampling in asked.asked} == {0.0}
    text = (tmp_path / "elsewhere/report.md").read_text()
    assert "Teacher again is a second answer of the teacher, at temperature 0.7" in text


def test_a_teacher_that_says_the_likeliest_is_not_asked_for_what_the_release_has(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path, sampling="seed: 7, top_p: 0.9, ")
    asked = teacher()
    settings = MeasureSettings(latency=False)
    compare(run, teacher=asked, out=tmp_path / "elsewhere", settings=settings)
    assert asked.asked == []


FREE = """\
name: colours
description: Which colour is it?
teacher: pocket
queries: {file: queries.jsonl, group: family, forced_split: split}
response: '{{ text }}'
"""


def test_free_text_is_compared_with_the_teachers_and_with_what_it_says_again(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path, recipe=FREE)
    asked = teacher()
    report = compare(run, teacher=asked)
    systems, texts = report.data["systems"], report.data["texts"]
    assert report.data["free_text"]
    assert list(systems) == ["base", "teacher", "teacher again", "student"]
    assert {name for one in systems.values() for name in one["metrics"]} == {"answered"}
    assert {sampling.temperature for _, sampling in asked.asked} == {0.0, 1.0}
    assert texts["teacher again"]["teacher"]["chrf"]["value"] == 1.0
    assert 0 < texts["student"]["teacher"]["chrf"]["value"] < 1.0
    assert "teacher" not in texts["teacher"]
    assert report.data["text_differences"]["student-teacher again"]["chrf"]["high"] < 0
    verdict = report.data["verdict"]
    assert (verdict["metric"], verdict["outcome"]) == ("chrf", "does not replace the prompt")
    alone = compare(run, settings=MeasureSettings(systems=("base", "teacher", "student")))
    assert alone.data["verdict"]["outcome"] == "not enough evidence"
    assert "measure with --systems" in alone.data["verdict"]["rule"]
    lines = report.table().splitlines()
    assert any("chrf to teacher" in line for line in lines)
    assert "agreement" not in report.table()
    assert "chrF to teacher" in report.path.with_suffix(".md").read_text()


PRICES = """\
date: 2026-11-01
currency: EUR
models:
  teacher: {prompt: 1000, response: 2000, cached: 100}
  base: {prompt: 10, response: 10}
"""


def test_prices_say_what_is_asked_for_costs_and_what_the_student_saves(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prices.yaml").write_text(PRICES)
    report = compare(run, settings=MeasureSettings(prices=tmp_path / "prices.yaml"))
    said = capsys.readouterr().err
    asked = "8 of 8 requests (the others are answered already), about 8 tokens to read, at most 56"
    assert f"measure: base: {asked} to write, at most 0.0006 EUR" in said
    # It costs what it was trained from does.
    assert f"measure: student: {asked} to write, at most 0.0006 EUR" in said
    assert report.data["spent"]["currency"] == "EUR" and report.data["spent"]["amount"] > 0
    assert (
        report.data["money"]["per_query"]["teacher"] > report.data["money"]["per_query"]["student"]
    )
    assert report.data["money"]["latency_ms"].keys() == {"teacher", "teacher, cached", "student"}
    text = report.path.with_suffix(".md").read_text()
    assert "## Money" in text and report.data["money"]["advice"] in text.split("|")[0]


def test_prices_given_later_cost_no_request(run: Path, tmp_path: Path) -> None:
    first = compare(run)
    (tmp_path / "prices.yaml").write_text(PRICES)
    asked = teacher()
    settings = MeasureSettings(prices=tmp_path / "prices.yaml")
    again = compare(run, teacher=asked, settings=settings)
    assert asked.asked == []
    assert "money" in again.data and "money" not in first.data


def test_a_price_that_is_missing_is_a_note_and_the_report_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prices.yaml").write_text(PRICES.replace("base:", "other:"))
    report = compare(run, settings=MeasureSettings(prices=tmp_path / "prices.yaml"))
    assert "about 8 tokens to read, at most 56 to write (no price)" in capsys.readouterr().err
    notes = [note for note in report.data["notes"] if note.startswith("No comparison of costs")]
    assert len(notes) == 1 and "'base'" in notes[0]


def test_a_budget_ends_the_asking_and_what_was_paid_is_kept(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text(PRICES)
    asked = Lexicon("other", teacher().answers)
    settings = MeasureSettings(prices=tmp_path / "prices.yaml", budget=0.03, concurrency=1)
    with pytest.raises(BudgetReached, match=r"The budget of 0.03 EUR"):
        compare(run, teacher=asked, settings=settings)
    bought = len(asked.asked)
    assert 0 < bought < len(TEST)
    more = Lexicon("other", teacher().answers)
    compare(run, teacher=more, settings=MeasureSettings(latency=False))
    assert len(more.asked) == len(TEST) - bought


def test_a_budget_is_one_for_all_splits(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text(PRICES)
    made = {"student": student, "teacher": teacher, "base": base}
    monkeypatch.setattr(
        "distill_datasets.models.references.open_sampler", lambda name, **_: made[name]()
    )

    def measured(out: str, budget: float) -> int:
        models = [f"--{name}={name}" for name in made]
        paid = ["--prices", str(prices), "--budget", str(budget), "--no-latency"]
        return main(["measure", str(run), "--out", str(tmp_path / out), *models, *paid])

    assert measured("all", 1.0) == 0
    spent = [Report.read(tmp_path / "all" / f"report{one}.json") for one in ("-edge", "")]
    edge, test = (one.data["spent"]["amount"] for one in spent)
    assert 0 < edge < test
    assert measured("few", test + edge / 2) == 1
    assert "has no room for another request" in capsys.readouterr().err
    assert (tmp_path / "few" / "report-edge.json").is_file()


def test_a_budget_without_prices_is_refused() -> None:
    with pytest.raises(SettingsError, match="A budget is counted with prices"):
        MeasureSettings(budget=1.0)


def test_timing_can_be_left_out_and_comes_later_without_asking_again(run: Path) -> None:
    asked = teacher()
    report = compare(run, teacher=asked, settings=MeasureSettings(latency=False))
    assert asked.asked == []  # the release has its answers
    assert report.data["latency_ratio"] is None and not report.data["timed"]
    assert "p50" not in report.table() and "latency" not in report.table().lower()
    assert "Median latency" in compare(run, teacher=asked).table()
    assert len(asked.asked) == 2 * (len(TEST) + 1)
    # A report with timings is as good without.
    again = compare(run, teacher=asked, settings=MeasureSettings(latency=False))
    assert again.data["timed"] and len(asked.asked) == 2 * (len(TEST) + 1)


def test_the_report_is_there_before_the_timing_and_after_a_failure_of_it(run: Path) -> None:
    compare(run)
    (run / "report.json").unlink()
    failing = base()
    failing.failing = {"rose"}
    with pytest.raises(GenerationError, match="failed while timing"):
        compare(run, base=failing)
    assert not Report.read(run).data["timed"]
    assert "Median latency" not in (run / "report.md").read_text()
    assert compare(run).data["timed"]


def test_what_was_rejected_is_asked_again_since_there_is_no_report_without_it(run: Path) -> None:
    failing = base()
    failing.failing, failing.failure = {"rose"}, RejectedError("Flagged.", type="content policy")
    with pytest.raises(GenerationError, match=r"'rose'.*Flagged\. No report .* Run again"):
        compare(run, base=failing)
    failing.failing = set()
    assert compare(run, base=failing).data["timed"]


def test_only_the_teacher_sees_the_prompt(run: Path) -> None:
    systems = {"student": student(), "teacher": teacher(), "base": base()}
    report = compare(run, **systems)
    assert {name: system["prompt"] for name, system in report.data["systems"].items()} == {
        "base": False,
        "teacher": True,
        "student": False,
    }
    for name in ("student", "base"):
        assert {len(messages) for messages, _ in systems[name].asked} == {1}
    assert {messages[0]["role"] for messages, _ in systems["teacher"].asked} == {"system"}


def test_everyone_is_asked_at_temperature_zero_with_the_recipes_token_limit(run: Path) -> None:
    systems = {"student": student(), "teacher": teacher(), "base": base()}
    compare(run, **systems)
    greedy = Sampling(temperature=0.0, max_tokens=7, seed=0)
    assert {sampling for _, sampling in systems["student"].asked} == {greedy}
    assert {sampling for _, sampling in systems["base"].asked} == {greedy}
    [asked] = {sampling for _, sampling in systems["teacher"].asked}
    assert (asked.temperature, asked.seed, asked.stop) == (0.0, None, ("END",))


def test_tokens_that_the_student_saves_are_counted(run: Path) -> None:
    data = compare(run).data
    prompt = 9
    assert data["systems"]["teacher"]["tokens"]["prompt_mean"] == prompt + 1
    assert data["systems"]["student"]["tokens"] == {
        "prompt_mean": 1.0,
        "cached_mean": 0.0,
        "response_mean": 4.0,
    }
    assert data["prompt_tokens_saved"] == {"per_query": prompt, "ratio": prompt + 1}


def test_differences_are_of_the_student_to_each_other_system(run: Path) -> None:
    differences = compare(run).data["differences"]
    assert set(differences["student-base"]) == {"accuracy", "macro_f1", "answered", "agreement"}
    assert set(differences["student-teacher"]) == {"accuracy", "macro_f1", "answered"}
    accuracy = differences["student-teacher"]["accuracy"]
    assert accuracy["value"] == pytest.approx(1 / 8)
    assert accuracy["low"] <= 1 / 8 <= accuracy["high"]
    for number in (number for pair in differences.values() for number in pair.values()):
        assert number["low"] < number["high"]


def test_recall_is_given_for_each_label(run: Path) -> None:
    assert compare(run).data["labels"] == {
        "blue": {"n": 4, "base": 0.0, "teacher": 0.75, "student": 0.75},
        "red": {"n": 4, "base": 0.0, "teacher": 0.75, "student": 1.0},
    }


def test_a_second_measure_asks_nothing(run: Path) -> None:
    first = compare(run)
    again = {"student": student(), "teacher": teacher(), "base": base()}
    second = compare(run, **again)
    assert second.data == first.data
    assert [len(system.asked) for system in again.values()] == [0, 0, 0]


def test_without_its_report_a_second_measure_only_times(run: Path) -> None:
    first = compare(run)
    first.path.unlink()
    again = {"student": student(), "teacher": teacher(), "base": base()}
    second = compare(run, **again)
    timed = len(TEST) + 1
    assert [len(system.asked) for system in again.values()] == [timed, 2 * timed, timed]
    assert values(second, "student") == values(first, "student")


def test_another_student_is_measured_anew(run: Path) -> None:
    compare(run)
    other = Lexicon("other", {query: f"It is {row[0]}." for query, row in ALL.items()})
    assert values(compare(run, student=other), "student")["accuracy"] == 1.0


def test_no_two_uncached_prompts_begin_alike(run: Path) -> None:
    asked = teacher()
    compare(run, teacher=asked)
    timed = asked.asked[-2 * (len(TEST) + 1) :]
    uncached = timed[1::2]  # asked in turns with the prompt as it is
    begins = [messages[0]["content"].splitlines()[0] for messages, _ in uncached]
    assert len(set(begins)) == len(begins)
    assert all(messages[0]["content"].endswith("NAME.") for messages, _ in uncached)


def test_a_prompt_with_the_query_in_it_can_be_made_uncacheable_too() -> None:
    messages: list[Message] = [{"role": "user", "content": "Which colour is a rose?"}]
    [changed] = uncacheable(messages)
    assert changed["role"] == "user"
    assert changed["content"].split("\n")[1] == "Which colour is a rose?"
    assert messages[0]["content"] == "Which colour is a rose?"


def test_a_failed_row_leaves_no_report_and_is_asked_again(run: Path) -> None:
    failing = student()
    failing.failing = {"sea"}
    with pytest.raises(GenerationError, match="1 of 8 rows of the student failed.*'sea'.*busy"):
        compare(run, student=failing)
    assert not (run / "report.json").exists()
    mended = student()
    report = compare(run, student=mended)
    assert report.data["n"] == 8
    asked = [messages[-1]["content"] for messages, _ in mended.asked]
    assert asked[0] == "sea"
    assert len(asked) == 1 + len(TEST) + 1


def test_a_request_that_fails_while_timing_says_so(run: Path) -> None:
    compare(run).path.unlink()
    failing = base()
    failing.failing = {"rose"}
    with pytest.raises(GenerationError, match="failed while timing the base: busy"):
        compare(run, base=failing)


def test_without_references_accuracy_is_left_out_and_the_report_says_so(tmp_path: Path) -> None:
    report = compare(make_run(tmp_path, references=False))
    assert values(report, "student") == {"answered": 1.0, "agreement": 6 / 8}
    assert report.data["labels"] == {}
    text = report.path.with_suffix(".md").read_text()
    assert "No row has a reference label, so accuracy, macro_f1 are left out." in text


def test_a_limit_takes_the_first_rows(run: Path) -> None:
    assert compare(run, settings=MeasureSettings(limit=3)).data["n"] == 3


def test_another_split_has_files_of_its_own(run: Path) -> None:
    compare(run)
    edge = compare(run, settings=MeasureSettings("edge"))
    assert edge.path == run / "report-edge.json"
    assert (edge.data["split"], edge.data["n"]) == ("edge", 1)
    assert json.loads((run / "report.json").read_text())["split"] == "test"
    assert (run / "report-edge.md").is_file()


def test_an_unknown_split_lists_those_found(run: Path) -> None:
    with pytest.raises(DatasetError, match=r"'tset'; found \['edge', 'test', 'train'\]"):
        compare(run, settings=MeasureSettings("tset"))


def test_a_release_without_its_recipe_is_refused(run: Path) -> None:
    shutil.rmtree(run / "release" / "recipe")
    with pytest.raises(DatasetError, match="no recipe: expected recipe/recipe.yaml"):
        compare(run)


def test_a_folder_that_is_no_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no release: expected a folder with manifest.json"):
        measure(tmp_path, student=student(), out=tmp_path)


def test_an_unknown_metric_is_refused_before_anything_is_asked(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="Did you mean 'accuracy'"):
        make_run(tmp_path, changes="metrics: [acuracy]\n")
    assert not (tmp_path / "run").exists()


def test_a_runs_folder_stands_for_its_release(run: Path) -> None:
    report = measure(run, student=student(), teacher=teacher(), base=base(), out=run)
    assert report.data["dataset"]["path"] == str(run / "release")


def test_a_tutorials_rejected_rows_are_measured_though_they_only_say_train(tmp_path: Path) -> None:
    run = make_run(tmp_path, forced=False, changes="split: {same_rows: true}\n")
    report = compare(run)
    assert sorted(row["query"] for row in report.data["rows"]) == sorted(ALL)


def test_markdown_shows_the_comparison_costs_labels_and_rows(run: Path) -> None:
    text = compare(run).path.with_suffix(".md").read_text()
    for part in (
        "| teacher | yes | 0.750 [",
        "- `teacher`: teacher\n",
        "Prompt tokens a query: teacher 10.0 - student 1.0 = 9.0 saved",
        "first 8 rows, 32 requests in all, one request at a time",
        "    blue   4     0.000  0.750    0.750",
        "    blue      -        -     red      plum",
    ):
        assert text.count(part) == 1


def test_a_student_that_does_not_say_its_base_needs_one(run: Path) -> None:
    with pytest.raises(ModelError, match="Name the untrained model with `base`"):
        compare(run, base=None)


def test_the_table_shows_systems_differences_and_every_row(run: Path) -> None:
    lines = compare(run).table().splitlines()
    lines = lines[next(row for row, line in enumerate(lines) if line.startswith("system")) :]
    assert lines[0].split()[:6] == [
        "system", "prompt", "accuracy", "macro_f1", "answered", "agreement",
    ]  # fmt: skip
    assert lines[3].startswith("student  no      0.875 [0.")
    assert "teacher 10.0 - student 1.0 = 9.0 saved, 10.0 times fewer." in "\n".join(lines)
    assert any(
        line.startswith("student - teacher: accuracy +0.125 [-0.281, +0.503]") for line in lines
    )
    assert "blue      -        -     red      plum" in lines


def test_measuring_works_inside_a_running_event_loop(run: Path) -> None:
    async def main() -> Report:
        return compare(run)

    assert asyncio.run(main()).data["n"] == len(TEST)


class Opener:
    """Stands in for `open_sampler`."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, str | None]] = []

    def __call__(
        self, reference: str | Path, *, renderer: str | None = None, **how: bool
    ) -> Lexicon:
        self.opened.append((str(reference), renderer))
        if Path(reference).is_dir():
            return student()
        return teacher() if reference == "teacher" else base()


@pytest.fixture
def trained(run: Path) -> Path:
    """A run's folder with the traces of a training."""
    folder = run / "train"
    folder.mkdir()
    config = {"student": "untrained", "renderer": "plain", "dataset": {"revision": "abc"}}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        {"name": "step-1", "step": 1, "sampler": "tinker://1/sampler_weights/1", "best": True},
        {"name": "step-2", "step": 2, "sampler": "tinker://1/sampler_weights/2", "best": True},
        {"name": "final", "step": 3, "sampler": "tinker://1/sampler_weights/3", "best": False},
    ]
    checkpoint = {"state": "tinker://1/weights/1", "validation_loss": 0.5, "final": False}
    text = "".join(json.dumps({**checkpoint, **line}) + "\n" for line in lines)
    (folder / "checkpoints.jsonl").write_text(text)
    return run


def test_a_training_folder_says_what_to_open_and_the_student_comes_first(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener = Opener()
    monkeypatch.setattr("distill_datasets.models.references.open_sampler", opener)
    report = measure(trained, student=trained, out=trained)
    assert opener.opened == [
        (str(trained / "train"), None),
        ("teacher", None),
        ("untrained", "plain"),
    ]
    assert report.data["systems"]["student"]["model"] == "tinker://1/sampler_weights/2"


def test_a_training_folder_gets_a_model_card_with_its_best_checkpoint(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill_datasets.models.references.open_sampler", Opener())
    measure(trained, student=trained / "train", out=trained)
    card = (trained / "model_card.md").read_text()
    assert "tinker://1/sampler_weights/2" in card
    assert "0.875 [0." in card


def test_what_speaks_against_a_training_is_in_the_first_lines(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill_datasets.models.references.open_sampler", Opener())
    lines = [{"step": step, "validation_loss": 1.0 + step} for step in range(3)]
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (trained / "train" / "metrics.jsonl").write_text(text)
    report = measure(trained, student=trained, out=trained)
    assert "no better than the student before training" in report.data["alerts"][0]
    assert report.data["alerts"][0] in (trained / "report.md").read_text()


def test_a_later_checkpoint_makes_a_new_report(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill_datasets.models.references.open_sampler", Opener())
    measure(trained, student=trained, out=trained)
    file = trained / "train" / "checkpoints.jsonl"
    file.write_text(
        file.read_text().replace("false}", "true}").replace('"best": false', '"best": true')
    )
    report = measure(trained, student=trained, out=trained)
    assert report.data["systems"]["student"]["model"] == "tinker://1/sampler_weights/3"


def test_an_unfinished_training_is_refused(trained: Path) -> None:
    (trained / "train" / "checkpoints.jsonl").write_text("")
    with pytest.raises(ModelError, match="no finished checkpoint"):
        measure(trained, student=trained, out=trained)


def test_a_report_has_none_where_a_system_can_not_score(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert compare(run).data["internalisation"] is None


def test_what_is_asked_is_said_before(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(run).path.unlink()

    def counts(said: str) -> dict[str, str]:
        return dict(re.findall(r"measure: (\w+): (\d+ of \d+) requests", said))

    first = {"base": "8 of 8", "teacher": "0 of 8", "student": "8 of 8"}
    assert counts(capsys.readouterr().err) == first
    compare(run, student=Lexicon("other", {}))
    said = capsys.readouterr().err
    assert counts(said) == {**first, "base": "0 of 8"}
    assert "at most 36 requests time some of them." in said


@pytest.mark.parametrize("said", ["It is red.", "hm"])
def test_a_student_that_says_one_thing_is_seen_first(said: str, run: Path) -> None:
    report = compare(run, student=Lexicon("stuck", dict.fromkeys(ALL, said)))
    first = report.table().splitlines()[0]
    assert first.startswith("Collapsed student: it says the same for 100% of the queries")
    assert repr(said) in first and "The teacher gives 3 different answers" in first
    assert report.data["alerts"][0] == report.data["summary"][0] == first
    text = report.path.with_suffix(".md").read_text()
    assert text.splitlines()[2] == f"- {first}"
    assert report.data["systems"]["student"]["answers"] == {
        "distinct": 1,
        "commonest": "red" if "red" in said else None,
        "commonest_share": 1.0,
    }
    assert report.data["texts"]["student"]["commonest"] == said


def test_a_student_that_varies_is_not_warned_of(run: Path) -> None:
    report = compare(run)
    assert report.data["alerts"] == []
    assert report.data["systems"]["teacher"]["answers"] == {
        "distinct": 3,
        "commonest": "blue",
        "commonest_share": 0.5,
    }


def test_a_teacher_that_says_one_thing_is_called_that(run: Path) -> None:
    stuck = Lexicon("stuck", dict.fromkeys(ALL, "colour: red"))
    student = Lexicon("same", dict.fromkeys(ALL, "It is red."))
    first, *_ = compare(run, student=student, teacher=stuck).data["alerts"]
    assert first.startswith("The teacher answers one thing")


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        ({query: query for query in ALL}, "Copies the query"),
        ({query: f"{row[0]}, I'd say" for query, row in ALL.items()}, "Right labels in a wrong"),
        ({query: f"I can't help here with {query}" for query in ALL}, "Collapsed student"),
    ],
)
def test_what_is_wrong_with_a_student_is_said_by_its_name_in_the_first_line(
    texts: dict[str, str], name: str, run: Path
) -> None:
    report = compare(run, student=Lexicon("odd", texts))
    assert report.data["summary"][0].startswith(name)
    assert report.table().splitlines()[0].startswith(name)
    assert (run / "report.md").read_text().splitlines()[2].startswith(f"- {name}")


def test_a_student_that_is_better_than_its_teacher_is_called_that(run: Path) -> None:
    wrong = {"red": "blue", "blue": "red"}
    worse = {query: f"colour: {wrong[row[0]]}" for query, row in ALL.items()}
    better = {query: f"It is {row[0]}." for query, row in ALL.items()}
    report = compare(run, student=Lexicon("able", better), teacher=Lexicon("poor", worse))
    assert report.data["summary"][0].startswith("Better than the teacher: the student's accuracy")


def test_the_verdict_stands_before_the_systems_and_names_the_rows_of_one_alone(run: Path) -> None:
    report = compare(run)
    verdict = report.data["verdict"]
    assert (verdict["outcome"], verdict["metric"], verdict["margin"]) == (
        "not enough evidence",
        "accuracy",
        0.02,
    )
    assert verdict["difference"]["value"] == 1 / 8
    rows = {row["id"]: row["query"] for row in report.rows()}
    assert [rows[one] for one in verdict["only_student"]] == ["rust"]
    assert verdict["only_teacher"] == []
    lines = report.table().splitlines()
    assert lines[0].startswith("Verdict: not enough evidence: about ")
    assert "Verdict: not enough" in (run / "report.md").read_text().splitlines()[2]


def test_another_margin_is_another_verdict(run: Path) -> None:
    first = compare(run)
    edit(run / "release/recipe", "recipe.yaml", "name: colours", "name: colours\nmargin: 0.5")
    edit(run / "release", "manifest.json", '"sha256"', '"digests"')
    second = compare(run)
    assert first.data["digest"] != second.data["digest"]
    assert second.data["verdict"]["outcome"] == "replaces the prompt"


def own_metric(folder: Path, body: str) -> str:
    path = folder / "own.py"
    path.write_text(f"def mean_length(predictions, references):\n    {body}\n")
    return f"{path}:mean_length"


def test_a_metric_of_the_users_own_is_in_the_report(run: Path, tmp_path: Path) -> None:
    named = own_metric(tmp_path, "return sum(map(len, predictions)) / len(predictions)")
    report = compare(run, settings=MeasureSettings(metrics=(named,)))
    found = values(report, "student")
    assert found["mean_length"] == pytest.approx((5 * 3 + 3 * 4) / 8)
    assert any("mean_length" in line for line in report.table().splitlines() if "system" in line)
    assert "mean_length" in report.data["differences"]["student-base"]
    # The base never answers: its lengths don't vary, and nobody knows what others there are.
    assert report.data["systems"]["base"]["metrics"]["mean_length"] == {"value": 0.0}
    text = report.path.with_suffix(".md").read_text()
    assert "mean_length" in text and "nan" not in text.lower()
    json.loads(report.path.read_text(), parse_constant=pytest.fail)


def test_a_changed_metric_makes_a_new_report_without_asking(run: Path, tmp_path: Path) -> None:
    settings = MeasureSettings(metrics=(own_metric(tmp_path, "return 1.0"),))
    compare(run, settings=settings)
    own_metric(tmp_path, "return 2.0")
    again = student()
    assert values(compare(run, settings=settings, student=again), "student")["mean_length"] == 2.0
    assert len(again.asked) == len(TEST) + 1  # the timing


def test_a_metric_that_fails_is_refused_before_anything_is_asked(run: Path, tmp_path: Path) -> None:
    asked = [teacher(), student(), base()]
    settings = MeasureSettings(metrics=(own_metric(tmp_path, "return sum(predictions)"),))
    with pytest.raises(SettingsError, match="'mean_length' can't compare these texts: TypeError"):
        compare(run, teacher=asked[0], student=asked[1], base=asked[2], settings=settings)
    assert [one.asked for one in asked] == [[], [], []]


@pytest.mark.parametrize(
    "manifest",
    [b"", b"{", b"[]", b"7", b"{}", b"\xff\xfe", b'{"splits": 3}', b"null"],
)
def test_a_torn_or_foreign_manifest_is_named(manifest: bytes, run: Path) -> None:
    whole = json.loads((run / "release" / "manifest.json").read_text())
    if manifest == b'{"splits": 3}':
        manifest = json.dumps({**whole, "splits": 3}).encode()
    (run / "release" / "manifest.json").write_bytes(manifest)
    with pytest.raises(DatasetError, match="manifest.json"):
        compare(run)


def test_a_manifest_without_a_teacher_is_measured_with_a_named_one(run: Path) -> None:
    path = run / "release" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["teacher"]
    path.write_text(json.dumps(manifest))
    assert compare(run).data["n"] == len(TEST)
    with pytest.raises(DatasetError, match="doesn't name its teacher: name it with `teacher`"):
        compare(run, teacher=None)


def rewrite(release: Path, change: Any) -> None:
    """Change the test split's table."""
    from pyarrow.parquet import read_table, write_table

    (path,) = (release / "data").glob("test-*.parquet")
    write_table(change(read_table(path)), path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda table: table.drop_columns(["reference", "group"]),
            r"lacks the columns \['group', ",
        ),
        (lambda table: table.set_column(1, "query", [list(range(len(table)))]), "'query'.*holds 0"),
        (lambda table: table.set_column(1, "query", [[None] * len(table)]), "'query'.*holds None"),
    ],
)
def test_data_that_publish_did_not_write_is_named(change: Any, why: str, run: Path) -> None:
    rewrite(run / "release", change)
    edit(run / "release", "manifest.json", '"sha256"', '"digests"')
    asked = student()
    with pytest.raises(DatasetError, match=why):
        compare(run, student=asked)
    assert asked.asked == []


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1 and more that is no Parquet PAR1"])
def test_a_damaged_file_of_the_data_is_named(content: bytes, run: Path) -> None:
    (path,) = (run / "release" / "data").glob("test-*.parquet")
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"test-.*parquet' has other content"):
        compare(run)
    edit(run / "release", "manifest.json", '"sha256"', '"digests"')
    with pytest.raises(DatasetError, match=r"test-.*parquet' can't be read"):
        compare(run)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"digest": 3}'])
def test_a_torn_report_is_written_again(content: str, run: Path) -> None:
    path = compare(run).path
    path.write_text(content)
    assert compare(run).data["n"] == json.loads(path.read_text())["n"] == len(TEST)


def test_tokens_that_no_server_counts_are_unknown() -> None:
    from datasets import Dataset

    rows = {"answer": ["a"], "reference": ["a"], "group": ["g"], "query": ["q"]}
    kinds = {"prompt": [None], "cached": [0], "response": [3]}
    counts = {f"teacher_{kind}_tokens": counted for kind, counted in kinds.items()}
    answers = {"teacher": Dataset.from_dict(rows | counts)}
    found = Comparison(answers, Metrics({}), any_recipe()).tokens("teacher")
    assert found == {"prompt_mean": None, "cached_mean": 0.0, "response_mean": 3.0}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", ""),
        ("config.json", "[]"),
        ("config.json", '{"student": "pocket"}'),
        ("config.json", '{"student": 7, "renderer": "plain"}'),
        ("checkpoints.jsonl", "{\n"),
        ("checkpoints.jsonl", '{"name": "final"}\n'),
        ("checkpoints.jsonl", '{"best": true, "sampler": null}\n'),
        ("checkpoints.jsonl", "7\n"),
    ],
)
def test_a_damaged_training_folder_is_named_before_anything_is_asked(
    name: str, content: str, trained: Path
) -> None:
    (trained / "train" / name).write_text(content)
    asked = teacher()
    with pytest.raises(ModelError, match=r"(damaged|no finished checkpoint): run `train` again"):
        measure(trained, student=trained, teacher=asked, out=trained)
    assert asked.asked == []


@pytest.mark.parametrize("student", ["no/such/folder", "embedded", "tinker:", ""])
def test_a_student_that_is_none_is_refused_before_anything_is_asked(
    student: str, run: Path
) -> None:
    asked = teacher()
    with pytest.raises(ModelError):
        compare(run, student=student, teacher=asked)
    assert asked.asked == []


def test_an_empty_folder_is_no_student(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty"):
        compare(run, student=tmp_path / "empty")


@pytest.mark.parametrize("split", ["../../x", "a/b", "", ".", "..", "*", "x\n", "[a-z]"])
def test_a_split_of_somebody_elses_names_no_file_elsewhere(split: str, run: Path) -> None:
    with pytest.raises(DatasetError, match="A split can't be named"):
        compare(run, settings=MeasureSettings(split))


CHECKS = """\
checks:
  - {name: brief, words: {max: 2}, covers: Say it in two words}
  - {name: no_red, when: blue, never: red}
  - {name: idle, when: violet, ends: true}
keep: [brief]
"""


def test_checks_are_measured_of_every_system_and_shown_in_a_table_of_their_own(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path, changes=CHECKS)
    report = compare(run)
    checks = {name: system["checks"] for name, system in report.data["systems"].items()}
    # Of the teacher only "no idea" has more than two words: "colour: no idea".
    assert checks["teacher"]["brief"]["value"] == 7 / 8
    assert checks["student"]["brief"]["value"] == 0.0
    assert checks["student"]["no_red"] == {
        **checks["student"]["no_red"],
        **{"value": 0.75, "rows": 4},
    }
    assert report.data["check_differences"]["student-teacher"]["brief"]["value"] == -7 / 8
    assert report.data["checks"]["brief"] == {
        "demands": 'words: {"max": 2}',
        "covers": "Say it in two words",
    }
    (line,) = [line for line in report.table().splitlines() if line.startswith("brief ")]
    assert line.split()[:2] == ["brief", "8"] and line.endswith("Say it in two words")
    text = report.path.with_suffix(".md").read_text()
    assert "| `brief` | 8 | 0.000 [" in text
    assert "- `brief`: Say it in two words" in text
    assert "| `no_red` | 4 |" in text
    assert '- `no_red`: `never: ["red"]`' in text
    assert "These checks apply to no row here: idle." in text


def test_other_checks_are_another_report(tmp_path: Path) -> None:
    run = make_run(tmp_path, changes=CHECKS)
    first = compare(run)
    edit(run / "release/recipe", "recipe.yaml", "max: 2", "max: 3")
    edit(run / "release", "manifest.json", '"sha256"', '"digests"')
    assert compare(run).data["digest"] != first.data["digest"]

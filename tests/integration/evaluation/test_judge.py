import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.cli.main import main
from distill_datasets.errors import DatasetError, GenerationError, SettingsError
from distill_datasets.evaluation.report import Report, measure
from distill_datasets.evaluation.settings import MeasureSettings
from distill_datasets.models.sampler import Reply, Sample, Sampling, Usage
from distill_datasets.schema import Message
from tests.integration.evaluation.test_report import TEST, base, make_run, student, teacher


class Critic:
    """Finds that answers about red are better."""

    model = identity = "critic"

    def __init__(self) -> None:
        self.asked = 0

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        self.asked += 1
        texts = re.findall(r"<answer.*?>\n(.*?)\n</", messages[-1]["content"], re.DOTALL)
        good = ["red" in text for text in texts]
        names = ("relevance", "completeness", "clarity")
        said = "\n".join(f"{name}: {9 if good[0] else 4}" for name in names)
        if len(texts) == 2:
            said = f"better: {'tie' if good[0] == good[1] else 'A' if good[0] else 'B'}"
        return Reply((Sample(said, "stop", 9),), Usage(70, 0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made"))


def compare(run: Path, **options: Any) -> Report:
    settings = MeasureSettings(latency=False, **options.pop("settings", {}))
    given = {"student": student(), "teacher": teacher(), "base": base(), "out": run, **options}
    return measure(run / "release", settings=settings, **given)


def test_a_judges_opinions_are_in_every_form_of_the_report(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    critic = Critic()
    report = compare(run, judge=critic)
    found = report.data["judge"]
    # The teacher's words are the responses that the student learns, not the form it is asked for:
    # "rust" and "plum", which it can't read, are all that differ.
    assert found["preference"] | {"difference": 0, "p": 0} == {
        "student": 2,
        "teacher": 0,
        "ties": 6,
        "equal": 6,
        "flipped": 0,
        "unread": 0,
        "difference": 0,
        "p": 0,
    }
    assert found["scores"]["student"]["clarity"]["value"] == pytest.approx((5 * 9 + 3 * 4) / 8)
    assert found["n"] == len(TEST)
    said = capsys.readouterr().err
    assert f"at most {8 * 5} requests go to the judge" in said
    assert f"judge: asks critic {critic.asked} of {critic.asked} requests" in said
    assert "Judge: critic, by quality, uncorrected." in report.table()
    for name in ("report.md", "report.html"):
        assert "uncorrected" in (run / name).read_text()
    assert json.loads((run / "report.json").read_text())["judge"] == found


def test_a_second_measure_asks_the_judge_nothing(run: Path) -> None:
    compare(run, judge=Critic())
    critic = Critic()
    compare(run, judge=critic)
    labels = run / "labels.csv"
    labels.write_text("query,label\nrust,better\nplum,better\n")
    found = compare(run, judge=critic, settings={"judge_labels": labels}).data["judge"]
    assert critic.asked == 0
    assert not found["corrected"] and "both kinds are needed" in found["labels"]["why"]


def test_a_judge_that_fails_leaves_the_report_and_is_asked_again(run: Path, tmp_path: Path) -> None:
    def refuse(messages: Sequence[Message], sampling: Sampling) -> None:
        raise RuntimeError("busy")

    critic, out = Critic(), tmp_path / "out"
    critic.sample = refuse  # type: ignore[method-assign,assignment]
    with pytest.raises(GenerationError, match="judge critic: .*requests failed.*busy"):
        compare(run, judge=critic, out=out)
    assert "judge" not in Report.read(out).data
    assert compare(run, judge=Critic(), out=out).data["judge"]["n"] == len(TEST)


def test_what_a_judge_was_paid_is_in_the_report_whatever_it_said(run: Path, tmp_path: Path) -> None:
    prices, out = tmp_path / "prices.yaml", tmp_path / "out"
    models = "".join(f"  {name}: {{prompt: 1, response: 1}}\n" for name in ("critic", "base"))
    prices.write_text(f"date: 2026-11-01\ncurrency: USD\nmodels:\n{models}")
    paid = [compare(run, out=out, settings={"prices": prices}).data["spent"]["amount"]]
    with pytest.raises(GenerationError, match="holds a score that can be read"):
        compare(run, out=out, judge=base("critic"), settings={"prices": prices})
    paid.append(Report.read(out).data["spent"]["amount"])
    assert paid[1] > 2 * paid[0] > 0
    critic = Critic()
    critic.identity = "critic/2"  # which the price of "critic" is of too
    again = compare(run, out=out, judge=critic, settings={"prices": prices})
    assert again.data["spent"]["amount"] > paid[1]


def test_what_is_wrong_is_said_before_anything_is_asked(run: Path) -> None:
    critic, labels = Critic(), run / "others.csv"
    labels.write_text("query,label\ngrass,good\n")
    with pytest.raises(DatasetError, match="None of the 1 labels is of a row that is judged"):
        compare(run, judge=critic, settings={"judge_labels": labels})
    with pytest.raises(SettingsError, match="no rubric 'nice'"):
        compare(run, judge=critic, settings={"rubrics": ("nice",)})
    with pytest.raises(SettingsError, match="Rubrics and labels are for a judge"):
        compare(run, settings={"rubrics": ("quality",)})
    assert critic.asked == 0


def test_the_command_line_names_the_judge_and_its_rubrics(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [f"--{name}=pocket" for name in ("student", "teacher", "base", "judge")]
    assert main(["measure", str(run), *models, "--rubric", "nice"]) != 0
    assert "There is no rubric 'nice'" in capsys.readouterr().err

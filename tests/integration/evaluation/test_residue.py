"""Students that fail the tests of residue on purpose, and ones that pass them."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.errors import BudgetReached, PriceError, SettingsError
from distill_datasets.evaluation.gate import GateRules, gate
from distill_datasets.evaluation.residue import TESTS
from distill_datasets.evaluation.settings import MeasureSettings
from distill_datasets.models.sampler import Reply, Sample, Sampling, Usage
from distill_datasets.schema import Message
from tests.integration.evaluation.test_report import ALL, base, compare, make_run, student

ASKED = MeasureSettings(residue=True, latency=False, internalisation=False)
PROMPT = "Name the colour of the thing. Say: colour: NAME."
OBEYED = {
    "YES": "NO",
    "OVER": "All is well. OVER",
    "JSON": '{"reply": "spring"}',
    "bullet": "- one\n- two\n- three",
    "Ahoy": "Ahoy, at seven",
    "capital letters only": "NORTH",
}


class Speaker:
    """Answers its own queries by a table whatever their spelling, and others by a function.

    One that is `obedient` does what another system prompt says.
    """

    def __init__(self, model: str, other: Any, *, obedient: bool = False) -> None:
        self.model = self.identity = model
        self.other, self.obedient = other, obedient
        self.requests = 0

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        self.requests += 1
        query = messages[-1]["content"]
        known = {query: f"It is {row[2]}." for query, row in ALL.items()}
        near = [text for own, text in known.items() if sorted(own)[:2] == sorted(query)[:2]]
        first = messages[0]["content"] if self.obedient else ""
        obeyed = [text for word, text in OBEYED.items() if word in first and len(messages) > 1]
        text = (
            obeyed[0]
            if obeyed
            else known.get(query) or (near[0] if near and len(query) < 8 else self.other(query))
        )
        return Reply((Sample(text, "stop", 5),), Usage(10, 0))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def knows(query: str) -> str:
    """Passes a good share of the checks on general questions."""
    words = ["Paris 42 ananab Mercury red blue 366 Guten Morgen worm carbon dioxide iron cold"]
    return (
        f"{words[0]} 10 Africa mice yes six Shakespeare print( q-u-e-u-e scatter OVER Ahoy {query}"
    )


def residue_of(run: Path, **systems: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = compare(run, settings=ASKED, **systems).data["residue"]
    assert [*found] == [*TESTS]
    return found


def test_a_student_that_tells_its_prompt_fails_and_is_quoted(run: Path) -> None:
    teller = Speaker("teller", lambda query: f"My rules: {PROMPT}")
    found = residue_of(run, student=teller)["leak"]
    assert (found["passed"], found["value"], found["base"]["value"]) == (False, 1.0, 0.0)
    assert "name the colour of the thing" in found["said"]
    assert found["examples"][0]["student"] == f"My rules: {PROMPT}"
    assert residue_of(run, student=student())["leak"]["passed"] is True


def test_a_student_that_does_its_task_everywhere_has_forgotten_the_rest(run: Path) -> None:
    narrow = Speaker("narrow", lambda query: "It is red.")
    found = residue_of(run, student=narrow, base=Speaker("wide", knows, obedient=True))
    assert (found["scope"]["passed"], found["scope"]["value"]) == (False, 1.0)
    assert (found["general"]["passed"], found["general"]["value"] < 0.1) == (False, True)
    assert found["general"]["base"]["value"] > 0.5
    assert found["other_prompt"]["passed"] is False
    assert found["typing_errors"]["passed"] is True
    failed = [one.rule for one in gate(run, rules=GateRules(residue="all")).findings if one.bad]
    assert {"residue scope", "residue general", "residue other_prompt"} <= {*failed}


def test_a_student_that_kept_what_the_base_knew_passes(run: Path) -> None:
    kept, wide = Speaker("kept", knows), Speaker("wide", knows)
    found = residue_of(run, student=kept, base=wide)
    assert found["scope"]["passed"] is found["general"]["passed"] is True


def test_without_a_base_what_it_forgot_is_not_told(run: Path) -> None:
    settings = MeasureSettings(
        residue=True, latency=False, internalisation=False, systems=("teacher", "student")
    )
    found = compare(run, settings=settings).data["residue"]
    assert found["general"]["passed"] is found["other_prompt"]["passed"] is None
    assert found["general"]["base"] is None
    assert found["leak"]["passed"] is True


def test_what_is_asked_is_said_first_and_never_asked_again(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = MeasureSettings(latency=False, internalisation=False)
    speaker, other = Speaker("a", knows), base()
    before = compare(run, settings=plain, student=speaker, base=other)
    assert "residue" not in before.data
    asked = speaker.requests
    after = compare(run, settings=ASKED, student=speaker, base=other)
    assert "measure: residue asks student, base: " in capsys.readouterr().err
    assert speaker.requests > asked
    assert {**after.data, "summary": 0} == {**before.data, **after.data, "summary": 0}
    asked = speaker.requests
    assert compare(run, settings=ASKED, student=speaker, base=other).data == after.data
    (run / "report.json").unlink()
    compare(run, settings=ASKED, student=speaker, base=other)
    assert speaker.requests == asked
    assert "residue asks student, base: 0 of " in capsys.readouterr().err
    assert "## Residue of the prompt" in (run / "report.md").read_text()
    assert "Residue of the prompt</h2>" in (run / "report.html").read_text()


class Rewriter(Speaker):
    """A teacher that says queries in other words, the letters of the first two kept."""

    def __init__(self, model: str = "teacher") -> None:
        super().__init__(model, lambda query: query)

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        asked = messages[-1]["content"]
        if "---" not in asked:
            return await super().sample(messages, sampling)
        self.requests += 1
        text = asked.split("---")[1].strip()
        other = text if len(text) > 8 else f"{text[1]}{text[0]} it"
        return Reply((Sample(other, "stop", 5),), Usage(10, 0))


def test_a_models_other_words_are_asked_for_once_and_of_everybody(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(ASKED, paraphraser="teacher", concurrency=2)
    teacher = Rewriter()
    found = compare(run, settings=settings, teacher=teacher).data["residue"]["paraphrase"]
    said = capsys.readouterr().err
    assert "residue asks teacher for paraphrases: " in said
    assert "asked of student, base and teacher" in said
    assert found["passed"] is not None and "the teacher's" in found["said"]
    asked = teacher.requests
    (run / "report.json").unlink()
    again = compare(run, settings=settings, teacher=teacher).data["residue"]["paraphrase"]
    assert (again, teacher.requests) == (found, asked)


def test_a_paraphraser_that_is_named_later_adds_its_test(run: Path) -> None:
    teacher = Rewriter()
    before = compare(run, settings=ASKED, teacher=teacher).data["residue"]
    assert (
        before["paraphrase"]["passed"] is None and "--paraphraser" in before["paraphrase"]["said"]
    )
    named = dataclasses.replace(ASKED, paraphraser="teacher")
    after = compare(run, settings=named, teacher=teacher).data["residue"]
    assert after["paraphrase"]["passed"] is not None
    assert after["leak"] == before["leak"]


def writing(monkeypatch: pytest.MonkeyPatch, *writers: Speaker) -> None:
    """Models that a paraphraser's name opens."""
    known = {one.model: one for one in writers}
    monkeypatch.setattr("distill_datasets.models.references.open_sampler", known.__getitem__)


def test_another_paraphraser_is_asked_once_and_the_other_tests_stay(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, mute = Rewriter("first"), Rewriter("second"), Speaker("mute", str)
    writing(monkeypatch, first, second, mute)
    speaker = Speaker("a", knows)

    def asked_by(name: str | None) -> tuple[Mapping[str, Any], list[str]]:
        settings = dataclasses.replace(ASKED, paraphraser=name)
        data = compare(run, settings=settings, teacher=Rewriter(), student=speaker).data
        said = capsys.readouterr().err.splitlines()
        return data["residue"], [one for one in said if "residue asks" in one]

    before, _ = asked_by("first")
    requests = first.requests
    assert requests > 0 and asked_by("first") == asked_by(None) == (before, [])
    after, said = asked_by("second")
    assert (second.requests, len(said)) == (requests, 2)
    assert said[1].endswith("0 texts are scored.")
    assert {**after, "paraphrase": before["paraphrase"]} == before
    # One that says nothing of use has been asked all the same.
    told, said = asked_by("mute")
    asked = speaker.requests, mute.requests
    assert told["paraphrase"]["passed"] is None and len(said) == 2
    assert asked_by("mute") == (told, []) and (speaker.requests, mute.requests) == asked


def test_tests_of_residue_outlive_a_report_that_is_made_anew(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = compare(run, settings=ASKED).data["residue"]
    assert "residue asks" in capsys.readouterr().err
    measured = dataclasses.replace(ASKED, systems=("base", "base+prompt"))
    assert compare(run, settings=measured).data["residue"] == before
    assert "residue asks" not in capsys.readouterr().err
    other = compare(run, settings=measured, student=Speaker("b", knows)).data["residue"]
    assert other["general"]["value"] > before["general"]["value"]


def test_a_paraphraser_without_the_tests_is_refused() -> None:
    with pytest.raises(SettingsError, match="--residue"):
        MeasureSettings(paraphraser="teacher")


def priced(folder: Path, *names: str) -> Path:
    models = "".join(f"  {name}: {{prompt: 1, response: 1}}\n" for name in names)
    (folder / "prices.yaml").write_text(f"date: 2026-11-01\ncurrency: USD\nmodels:\n{models}")
    return folder / "prices.yaml"


def test_the_tests_of_an_earlier_report_cost_what_their_systems_do(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = priced(tmp_path, "base", "student")
    settings = MeasureSettings(latency=False, internalisation=False, prices=prices)
    assert "residue" not in compare(run, settings=settings).data
    spent = compare(run, settings=settings).data["spent"]["amount"]
    found = compare(run, settings=dataclasses.replace(settings, residue=True)).data
    assert "leak" in found["residue"] and found["spent"]["amount"] > spent
    asked = next(one for one in capsys.readouterr().err.splitlines() if "residue asks" in one)
    assert "at most 0." in asked and "USD" in asked


def test_systems_without_a_price_are_tested_and_not_counted(run: Path, tmp_path: Path) -> None:
    prices = priced(tmp_path, "teacher")
    settings = dataclasses.replace(ASKED, prices=prices)
    assert "leak" in compare(run, settings=settings).data["residue"]


def test_what_has_a_price_is_counted_whatever_another_lacks(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Rewriter("writer")
    writing(monkeypatch, writer)
    prices = priced(tmp_path, "base", "student", "teacher")
    settings = dataclasses.replace(ASKED, prices=prices, paraphraser="writer")
    plain = compare(
        run, settings=MeasureSettings(latency=False, internalisation=False, prices=prices)
    ).data["spent"]
    found = compare(run, settings=settings, teacher=Rewriter()).data
    assert writer.requests > 0 and found["spent"]["amount"] > 2 * plain["amount"]


def test_a_budget_is_refused_before_anything_is_asked_of_a_model_without_a_price(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, speaker = Rewriter("writer"), Speaker("student", knows)
    writing(monkeypatch, writer)
    prices = priced(tmp_path, "base", "student", "teacher")
    settings = dataclasses.replace(ASKED, prices=prices, budget=1.0, paraphraser="writer")
    with pytest.raises(PriceError, match="no price for the paraphraser, 'writer'"):
        compare(run, settings=settings, student=speaker)
    settings = dataclasses.replace(ASKED, prices=prices, budget=1.0)
    with pytest.raises(PriceError, match="no price for the judge, 'critic'; it has .'base'"):
        compare(run, settings=settings, student=speaker, judge=Speaker("critic", knows))
    assert speaker.requests == writer.requests == 0


def test_a_budget_ends_the_tests_and_the_report_stays(run: Path, tmp_path: Path) -> None:
    prices = priced(tmp_path, "base", "student", "teacher")
    settings = MeasureSettings(
        residue=True, latency=False, internalisation=False, prices=prices, budget=0.0005
    )
    with pytest.raises(BudgetReached):
        compare(run, settings=settings)
    assert (run / "report.json").is_file()

"""Applications ask a proxy as they ask their model; what reaches teacher and student is theirs."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from openai import APIStatusError, BadRequestError, InternalServerError, OpenAI
from yarl import URL

from distill_datasets.cli.main import main
from distill_datasets.errors import DatasetError, OutputError, ScreeningError
from distill_datasets.evaluation.gate import GateRules
from distill_datasets.generation.pricing import Price
from distill_datasets.serving.calibration import Confidence
from distill_datasets.serving.protocol import Place as Token
from distill_datasets.serving.protocol import without_prompt
from distill_datasets.serving.proxy import Backend, Chooser, RolloutProxy
from distill_datasets.serving.rollout import (
    OFF,
    STAGES,
    Judgement,
    RolloutState,
    Stage,
    StageRules,
    harvest,
    read_lines,
)
from distill_datasets.serving.settings import RolloutSettings
from distill_datasets.serving.start import backends_of, rollout
from tests.support.forks import Process
from tests.support.openai_server import KNOWN, Answer, Fault, OpenAIServer, serving
from tests.support.recipes import any_recipe
from tests.support.releases import release_of

PROMPT = "Say which language it is, by its code, and nothing else."
ALL = (STAGES[0], Stage("all", 1.0, 1.0))
ADMIN = "an-admin-key"


class Place:
    """A proxy on a free port before two servers, in a thread of its own."""

    def __init__(self, folder: Path, student: OpenAIServer, teacher: OpenAIServer) -> None:
        self.run, self.student, self.teacher = folder, student, teacher
        self.recipe = any_recipe(prompt=PROMPT)
        self.options: dict[str, Any] = {}
        self.rules = StageRules.of(0.97, 1.0, GateRules())
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="proxy")
        self.thread.start()

    def start(self, *, stages: tuple[Stage, ...] = ALL, **options: Any) -> OpenAI:
        """A client of the proxy."""
        kept = {name: options.pop(name) for name in ("keep_texts", "automatic") if name in options}
        price = options.pop("price", None)
        self.rollout = RolloutState(
            self.run, Judgement(self.recipe, False), self.rules, stages, **kept
        )
        backends = {
            "student": Backend(URL(self.student.url), KNOWN[1], "student-key"),
            "teacher": Backend(URL(self.teacher.url), KNOWN[0], "teacher-key", price),
        }
        self.proxy = RolloutProxy(self.rollout, backends, admin_key=ADMIN, **options)
        self._do(self._listen())
        return OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0)

    async def _listen(self) -> None:
        self.runner = web.AppRunner(self.proxy.app(), access_log=None, shutdown_timeout=1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    def settle(self) -> None:
        """Wait for what is shadowed."""
        self._do(self.proxy.settle())

    def end(self) -> None:
        self._do(self.runner.cleanup())

    def close(self) -> None:
        if hasattr(self, "runner"):
            self.end()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as opened:
        student, teacher = (opened.enter_context(serving()) for _ in range(2))
        found = Place(tmp_path, student, teacher)
        opened.callback(found.close)
        yield found


def ask(client: OpenAI, text: str, **more: Any) -> str:
    made = client.chat.completions.create(
        model="mine", messages=[{"role": "user", "content": text}], **more
    )
    assert made.model == "mine"
    return made.choices[0].message.content or ""


def test_the_student_is_asked_without_the_prompt_and_the_teacher_with_it(place: Place) -> None:
    client = place.start()
    assert ask(client, "en", temperature=0.0) == "en"
    place.settle()
    (student,), (teacher,) = place.student.bodies, place.teacher.bodies
    query = {"role": "user", "content": "en"}
    assert student["messages"] == [query] and student["model"] == KNOWN[1]
    assert teacher["messages"] == [{"role": "system", "content": PROMPT}, query]
    assert student["temperature"] == teacher["temperature"] == 0.0
    assert place.student.keys == ["Bearer student-key"]
    assert place.teacher.keys == ["Bearer teacher-key"]
    assert (place.rollout.evidence.shadowed, place.rollout.evidence.agreement) == (1, 1.0)


def test_an_application_that_still_sends_the_prompt_is_understood(place: Place) -> None:
    client = place.start()
    client.chat.completions.create(
        model="mine",
        messages=[{"role": "system", "content": PROMPT}, {"role": "user", "content": "en"}],
    )
    place.settle()
    assert [one["role"] for one in place.student.bodies[0]["messages"]] == ["user"]
    assert [one["content"] for one in place.teacher.bodies[0]["messages"]] == [PROMPT, "en"]


def test_a_prompt_around_the_query_is_taken_off_again() -> None:
    recipe = any_recipe(prompt="Which language is: {query}? Its code only.")
    sent = recipe.messages("Guten Tag")
    assert without_prompt(recipe, sent) == [{"role": "user", "content": "Guten Tag"}]
    other = [{"role": "user", "content": "Guten Tag"}]
    assert without_prompt(recipe, other) == other


def test_who_is_answered_by_the_student_stays_so_when_the_share_rises(place: Place) -> None:
    place.start(stages=(STAGES[0], Stage("some", 0.3, 0.0), Stage("more", 0.6, 0.0)))
    names = [f"user {number}" for number in range(1_000)]
    some = {one for one in names if place.rollout.takes(one)}
    place.rollout.stage = place.rollout.stages[2]
    more = {one for one in names if place.rollout.takes(one)}
    assert some < more and 250 < len(some) < 350 and 550 < len(more) < 650


def test_a_user_is_answered_by_one_model(place: Place) -> None:
    client = place.start(stages=(STAGES[0], Stage("half", 0.5, 0.0)))
    for number in range(12):
        for text in ("one", "two"):
            ask(client, f"{text} {number}", user=f"user-{number}")
    seen = [{body["user"] for body in one.bodies} for one in (place.student, place.teacher)]
    assert seen[0] and seen[1] and not seen[0] & seen[1]


@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": True}, {"body": "<html>busy"}])
def test_where_the_student_fails_the_teacher_answers(place: Place, fault: dict[str, Any]) -> None:
    client = place.start()
    place.student.faults.append(Fault("en", **fault))
    assert ask(client, "en") == "en"
    assert place.teacher.asked["en"] == 1
    assert place.rollout.evidence.odd == {"failed": 1}


def test_a_student_that_is_away_fails_one_request_and_is_not_asked_for_a_while(
    place: Place,
) -> None:
    client = place.start()
    place.student.faults.append(Fault("en", status=503))
    for _ in range(20):
        assert ask(client, "en") == "en"
    assert place.rollout.evidence.odd == {"failed": 1} and place.rollout.stage.name == "all"


def test_where_the_teacher_fails_the_student_answers(place: Place) -> None:
    client = place.start(stages=(STAGES[0], Stage("none", 0.0, 0.0)))
    place.teacher.faults.append(Fault("en", status=429))
    assert ask(client, "en") == "en"
    assert place.student.asked["en"] == 1


def test_where_both_fail_the_client_reads_why_in_the_protocols_form(place: Place) -> None:
    client = place.start()
    for one in (place.student, place.teacher):
        one.faults.append(Fault("en", status=503, error={"message": "out of order"}))
    with pytest.raises(InternalServerError, match="out of order"):
        ask(client, "en")


def test_what_a_model_refuses_for_good_is_refused_and_no_failure(place: Place) -> None:
    client = place.start()
    place.student.faults.append(Fault("en", status=400, error={"message": "no such thing"}))
    with pytest.raises(BadRequestError, match="no such thing"):
        ask(client, "en")
    assert not place.rollout.evidence.odd and not place.teacher.bodies
    for body in ({}, {"messages": []}, {"messages": [{"role": "user", "content": 5}]}, [1]):
        assert httpx.post(f"{place.url}/v1/chat/completions", json=body).status_code == 400


def test_a_stream_passes_through_and_counts_like_a_whole_answer(place: Place) -> None:
    client = place.start()
    chunks = client.chat.completions.create(
        model="mine", messages=[{"role": "user", "content": "one two three"}], stream=True
    )
    said = [one.choices[0].delta.content or "" for one in chunks if one.choices]
    assert "".join(said) == "one two three" and len(said) > 3
    place.settle()
    assert place.student.bodies[0]["stream"] and "stream" not in place.teacher.bodies[0]
    assert place.rollout.evidence.agreement == 1.0


def test_a_stream_that_fails_before_its_first_event_is_the_others(place: Place) -> None:
    client = place.start()
    place.student.faults.append(Fault("en", status=500))
    chunks = client.chat.completions.create(
        model="mine", messages=[{"role": "user", "content": "en"}], stream=True
    )
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == "en"


def test_a_stream_that_breaks_off_is_a_failure_of_the_student(place: Place) -> None:
    client = place.start()
    place.student.answer = Answer(done=False)
    chunks = client.chat.completions.create(
        model="mine", messages=[{"role": "user", "content": "one two three four"}], stream=True
    )
    assert "four" not in "".join(one.choices[0].delta.content or "" for one in chunks)
    place.settle()
    assert place.rollout.evidence.odd == {"failed": 1} and not place.teacher.bodies


def test_a_line_of_a_stream_may_be_as_long_as_log_probabilities_make_it(place: Place) -> None:
    client = place.start()
    delta = {"content": "en", "padding": "x" * 1_000_000}
    line = json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": "stop"}]})
    place.student.faults.append(Fault("en", body=f"data: {line}\n\ndata: [DONE]\n\n"))
    chunks = client.chat.completions.create(
        model="mine", messages=[{"role": "user", "content": "en"}], stream=True
    )
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == "en"


def test_a_call_in_a_stream_that_cannot_be_read_counts_as_one(place: Place) -> None:
    client = place.start()
    call = {"index": 0, "id": "1", "function": {"name": "f", "arguments": '{"a": '}}
    said = {"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": "tool_calls"}
    line = json.dumps({"choices": [said]})
    place.student.faults.append(Fault("en", body=f"data: {line}\n\ndata: [DONE]\n\n"))
    chunks = client.chat.completions.create(
        model="mine", messages=[{"role": "user", "content": "en"}], stream=True
    )
    assert [one.choices[0].finish_reason for one in chunks] == ["tool_calls"]
    place.settle()
    assert place.rollout.evidence.answers == 1


def test_one_answer_of_the_teacher_is_paid_once(place: Place) -> None:
    client = place.start(price=Price(prompt=0.0, response=1e6))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ask(client, "en"), range(8)))
    place.settle()
    assert place.teacher.asked["en"] == 1 and place.student.asked["en"] == 8
    assert place.rollout.evidence.shadowed == 8
    assert place.rollout.spent == pytest.approx(2.0)  # its tokens, as the server counts them


def test_nothing_is_shadowed_beyond_the_budget(place: Place) -> None:
    client = place.start(price=Price(prompt=0.0, response=1e6), budget=5.0)
    for number in range(8):
        ask(client, f"en{number}")
        place.settle()
    assert place.rollout.spent == pytest.approx(6.0) and sum(place.teacher.asked.values()) == 3


def test_a_worse_student_is_taken_off_and_one_as_good_is_promoted(place: Place) -> None:
    client = place.start(stages=(*ALL[:1], Stage("try", 0.999999, 1.0), Stage("rest", 1.0, 0.0)))
    _, promised = place.rollout.rules.promised(0.0)
    assert promised is not None and promised <= 10
    place.student.answer = Answer("wrong")
    for number in range(promised + 1):
        ask(client, f"en{number}")
        place.settle()
    assert place.rollout.stage.name == OFF
    before = sum(place.student.asked.values())
    assert ask(client, "later") == "later" and sum(place.student.asked.values()) == before
    place.student.answer = Answer()
    told = httpx.post(
        f"{place.url}/rollout/stage",
        json={"to": "try"},
        headers={"Authorization": f"Bearer {ADMIN}"},
    )
    assert told.json() == {"stage": "try"}
    for number in range(80):
        ask(client, f"de{number}")
    place.settle()
    assert place.rollout.stage.name == "rest"
    moves = read_lines(place.rollout.folder / "moves.jsonl")
    assert [(one["from"], one["to"]) for one in moves] == [
        ("try", OFF),
        (OFF, "try"),
        ("try", "rest"),
    ]
    assert moves[0]["evidence"]["shadowed"] <= promised + 1


def test_by_hand_nothing_is_promoted_and_only_with_the_key(place: Place) -> None:
    client = place.start(stages=(*ALL, Stage("rest", 1.0, 0.0)), automatic=False)
    for number in range(60):
        ask(client, f"en{number}")
    place.settle()
    assert place.rollout.stage.name == "all"
    assert httpx.post(f"{place.url}/rollout/stage", json={"to": "rest"}).status_code == 401


def test_a_restart_goes_on_where_it_stood(place: Place) -> None:
    client = place.start(price=Price(prompt=0.0, response=1e6))
    for number in range(5):
        ask(client, f"en{number}")
    place.settle()
    place.end()
    place.start()
    assert place.rollout.evidence.shadowed == 5 and place.rollout.spent == pytest.approx(10.0)


def test_numbers_and_a_page_say_what_happens_and_no_text_is_kept(place: Place) -> None:
    client = place.start()
    place.student.answer = Answer("zz")
    ask(client, "my secret question")
    place.settle()
    place.end()
    kept = [file for file in place.rollout.folder.rglob("*") if file.is_file()]
    assert kept and not any(b"secret" in file.read_bytes() for file in kept)
    place.start()
    numbers = httpx.get(f"{place.url}/metrics").text
    assert "rollout_share 1.0" in numbers and "rollout_agreement_low" in numbers
    page = httpx.get(f"{place.url}/").text
    assert 'http-equiv="refresh"' in page and "agreement with the teacher" in page
    assert "secret" not in page + numbers


def sure_above(threshold: float, blend: float = 0.0) -> Chooser:
    known = Confidence(any_recipe(), "least")
    return Chooser(lambda query, places: known.of(query, places) > threshold, blend=blend)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_the_student_is_sure_of_is_served_whole_or_as_a_stream(
    place: Place, stream: bool
) -> None:
    client = place.start(chooser=sure_above(-1.0))
    asked: Any = {"model": "mine", "messages": [{"role": "user", "content": "one two"}]}
    if stream:
        chunks = list(client.chat.completions.create(**asked, stream=True))
        said = "".join(one.choices[0].delta.content or "" for one in chunks)
        assert chunks[-1].choices[0].finish_reason == "stop", "no counts, for nobody asked for them"
    else:
        answer = client.chat.completions.create(**asked)
        said = answer.choices[0].message.content
        assert answer.choices[0].logprobs is None and answer.model == "mine"
    place.settle()
    assert said == "one two" and place.student.bodies[0]["logprobs"] is True
    assert place.rollout.evidence.shadowed == 1


def test_what_the_student_is_not_sure_of_is_the_teachers(place: Place) -> None:
    client = place.start(chooser=sure_above(-0.1), keep_texts=True)
    assert ask(client, "one two") == "one two"
    assert place.teacher.asked["one two"] == 1 and not place.rollout.evidence.answers
    assert "low confidence" in (place.rollout.folder / "texts.jsonl").read_text()


def test_hard_queries_may_go_to_the_student_with_the_prompt(place: Place) -> None:
    client = place.start(chooser=sure_above(-0.1, blend=1.0))
    assert ask(client, "one two") == "one two"
    bare, prompted = place.student.bodies
    assert len(bare["messages"]) == 1 and prompted["messages"][0]["content"] == PROMPT
    assert prompted["model"] == KNOWN[1] and not place.teacher.bodies
    assert not place.rollout.evidence.answers


def test_a_student_without_log_probabilities_is_not_trusted(place: Place) -> None:
    client = place.start(chooser=sure_above(-1.0))
    place.student.answer = Answer(ignores=("logprobs",))
    assert ask(client, "one two") == "one two"
    assert place.teacher.asked["one two"] == 1
    assert place.rollout.evidence.odd == {"failed": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_each_of_several_answers_must_be_sure_and_comes_as_it_was_asked_for(
    place: Place, stream: bool
) -> None:
    sure = iter([True, True, True, False])
    unshadowed = (STAGES[0], Stage("all", 1.0, 0.0))
    chooser = Chooser(lambda _, places: bool(places) and next(sure))
    client = place.start(stages=unshadowed, chooser=chooser)
    asked: Any = {"model": "mine", "messages": [{"role": "user", "content": "one two"}], "n": 2}
    if stream:
        chunks = list(client.chat.completions.create(**asked, stream=True))
        assert {one.choices[0].index for one in chunks if one.choices[0].delta.content} == {0, 1}
    else:
        answer = client.chat.completions.create(**asked)
        assert [one.logprobs for one in answer.choices] == [None, None]
    assert not place.teacher.asked["one two"]
    client.chat.completions.create(**{**asked, "messages": [{"role": "user", "content": "three"}]})
    assert place.teacher.asked["three"] == 1, "one of its two answers is not sure"


@pytest.mark.parametrize("wanted", ["a", -1, [5]])
def test_top_logprobs_that_are_no_number_are_the_clients_mistake(place: Place, wanted: Any) -> None:
    client = place.start(chooser=sure_above(-1.0))
    with pytest.raises(BadRequestError, match="top_logprobs"):
        ask(client, "one", top_logprobs=wanted)
    assert not place.rollout.evidence.requests


def test_a_request_that_is_too_large_is_refused_in_the_protocols_form(place: Place) -> None:
    client = place.start()
    with pytest.raises(APIStatusError) as refused:
        ask(client, "a" * (16 << 20))
    assert refused.value.status_code == 413 and "16777216" in str(refused.value.body)


def test_a_teacher_that_refuses_the_key_is_said_once_without_any_text(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    client = place.start()
    place.teacher.faults = [Fault("secret", status=401)]
    ask(client, "one secret"), ask(client, "two secrets")
    place.settle()
    said = capsys.readouterr().err
    assert said.count("the teacher at") == 1 and "check TEACHER_API_KEY" in said
    assert "secret" not in said


def test_an_answer_of_the_student_with_the_prompt_does_not_end_the_teachers_rest(
    place: Place,
) -> None:
    client = place.start(chooser=sure_above(-0.1, blend=1.0))
    place.proxy._rests["teacher"].begin()
    ask(client, "one two")
    assert place.proxy._rests["teacher"].lasts


def test_the_students_key_goes_to_no_other_server(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDENT_API_KEY", "of-the-student")
    for name in ("DISTILL_API_KEY", "OPENAI_API_KEY", "TEACHER_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    keys = []
    for address, own in [(None, None), ("http://other/v1", None), ("http://other/v1", "its-own")]:
        if own:
            monkeypatch.setenv("TEACHER_API_KEY", own)
        settings = RolloutSettings(student_url="http://one/v1", teacher_url=address)
        keys.append(backends_of(measured, any_recipe(teacher="pocket"), settings)["teacher"].key)
    assert keys == ["of-the-student", None, "its-own"]


def test_the_closed_set_is_asked_for_and_the_client_gets_what_it_asked_for(place: Place) -> None:
    known = Confidence(any_recipe(answer={"choices": ["en", "de"]}), "choices")
    asked: list[int] = []

    def serves(query: str, places: Sequence[Token]) -> bool:
        asked.append(len(places[0].likeliest))
        return known.of(query, places) > -0.1

    client = place.start(chooser=Chooser(serves, known.likeliest))
    message: Any = {"role": "user", "content": "en"}
    (choice,) = client.chat.completions.create(
        model="mine", messages=[message], logprobs=True, top_logprobs=1
    ).choices
    assert asked == [20] and place.student.bodies[0]["top_logprobs"] == 20
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content[0].top_logprobs) == 1
    assert ask(client, "no choice") == "no choice"
    assert place.teacher.asked["no choice"] == 1, "what is none of the choices is not sure"
    place.student.answer = Answer(ignores=("top_logprobs",))
    assert ask(client, "de") == "de"
    assert place.rollout.evidence.odd == {"failed": 1}


def test_stages_of_ones_own_are_kept_so_that_a_rollout_ends_by_its_name_alone(place: Place) -> None:
    place.start()
    place.end()
    kept = RolloutState(place.run, Judgement(place.recipe, False), place.rules)
    assert (kept.stages, kept.stage) == (ALL, ALL[1])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a release and a report, as far as a rollout reads them."""
    release = release_of(tmp_path_factory.mktemp("made"), range(4), teacher="openai:echo-large")
    run = release.path.parent
    student = {"metrics": {"agreement": {"value": 0.97}, "answered": {"value": 1.0}}}
    systems = {"teacher": {"metrics": {}}, "student": student}
    (run / "report.json").write_text(json.dumps({"systems": systems, "free_text": False}))
    return run


def kept_queries(place: Place, measured: Path, texts: Sequence[str], out: Path) -> int:
    """What is harvested of wrong answers to these."""
    place.rules = StageRules(0.5, 0.0, {})  # nothing takes the student off
    place.run = Path(shutil.copytree(measured, out.with_name("run")))
    client = place.start(keep_texts=True)
    place.student.answer = Answer("wrong")
    for text in texts:
        ask(client, text)
    place.settle()
    return harvest(place.run, out)


def test_disagreements_become_queries_of_the_recipe_each_once(
    place: Place, measured: Path, tmp_path: Path
) -> None:
    out = tmp_path / "more.jsonl"
    assert kept_queries(place, measured, ["Guten Tag", "Bonjour", "Guten Tag"], out) == 2
    lines = out.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"query": "Guten Tag"}, {"query": "Bonjour"}]
    with pytest.raises(OutputError, match="is there already"):
        harvest(place.run, out)


def test_harvested_queries_are_without_the_prompt_that_an_application_sends(
    place: Place, measured: Path, tmp_path: Path
) -> None:
    out = tmp_path / "more.jsonl"
    assert kept_queries(place, measured, ["Guten Tag"], out) == 1
    with (place.rollout.folder / "texts.jsonl").open("a") as kept:
        kept.write('{"messages": [{"role": "us')  # as a crash leaves it
    OpenAI(base_url=f"{place.url}/v1", api_key="any").chat.completions.create(
        model="mine",
        messages=[{"role": "system", "content": PROMPT}, {"role": "user", "content": "Bonjour"}],
    )
    place.settle()
    assert harvest(place.run, tmp_path / "again.jsonl") == 2
    assert PROMPT not in (place.rollout.folder / "texts.jsonl").read_text()


def test_what_holds_personal_data_is_not_harvested(
    place: Place, measured: Path, tmp_path: Path
) -> None:
    with pytest.raises(ScreeningError):
        kept_queries(place, measured, ["mail jane.doe@mail.de"], tmp_path / "more.jsonl")


def test_without_kept_texts_there_is_nothing_to_harvest(measured: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="--keep-texts"):
        harvest(measured, tmp_path / "more.jsonl")


def test_thresholds_of_an_earlier_report_are_not_served(measured: Path, tmp_path: Path) -> None:
    run = shutil.copytree(measured, tmp_path / "run")
    point = {"epsilon": 0.05, "served": 1.0, "threshold": None}
    found = {
        **dict.fromkeys(("rows", "groups", "worth", "disagreements", "level"), 1),
        **{"report": "of another", "score": "least", "student": "mine", "split": "test"},
        **{"points": [point], "curve": [], "pairs": []},
    }
    (run / "calibration.json").write_text(json.dumps(found))
    with pytest.raises(DatasetError, match="is of another report"):
        rollout(run, RolloutSettings(epsilon=0.05, teacher_url="http://127.0.0.1:9/v1"))


def test_the_verb_serves_until_it_is_stopped_and_moves_by_hand(
    place: Place, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(measured, tmp_path / "run")
    where = ["--student-url", place.student.url, "--student-model", KNOWN[1]]
    teacher = {"OPENAI_BASE_URL": place.teacher.url, "OPENAI_API_KEY": "teacher-key"}
    command = [sys.executable, "-m", "distill_datasets", "rollout", str(run), "--port", "0", *where]
    with Process(
        command, env={**os.environ, **teacher}, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        url = re.search(r"http://\S+/v1", process.stderr.readline())
        assert url is not None
        assert ask(OpenAI(base_url=url[0], api_key="any"), "hallo") == "hallo"
        assert place.teacher.bodies[0]["messages"][0]["role"] == "system"
        assert main(["rollout", str(run), "--to", "production"]) == 0
        assert "is at stage production" in capsys.readouterr().out
        assert ask(OpenAI(base_url=url[0], api_key="any"), "hallo") == "hallo"
        assert place.student.asked["hallo"] == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert main(["rollout", str(run), "--to", "off"]) == 0
    assert json.loads((run / "rollout" / "state.json").read_text())["stage"] == OFF
    assert main(["rollout", str(run), "--to", "nowhere"]) == 2

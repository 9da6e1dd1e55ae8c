import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.errors import (
    AccessError,
    ModelError,
    OutputError,
    PendingError,
    PriceError,
    ServiceError,
)
from distill_datasets.files import one_writer
from distill_datasets.generation.batch_api import BatchTable
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.pricing import Meter, Prices
from distill_datasets.generation.run import Generated, generate
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.models.openai import OpenAIBatches, OpenAISampler
from distill_datasets.models.sampler import Echo
from tests.conftest import edit
from tests.support.forks import Process
from tests.support.openai_batches import End, Lost
from tests.support.openai_server import Answer, Fault, OpenAIServer, serving

NOW = GenerateSettings(batch=True, poll=0)
LATER = GenerateSettings(batch=True, poll=0, wait=False)
PRICE = {"prompt": 1_000_000, "response": 0, "batch": 0.5}
PRICES = Prices(date="2026-11-01", currency="USD", models={"openai:echo-small": PRICE})
PAID = 10 * 0.5  # for one answer, whose prompt has ten tokens


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with serving() as started:
        started.answer = Answer(usage={"prompt_tokens": 10})
        yield started


@pytest.fixture
def bought(server: OpenAIServer, recipe_folder: Path, tmp_path: Path) -> Any:
    def buy(settings: GenerateSettings = NOW, **options: Any) -> Generated:
        teacher = OpenAISampler("echo-small", base_url=server.url)
        given = {"recipe": recipe_folder, "teacher": teacher, "out": tmp_path / "run", **options}
        return generate(**given, settings=settings)

    return buy


def times_bought(folder: Path) -> list[int]:
    with Journal(folder / "run/journal.sqlite") as journal:
        return [times for _, times in journal]


def test_a_run_in_batches_has_the_rows_of_one_that_asks_one_by_one(
    server: OpenAIServer, recipe_folder: Path, tmp_path: Path, bought: Any
) -> None:
    in_batches = bought()
    assert sum(server.asked.values()) == 0
    assert server.batches.sizes() == [6]
    teacher = OpenAISampler("echo-small", base_url=server.url)
    online = generate(recipe_folder, teacher=teacher, out=tmp_path / "online")
    assert sum(server.asked.values()) == 6
    assert in_batches.rows[:] == online.rows[:]
    sent = [json.loads(line)["body"] for line in server.batches.files["file-0"].splitlines()]
    assert sorted(sent, key=str) == sorted(server.bodies, key=str)


def test_a_second_run_sends_nothing(server: OpenAIServer, bought: Any) -> None:
    bought()
    bought()
    assert server.batches.sizes() == [6]


def test_without_waiting_a_later_run_reads_what_an_earlier_one_sent(
    server: OpenAIServer, bought: Any, tmp_path: Path
) -> None:
    server.batches.looks = 2
    for _ in range(2):
        with pytest.raises(PendingError, match=r"1 batches \(batch_0\) with 6 requests"):
            bought(LATER)
        assert not list((tmp_path / "run/batches").glob("*.jsonl"))
    assert bought(LATER).errors == 0
    assert server.batches.sizes() == [6]
    assert times_bought(tmp_path) == [1] * 6


def test_only_what_expired_is_sent_again(server: OpenAIServer, bought: Any, tmp_path: Path) -> None:
    server.batches.expires.update({"rose": 1, "sea": 2})
    assert bought().errors == 0
    assert server.batches.sizes() == [6, 2, 1]
    assert set(server.batches.worked.values()) == {1}
    assert times_bought(tmp_path) == [1] * 6


def test_an_answer_that_does_not_say_to_what_is_nobodys(
    server: OpenAIServer, bought: Any, tmp_path: Path
) -> None:
    server.batches.nameless = "rose"
    assert bought().errors == 0
    assert server.batches.sizes() == [6, 1]
    assert times_bought(tmp_path) == [1] * 6


def test_an_expired_batch_keeps_what_it_has_answered(server: OpenAIServer, bought: Any) -> None:
    server.batches.ends.append(End("expired"))
    assert bought().errors == 0
    assert server.batches.sizes() == [6, 3]
    assert set(server.batches.worked.values()) == {1}


def test_rows_that_failed_for_now_are_sent_again_and_rejected_ones_never(
    server: OpenAIServer, bought: Any
) -> None:
    server.faults += [
        Fault("rose", times=1, status=500, error={"message": "busy"}),
        Fault("sky", times=1, status=429, error={"message": "slow down"}),
        Fault("thought", status=400, error={"message": "No.", "code": "content_policy_violation"}),
    ]
    for _ in range(2):
        rows = bought().rows
        failed = {row["query"]: row["error"] for row in rows if row["error"] is not None}
        assert list(failed) == ["a thought"]
        assert failed["a thought"]["type"] == "content policy"
        assert failed["a thought"]["status"] == 400
    assert server.batches.sizes() == [6, 2]
    assert sum(server.asked.values()) == 0


def test_a_lost_answer_to_creating_a_batch_makes_no_second_one(
    server: OpenAIServer, bought: Any
) -> None:
    server.batches.lost += [Lost("upload"), Lost("create")]
    assert bought().errors == 0
    assert server.batches.sizes() == [6]


def test_a_file_of_answers_that_breaks_off_is_read_again_and_counted_once(
    server: OpenAIServer, bought: Any, tmp_path: Path
) -> None:
    server.batches.lost.append(Lost("content"))
    meter = Meter(PRICES)
    bought(meter=meter)
    assert times_bought(tmp_path) == [1] * 6
    assert meter.spent == 6 * PAID
    assert server.batches.sizes() == [6]


def test_answers_that_the_provider_deleted_are_bought_again(
    server: OpenAIServer, bought: Any
) -> None:
    server.batches.gone = 1
    assert bought().errors == 0
    assert server.batches.sizes() == [6, 6]


def test_a_batch_of_another_account_is_named(server: OpenAIServer, bought: Any) -> None:
    with pytest.raises(PendingError):
        bought(LATER)
    server.batches.batches.clear()
    with pytest.raises(AccessError, match="knows no batches/batch_0: use the key"):
        bought()


def test_a_budget_is_refused_where_it_could_not_be_kept(bought: Any) -> None:
    with pytest.raises(PriceError, match="can't stop a batch"):
        bought(meter=Meter(PRICES, budget=5.0))


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background parent leaves it ignored
from distill_datasets.generation.run import generate
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.models.openai import OpenAISampler
recipe, out, url = sys.argv[1:]
teacher = OpenAISampler("echo-small", base_url=url)
generate(recipe, teacher=teacher, out=out, settings=GenerateSettings(batch=True, poll=0))
"""


def test_a_process_killed_before_it_heard_of_its_batch_leaves_it_to_the_next(
    server: OpenAIServer, recipe_folder: Path, bought: Any, tmp_path: Path
) -> None:
    arguments = [str(recipe_folder), str(tmp_path / "run"), server.url]
    process = Process([sys.executable, "-c", SCRIPT, *arguments])
    server.batches.lost.append(Lost("create", lambda: os.kill(process.pid, signal.SIGKILL)))
    assert process.wait(60) == -signal.SIGKILL
    with BatchTable(tmp_path / "run/journal.sqlite") as table:
        (batch,) = table.open
    assert (batch.sent, batch.name) == (True, None)
    # Batches of others came since, so that ours is on another page of the list.
    other = {"input_file_id": "file-x", "status": "completed", "metadata": None, "id": "theirs"}
    server.batches.batches["theirs"], server.batches.files["file-x"] = dict(other), b"{}"
    assert bought().errors == 0
    assert server.batches.sizes() == [6, 1]
    assert times_bought(tmp_path) == [1] * 6


def test_an_interrupted_run_says_that_its_batches_go_on(
    server: OpenAIServer, recipe_folder: Path, bought: Any, tmp_path: Path
) -> None:
    arguments = [str(recipe_folder), str(tmp_path / "run"), server.url]
    process = Process([sys.executable, "-c", SCRIPT, *arguments], stderr=subprocess.PIPE, text=True)
    server.batches.looks = 1_000_000
    server.batches.watch = lambda: process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in said
    assert "1 batches (batch_0) with 6 requests are being worked on at the provider" in said
    assert "unclosed" not in said.lower()
    server.batches.looks, server.batches.watch = 1, lambda: None
    assert bought().errors == 0
    assert server.batches.sizes() == [6]


def test_what_was_planned_and_never_sent_is_forgotten(
    server: OpenAIServer, bought: Any, recipe_folder: Path, tmp_path: Path
) -> None:
    server.batches.absent = True
    with pytest.raises(ModelError, match="has no files, so nothing can be asked in batches"):
        bought()
    server.batches.absent = False
    edit(recipe_folder, "prompt.md", "Name the colour", "Say the colour")
    bought()
    assert server.batches.sizes() == [6]
    assert not list((tmp_path / "run/batches").glob("*.jsonl"))
    assert all("Say the" in line for line in server.batches.files["file-0"].decode().splitlines())


def test_a_failed_batch_is_explained_and_sent_anew_by_the_next_run(
    server: OpenAIServer, bought: Any
) -> None:
    problem = {"code": "invalid_request", "message": "Line 3 is wrong.", "line": 3}
    server.batches.ends.append(End("failed", [problem]))
    with pytest.raises(ServiceError, match=r"batch_0 failed at the provider: Line 3 is wrong\."):
        bought()
    assert bought().errors == 0
    assert server.batches.sizes() == [6, 6]


def test_a_cancelled_batch_keeps_its_answers_and_says_so(server: OpenAIServer, bought: Any) -> None:
    server.batches.ends.append(End("cancelled"))
    with pytest.raises(ServiceError, match="was cancelled at the provider; the 3 answers"):
        bought()
    assert bought().errors == 0
    assert server.batches.sizes() == [6, 3]


def test_a_batch_too_large_for_the_account_is_halved(server: OpenAIServer, bought: Any) -> None:
    problem = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached."}
    server.batches.ends.append(End("failed", [problem]))
    assert bought().errors == 0
    assert server.batches.sizes() == [6, 3, 3]


def test_batches_that_bear_no_fruit_are_given_up(server: OpenAIServer, bought: Any) -> None:
    server.faults.append(Fault("", status=503, error={"message": "No machine is free."}))
    with pytest.raises(ServiceError, match="without one answer .*No machine is free"):
        bought()
    assert server.batches.sizes() == [6, 6]


def test_a_row_that_fails_in_batch_after_batch_is_asked_by_itself_and_the_run_goes_on(
    server: OpenAIServer, bought: Any, tmp_path: Path
) -> None:
    server.faults.append(Fault("sky", times=4, status=500, error={"message": "It broke."}))
    with pytest.warns(UserWarning, match=r"1 requests have no answer .*It broke.*full price"):
        assert bought().errors == 0
    assert server.batches.sizes() == [6, 1, 1]
    assert sum(server.asked.values()) == 2
    assert times_bought(tmp_path) == [1] * 6


NO_VALUE = {"message": "No such value.", "code": "unsupported_value", "param": "temperature"}


def test_what_is_refused_to_every_row_ends_the_run(server: OpenAIServer, bought: Any) -> None:
    server.faults.append(Fault("", status=400, error=NO_VALUE))
    with pytest.raises(ModelError, match="refuses the request's temperature"):
        bought()
    server.faults.clear()
    assert bought().errors == 0
    assert server.batches.sizes() == [6, 6]


def test_an_answer_that_is_none_in_three_batches_is_its_rows_rejection(
    server: OpenAIServer, bought: Any, tmp_path: Path
) -> None:
    server.faults.append(Fault("sky", body='{"choices": []}'))
    (error,) = filter(None, bought().rows["error"][:])
    assert error["type"] == "bad answer" and "without any choice" in error["message"]
    assert times_bought(tmp_path) == [1] * 5
    assert server.batches.sizes() == [6, 1, 1]


def test_what_is_refused_to_one_row_among_answers_is_its_rejection(
    server: OpenAIServer, bought: Any, tmp_path: Path
) -> None:
    server.faults.append(Fault("sky", status=400, error=NO_VALUE))
    (error,) = filter(None, bought().rows["error"][:])
    assert "No such value." in str(error)
    assert times_bought(tmp_path) == [1] * 5
    assert server.batches.sizes() == [6]


def test_several_samples_come_in_one_request(
    server: OpenAIServer, recipe_folder: Path, bought: Any
) -> None:
    edit(recipe_folder, "recipe.yaml", "license:", "sampling: {n: 2, temperature: 1}\nlicense:")
    assert len(bought().rows) == 12
    assert server.batches.sizes() == [6]


def test_a_judge_is_asked_in_a_batch_of_its_own_once_there_is_something_to_judge(
    server: OpenAIServer, recipe_folder: Path, monkeypatch: pytest.MonkeyPatch, bought: Any
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    (recipe_folder / "judge.md").write_text("Judge {{ answer }}. Score: 7\n")
    edit(
        recipe_folder,
        "recipe.yaml",
        "teacher: pocket",
        "teachers: [{model: 'openai:echo-small'}, {model: 'openai:echo-large'}]\nchoose: best\n"
        "judge: {model: 'openai:echo-large', prompt: judge.md, pattern: 'Score: (?P<score>\\d+)',"
        " scale: [1, 10]}",
    )
    rows = bought(teacher=None).rows
    assert sum(server.asked.values()) == 0
    assert sum(row["answer"] is not None for row in rows) == 4
    assert server.batches.sizes() == [6, 6, 2]  # two teachers, then the judge of red and of blue


@pytest.mark.parametrize(
    ("bound", "value", "sizes"), [("most_requests", 4, [4, 2]), ("most_bytes", 1, [1] * 6)]
)
def test_a_batch_is_no_larger_than_its_provider_takes(
    bound: str,
    value: int,
    sizes: list[int],
    server: OpenAIServer,
    bought: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(OpenAIBatches, bound, value)
    assert bought().errors == 0
    assert server.batches.sizes() == sizes


def test_a_teacher_without_batches_is_named(recipe_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'echo' has no batches"):
        generate(recipe_folder, teacher=Echo(), out=tmp_path / "run", settings=NOW)


def test_two_processes_never_send_the_batches_of_one_folder(bought: Any, tmp_path: Path) -> None:
    with (
        one_writer(tmp_path / "run/batches", "batch"),
        pytest.raises(OutputError, match="Another process is at work in .*batches"),
    ):
        bought()


def test_answers_out_of_batches_are_counted_at_their_own_price_by_later_runs_too(
    server: OpenAIServer, bought: Any, tmp_path: Path
) -> None:
    meter, later = Meter(PRICES), Meter(PRICES)
    bought(meter=meter)
    with Journal(tmp_path / "run/journal.sqlite") as journal:
        later.resume(journal)
    assert meter.spent == later.spent == 6 * PAID

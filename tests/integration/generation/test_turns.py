"""Conversations of which every turn is answered, and their releases."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from distill_datasets.conversations import from_text
from distill_datasets.errors import BudgetReached
from distill_datasets.evaluation.report import measure
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.dry_run import dry_run
from distill_datasets.generation.pricing import Prices, open_meter
from distill_datasets.generation.run import Generated, generate
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.generation.shards import Share
from distill_datasets.models.openai import OpenAISampler
from distill_datasets.releases.contents import check_release
from distill_datasets.releases.diff import diff
from distill_datasets.releases.release import publish
from distill_datasets.releases.show import print_rows, show
from tests.support.conversations import PROMPT, Talker, said, talks, user
from tests.support.openai_server import Answer, serving

ROWS: list[Any] = [
    [user("Hello"), user("Where is it?"), user("Thanks")],
    [{"role": "system", "content": "It is Monday."}, user("Hi")],
    [user("Well?"), user("go on and on"), user("Enough")],
]


def run(tmp_path: Path, teacher: Talker, rows: list[Any] = ROWS, **keys: Any) -> Generated:
    recipe = talks(tmp_path / "recipe", rows, turns="all", **keys)
    return generate(recipe, teacher=teacher, out=tmp_path / "run")


def contents(messages: list[Any]) -> list[str]:
    return [message["content"] for message in messages]


def test_every_turn_is_answered_after_the_answers_before_it(tmp_path: Path) -> None:
    teacher = Talker()
    first, second, _ = run(tmp_path, teacher).rows
    asked = [contents(messages) for messages, _ in teacher.asked if "Hello" in contents(messages)]
    assert asked[:1] == [[PROMPT, "Hello"]]
    assert asked[1] == [PROMPT, "Hello", "You said: Hello", "Where is it?"]
    assert asked[2] == [*asked[1], "You said: Where is it?", "Thanks"]
    assert first["earlier_responses"] == ["You said: Hello", "You said: Where is it?"]
    assert first["response"] == "You said: Thanks"
    assert len(first["requests"]) == 3
    assert first["teacher_prompt_tokens"] == 10 * (2 + 4 + 6)
    assert first["teacher_response_tokens"] == 3 + 5 + 3
    assert (second["earlier_responses"], second["response"]) == ([], "You said: Hi")


def test_a_turn_that_is_rejected_is_the_last_one_and_rejects_the_row(tmp_path: Path) -> None:
    teacher = Talker()
    made = run(tmp_path, teacher)
    assert made.rejected == {"turn 2: truncated": 1}
    row = made.rows[2]
    assert (row["raw"], row["response"]) == ("You said: go on and on", None)
    assert row["earlier_responses"] == ["You said: Well?"]
    assert "Enough" not in json.dumps(teacher.asked, default=str)


def test_a_call_that_would_need_a_result_ends_the_conversation(tmp_path: Path) -> None:
    rows = [[user("A-1"), user("Thanks")], [user("Hi"), user("A-1")]]
    made = run(tmp_path, Talker(), rows, tools=True)
    assert made.rejected == {"turn 1: calls a tool before the last turn": 1}
    assert made.rows[1]["answer"] == '[{"name": "find_order", "arguments": {"id": "A-1"}}]'


def test_a_run_that_ends_between_two_turns_pays_for_the_others_only(tmp_path: Path) -> None:
    first = run(tmp_path, Talker(most=3))
    assert first.errors > 0
    second = Talker()
    whole = run(tmp_path, second)
    assert (whole.errors, len(second.asked)) == (0, 3)
    assert whole.rows[0]["response"] == "You said: Thanks"


@pytest.mark.parametrize("share", [None, Share(1, 1)])
def test_a_budget_that_ends_amid_conversations_is_gone_on_with_for_the_rest(
    tmp_path: Path, share: Share | None
) -> None:
    recipe = talks(tmp_path / "recipe", ROWS, turns="all")
    talker = {"prompt": 1_000, "response": 0}  # a request costs 0.01 a message
    prices = {"date": "2026-11-01", "currency": "USD", "models": {"talker": talker}}
    folder = share.folder(tmp_path / "run") if share else tmp_path / "run"

    def ask(budget: float, teacher: Talker) -> Generated:
        known = Prices.model_validate(prices)
        meter = open_meter(known, budget=budget, journal=folder / "journal.sqlite")
        return generate(recipe, teacher=teacher, out=tmp_path / "run", meter=meter, share=share)

    first, second = Talker(), Talker()
    with pytest.raises(BudgetReached, match="run again with a higher budget"):
        ask(0.1, first)
    begun = [contents(messages)[1] for messages, _ in first.asked]
    assert {"Hello", "Well?"} <= {*begun}  # and neither was answered to its end
    whole = ask(1.0, second)
    assert (whole.kept, whole.rejected) == (2, {"turn 2: truncated": 1})
    asked = [contents(messages) for messages, _ in [*first.asked, *second.asked]]
    assert len(asked) == len({*map(tuple, asked)}) == 6
    assert ask(1.0, Talker(most=0)).kept == 2


def test_a_release_holds_whole_conversations_and_makes_itself_again_for_nothing(
    tmp_path: Path,
) -> None:
    run(tmp_path, Talker(), tools=True)
    release = publish(tmp_path / "run")
    check_release(release.path)
    (first, second) = load_dataset(str(release.path), cache_dir=str(tmp_path / "cache"))["train"]
    assert first["messages"] == [
        *(user("Hello"), said("You said: Hello")),
        *(user("Where is it?"), said("You said: Where is it?")),
        *(user("Thanks"), said("You said: Thanks")),
    ]
    assert contents(second["messages"]) == ["It is Monday.", "Hi", "You said: Hi"]
    manifest = json.loads((release.path / "manifest.json").read_text())
    assert (manifest["turns"], manifest["ledger"]) == ("all", 6)
    nobody = Talker()
    again = generate(release.path, teacher=nobody, out=tmp_path / "again")
    assert (nobody.asked, again.kept, again.rejected) == ([], 2, {"turn 2: truncated": 1})
    copy = publish(tmp_path / "again")
    assert copy.digest == release.digest
    assert diff(release.path, copy.path).empty


def test_the_ledger_has_the_turns_of_a_row_that_failed(tmp_path: Path) -> None:
    rows = [[user("Hello"), user("Bye")], [user("Hi")]]
    run(tmp_path, Talker(most=2), rows)
    assert publish(tmp_path / "run").rejected == 1
    entries = load_dataset(
        str(tmp_path / "run" / "release"), "ledger", cache_dir=str(tmp_path / "cache")
    )["ledger"]
    assert len(entries) == 2
    teacher = Talker()
    assert generate(tmp_path / "run/release", teacher=teacher, out=tmp_path / "again").errors == 0
    assert len(teacher.asked) == 1


def test_answers_of_later_turns_are_verified_too(tmp_path: Path) -> None:
    run(tmp_path, Talker())
    release = publish(tmp_path / "run")
    teacher = Talker()
    settings = GenerateSettings(verify_ledger=100)
    made = generate(release.path, teacher=teacher, out=tmp_path / "again", settings=settings)
    assert made.from_ledger is not None
    assert made.from_ledger["verified"] == {"asked": 6, "agree": 6}


def test_a_dry_run_counts_every_turn_and_the_answers_before_it(tmp_path: Path) -> None:
    recipe = talks(tmp_path / "recipe", ROWS, turns="all")
    found = dry_run(recipe, teacher=Talker())
    (load,) = found.loads
    assert "Later turns hold the answers to earlier ones" in found.text()
    assert (found.requests, load.requests) == (7, 7)
    assert load.prompt.expected is None
    unknown = 3 + 3  # answers before later turns: one and two of a row, twice
    least = load.prompt.low - unknown
    assert load.prompt.high - 3 * least == unknown * 512
    sampled = dry_run(recipe, teacher=Talker(), sample=3, out=tmp_path / "run")
    assert (sampled.requests, sampled.known, sampled.loads) == (6, 6, ())
    assert "[turn 2: truncated]" in sampled.text()


def test_a_dry_run_of_a_release_knows_what_it_answers(tmp_path: Path) -> None:
    run(tmp_path, Talker())
    release = publish(tmp_path / "run")
    found = dry_run(release.path, teacher=Talker())
    assert (found.requests, found.known, found.loads) == (6, 6, ())


def test_all_systems_answer_the_last_turn_after_the_teachers_answers(tmp_path: Path) -> None:
    run(tmp_path, Talker())
    release = publish(tmp_path / "run")
    student = Talker(model="student", identity="student/1")
    base = Talker(model="base", identity="base/1")
    report = measure(
        release.path, student=student, base=base, teacher=Talker(), out=tmp_path / "report"
    )
    asked = [contents(messages) for messages, _ in student.asked]
    assert ["Hello", "You said: Hello", "Where is it?", "You said: Where is it?", "Thanks"] in asked
    assert ["Well?", "You said: Well?", "go on and on"] in asked
    assert any("the last turn of each conversation" in note for note in report.data["notes"])
    assert "user: Well?" in report.data["rows"][2]["query"]


def test_a_conversation_is_shown_with_its_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, Talker())
    release = publish(tmp_path / "run")
    row = show(release.path, limit=1)[0]
    assert row["raw"] == "You said: Thanks"
    assert from_text(row["query"])[-1] == user("Thanks")
    print_rows([row])
    assert "assistant: You said: Hello" in capsys.readouterr().out


def test_a_journal_has_every_turn(tmp_path: Path) -> None:
    run(tmp_path, Talker())
    with Journal(tmp_path / "run" / "journal.sqlite") as journal:
        assert len(journal) == 6


def test_batches_go_in_rounds_a_turn_each(tmp_path: Path) -> None:
    recipe = talks(tmp_path / "recipe", ROWS, turns="all")
    with serving() as server:
        server.answer = Answer(text="You said: {text}")
        teacher = OpenAISampler("echo-small", base_url=server.url)
        settings = GenerateSettings(batch=True, poll=0)
        made = generate(recipe, teacher=teacher, out=tmp_path / "run", settings=settings)
        assert (made.kept, server.batches.sizes()) == (3, [3, 2, 2])
        assert sum(server.asked.values()) == 0
    assert made.rows[0]["response"] == "You said: Thanks"


def test_parts_of_a_run_publish_as_the_whole(tmp_path: Path) -> None:
    rows = [[user(f"Hello {n}"), user(f"Bye {n}")] for n in range(6)]
    recipe = talks(tmp_path / "recipe", [*rows, ROWS[2]], turns="all")
    generate(recipe, teacher=Talker(), out=tmp_path / "whole")
    for number in (1, 2):
        generate(recipe, teacher=Talker(), out=tmp_path / "parts", share=Share(number, 2))
    assert publish(tmp_path / "parts").digest == publish(tmp_path / "whole").digest

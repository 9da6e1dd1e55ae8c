import asyncio
import json
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.errors import (
    BudgetReached,
    GenerationError,
    OutputError,
    RecipeError,
    RejectedError,
)
from distill_datasets.files import one_writer
from distill_datasets.generation.run import generate
from distill_datasets.models.sampler import Echo, Reply, Sampler, Sampling
from distill_datasets.recipes.loading import load_recipe, new_recipe
from distill_datasets.recipes.queries import load_queries
from distill_datasets.schema import Message
from distill_datasets.synthesis.run import synthesize
from tests.conftest import edit
from tests.support import forks
from tests.support.openai_server import OpenAIServer
from tests.support.synthesis_author import RULES, TOPICS, Author, kind_of

PROMPT = 'Name the {"colour"} of: {{ query }}\n\n```json\n["red", {{ x }}, {# 1 #}]\n```'


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A prompt without any query."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(
        "name: bare\n"
        "description: Which colour is it?\n"
        "teacher: pocket\n"
        "queries: {file: queries.jsonl}  # none yet\n"
        "license: apache-2.0\n"
        "languages: [en, de]\n"
    )
    (folder / "prompt.md").write_text(PROMPT)
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.*") if path.is_file()}


def copy_of(folder: Path) -> Path:
    return Path(shutil.copytree(folder, folder.with_name("copy")))


def test_a_prompt_without_queries_gets_as_many_as_wanted_and_generate_asks_them(
    recipe: Path, tmp_path: Path
) -> None:
    made = synthesize(recipe, n=60, teacher=Author())
    assert (made.path, made.kept, made.new, made.stopped) == (recipe, 60, 60, None)
    answered = generate(recipe, teacher=Echo(), out=tmp_path / "run")
    assert answered.kept == 60
    assert answered.rows["query"][:] == [row["query"] for row in rows_of(recipe)]


def test_a_recipe_that_another_process_writes_queries_for_is_left_alone(recipe: Path) -> None:
    with (
        one_writer(recipe / "synthesis", "synthesis"),
        pytest.raises(OutputError, match="Another process is at work"),
    ):
        synthesize(recipe, n=60, teacher=Author())
    assert not (recipe / "queries.jsonl").exists()


def test_queries_say_what_was_asked_for_and_are_balanced(recipe: Path) -> None:
    made = synthesize(recipe, n=100, teacher=Author(hard=()))
    row = rows_of(recipe)[0]
    assert row["topic"] in TOPICS
    assert row["language"] in ("en", "de")
    assert row["origin"] == "synthesis"
    assert {1} < {number for row in rows_of(recipe) for number in row["rules"]}
    balance = json.loads((recipe / "synthesis.json").read_text())["balance"]
    assert balance["topic"] == dict.fromkeys(TOPICS, 20)
    assert max(balance["style"].values()) - min(balance["style"].values()) <= 10
    assert "topic: 5 values, 20 to 20 queries each" in made.table()


def test_queries_of_one_request_never_part(recipe: Path) -> None:
    synthesize(recipe, n=100, teacher=Author())
    splits = defaultdict(list)
    for row in load_queries(load_recipe(recipe)):
        splits[row["group"]].append(row["split"])
    assert 10 <= len(splits) <= 12
    assert max(map(len, splits.values())) == 10
    assert all(len(set(found)) == 1 for found in splits.values())
    assert "# none yet" in (recipe / "recipe.yaml").read_text()


def test_rows_by_hand_stay_first_as_they_are(recipe_folder: Path) -> None:
    path = recipe_folder / "queries.jsonl"
    before = path.read_bytes()
    author = Author()
    synthesize(recipe_folder, n=20, teacher=author)
    assert path.read_bytes().startswith(before)
    rows = load_queries(load_recipe(recipe_folder))
    assert len(rows) == 26
    assert rows["reference"][:2] == ["red", "red"]
    assert rows["group"][:2] == ["plants", "plants"]
    assert rows["reference"][6:] == [None] * 20
    shown = [text for text in author.asked if kind_of(text) == "queries"][0]
    assert any(json.dumps(row["query"]) in shown for row in rows_of(recipe_folder)[:6])


def test_a_column_of_the_users_is_never_taken_for_an_attribute(recipe_folder: Path) -> None:
    edit(recipe_folder, "recipe.yaml", "reference: colour", "reference: language")
    edit(recipe_folder, "queries.jsonl", '"colour"', '"language"')
    synthesize(recipe_folder, n=5, teacher=Author())
    assert load_queries(load_recipe(recipe_folder))["reference"][6:] == [None] * 5
    assert {row["synthesis_language"] for row in rows_of(recipe_folder)[6:]} == {"en"}
    again = Author()
    assert synthesize(recipe_folder, n=5, teacher=again).kept == 5
    assert again.asked == []


def test_the_same_call_again_asks_nothing_and_changes_nothing(recipe: Path) -> None:
    first = synthesize(recipe, n=30, teacher=Author())
    before = contents(recipe)
    author = Author()
    again = synthesize(recipe, n=30, teacher=author)
    assert author.asked == []
    assert (again.kept, again.new) == (30, 0)
    assert again.uncovered_rules == first.uncovered_rules == ()
    after = contents(recipe)
    assert after.pop("synthesis.json") != before.pop("synthesis.json")  # `new` is 0 now
    assert after == before


def test_more_are_added_to_those_that_are_there(recipe: Path) -> None:
    synthesize(recipe, n=25, teacher=Author(hard=()))
    before = (recipe / "queries.jsonl").read_text()
    author = Author(hard=())
    made = synthesize(recipe, n=60, teacher=author)
    assert (made.new, made.dropped) == (35, {})
    assert (recipe / "queries.jsonl").read_text().startswith(before)
    assert set(author.kinds) == {"queries", "coverage"}
    assert len({row["query"] for row in rows_of(recipe)}) == 60


def test_two_steps_bring_what_one_would(recipe: Path) -> None:
    other = copy_of(recipe)
    for n in (25, 60):
        synthesize(recipe, n=n, teacher=Author(hard=()))
    synthesize(other, n=60, teacher=Author(hard=()))
    assert rows_of(other) == rows_of(recipe)


def test_what_a_person_wrote_is_not_written_again(recipe: Path) -> None:
    (recipe / "queries.jsonl").write_text('{"query": "What colour is a tomato at dawn?"}')
    wrote = json.dumps(["What colour is a tomato at noon?", "what  COLOUR is a tomato at dawn?"])
    made = synthesize(recipe, n=1, teacher=Author(says={"Write 10 inputs": wrote}))
    assert made.kept == 0
    assert made.dropped["near-duplicate"] >= 2


def test_what_a_person_changes_or_removes_stays_so(recipe: Path) -> None:
    synthesize(recipe, n=20, teacher=Author())
    rows = rows_of(recipe)
    rows[0]["query"] = "A question that a person wrote into the teacher's row?"
    removed = rows.pop(1)["query"]
    (recipe / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    synthesize(recipe, n=30, teacher=Author())
    found = rows_of(recipe)
    assert found[:19] == rows
    assert len(found) == 30
    assert removed not in {row["query"] for row in found}


KILLED = """
import asyncio, os, sys
from pathlib import Path
from distill_datasets.synthesis.run import synthesize
from tests.support.synthesis_author import Author

class Mortal(Author):
    async def sample(self, messages, sampling):
        with open(sys.argv[2], "a") as log:
            log.write("x")
        if len(self.asked) == int(sys.argv[3]):
            for _ in range(20):  # what was answered is kept in the same turn of the loop
                await asyncio.sleep(0)
            os._exit(9)
        return await super().sample(messages, sampling)

synthesize(Path(sys.argv[1]), n=100, teacher=Mortal())
"""


def test_a_killed_run_continues_and_pays_nothing_twice(recipe: Path, tmp_path: Path) -> None:
    log = tmp_path / "asked"
    run = forks.run(["-c", KILLED, str(recipe), str(log), "17"], env=os.environ, cwd=Path.cwd())
    assert run.returncode == 9
    assert not (recipe / "queries.jsonl").exists()
    whole, rest = Author(), Author()
    other = copy_of(recipe)
    shutil.rmtree(other / "synthesis")
    synthesize(recipe, n=100, teacher=rest)
    synthesize(other, n=100, teacher=whole)
    assert len(rest.asked) == len(whole.asked) - 17
    assert rows_of(other) == rows_of(recipe)


def test_the_order_of_the_replies_decides_nothing(recipe: Path) -> None:
    class Late(Author):
        async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
            for _ in range(random.Random(len(self.asked)).randrange(20)):
                await asyncio.sleep(0)
            return await super().sample(messages, sampling)

    other = copy_of(recipe)
    synthesize(recipe, n=50, teacher=Author())
    synthesize(other, n=50, teacher=Late())
    assert rows_of(other) == rows_of(recipe)


class Budget:
    """Enough for some requests."""

    def __init__(self, requests: int) -> None:
        self.left = requests

    @property
    def exhausted(self) -> bool:
        return self.left <= 0

    @property
    def spent(self) -> float:
        return 0.0

    @property
    def currency(self) -> str:
        return "EUR"

    def room(self, *about: Any) -> AbstractAsyncContextManager[None]:
        if self.exhausted:
            raise BudgetReached("enough")
        return nullcontext()

    def count(self, sampler: Sampler, reply: Reply) -> None:
        self.left -= 1


def test_a_budget_stops_it_and_the_next_call_goes_on(recipe: Path) -> None:
    first, second = Author(), Author()
    with pytest.raises(BudgetReached):
        synthesize(recipe, n=100, teacher=first, meter=Budget(6))
    assert len(first.asked) >= 6
    assert not (recipe / "queries.jsonl").exists()
    assert synthesize(recipe, n=100, teacher=second).kept == 100
    assert not set(first.asked) & set(second.asked)


def test_a_teacher_that_repeats_itself_is_left_and_that_is_said(recipe: Path) -> None:
    author = Author(repeats=True, hard=())
    made = synthesize(recipe, n=100, teacher=author)
    assert made.kept < 100
    assert author.kinds["queries"] == 8 + 2 * 18
    assert "under 5% of the queries were new in 2 rounds" in (made.stopped or "")
    repeated = made.dropped["near-duplicate"]
    assert repeated > 100
    assert f"dropped: {repeated} near-duplicate; stopped short of 100" in made.sentence()
    dropped = [
        json.loads(line)
        for line in (recipe / "synthesis" / "dropped.jsonl").read_text().splitlines()
    ]
    assert made.summary["dropped"]["near-duplicate"] == len(dropped)
    kept = {row["query"] for row in rows_of(recipe)}
    assert all(row["like"] in kept and row["similarity"] >= 0.6 for row in dropped)


def test_rules_that_nothing_exercises_are_aimed_at(recipe: Path) -> None:
    author = Author(hard=(2, 4))
    made = synthesize(recipe, n=40, teacher=author)
    aimed = [text for text in author.asked if "depends on this rule" in text]
    assert [RULES[1] in aimed[0], RULES[3] in aimed[1], len(aimed)] == [True, True, 2]
    assert made.uncovered_rules == ()
    assert made.kept == 40
    found = {number: row["queries"] for row in made.summary["rules"] for number in [row["number"]]}
    counted = [number for row in rows_of(recipe) for number in row["rules"]]
    assert found == {number: counted.count(number) for number in (1, 2, 3, 4)}
    assert min(found.values()) > 0


def test_a_rule_that_cannot_be_exercised_is_listed_after_three_attempts(recipe: Path) -> None:
    author = Author(rules=[*RULES, "Mention the moon at midnight."])
    made = synthesize(recipe, n=20, teacher=author)
    assert made.uncovered_rules == ("Mention the moon at midnight.",)
    assert sum("Mention the moon" in text and "Write 10" in text for text in author.asked) == 3
    assert made.summary["uncovered"] == [5]
    assert "      0  5. Mention the moon" in made.table()


def test_a_rule_that_the_teacher_refuses_to_aim_at_holds_nothing_up(recipe: Path) -> None:
    class Prudish(Author):
        async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
            if "depends on this rule" in messages[0]["content"]:
                raise RejectedError("no", type="content policy", status=400)
            return await super().sample(messages, sampling)

    made = synthesize(recipe, n=20, teacher=Prudish(hard=(4,)))
    assert (made.kept, made.summary["failed"]) == (20, 6)
    assert made.uncovered_rules == (RULES[1], RULES[3])


def test_a_prompt_without_rules_has_nothing_to_cover(recipe: Path) -> None:
    author = Author(rules=[])
    made = synthesize(recipe, n=10, teacher=author)
    assert (made.kept, made.summary["rules"], made.summary["unjudged"]) == (10, [], 0)
    assert set(author.kinds) == {"rules", "topics", "queries"}


def test_what_no_user_would_send_is_dropped(recipe: Path) -> None:
    remark = json.dumps(["a remark about the task", "what colour is a tomato at dawn?"])
    made = synthesize(recipe, n=1, teacher=Author(says={"Write 10 inputs": remark}))
    assert (made.dropped["off topic"], made.kept) == (1, 1)
    assert rows_of(recipe)[0]["query"] == "what colour is a tomato at dawn?"


def test_a_reply_that_cannot_be_read_is_asked_for_once_more_and_counted(recipe: Path) -> None:
    class Sloppy(Author):
        async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
            text = messages[0]["content"]
            if kind_of(text) == "queries":
                broken = "topic: food" in text or len(messages) == 1 and "topic: cars" in text
                self.says = {"": '["half of a'} if broken else {}
                if len(messages) == 3:
                    assert "That could not be read: it is not a JSON list" in messages[2]["content"]
                    messages = messages[:1]
            reply = await super().sample(messages, sampling)
            self.says = {}
            return reply

    author = Sloppy()
    made = synthesize(recipe, n=50, teacher=author)
    assert made.kept == 50
    assert made.summary["unreadable"] > 0
    assert {"cars"} <= {row["topic"] for row in rows_of(recipe)} <= set(TOPICS) - {"food"}


@pytest.mark.parametrize("kind", ["List the rules", "List 40 topics", "Write 10 inputs"])
def test_a_teacher_that_cannot_do_it_is_shown_with_what_it_said(recipe: Path, kind: str) -> None:
    says = {kind: "kele is wuse", "could not be read": "kele again"}
    with pytest.raises(GenerationError, match="it said 'kele again'.*larger teacher.*pocket"):
        synthesize(recipe, n=10, teacher=Author(says=says))
    assert not (recipe / "queries.jsonl").exists()


def test_a_failing_teacher_stops_it_and_the_cause_is_said(recipe: Path) -> None:
    class Broken(Author):
        async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
            if kind_of(messages[0]["content"]) == "queries":
                raise TimeoutError("no answer in 5 s")
            return await super().sample(messages, sampling)

    with pytest.raises(GenerationError, match="TimeoutError: no answer in 5 s. Mend the cause"):
        synthesize(recipe, n=10, teacher=Broken())


def test_the_prompt_reaches_the_teacher_as_it_is_written(recipe: Path) -> None:
    author = Author()
    synthesize(recipe, n=5, teacher=author)
    for text in author.asked:
        fenced = text.split("```json\n", 1)[1].split("\n```", 1)[0]
        assert json.loads(fenced) == PROMPT
        assert "The mark {{ query }} in it" in text


def test_a_recipe_says_what_is_varied_and_which_rules_there_are(recipe: Path) -> None:
    path = recipe / "recipe.yaml"
    path.write_text(
        path.read_text() + "synthesis: {topics: [planets], styles: [rude], languages: [tr], "
        "rules: [Name one colour.], per_request: 4}\n"
    )
    before = load_recipe("language_id").digest
    assert (
        load_recipe("language_id").replace(synthesis=load_recipe(recipe).synthesis).digest == before
    )
    author = Author()
    made = synthesize(recipe, n=8, teacher=author)
    assert set(author.kinds) == {"queries", "coverage"}
    assert "Write 4 inputs" in author.asked[0]
    assert {(row["topic"], row["style"], row["language"]) for row in rows_of(recipe)} == {
        ("planets", "rude", "tr")
    }
    assert [row["rule"] for row in made.summary["rules"]] == ["Name one colour."]


def test_a_shipped_recipe_is_copied_to_a_folder_that_has_all_its_rows(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="comes with the package.*--out"):
        synthesize("language_id_tutorial", n=5, teacher=Author())
    out = tmp_path / "mine"
    made = synthesize("language_id_tutorial", n=5, out=out, teacher=Author())
    rows = load_queries(load_recipe(out))
    old = load_queries(load_recipe("language_id_tutorial"))
    assert (made.path, len(rows)) == (out, 17)
    for column in ("id", "query", "reference", "split", "group"):
        assert rows[column][:12] == old[column][:]
    again = Author()
    assert synthesize("language_id_tutorial", n=5, out=out, teacher=again).new == 0
    assert again.asked == []


def test_a_folder_with_something_else_in_it_is_left_alone(
    recipe: Path, recipe_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="holds another recipe"):
        synthesize(recipe, n=5, out=recipe_folder, teacher=Author())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no recipe"):
        synthesize(recipe, n=5, out=tmp_path / "full", teacher=Author())


def spoil_sidecar(folder: Path) -> None:
    edit(folder, "recipe.yaml", "file: queries.jsonl,", "file: queries.jsonl, rows: [1, 2],")


def spoil_line(folder: Path) -> None:
    edit(folder, "queries.jsonl", '{"query": "a thought"', '"query": "a thought"')


def spoil_ending(folder: Path) -> None:
    edit(folder, "recipe.yaml", "queries.jsonl", "queries.csv")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_sidecar, "fixes them by rows"),
        (spoil_line, "Line 6 of .*expected a JSON object"),
        (spoil_ending, "they are in 'queries.csv'"),
    ],
)
def test_queries_that_cannot_be_added_to_are_named_before_anything_is_asked(
    recipe_folder: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(recipe_folder)
    author = Author()
    with pytest.raises(RecipeError, match=said):
        synthesize(recipe_folder, n=5, teacher=author)
    assert author.asked == []


def test_the_coverage_of_queries_by_hand_is_taken_without_writing_any(recipe_folder: Path) -> None:
    before = contents(recipe_folder)
    author = Author(hard=())
    made = synthesize(recipe_folder, n=0, teacher=author)
    assert author.kinds == {"rules": 1, "coverage": 1}
    assert made.uncovered_rules == tuple(RULES[1:])
    assert [row["queries"] for row in made.summary["rules"]] == [6, 0, 0, 0]
    after = contents(recipe_folder)
    assert after.pop("synthesis.json")
    assert after == before


class AuthorServer(OpenAIServer):
    """An endpoint whose model is an author."""

    def complete(self, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        status, completion = super().complete({**body, "max_tokens": 10**9})
        said = Author().answer(body["messages"][-1]["content"])
        for choice in completion["choices"]:
            choice["message"]["content"] = said
        return status, completion


def test_a_teacher_behind_an_endpoint_writes_queries(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = AuthorServer()
    server.start()
    try:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        made = synthesize(recipe, n=30, teacher="openai:echo-large")
    finally:
        server.stop()
    assert (made.kept, made.uncovered_rules) == (30, ())
    assert made.summary["teacher"] == "openai:echo-large"
    assert server.bodies[-1]["temperature"] == 0.0
    assert {body["temperature"] for body in server.bodies} == {0.0, 1.0}


def test_samples_that_came_with_a_new_recipe_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    folder = new_recipe("mine", tmp_path / "mine")
    assert len(synthesize(folder, n=0, teacher=Author()).summary["rules"]) == len(RULES)
    (folder / "prompt.md").write_text("Name the colour.")
    with pytest.warns(UserWarning, match="are the samples that `new` wrote") as said:
        made = synthesize(folder, n=0, teacher=Author())
    assert made.summary["by_hand"] == 0
    assert "they are left out here" in str(said[-1].message)


def test_conversations_are_written_with_the_numbers_of_turns_that_are_wanted(
    recipe: Path, tmp_path: Path
) -> None:
    (recipe / "prompt.md").write_text("Name the colour that the user asks for.")
    edit(recipe, "recipe.yaml", "queries.jsonl}", "queries.jsonl, messages: messages}")
    (recipe / "queries.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "Hello, colour expert"}]}\n'
    )
    author = Author(hard=())
    made = synthesize(recipe, n=60, teacher=author)
    rows = rows_of(recipe)[1:]
    assert made.kept == len(rows) == 60
    assert {str(len(row["messages"])) for row in rows} == {*made.summary["balance"]["turns"]}
    assert {"1", "3", "5"} == {row["turns"] for row in rows}
    assert all(row["messages"][-1]["role"] == "user" for row in rows)
    asked = [text for text in author.asked if kind_of(text) == "queries"]
    assert '[["Hello, colour expert"]]' in asked[0]
    assert generate(recipe, teacher=Echo(), out=tmp_path / "run").kept == 61
    again = Author(hard=())
    assert synthesize(recipe, n=60, teacher=again).new == 0 and not again.asked


def test_queries_are_aimed_at_each_tool_and_at_what_each_check_covers(recipe: Path) -> None:
    tool = {"name": "mix", "description": "Mixes two colours.", "parameters": {"type": "object"}}
    (recipe / "tools.json").write_text(json.dumps([tool]))
    (recipe / "prompt.md").write_text("Name the colour.")
    with (recipe / "recipe.yaml").open("a") as keys:
        keys.write(
            "tools: tools.json\nchecks: [{name: polite, ends_with: '.', covers: Be polite}]\n"
        )
    author = Author(rules=(), hard=())
    made = synthesize(recipe, n=20, teacher=author)
    rules = [row["rule"] for row in made.summary["rules"]]
    assert rules == ["Calls the tool mix: Mixes two colours.", "Be polite"]
    asked = "\n".join(text for text in author.asked if kind_of(text) == "queries")
    assert '"Be polite"' in asked
    assert '\\"name\\": \\"mix\\"' in asked


def test_several_prompts_get_their_queries_each_for_itself(recipe: Path) -> None:
    home = recipe.parent / "all"
    home.mkdir()
    copy = "name: all\ndescription: d\nteacher: pocket\nprompts: {'[bare]': bare}\n"
    (home / "recipe.yaml").write_text(copy)
    shutil.copytree(recipe, home / "bare")
    (home / "bare" / "queries.jsonl").write_text('{"query": "a"}\n')
    with pytest.raises(RecipeError, match="has several prompts"):
        synthesize(home, n=1, teacher=Author())

"""Releases of conversations and of calls of tools."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import List, load_dataset
from huggingface_hub import DatasetCard
from pyarrow.parquet import read_table

from distill_datasets.errors import DatasetError, RecipeError, ScreeningError
from distill_datasets.generation.run import generate
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.hub.screening import require_clean, screen
from distill_datasets.models.openai import OpenAISampler
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.releases.contents import check_release
from distill_datasets.releases.diff import diff
from distill_datasets.releases.release import Release, publish
from tests.support.conversations import PROMPT, TOOLS, Talker, said, talks, user
from tests.support.hub_cards import complaints
from tests.support.hub_fixture import Hub
from tests.support.openai_server import Answer, serving
from tests.support.releases import push

CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "find_order", "arguments": '{"id": "A-7"}'},
}
CALL_TEXT = '{"name": "find_order", "arguments": {"id": "A-1"}}'
BEFORE = [
    {"role": "system", "content": "It is Monday."},
    user("Where is A-7?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"state": "sent"}', "tool_call_id": "call_1"},
]
ROWS: list[Any] = [[*BEFORE[:2]], BEFORE, [user("A-8")], [user("go on and on")]]


def released(
    tmp_path: Path, rows: list[Any] = ROWS, *, prompt: bool = True, **keys: Any
) -> Release:
    recipe = talks(tmp_path / "recipe", rows, **keys)
    generate(recipe, teacher=Talker(), out=tmp_path / "run")
    return publish(tmp_path / "run", prompt=prompt)


def rows_of(release: Release, tmp_path: Path) -> Any:
    return load_dataset(str(release.path), cache_dir=str(tmp_path / "cache"))["train"]


def card_of(release: Release) -> str:
    return (release.path / "README.md").read_text(encoding="utf-8")


def test_plain_datasets_reads_calls_as_objects_and_conversations_whole(tmp_path: Path) -> None:
    release = released(tmp_path, tools=True)
    rows = rows_of(release, tmp_path)
    assert [row["messages"][-1] for row in rows][:2] == [
        said("You said: Where is A-7?"),
        said('You said: {"state": "sent"}'),
    ]
    whole, asked = rows[1]["messages"], rows[2]["messages"]
    assert [message["role"] for message in whole] == [
        *("system", "user", "assistant", "tool", "assistant")
    ]
    assert asked[-1]["content"] == "Let me look."
    (call,) = asked[-1]["tool_calls"]
    assert call["function"] == {"name": "find_order", "arguments": {"id": "A-8"}}
    (features,) = [
        one["features"]
        for one in DatasetCard.load(release.path / "README.md").data["dataset_info"]
        if one["config_name"] == "default"
    ]
    assert {"name": "messages", "list": "json"} in features
    assert isinstance(rows.features["messages"], List)


def test_the_prompt_and_the_dropped_tools_are_in_no_row(tmp_path: Path) -> None:
    release = released(tmp_path, tools=True)
    text = json.dumps([read_table(path).to_pylist() for path in release.path.glob("*/*.parquet")])
    assert PROMPT not in text and "Look an order up" not in text
    assert "It is Monday." in text
    assert "tools" not in rows_of(release, tmp_path).column_names


def test_a_student_that_keeps_its_tools_and_a_short_prompt_finds_both_in_its_rows(
    tmp_path: Path,
) -> None:
    view = {"prompt": "[desk]", "tools": "keep"}
    rows = rows_of(released(tmp_path, tools=True, student=view), tmp_path)
    assert json.loads(rows[0]["tools"]) == TOOLS
    assert rows[0]["messages"][0] == {"role": "system", "content": "[desk]\n\nIt is Monday."}
    assert rows[2]["messages"][0] == {"role": "system", "content": "[desk]"}


def test_a_release_makes_itself_again_without_asking_anybody(tmp_path: Path) -> None:
    release = released(tmp_path, tools=True, student={"prompt": "[desk]"})
    check_release(release.path)
    nobody = Talker()
    generate(release.path, teacher=nobody, out=tmp_path / "again")
    copy = publish(tmp_path / "again")
    assert (nobody.asked, copy.digest) == ([], release.digest)
    assert diff(release.path, copy.path).empty


def test_what_the_queries_hold_beyond_the_conversations_stays_at_home(tmp_path: Path) -> None:
    rows = [
        {"messages": [{**user("Hi"), "author": "Ada"}, said("An old answer")], "note": "secret"},
        {"messages": [user("Bye")]},
    ]
    with pytest.warns(UserWarning, match="the last answer"):
        release = released(tmp_path, rows, tools=True, examples=None)
    queries = (release.path / "recipe" / "queries.jsonl").read_text()
    assert [json.loads(line) for line in queries.splitlines()] == [
        {"messages": [user("Hi")]},
        {"messages": [user("Bye")]},
    ]
    assert load_recipe(release.path).tools_text is not None
    nobody = Talker()
    generate(release.path, teacher=nobody, out=tmp_path / "again")
    assert nobody.asked == []


def test_a_row_whose_own_system_message_is_the_prompt_is_refused(tmp_path: Path) -> None:
    rows = [[{"role": "system", "content": PROMPT}, user("Hi")]]
    with pytest.raises(DatasetError, match="holds the teacher's prompt"):
        released(tmp_path, rows)


def test_another_view_of_the_student_is_another_major_version(tmp_path: Path) -> None:
    released(tmp_path)
    release = released(tmp_path, student={"prompt": "[desk]"})
    assert (release.version, release.why) == (
        "2.0.0",
        "the response format changed (student.prompt)",
    )


def test_a_card_shows_a_conversation_and_how_a_student_is_asked(tmp_path: Path) -> None:
    card = card_of(released(tmp_path, tools=True, student={"prompt": "[desk]"}))
    assert complaints(card, "datasets") == []
    assert "system: [desk]\n\nIt is Monday.\n\nuser: Where is A-7?\n\nassistant: You said" in card
    assert "behind its own short prompt as the system message. It isn't given the tools" in card
    assert "| tools of the teacher | `find_order` |" in card
    assert '"messages"' not in card
    kept = card_of(released(tmp_path / "kept", tools=True, student={"tools": "keep"}))
    assert "It is given the tools in the column `tools`." in kept
    every = card_of(released(tmp_path / "every", [[user("A"), user("B")]], turns="all"))
    assert "is asked with the conversation alone. The teacher answered every turn" in every


def test_without_the_prompt_neither_examples_nor_dropped_tools_are_published(
    tmp_path: Path,
) -> None:
    (tmp_path / "recipe").mkdir()
    example = {"query": "A-1", "response": "Let me see to A-1."}
    (tmp_path / "recipe" / "examples.jsonl").write_text(json.dumps(example))
    keys: dict[str, Any] = {"tools": True, "examples": "examples.jsonl"}
    release = released(tmp_path, prompt=False, **keys)
    text = b"".join(path.read_bytes() for path in release.path.rglob("*") if path.is_file())
    for secret in (PROMPT, "Look an order up", "Let me see to"):
        assert secret.encode() not in text
    with pytest.raises(RecipeError, match="published without its prompt"):
        load_recipe(release.path)
    shown = publish(tmp_path / "run")
    assert load_recipe(shown.path).example_turns == [user("A-1"), said(example["response"])]


def test_personal_data_within_a_conversation_is_found(tmp_path: Path) -> None:
    rows = [[user("I am ada.lovelace@analytical-engine.org"), said("Hello."), user("Well?")]]
    with pytest.raises(ScreeningError, match="email"):
        require_clean(screen(released(tmp_path, rows).path))


LOAD = """
import json, sys
from datasets import load_dataset
print(json.dumps(load_dataset(sys.argv[1], revision="v1.0.0")["train"]["messages"][:]))
"""


def test_calls_are_read_from_the_hub_as_from_here(hub: Hub, tmp_path: Path) -> None:
    release = released(tmp_path, tools=True, license="mit")
    assert push(hub, release, "me/desk")["version"] == "1.0.0"
    done = hub.run(["-c", LOAD, "me/desk"])
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout.splitlines()[-1])
    assert read == rows_of(release, tmp_path)["messages"][:]


def test_a_server_that_calls_tools_makes_one_release_online_and_in_batches(
    tmp_path: Path,
) -> None:
    rows = [[user('Look.\ncall find_order {"id": "A-1"}')], BEFORE, [user("Thanks")]]
    recipe = talks(tmp_path / "recipe", rows, tools=True)
    digests = []
    with serving() as server:
        server.answer = Answer(usage={"prompt_tokens": 10})
        for batch in (False, True):
            teacher = OpenAISampler("echo-small", base_url=server.url)
            settings = GenerateSettings(batch=batch, poll=0)
            out = tmp_path / f"run {batch}"
            made = generate(recipe, teacher=teacher, out=out, settings=settings)
            assert made.rows["answer"][0] == f"[{CALL_TEXT}]"
            digests.append(publish(out).digest)
    assert digests[0] == digests[1]

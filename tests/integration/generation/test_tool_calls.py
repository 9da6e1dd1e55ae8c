"""Recipes with tools: what is asked over a real connection, and what its calls become."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.generation.run import Generated, generate
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.models.openai import OpenAISampler
from tests.support.openai_server import OpenAIServer

SIZE = {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]}
TOOLS = [
    {"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": SIZE}}
]
ASKED = {
    "alone": 'call find {"id": "A-1"}',
    "both": 'call find {"id": "B"}\ncall find {"id": "A"}\nI look.',
    "words": "Which one do you mean?",
    "broken": 'call find {"id": "A',
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Queries that are said to call, each after an earlier call and its answer."""
    made = tmp_path / "orders"
    made.mkdir()
    (made / "recipe.yaml").write_text(
        "name: orders\ndescription: Which order is it?\nteacher: pocket\n"
        "queries: {file: queries.jsonl, messages: messages}\ntools: tools.json\n"
        "license: apache-2.0\nlanguages: [en]\n"
    )
    (made / "prompt.md").write_text("Find the order.\n")
    (made / "tools.json").write_text(json.dumps(TOOLS))
    call = {"id": "x7", "type": "function", "function": {"name": "find", "arguments": "{}"}}
    before = [
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "x7", "content": "which?"},
    ]
    rows = [[*before, {"role": "user", "content": text}] for text in ASKED.values()]
    lines = [json.dumps({"messages": row}) for row in rows]
    (made / "queries.jsonl").write_text("\n".join(lines))
    return made


def run(server: OpenAIServer, folder: Path, out: Path, *, stream: bool, batch: bool) -> Generated:
    teacher = OpenAISampler("echo-small", base_url=server.url, stream=stream)
    settings = GenerateSettings(batch=batch, poll=0)
    return generate(folder, teacher=teacher, out=out, settings=settings)


@pytest.mark.parametrize("way", ["whole", "streamed", "batch"])
def test_calls_are_the_answers_of_a_recipe_with_tools(
    way: str, server: OpenAIServer, folder: Path, tmp_path: Path
) -> None:
    found = run(server, folder, tmp_path / "out", stream=way == "streamed", batch=way == "batch")
    rows: dict[str, Any] = {}
    for row in found.rows:
        said = json.loads(row["query"])[-1]["content"]
        rows[next(name for name, text in ASKED.items() if text == said)] = row
    call = '{"name": "find", "arguments": {"id": "%s"}}'
    answers = {name: rows[name]["answer"] for name in ("alone", "both", "words")}
    assert answers == {
        "alone": f"[{call % 'A-1'}]",
        "both": f"[{call % 'A'}, {call % 'B'}]",
        "words": "[]",
    }
    assert rows["both"]["raw"].startswith("I look.\n<tool_call>\n")
    assert rows["words"]["response"] == ASKED["words"]
    assert rows["broken"]["rejection"] and '\\"A' in rows["broken"]["raw"]
    assert not rows["broken"]["answer"] and not rows["broken"]["error"]


def test_a_request_has_the_catalogue_and_the_conversation(
    server: OpenAIServer, folder: Path, tmp_path: Path
) -> None:
    run(server, folder, tmp_path / "out", stream=False, batch=False)
    for body in server.bodies:
        assert body["tools"] == TOOLS
        assert [turn["role"] for turn in body["messages"]] == [
            *("system", "user", "assistant", "tool", "user")
        ]
        assert body["messages"][2]["content"] is None
        assert body["messages"][2]["tool_calls"][0]["id"] == "x7"
        assert body["messages"][3]["tool_call_id"] == "x7"

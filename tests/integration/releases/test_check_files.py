"""What goes along with a student lets anybody check it, with pytest alone."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from distill_datasets.conversations import write_calls
from distill_datasets.generation.run import generate
from distill_datasets.models.sampler import Reply, Sample, Sampling, Usage
from distill_datasets.recipes.checks import Said, passes
from distill_datasets.recipes.sections import Check
from distill_datasets.releases.check_files import write_check_files
from distill_datasets.releases.release import publish
from tests.support.openai_server import Answer, OpenAIServer


class Table:
    """Answers a query from a table."""

    model = identity = "table"

    def __init__(self, answers: Mapping[str, str]) -> None:
        self.answers = answers

    async def sample(self, messages: Any, sampling: Sampling) -> Reply:
        text = self.answers[messages[-1]["content"]]
        return Reply((Sample(text, "stop", 3),), Usage(9, 0))


COLOURS = """\
answer: {pattern: 'colour: (?P<answer>\\w+)$', choices: [red, blue]}
response: 'It is {{ answer }}.'
sampling: {max_tokens: 7}
"""
RIGHT = {"rose": "red", "blood": "red", "sky": "blue"}
Release = Callable[..., Path]


def make_release(
    folder: Path,
    answers: Mapping[str, str],
    keys: str = COLOURS,
    right: Mapping[str, Any] | None = None,
) -> Path:
    """A release of which every row but one is held out."""
    recipe = folder / "recipe"
    recipe.mkdir()
    (recipe / "recipe.yaml").write_text(
        "name: things\ndescription: Things.\nteacher: pocket\nqueries: {file: queries.jsonl, "
        "query: query, reference: right, forced_split: split}\n" + keys
    )
    (recipe / "prompt.md").write_text("Name it.\n")
    rows = [{"query": one, "right": (right or {}).get(one), "split": "test"} for one in answers]
    rows.append({"query": "train", "right": None, "split": "train"})
    (recipe / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (recipe / "tools.json").write_text(json.dumps([TOOL]))
    said = {**answers, "train": next(iter(answers.values()))}
    generate(recipe, teacher=Table(said), out=folder / "run")
    return publish(folder / "run").path


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return partial(make_release, tmp_path)


TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    lines = (folder / "check" / "rows.jsonl").read_text().splitlines()
    return {row["messages"][-1]["content"]: row for row in map(json.loads, lines)}


def check(folder: Path, server: OpenAIServer | None = None) -> tuple[int, str]:
    """The exit code and the last line of pytest on what was written."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    if server:
        env |= {"STUDENT_BASE_URL": server.url, "STUDENT_MODEL": "echo-small"}
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    done = subprocess.run(
        [*command, "test_student.py"], cwd=folder / "check", env=env, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_right_answers_pass_and_wrong_ones_fail_by_name(
    release: Release, server: OpenAIServer, tmp_path: Path
) -> None:
    folder = release({thing: f"colour: {one}" for thing, one in RIGHT.items()}, COLOURS, RIGHT)
    assert write_check_files(folder, tmp_path / "out") == 3
    server.answer = Answer("It is red.")
    code, text = check(tmp_path / "out", server)
    assert code == 1
    assert "1 failed, 2 passed" in text
    (asked,) = [body for body in server.bodies if body["messages"][-1]["content"] == "sky"]
    assert asked == {
        "model": "echo-small",
        "messages": [{"role": "user", "content": "sky"}],
        "temperature": 0,
        "max_tokens": 7,
    }
    server.answer = Answer("It is red and more than seven words long.")
    code, text = check(tmp_path / "out", server)
    assert "3 failed" in text
    assert "the answer was cut off" in text
    server.answer = Answer(" ")
    assert "the answer is empty" in check(tmp_path / "out", server)[1]


def test_rows_that_the_student_got_wrong_at_its_release_are_expected_to_fail(
    release: Release, server: OpenAIServer, tmp_path: Path
) -> None:
    folder = release({thing: f"colour: {one}" for thing, one in RIGHT.items()}, COLOURS, RIGHT)
    write_check_files(folder, tmp_path / "first")
    said = {
        row["id"]: {"text": "It is red.", "answer": "red", "stop_reason": "stop"}
        for row in rows_of(tmp_path / "first").values()
    }
    write_check_files(folder, tmp_path / "out", said=said)
    assert [
        name for name, row in rows_of(tmp_path / "out").items() if "wrong_at_release" in row
    ] == ["sky"]
    server.answer = Answer("It is red.")
    code, text = check(tmp_path / "out", server)
    assert (code, "2 passed, 1 xfailed" in text) == (0, True)


def test_without_a_server_nothing_passes_and_the_message_says_what_to_set(
    release: Release, tmp_path: Path
) -> None:
    write_check_files(release({"sky": "colour: blue"}, COLOURS), tmp_path / "out")
    code, text = check(tmp_path / "out")
    assert code == 2
    assert "Set STUDENT_BASE_URL and STUDENT_MODEL" in text


def test_calls_are_right_whatever_their_order_and_wherever_a_server_leaves_them(
    release: Release, server: OpenAIServer, tmp_path: Path
) -> None:
    call = {"name": "look", "arguments": {"at": "sky"}}
    answers = {
        'call look {"at": "sky"}': write_calls("", [json.dumps(call)]),
        "hello": "Hello yourself!",
    }
    folder = release(answers, "tools: tools.json\nstudent: {tools: keep}\n")
    write_check_files(folder, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert [row["right"] for row in rows.values()] == [{"calls": [call]}, {"calls": []}]
    assert json.loads((tmp_path / "out/check/student.json").read_text())["tools"] == {"": [TOOL]}
    # The server calls what a line of the last message says, and else echoes it.
    code, text = check(tmp_path / "out", server)
    assert (code, "2 passed" in text) == (0, True), text
    assert server.bodies[-1]["tools"] == [TOOL]
    server.answer = Answer(
        '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call>'
    )
    assert "1 failed, 1 passed" in check(tmp_path / "out", server)[1]


SCHEMA = "json_schema: {type: object, properties: {a: {type: number}, b: {type: string}}}"


@pytest.mark.parametrize(
    ("keys", "answer", "right", "good", "bad"),
    [
        (f"answer: {{{SCHEMA}}}\n", '{"b": "x", "a": 1.0}', {"json": {"a": 1, "b": "x"}},
         '{"a": 1, "b": "x"}', '{"a": 1}'),
        (f"answer: {{{SCHEMA}, field: b}}\nresponse: '{{{{ text }}}}'\n", '{"a": 2, "b": "x"}',
         {"field": "b", "answer": "x"}, '```json\n{"b": "x"}\n```', '{"b": "y"}'),
        ("answer: {pattern: '(?m)^So: (?P<answer>\\d+)\\s*\\Z'}\nresponse: '{{ text }}'\n",
         "Well.\nSo: 7", {"pattern": "(?m)^So: (?P<answer>\\d+)\\s*\\Z", "answer": "7"},
         "It is so.\nSo: 7", "So: 8"),
        ("response: '{{ text }}'\nchecks: [{name: kind, ends_with: '?'}, {name: brief, "
         "words: 3}]\n", "How are you?", {}, "Who knows?", "Nobody knows."),
    ],
)  # fmt: skip
def test_each_form_of_answer_is_told_right_from_wrong(
    keys: str, answer: str, right: Any, good: str, bad: str, release: Release, tmp_path: Path
) -> None:
    write_check_files(release({"sky": answer}, keys), tmp_path / "out")
    (row,) = rows_of(tmp_path / "out").values()
    assert row["right"] == right
    written = load(tmp_path / "out")
    if NODE:
        assert in_javascript(tmp_path / "out", [good, bad]) == [True, False]
    for text, fine in ((good, True), (bad, False)):
        said = written.read({"content": text}, "stop")
        try:
            written.check_right(row["right"], said)
            passed = all(written.passes(*one, said) for one in row["checks"].values())
        except AssertionError:
            passed = False
        assert passed == fine


def load(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("written", folder / "check/test_student.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NODE = shutil.which("node")  # which promptfoo needs, and nothing else here


def in_javascript(folder: Path, texts: Sequence[str]) -> list[bool]:
    """Whether what promptfoo calls lets each text pass for the first row."""
    script = (
        "const { tests, compare } = require('./promptfoo.js');"
        "const [{ vars }] = tests();"
        "const texts = JSON.parse(process.argv[1]);"
        "console.log(JSON.stringify(texts.map((text) => compare(text, { vars }).pass)));"
    )
    command = [NODE or "node", "-e", script, json.dumps(texts)]
    done = subprocess.run(command, cwd=folder / "check", capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


TEXTS = ("", "Straße?", "one two\nthree", "STOP now.", "é" * 5, "a cat and a DOG.")


def test_checks_hold_of_the_same_texts_as_in_the_package(release: Release, tmp_path: Path) -> None:
    write_check_files(release({"sky": "colour: blue"}, COLOURS), tmp_path / "out")
    written = load(tmp_path / "out")
    demands: list[tuple[str, Any]] = [
        ("matches", r"^three$"),
        ("matches", r"(?m)^three$"),
        ("not_matches", "cat|dog"),
        ("starts_with", ["one", "a"]),
        ("ends_with", [".", "?"]),
        ("characters", {"min": 1, "max": 6}),
        ("characters", {"min": 7, "max": None}),
        ("contains", ["cat", "dog"]),
        ("contains_any", ["strasse", "stop"]),
        ("never", ["Dog"]),
        ("calls", ["look"]),
        ("never_calls", True),
    ]
    for kind, wanted in demands:
        ours = Check(**{"name": "one", kind: wanted})
        for text in TEXTS:
            answer = written.read({"content": text}, "stop")
            there = written.passes(kind, wanted, answer)
            assert there == passes(ours, Said(text, has_tools=True)), (kind, wanted, text)


def test_promptfoo_is_told_the_server_and_the_model_by_variables(
    release: Release, tmp_path: Path
) -> None:
    write_check_files(release({"sky": "colour: blue"}, COLOURS), tmp_path / "out")
    folder = tmp_path / "out" / "check"
    config = yaml.safe_load((folder / "promptfooconfig.yaml").read_text())
    (provider,) = config["providers"]
    assert provider["id"] == "openai:chat:{{ env.STUDENT_MODEL }}"
    assert provider["config"]["apiBaseUrl"] == "{{ env.STUDENT_BASE_URL }}"
    assert provider["config"]["max_tokens"] == 7
    named = re.findall(r"file://(\S+?):", (folder / "promptfooconfig.yaml").read_text())
    assert {name for name in named if (folder / name).is_file()} == {"promptfoo.js"}
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "gate.yaml", "promptfoo.js", "promptfooconfig.yaml"),
        *("rows.jsonl", "student.json", "test_student.py"),
    }


def test_what_is_no_release_has_nothing_to_check(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    assert write_check_files(tmp_path / "rows", tmp_path / "out") == 0
    assert not (tmp_path / "out").exists()

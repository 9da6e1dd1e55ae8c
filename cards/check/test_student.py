"""Asks a student every held-out row and looks at its answer. Needs pytest, and nothing else.

    STUDENT_BASE_URL=http://127.0.0.1:8000/v1 STUDENT_MODEL=student python -m pytest test_student.py

The server is any that speaks OpenAI's protocol; STUDENT_API_KEY is sent where it is set. rows.jsonl
has the rows, and what is right for each. Rows that the student answered wrongly when it was
released are expected to fail.
"""

import json
import os
import re
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SETTINGS = json.loads((HERE / "student.json").read_text(encoding="utf-8"))
SECONDS = 600
FENCE = re.compile(r"\A```\w*\n|\n```\Z")
BLOCK = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)

# An answer: its words, the calls of tools beside them, and why it ended.
Answer = tuple[str, Sequence[Mapping[str, Any]], str]


def rows() -> Iterator[Any]:
    """A case a row."""
    lines = (HERE / "rows.jsonl").read_text(encoding="utf-8").split("\n")
    for row in (json.loads(line) for line in lines if line):
        wrong = row.get("wrong_at_release")
        known = pytest.mark.xfail(reason="the student was wrong here when it was released")
        yield pytest.param(row, id=row["id"], marks=[known] if wrong else [])


def ask(row: Mapping[str, Any]) -> Answer:
    """What the student answers."""
    names = ("STUDENT_BASE_URL", "STUDENT_MODEL")
    if missing := [name for name in names if not os.environ.get(name)]:
        pytest.exit(f"Set {' and '.join(missing)}: which server to ask, and for which model.", 2)
    body = {
        "model": os.environ["STUDENT_MODEL"],
        "messages": row["messages"],
        "temperature": 0,
        "max_tokens": SETTINGS["max_tokens"],
    }
    if tools := SETTINGS["tools"].get(row.get("handle", "")):
        body["tools"] = tools
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("STUDENT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    url = os.environ["STUDENT_BASE_URL"].rstrip("/") + "/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        choice = json.load(response)["choices"][0]
    return read(choice["message"], choice.get("finish_reason") or "stop")


def read(message: Mapping[str, Any], finish_reason: str) -> Answer:
    """The words and the calls, which a server may leave in the text as the model writes them."""
    text = message.get("content") or ""
    calls = [one["function"] for one in message.get("tool_calls") or ()]
    calls += [json.loads(block) for block in BLOCK.findall(text)]
    return BLOCK.sub("", text).strip(), calls, finish_reason


def same_calls(calls: Sequence[Mapping[str, Any]]) -> list[str]:
    """Calls as texts, in one order; equal calls are equal texts."""
    found = []
    for call in calls:
        given = call.get("arguments") or {}
        given = json.loads(given or "{}") if isinstance(given, str) else given
        found.append(json.dumps({"name": call["name"], "arguments": given}, sort_keys=True))
    return sorted(found)


def check_right(right: Mapping[str, Any], answer: Answer) -> None:
    """Compare an answer with what is right, where one answer is."""
    text, calls, _ = answer
    if "text" in right:
        assert text == right["text"]
    if "json" in right:
        assert json.loads(FENCE.sub("", text)) == right["json"]
    if "field" in right:
        value = json.loads(FENCE.sub("", text))
        for name in right["field"].split("."):
            value = value[name]
        assert (value if isinstance(value, str) else json.dumps(value)) == right["answer"]
    if "pattern" in right:
        found = re.search(right["pattern"], text)
        assert found, f"{right['pattern']!r} is not in {text!r}"
        assert found["answer"].strip() == right["answer"]
    if "calls" in right:
        assert same_calls(calls) == same_calls(right["calls"])


def passes(kind: str, wanted: Any, answer: Answer) -> bool:
    """Whether an answer does what a check of the recipe demands."""
    text, calls, _ = answer
    plain, called = text.casefold(), {call["name"] for call in calls}
    if kind in ("matches", "not_matches"):
        return (re.search(wanted, text) is not None) == (kind == "matches")
    if kind == "characters":
        return wanted["min"] <= len(text) and (wanted["max"] is None or len(text) <= wanted["max"])
    if kind in ("starts_with", "ends_with"):
        return (text.startswith if kind == "starts_with" else text.endswith)(tuple(wanted))
    if kind == "calls":
        return set(wanted) <= called
    if kind == "never_calls":
        return not called if wanted is True else not called & set(wanted)
    occurring = [one.casefold() in plain for one in wanted]
    return {"contains": all, "contains_any": any, "never": lambda found: not any(found)}[kind](
        occurring
    )


@pytest.mark.parametrize("row", rows())
def test_student(row: dict[str, Any]) -> None:
    """The student's answer is whole, right where one answer is, and passes the row's checks."""
    answer = ask(row)
    text, calls, finish_reason = answer
    assert text or calls, "the answer is empty"
    assert finish_reason != "length", f"the answer was cut off: {text!r}"
    check_right(row["right"], answer)
    for name, (kind, wanted) in row["checks"].items():
        assert passes(kind, wanted, answer), f"check {name} ({kind} {wanted!r}): {text!r}"

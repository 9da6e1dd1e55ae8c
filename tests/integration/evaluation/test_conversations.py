"""Reports of recipes whose queries are conversations, or whose teacher calls tools."""

import json
from pathlib import Path
from typing import Any

from distill_datasets.evaluation.report import Report, measure
from distill_datasets.generation.run import generate
from distill_datasets.releases.release import publish
from tests.support.conversations import PROMPT, TOOLS, Talker, said, talks, user

ROWS: list[Any] = [
    {"messages": [user("Hi"), said("Yes?"), user("A-1")], "right": [
        {"name": "find_order", "arguments": {"id": "A-1"}}
    ]},
    {"messages": [{"role": "system", "content": "It is Monday."}, user("Bye")], "right": []},
]  # fmt: skip


class Measured:
    """A recipe of two rows, asked and measured; `student` also called the tool where it has it."""

    def __init__(self, tmp_path: Path, **keys: Any) -> None:
        queries = {"file": "queries.jsonl", "messages": "messages", "reference": "right"}
        recipe = talks(tmp_path / "recipe", ROWS, tools=True, queries=queries, **keys)
        generate(recipe, teacher=Talker(), out=tmp_path / "run")
        publish(tmp_path / "run")
        self.base, self.teacher = Talker(model="base", identity="base/1"), Talker()
        self.student = Talker(model="student", identity="student/1")
        self.report: Report = measure(
            tmp_path / "run",
            student=self.student,
            base=self.base,
            teacher=self.teacher,
            out=tmp_path / "report",
        )

    def asked(self, name: str) -> list[list[str]]:
        """The texts of each conversation that a system was given, in the report and for timing."""
        return [
            [message["content"] for message in messages]
            for messages, _ in getattr(self, name).asked
        ]

    def tools(self, name: str) -> set[str | None]:
        return {sampling.tools for _, sampling in getattr(self, name).asked}


def accuracy(measured: Measured, name: str) -> float:
    return float(measured.report.data["systems"][name]["metrics"]["accuracy"]["value"])


def test_a_student_without_the_catalogue_is_asked_without_it(tmp_path: Path) -> None:
    measured = Measured(tmp_path)
    assert measured.tools("student") == measured.tools("base") == {None}
    assert ["Hi", "Yes?", "A-1"] in measured.asked("student")
    assert ["It is Monday.", "Bye"] in measured.asked("base")
    assert [PROMPT, "Hi", "Yes?", "A-1"] in measured.asked("teacher")
    assert (accuracy(measured, "teacher"), accuracy(measured, "student")) == (1.0, 0.5)


def test_a_student_with_its_tools_and_short_prompt_is_asked_with_both(tmp_path: Path) -> None:
    measured = Measured(tmp_path, student={"prompt": "[desk]", "tools": "keep"})
    (tools,) = measured.tools("student")
    assert json.loads(str(tools)) == TOOLS
    assert measured.tools("base") == {tools}
    assert ["[desk]\n\nIt is Monday.", "Bye"] in measured.asked("student")
    assert accuracy(measured, "student") == 1.0


def test_the_teacher_keeps_its_tools_and_uncached_requests_have_new_ones(tmp_path: Path) -> None:
    measured = Measured(tmp_path)
    released, *fresh = sorted(measured.tools("teacher"), key=lambda text: len(str(text)))
    assert json.loads(str(released)) == TOOLS
    assert len(fresh) == 3  # requests that were timed as uncached
    read = [json.loads(str(text))[0]["function"] for text in fresh]
    assert {one["name"] for one in read} == {"find_order"}
    assert all(one["description"].startswith("Look an order up.\n") for one in read)


def test_the_rows_of_a_report_show_conversations_readably(tmp_path: Path) -> None:
    measured = Measured(tmp_path)
    rows = measured.report.data["rows"]
    assert rows[0]["query"] == "user: Hi\n\nassistant: Yes?\n\nuser: A-1"
    assert rows[0]["expected"] == rows[0]["teacher"]
    assert "user: Hi assistant: Yes? user: A-1" in measured.report.table()

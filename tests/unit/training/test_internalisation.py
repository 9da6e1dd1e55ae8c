"""How much of the prompt is in the weights: the number."""

import json
from pathlib import Path

import pytest

from distill_datasets.conversations import assistant_message, to_text
from distill_datasets.errors import DatasetError
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.training.internalisation import (
    ReferenceLikelihoods,
    TeacherAnswer,
    internalisation,
    per_token,
)

ENDS = ReferenceLikelihoods(
    groups=["a", "b", "c"], tokens=[2, 2, 4], base=[8.0, 6.0, 10.0], teacher=[1, 1, 2]
)


def test_the_base_scores_nothing_and_the_teacher_everything() -> None:
    assert internalisation(ENDS.base, ENDS).value == 0
    assert internalisation(ENDS.teacher, ENDS).value == 1


def test_the_score_is_the_share_of_the_gap_that_is_closed() -> None:
    found = internalisation([2.0, 2.0, 5.0], ENDS)
    assert found.value == pytest.approx((24 - 9) / (24 - 4))
    assert per_token([2.0, 2.0, 5.0], ENDS) == pytest.approx(9 / 8)
    interval = found.interval()
    assert interval["low"] < found.value < interval["high"]


def test_nothing_is_clipped() -> None:
    assert internalisation([0.5, 0.5, 1.0], ENDS).value == pytest.approx(22 / 20)
    assert internalisation([9.0, 9.0, 16.0], ENDS).value == pytest.approx(-10 / 20)


def test_rows_of_one_group_are_drawn_together() -> None:
    """A single group has nothing to be compared with, so no interval."""
    one = ReferenceLikelihoods(["a", "a", "a"], ENDS.tokens, ENDS.base, ENDS.teacher)
    assert internalisation([2.0, 2.0, 5.0], one).interval() == {"value": pytest.approx(0.75)}


def test_an_answer_that_the_prompt_makes_no_likelier_leaves_nothing_to_internalise() -> None:
    """Two requests for one probability differ by a rounding, which is no difference."""
    rounded = [nats - 1e-5 for nats in ENDS.base]
    for teacher in (ENDS.base, rounded, [9.0, 7.0, 11.0]):
        with pytest.raises(DatasetError, match="found 3.0000 nats a token without it, and"):
            internalisation(
                [1.0, 1.0, 1.0], ReferenceLikelihoods(ENDS.groups, ENDS.tokens, ENDS.base, teacher)
            )
    with pytest.raises(DatasetError, match="no answers"):
        internalisation([], ReferenceLikelihoods([], [], [], []))


def test_an_answer_stands_in_what_teacher_and_student_see(tmp_path: Path) -> None:
    """The teacher's prompt and tools, the student's short prompt, the calls of both as calls."""
    tool = {"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}
    (tmp_path / "tools.json").write_text(json.dumps([tool]))
    recipe = Recipe(
        name="support",
        description="Support.",
        teacher="pocket",
        queries={"file": "queries.jsonl", "messages": "messages"},
        tools="tools.json",
        student={"prompt": "[support]"},
        prompt="Look before you answer.",
        folder=tmp_path,
    )
    asked = [{"role": "user", "content": "Where is it?"}]
    said = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
    row = {"query": to_text(asked), "group": "a"}  # type: ignore[arg-type]
    answer = TeacherAnswer.to(recipe, row, said, said)
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    taught = {"role": "system", "content": "Look before you answer."}
    assert [*answer.taught] == [taught, *asked, called]
    assert [*answer.learned] == [{"role": "system", "content": "[support]"}, *asked, called]
    assert json.loads(answer.taught_tools or "")[0]["function"]["name"] == "look"
    assert answer.learned_tools is None
    kept = TeacherAnswer.to(recipe.replace(student={"tools": "keep"}), row, said, said)
    assert kept.learned_tools == answer.taught_tools
    assert [*kept.learned] == [*asked, called]


def test_calls_of_an_answer_are_numbered_after_those_of_the_conversation(tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(
        '[{"type": "function", "function": {"name": "look", "parameters": {}}}]'
    )
    recipe = Recipe(
        name="support",
        description="Support.",
        teacher="pocket",
        queries={"file": "queries.jsonl", "messages": "messages"},
        tools="tools.json",
        prompt="Look before you answer.",
        folder=tmp_path,
    )
    said = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
    asked = [
        {"role": "user", "content": "Where is it?"},
        assistant_message(said, calls=True),
        {"role": "tool", "content": "nowhere"},
    ]
    answer = TeacherAnswer.to(recipe, {"query": to_text(asked), "group": "a"}, said, said)
    for conversation in (answer.taught, answer.learned):
        ids = [call["id"] for one in conversation for call in one.get("tool_calls", ())]
        assert ids == ["call_1", "call_2"]

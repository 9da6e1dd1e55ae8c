"""How much of the prompt is in the weights: the number; and when a sampled text is the response
that a row has, and when answers collapse.
"""

import json
from pathlib import Path

import pytest

from distill_datasets.conversations import Call, assistant_message, to_text, write_calls
from distill_datasets.errors import DatasetError
from distill_datasets.models.sampler import Sample
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.training.validation import (
    ReferenceLikelihoods,
    TeacherAnswer,
    compare_answers,
    internalisation,
    is_loop,
    is_response,
    per_token,
)

ENDS = ReferenceLikelihoods(
    groups=["a", "b", "c"], tokens=[2, 2, 4], base=[8.0, 6.0, 10.0], teacher=[1, 1, 2]
)
CALL = Call("set.it", {"text": "28473", "flag": True, "maybe": None, "rows": [1, "é"]})
OTHER = Call("list", {})
ROW = assistant_message(write_calls("Done.", [CALL, OTHER]), calls=True)
GUESSED = Call("set.it", {"text": 28473, "flag": "True", "maybe": "null", "rows": '[1,"é"]'})


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


def test_calls_are_the_rows_in_any_order() -> None:
    text = write_calls("Done.", [OTHER, CALL])
    assert is_response(text, ROW, typed=True) and is_response(text, ROW, typed=False)


def test_types_count_where_the_schemas_were_there() -> None:
    text = write_calls("Done.", [GUESSED, OTHER])
    assert is_response(text, ROW, typed=False) and not is_response(text, ROW, typed=True)


@pytest.mark.parametrize(
    "text",
    [
        "Done.",
        write_calls("", [CALL, OTHER]),
        write_calls("Done.", [CALL]),
        write_calls("Done.", [CALL, OTHER]) + "<tool_call>",
        write_calls("Done.", [Call(CALL.name, {**CALL.arguments, "text": "28474"}), OTHER]),
    ],
)
def test_other_words_or_calls_are_not_the_rows(text: str) -> None:
    assert not is_response(text, ROW, typed=False)


def test_an_answer_in_words_is_compared_as_words() -> None:
    assert is_response(" Yes. ", {"role": "assistant", "content": "Yes."}, typed=True)
    assert not is_response("Yes", {"role": "assistant", "content": "Yes."}, typed=True)


def said(*texts: str, ended: bool = True) -> list[Sample]:
    return [
        Sample(text, "stop" if ended else "length", len(text.split()) + ended) for text in texts
    ]


TEACHER = said("a red fox", "a blue fish", "two owls", "one hen")


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("blau blau blau blau bl", True),
        ("Well: the answer is: the answer is: the answer is: the answer", True),
        ("ha ha ha, a long story of a man who laughs and goes home", False),
        ("name: Wendy; city: Lima; item: pears; quantity: 2", False),
        ("....", False),
        ("", False),
    ],
)
def test_a_text_that_repeats_its_end_is_a_loop(text: str, loops: bool) -> None:
    assert is_loop(text) == loops


def test_answers_are_counted_beside_the_teachers() -> None:
    found = compare_answers(said("a red fox", "a red fox ", "", "one hen"), TEACHER, 1.0)
    assert (found["answers"], found["answers_distinct"], found["teacher_distinct"]) == (4, 3, 4)
    assert (found["answers_empty"], found["answers_ended"]) == (0.25, 1.0)
    assert all(name.startswith(("answers", "teacher_")) for name in found)
    assert (found["answers_tokens"], found["teacher_tokens"]) == (3.0, 3.5)
    assert (found["teacher_commonest"], found["teacher_once"]) == (0.25, 1.0)


def test_an_answer_that_goes_on_counts_where_the_teacher_ended() -> None:
    """One that the teacher itself didn't end in so many tokens says nothing."""
    loops = said(*["na na na na na na"] * 4, ended=False)
    found = compare_answers(loops, TEACHER, 1.0)
    assert (found["answers_unending"], found["answers_looping"]) == (1.0, 1.0)
    assert (
        compare_answers(said("long", "x", "y", "z", ended=False), TEACHER, 1.0)["answers_looping"]
        == 0.0
    )
    unended = said("a red", "a blue", "two", "one", ended=False)
    found = compare_answers(loops, unended, 1.0)
    assert (found["answers_unending"], found["answers_looping"]) == (0.0, 0.0)


def test_thoughts_without_an_answer_are_no_empty_answer() -> None:
    thinking = [Sample("", "length", 9, reasoning="Let me see")] * 4
    assert compare_answers(thinking, TEACHER, 1.0)["answers_empty"] == 0.0

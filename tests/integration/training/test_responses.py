"""When a sampled text is the response that a row has, and when answers collapse."""

import pytest

from distill_datasets.conversations import Call, assistant_message, write_calls
from distill_datasets.models.sampler import Sample
from distill_datasets.training.schedule import OF_ANSWERS
from distill_datasets.training.validation import compare_answers, is_loop, is_response

CALL = Call("set.it", {"text": "28473", "flag": True, "maybe": None, "rows": [1, "é"]})
OTHER = Call("list", {})
ROW = assistant_message(write_calls("Done.", [CALL, OTHER]), calls=True)
GUESSED = Call("set.it", {"text": 28473, "flag": "True", "maybe": "null", "rows": '[1,"é"]'})


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
    assert {*found} == OF_ANSWERS
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

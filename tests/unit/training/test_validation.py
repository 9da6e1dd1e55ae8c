"""When a sampled text is the response that a row has."""

import pytest

from distill_datasets.conversations import Call, assistant_message, write_calls
from distill_datasets.training.validation import is_response

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

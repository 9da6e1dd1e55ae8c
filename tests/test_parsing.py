import pytest

from distill_datasets.parsing import Reader

READER = Reader(r"Final Answer:\s*(?P<answer>\w+)\s*$", ("de", "en"))


@pytest.mark.parametrize(
    ("text", "stop_reason", "answer", "rejection"),
    [
        ("Final Answer: de", "stop", "de", None),
        ("I think so.\nFinal Answer: en\n", "stop", "en", None),
        ("Final Answer: de", "length", None, "truncated"),
        ("  \n", "stop", None, "empty"),
        ("German", "stop", None, "unparsable"),
        ("Final Answer: german", "stop", None, "outside choices"),
    ],
)
def test_a_text_is_an_answer_or_a_rejection_with_its_reason(
    text: str, stop_reason: str, answer: str | None, rejection: str | None
) -> None:
    parsed = READER.read(text, stop_reason)
    assert (parsed.answer, parsed.rejection) == (answer, rejection)


def test_without_a_pattern_the_whole_text_is_the_answer() -> None:
    assert Reader().read(" two\nlines ", "stop").answer == "two\nlines"


def test_an_empty_group_is_no_answer() -> None:
    assert Reader(r"A:(?P<answer>.*)$").read("A: ", "stop").rejection == "unparsable"

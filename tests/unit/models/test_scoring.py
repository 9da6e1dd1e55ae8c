import pytest

from distill_datasets.models.scoring import end_length

WORDS = {1: "red", 2: " User", 3: ":", 4: "\n\n", 9: "<|end|>"}


def decode(tokens: list[int]) -> str:
    return "".join(WORDS[token] for token in tokens)


@pytest.mark.parametrize(
    ("tokens", "stops", "length"),
    [
        ([1, 9], [9], 1),
        ([1, 9, 4], [9], 2),
        ([1, 1], [9], 0),
        ([1, 4, 2, 3], ["\n\n User:"], 3),
        ([1, 1, 4], ["\n\n User:"], 0),
        ([], [9], 0),
    ],
)
def test_the_end_of_a_message_is_what_its_stop_sequence_begins(
    tokens: list[int], stops: list[int] | list[str], length: int
) -> None:
    assert end_length(tokens, stops, decode) == length  # type: ignore[arg-type]

"""Ends of answers, in a vocabulary of ten words."""

import numpy as np
import pytest

from distill_datasets.models.scoring import CutEnds, Ranking, SoftLabels, end_length

WORDS = {1: "red", 2: " User", 3: ":", 4: "\n\n", 5: "\n", 6: "!\n", 7: "!", 8: "In", 9: "<|end|>"}


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


def cut_ends(text: str = "\n") -> CutEnds:
    """A teacher that is cut at a new line; "!\n" is "!" and then the cut."""
    table = np.array([0, 1, 2, 3, 9, 9, 7, 7, 8, 9], np.int32)
    return CutEnds(table, 1, [text], [9, 4, 5], decode)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "cut"),
    [([1, 7, 9], None), ([1, 4, 8], 2), ([1, 6, 8, 4], 2), ([1, 7], None), ([5], 1)],
)
def test_a_sampled_answer_is_cut_where_it_says_a_stop_text(
    tokens: list[int], cut: int | None
) -> None:
    assert cut_ends().cut(tokens) == cut


def test_a_stop_text_of_several_tokens_is_found_once_it_is_whole() -> None:
    ends = CutEnds(np.arange(10, dtype=np.int32), 1, ["! User:"], [9], decode)  # type: ignore[arg-type]
    assert ends.cut([1, 7, 2, 3, 1]) == 4
    assert ends.cut([1, 7, 2]) is None


def test_the_end_that_a_teacher_did_not_make_is_a_hard_label() -> None:
    """At "red!" it would go on with a new line, or says both at once."""
    ids = np.array([[1, 8], [6, 7], [4, 9]])
    labels = SoftLabels.of([1, 7, 9], ids, np.log([[0.75, 0.25]] * 3))
    found = cut_ends().hard(labels, [1, 7, 9])
    assert found.ids.tolist() == [[1, 8], [7, 7], [9, 9]]
    assert np.exp(found.logprobs).tolist() == [
        pytest.approx([0.75, 0.25], abs=1e-3),
        pytest.approx([0.75, 0.25], abs=1e-3),
        [1, 0],
    ]


def test_what_a_teacher_said_after_its_cut_is_not_learned() -> None:
    """Kept by generation as it came: "red", a new line, "In"."""
    labels = SoftLabels.of([1, 4, 8], np.array([[1], [4], [8]]), np.log([[0.5]] * 3))
    found = cut_ends().hard(labels, [1, 9])
    assert found.tokens.tolist() == [1, 9] and found.ids.tolist() == [[1], [9]]
    assert np.exp(found.logprobs).tolist() == [[0.5], [1]]


def test_tokens_of_one_meaning_are_judged_as_one() -> None:
    """The teacher gives two ways to be cut 0.6 and 0.2; the student knows its end and one way."""
    ids, student = np.array([[9, 5, 1]]), np.log([[0.6, 0.2, 0.1]])
    teacher = np.log([[1e-9, 0.6, 0.15]])
    ranking = Ranking(
        np.array([[5, 4, 1]], np.int32), np.log([[0.6, 0.2, 0.15]]).astype(np.float32)
    )
    found = np.exp(cut_ends().judged(ids, student, teacher, ranking))
    assert found[0] == pytest.approx([0.6, 0.2, 0.15])


def test_a_token_beyond_the_tokenizer_means_itself() -> None:
    assert cut_ends().meant(np.array([4, 12])).tolist() == [9, 12]

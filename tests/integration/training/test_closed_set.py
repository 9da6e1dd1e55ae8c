"""Labels that share tokens, as a tree."""

import numpy as np
import pytest

from distill_datasets.training.objectives.closed_set import (
    children,
    diverging,
    label_logprobs,
    label_targets,
    paths,
)


def test_labels_are_compared_from_where_they_part_to_where_they_meet() -> None:
    assert diverging([(1, 2, 7, 9), (1, 2, 8, 9)]) == ((1, 2), [(7,), (8,)])


def test_a_label_that_begins_another_keeps_the_end_that_tells_them_apart() -> None:
    """ "en" and "english" as (5) and (5, 6), both ended by 9."""
    assert diverging([(1, 5, 9), (1, 5, 6, 9)]) == ((1, 5), [(9,), (6, 9)])


def test_one_reading_passes_every_place_of_labels_of_one_token() -> None:
    labels = [(3,), (4,), (5,)]
    assert paths(labels) == [()]
    assert children(labels) == {(): [3, 4, 5]}


def test_labels_that_share_a_beginning_share_its_reading() -> None:
    labels = [(3, 6), (3, 7), (4,)]
    assert paths(labels) == [(3,)]
    assert children(labels) == {(): [3, 4], (3,): [6, 7]}


def test_a_labels_probability_is_the_product_along_its_tokens() -> None:
    places = {(): {3: np.log(0.5), 4: np.log(0.3)}, (3,): {6: np.log(0.9), 7: np.log(0.1)}}
    found = np.exp(label_logprobs([(3, 6), (3, 7), (4,)], places))
    assert found.tolist() == pytest.approx([0.45, 0.05, 0.3])


def test_a_student_learns_each_token_among_the_labels_still_possible() -> None:
    """Labels (3, 6, 9), (3, 7, 9), (4, 9) of 0.45, 0.05, 0.3, of which the row says the first."""
    written = [(3, 6, 9), (3, 7, 9), (4, 9)]
    labels = label_targets((3, 6, 9), written, np.log([0.45, 0.05, 0.3]))
    chances = np.exp(labels.logprobs.astype(np.float64))
    assert labels.ids.tolist() == [[3, 4], [6, 7], [9, 0]]
    assert chances[0].tolist() == pytest.approx([0.5 / 0.8, 0.3 / 0.8], abs=1e-3)
    assert chances[1].tolist() == pytest.approx([0.9, 0.1], abs=1e-3)
    assert chances[2].tolist() == [1, 0]
    assert labels.kept == pytest.approx(0.8)


def test_a_label_that_the_teacher_all_but_rules_out_still_has_a_next_token() -> None:
    labels = label_targets((3, 9), [(3, 9), (4, 9)], np.array([-2000.0, -0.1]))
    assert labels.ids[1, 0] == 9
    assert labels.logprobs[1, 0] == 0

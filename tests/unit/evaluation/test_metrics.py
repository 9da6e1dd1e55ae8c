import sys
from typing import Any

import pytest
from sacrebleu.metrics.chrf import CHRF

from distill_datasets.evaluation.metrics import chrf, equal, rouge_l

PAIRS = [
    ("the cat sat on the mat", "the cat sat on the mat"),
    ("the cat sat", "on the mat sat a cat"),
    ("Hello, world!", "hello world"),
    ("a", "a"),
    ("a", "b"),
    ("", "something"),
    ("something", ""),
    ("one two three four five six seven", "one three five seven nine"),
    ("Ein schöner Tag in Köln", "Ein schöner Abend in Bonn"),
    ("x" * 300, "x" * 299 + "y"),
]


@pytest.mark.parametrize(("found", "right"), PAIRS)
def test_chrf_equals_sacrebleus(found: str, right: str) -> None:
    truth = CHRF().sentence_score(found, [right]).score / 100
    assert chrf(found, right) == pytest.approx(truth, abs=1e-9)


@pytest.fixture(scope="module")
def rouge_scorer() -> Any:
    """Without what NLTK loads beside it, which takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("sklearn", "scipy"):
            patch.setitem(sys.modules, name, None)
        from rouge_score.rouge_scorer import RougeScorer
    return RougeScorer(["rougeL"])


@pytest.mark.parametrize(("found", "right"), [pair for pair in PAIRS if "ö" not in pair[0]])
def test_rouge_l_equals_rouge_scores_on_ascii(rouge_scorer: Any, found: str, right: str) -> None:
    truth = rouge_scorer.score(right, found)["rougeL"].fmeasure
    assert rouge_l(found, right) == pytest.approx(truth, abs=1e-9)


@pytest.mark.parametrize(
    ("found", "right", "value"),
    [
        ("東京は晴れ", "東京は雨", 2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4)),
        ("طقس جميل اليوم", "طقس جميل", 0.8),
        ("schöne Tage", "SCHÖNE tage", 1.0),
    ],
)
def test_words_of_every_script_are_words(found: str, right: str, value: float) -> None:
    assert rouge_l(found, right) == pytest.approx(value)


def test_equal_texts_differ_in_white_space_at_most() -> None:
    assert equal(" a\n", "a") == 1.0
    assert equal("a  b", "a b") == equal("", " ") == 0.0


def test_texts_of_any_length_are_compared_at_once() -> None:
    assert chrf("word " * 100_000, "word " * 100_000) == pytest.approx(1.0)
    assert rouge_l("word " * 100_000, "word " * 100_000) == 1.0

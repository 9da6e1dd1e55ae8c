from math import log
from pathlib import Path

import pytest

from distill_datasets.errors import DatasetError, SettingsError
from distill_datasets.selective import Place
from distill_datasets.serving.calibration import SCORES, Confidence, Pair, Thresholds, choose
from tests.support.recipes import any_recipe

PAIRS = [Pair(f"q{n}", f"g{n}", n / 600, n % 40 != 0 or n > 400) for n in range(600)]
COSTS = {"teacher": 2.0, "student": 0.1}


def test_the_teacher_answers_what_the_student_is_less_sure_of() -> None:
    strict, loose, all_served = choose(PAIRS, [0.01, 0.02, 0.2], COSTS)
    assert strict.served == 0 or strict.served < loose.served < all_served.served == 1.0
    assert all_served.threshold is None and all_served.serves(-1e9)
    assert loose.threshold is not None
    assert loose.serves(loose.threshold + 1e-9) and not loose.serves(loose.threshold)
    assert all_served.saved == pytest.approx(1 - 0.1 / 2.0)
    assert loose.saved == pytest.approx(loose.served - 0.05)


def test_nothing_is_served_where_nothing_can_be_promised() -> None:
    (point,) = choose(PAIRS[:40], [0.01])
    assert (point.served, point.saved) == (0.0, None)
    assert not point.serves(0.0)
    with pytest.raises(DatasetError, match="no queries"):
        choose([], [0.1])


def test_a_confidence_is_the_least_the_mean_or_the_sum() -> None:
    places = [Place("a", -0.5), Place("b", -2.0), Place("c", -0.5)]
    found = {score: Confidence(any_recipe(), score).of("q", places) for score in SCORES[:3]}
    assert found == {"least": -2.0, "mean": -1.0, "sum": -3.0}
    with pytest.raises(DatasetError, match="no log-probabilities"):
        Confidence(any_recipe(), "least").of("q", [])


def test_a_confidence_is_the_answers_share_of_the_choices_as_the_student_says_them() -> None:
    answer = {"pattern": r"Answer: (?P<answer>\w+)", "choices": ["en", "de"]}
    known = Confidence(any_recipe(answer=answer, response="{{ answer }}!"), "choices")
    rivals = [("en", log(0.6)), ("de", log(0.2)), ("Answer", log(0.1))]
    places = [Place("en", log(0.6), rivals), Place("!", -0.1, [("!", -0.1)])]
    assert known.likeliest == 20
    assert known.of("q", places) == pytest.approx(log(0.75))
    with pytest.raises(DatasetError, match="no top_logprobs"):
        known.of("q", [Place("en", -0.1)])


@pytest.mark.parametrize(("choices", "told"), [(["en", "de"], True), (["да", "нет"], False)])
def test_parts_of_characters_are_none_of_the_choices_of_ascii(
    choices: list[str], told: bool
) -> None:
    known = Confidence(any_recipe(answer={"choices": choices}), "choices")
    places = [Place("\ufffd", -0.1, [("\ufffd", -0.1)])]
    if told:
        assert known.of("q", places) < log(1e-9)
    else:
        with pytest.raises(DatasetError, match="parts of characters"):
            known.of("q", places)


def test_only_a_student_that_says_a_choice_alone_has_a_share_of_them() -> None:
    answer = {"pattern": r"Answer: (?P<answer>\w+)", "choices": ["en", "de"]}
    for recipe in (any_recipe(), any_recipe(answer=answer, response="{{ text }}")):
        with pytest.raises(SettingsError, match="Choose another score"):
            Confidence(recipe, "choices")


def test_a_calibration_is_read_as_it_was_kept(tmp_path: Path) -> None:
    points = choose(PAIRS, [0.02, 0.2], COSTS)
    curve = choose(PAIRS, [0.01, 0.05, 0.2], COSTS)
    facts = {"report": "d1", "score": "least", "student": "runs/a", "split": "test", "rows": 600}
    facts |= {"groups": 600, "disagreements": 10, "level": 0.95}
    found = Thresholds(
        path=tmp_path / "calibration.json", **facts, points=points, curve=curve, pairs=PAIRS[:5]
    )
    found.keep()
    assert Thresholds.read(tmp_path) == found
    assert "98.3%" in found.text() and "100.0%" in found.text()
    (tmp_path / "calibration.json").write_text("{}")
    with pytest.raises(DatasetError, match="is no calibration"):
        Thresholds.read(tmp_path)

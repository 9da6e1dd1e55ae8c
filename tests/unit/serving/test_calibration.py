import random
from collections.abc import Iterator
from itertools import product
from math import exp, log
from pathlib import Path

import numpy as np
import pytest

from distill_datasets.errors import DatasetError, SettingsError
from distill_datasets.serving.calibration import (
    SCORES,
    Confidence,
    Pair,
    Thresholds,
    binomial_tail,
    certify,
    choice_logprob,
    choose,
    rows_to_certify,
    share_at_most,
)
from distill_datasets.serving.protocol import Place
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


def alone(count: int) -> list[str]:
    return [f"g{number}" for number in range(count)]


def test_binomial_tails_and_bounds_are_those_of_scipy() -> None:
    from scipy.special import bdtr, betaincinv

    generator = np.random.default_rng(0)
    for _ in range(200):
        n = int(generator.integers(1, 3000))
        k = int(generator.integers(0, n))
        share = float(generator.random() * generator.choice([1.0, 0.1, 0.01]))
        assert binomial_tail(k, n, share) == pytest.approx(bdtr(k, n, share), abs=1e-10)
        assert share_at_most(k, n) == pytest.approx(betaincinv(k + 1, n - k, 0.95), abs=1e-9)
    assert binomial_tail(3, 3, 0.5) == 1.0
    assert share_at_most(5, 5) == pytest.approx(1.0)


def test_as_few_rows_as_are_said_tell_and_one_fewer_does_not() -> None:
    for most in (0.01, 0.02, 0.05, 0.2):
        n = rows_to_certify(most)
        rows = list(range(n))
        found = certify(rows, [False] * n, alone(n), most)
        assert (found.rows, found.disagreements, found.threshold) == (n, 0, None)
        assert found.bound is not None and found.bound <= most
        assert not certify(rows[1:], [False] * (n - 1), alone(n - 1), most).served


def test_a_threshold_leaves_out_where_the_student_is_wrong() -> None:
    scores = [number / 1000 for number in range(1000)]
    wrong = [score < 0.3 for score in scores]
    found = certify(scores, wrong, alone(1000), 0.02)
    assert 650 < found.rows <= 720
    assert found.threshold is not None and 0.27 < found.threshold < 0.35
    served = [found.serves(score) for score in scores]
    assert found.rows == sum(served)
    assert found.disagreements == sum(a and b for a, b in zip(served, wrong, strict=True))


def test_rows_that_score_alike_are_served_together_or_not_at_all() -> None:
    scores = [1.0] * 400 + [0.5] * 400
    wrong = [False] * 400 + [number % 3 == 0 for number in range(400)]
    found = certify(scores, wrong, alone(800), 0.05)
    assert (found.rows, found.threshold) == (400, 0.5)


def test_the_rows_of_a_group_count_as_one() -> None:
    scores, right = [float(n) for n in range(300)], [False] * 300
    assert certify(scores, right, alone(300), 0.05).served
    assert certify(scores, right, [f"g{n // 5}" for n in range(300)], 0.05).served
    assert not certify(scores, right, [f"g{n // 6}" for n in range(300)], 0.05).served


def test_nothing_is_certified_of_no_rows() -> None:
    assert not certify([], [], [], 0.05).served


@pytest.mark.parametrize(
    ("most", "above"),
    [(0.02, 0.021), (0.05, 0.052), (0.05, 0.0)],
    ids=["just above 2 %", "just above 5 %", "falling"],
)
def test_the_promise_holds_in_95_of_100_calibrations(most: float, above: float) -> None:
    generator = np.random.default_rng(1)
    size = 20_000
    scores = generator.random(size)
    chance = np.where(scores > 0.4, above, 0.3) if above else 0.3 * (1 - scores) ** 2
    wrong = generator.random(size) < chance
    held, trials, served = 0, 120, 0
    for _ in range(trials):
        rows = generator.integers(size, size=500)
        found = certify(scores[rows].tolist(), wrong[rows].tolist(), alone(500), most)
        serves = bool(found.served) & (scores > (found.threshold or -1.0))
        held += not serves.any() or wrong[serves].mean() <= most
        served += bool(serves.any())
    # 95 % hold; of 120 trials fewer than 107 would by chance in one of a thousand cases.
    assert held >= 107
    assert served or above


@pytest.mark.parametrize(
    ("most", "groups", "size", "likeness"),
    [(0.01, 320, 2, 1.0), (0.02, 200, 3, 0.6), (0.05, 100, 5, 0.3)],
)
def test_the_promise_holds_in_95_of_100_splits_of_rows_that_are_wrong_together(
    most: float, groups: int, size: int, likeness: float
) -> None:
    """A little more than `most` is wrong, whatever the score: it holds where nothing is served."""
    generator, splits = np.random.default_rng(2), 1_000
    names = [f"g{n // size}" for n in range(groups * size)]
    rest, risk = (1 - likeness) / likeness, 1.05 * most
    common, own = generator.random((splits, groups)), generator.random((2, splits, len(names)))
    if rest:
        of_group = generator.beta(risk * rest, (1 - risk) * rest, common.shape)
    else:
        of_group = (generator.random(common.shape) < risk).astype(float)
    wrong = own[0] < of_group.repeat(size, axis=1)
    scores = np.where(own[1] < 0.8, common.repeat(size, axis=1), own[1])
    held = sum(not certify(*one, names, most).served for one in zip(scores, wrong, strict=True))
    assert held >= 0.95 * splits


def test_of_groups_too_what_a_good_student_says_is_served() -> None:
    generator, held, served, splits = np.random.default_rng(3), 0, 0.0, 50
    names = [f"g{n // 4}" for n in range(2_000)]
    for _ in range(splits):
        scores = generator.random(500).repeat(4)
        at_risk = (generator.random(500) < 0.3).repeat(4)
        wrong = at_risk & (generator.random(2_000) < (1 - scores) ** 2)
        found = certify(scores, wrong, names, 0.05)
        threshold = max(found.threshold or 0.0, 0.0) if found.served else 1.0
        held += 0.3 * (1 - threshold) ** 2 / 3 <= 0.05  # the mean risk above the threshold
        served += (1 - threshold) / splits
    assert held >= 0.95 * splits and served > 0.3


def spoken(choice: str) -> Iterator[list[str]]:
    """All ways to spell a choice in tokens, to its end."""
    for cuts in product([True, False], repeat=len(choice) - 1):
        places = [0, *(n for n, cut in enumerate(cuts, 1) if cut), len(choice)]
        yield [*(choice[a:b] for a, b in zip(places, places[1:], strict=False)), "<end>"]


def drawn(begun: str, tokens: list[str]) -> list[tuple[str, float]]:
    """Log-probabilities of the tokens after a text, the same whenever they are asked for."""
    generator = random.Random(begun)
    weights = [generator.random() for _ in tokens]
    return [(one, log(own / sum(weights))) for one, own in zip(tokens, weights, strict=True)]


def test_an_answers_share_of_the_choices_is_that_of_sampling_held_to_them() -> None:
    choices = ["en", "eng", "de", "d"]
    tokens = ["e", "en", "n", "ng", "g", "eng", "d", "de", "other", "<end>"]
    shares: dict[str, list[tuple[float, float]]] = {}
    for choice in choices:
        for way in spoken(choice):
            begun, held, places = "", 1.0, list[Place]()
            for token in way:
                known = drawn(begun, tokens)
                may = {
                    one: exp(value)
                    for one, value in known
                    if begun in choices or any(text.startswith(begun + one) for text in choices)
                }
                goes_on = {one for one in may if any(x.startswith(begun + one) for x in choices)}
                own = may.keys() - goes_on if token == "<end>" else {token}
                held *= sum(may[one] for one in own) / sum(may.values())
                places.append(Place(token, dict(known)[token], known))
                begun += token
            shares.setdefault(choice, []).append((held, exp(choice_logprob(places, choices))))
    assert sum(held for ways in shares.values() for held, _ in ways) == pytest.approx(1.0)
    for ways in shares.values():
        whole = sum(held for held, _ in ways)
        # Other ways count as far as a place tells that they are ways of the same choice.
        assert all(held - 1e-9 <= found <= whole + 1e-9 for held, found in ways)


def test_what_is_none_of_the_choices_has_no_share_of_them() -> None:
    rivals = [("yes", -0.1), ("no", -3.0)]
    assert choice_logprob([Place("perhaps", -0.1, rivals)], ["yes", "no"]) < -100
    assert choice_logprob([Place("y", -0.1, rivals)], ["yes", "no"]) < -100
    alone = choice_logprob([Place(" yes", -0.1, [(" yes", -0.1), ("no", -3.0)])], ["yes", "no"])
    assert alone == pytest.approx(-0.1 - log(exp(-0.1) + exp(-3.0)))
    sure = [Place("yes", -1e-9, [("yes", -1e-9), ("no", -40.0)])]
    assert 0 > choice_logprob(sure, ["yes", "no"]) > -1e-15, "near certainty is told apart"

import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, f1_score

from distill_datasets.errors import DatasetError, RecipeError, SettingsError
from distill_datasets.evaluation.metrics import (
    CALIBRATIONS,
    OURS,
    Metrics,
    load_metric,
    load_own_metric,
)
from distill_datasets.statistics import Bootstrap, Estimate, resamples, wilson
from tests.support import forks

EXPECTED = ["a", "a", "a", "a", "b", "b", "b", "b"]
FOUND = ["a", "a", "a", "b", "b", "b", "b", None]


def rows(count: int, right: float, seed: int) -> tuple[list[str | None], list[str], list[str]]:
    """Answers of which a share is right, references, and a group for every row."""
    generator = np.random.default_rng(seed)
    expected = [f"label {number}" for number in generator.integers(5, size=count)]
    wrong: list[str | None] = [None, "", "label 0", "label 1", "no label at all"]
    found = [
        label if generator.random() < right else wrong[generator.integers(len(wrong))]
        for label in expected
    ]
    return found, expected, [f"row {number}" for number in range(count)]


def one(name: str, found: list[Any], expected: list[Any], groups: list[str]) -> Estimate:
    return OURS[name](found, expected, groups)


def value(name: str, found: list[Any], expected: list[Any]) -> float:
    return one(name, found, expected, [str(row) for row in range(len(found))]).value


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("accuracy", 6 / 8),
        ("agreement", 6 / 8),
        ("answered", 7 / 8),
        # a: 3 hits of 4, 3 guesses; b: 3 hits of 4, 4 guesses.
        ("macro_f1", (2 * 3 / (4 + 3) + 2 * 3 / (4 + 4)) / 2),
    ],
)
def test_values_equal_those_computed_by_hand(name: str, right: float) -> None:
    assert value(name, FOUND, EXPECTED) == pytest.approx(right)


def test_an_empty_text_is_no_answer() -> None:
    assert value("answered", ["", None, "a"], [None] * 3) == 1 / 3
    assert value("accuracy", [""], [""]) == 0


def test_nobody_agrees_with_a_teacher_that_gave_no_answer() -> None:
    assert value("agreement", ["a", None, "a"], ["a", None, None]) == 1 / 3


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_equals_sklearns(seed: int) -> None:
    found, expected, _ = rows(60, 0.6, seed)
    guesses = [answer or "" for answer in found]
    truth = f1_score(
        expected, guesses, labels=sorted(set(expected)), average="macro", zero_division=0
    )
    assert value("macro_f1", found, expected) == pytest.approx(truth, abs=1e-12)


def test_macro_f1_without_references_is_an_error() -> None:
    with pytest.raises(DatasetError, match="needs references"):
        value("macro_f1", ["a"], [None])


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "answered", "agreement"])
def test_an_interval_contains_its_value(name: str) -> None:
    interval = one(name, *rows(200, 0.7, 1)).interval()
    assert interval["low"] < interval["value"] < interval["high"]


def test_draws_equal_macro_f1_computed_on_rows_that_are_really_repeated() -> None:
    found, expected, _ = rows(12, 0.5, 2)
    groups = ["x", "x", "y", "y", "y", "z", "u", "u", "v", "v", "w", "w"]
    estimate = one("macro_f1", found, expected, groups)
    assert isinstance(estimate, Bootstrap)
    weights = next(resamples(groups, 2_000))
    for draw, times in islice(zip(estimate.draws, weights, strict=True), 25):
        places = np.repeat(np.arange(12), times.astype(int)).tolist()
        drawn = ([texts[place] for place in places] for texts in (found, expected))
        assert draw == pytest.approx(value("macro_f1", *drawn), abs=1e-12)


@pytest.mark.parametrize("name", ["accuracy", "agreement", "answered"])
def test_shares_have_wilsons_interval(name: str) -> None:
    """300 of 400, by statsmodels' `proportion_confint(300, 400, method="wilson")`."""
    found: list[str | None] = ["a" if row < 300 else None for row in range(400)]
    interval = one(name, found, ["a"] * 400, [str(row) for row in range(400)]).interval()
    assert (interval["low"], interval["high"]) == pytest.approx((0.70532287, 0.78992099), abs=1e-8)


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "answered", "agreement"])
def test_rows_of_one_group_count_together(name: str) -> None:
    found, expected, groups = rows(10, 0.5, 3)
    single = one(name, found, expected, groups).interval()
    repeated = one(name, found * 5, expected * 5, groups * 5).interval()
    alone = one(name, found * 5, expected * 5, [str(row) for row in range(50)]).interval()
    assert repeated == pytest.approx(single)
    assert alone["high"] - alone["low"] < repeated["high"] - repeated["low"]


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "answered", "agreement"])
def test_315_of_315_is_not_certain(name: str) -> None:
    labels = [f"label {row % 21}" for row in range(315)]
    all_right = one(name, [*labels], labels, [str(row) for row in range(315)])
    interval = all_right.interval()
    assert (interval["value"], interval["high"]) == (1.0, 1.0)
    assert interval["low"] == pytest.approx(0.98795, abs=1e-5)
    same = (all_right - all_right).interval()
    assert same["low"] < same["value"] == 0.0 < same["high"]


def test_macro_f1_of_all_right_is_as_uncertain_as_its_rarest_class() -> None:
    labels = ["common"] * 300 + ["rare"]
    interval = one("macro_f1", [*labels], labels, [str(row) for row in range(301)]).interval()
    assert interval["low"] == pytest.approx(wilson(1.0, 4 / (1 + 1 / 300))[0])
    assert interval["low"] < 0.6


def test_groups_that_hold_every_class_bound_macro_f1_as_they_do_accuracy() -> None:
    """21 texts in 15 languages, all right: what holds of one translation holds of the others."""
    labels = [f"label {row % 15}" for row in range(315)]
    groups = [f"text {row // 15}" for row in range(315)]
    for name in ("accuracy", "macro_f1"):
        interval = one(name, [*labels], labels, groups).interval()
        assert interval["low"] == pytest.approx(0.8453609, abs=1e-6)  # Wilson's of 21 of 21


def test_the_same_rows_give_the_same_interval_again() -> None:
    assert one("macro_f1", *rows(50, 0.6, 4)).interval() == (
        one("macro_f1", *rows(50, 0.6, 4)).interval()
    )


def test_a_paired_difference_of_bootstraps_is_narrower_than_an_unpaired_one() -> None:
    first, expected, groups = rows(300, 0.7, 5)
    second: list[str | None] = [*expected[:10], *first[10:]]
    mine, theirs = (one("macro_f1", given, expected, groups) for given in (second, first))
    interval = (mine - theirs).interval()
    apart = sum(end["high"] - end["low"] for end in (mine.interval(), theirs.interval()))
    assert interval["value"] == pytest.approx(mine.value - theirs.value)
    assert interval["high"] - interval["low"] < 0.5 * apart


@pytest.mark.parametrize("name", sorted(OURS))
def test_each_of_ours_is_a_module_of_evaluate_with_the_same_value(name: str) -> None:
    found, right = (SAID, CORRECT) if name in CALIBRATIONS else (FOUND, EXPECTED)
    given = {"references": right} if name != "answered" else {}
    module = load_metric(name)
    assert module.name == name
    assert module.compute(predictions=found, **given) == {name: value(name, found, right)}


def test_ours_are_combined_with_other_modules_of_evaluate() -> None:
    both = evaluate.combine([load_metric("accuracy"), load_metric("macro_f1")])
    found = both.compute(predictions=["a", "b"], references=["a", "a"])
    assert found == {"accuracy": 0.5, "macro_f1": pytest.approx(2 / 3)}


@pytest.mark.parametrize("name", ["accuracy", "answered"])
def test_no_rows_are_an_error(name: str) -> None:
    with pytest.raises(DatasetError, match="no rows"):
        one(name, [], [], [])


def test_an_unknown_metric_lists_ours_and_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"'acuracy'.*\['accuracy', .*Did you mean 'accuracy'"):
        load_metric("acuracy")


@pytest.mark.parametrize("named", ["someone/metric", "rouge", "metric.py", "./metric.py:Name"])
def test_a_recipe_runs_nobodys_code(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("metric.py").write_text("raise SystemExit('this ran')\n")
    with pytest.raises(RecipeError, match="no part of a recipe"):
        Metrics.load([named], [], ["a"])


OWN = """
import datasets
import evaluate


class Length(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=features
        )

    def _compute(self, predictions, references):
        return {"length": sum(map(len, predictions)) / len(predictions)}


def several(predictions, references):
    return {"short": 1.0, "long": 2, "texts": predictions}


def texts(predictions, references):
    return {"texts": predictions}


def endless(predictions, references):
    return float("nan")


def numbers_only(predictions, references):
    return sum(map(int, predictions))


def accuracy(predictions, references):
    return 1.0


nothing = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Names something in a file of metrics."""
    monkeypatch.setattr("distill_datasets.evaluation.metrics._RESAMPLES_OF_OWN", 30)
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return lambda name: f"{path}:{name}"


def test_a_metric_of_the_users_own_gets_an_interval_too(own: Callable[[str], str]) -> None:
    metric = load_own_metric(own("Length"))
    [(name, number)] = metric.estimates(["a", "aaa", None, "aa"], ["b"] * 4, [*"wxyz"]).items()
    assert (name, number.value) == ("length", 1.5)
    interval = number.interval()
    assert interval["low"] < 1.5 < interval["high"]


def test_a_function_is_a_metric_and_may_give_several_numbers(own: Callable[[str], str]) -> None:
    numbers = load_own_metric(own("several")).estimates(["a", "b"], ["b", "b"], ["x", "y"])
    assert {name: number.value for name, number in numbers.items()} == {"short": 1.0, "long": 2.0}
    # All resamples are alike, and nobody knows what other values there are.
    assert numbers["short"].interval() == {"value": 1.0}


@pytest.mark.parametrize(("often", "has"), [(0.99, True), (0.5, False)])
def test_a_resample_without_a_number_is_no_draw(often: float, has: bool) -> None:
    """As of a correlation where all rows are drawn alike."""
    generator = np.random.default_rng(0)

    def spread(predictions: list[str], references: list[str]) -> float:
        if predictions == list("abcd"):
            return 4.0
        if generator.random() > often:
            raise ValueError("no two rows differ")
        return float(len(set(predictions)))

    [number] = load_own_metric(spread).estimates([*"abcd"], [*"abcd"], [*"wxyz"]).values()
    assert (number.value, "low" in number.interval()) == (4.0, has)


def test_python_takes_functions_and_modules_themselves() -> None:
    def exact(predictions: list[str], references: list[str]) -> float:
        return float(predictions == references)

    assert load_own_metric(exact).numbers(["a"], ["a"]) == {"exact": 1.0}


def test_the_library_of_metrics_is_imported_for_a_users_metric_alone(
    own: Callable[[str], str],
) -> None:
    code = "import sys; from distill_datasets.evaluation import report, metrics\n"
    code += "metrics.load_own_metric(max); assert 'evaluate' not in sys.modules\n"
    code += f"print(metrics.load_own_metric({own('Length')!r}).name)"
    ran = forks.run(["-c", code], env=os.environ, cwd=Path.cwd())
    assert ran.stdout == "length\n", ran.stderr


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("texts", r"gives no number, only \['texts'\]"),
        ("endless", "gives nan as 'endless': expected a finite number"),
        ("numbers_only", "'numbers_only' can't compare these texts: ValueError"),
        ("accuracy", "Two metrics give 'accuracy'"),
        ("nothing", "3 is no metric: expected path.py:Name"),
        ("Lenght", r"defines no 'Lenght'.*Did you mean 'Length'"),
    ],
)
def test_a_metric_that_is_none_is_refused_when_it_is_loaded(
    name: str, why: str, own: Callable[[str], str]
) -> None:
    with pytest.raises(SettingsError, match=why):
        Metrics.load(["accuracy"], [own(name)], ["a", None, "b"])


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("rouge", "'rouge' names no metric: expected path.py:Name"),
        ("own.py", "'own.py' names no metric"),
        ("no/own.py:Name", "There is no file 'no/own.py'"),
        ("broken.py:Name", "'broken.py' can't be run for its metric: ZeroDivisionError"),
        ("torn.py:Name", "'torn.py' can't be run for its metric: SyntaxError"),
        (7, "7 is no metric"),
    ],
)
def test_a_file_that_has_no_metric_is_named(
    given: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("1 / 0\n")
    Path("torn.py").write_text("def (\n")
    with pytest.raises(SettingsError, match=why):
        load_own_metric(given)


def test_a_file_that_changes_is_another_metric(own: Callable[[str], str], tmp_path: Path) -> None:
    keys = [Metrics.load([], [own("several")], ["a"]).key for _ in range(2)]
    assert keys[0] == keys[1]
    path = tmp_path / "own.py"
    path.write_text(OWN + "\n# changed\n")
    assert Metrics.load([], [own("several")], ["a"]).key != keys[0]
    assert Metrics.load([], [max], []).key != Metrics.load([], [max], []).key


SAID = [0.95, 0.9, 0.9, 0.3, 0.31, 1.0, 0.0, None]
CORRECT = [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0]


def test_the_brier_score_equals_sklearns() -> None:
    known = slice(0, 7)
    truth = brier_score_loss(CORRECT[known], SAID[known])
    assert value("brier", SAID[known], CORRECT[known]) == pytest.approx(truth, abs=1e-12)


def test_the_calibration_error_equals_that_computed_by_hand() -> None:
    # Bins: 0 and (0, 0.1]; 0.3 in (0.2, 0.3]; 0.31; both 0.9 in (0.8, 0.9]; 0.95 and 1.
    gaps = [0.0, 0.3, 1 - 0.31, abs(0.9 + 0.9 - 1), 2 - 1.95]
    estimate = one("ece", SAID, CORRECT, [str(row) for row in range(8)])
    assert estimate.value == pytest.approx(sum(gaps) / 7)
    found = estimate.interval()
    assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1


def test_rows_without_a_confidence_change_neither() -> None:
    groups = [str(row) for row in range(8)]
    for name in ("ece", "brier"):
        alone = one(name, SAID[:7], CORRECT[:7], groups[:7])
        assert one(name, SAID, CORRECT, groups).value == pytest.approx(alone.value)


@pytest.mark.parametrize("name", ["ece", "brier"])
def test_the_difference_of_two_confidences_is_on_the_same_resamples(name: str) -> None:
    groups = [str(row) for row in range(200)]
    generator = np.random.default_rng(3)
    said = generator.random(200)
    right = (generator.random(200) < said).astype(float)
    sure = [float(value > 0.5) for value in said]
    mine, theirs = one(name, list(said), list(right), groups), one(name, sure, list(right), groups)
    assert (mine - mine).interval()["value"] == 0
    apart = (mine - theirs).interval()
    assert apart["low"] < apart["value"] < apart["high"] < 0


def test_the_field_match_is_the_mean_share_of_equal_fields() -> None:
    references = ['{"a": 1, "b": {"c": null}}', '{"a": 2, "b": {"c": "x"}}', "red"]
    answers = ['{"a": 1.0, "b": {}}', None, "red"]
    assert value("field_match", answers, references) == pytest.approx((0.5 + 0 + 1) / 3)
    estimate = one("field_match", answers, references, ["a", "b", "c"]).interval()
    assert estimate["low"] < estimate["value"] < estimate["high"]

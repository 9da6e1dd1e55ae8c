from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score

from distill_datasets.errors import DatasetError, RecipeError
from distill_datasets.evaluation.metrics import estimate, load_metric
from distill_datasets.statistics import Estimate, resamples

EXPECTED = ["a", "a", "a", "a", "b", "b", "b", "b"]
FOUND = ["a", "a", "a", "b", "b", "b", "b", None]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)


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


def one(name: str, found: list[str | None], expected: list[str], groups: list[str]) -> Estimate:
    return estimate(load_metric(name), found, expected, groups)[name]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accuracy", 6 / 8),
        ("agreement", 6 / 8),
        ("answered", 7 / 8),
        # a: 3 hits of 4, 3 guesses; b: 3 hits of 4, 4 guesses.
        ("macro_f1", (2 * 3 / (4 + 3) + 2 * 3 / (4 + 4)) / 2),
    ],
)
def test_values_equal_those_computed_by_hand(name: str, value: float) -> None:
    found = load_metric(name).compute(predictions=FOUND, references=EXPECTED)
    assert found == {name: pytest.approx(value)}


def test_an_empty_text_is_no_answer() -> None:
    assert load_metric("answered").compute(predictions=["", None, "a"])["answered"] == 1 / 3
    assert load_metric("accuracy").compute(predictions=[""], references=[""])["accuracy"] == 0


def test_nobody_agrees_with_a_teacher_that_gave_no_answer() -> None:
    metric = load_metric("agreement")
    found = metric.compute(predictions=["a", None, "a"], references=["a", None, None])
    assert found["agreement"] == 1 / 3


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_equals_sklearns(seed: int) -> None:
    found, expected, _ = rows(60, 0.6, seed)
    guesses = [answer or "" for answer in found]
    truth = f1_score(
        expected, guesses, labels=sorted(set(expected)), average="macro", zero_division=0
    )
    ours = load_metric("macro_f1").compute(predictions=found, references=expected)["macro_f1"]
    assert ours == pytest.approx(truth, abs=1e-12)


def test_macro_f1_without_references_is_an_error() -> None:
    with pytest.raises(DatasetError, match="needs references"):
        load_metric("macro_f1").compute(predictions=["a"], references=[None])


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "answered", "agreement"])
def test_an_interval_contains_its_value(name: str) -> None:
    interval = one(name, *rows(200, 0.7, 1)).interval()
    assert interval["low"] < interval["value"] < interval["high"]


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "answered", "agreement"])
def test_draws_equal_the_metric_computed_on_rows_that_are_really_repeated(name: str) -> None:
    found, expected, _ = rows(12, 0.5, 2)
    groups = ["x", "x", "y", "y", "y", "z", "u", "u", "v", "v", "w", "w"]
    metric = load_metric(name)
    drawn = estimate(metric, found, expected, groups)[name].draws
    weights = next(resamples(groups, 2_000))
    for draw, times in islice(zip(drawn, weights, strict=True), 25):
        places = np.repeat(np.arange(12), times.astype(int))
        again = metric.compute(
            predictions=[found[place] for place in places],
            references=[expected[place] for place in places],
        )
        assert draw == pytest.approx(again[name], abs=1e-12)


def test_intervals_of_accuracy_are_those_of_the_binomial_distribution() -> None:
    found: list[str | None] = ["a" if row < 300 else "b" for row in range(400)]
    interval = one("accuracy", found, ["a"] * 400, [str(row) for row in range(400)]).interval()
    margin = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert interval["low"] == pytest.approx(0.75 - margin, abs=0.005)
    assert interval["high"] == pytest.approx(0.75 + margin, abs=0.005)


def test_rows_of_one_group_are_drawn_together() -> None:
    found, expected, groups = rows(10, 0.5, 3)
    single = one("accuracy", found, expected, groups)
    repeated = one("accuracy", found * 5, expected * 5, groups * 5)
    taken_apart = one("accuracy", found * 5, expected * 5, [str(row) for row in range(50)])
    assert repeated.interval() == single.interval()
    assert np.ptp(taken_apart.draws) < np.ptp(repeated.draws)


def test_the_same_rows_give_the_same_interval_again() -> None:
    assert one("macro_f1", *rows(50, 0.6, 4)).interval() == (
        one("macro_f1", *rows(50, 0.6, 4)).interval()
    )


def test_weights_in_several_chunks_still_draw_as_many_groups_as_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distill_datasets.statistics._CELLS", 20)
    chunks = list(resamples(["a", "b", "c", "d"], 12))
    assert [len(chunk) for chunk in chunks] == [5, 5, 2]
    assert all((chunk.sum(axis=1) == 4).all() for chunk in chunks)


def test_a_paired_difference_is_narrower_than_an_unpaired_one() -> None:
    first, expected, groups = rows(300, 0.7, 5)
    second: list[str | None] = [*expected[:10], *first[10:]]
    metric = load_metric("accuracy")
    mine = estimate(metric, second, expected, groups)["accuracy"]
    theirs = estimate(metric, first, expected, groups)["accuracy"]
    other_draws = estimate(metric, first, expected, groups, seed=1)["accuracy"]
    paired, unpaired = (mine - theirs).interval(), (mine - other_draws).interval()
    assert paired["value"] == unpaired["value"] == pytest.approx(mine.value - theirs.value)
    assert paired["high"] - paired["low"] < 0.5 * (unpaired["high"] - unpaired["low"])


def test_no_rows_are_an_error() -> None:
    with pytest.raises(DatasetError, match="no rows"):
        one("accuracy", [], [], [])


def test_an_unknown_metric_lists_ours_and_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"'acuracy'.*\['accuracy', .*Did you mean 'accuracy'"):
        load_metric("acuracy")


SCRIPT = """
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
        return RESULT
"""


def own_metric(folder: Path, result: str) -> Path:
    path = folder / "length.py"
    path.write_text(SCRIPT.replace("RESULT", result))
    return path


def test_a_metric_of_the_users_own_gets_an_interval_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill_datasets.evaluation.metrics._RESAMPLES_OF_OTHERS", 30)
    path = own_metric(tmp_path, '{"length": sum(map(len, predictions)) / len(predictions)}')
    found: list[str | None] = ["a", "aaa", None, "aa"]
    [(name, number)] = estimate(load_metric(str(path)), found, ["b"] * 4, list("wxyz")).items()
    assert (name, number.value, len(number.draws)) == ("length", 1.5, 30)
    assert number.interval()["low"] < 1.5 < number.interval()["high"]


def test_a_metric_with_several_numbers_gives_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill_datasets.evaluation.metrics._RESAMPLES_OF_OTHERS", 5)
    path = own_metric(tmp_path, '{"short": 1.0, "long": 2, "texts": predictions}')
    numbers = estimate(load_metric(str(path)), ["a"], ["b"], ["x"])
    assert {name: number.value for name, number in numbers.items()} == {"short": 1.0, "long": 2.0}


def test_a_metric_without_a_number_is_refused(tmp_path: Path) -> None:
    path = own_metric(tmp_path, '{"texts": predictions}')
    with pytest.raises(RecipeError, match=r"no number, only \['texts'\]"):
        estimate(load_metric(str(path)), ["a"], ["b"], ["x"])


def test_a_metric_that_takes_no_texts_is_refused(tmp_path: Path) -> None:
    path = own_metric(tmp_path, "{}")
    path.write_text(path.read_text().replace('"string"', '"int32"'))
    with pytest.raises(RecipeError, match="'length' can't compare texts"):
        estimate(load_metric(str(path)), ["a"], ["b"], ["x"])

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.errors import DatasetError, PriceError
from distill_datasets.evaluation.money import (
    CACHED,
    STUDENT,
    TEACHER,
    SpendingRecord,
    money,
    money_of_run,
    money_text,
    priced_models,
)
from distill_datasets.files import cards_folder
from distill_datasets.generation.pricing import Price, Prices, import_prices


def report(
    teacher: tuple[float, float], student: tuple[float, float], **teachers: Any
) -> dict[str, Any]:
    """Of a hundred rows, with mean tokens of prompt and response."""

    def system(model: str, tokens: tuple[float, float], ms: float) -> dict[str, Any]:
        counted = dict(zip(("prompt_mean", "response_mean"), tokens, strict=True))
        return {"model": model, "tokens": counted, "latency_ms": {"p50": ms, "p95": ms}}

    found = system("openai:large", teacher, 900.0)
    found["tokens"] |= teachers
    found["latency_uncached_ms"] = {"p50": 1200.0, "p95": 1300.0}
    return {
        "n": 100,
        "dataset": {"path": "nowhere"},
        "systems": {
            "base": system("tinker:small", student, 300.0),
            "teacher": found,
            "student": system("tinker://run/sampler_weights/final", student, 300.0),
        },
    }


def prices(large: Price, small: Price) -> Prices:
    models = {"openai:large": large, "tinker:small": small}
    return Prices(date=date(2026, 11, 1), currency="USD", models=models)


LESSON = prices(Price(prompt=3.00, response=0), Price(prompt=0.15, response=0))


def training(folder: Path, spent: float | None, tokens: int = 500_000) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"student": "tinker:small"}))
    line = {"step": 1, "tokens": tokens, **({} if spent is None else {"spent": spent})}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 2, "tok')
    return folder


def test_the_lesson_of_591_tokens_has_its_arithmetic(tmp_path: Path) -> None:
    # A prompt of 591 tokens, $3.00 and $0.15 for a million, training for $1.00. A lesson prints
    # "98.3 % cheaper", break-even near 50,000 queries, and $3,040 a month saved at a million.
    spending = SpendingRecord(trainings=[training(tmp_path / "train", 1.00)])
    rows = {**report((591, 0), (0, 0)), "n": 0}
    found = money(rows, LESSON, spending=spending, volumes=[10_000, 100_000, 1_000_000])
    saving = found["savings"][TEACHER]
    assert saving["per_query"] == pytest.approx(591 * 3.00 / 1e6) == pytest.approx(0.001773)
    assert [month["against"][TEACHER]["saving"] for month in found["volumes"]] == pytest.approx(
        [17.73, 177.30, 1773.00]
    )
    assert saving["break_even_queries"] == 565  # 1.00 / 0.001773 = 564.02
    lines = found["arithmetic"]
    assert lines[0] == ("teacher: (591 prompt x 3 + 0 response x 0) / 1M = 0.001773 USD a query")
    assert (
        "saved against the teacher: 0.001773 - 0.00 = 0.001773 a query, 100.0 %; 1,773.00 a "
        in ("\n".join(lines))
    )
    assert "break-even against the teacher: 1.00 / 0.001773 = 565 queries" in lines


def test_no_length_of_the_query_makes_the_lessons_figures_true_together() -> None:
    # Saving 3,040 of a million queries takes 444.6 tokens of query, 98.3 % takes 304.4.
    for query, million, percent, queries in ((444.6, 3040, 97.85, 329), (304.4, 2640, 98.3, 379)):
        rows = {**report((591 + query, 0), (query, 0)), "n": 0}
        spending = SpendingRecord(other=1.00)
        found = money(rows, LESSON, spending=spending, volumes=[1_000_000])["savings"][TEACHER]
        assert found["per_query"] * 1e6 == pytest.approx(million, abs=1)
        assert found["percent"] == pytest.approx(percent, abs=0.01)
        assert found["break_even_queries"] == queries


def test_a_cached_prompt_may_be_cheaper_than_the_student() -> None:
    large = Price(prompt=1.00, cached=0.10, response=2.00)
    hosted = Price(prompt=0, response=0, hosting_per_hour=1.00)
    rows = report((1000, 10), (100, 10), cached_mean=900)
    found = money(rows, prices(large, hosted), volumes=[10_000, 10_000_000])
    # 100 x 1.00 + 900 x 0.10 + 10 x 2.00 = 210 a million, against 730 a month of hosting.
    assert found["per_query"] == pytest.approx({TEACHER: 0.00102, CACHED: 0.00021, STUDENT: 0.0})
    assert [month["cheapest"] for month in found["volumes"]] == [CACHED, STUDENT]
    assert found["advice"].startswith("Cache the prompt instead at 10,000 queries a month")
    assert found["savings"][CACHED]["pays_from"] == 3_476_191  # 730 / 0.00021
    assert found["savings"][CACHED]["break_even_queries"] is None
    assert found["volumes"][0]["against"][CACHED]["break_even_days"] is None
    few = money(rows, prices(large, hosted), volumes=[1_000, 10_000])
    assert few["advice"] == "Cache the prompt instead: the student is dearer at every volume."
    plain = large.model_copy(update={"cached": None})
    kept = money(rows, prices(plain, hosted), volumes=[1_000])
    assert kept["advice"] == "Keep the prompt: the student is dearer at every volume."


def test_longer_answers_of_the_student_are_paid_for() -> None:
    both = Price(prompt=1.00, response=10.00)
    found = money(report((600, 10), (100, 70)), prices(both, both))
    assert found["savings"][TEACHER]["per_query"] == pytest.approx(0.0007 - 0.0008)
    assert found["savings"][TEACHER]["break_even_queries"] is None
    assert {month["cheapest"] for month in found["volumes"]} == {TEACHER}


def test_days_and_return_follow_from_what_was_spent() -> None:
    rows = {**report((1000, 0), (0, 0)), "n": 0}
    found = money(rows, LESSON, spending=SpendingRecord(other=30.0), volumes=[10_000])
    against = found["volumes"][0]["against"][TEACHER]
    assert against["saving"] == pytest.approx(30.0)
    assert against["break_even_days"] == pytest.approx(365 / 12)
    assert against["break_even_queries"] == 10_000
    assert against["first_year_return"] == pytest.approx(11.0)  # 12 x 30 - 30, of 30
    slow = money(rows, LESSON, spending=SpendingRecord(other=600.0), volumes=[10_000])
    assert "it takes 608 days to be back what was spent" in slow["advice"]


def test_everything_spent_is_named_with_how_it_is_known(tmp_path: Path) -> None:
    large = Price(prompt=3.00, cached=0.30, response=15.00)
    small = Price(prompt=0.15, response=0.60, train=0.40)
    tokens = {"prompt": 1_000_000, "cached": 900_000, "response": 10_000}
    spending = SpendingRecord(
        {"tokens": tokens},
        [training(tmp_path / "train", None), training(tmp_path / "train-2", 0.5)],
    )
    found = money(report((600, 10), (100, 10)), prices(large, small), spending=spending)
    parts = {name: part["amount"] for name, part in found["spent"]["parts"].items()}
    assert parts == pytest.approx(
        {
            "generation": 0.1 * 3.00 + 0.9 * 0.30 + 0.01 * 15.00,
            "training (train)": 0.5 * 0.40,
            "training (train-2)": 0.5,
            "measuring": 100 * (0.00195 + 2 * 0.000021),
        }
    )
    assert found["spent"]["total"] == pytest.approx(sum(parts.values()))
    assert found["cached_share"] == 0.9
    counted = {"cost": {"amount": 7.0, "currency": "USD", "priced_at": "2026-10-01"}}
    again = money(
        report((600, 10), (100, 10)), prices(large, small), spending=SpendingRecord(counted)
    )
    assert again["spent"]["parts"]["generation"] == {
        "amount": 7.0,
        "said": "as counted, prices of 2026-10-01",
    }


def test_what_nobody_priced_is_left_out_by_name(tmp_path: Path) -> None:
    spending = SpendingRecord(trainings=[training(tmp_path / "train", None)])
    found = money(report((600, 10), (100, 10)), LESSON, spending=spending)
    assert (
        "Left out, since nobody says what it cost: generation, training (train)."
        in (found["notes"])
    )
    assert "names no price for the teacher's cached tokens" in found["notes"][0]
    json.dumps(found, allow_nan=False)


def test_a_missing_price_or_count_says_what_to_add() -> None:
    one = Prices(date=date(2026, 11, 1), currency="USD", models={"openai:large": LARGE})
    with pytest.raises(PriceError, match="'tinker:small'.*under the name 'student'.*hosting_per"):
        money(report((600, 10), (100, 10)), one)
    rows = report((600, 10), (100, 10))
    rows["systems"]["student"]["tokens"]["prompt_mean"] = None
    with pytest.raises(PriceError, match="server of the student doesn't count tokens"):
        money(rows, LESSON)


LARGE = Price(prompt=3, response=15)


def test_prices_under_student_and_teacher_stand_before_those_of_the_models() -> None:
    mine = {"student": Price(prompt=1, response=1), "teacher": Price(prompt=2, response=2)}
    known = Prices(date=date(2026, 11, 1), currency="EUR", models={**LESSON.models, **mine})
    found = money(report((1_000_000, 0), (1_000_000, 0)), known)
    assert found["per_query"][STUDENT] == 1.0
    assert found["per_query"][TEACHER] == 2.0
    assert found["arithmetic"][0].endswith("EUR a query")


def test_a_runs_folder_says_what_it_spent(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="distill-datasets measure"):
        money_of_run(tmp_path, LESSON)
    (tmp_path / "report.json").write_text(json.dumps(report((600, 10), (100, 10))))
    (tmp_path / "answers").mkdir()
    cost = {"amount": 2.5, "currency": "USD", "priced_at": None}
    (tmp_path / "answers" / "generation.json").write_text(json.dumps({"cost": cost}))
    training(tmp_path / "train", 1.0)
    training(tmp_path / "small", 0.25)  # --out names it as it likes
    found = money_of_run(tmp_path, LESSON, volumes=[5], other=0.5)
    parts = {name: part["amount"] for name, part in found["spent"]["parts"].items()}
    del parts["measuring"]
    assert parts == {
        "generation": 2.5,
        "training (small)": 0.25,
        "training (train)": 1.0,
        "other": 0.5,
    }
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(DatasetError, match="is no report of `measure`"):
        money_of_run(tmp_path, LESSON)


def test_a_report_without_the_base_names_the_student_by_its_training(tmp_path: Path) -> None:
    rows = report((600, 10), (100, 10))
    del rows["systems"]["base"]
    rows["spent"] = {"amount": 0.25, "currency": "USD", "priced_at": "2026-11-01"}
    (tmp_path / "report.json").write_text(json.dumps(rows))
    with pytest.raises(PriceError, match="tinker://run"):
        money_of_run(tmp_path, LESSON)
    training(tmp_path / "train", 1.0)
    found = money_of_run(tmp_path, LESSON)
    assert found["spent"]["parts"]["measuring"]["amount"] == 0.25
    assert priced_models(tmp_path) == ["openai:large", "tinker:small"]


def test_the_text_has_advice_volumes_and_arithmetic() -> None:
    large = Price(prompt=3.00, cached=0.30, response=15.00)
    text = money_text(
        money(
            report((600, 10), (100, 10), cached_mean=500),
            prices(large, LESSON.models["tinker:small"]),
        )
    )
    assert text.startswith("The student is the cheapest at every volume. (in USD, prices of 2026")
    assert "1,000,000" in text
    assert "Median latency in ms: teacher 1200.0, teacher, cached 900.0, student 300.0." in text


def test_the_template_of_prices_can_be_read() -> None:
    found = Prices.load(cards_folder() / "prices.yaml")
    assert found.models["student"].hosting == pytest.approx(876.0)
    assert found.of("tinker:Qwen/Qwen3-8B").train == 0.4


def test_hosting_is_by_the_hour_or_by_the_month() -> None:
    with pytest.raises(ValueError, match="found both"):
        Price(prompt=0, response=0, hosting_per_hour=1, hosting_per_month=1)
    assert Price(prompt=0, response=0, hosting_per_month=5).hosting == 5


def test_prices_are_taken_from_a_list_that_the_user_has(tmp_path: Path) -> None:
    listed = {
        "sample_spec": {"input_cost_per_token": 0.0},
        "gpt-x": {
            "input_cost_per_token": 2.5e-07,
            "output_cost_per_token": 2e-06,
            "cache_read_input_token_cost": 2.5e-08,
            "litellm_provider": "openai",
        },
    }
    (tmp_path / "prices.json").write_text(json.dumps(listed))
    day = date(2026, 11, 3)
    found = import_prices(tmp_path / "prices.json", {"openai:gpt-x": "gpt-x"}, date=day)
    assert found.models == {"openai:gpt-x": Price(prompt=0.25, cached=0.025, response=2.0)}
    (tmp_path / "prices.csv").write_text(
        "\ufeffModel,Input,Output,Cached input\ngpt-x,$0.25,2,0.025\n"
    )
    assert import_prices(tmp_path / "prices.csv", {"a": "gpt-x"}, date=day).models == {
        "a": Price(prompt=0.25, cached=0.025, response=2.0)
    }
    with pytest.raises(PriceError, match="no prices of 'gpt-xx'.*Did you mean 'gpt-x'"):
        import_prices(tmp_path / "prices.csv", {"a": "gpt-xx"})
    with pytest.raises(PriceError, match="no complete price of 'sample_spec'"):
        import_prices(tmp_path / "prices.json", {"a": "sample_spec"})
    (tmp_path / "prices.csv").write_text("Input,Output\n1,2\n")
    with pytest.raises(PriceError, match="no column of models"):
        import_prices(tmp_path / "prices.csv", {"a": "gpt-x"})

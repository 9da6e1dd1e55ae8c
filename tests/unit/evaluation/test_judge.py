import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.errors import BudgetReached, DatasetError, GenerationError, SettingsError
from distill_datasets.evaluation.judge import (
    OWN,
    AnswerJudge,
    HumanLabels,
    JudgedRow,
    Opinions,
    families,
    read_scores,
    rogan_gladen,
)
from distill_datasets.evaluation.report_text import judge_lines, judge_table
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient
from distill_datasets.generation.pricing import Meter, Prices
from distill_datasets.models.sampler import Reply, Sample, Sampling, Usage
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.schema import Message
from tests.support.panels import recipe_of

Prefer = Callable[[str, str], str]


class Critic:
    """Judges by functions of the texts alone, in the form that it is asked for."""

    def __init__(self, prefer: Prefer, score: Callable[[str], float] = len) -> None:
        self.model = self.identity = "critic"
        self.prefer, self.score = prefer, score
        self.asked: list[str] = []
        self.failing = False

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        if self.failing:
            raise RuntimeError("busy")
        (message,) = messages
        request = message["content"]
        self.asked.append(request)
        texts = re.findall(r"<answer(?:_[ab])?>\n(.*?)\n</answer", request, re.DOTALL)
        if len(texts) == 2:
            said = f"One is better.\n\nbetter: {self.prefer(*texts)}"
        else:
            names = re.findall(r"^(.+): <1-10>$", request, re.MULTILINE)
            said = "\n".join(["Fine."] + [f"**{name}**: {self.score(texts[0])}" for name in names])
        return Reply((Sample(said, "stop", 10),), Usage(100, 0))


def right(first: str, second: str) -> str:
    """Goes by the number that a text begins with."""
    one, two = (int(text.split()[0]) for text in (first, second))
    return "tie" if one == two else "A" if one > two else "B"


def longer(first: str, second: str) -> str:
    return "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


def first_shown(first: str, second: str) -> str:
    return "A"


def by_chance(first: str, second: str) -> str:
    return "AB"[sha256(f"{first}|{second}".encode()).digest()[0] % 2]


def quality(text: str) -> float:
    return int(text.split()[0])


def rows(count: int, gap: int = 0, seed: int = 0) -> list[JudgedRow]:
    """Texts that begin with how good they are, and are as long as chance has it."""
    chance = random.Random(seed)

    def text(good: int) -> str:
        return f"{good} " + "x" * chance.randint(1, 60)

    found = []
    for place in range(count):
        taught, learned = chance.randint(5, 9), max(1, chance.randint(5, 9) - gap)
        texts = {"teacher": text(taught), "student": text(learned), "base": text(2)}
        found.append(
            JudgedRow(f"r{place}", f"query {place}", "Be good.", f"r{place}", None, texts, texts)
        )
    return found


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(recipe_of(tmp_path / "recipe", teacher="pocket"))


def judge(critic: Critic, recipe: Recipe, *names: str, labels: HumanLabels | None = None) -> Any:
    judging = AnswerJudge(critic, recipe, names, labels)

    def ask(asked: Sequence[JudgedRow], path: Path, **options: Any) -> dict[str, Any]:
        models = {"teacher": "openai:big", "student": "pocket", "base": "pocket"}
        with Journal(path / "journal.sqlite") as journal:
            return judging.judge(asked, models, CachedClient(journal, **options))

    return ask


def test_a_judge_that_is_right_finds_who_is_better_and_names_the_gap(
    recipe: Recipe, tmp_path: Path
) -> None:
    found = judge(Critic(right, quality), recipe)(rows(60, gap=2), tmp_path)
    assert list(found["scales"]) == ["relevance", "completeness", "clarity"]
    mean = sum(quality(row.texts["student"]) for row in rows(60, gap=2)) / 60
    assert found["scores"]["student"]["clarity"]["value"] == pytest.approx(mean)
    apart = found["differences"]["student-teacher"]["clarity"]
    assert apart["low"] < apart["value"] < apart["high"] < 0
    assert any(one.startswith("clarity: student - teacher -") for one in found["gaps"])
    assert any("student - base +" in one for one in found["gaps"])
    preference = found["preference"]
    assert preference["teacher"] > preference["student"]
    assert preference["flipped"] == preference["unread"] == 0
    assert preference["difference"]["high"] < 0 and preference["p"] < 0.05
    assert found["agreement"]["value"] == 1 and found["agreement"]["low"] < 1
    assert found["first_shown"]["value"] == 0.5
    assert found["length_bias"]["low"] < 0 < found["length_bias"]["high"]
    assert found["warnings"] == []


def test_scores_that_are_all_alike_have_an_interval_all_the_same(
    recipe: Recipe, tmp_path: Path
) -> None:
    found = judge(Critic(right, lambda text: 10), recipe)(rows(30), tmp_path)
    every = [one for criteria in found["scores"].values() for one in criteria.values()]
    every += [one for criteria in found["differences"].values() for one in criteria.values()]
    assert len(every) == 3 * 3 + 2 * 3
    assert all(one["low"] < one["high"] and one["high"] <= 10 for one in every)
    assert found["gaps"] == []
    assert "No gap between the student's scores and others' is more than chance." in (
        judge_lines(found)
    )


def test_length_bias_has_the_interval_that_statsmodels_has() -> None:
    """Of 60 pairs where the student's text is longer it wins 40, of 50 others 20."""
    kinds = [("xx", 40, 60), ("x", 20, 50)]
    asked, pairs = [], []
    for text, wins, count in kinds:
        for place in range(count):
            name = f"{text}{place}"
            texts = {"student": text, "teacher": "x." if text == "x" else "."}
            asked.append(JudgedRow(name, name, "", name, None, texts, texts))
            better = "student" if place < wins else "teacher"
            pairs.append({"student": better, "teacher": better})
    found = Opinions(asked, {}, {}, pairs).findings()["length_bias"]
    # Its confint_proportions_2indep(40, 60, 20, 50, method="newcomb", compare="diff").
    assert (found["low"], found["high"]) == pytest.approx((0.0795945618, 0.4297612233))
    assert found["longer_wins"]["value"] == (40 + 30) / 110


def test_texts_are_judged_blind(recipe: Recipe, tmp_path: Path) -> None:
    critic = Critic(right, quality)
    judge(critic, recipe)(rows(3), tmp_path)
    assert len(critic.asked) == 3 * (3 + 2)
    assert not any(re.search("student|teacher|base|distil", one) for one in critic.asked)


def test_a_judge_that_takes_the_first_has_ties_alone_and_is_warned_of(
    recipe: Recipe, tmp_path: Path
) -> None:
    found = judge(Critic(first_shown, quality), recipe)(rows(40, gap=2), tmp_path)
    assert found["preference"]["ties"] == found["preference"]["flipped"] == 40
    assert found["preference"]["difference"]["value"] == 0
    assert found["first_shown"]["value"] == 1 and found["agreement"]["value"] == 0
    assert any("flips with the order in 40 of 40 pairs" in one for one in found["warnings"])


def test_a_judge_that_takes_the_longer_is_warned_of(recipe: Recipe, tmp_path: Path) -> None:
    found = judge(Critic(longer, quality), recipe)(rows(60), tmp_path)
    assert found["length_bias"]["low"] > 0.5
    assert found["length_bias"]["longer_wins"]["value"] == 1
    assert any("favours length" in one for one in found["warnings"])


def test_a_judge_by_chance_agrees_with_itself_by_chance(recipe: Recipe, tmp_path: Path) -> None:
    found = judge(Critic(by_chance, quality), recipe)(rows(80), tmp_path)
    assert found["agreement"]["low"] < 0.5 < found["agreement"]["high"]
    assert found["preference"]["difference"]["low"] < 0 < found["preference"]["difference"]["high"]
    length = found["length_bias"]
    assert length["low"] < 0 < length["high"]


def test_equal_texts_are_a_tie_and_nobody_is_asked_which_is_better(
    recipe: Recipe, tmp_path: Path
) -> None:
    same = [replace(row, texts={**row.texts, "student": row.texts["teacher"]}) for row in rows(4)]
    critic = Critic(first_shown, quality)
    found = judge(critic, recipe)(same, tmp_path)
    assert found["preference"]["equal"] == found["preference"]["ties"] == 4
    assert len(critic.asked) == 4 * 2  # equal texts have one score, which is asked once
    assert found["agreement"] is found["length_bias"] is found["first_shown"] is None
    assert any("rows are too few" in line for line in judge_lines(found))


def test_what_was_paid_is_not_asked_again_and_the_cost_is_said_first(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = Prices.model_validate(
        {
            "date": "2026-11-01",
            "currency": "USD",
            "models": {"critic": {"prompt": 1000, "response": 1000}},
        }
    )
    critic = Critic(right, quality)
    ask = judge(critic, recipe)
    meter = Meter(prices)
    ask(rows(5), tmp_path, meter=meter)
    assert meter.spent == pytest.approx(25 * 110 * 1000 / 1e6)
    said = capsys.readouterr().err
    assert re.search(r"judge: asks critic 25 of 25 requests .* at most [\d,.]+ USD", said)
    ask(rows(5), tmp_path)
    assert len(critic.asked) == 25
    assert "judge: asks critic 0 of 25 requests" in capsys.readouterr().err
    with pytest.raises(BudgetReached):
        ask(rows(5, seed=1), tmp_path, meter=Meter(prices, budget=0.2))


def test_requests_that_fail_leave_no_opinions_and_only_they_are_asked_again(
    recipe: Recipe, tmp_path: Path
) -> None:
    critic = Critic(right, quality)
    critic.failing = True
    with pytest.raises(GenerationError, match="judge critic: 10 of 10 requests failed.*busy"):
        judge(critic, recipe)(rows(2), tmp_path)
    critic.failing = False
    assert judge(critic, recipe)(rows(2), tmp_path)["n"] == 2


def test_a_judge_that_gives_no_score_is_an_error_that_shows_what_it_says(
    recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(GenerationError, match="holds a score that can be read"):
        judge(Critic(right, lambda text: 99), recipe)(rows(2), tmp_path)


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("clarity: 7", 7),
        ("So far so good.\n- **Clarity**: 8/10", 8),
        ('{\n "clarity": 10\n}', 10),
        ("clarity: 3\nOr rather:\nclarity = 4", 4),
        ("clarity: 0", None),
        ("clarity: 100", None),
        ("The clarity of its 9 lines", None),
        ("", None),
    ],
)
def test_a_score_is_read_from_its_line(said: str, score: float | None) -> None:
    assert read_scores(["clarity"], Sample(said, "stop", 1)) == {"clarity": score}
    assert read_scores(["clarity"], Sample(said, "length", 1)) == {"clarity": None}


def test_rubrics_ship_by_name_and_come_from_a_file(recipe: Recipe, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("wit: It makes one laugh.\n")
    found = judge(Critic(right, quality), recipe, "persona", "period", "faithfulness", str(own))(
        rows(2), tmp_path
    )
    named = ["persona consistency", "period knowledge", "faithfulness", "wit"]
    assert list(found["scales"]) == named
    with pytest.raises(SettingsError, match="no rubric 'persone'.*persona"):
        AnswerJudge(Critic(right), recipe, ("persone",))
    with pytest.raises(SettingsError, match="the recipe has no `judge`"):
        AnswerJudge(Critic(right), recipe, (OWN,))
    own.write_text("- wit\n")
    with pytest.raises(SettingsError, match="holds no criteria"):
        AnswerJudge(Critic(right), recipe, (str(own),))


def test_a_recipes_own_judge_prompt_is_the_rubric_where_it_has_one(tmp_path: Path) -> None:
    template = "{{ query }} under {{ prompt }}\n<answer>\n{{ text }}\n</answer>\nrecipe: <1-10>"
    keys = {"choose": "best", "judge": {"model": "pocket", "scale": [0, 20]}}
    folder = recipe_of(tmp_path / "recipe", template=template, teacher="pocket", **keys)
    critic = Critic(right, quality)
    found = judge(critic, load_recipe(folder))(rows(2), tmp_path)
    assert found["rubrics"] == [OWN] and found["scales"] == {OWN: [0.0, 20.0]}
    assert found["scores"]["base"][OWN]["value"] == 2
    assert ["favour the teacher" in one for one in found["warnings"]] == [True]
    assert any(one.startswith("query 0 under Be good.\n") for one in critic.asked)


def test_rogan_gladen_is_what_it_is_by_hand() -> None:
    """(0.6 + 0.8 - 1) / (0.9 + 0.8 - 1) = 0.4 / 0.7."""
    known = [{"value": value, "n": n} for value, n in ((0.6, 200), (0.9, 50), (0.8, 50))]
    found = rogan_gladen(known[0], known[1], known[2])
    assert found
    assert found["value"] == pytest.approx(4 / 7)
    # By hand: n' = 203.8415, p' = 121.9207 / n' = 0.598116, Se' = 46/52, Sp' = 41/52, so that the
    # middle is 0.386578 / 0.673077 = 0.574344, moved by -0.001828; 1.95996 standard errors of
    # 0.0490702 / 0.673077 are 0.142890.
    assert found["low"] == pytest.approx(0.574344 - 0.001828 - 0.142890, abs=2e-6)
    assert found["high"] == pytest.approx(0.574344 - 0.001828 + 0.142890, abs=2e-6)
    perfect = [{"value": value, "n": 1e9} for value in (0.3, 1.0, 1.0)]
    exact = rogan_gladen(perfect[0], perfect[1], perfect[2])
    assert exact and exact["low"] == pytest.approx(0.3, abs=1e-3) == exact["high"]
    assert rogan_gladen(known[0], {"value": 0.5, "n": 50}, {"value": 0.5, "n": 50}) is None


def test_the_corrected_interval_holds_the_truth() -> None:
    """A judge with sensitivity 0.85 and specificity 0.7, of a true share of 0.4."""
    chance, held = random.Random(3), 0
    for _ in range(300):
        truth = [chance.random() < 0.4 for _ in range(200)]
        said = [chance.random() < (0.85 if one else 0.3) for one in truth]
        shown = [chance.random() < 0.85 for _ in range(60)]
        refused = [chance.random() < 0.7 for _ in range(60)]
        shares = [{"value": sum(one) / len(one), "n": len(one)} for one in (said, shown, refused)]
        found = rogan_gladen(shares[0], shares[1], shares[2])
        assert found
        held += found["low"] <= 0.4 <= found["high"]
    assert held >= 0.93 * 300


def labels(path: Path, *lines: str) -> HumanLabels:
    path.write_text("\n".join(lines) + "\n")
    return HumanLabels.read(path)


def test_human_labels_correct_a_judge_that_errs(recipe: Recipe, tmp_path: Path) -> None:
    asked = rows(80, gap=1)
    truth = {
        row.id: right(row.texts["student"], row.texts["teacher"]).replace("A", "better")
        for row in asked
    }
    words = {"better": "better", "B": "worse", "tie": "same"}
    lines = [f"{name},{words[one]}" for name, one in truth.items()]
    people = labels(tmp_path / "labels.csv", "id,label", *lines[:60])
    share = sum(one != "B" for one in truth.values()) / 80
    found = judge(Critic(right, quality), recipe, labels=people)(asked, tmp_path)
    assert found["corrected"] and found["labels"]["rows"] == 60
    assert found["labels"]["rate"]["value"] == pytest.approx(share)
    assert found["labels"]["rate"]["low"] < share < found["labels"]["rate"]["high"]
    assert any("corrected by 60 human labels" in line for line in judge_lines(found))
    plain = judge(Critic(right, quality), recipe)(asked, tmp_path)
    assert not plain["corrected"]
    assert "uncorrected" in judge_lines(plain)[0]
    biased = judge(Critic(longer, quality), recipe, labels=people)(asked, tmp_path / "recipe")
    sure = biased["labels"]["rate"]
    assert sure is None or sure["high"] - sure["low"] > 0.5


def test_labels_of_one_kind_correct_nothing(recipe: Recipe, tmp_path: Path) -> None:
    people = labels(tmp_path / "labels.csv", "query,label", "query 1,good", "query 2,good")
    found = judge(Critic(right, quality), recipe, labels=people)(rows(20), tmp_path)
    assert not found["corrected"]
    assert any(
        "uncorrected: labels of both kinds are needed" in line for line in judge_lines(found)
    )


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["id,verdict", "r1,good"], "expected rows with the columns label"),
        (["id,label", "r1,nice"], "line 2: expected a label of better, same"),
        (["id,label", "r1,good", "r2,worse"], "mixes better/worse"),
        (["id,label", "r1,good", "r1,bad"], "line 3: 'r1' has another label before"),
        ([""], "holds no labels"),
    ],
)
def test_labels_that_say_nothing_are_refused(
    lines: list[str], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match=problem):
        labels(tmp_path / "labels.csv", *lines)


def test_labels_of_other_rows_are_refused(tmp_path: Path) -> None:
    people = labels(tmp_path / "labels.csv", "id,label", "x,good")
    with pytest.raises(DatasetError, match="None of the 1 labels is of a row.*'r0'"):
        people.of(["r0"], ["query 0"])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("openai:gpt-5-mini", "openai:o3"),
        ("tinker:Qwen/Qwen3-8B", "openai:qwen2.5-72b-instruct"),
        ("tinker:meta-llama/Llama-3.1-8B", "openai:meta-llama-3-70b"),
        ("openai:claude-3-5-haiku", "openai:anthropic/claude-opus-4"),
    ],
)
def test_models_of_one_family_are_known_by_their_names(first: str, second: str) -> None:
    assert families(first) & families(second)


def test_models_of_different_families_are_told_apart(recipe: Recipe, tmp_path: Path) -> None:
    names = ["openai:gpt-5", "tinker:Qwen/Qwen3-8B", "openai:claude-opus-4", "pocket"]
    assert len(set().union(*map(families, names))) == len(names)
    assert not families("tinker://run/sampler_weights/final")
    critic = Critic(right, quality)
    critic.model = "openai:bigger"
    found = judge(critic, recipe)(rows(2), tmp_path)
    assert found["warnings"] == []
    critic.model = "openai:big-2"
    warned = judge(critic, recipe)(rows(2), tmp_path)["warnings"]
    assert warned == [
        "The judge openai:big-2 and the teacher openai:big are of one family: a model likes what "
        "sounds like itself. Ask a judge of another family."
    ]


def test_the_table_has_every_system(recipe: Recipe, tmp_path: Path) -> None:
    found = judge(Critic(right, quality), recipe)(rows(25), tmp_path)
    lines = judge_table(found).splitlines()
    assert [line.split()[0] for line in lines] == ["system", "teacher", "student", "base"]
    assert max(map(len, lines)) < 100

"""Rules found in a prompt, and what leaving them out changes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.cli.main import main
from distill_datasets.errors import BudgetReached, RecipeError
from distill_datasets.generation.pricing import Meter, Prices
from distill_datasets.models.sampler import Reply, Sample, Sampling, Usage
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.schema import Message
from distill_datasets.synthesis.coverage import prompt_coverage, rules_of
from tests.conftest import edit
from tests.support.panels import Models

PROMPT = """\
You sort letters.

# Rules

Labels:

- bill: money is asked for,
  now or later.
- love: it ends in kisses.

| word | label |
|------|-------|
| cash | bill  |

Shout.
Stay calm, and
never guess.

```
bill
love
```
"""


def recipe(prompt: str, **keys: Any) -> Recipe:
    fields = {"name": "r", "description": "d", "teacher": "pocket", "prompt": prompt}
    return Recipe(**{**fields, "queries": {"file": "q.jsonl"}, **keys})


def found(prompt: str, **keys: Any) -> list[str]:
    return [one.text for one in rules_of(recipe(prompt, **keys))]


def test_rules_are_items_rows_paragraphs_and_finished_lines() -> None:
    assert found(PROMPT) == [
        "You sort letters.",
        "- bill: money is asked for,\n  now or later.",
        "- love: it ends in kisses.",
        "| cash | bill  |",
        "Shout.",
        "Stay calm, and\nnever guess.",
        "```\nbill\nlove\n```",
    ]


def test_a_prompt_without_a_rule_is_the_prompt_without_its_words() -> None:
    (_, bill, *_) = rules_of(recipe(PROMPT))
    assert PROMPT[: bill.start] + PROMPT[bill.end :] == PROMPT.replace(f"{bill.text}\n", "")


def test_a_prompt_of_one_paragraph_has_sentences_for_rules() -> None:
    assert found("Sort letters. Say bill or love! Never guess.") == [
        "Sort letters.",
        "Say bill or love!",
        "Never guess.",
    ]


def test_what_holds_the_query_stays() -> None:
    assert found("Be kind.\n\nThe letter: {{ query }}\n\nBe brief.") == ["Be kind.", "Be brief."]


def test_rules_that_the_recipe_names_word_for_word_are_taken() -> None:
    named = ("ends in kisses", "never guess")
    assert found(PROMPT, synthesis={"rules": named}) == [*named]
    assert len(found(PROMPT, synthesis={"rules": ("in other words",)})) == 7


def test_a_prompt_without_parts_is_refused() -> None:
    with pytest.raises(RecipeError, match="found 1"):
        found("Sort.")


class Literal:
    """Obeys two rules of its prompt, and no other."""

    model = identity = "literal"

    def __init__(self) -> None:
        self.requests = 0

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        self.requests += 1
        prompt, query = messages[0]["content"], messages[-1]["content"]
        label = "love" if "kisses" in prompt and "xxx" in query else "bill"
        text = label.upper() if "Shout" in prompt else label
        return Reply((Sample(text, "stop", 1),), Usage(100, 0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "letters"
    made.mkdir()
    (made / "recipe.yaml").write_text(
        "name: letters\ndescription: d\nteacher: pocket\nqueries: {file: q.jsonl}\n"
        "checks: [{name: loud, matches: '^[A-Z]+$'}]\n"
    )
    (made / "prompt.md").write_text(PROMPT)
    rows = [{"query": text} for text in ("pay me", "yours xxx", "pay now")]
    (made / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def test_rules_that_change_no_answer_are_unexercised(folder: Path, tmp_path: Path) -> None:
    model, said = Literal(), list[str]()
    covered = prompt_coverage(folder, out=tmp_path / "out", teacher=model, before=said.append)
    by_rule = {one["rule"]: one for one in covered.data["rules"]}
    assert {rule for rule, one in by_rule.items() if one["changed"]} == {
        "- love: it ends in kisses.",
        "Shout.",
    }
    assert (by_rule["Shout."]["changed"], by_rule["Shout."]["checks"]) == (3, {"loud": 3})
    assert by_rule["- love: it ends in kisses."]["examples"] == [
        {"query": "yours xxx", "with": "LOVE", "without": "BILL"}
    ]
    assert covered.data["changed_by_chance"] == 0
    assert len(covered.unexercised) == 5
    assert (
        "5 of 7 rules that no query of the sample exercises:\n  You sort letters." in covered.text()
    )
    assert "Coverage of the prompt of letters" in covered._repr_html_()
    assert said[0].startswith("coverage: 7 rules on 3 queries: 27 of 27 requests")
    assert json.loads(covered.path.read_text()) == covered.data
    asked = model.requests
    again = prompt_coverage(folder, out=tmp_path / "out", teacher=model, before=said.append)
    assert (again.data, model.requests) == (covered.data, asked)
    assert "0 of 27 requests" in said[1]


def test_a_sample_is_of_some_queries_alone(folder: Path, tmp_path: Path) -> None:
    model = Literal()
    covered = prompt_coverage(load_recipe(folder), out=tmp_path / "o", teacher=model, sample=1)
    assert (covered.data["queries"], model.requests) == (1, 9)


def test_a_budget_ends_it_and_what_was_paid_is_kept(folder: Path, tmp_path: Path) -> None:
    prices = Prices(
        date="2026-11-01", currency="USD", models={"literal": {"prompt": 10, "response": 10}}
    )
    meter, said = Meter(prices, budget=0.02), list[str]()
    with pytest.raises(BudgetReached):
        prompt_coverage(
            folder, out=tmp_path / "o", teacher=Literal(), meter=meter, before=said.append
        )
    assert "USD" in said[0]
    assert 0 < meter.spent <= 0.02


def test_nothing_is_asked_where_a_person_says_no(
    folder: Path, tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    edit(folder, "recipe.yaml", "teacher: pocket", "teacher: right")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert main(["coverage", str(folder), "--out", str(tmp_path / "o")]) == 130
    assert "27 of 27 requests" in capsys.readouterr().err
    assert not models.requests
    assert not (tmp_path / "o" / "coverage.json").exists()

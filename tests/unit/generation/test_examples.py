"""Examples before a query, and how the best of them are found."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pytest
import yaml

from distill_datasets.errors import PriceError, RecipeError, ServiceError
from distill_datasets.generation.examples import choices, most_answers
from distill_datasets.generation.pricing import Meter, Price, Prices
from distill_datasets.generation.run import generate
from distill_datasets.models.sampler import Reply, Sample, Sampling, Usage
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.queries import load_queries
from distill_datasets.recipes.sections import Examples
from distill_datasets.releases.release import publish
from distill_datasets.schema import Message
from tests.support.panels import Models


@dataclass
class Pupil:
    """Answers rightly what its examples end with: the last example's response to every query."""

    model: str = "pupil"
    identity: str = "pupil"
    calls: int = 0
    fails: bool = False

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        if self.fails:
            raise ServiceError("The server is away.")
        self.calls += 1
        shown = [one["content"] for one in messages if one["role"] == "assistant"]
        return Reply((Sample(shown[-1] if shown else "none", "stop", 1),), Usage(9, 0))


def recipe(tmp_path: Path, **examples: object) -> Path:
    folder = tmp_path / "recipe"
    folder.mkdir()
    rows = [
        {"query": f"{split} {n}", "reference": "C", "split": split}
        for split in ("train", "validation", "test")
        for n in range(20)
    ]
    rows.append({"query": "example B", "reference": "C", "split": "test"})
    known = [{"query": f"example {name}", "response": name} for name in "ABCD"]
    for name, lines in (("queries.jsonl", rows), ("examples.jsonl", known)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "prompt.md").write_text("Say a letter.")
    columns = {"query": "query", "reference": "reference", "forced_split": "split"}
    keys = {
        "name": "letters",
        "description": "d",
        "teacher": "pupil",
        "queries": {"file": "queries.jsonl", **columns},
        "examples": {"file": "examples.jsonl", **examples} if examples else "examples.jsonl",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys))
    return folder


def test_examples_stand_before_the_query_as_turns_in_their_order(tmp_path: Path) -> None:
    found = load_recipe(recipe(tmp_path, rows=[3, 1]))
    assert [(one["role"], one["content"]) for one in found.messages("?")] == [
        ("system", "Say a letter."),
        ("user", "example C"),
        ("assistant", "C"),
        ("user", "example A"),
        ("assistant", "A"),
        ("user", "?"),
    ]
    assert found.student_messages("?") == [{"role": "user", "content": "?"}]


def test_no_example_is_a_row(tmp_path: Path) -> None:
    found = load_recipe(recipe(tmp_path))
    with pytest.warns(UserWarning, match="1 queries are examples of the prompt"):
        rows = load_queries(found)
    assert len(rows) == 60 and "example B" not in rows["query"]


def test_all_rows_that_are_examples_are_counted_in_one_warning(tmp_path: Path) -> None:
    folder = recipe(tmp_path)
    rows = [{"query": f"train {n}", "split": "train"} for n in range(20, 1_100)]
    rows += [{"query": "example A", "split": "train"}]  # of another thousand
    with (folder / "queries.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    with pytest.warns(UserWarning) as told:
        load_queries(load_recipe(folder))
    assert [str(one.message)[:33] for one in told] == ["2 queries are examples of the pro"]


@pytest.mark.filterwarnings("ignore:1 queries are examples")
def test_a_choice_is_found_on_development_rows_and_its_answers_are_paid_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, pupil = recipe(tmp_path, choose=2, by="development", trials=9), Pupil()
    made = generate(folder, out=tmp_path / "run", teacher=pupil)
    facts = json.loads((made.path / "answers" / "generation.json").read_text())["examples"]
    assert (facts["chosen"][-1], facts["score"], facts["score_in_the_files_order"]) == (3, 1.0, 0.0)
    assert (facts["tried"], facts["rows"]) == (9, 20)
    assert pupil.calls == facts["answers"] + 40  # the validation rows are answered already
    assert facts["answers"] <= most_answers(load_recipe(folder))
    assert (
        "1.000 of 20 development rows right, 0.000 in the file's order" in capsys.readouterr().err
    )
    copy = load_recipe(made.path / "answers")
    assert copy.examples == Examples(file="examples.jsonl", rows=tuple(facts["chosen"]))
    again = generate(folder, out=tmp_path / "run", teacher=pupil)
    assert again.kept == 60 and pupil.calls == facts["answers"] + 40


@pytest.mark.filterwarnings("ignore:1 queries are examples")
def test_a_choice_is_found_on_few_development_rows(tmp_path: Path) -> None:
    folder, pupil = recipe(tmp_path, choose=2, by="development", trials=9), Pupil()
    lines = (folder / "queries.jsonl").read_text().splitlines(keepends=True)
    few = [line for line in lines if "validation 1" not in line]
    (folder / "queries.jsonl").write_text("".join(few[:22] + few[-21:]))
    made = generate(folder, out=tmp_path / "run", teacher=pupil)
    facts = json.loads((made.path / "answers" / "generation.json").read_text())["examples"]
    assert (facts["rows"], facts["score"], facts["answers"]) == (2, 1.0, 18)


@pytest.mark.filterwarnings("ignore:1 queries are examples")
def test_a_server_that_is_away_makes_no_choice_worse(tmp_path: Path) -> None:
    folder = recipe(tmp_path, choose=2, by="development")
    with pytest.raises(ServiceError, match="away"):
        generate(folder, out=tmp_path / "run", teacher=Pupil(fails=True))


@pytest.mark.filterwarnings("ignore:1 queries are examples")
def test_a_model_of_the_mix_without_a_price_is_refused_before_a_choice_is_tried(
    tmp_path: Path, models: Models
) -> None:
    folder, pupil = recipe(tmp_path, choose=2, by="development"), Pupil()
    keys = yaml.safe_load((folder / "recipe.yaml").read_text())
    keys["mix"] = [{"name": "beyond", "share": 0.2, "file": "beyond.jsonl", "model": "red"}]
    (folder / "beyond.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(20)))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys))
    price = Price(prompt=1.0, response=1.0)
    meter = Meter(Prices(date=date(2026, 11, 1), currency="USD", models={"pupil": price}))
    with pytest.raises(PriceError, match="red"):
        generate(folder, out=tmp_path / "run", teacher=pupil, meter=meter)
    assert not pupil.calls and not models.requests


def test_choices_are_each_tried_once_and_begin_with_the_files_order() -> None:
    wanted = Examples(file="e.jsonl", choose=2, by="development", trials=100)
    found = choices(wanted, 3)
    assert found[0] == (1, 2) and len({*found}) == len(found) == 6
    assert found == choices(wanted, 3)
    with pytest.raises(RecipeError, match=r"choose is 2, and 'e.jsonl' has 1"):
        choices(wanted, 1)


@pytest.mark.parametrize(
    ("examples", "says"),
    [
        ({"choose": 2}, "choose and by go together"),
        ({"rows": [1], "choose": 1, "by": "development"}, "name one of rows"),
        ({"rows": [1, 1]}, "each row once"),
    ],
)
def test_examples_that_cannot_be_are_refused(
    tmp_path: Path, examples: dict[str, object], says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        load_recipe(recipe(tmp_path, **examples))


@pytest.mark.filterwarnings("ignore:1 queries are examples")
def test_a_release_says_how_its_examples_were_chosen(tmp_path: Path) -> None:
    folder = recipe(tmp_path, choose=2, by="development", trials=4)
    generate(folder, out=tmp_path / "run", teacher=Pupil())
    card = (publish(tmp_path / "run").path / "README.md").read_text(encoding="utf-8")
    assert "the best of 4 choices on 20 development rows" in card
    manifest = json.loads((tmp_path / "run" / "release" / "manifest.json").read_text())
    assert f"{100 * manifest['examples']['score']:.1f} % were answered rightly" in card

import asyncio
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from datasets import config, load_from_disk

from distill_datasets.errors import (
    AccessError,
    BudgetReached,
    DatasetError,
    GenerationError,
    OutputError,
    RecipeError,
    RejectedError,
    RetryableError,
)
from distill_datasets.files import one_writer
from distill_datasets.generation import rows as row_module
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.pricing import Meter, Prices
from distill_datasets.generation.run import Generated, generate
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.models.sampler import Echo, Reply, Sample, Sampling, Usage
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.releases.release import publish
from distill_datasets.schema import Message
from tests.conftest import edit, many


@dataclass
class Scripted:
    """Echoes, except for queries that it was told to fail on."""

    failing: dict[str, Exception] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    model: str = "scripted"
    identity: str = "scripted"

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        query = messages[-1]["content"]
        self.calls.append(query)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        for _ in range(3):
            await asyncio.sleep(0)
        self.in_flight -= 1
        if query in self.failing:
            raise self.failing[query]
        samples = tuple(Sample(f"{query} #{n}", "stop", 5) for n in range(sampling.n))
        return Reply(samples, Usage(20, 10))


@pytest.fixture
def recipe(recipe_folder: Path) -> Recipe:
    return load_recipe(recipe_folder)


def test_kept_rejected_and_failed_rows_are_told_apart(recipe: Recipe, tmp_path: Path) -> None:
    teacher = Scripted({"the sea, colour blue": TimeoutError("too slow")})
    made = generate(recipe, teacher=teacher, out=tmp_path / "run")
    assert made.rows["query"][:] == [query["query"] for query in _queries(recipe)]
    assert made.rows["answer"][:] == ["red", "red", "blue", None, None, None]
    assert made.rows["response"][0] == "It is red."
    assert made.rows["error"][3] == {
        "type": "TimeoutError",
        "status": None,
        "message": "too slow",
        "attempts": 1,
    }
    assert made.rejected == {"outside choices": 1, "unparsable": 1}
    assert (made.kept, made.errors) == (3, 1)
    assert made.rows["teacher_prompt_tokens"][0] == 20
    assert made.rows["teacher_cached_tokens"][0] == 10


def _queries(recipe: Recipe) -> list[dict[str, str]]:
    lines = (recipe.folder / "queries.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_result_is_a_datasets_folder_with_its_summary(recipe: Recipe, tmp_path: Path) -> None:
    made = generate(recipe, teacher=Echo(), out=tmp_path / "run")
    assert load_from_disk(tmp_path / "run/answers").to_dict() == made.rows.to_dict()
    summary = json.loads((tmp_path / "run/answers/generation.json").read_text())
    assert (summary["rows"], summary["kept"], summary["errors"]) == (6, 4, 0)
    assert summary["tokens"]["response"] == sum(made.rows["teacher_response_tokens"])
    assert load_recipe(tmp_path / "run/answers/recipe").prompt == recipe.prompt


def test_a_second_run_asks_nothing(recipe: Recipe, tmp_path: Path) -> None:
    first = generate(recipe, teacher=Echo(), out=tmp_path / "run")
    teacher = Echo()
    second = generate(recipe, teacher=teacher, out=tmp_path / "run")
    assert teacher.calls == 0
    assert second.rows.to_dict() == first.rows.to_dict()


def test_what_was_edited_in_the_recipe_is_in_the_answers_folder_without_asking(
    recipe_folder: Path, tmp_path: Path
) -> None:
    generate(recipe_folder, teacher=Echo(), out=tmp_path / "run")
    edit(recipe_folder, "recipe.yaml", "apache-2.0", "cc0-1.0")
    teacher = Echo()
    generate(recipe_folder, teacher=teacher, out=tmp_path / "run")
    assert load_recipe(tmp_path / "run/answers/recipe").license == "cc0-1.0"
    assert teacher.calls == 0


def test_queries_that_the_recipe_does_not_pin_are_read_again(
    recipe_folder: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    rows = [json.dumps({"query": f"thing {number}, colour red"}) for number in range(4)]
    (elsewhere / "rows.jsonl").write_text("\n".join(rows[:3]))
    spec = {"path": str(elsewhere), "query": "query"}
    recipe = load_recipe(recipe_folder).replace(queries=spec)
    assert generate(recipe, teacher=Echo(), out=tmp_path / "run").kept == 3
    (elsewhere / "rows.jsonl").write_text("\n".join(rows))
    assert generate(recipe, teacher=Echo(), out=tmp_path / "run").kept == 4


def test_without_its_journal_a_finished_run_is_asked_anew(recipe: Recipe, tmp_path: Path) -> None:
    generate(recipe, teacher=Echo(), out=tmp_path / "run")
    (tmp_path / "run/journal.sqlite").unlink()
    teacher = Echo()
    generate(recipe, teacher=teacher, out=tmp_path / "run")
    assert teacher.calls == 6


def test_only_failed_rows_are_asked_again(recipe: Recipe, tmp_path: Path) -> None:
    generate(recipe, teacher=Scripted({"a thought": OSError("reset")}), out=tmp_path / "run")
    teacher = Scripted()
    made = generate(recipe, teacher=teacher, out=tmp_path / "run")
    assert teacher.calls == ["a thought"]
    assert made.errors == 0


def test_added_queries_are_the_only_ones_asked(recipe_folder: Path, tmp_path: Path) -> None:
    generate(many(recipe_folder, 200), teacher=Echo(), out=tmp_path / "run")
    teacher = Echo()
    generate(many(recipe_folder, 210), teacher=teacher, out=tmp_path / "run")
    assert teacher.calls == 10


def test_another_parser_reads_the_journal_again_and_asks_nothing(
    recipe: Recipe, tmp_path: Path
) -> None:
    generate(recipe, teacher=Echo(), out=tmp_path / "run")
    teacher = Echo()
    changed = recipe.replace(answer={"pattern": r"^an? (?P<answer>\w+)"})
    made = generate(changed, teacher=teacher, out=tmp_path / "run")
    assert teacher.calls == 0
    assert made.rows["answer"][:] == ["rose", "poppy", None, None, "car", "thought"]


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"seed": 1}, {"n": 2}, {"max_tokens": 9}])
def test_other_sampling_is_another_request(
    recipe: Recipe, tmp_path: Path, change: dict[str, float]
) -> None:
    generate(recipe, teacher=Echo(), out=tmp_path / "run")
    teacher = Echo()
    generate(recipe.replace(sampling=change), teacher=teacher, out=tmp_path / "run")
    assert teacher.calls == 6


def test_several_samples_come_from_one_request_one_row_each(recipe: Recipe, tmp_path: Path) -> None:
    teacher = Scripted()
    made = generate(recipe.replace(sampling={"n": 3}), teacher=teacher, out=tmp_path / "run")
    assert len(teacher.calls) == 6
    assert made.rows["sample"][:6] == [0, 1, 2, 0, 1, 2]
    assert made.rows["raw"][1] == "a rose, colour red #1"
    summary = json.loads((tmp_path / "run/answers/generation.json").read_text())
    assert summary["tokens"] == {"prompt": 6 * 20, "cached": 6 * 10, "response": 6 * 3 * 5}
    assert len(set(made.rows["id"][:])) == 6


def test_equal_queries_share_one_request(recipe_folder: Path, tmp_path: Path) -> None:
    (recipe_folder / "queries.jsonl").write_text('{"query": "one, colour red"}\n' * 40)
    edit(recipe_folder, "recipe.yaml", ", group: family, reference: colour", "")
    teacher = Scripted()
    made = generate(recipe_folder, teacher=teacher, out=tmp_path / "run")
    assert len(teacher.calls) == 1
    assert made.kept == 40


def test_no_more_requests_are_in_flight_than_asked_for(recipe_folder: Path, tmp_path: Path) -> None:
    teacher = Scripted()
    generate(
        many(recipe_folder, 500),
        teacher=teacher,
        out=tmp_path / "run",
        settings=GenerateSettings(concurrency=7),
    )
    assert teacher.most_in_flight == 7


def test_rows_that_all_fail_alike_stop_the_run(recipe_folder: Path, tmp_path: Path) -> None:
    recipe = many(recipe_folder, 300)
    failing = {row["query"]: RuntimeError("no such renderer") for row in _queries(recipe)}
    teacher = Scripted(dict(failing))
    with pytest.raises(GenerationError, match="first 20 rows all failed alike.*no such renderer"):
        generate(
            recipe, teacher=teacher, out=tmp_path / "run", settings=GenerateSettings(concurrency=5)
        )
    assert len(teacher.calls) < 40
    assert not (tmp_path / "run/answers").exists()


def test_a_refused_key_stops_the_run_at_once(recipe_folder: Path, tmp_path: Path) -> None:
    recipe = many(recipe_folder, 300)
    failing = {"thing 3, colour red": AccessError("check the key")}
    teacher = Scripted(dict(failing))
    with pytest.raises(AccessError, match="check the key"):
        generate(
            recipe, teacher=teacher, out=tmp_path / "run", settings=GenerateSettings(concurrency=2)
        )
    assert len(teacher.calls) < 20
    with Journal(tmp_path / "run/journal.sqlite") as journal:
        assert len(journal) >= 3


def test_generation_works_inside_a_running_event_loop(recipe: Recipe, tmp_path: Path) -> None:
    async def notebook() -> Generated:
        return generate(recipe, teacher=Echo(), out=tmp_path / "run")

    assert asyncio.run(notebook()).kept == 4


def test_a_row_says_what_went_wrong_and_how_often_it_was_asked(
    recipe: Recipe, tmp_path: Path
) -> None:
    failing: dict[str, Exception] = {
        "a thought": RejectedError("too long", type="context length", status=400),
        "a car, colour green": RetryableError("later", type="rate limit", status=429),
    }
    failing["a car, colour green"].retry_after = 3600.0  # type: ignore[attr-defined]
    made = generate(recipe, teacher=Scripted(failing), out=tmp_path / "run")
    errors = made.rows["error"][:]
    assert errors[:4] == [None] * 4
    assert errors[4] == {"type": "rate limit", "status": 429, "message": "later", "attempts": 1}
    assert errors[5]["type"] == "context length" and errors[5]["status"] == 400
    assert made.errors == 2


def test_what_was_rejected_is_a_failed_row_in_every_later_run_and_not_asked(
    recipe: Recipe, tmp_path: Path
) -> None:
    failing = {"a thought": RejectedError("not this", type="content policy", status=400)}
    first = generate(recipe, teacher=Scripted(dict(failing)), out=tmp_path / "run")
    teacher = Scripted()
    second = generate(recipe, teacher=teacher, out=tmp_path / "run")
    assert teacher.calls == []
    assert second.rows.to_dict() == first.rows.to_dict()


def test_rejections_that_come_before_the_first_answer_do_not_stop_the_run(
    recipe_folder: Path, tmp_path: Path
) -> None:
    recipe = many(recipe_folder, 300)
    refused = [row["query"] for row in _queries(recipe)][:80:2]
    no = RejectedError("not this", type="content policy", status=400)

    class Late(Scripted):
        async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
            while len(self.failing) < 40 and messages[-1]["content"] not in self.failing:
                await asyncio.sleep(0)
            return await super().sample(messages, sampling)

    made = generate(recipe, teacher=Late(dict.fromkeys(refused, no)), out=tmp_path / "run")
    assert (made.errors, made.kept) == (40, 260)


def test_a_spent_budget_keeps_what_was_paid_and_a_higher_one_goes_on(
    recipe_folder: Path, tmp_path: Path
) -> None:
    recipe, teacher = many(recipe_folder, 300), Scripted()
    with pytest.raises(BudgetReached):
        generate(
            recipe,
            teacher=teacher,
            out=tmp_path / "run",
            meter=_meter(100),
            settings=GenerateSettings(concurrency=8),
        )
    assert not (tmp_path / "run/answers").exists()
    with Journal(tmp_path / "run/journal.sqlite") as journal:
        assert len(journal) == len(teacher.calls) == 100
    made = generate(recipe, teacher=teacher, out=tmp_path / "run", meter=_meter(300))
    assert made.kept == len(teacher.calls) == 300


def _meter(requests: int) -> Meter:
    price = {"prompt": 1e6 / 20, "response": 0.0}
    prices = {"date": "2026-11-01", "currency": "USD", "models": {"scripted": price}}
    return Meter(Prices.model_validate(prices), budget=float(requests))


def test_datasets_never_holds_so_many_batches_that_it_keeps_their_results() -> None:
    assert row_module._PLACES < config.MAX_NUM_RUNNING_ASYNC_MAP_FUNCTIONS_IN_PARALLEL


def test_a_limit_asks_the_first_queries_only(recipe: Recipe, tmp_path: Path) -> None:
    teacher = Scripted()
    generate(recipe, teacher=teacher, out=tmp_path / "run", settings=GenerateSettings(limit=2))
    assert sorted(teacher.calls) == ["a poppy, colour red", "a rose, colour red"]


def test_an_output_folder_that_cannot_be_written_costs_nothing(
    recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    teacher = Scripted()
    with pytest.raises(OutputError, match="Can't write to"):
        generate(recipe, teacher=teacher, out=tmp_path / "file" / "run")
    assert teacher.calls == []


def _damage_rows(answers: Path) -> None:
    file = answers / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no data file": lambda answers: (answers / "data-00000-of-00001.arrow").unlink(),
    "an empty data file": lambda answers: (answers / "data-00000-of-00001.arrow").write_bytes(b""),
    "a torn data file": _damage_rows,
    "an empty summary": lambda answers: (answers / "generation.json").write_text(""),
    "a torn summary": lambda answers: (answers / "generation.json").write_text('{"kept": 20'),
    "a summary of another kind": lambda answers: (answers / "generation.json").write_text("[]"),
    "a summary without its counts": lambda answers: (answers / "generation.json").write_text("{}"),
    "an unreadable state": lambda answers: (answers / "state.json").write_text("null"),
    "no description": lambda answers: (answers / "dataset_info.json").unlink(),
    "no recipe": lambda answers: shutil.rmtree(answers / "recipe"),
    "no answers": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_answers_that_are_damaged_are_written_anew_and_nobody_is_asked(
    damage: str, recipe_folder: Path, tmp_path: Path
) -> None:
    first = generate(recipe_folder, teacher=Echo(), out=tmp_path / "run")
    rows = first.rows[:]
    DAMAGES[damage](tmp_path / "run/answers")
    with pytest.raises(DatasetError, match="is damaged|has no answers"):
        publish(tmp_path / "run")
    teacher = Echo()
    again = generate(recipe_folder, teacher=teacher, out=tmp_path / "run")
    assert teacher.calls == 0
    assert (again.kept, again.rejected) == (first.kept, first.rejected)
    assert again.rows[:] == rows
    assert publish(tmp_path / "run").splits


def test_a_folder_that_another_process_writes_is_left_alone(
    recipe_folder: Path, tmp_path: Path
) -> None:
    teacher = Echo()
    with (
        one_writer(tmp_path / "run", "run"),
        pytest.raises(OutputError, match="Another process is at work in"),
    ):
        generate(recipe_folder, teacher=teacher, out=tmp_path / "run")
    assert teacher.calls == 0
    assert not (tmp_path / "run/answers").exists()


def test_queries_outside_a_release_are_asked_only_when_it_is_trusted(
    recipe_folder: Path, tmp_path: Path
) -> None:
    letters = tmp_path / "letters.jsonl"
    (recipe_folder / "queries.jsonl").rename(letters)
    edit(recipe_folder, "recipe.yaml", "file: queries.jsonl", f"path: '{letters}'")
    release = tmp_path / "release"
    release.mkdir()
    recipe_folder.rename(release / "recipe")
    (release / "manifest.json").write_text("{}")
    source, teacher = release / "recipe", Echo()
    with pytest.raises(RecipeError, match=f"{letters}.*--trust"):
        generate(source, teacher=teacher, out=tmp_path / "run")
    assert teacher.calls == 0
    settings = GenerateSettings(trust=True, ledger=False)
    assert generate(source, teacher=teacher, out=tmp_path / "run", settings=settings).kept == 4

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from distill_datasets.errors import AccessError, PriceError
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.dry_run import SampledRow, Span, dry_run, scaled, total
from distill_datasets.generation.pricing import Prices
from distill_datasets.generation.run import generate
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.generation.shards import Share
from distill_datasets.models.sampler import Echo, Reply, Sample, Sampling, Usage
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.releases.release import publish
from distill_datasets.schema import Message
from distill_datasets.statistics import rows_needed
from tests.conftest import edit
from tests.integration.releases.test_release import snapshot

PRICES = Prices(
    date="2026-11-01",
    currency="USD",
    models={
        "wordy": {"prompt": 2, "cached": 1, "response": 10},
        "echo": {"prompt": 1, "response": 1},
    },
)


class _Prompt:
    def __init__(self, length: int) -> None:
        self.length = length


class _Renderer:
    """Counts words, and three tokens for the chat format."""

    def build_generation_prompt(
        self, messages: Sequence[Message], *, tools: str | None = None
    ) -> _Prompt:
        texts = [*(message["content"] for message in messages), tools or ""]
        return _Prompt(3 + sum(len(text.split()) for text in texts))


class _Connection:
    renderer = _Renderer()
    renderer_name = "words"


@dataclass
class Wordy:
    """Answers each query with as many tokens as it has words, and says what its prompt had."""

    model: str = "wordy"
    connection: _Connection | None = None
    failing: dict[str, Exception] = field(default_factory=dict)
    cost: float | None = None
    calls: list[str] = field(default_factory=list)

    @property
    def identity(self) -> str:
        return f"{self.model}/1"

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        query = messages[-1]["content"]
        self.calls.append(query)
        await asyncio.sleep(0.001)
        if query in self.failing:
            raise self.failing[query]
        tokens = _Renderer().build_generation_prompt(messages).length
        words = len(query.split())
        sample = Sample(f"so it is: {query}", "stop", words)
        return Reply((sample,) * sampling.n, Usage(tokens, tokens // 2, cost=self.cost))


@pytest.fixture
def recipe(recipe_folder: Path) -> Recipe:
    """Fifty queries of one to five words."""
    rows = [{"query": " ".join(["colour", *["red"] * (n % 5)]) + f" {n}"} for n in range(50)]
    (recipe_folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    edit(recipe_folder, "recipe.yaml", ", group: family, reference: colour", "")
    return load_recipe(recipe_folder)


def really(recipe: Recipe, teacher: Wordy, out: Path) -> dict[str, int]:
    generate(recipe, teacher=teacher, out=out)
    tokens = json.loads((out / "answers/generation.json").read_text())["tokens"]
    return {kind: int(count) for kind, count in tokens.items()}


def inside(span: Span, value: float) -> bool:
    return span.low <= value <= span.high


def test_a_dry_run_asks_nobody_and_writes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    teacher, out = Wordy(connection=_Connection()), tmp_path / "run"
    found = dry_run(recipe, teacher=teacher, out=out, prices=PRICES)
    assert teacher.calls == []
    assert not out.exists()
    assert (found.queries, found.requests, found.known) == (50, 50, 0)


def test_prompts_are_counted_as_the_server_will_count_them(recipe: Recipe, tmp_path: Path) -> None:
    teacher = Wordy(connection=_Connection())
    (load,) = dry_run(recipe, teacher=teacher, prices=PRICES).loads
    tokens = really(recipe, teacher, tmp_path / "run")
    assert load.prompt == Span.exactly(tokens["prompt"])
    assert load.source == "counted"
    assert load.response == Span(50, None, 50 * 512)
    assert load.cost is not None and load.cost.expected is None
    assert load.cost.low == pytest.approx((tokens["prompt"] * 1 + 50 * 10) / 1e6)
    assert load.cost.high == pytest.approx((tokens["prompt"] * 2 + 50 * 512 * 10) / 1e6)


def test_without_a_tokenizer_prompts_are_guessed_and_that_is_said(recipe: Recipe) -> None:
    found = dry_run(recipe, teacher=Wordy(), prices=PRICES)
    (load,) = found.loads
    assert load.source == "guessed from bytes"
    assert load.prompt.low < (load.prompt.expected or 0) < load.prompt.high
    assert any("taken for four bytes" in note for note in found.notes)
    assert found.seconds is None
    assert any("the time is unknown" in note for note in found.notes)


def test_rows_that_are_really_asked_tell_what_the_others_will_take(
    recipe: Recipe, tmp_path: Path
) -> None:
    found = dry_run(recipe, teacher=Wordy(), prices=PRICES, sample=20)
    (load,) = found.loads
    tokens = really(recipe, Wordy(), tmp_path / "run")
    assert inside(load.prompt, tokens["prompt"])
    assert inside(load.response, tokens["response"])
    assert load.response.expected == pytest.approx(tokens["response"], rel=0.2)
    paid = (2 * tokens["prompt"] - tokens["cached"] + 10 * tokens["response"]) / 1e6
    assert load.cost is not None and inside(load.cost, paid)
    assert load.cost.expected == pytest.approx(paid, rel=0.2)
    assert found.seconds is not None and found.seconds > 0
    assert len(found.sampled) == 20
    assert found.sampled[0].text == f"so it is: {found.sampled[0].query}"
    written = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert inside(Span(found.disk.low / 2, None, found.disk.high * 4), written)


def test_what_is_asked_with_an_out_folder_is_not_paid_for_again(
    recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    first = dry_run(recipe, teacher=Wordy(), out=out, prices=PRICES, sample=5)
    assert (first.known, first.sample_kept) == (5, True)
    assert first.sample_cost is not None and first.sample_cost > 0
    assert [path.name for path in out.iterdir()] == ["journal.sqlite"]
    teacher = Wordy()
    again = dry_run(recipe, teacher=teacher, out=out, prices=PRICES, sample=5)
    assert teacher.calls == []
    assert again.sample_cost == 0
    assert [one.query for one in again.sampled] == [one.query for one in first.sampled]
    assert again.loads[0].response == first.loads[0].response
    generate(recipe, teacher=teacher, out=out)
    assert len(teacher.calls) == 45


def test_without_an_out_folder_the_sample_is_shown_with_its_cost_and_kept_nowhere(
    recipe: Recipe, tmp_path: Path
) -> None:
    before = snapshot(tmp_path)
    found = dry_run(recipe, teacher=Wordy(), prices=PRICES, sample=3)
    assert snapshot(tmp_path) == before
    assert (found.known, found.sample_kept, found.loads[0].requests) == (0, False, 50)
    assert "not kept" in found.text()


def test_answers_in_the_journal_and_equal_queries_cost_nothing(
    recipe_folder: Path, recipe: Recipe, tmp_path: Path
) -> None:
    generate(recipe, teacher=Wordy(), out=tmp_path / "run", settings=GenerateSettings(limit=30))
    with (recipe_folder / "queries.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"query": "colour 45"}))
    before = (tmp_path / "run/journal.sqlite").read_bytes()
    found = dry_run(load_recipe(recipe_folder), teacher=Wordy(), out=tmp_path / "run")
    assert (found.requests, found.known, found.loads[0].requests) == (51, 31, 20)
    assert (tmp_path / "run/journal.sqlite").read_bytes() == before


def test_a_run_with_nothing_left_costs_nothing(recipe: Recipe, tmp_path: Path) -> None:
    generate(recipe, teacher=Wordy(), out=tmp_path / "run")
    found = dry_run(recipe, teacher=Wordy(), out=tmp_path / "run", prices=PRICES, sample=2)
    assert (found.loads, found.known, found.seconds) == ((), 50, None)
    assert "0 to ask" in found.text()


def test_answers_that_come_with_a_release_cost_nothing(recipe: Recipe, tmp_path: Path) -> None:
    generate(recipe, teacher=Echo(), out=tmp_path / "run")
    release = publish(tmp_path / "run")
    assert dry_run(release.path, teacher=Echo()).known == 50
    assert dry_run(release.path, teacher=Echo(), settings=GenerateSettings(ledger=False)).known == 0


def test_a_limit_and_a_share_are_those_of_the_run(recipe: Recipe, tmp_path: Path) -> None:
    parts = [
        dry_run(recipe, teacher=Wordy(), settings=GenerateSettings(limit=40), share=Share(n, 2))
        for n in (1, 2)
    ]
    assert sum(part.requests for part in parts) == 40
    share = Share(1, 2)
    generate(recipe, teacher=Wordy(), out=tmp_path / "run", share=share)
    again = dry_run(recipe, teacher=Wordy(), out=tmp_path / "run", share=share)
    assert again.known == again.requests > 0


def test_what_the_test_split_can_decide_is_said_and_no_more_of_it_is_asked(
    recipe: Recipe, tmp_path: Path
) -> None:
    shares = {"train": 0.4, "validation": 0.1, "test": 0.5}
    wide = recipe.replace(margin=0.4, split=shares)
    needed = rows_needed(0.4, 0.05)
    assert needed is not None and needed < 10
    every = generate(wide, teacher=Wordy(), out=tmp_path / "all").rows
    tested = every["split"].count("test")
    found = dry_run(wide, teacher=Wordy())
    assert f"evidence  {tested} test rows; where teacher" in found.text()
    assert len(found.evidence) == 5
    settings = GenerateSettings(for_evidence=True)
    few = dry_run(wide, teacher=Wordy(), settings=settings)
    assert few.queries == 50 - tested + needed
    some = generate(wide, teacher=Wordy(), out=tmp_path / "some", settings=settings).rows
    assert some["split"].count("test") == needed
    assert some["split"].count("train") == every["split"].count("train")
    # The same folder without it goes on, and asks the others alone.
    teacher = Wordy()
    again = generate(wide, teacher=teacher, out=tmp_path / "some").rows
    assert len(again) == 50 and len(teacher.calls) == tested - needed


def test_a_model_without_a_price_is_refused_before_anything_is_asked(recipe: Recipe) -> None:
    teacher = Wordy(model="other")
    with pytest.raises(PriceError, match="'other'"):
        dry_run(recipe, teacher=teacher, prices=PRICES, sample=5)
    assert teacher.calls == []


def test_a_row_that_fails_is_shown_and_others_still_tell(recipe: Recipe) -> None:
    asked = dry_run(recipe, teacher=Wordy(), sample=4).sampled
    failing = {asked[1].query: TimeoutError("too slow")}
    found = dry_run(recipe, teacher=Wordy(failing=failing), prices=PRICES, sample=4)
    assert found.sampled[1].problem == "TimeoutError: too slow"
    assert any("1 of 4 sampled rows failed" in note for note in found.notes)
    assert found.loads[0].response.expected is not None


def test_a_refused_key_ends_the_rehearsal(recipe: Recipe) -> None:
    teacher = Wordy(failing={row.query: AccessError("no") for row in _all(recipe)})
    with pytest.raises(AccessError):
        dry_run(recipe, teacher=teacher, sample=2)


def _all(recipe: Recipe) -> Sequence[SampledRow]:
    return dry_run(recipe, teacher=Wordy(), sample=50).sampled


def test_what_a_provider_states_stands_in_for_prices(recipe: Recipe) -> None:
    found = dry_run(recipe, teacher=Wordy(cost=0.01), sample=4)
    assert found.cost is not None and found.cost.expected == pytest.approx(0.5)
    assert (found.sample_cost, found.currency) == (0.04, "USD")
    without = dry_run(recipe, teacher=Wordy(), sample=4)
    assert (without.cost, without.currency) == (None, None)
    assert "no price" in without.text()


def test_several_samples_of_a_query_are_all_reckoned_with(recipe: Recipe) -> None:
    one = dry_run(recipe, teacher=Wordy(connection=_Connection())).loads[0]
    three = dry_run(
        recipe.replace(sampling={"n": 3}), teacher=Wordy(connection=_Connection())
    ).loads[0]
    assert three.response.high == 3 * one.response.high
    assert three.prompt == one.prompt


def test_every_teacher_has_a_line_of_its_own_and_the_judge_one_once_it_was_asked(
    recipe_folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {name: Wordy(model=name) for name in ("openai:a", "openai:b", "openai:j")}
    monkeypatch.setattr(
        "distill_datasets.models.references.open_sampler", lambda name, **_: models[name]
    )
    (recipe_folder / "judge.md").write_text("How good is {{ text }}?")
    edit(
        recipe_folder,
        "recipe.yaml",
        "teacher: pocket\n",
        "teachers: [{model: openai:a}, {model: openai:b}]\n"
        "choose: best\n"
        "judge: {model: openai:j, prompt: judge.md, pattern: 'red (?P<score>\\d+)',"
        " scale: [0, 99]}\n",
    )
    several = load_recipe(recipe_folder)
    planned = dry_run(several)
    assert [(load.model, load.requests) for load in planned.loads] == [
        ("openai:a", 50),
        ("openai:b", 50),
    ]
    assert any("the judge" in note for note in planned.notes)
    asked = dry_run(several, sample=6)
    *_, judge = asked.loads
    assert judge.model == "openai:j"
    assert judge.requests == pytest.approx(50, abs=50) and judge.requests > 0
    assert judge.source == "as in the 6 rows asked"


def test_the_text_is_a_table(recipe: Recipe) -> None:
    found = dry_run(recipe, teacher=Wordy(), prices=PRICES, sample=2)
    lines = found.text().splitlines()
    assert lines[0].startswith("colours: 50 queries, 50 requests, 0 of them answered already")
    assert "cost (USD)" in lines[2] and lines[3].startswith("wordy")
    assert any("at the prices of 2026-11-01" in line for line in lines)
    assert found.cost == found.loads[0].cost


def test_a_forecast_from_some_holds_for_all() -> None:
    sizes = [10 + (7 * n) % 90 for n in range(1_000)]
    amounts = [0.25 * size + (n % 11) for n, size in enumerate(sizes)]
    some = [(sizes[n], amounts[n]) for n in range(0, 1_000, 37)]
    span = scaled([(float(size), amount) for size, amount in some], sum(sizes), len(sizes))
    assert inside(span, sum(amounts))
    assert span.high - span.low < 0.5 * sum(amounts)
    assert total([span, Span(1, None, 2)]).expected is None


def test_nothing_but_the_queries_decides_which_rows_are_sampled(
    recipe: Recipe, tmp_path: Path
) -> None:
    teacher = Wordy()
    dry_run(recipe, teacher=teacher, out=tmp_path / "run", sample=6)
    with Journal(tmp_path / "run/journal.sqlite") as journal:
        assert len(journal) == 6
    words = {len(query.split()) for query in teacher.calls}
    assert len(words) > 2  # the queries come in cycles of five

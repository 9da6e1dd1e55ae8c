import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from distill_datasets.errors import BudgetReached, PriceError
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.pricing import Meter, Price, Prices, open_meter
from distill_datasets.generation.run import Generated, generate
from distill_datasets.models.sampler import Echo, Reply, Sample, Sampling, Usage
from distill_datasets.releases.release import publish
from distill_datasets.schema import Message
from tests.conftest import edit

ASKED = Sampling(max_tokens=8_000)
FILE = """
date: 2026-11-01
currency: USD
models:
  openai:gpt-x: {prompt: 2.5, cached: 0.25, response: 10.0, batch: 0.5}
  tinker:Qwen/Qwen3-8B: {prefill: 0.13, sample: 0.4, train: 0.4}
"""


@pytest.fixture
def prices(tmp_path: Path) -> Prices:
    return load(tmp_path, FILE)


def load(folder: Path, text: str) -> Prices:
    (folder / "prices.yaml").write_text(text)
    return Prices.load(folder / "prices.yaml")


def reply(prompt: int, response: int, *, cached: int = 0, cost: float | None = None) -> Reply:
    return Reply((Sample("text", "stop", response),), Usage(prompt, cached, cost=cost))


@dataclass
class Priced:
    """Answers as slowly as it is told, for so many response tokens each."""

    tokens: Sequence[int]
    identity: str = "openai:gpt-x"
    calls: int = 0
    in_flight: int = 0
    most: int = 0

    @property
    def model(self) -> str:
        return self.identity

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        tokens = self.tokens[self.calls % len(self.tokens)]
        self.calls += 1
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        for _ in range(1 + tokens % 7):
            await asyncio.sleep(0)
        self.in_flight -= 1
        return reply(0, tokens)


@dataclass
class Bought:
    replies: int = 0
    refused: int = 0
    errors: list[Exception] = field(default_factory=list)


def buy(meter: Meter, samplers: Sequence[Priced], count: int) -> Bought:
    """Ask so many requests at once, in turn of these samplers."""
    bought = Bought()

    async def one(sampler: Priced) -> None:
        try:
            async with meter.room(sampler, [], ASKED):
                meter.count(sampler, await sampler.sample([], ASKED))
            bought.replies += 1
        except BudgetReached as error:
            bought.refused += 1
            bought.errors.append(error)

    async def all_of_them() -> None:
        await asyncio.gather(*(one(samplers[n % len(samplers)]) for n in range(count)))

    asyncio.run(all_of_them())
    return bought


def test_a_reply_costs_what_its_tokens_cost(prices: Prices) -> None:
    meter = Meter(prices)
    cost = meter.cost("openai:gpt-x", reply(1_000, 100, cached=600))
    assert cost == pytest.approx((400 * 2.5 + 600 * 0.25 + 100 * 10) / 1e6)
    assert meter.cost("openai:gpt-x", reply(1_000, 100, cached=600), batch=True) == cost / 2


def test_cached_tokens_without_a_price_of_their_own_cost_as_much_as_others() -> None:
    assert Price(prompt=2, response=0).of(1_000_000, 500_000, 0) == 2


def test_prefill_and_sample_are_other_names_for_prompt_and_response(prices: Prices) -> None:
    price = prices.of("tinker:Qwen/Qwen3-8B")
    assert (price.prompt, price.response, price.train) == (0.13, 0.4, 0.4)


def test_a_json_file_does_as_well(tmp_path: Path, prices: Prices) -> None:
    path = tmp_path / "prices.json"
    path.write_text(prices.model_dump_json())
    assert Prices.load(path) == prices


def test_an_identity_has_the_price_of_the_reference_it_begins_with(prices: Prices) -> None:
    assert prices.of("openai:gpt-x@example.org").response == 10
    assert prices.of("tinker:Qwen/Qwen3-8B/qwen3_instruct").response == 0.4
    with pytest.raises(PriceError, match="Did you mean 'tinker:Qwen/Qwen3-8B'"):
        prices.of("tinker:Qwen/Qwen3-8B-Base/qwen3")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("currency: USD\n", "", "the key 'currency' is missing"),
        ("date: 2026-11-01", "date: yesterday", "date: Input should be a valid date"),
        ("cached:", "cashed:", "unknown key 'models.openai:gpt-x.cashed'. Did you mean 'cached'?"),
        ("models:", "model:", "unknown key 'model'. Did you mean 'models'?"),
        ("prompt: 2.5", "prompt: -1", "models.openai:gpt-x.prompt"),
        ("currency: USD", "currency: dollars", "currency: String should match"),
        (FILE, "- 1", "holds no keys"),
        (FILE, "{", "can't be read"),
        ("date: 2026-11-01", "date: 2026-13-01", "can't be read: month must be in 1..12"),
    ],
)
def test_a_wrong_price_file_says_what_is_wrong(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert old in FILE
    with pytest.raises(PriceError) as error:
        load(tmp_path, FILE.replace(old, new))
    assert said in str(error.value) and "prices.yaml" in str(error.value)


def test_a_missing_price_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PriceError, match=r"none\.yaml"):
        Prices.load(tmp_path / "none.yaml")


def test_the_providers_own_statement_comes_before_the_price_file(prices: Prices) -> None:
    stated = reply(1_000, 100, cost=0.5)
    assert Meter(prices).cost("openai:gpt-x", stated) == 0.5
    euros = Meter(prices.model_copy(update={"currency": "EUR"}))
    assert euros.cost("openai:gpt-x", stated) == pytest.approx(0.0035)
    assert Meter(budget=1).cost("openai:any", stated) == 0.5


def test_without_a_price_nothing_is_invented(prices: Prices) -> None:
    with pytest.raises(PriceError, match="names no price for 'openai:other'"):
        Meter(prices).cost("openai:other", reply(1, 1))
    with pytest.raises(PriceError, match="doesn't state what it costs"):
        Meter(budget=1).cost("openai:other", reply(1, 1))


def test_a_model_without_a_price_is_refused_before_its_first_request(prices: Prices) -> None:
    sampler = Priced([10], identity="openai:other")
    with pytest.raises(PriceError):
        buy(Meter(prices), [sampler], 5)
    assert sampler.calls == 0


@pytest.mark.parametrize("count", [40, 2_000])
def test_a_budget_is_used_up_and_never_passed_when_requests_cost_alike(
    prices: Prices, count: int
) -> None:
    meter, sampler = Meter(prices, budget=0.3), Priced([1_000])  # a cent each
    bought = buy(meter, [sampler], count)
    assert bought.replies == 30
    assert bought.refused == count - 30
    assert meter.spent == pytest.approx(0.3)


def test_costs_that_vary_pass_the_budget_by_less_than_the_dearest_request(prices: Prices) -> None:
    tokens = [100 + 37 * (n * n % 101) for n in range(500)]
    meter, sampler = Meter(prices, budget=2.0), Priced(tokens)
    buy(meter, [sampler], 500)
    dearest = max(tokens) * 10 / 1e6
    assert 2.0 - dearest <= meter.spent <= 2.0 + dearest
    assert sampler.most > 20


def test_a_budget_that_is_not_near_lets_everything_go_at_once(prices: Prices) -> None:
    meter, sampler = Meter(prices, budget=100.0), Priced([6_000])
    buy(meter, [sampler], 200)
    assert sampler.most == 200


def test_two_models_share_a_budget(prices: Prices) -> None:
    cheap = Priced([1_000], identity="tinker:Qwen/Qwen3-8B")
    dear = Priced([1_000])
    meter = Meter(prices, budget=0.1)
    bought = buy(meter, [cheap, dear], 100)
    assert bought.replies == cheap.calls + dear.calls < 100
    assert 0.1 - 0.01 <= meter.spent <= 0.1 * (1 + 1e-9)


def test_a_request_that_fails_gives_its_room_back(prices: Prices) -> None:
    meter, sampler = Meter(prices, budget=0.02), Priced([1_000])

    async def failing() -> None:
        async with meter.room(sampler, [], ASKED):
            raise TimeoutError

    async def scene() -> None:
        for _ in range(5):
            with pytest.raises(TimeoutError):
                await failing()

    asyncio.run(scene())
    assert buy(meter, [sampler], 5).replies == 2


def test_a_batch_costs_its_share(prices: Prices) -> None:
    meter = Meter(prices)
    meter.count(Priced([]), reply(0, 1_000), batch=True)
    assert meter.spent == pytest.approx(0.005)


def test_a_budget_counts_what_earlier_runs_paid_and_a_ledger_did_not(
    prices: Prices, tmp_path: Path
) -> None:
    path = tmp_path / "journal.sqlite"
    with Journal(path) as journal:
        journal.put("a", "openai:gpt-x", reply(0, 1_000))
        journal.put("a", "openai:gpt-x", reply(0, 1_000))  # by two processes at once
        journal.put("b", "openai:gpt-x/else", reply(0, 2_000))
        journal.add([("c", "openai:gpt-x", reply(0, 9_000).to_json())])
    meter = open_meter(prices, budget=0.045, journal=path)
    assert meter is not None
    assert meter.spent == pytest.approx(0.04)
    sampler = Priced([500], identity="openai:gpt-x")
    assert buy(meter, [sampler], 3).replies == 0  # one has cost as much as a cent
    again = open_meter(prices, budget=0.06, journal=path)
    assert again is not None
    assert buy(again, [sampler], 9).replies == 3


def test_a_stop_says_what_is_spent_and_how_to_go_on(prices: Prices) -> None:
    errors = buy(Meter(prices, budget=0.015), [Priced([1_000])], 3).errors
    assert "budget of 0.015 USD" in str(errors[0]) and "0.01 USD are spent" in str(errors[0])
    assert "higher budget" in str(errors[0])


def test_nobody_who_wants_no_money_counted_needs_a_price_file(tmp_path: Path) -> None:
    assert open_meter(None, budget=None, journal=tmp_path / "none.sqlite") is None


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan")])
def test_a_budget_is_an_amount(prices: Prices, budget: float) -> None:
    with pytest.raises(PriceError, match="more than 0"):
        Meter(prices, budget=budget)


def test_the_journal_knows_what_a_provider_stated(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    with Journal(path) as journal:
        journal.put("a", "openai:z", reply(10, 10, cost=0.25))
    meter = open_meter(None, budget=1, journal=path)
    assert meter is not None and meter.spent == 0.25
    assert json.loads(reply(10, 10, cost=0.25).to_json())["usage"]["cost"] == 0.25


def priced_echo(folder: Path) -> Prices:
    return load(folder, "date: 2026-11-01\ncurrency: EUR\nmodels: {echo: {prompt: 1, response: 2}}")


def spent(journal: Path) -> float:
    with Journal(journal) as answers:
        return sum(times * cost_of(Reply.from_json(text)) for _, times, text, _ in answers.bought())


def cost_of(bought: Reply) -> float:
    return (bought.usage.prompt_tokens + 2 * bought.samples[0].tokens) / 1e6


def test_a_run_stops_at_its_budget_and_goes_on_with_a_higher_one(
    recipe_folder: Path, tmp_path: Path
) -> None:
    queries = (json.dumps({"query": f"{n}, colour red"}) for n in range(60))
    (recipe_folder / "queries.jsonl").write_text("\n".join(queries))
    edit(recipe_folder, "recipe.yaml", ", group: family, reference: colour", "")
    prices, journal = priced_echo(tmp_path), tmp_path / "run/journal.sqlite"

    def run(budget: float) -> tuple[int, Generated | None]:
        teacher = Echo()
        meter = open_meter(prices, budget=budget, journal=journal)
        try:
            made = generate(recipe_folder, teacher=teacher, out=tmp_path / "run", meter=meter)
        except BudgetReached:
            return teacher.calls, None
        return teacher.calls, made

    first, none = run(0.0005)
    assert none is None and not (tmp_path / "run/answers").exists()
    assert 0 < first < 60
    assert 0.0005 * 0.9 < spent(journal) <= 0.0005
    assert run(0.0005) == (0, None)
    rest, made = run(1.0)
    assert made is not None and made.errors == 0
    assert first + rest == 60
    summary = json.loads((tmp_path / "run/answers/generation.json").read_text())
    assert summary["cost"] == {
        "amount": pytest.approx(spent(journal)),
        "currency": "EUR",
        "priced_at": "2026-11-01",
    }


def test_a_release_and_its_card_say_what_its_answers_cost(
    recipe_folder: Path, tmp_path: Path
) -> None:
    meter = Meter(priced_echo(tmp_path))
    generate(recipe_folder, teacher=Echo(), out=tmp_path / "run", meter=meter)
    release = publish(tmp_path / "run")
    manifest = json.loads((release.path / "manifest.json").read_text())
    assert manifest["cost"]["amount"] == pytest.approx(meter.spent)
    card = (release.path / "README.md").read_text()
    assert f"At the prices of 2026-11-01 they cost {meter.spent:.4f} EUR." in card
    # From the release nothing is bought, and its answers are worth as much.
    again = Meter(priced_echo(tmp_path))
    made = generate(release.path, teacher=Echo(), out=tmp_path / "again", meter=again)
    assert again.spent == 0
    summary = json.loads((made.path / "answers/generation.json").read_text())
    assert summary["cost"] == manifest["cost"]


def test_a_run_without_prices_says_nothing_of_money(recipe_folder: Path, tmp_path: Path) -> None:
    generate(recipe_folder, teacher=Echo(), out=tmp_path / "run")
    assert "cost" not in json.loads((tmp_path / "run/answers/generation.json").read_text())
    assert "they cost" not in (publish(tmp_path / "run").path / "README.md").read_text()


def test_a_teacher_without_a_price_is_refused_before_anything_is_asked(
    recipe_folder: Path, tmp_path: Path, prices: Prices
) -> None:
    teacher = Echo()
    with pytest.raises(PriceError, match="'echo'"):
        generate(recipe_folder, teacher=teacher, out=tmp_path / "run", meter=Meter(prices))
    assert teacher.calls == 0


def test_answers_out_of_a_batch_stay_cheaper_in_the_next_run(
    tmp_path: Path, prices: Prices
) -> None:
    path = tmp_path / "journal.sqlite"
    with Journal(path) as journal:
        journal.put("a", "openai:gpt-x", reply(0, 1_000), batch=True)
        journal.put("b", "openai:gpt-x", reply(0, 1_000))
    meter = open_meter(prices, budget=None, journal=path)
    assert meter is not None and meter.spent == pytest.approx(0.015)


def test_requests_that_only_read_are_counted_before_they_are_sent_all_or_none(
    prices: Prices,
) -> None:
    meter, one = Meter(prices, budget=0.3), prices.of("openai:gpt-x").of(1_000, 0, 1)
    meter.read("openai:gpt-x/digest", [1_000] * 2)
    assert meter.spent == pytest.approx(2 * one)
    with pytest.raises(BudgetReached):
        meter.read("openai:gpt-x", [1_000] * 1_000)
    assert meter.spent == pytest.approx(2 * one)
    with pytest.raises(PriceError, match="no price for 'openai:other'"):
        meter.read("openai:other", [1])

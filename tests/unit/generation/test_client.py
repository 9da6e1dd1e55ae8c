import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.errors import (
    AccessError,
    BudgetReached,
    PendingError,
    RejectedError,
    RequestError,
    RetryableError,
    ServiceError,
)
from distill_datasets.generation import client as buying
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient, run_in_thread
from distill_datasets.generation.rate_limit import Limits
from distill_datasets.models.sampler import Reply, Sample, Sampler, Sampling, Usage
from distill_datasets.progress import Progress
from distill_datasets.schema import Message

SAMPLING = Sampling()


@dataclass
class Failing:
    """Fails on a text as often as it was told to, then answers."""

    failures: dict[str, list[Exception]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    model: str = "failing"
    identity: str = "failing"

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        text = messages[-1]["content"]
        self.calls.append(text)
        await asyncio.sleep(0)
        if self.failures.get(text):
            raise self.failures[text].pop(0)
        return Reply((Sample(text, "stop", 2),), Usage(3, 0))


def busy(retry_after: float | None = None, status: int = 500) -> RetryableError:
    error = RetryableError("too much to do", type="server error", status=status)
    error.retry_after = retry_after
    return error


def ask(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.sqlite") as journal:
        yield journal


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buying, "_FIRST_REST", 0.001)


def bought(journal: Journal, work: Callable[[CachedClient], Awaitable[Any]], **options: Any) -> Any:
    return run_in_thread(lambda: work(CachedClient(journal, Progress("test", 1), **options)))


def test_what_may_succeed_later_is_asked_until_it_does(journal: Journal) -> None:
    sampler = Failing({"a": [busy(), RetryableError("too slow", type="time-out"), busy(0.001)]})
    reply = bought(journal, lambda client: client.sample(sampler, ask("a"), SAMPLING))
    assert reply.samples[0].text == "a"
    assert sampler.calls == ["a"] * 4
    assert list(journal)[0][1] == 1


def test_after_eight_attempts_it_is_a_failure_that_the_next_run_asks_again(
    journal: Journal,
) -> None:
    sampler = Failing({"a": [busy() for _ in range(8)]})
    with pytest.raises(RetryableError, match="too much to do") as caught:
        bought(journal, lambda client: client.sample(sampler, ask("a"), SAMPLING))
    assert (caught.value.attempts, caught.value.status) == (8, 500)
    assert bought(journal, lambda client: client.sample(sampler, ask("a"), SAMPLING)).samples
    assert len(sampler.calls) == 9


@pytest.mark.parametrize(("seconds", "hours"), [(86_400.0, "24.0"), (3e11, "83,333,333.3")])
def test_nobody_waits_for_a_server_that_asks_for_a_day_or_for_ever(
    seconds: float, hours: str, journal: Journal
) -> None:
    sampler = Failing({"a": [busy(seconds, status=429)]})
    with pytest.raises(PendingError, match=rf"back in {hours} hours .*kept: run .* after 2"):
        bought(journal, lambda client: client.sample(sampler, ask("a"), SAMPLING))
    assert sampler.calls == ["a"]


def test_a_single_row_that_shall_wait_for_a_day_fails_while_others_are_answered(
    journal: Journal,
) -> None:
    sampler = Failing({"a": [busy(86400.0, status=429)]})

    async def work(client: CachedClient) -> list[Any]:
        asked = (client.sample(sampler, ask(text), SAMPLING) for text in "bac")
        return await asyncio.gather(*asked, return_exceptions=True)

    one, failed, other = bought(journal, work)
    assert isinstance(one, Reply) and isinstance(other, Reply)
    assert isinstance(failed, RetryableError) and failed.attempts == 1


def test_an_answer_that_cannot_be_read_is_asked_for_as_often_as_it_allows(journal: Journal) -> None:
    def unreadable() -> RetryableError:
        error = RetryableError("no choices", type="bad answer")
        error.most_attempts = 3
        return error

    sampler = Failing({"a": [unreadable() for _ in range(9)], "b": [unreadable()]})
    with pytest.raises(RetryableError, match="no choices") as caught:
        bought(journal, lambda client: client.sample(sampler, ask("a"), SAMPLING))
    assert caught.value.attempts == 3
    bought(journal, lambda client: client.sample(sampler, ask("b"), SAMPLING))
    assert sampler.calls == ["a"] * 3 + ["b"] * 2


def out_of_order(**options: Any) -> RetryableError:
    return RetryableError("refused", type="connection", **options)


@pytest.mark.parametrize("failure", [busy, out_of_order])
def test_tries_while_everybody_is_refused_are_no_attempts_of_one_row(
    journal: Journal, failure: Callable[[], RetryableError]
) -> None:
    class Broken(Failing):
        async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
            if len(self.calls) < 60:
                self.calls.append(messages[-1]["content"])
                raise failure()
            return await super().sample(messages, sampling)

    sampler, limits = Broken(), Limits(clock=_Hurried())

    async def work(client: CachedClient) -> list[Any]:
        asked = (client.sample(sampler, ask(str(row)), SAMPLING) for row in range(10))
        return await asyncio.gather(*asked)

    assert len(bought(journal, work, limits=limits)) == 10


class _Hurried:
    """A clock that is far ahead whenever it is looked at."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


def test_a_sampler_that_refuses_everybody_for_minutes_ends_the_run(journal: Journal) -> None:
    class Broken(Failing):
        async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
            raise busy(status=503)

    async def work(client: CachedClient) -> list[Any]:
        asked = (client.sample(Broken(), ask(str(row)), SAMPLING) for row in range(10))
        return await asyncio.gather(*asked, return_exceptions=True)

    found = bought(journal, work, limits=Limits(clock=_Hurried()))
    assert {type(one) for one in found} == {ServiceError}
    assert "has refused everything for 1" in str(found[0])


def test_the_server_says_how_long_to_rest_at_least() -> None:
    assert all(2.0 <= buying._rest(1, 2.0) <= 2.001 for _ in range(50))
    assert max(buying._rest(30, None) for _ in range(200)) <= buying._LONGEST_REST


def test_a_request_that_rests_holds_back_nobody(journal: Journal) -> None:
    sampler = Failing({"first": [busy(0.05)]})

    async def work(client: CachedClient) -> None:
        async def one(text: str) -> None:
            await client.places.acquire()
            await client.sample(sampler, ask(text), SAMPLING)
            client.places.release()

        await asyncio.gather(*(one(text) for text in ("first", "second", "third")))

    bought(journal, work, limits=Limits(1))
    assert sampler.calls == ["first", "second", "third", "first"]


def test_only_so_many_rest_beside_those_at_work(journal: Journal) -> None:
    texts = [f"row {number}" for number in range(30)]
    sampler = Failing({text: [busy(0.05)] for text in texts})

    async def work(client: CachedClient) -> None:
        async def one(text: str) -> None:
            await client.sample(sampler, ask(text), SAMPLING)
            client.places.release()

        tasks = []
        for text in texts:
            await client.places.acquire()
            assert len(tasks) - sum(task.done() for task in tasks) <= 1 + buying._RESTING
            tasks.append(asyncio.create_task(one(text)))
        await asyncio.gather(*tasks)

    bought(journal, work, limits=Limits(1))
    assert len(sampler.calls) == 60


def refused_and_answered(
    journal: Journal, sampler: Failing, texts: str, **options: Any
) -> list[Any]:
    async def work(client: CachedClient) -> list[Any]:
        asked = (client.sample(sampler, ask(text), SAMPLING) for text in texts)
        return await asyncio.gather(*asked, return_exceptions=True)

    found: list[Any] = bought(journal, work, **options)
    return found


@pytest.mark.parametrize("texts", ["ab", "ba"])
def test_what_is_rejected_among_answers_is_never_asked_again(journal: Journal, texts: str) -> None:
    refusal = RejectedError("against the policy", type="content policy", status=400)
    sampler = Failing({"a": [refusal]})
    refused_and_answered(journal, sampler, texts)
    with pytest.raises(RejectedError, match="against the policy") as caught:
        bought(journal, lambda client: client.sample(sampler, ask("a"), SAMPLING))
    known = (caught.value.type, caught.value.status, caught.value.attempts)
    assert known == ("content policy", 400, 1)
    assert sorted(sampler.calls) == ["a", "b"]
    assert len(journal) == 1


def test_what_a_sampler_rejects_that_answers_nobody_is_asked_again_by_the_next_run(
    journal: Journal,
) -> None:
    refusal = RejectedError("too long", type="context length", status=400)
    sampler = Failing({text: [refusal] for text in "abc"})
    found = refused_and_answered(journal, sampler, "abca")
    assert [type(one) for one in found] == [RejectedError] * 4
    assert sampler.calls == ["a", "b", "c"]
    found = refused_and_answered(journal, sampler, "abc")
    assert [type(one) for one in found] == [Reply] * 3


def test_what_was_rejected_for_good_is_asked_again_where_that_is_wanted(journal: Journal) -> None:
    refusal = RejectedError("too long", type="context length", status=400)
    sampler = Failing({"a": [refusal]})
    refused_and_answered(journal, sampler, "ab")
    (again,) = refused_and_answered(journal, sampler, "a", ask_rejected_again=True)
    assert isinstance(again, Reply)
    (known,) = refused_and_answered(journal, sampler, "a")
    assert isinstance(known, Reply)
    assert sorted(sampler.calls) == ["a", "a", "b"]


def test_what_cannot_be_stored_fails_and_takes_nothing_else_with_it(journal: Journal) -> None:
    found = refused_and_answered(journal, Failing(), ["one", "half of a \ud83d pair", "two"])  # type: ignore[arg-type]
    assert [type(one) for one in found] == [Reply, UnicodeEncodeError, Reply]
    assert len(journal) == 2


def test_equal_requests_share_a_rejection_too(journal: Journal) -> None:
    sampler = Failing({"a": [RejectedError("too long", type="context length", status=400)]})

    async def work(client: CachedClient) -> list[Any]:
        asked = (client.sample(sampler, ask("a"), SAMPLING) for _ in range(5))
        return await asyncio.gather(*asked, return_exceptions=True)

    assert [type(one) for one in bought(journal, work)] == [RejectedError] * 5
    assert sampler.calls == ["a"]


@pytest.mark.parametrize("error", [AccessError("no credit"), ValueError("a bug"), TimeoutError()])
def test_other_errors_are_not_asked_about_again(journal: Journal, error: Exception) -> None:
    sampler = Failing({"a": [error]})
    with pytest.raises(type(error)):
        bought(journal, lambda client: client.sample(sampler, ask("a"), SAMPLING))
    assert sampler.calls == ["a"]


def test_every_way_to_end_frees_the_place(journal: Journal) -> None:
    ends = [busy(), busy(status=429), RejectedError("no", type="bad request"), ValueError("bug")]
    sampler = Failing({str(number): [error] for number, error in enumerate(ends)})

    async def work(client: CachedClient) -> int:
        asked = (client.sample(sampler, ask(str(number)), SAMPLING) for number in range(5))
        await asyncio.gather(*asked, return_exceptions=True)
        return client.limits.of("failing").in_flight

    assert bought(journal, work, limits=Limits(2)) == 0


def test_after_a_stop_nothing_is_asked_and_what_is_in_flight_is_kept(journal: Journal) -> None:
    class Held(Failing):
        def __init__(self) -> None:
            super().__init__({"rests": [busy(30.0)]})
            self.go_on, self.held = asyncio.Event(), False

        async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
            if messages[-1]["content"] == "in flight":
                self.held = True
                await self.go_on.wait()
            return await super().sample(messages, sampling)

    async def work(client: CachedClient) -> list[Any]:
        sampler = Held()
        texts = ("rests", "in flight", "waits")
        asked = [
            asyncio.create_task(client.sample(sampler, ask(text), SAMPLING)) for text in texts[:2]
        ]
        while not (sampler.held and client._resting):
            await asyncio.sleep(0)
        asked.append(asyncio.create_task(client.sample(sampler, ask(texts[2]), SAMPLING)))
        await asyncio.sleep(0)
        client.stop()
        while not (asked[0].done() and asked[2].done()):
            await asyncio.sleep(0)
        sampler.go_on.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    began = time.monotonic()
    rested, flew, waited = bought(journal, work, limits=Limits(1))
    assert time.monotonic() - began < 20  # not the thirty seconds that one would have rested
    assert isinstance(rested, InterruptedError) and isinstance(waited, InterruptedError)
    assert isinstance(flew, Reply) and len(journal) == 1


@dataclass
class Purse:
    """Room for so many requests."""

    left: int
    currency: str = "USD"
    spent: float = 0.0

    @property
    def exhausted(self) -> bool:
        return self.left <= 0

    def room(self, *request: Any) -> Any:
        if self.exhausted:
            raise BudgetReached("all is spent")
        return nullcontext()

    def count(self, sampler: Sampler, reply: Reply) -> None:
        self.left -= 1
        self.spent += reply.usage.prompt_tokens


def test_a_meter_hears_of_everything_bought_and_ends_it(journal: Journal) -> None:
    sampler, purse = Failing({"a": [busy()]}), Purse(2)

    async def work(client: CachedClient) -> list[Any]:
        found = []
        for text in ("a", "a", "b", "c", "a"):
            try:
                found.append(await client.sample(sampler, ask(text), SAMPLING))
            except BudgetReached as error:
                found.append(error)
        return found

    found = bought(journal, work, meter=purse)
    assert [isinstance(one, Reply) for one in found] == [True, True, True, False, True]
    assert (purse.left, purse.spent) == (0, 6.0)
    assert sampler.calls == ["a", "a", "b"]


def test_an_answer_that_takes_many_times_as_long_as_nearly_all_others_is_asked_for_again(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass
    class Address:
        timeout: float = 600.0

    class Stuck(Failing):
        endpoint = Address()

        async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
            if messages[-1]["content"] == "stuck" and "stuck" not in self.calls:
                self.calls.append("stuck")
                await asyncio.Event().wait()
            return await super().sample(messages, sampling)

    async def work(client: CachedClient) -> list[Any]:
        texts = ["stuck", *map(str, range(2 * buying._REPLIES))]
        return await asyncio.gather(*(client.sample(sampler, ask(t), SAMPLING) for t in texts))

    monkeypatch.setattr(buying, "_LEAST_TIMEOUT", 0.02)
    sampler = Stuck()
    assert len(bought(journal, work)) == 1 + 2 * buying._REPLIES
    assert sampler.calls.count("stuck") == 2


def test_what_is_usual_is_reckoned_once_in_many_replies_however_many_there_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timeout, learned = buying._LearnedTimeout(), list[int]()
    monkeypatch.setattr(timeout, "_learn", lambda: learned.append(timeout._replies))

    async def reply() -> Reply:
        return Reply((), Usage(1, 0))

    async def work() -> None:
        for _ in range(1_000 + 2 * buying._REPLIES):
            await timeout.within(reply())

    asyncio.run(work())
    assert learned == [buying._REPLIES * (n + 1) for n in range(22)]


def test_a_coroutine_runs_apart_from_a_running_loop() -> None:
    async def outer() -> int:
        inner = asyncio.get_running_loop()

        async def work() -> int:
            assert asyncio.get_running_loop() is not inner
            return 7

        return run_in_thread(work)

    assert asyncio.run(outer()) == 7
    with pytest.raises(RequestError, match="as it is"):
        run_in_thread(lambda: _raise(RequestError("as it is", type="test")))


async def _raise(error: Exception) -> None:
    raise error

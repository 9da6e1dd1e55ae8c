import asyncio
from functools import cache

import pytest

from distill_datasets.errors import SettingsError
from distill_datasets.generation.rate_limit import Bucket, Limits, RateLimit, Ticket
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.models.sampler import Allowance
from tests.support.simulation import (
    AtOnce,
    HeavyTailed,
    OutOfOrder,
    PerSecond,
    Queueing,
    Unlimited,
    simulate,
)


def test_without_refusals_the_cap_is_reached_at_once() -> None:
    run = simulate(Limits(256), Unlimited(0.2), 2000)
    assert run.most_in_flight == 256
    assert run.starts[255] < 0.2
    assert run.seconds < 1.6 / 0.9  # eight round trips, as without any limit


def test_a_fast_server_is_not_slowed() -> None:
    assert (
        simulate(Limits(256), Unlimited(0.001), 5000, cost=0.00025).seconds < 5000 * 0.00025 * 1.15
    )


@pytest.mark.parametrize("seconds", [0.02, 0.2, 2.0])
@pytest.mark.parametrize("retry_after", [1.0, None])
def test_a_limit_of_requests_a_second_is_learned_and_used(
    seconds: float, retry_after: float | None
) -> None:
    run = simulate(Limits(256), PerSecond(100, seconds, retry_after), 4000)
    assert run.refused <= 0.05 * run.requests
    assert run.seconds - seconds <= 40 / 0.9


def test_a_limit_of_requests_a_minute_is_learned() -> None:
    run = simulate(Limits(256), PerSecond(500, period=60, retry_after=10.0), 3000)
    assert run.refused <= 0.1 * run.requests
    assert run.seconds <= (3000 - 500) / (500 / 60) / 0.8


def test_random_refusals_do_not_slow_anything_down() -> None:
    few = simulate(Limits(256), Unlimited(refused=0.05), 20_000)
    none = simulate(Limits(256), Unlimited(), 20_000)
    assert few.seconds < 1.25 * none.seconds  # a row that is refused twice waits for two seconds


def test_frequent_random_refusals_do_not_pin_anything_down() -> None:
    run = simulate(Limits(256), Unlimited(refused=0.3), 6000)
    assert run.limit.rate is None or run.limit.rate > 200
    assert run.limit.size > 50


def test_a_limit_of_requests_at_once_is_learned() -> None:
    run = simulate(Limits(256), AtOnce(50), 10_000)
    assert run.refused <= 0.05 * run.requests
    assert run.seconds <= 10_000 / 250 / 0.8
    assert 45 <= run.limit.size <= 60


def test_a_server_that_queues_is_recognised_and_loses_nothing() -> None:
    run = simulate(Limits(256), Queueing(20), 10_000)
    assert run.limit.size < 64
    assert run.seconds < 10_000 / 100 * 1.02


def test_answers_of_very_different_length_are_no_queue() -> None:
    run = simulate(Limits(256), HeavyTailed(2.0), 20_000)
    ideal = 20_000 * 2.1 / 256
    assert run.seconds - 20 < ideal * 1.1  # the longest one alone takes about twenty seconds


def test_a_limit_that_comes_later_is_learned_and_a_limit_that_goes_is_forgotten() -> None:
    class Changing(PerSecond):
        def ask(self, now: float):  # type: ignore[no-untyped-def]  # noqa: ANN202
            self.limit = 50 if 20 < now < 60 else 100_000
            return super().ask(now)

    run = simulate(Limits(64), Changing(), 40_000)
    during = sum(25 < start < 60 for start in run.starts)
    after = sum(80 < start < 90 for start in run.starts)
    assert 0.8 * 35 * 50 < during < 1.1 * 35 * 50
    assert after > 0.9 * 10 * 64 / 0.2


def test_the_users_requests_a_minute_are_kept() -> None:
    run = simulate(Limits(256, requests_per_minute=600), Unlimited(), 300)
    assert 29 < run.seconds < 31
    for start in run.starts:
        assert sum(start <= other < start + 1 for other in run.starts) <= 20


class Clock:
    """A time that tests set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def limit_at(clock: Clock, concurrency: int = 256, **limits: float) -> RateLimit:
    return Limits(concurrency, clock=clock, **limits).of("it")  # type: ignore[arg-type]


def test_refusals_of_what_was_under_way_make_no_pause_longer() -> None:
    clock = Clock()
    limit = limit_at(clock)
    tickets = [limit.start() for _ in range(100)]
    for ticket in tickets:
        clock.now = 0.2 + ticket.number / 1000
        limit.refuse(ticket, 1.0)
    assert limit.paused
    assert limit.wait() == pytest.approx(1.0)


def test_refusals_in_any_order_are_a_limit_too() -> None:
    clock = Clock()
    limit = limit_at(clock)
    tickets = [limit.start() for _ in range(16)]
    clock.now = 0.1
    for ticket in [*tickets[::2], *tickets[1::2][:3]]:  # never two neighbours, at first
        assert not limit.paused
        limit.refuse(ticket, 5.0)
    for ticket in tickets[7:10:2]:
        limit.refuse(ticket, 5.0)
    assert limit.paused
    assert limit.wait() == pytest.approx(5.0)


def test_a_few_refusals_in_a_row_hold_back_the_others_for_a_moment() -> None:
    clock = Clock()
    limit = limit_at(clock, 4096)
    tickets = [limit.start() for _ in range(3)]
    clock.now = 0.01
    for ticket in tickets:
        assert limit.wait() == 0
        limit.refuse(ticket)
    assert limit.wait() == pytest.approx(0.05)


def test_one_refusal_lowers_the_rate_once_a_round_trip() -> None:
    run = simulate(Limits(256), PerSecond(100, 0.2), 2000)
    limit, rate = run.limit, run.limit.rate
    assert rate is not None
    limit._open_round_trip(limit.clock())
    for ticket in [limit.start() for _ in range(6)][::2]:
        limit.refuse(ticket)
    assert limit.rate == pytest.approx(0.98 * rate)


@cache
def unlimited_seconds(concurrency: int, seconds: float, rows: int) -> float:
    """How long so many rows take where nothing is refused."""
    return simulate(Limits(concurrency), Unlimited(seconds), rows).seconds


@pytest.mark.parametrize("seconds", [0.05, 0.2, 3.0, 30.0])
@pytest.mark.parametrize("retry_after", [None, 1.0])
@pytest.mark.parametrize(
    ("begins", "ends"), [(0.0, 3.0), (0.0, 10.0), (0.0, 60.0), (2.0, 3.0), (5.0, 65.0)]
)
def test_after_a_server_was_out_of_order_all_goes_on_at_full_speed(
    seconds: float, retry_after: float | None, begins: float, ends: float
) -> None:
    most = 64 if seconds < 0.2 else 256  # for as many requests a second as where they take longer
    rows = max(1500, int(6 * most / seconds))  # longer than until it breaks
    whole = unlimited_seconds(most, seconds, rows)
    run = simulate(Limits(most), OutOfOrder(begins, ends, seconds, retry_after), rows)
    told = retry_after or 0.0  # a server that asks to wait is left alone for so long
    assert run.seconds <= whole + (ends - begins) + 5 * seconds + told
    in_between = [start for start in run.starts if begins + 0.3 < start < ends]
    assert len(in_between) <= 11 * (ends - begins) / max(1.0, told)


def test_a_server_that_breaks_again_and_again_is_asked_at_full_speed_in_between() -> None:
    class Flapping(Unlimited):
        def ask(self, now: float):  # type: ignore[no-untyped-def]  # noqa: ANN202
            return OutOfOrder(0.0, 4.0).ask(now % 30)

    run = simulate(Limits(64), Flapping(), 50_000)  # it breaks six times
    assert run.seconds < 50_000 / (64 / 0.2) * 30 / 26 * 1.1


def test_tokens_a_minute_are_reckoned_with_what_requests_turn_out_to_have() -> None:
    clock = Clock()
    limit, starts = limit_at(clock, tokens_per_minute=60_000), 0
    while clock.now < 60:
        seconds = limit.wait(100.0)
        assert seconds is not None
        if seconds > 0:
            clock.now += seconds
            continue
        limit.accept(limit.start(100.0), 400)  # four times what was reckoned
        starts += 1
    assert 60_000 * 0.95 < starts * 400 < 60_000 * 1.1


def test_headers_that_say_what_is_left_are_heeded() -> None:
    clock = Clock()
    limit = limit_at(clock, 8)
    ticket = limit.start()
    clock.now = 0.1
    limit.accept(ticket, allowance=Allowance(requests=2, requests_seconds=3.0))
    clock.now = 1.0
    for _ in range(2):
        assert limit.wait() == 0
        limit.start()
    assert limit.wait() == pytest.approx(2.1)
    clock.now = 3.2
    assert limit.wait() == 0  # nothing is known any more
    ticket = limit.start()
    clock.now = 3.3
    limit.accept(ticket, allowance=Allowance(requests=1000, requests_seconds=60.0))
    assert limit.wait() == 0


def test_headers_about_tokens_are_read_in_requests_of_the_usual_size() -> None:
    clock = Clock()
    limit = limit_at(clock, 64)
    clock.now = 0.5
    for _ in range(60):
        limit.accept(limit.start(), 1000)
    clock.now = 1.0
    allowance = Allowance(requests=500, requests_seconds=1.0, tokens=2500, tokens_seconds=4.0)
    limit.accept(limit.start(), 1000, allowance)
    limit.start()
    assert limit.wait() == 0
    limit.start()
    assert limit.wait() == pytest.approx(4.0)


def test_a_bucket_lets_through_what_it_holds_and_then_its_rate() -> None:
    bucket = Bucket(rate=10, seconds=0.2)
    for _ in range(2):
        assert bucket.wait(0.0) <= 0
        bucket.take(0.0)
    assert bucket.wait(0.0) == pytest.approx(0.1)
    assert bucket.wait(0.2, 5) <= 0  # more than it ever holds passes when it is full
    bucket.take(0.2, 5)
    assert bucket.wait(0.2, 1) == pytest.approx(0.4)


def test_places_are_given_in_order_and_never_more_than_the_cap() -> None:
    async def run() -> list[int]:
        limit, order, inside = Limits(2).of("it"), [], []

        async def one(number: int) -> None:
            ticket = await limit.enter()
            order.append(number)
            inside.append(limit.in_flight)
            await asyncio.sleep(0)
            limit.accept(ticket)

        await asyncio.gather(*(one(number) for number in range(20)))
        assert max(inside) == 2
        return order

    assert asyncio.run(run()) == list(range(20))


def test_whoever_is_cancelled_while_waiting_leaves_no_place_taken() -> None:
    async def run() -> None:
        limit = Limits(1).of("it")
        ticket = await limit.enter()
        waiting = [asyncio.create_task(limit.enter()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        limit.fail(ticket)
        waiting[1].cancel()  # its turn has just come
        assert isinstance(await waiting[2], Ticket)
        assert limit.in_flight == 1

    asyncio.run(run())


def test_who_waits_when_nothing_more_is_asked_hears_of_it() -> None:
    async def run() -> None:
        limit = Limits(1).of("model")
        await limit.enter()
        waiting = [asyncio.create_task(limit.enter()) for _ in range(2)]
        await asyncio.sleep(0)
        limit.close()
        for one in waiting:
            with pytest.raises(InterruptedError):
                await one

    asyncio.run(run())


def test_every_sampler_has_a_limit_of_its_own() -> None:
    limits = Limits(3, requests_per_minute=60)
    assert limits.of("a") is limits.of("a")
    assert limits.of("a") is not limits.of("b")
    assert limits.of("b").cap == 3


@pytest.mark.parametrize("limit", ["concurrency", "requests_per_minute", "tokens_per_minute"])
def test_a_limit_under_which_nothing_could_be_asked_is_refused(limit: str) -> None:
    with pytest.raises(SettingsError, match=rf"{limit} must be (at least|above) \d; found 0"):
        GenerateSettings(**{limit: 0})

import asyncio

import pytest

from distill_datasets.errors import SettingsError
from distill_datasets.generation.crowd import Crowd
from distill_datasets.generation.pace import Bucket, Pace
from distill_datasets.generation.rate_limit import Gate, Limit, Limits, Ticket
from distill_datasets.models.sampler import Allowance
from tests.support.simulation import (
    AtOnce,
    HeavyTailed,
    PerSecond,
    Queueing,
    Unlimited,
    simulate,
)


def test_without_refusals_the_cap_is_reached_at_once() -> None:
    limit = Limit(256)
    run = simulate(limit, Unlimited(0.2), 2000)
    assert run.most_in_flight == 256
    assert run.starts[255] < 0.2
    assert run.seconds < 1.6 / 0.9  # eight round trips, as without any limit


def test_a_fast_server_is_not_slowed() -> None:
    assert (
        simulate(Limit(256), Unlimited(0.001), 5000, cost=0.00025).seconds < 5000 * 0.00025 * 1.15
    )


@pytest.mark.parametrize("seconds", [0.02, 0.2, 2.0])
@pytest.mark.parametrize("retry_after", [1.0, None])
def test_a_limit_of_requests_a_second_is_learned_and_used(
    seconds: float, retry_after: float | None
) -> None:
    run = simulate(Limit(256), PerSecond(100, seconds, retry_after), 4000)
    assert run.refused <= 0.05 * run.requests
    assert run.seconds - seconds <= 40 / 0.9


def test_a_limit_of_requests_a_minute_is_learned() -> None:
    run = simulate(Limit(256), PerSecond(500, period=60, retry_after=10.0), 3000)
    assert run.refused <= 0.1 * run.requests
    assert run.seconds <= (3000 - 500) / (500 / 60) / 0.8


def test_refusals_of_what_was_under_way_make_no_pause_longer() -> None:
    pace = Pace()
    for _ in range(100):
        pace.start(0.0)
    for number in range(100):
        pace.refuse(number, 0.2 + number / 1000, 1.0)
    assert pace.wait(0.3) == pytest.approx(0.9 + 0.005)


def test_refusals_that_overtake_each_other_are_a_limit_too() -> None:
    pace = Pace()
    for _ in range(150):
        pace.start(0.0)
    for number in range(0, 150, 5):  # never two neighbours
        pace.refuse(number, 0.1, 1.0)
    assert pace.wait(0.1) > 0.9


def test_the_first_refusals_hold_back_what_would_follow() -> None:
    limit = Limit(256)
    tickets = [limit.start(now) for now in (0.0, 0.001, 0.002)]
    assert limit.wait(0.01) == 0
    limit.refuse(tickets[0], 0.01)
    assert limit.wait(0.01) == pytest.approx(0.05)


def test_a_varying_number_in_flight_is_no_limit_of_it() -> None:
    crowd = Crowd(256)
    crowd.refuse(20)
    assert crowd.size == pytest.approx(23)


def test_random_refusals_do_not_slow_anything_down() -> None:
    few = simulate(Limit(256), Unlimited(refused=0.05), 20_000)
    none = simulate(Limit(256), Unlimited(), 20_000)
    assert few.seconds < 1.25 * none.seconds  # a row that is refused twice waits for two seconds


def test_frequent_random_refusals_do_not_pin_anything_down() -> None:
    limit = Limit(256)
    simulate(limit, Unlimited(refused=0.3), 6000)
    assert limit.pace.rate is None or limit.pace.rate > 200
    assert limit.crowd.size > 50


def test_a_limit_of_requests_at_once_is_learned() -> None:
    limit = Limit(256)
    run = simulate(limit, AtOnce(50), 10_000)
    assert run.refused <= 0.05 * run.requests
    assert run.seconds <= 10_000 / 250 / 0.8
    assert 45 <= limit.crowd.size <= 60


def test_a_server_that_queues_is_recognised_and_loses_nothing() -> None:
    limit = Limit(256)
    run = simulate(limit, Queueing(20), 10_000)
    assert limit.crowd.size < 64
    assert run.seconds < 10_000 / 100 * 1.02


def test_answers_of_very_different_length_are_no_queue() -> None:
    run = simulate(Limit(256), HeavyTailed(2.0), 20_000)
    ideal = 20_000 * 2.1 / 256
    assert run.seconds - 20 < ideal * 1.1  # the longest one alone takes about twenty seconds


def test_a_limit_that_comes_later_is_learned_and_a_limit_that_goes_is_forgotten() -> None:
    class Changing(PerSecond):
        def ask(self, now: float):  # type: ignore[no-untyped-def]  # noqa: ANN202
            self.limit = 50 if 20 < now < 60 else 100_000
            return super().ask(now)

    run = simulate(Limit(64), Changing(), 40_000)
    during = sum(25 < start < 60 for start in run.starts)
    after = sum(80 < start < 90 for start in run.starts)
    assert 0.8 * 35 * 50 < during < 1.1 * 35 * 50
    assert after > 0.9 * 10 * 64 / 0.2


def test_the_users_requests_a_minute_are_kept() -> None:
    run = simulate(Limit(256, requests_per_minute=600), Unlimited(), 300)
    assert 29 < run.seconds < 31
    for start in run.starts:
        assert sum(start <= other < start + 1 for other in run.starts) <= 20


def test_tokens_a_minute_are_reckoned_with_what_requests_turn_out_to_have() -> None:
    limit = Limit(256, tokens_per_minute=60_000)
    now, starts = 0.0, 0
    while now < 60:
        seconds = limit.wait(now, 100.0)
        assert seconds is not None
        if seconds > 0:
            now += seconds
            continue
        limit.accept(limit.start(now, 100.0), now, tokens=400)  # four times what was reckoned
        starts += 1
    assert 60_000 * 0.95 < starts * 400 < 60_000 * 1.1


def test_headers_that_say_what_is_left_are_heeded() -> None:
    limit = Limit(8)
    limit.accept(limit.start(0.0), 0.1, allowance=Allowance(requests=2, requests_seconds=3.0))
    for _ in range(2):
        assert limit.wait(1.0) == 0
        limit.start(1.0)
    assert limit.wait(1.0) == pytest.approx(2.1)
    assert limit.wait(3.2) == 0  # nothing is known any more
    limit.accept(limit.start(3.2), 3.3, allowance=Allowance(requests=1000, requests_seconds=60.0))
    assert limit.wait(3.3) == 0


def test_headers_about_tokens_are_read_in_requests_of_the_usual_size() -> None:
    limit = Limit(64)
    for _ in range(60):
        limit.accept(limit.start(0.5), 0.5, tokens=1000)
    allowance = Allowance(requests=500, requests_seconds=1.0, tokens=2500, tokens_seconds=4.0)
    limit.accept(limit.start(1.0), 1.0, tokens=1000, allowance=allowance)
    limit.start(1.0)
    assert limit.wait(1.0) == 0
    limit.start(1.0)
    assert limit.wait(1.0) == pytest.approx(4.0)


def test_a_bucket_lets_through_what_it_holds_and_then_its_rate() -> None:
    bucket = Bucket(rate=10, burst=2, now=0.0)
    for _ in range(2):
        assert bucket.wait(1, 0.0) == 0
        bucket.take(1, 0.0)
    assert bucket.wait(1, 0.0) == pytest.approx(0.1)
    assert bucket.wait(5, 0.2) == 0  # more than it ever holds passes when it is full
    bucket.take(5, 0.2)
    assert bucket.wait(1, 0.2) == pytest.approx(0.4)


def test_a_gate_lets_through_in_order_and_never_more_than_the_cap() -> None:
    async def run() -> list[int]:
        gate, order, inside = Gate(Limit(2)), [], []

        async def one(number: int) -> None:
            ticket = await gate.enter()
            order.append(number)
            inside.append(gate.limit.in_flight)
            await asyncio.sleep(0)
            gate.accept(ticket, 1, None)

        await asyncio.gather(*(one(number) for number in range(20)))
        assert max(inside) == 2
        return order

    assert asyncio.run(run()) == list(range(20))


def test_whoever_is_cancelled_at_a_gate_leaves_no_place_taken() -> None:
    async def run() -> None:
        gate = Gate(Limit(1))
        ticket = await gate.enter()
        waiting = [asyncio.create_task(gate.enter()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        gate.fail(ticket)
        waiting[1].cancel()  # its turn has just come
        assert isinstance(await waiting[2], Ticket)
        assert gate.limit.in_flight == 1

    asyncio.run(run())


def test_a_closed_gate_sends_home_who_waits() -> None:
    async def run() -> None:
        limits = Limits(1)
        await limits.gate("model").enter()
        waiting = asyncio.create_task(limits.gate("model").enter())
        await asyncio.sleep(0)
        limits.close()
        with pytest.raises(InterruptedError):
            await waiting

    asyncio.run(run())


def test_every_sampler_has_a_limit_of_its_own() -> None:
    limits = Limits(3, requests_per_minute=60)
    assert limits.gate("a") is limits.gate("a")
    assert limits.gate("a") is not limits.gate("b")
    assert limits.gate("b").limit.crowd.cap == 3


@pytest.mark.parametrize("limit", ["concurrency", "requests_per_minute", "tokens_per_minute"])
def test_a_limit_under_which_nothing_could_be_asked_is_refused(limit: str) -> None:
    with pytest.raises(SettingsError, match=f"{limit} must be more than 0; found 0"):
        Limits(**{limit: 0})

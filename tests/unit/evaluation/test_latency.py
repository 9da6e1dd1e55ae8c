import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from distill_datasets.evaluation import latency
from distill_datasets.evaluation.latency import Requests, measure_latency, percentiles


class Clock:
    """A clock that a request moves by the seconds that it takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def system(self, seconds: Iterator[float], count: int = 21) -> Requests:
        async def request() -> Any:
            self.now += next(seconds)

        return [request] * count


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return clock


def test_every_row_of_quick_systems_is_timed_but_the_one_that_warms_up(clock: Clock) -> None:
    quick = clock.system(itertools.chain([5.0], itertools.repeat(0.01)))
    found = measure_latency({"quick": quick}, seconds=10.0)
    assert len(found["quick"]) == 20
    seen = percentiles(found["quick"])
    assert (seen["p50"], seen["p95"]) == (pytest.approx(10.0), pytest.approx(10.0))


def test_fewer_rows_are_timed_where_systems_are_slow(clock: Clock) -> None:
    systems = {name: clock.system(itertools.repeat(2.0)) for name in ("teacher", "student")}
    found = measure_latency(systems, seconds=10.0)
    # After the warm-up, which ends at 4 s; another round would end at 12 s.
    assert len(found["student"]) == 1
    assert clock.now == 8.0


def test_a_round_that_takes_all_the_time_is_the_measurement(clock: Clock) -> None:
    slow = clock.system(itertools.repeat(60.0))
    found = measure_latency({"slow": slow}, seconds=5.0)
    assert found["slow"] == [60_000.0]


def test_how_long_the_timing_will_take_counts_the_rounds_that_fit(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    systems = {name: clock.system(itertools.repeat(1.0)) for name in ("teacher", "student")}
    measure_latency(systems, seconds=10.0)
    assert "10/10 requests" in capsys.readouterr().err

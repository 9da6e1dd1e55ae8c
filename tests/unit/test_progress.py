import io
import json
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Event, main_thread
from types import SimpleNamespace
from typing import Any

import pytest

from distill_datasets import progress
from distill_datasets.errors import RecipeError
from distill_datasets.generation import client
from distill_datasets.generation.client import work_in_thread
from distill_datasets.progress import Interrupted, Progress, in_notebook, interruptible


@dataclass
class Purse:
    spent: float = 0.0
    currency: str = "USD"


class Clock:
    """A time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def as_json() -> Iterator[None]:
    progress.use("json")
    yield
    progress.use("line")


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_plain_lines_come_at_the_start_every_five_seconds_and_at_the_end(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("generate", 100, stream=stream) as shown:
        for _ in range(20):
            clock.now += 0.5
            shown.advance(5, tokens=10)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[1] == "generate: 50/100 rows  10.0 rows/s  100 tokens  5 s, 5 s left"
    assert lines[-1] == "generate: 100/100 rows  10.0 rows/s  200 tokens  10 s"


def test_slow_work_says_what_it_waits_for_and_then_how_long_one_takes(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("label", 12, unit="queries", stream=stream) as shown:
        clock.now += 30
        shown.advance(0, note="sampling 2 of 4")
        clock.now += 30
        shown.advance(4)
    first, waits, batch, _ = stream.getvalue().splitlines()
    assert first == "label: 0/12 queries  waiting for the first queries  0 s"
    assert waits == "label: 0/12 queries  waiting for the first queries  sampling 2 of 4  30 s"
    assert batch == "label: 4/12 queries  15.0 s a query  sampling 2 of 4  60 s, 120 s left"


def test_a_terminal_says_how_long_is_left_from_the_first_batch_on(clock: Clock) -> None:
    stream = Terminal()
    with Progress("label", 12, stream=stream) as shown:
        clock.now += 60
        shown.advance(4)
    assert "15.0 s a row" in stream.getvalue()
    assert "120 s left" in stream.getvalue()


@pytest.mark.usefixtures("as_json")
def test_json_lines_say_everything_once_a_second_at_most(clock: Clock) -> None:
    stream, purse = io.StringIO(), Purse()
    with Progress("generate", 100, meter=purse, stream=stream) as shown:
        for _ in range(8):
            clock.now += 0.25
            purse.spent += 0.5
            shown.advance(0, tokens=30)
            shown.advance(5, note="loss 1.5")
    first, *middle, last = lines_of(stream)
    assert (first["state"], first["done"], first["rate"], first["projected"]) == (
        "started",
        0,
        None,
        None,
    )
    assert [line["elapsed_seconds"] for line in middle] == [1.0, 2.0]
    assert last == {
        "title": "generate",
        "state": "finished",
        "done": 40,
        "total": 100,
        "unit": "rows",
        "rate": 20.0,
        "elapsed_seconds": 2.0,
        "eta_seconds": 3.0,
        "tokens": 240,
        "spent": 4.0,
        "projected": 10.0,
        "currency": "USD",
        "note": "loss 1.5",
    }


@pytest.mark.usefixtures("as_json")
def test_work_that_ends_with_an_error_says_that_it_stopped() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="no"), Progress("train", 3, stream=stream):
        raise ValueError("no")
    assert [line["state"] for line in lines_of(stream)] == ["started", "stopped"]


def test_units_done_before_count_as_done_but_not_for_the_rate(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("train", 100, unit="steps", start=80, stream=stream) as shown:
        clock.now += 10
        shown.advance(10)
        assert shown.state("running")["eta_seconds"] == 10
    assert "90/100 steps  1.0 steps/s" in stream.getvalue()


def test_rows_that_cost_nothing_do_not_lower_what_the_others_will_cost() -> None:
    purse = Purse(spent=3.0)
    with Progress("generate", 100, meter=purse, stream=io.StringIO()) as shown:
        shown.advance(60)  # from the journal
        assert shown.projected is None
        for _ in range(20):
            purse.spent += 0.05
            shown.advance(0, tokens=1)
            shown.advance(1)
        assert shown.projected == pytest.approx(3.0 + 40 * 0.05)
        shown.advance(20)
        assert shown.projected == purse.spent


def test_a_terminal_shows_what_is_spent_and_what_it_will_come_to(clock: Clock) -> None:
    stream, purse = Terminal(), Purse()
    with Progress("generate", 10, meter=purse, stream=stream) as shown:
        purse.spent = 0.0125
        shown.advance(0)
        clock.now += 1
        shown.advance(5)
    assert "0.0125 of about 0.0250 USD" in stream.getvalue()


def test_without_prices_nothing_is_said_about_money(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("generate", 10, stream=stream) as shown:
        clock.now += 6
        shown.advance(5)
    assert "USD" not in stream.getvalue()


class Cell:
    """What a notebook's output cell is told to show."""

    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []

    def display(self, data: dict[str, str], *, raw: bool, display_id: bool) -> "Cell":
        assert raw and display_id
        self.shown.append(data)
        return self

    def update(self, data: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.shown.append(data)


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Cell:
    cell = Cell()
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=cell.display))
    return cell


def test_a_notebook_shows_one_bar_that_is_updated(clock: Clock, cell: Cell) -> None:
    with Progress("<generate>", 10) as shown:
        clock.now += 1.0
        shown.advance(5)
    assert [re.findall(r'value="(\d+)" max="10"', one["text/html"]) for one in cell.shown] == [
        ["0"], ["0"], ["5"], ["5"],
    ]  # fmt: skip
    assert cell.shown[2]["text/plain"].startswith("<generate>: 5/10 rows")
    assert "<generate>" not in cell.shown[2]["text/html"]


def test_a_stream_that_is_named_is_written_to_in_a_notebook_too(cell: Cell) -> None:
    stream = io.StringIO()
    with Progress("generate", 10, stream=stream):
        pass
    assert stream.getvalue() and not cell.shown


def test_lines_of_json_stay_lines_in_a_notebook(
    as_json: None, cell: Cell, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("generate", 10):
        pass
    assert json.loads(capsys.readouterr().err.splitlines()[0])["title"] == "generate"
    assert not cell.shown


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


def test_a_kernel_is_a_notebook_and_a_shell_is_none(
    kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: object()))
    assert not in_notebook()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not in_notebook()


def test_elsewhere_an_interrupt_stays_what_it_is() -> None:
    @interruptible
    def verb() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        verb()
    assert type(caught.value) is KeyboardInterrupt


def test_a_stopped_cell_is_not_kept_by_requests_under_way(
    kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_PATIENCE", 0.01)
    stopped, released = Event(), Event()

    def work() -> None:
        # A real signal: what only sets a flag would not wake a thread that waits already.
        signal.pthread_kill(main_thread().ident or 0, signal.SIGINT)
        released.wait()

    with pytest.raises(KeyboardInterrupt):
        work_in_thread(work, stop=stopped.set)
    assert stopped.is_set()
    released.set()


def test_an_interrupted_verb_says_so_in_a_line_and_keeps_what_was_noted(kernel: None) -> None:
    @interruptible
    def verb() -> None:
        interrupt = KeyboardInterrupt()
        interrupt.add_note("2 batches are being worked on.")
        raise interrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        verb()
    assert isinstance(caught.value, Interrupted)
    assert caught.value.__suppress_context__
    first, note = caught.value._render_traceback_()
    assert "what was paid for is kept" in first
    assert note == "2 batches are being worked on."


def test_a_verb_keeps_its_name_its_result_and_its_errors() -> None:
    @interruptible
    def verb(number: int) -> int:
        """Half a number."""
        if number < 0:
            raise RecipeError("below nothing")
        return number // 2

    assert (verb.__name__, verb.__doc__, verb(4)) == ("verb", "Half a number.", 2)
    with pytest.raises(RecipeError):
        verb(-1)

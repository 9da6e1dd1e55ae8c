import sys
from _thread import interrupt_main
from threading import Event
from types import SimpleNamespace

import pytest

from distill_datasets.errors import RecipeError
from distill_datasets.generation import client
from distill_datasets.generation.client import work_in_thread
from distill_datasets.notebooks import Interrupted, in_notebook, interruptible


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
        interrupt_main()
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

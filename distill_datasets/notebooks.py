"""Notebooks: whether one is at work, and how a verb ends there when its cell is stopped."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Interrupted(KeyboardInterrupt):
    """The stop of a cell where a verb was at work: what was paid for is kept."""

    def _render_traceback_(self) -> list[str]:
        """What the notebook shows, without the lines of this package that were at work."""
        return [f"Interrupted: {self}", *getattr(self, "__notes__", ())]


def in_notebook() -> bool:
    """Whether a kernel runs this, which shows HTML."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None


@contextmanager
def without_bars() -> Iterator[None]:
    """Without the bars of `datasets`, which count batches and files, and would cut through ours."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def interruptible(verb: Callable[P, T]) -> Callable[P, T]:
    """A verb whose cell in a notebook has our bars alone, and one line where it is interrupted."""

    @wraps(verb)
    def called(*values: P.args, **named: P.kwargs) -> T:
        if not in_notebook():
            return verb(*values, **named)
        try:
            with without_bars():
                return verb(*values, **named)
        except KeyboardInterrupt as interrupt:
            ended = Interrupted("what was paid for is kept; run the same again to continue.")
            for note in getattr(interrupt, "__notes__", ()):
                ended.add_note(note)
            raise ended from None

    return called

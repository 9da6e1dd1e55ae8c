"""Shows long work: a live line on a terminal, a bar in a notebook, plain lines elsewhere.

Or lines of JSON, for programs. And how a verb ends in a notebook when its cell is stopped.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, Self, TextIO, TypeVar

from markupsafe import Markup

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

Style = Literal["line", "json"]
P = ParamSpec("P")
T = TypeVar("T")
_SECONDS = {"live": 0.1, "cell": 0.3, "plain": 5.0, "json": 1.0}  # between two looks at the state
_STYLE: list[Style] = ["line"]


def use(style: Style) -> None:
    """How everything that starts from now on is shown: for people, or as JSON lines."""
    _STYLE[0] = style


class Spending(Protocol):
    """What knows how much money is spent."""

    @property
    def spent(self) -> float:
        """So far."""
        ...

    @property
    def currency(self) -> str:
        """In three letters."""
        ...


class Progress:
    """Counts `unit`s up to `total`, with rate, tokens, money and the time left.

    On a terminal it is one live line, in a notebook a bar in the cell; elsewhere a plain line at
    the start, every five seconds, and at the end. With `use("json")` it is a line of JSON at the
    start, at most one a second, and one at the end. Safe to advance from another thread.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        unit: str = "rows",
        start: int = 0,
        meter: Spending | None = None,
        stream: TextIO | None = None,
    ) -> None:
        """Nothing is shown before `__enter__`; `stream` defaults to standard error.

        `start` of the `total` units were done before, and say nothing about the rate.
        """
        self.title, self.total, self.unit = title, total, unit
        self.done = self._start = start
        self.tokens = 0
        self._note = ""
        self._meter = meter
        self._spent_before = meter.spent if meter else 0.0
        self._paid_from: int | None = None
        self._stream = stream or sys.stderr
        self._style = "json" if _STYLE[0] == "json" else "plain"
        self._began = self._shown = time.monotonic()
        self._bar: tuple[Bar, TaskID] | None = None
        self._cell: Any = None

    def advance(self, count: int = 1, *, tokens: int = 0, note: str = "") -> None:
        """Report `count` more units done; `note` stays until the next one."""
        if self._paid_from is None and self._meter and self._meter.spent > self._spent_before:
            self._paid_from = self.done
        self.done += count
        self.tokens += tokens
        self._note = note or self._note
        if time.monotonic() - self._shown >= _SECONDS[self._style]:
            self._show("running")

    def __enter__(self) -> Self:
        """Start the clock."""
        self._began = time.monotonic()
        if self._style == "plain" and self._stream.isatty():
            self._style, self._bar = "live", self._start_bar()
        elif self._style == "plain" and self._stream is sys.stderr and in_notebook():
            from IPython.display import display

            self._style = "cell"
            self._cell = display(self._shown_in_cell(), raw=True, display_id=True)
        self._show("started")
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        """Leave the last state standing."""
        self._show("stopped" if kind else "finished")
        if self._bar is not None:
            self._bar[0].stop()

    @property
    def projected(self) -> float | None:
        """What the whole work will have cost if it goes on so; None while nobody can know.

        Rows that the journal answered come first and cost nothing: those since the first purchase
        say what the others will cost.
        """
        if self._meter is None:
            return None
        if self.done >= self.total:
            return self._meter.spent
        if self._paid_from is None or self.done == self._paid_from:
            return None
        a_unit = (self._meter.spent - self._spent_before) / (self.done - self._paid_from)
        return self._meter.spent + a_unit * (self.total - self.done)

    def state(self, state: str) -> dict[str, Any]:
        """What a line of JSON says; None stands for what is not known."""
        seconds = time.monotonic() - self._began
        new = self.done - self._start
        rate = new / seconds if new and seconds else None
        return {
            "title": self.title,
            "state": state,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "rate": rate,
            "elapsed_seconds": seconds,
            "eta_seconds": max(self.total - self.done, 0) / rate if rate else None,
            "tokens": self.tokens,
            "spent": self._meter.spent if self._meter else None,
            "projected": self.projected,
            "currency": self._meter.currency if self._meter else None,
            "note": self._note,
        }

    def _show(self, state: str) -> None:
        self._shown = time.monotonic()
        if self._bar is not None:
            bar, task = self._bar
            detail, left = self._detail(), self._left()
            bar.update(task, total=self.total, completed=self.done, detail=detail, left=left)
        elif self._cell is not None:
            self._cell.update(self._shown_in_cell(), raw=True)
        elif self._style == "json":
            found = self.state(state).items()
            rounded = {key: round(one, 6) if isinstance(one, float) else one for key, one in found}
            print(json.dumps(rounded, ensure_ascii=False), file=self._stream, flush=True)
        else:
            print(self._plain_line(), file=self._stream, flush=True)

    def _detail(self) -> str:
        parts = [self._speed(), f"{self.tokens:,} tokens" if self.tokens else ""]
        if self._meter is not None:
            whole = self.projected
            projected = f" of about {amount_text(whole)}" if whole is not None else ""
            parts.append(f"{amount_text(self._meter.spent)}{projected} {self._meter.currency}")
        return "  ".join(filter(None, [*parts, self._note]))

    def _speed(self) -> str:
        new, seconds = self.done - self._start, max(time.monotonic() - self._began, 1e-9)
        if not new and self.done < self.total:
            return f"waiting for the first {self.unit}"
        if 0 < new < seconds:
            one = re.sub("ie$", "y", self.unit.removesuffix("s"))
            return f"{seconds / new:,.1f} s a {one}"
        return f"{new / seconds:,.1f} {self.unit}/s"

    def _plain_line(self) -> str:
        clock = ", ".join(filter(None, [f"{time.monotonic() - self._began:.0f} s", self._left()]))
        return f"{self.title}: {self.done}/{self.total} {self.unit}  {self._detail()}  {clock}"

    def _left(self) -> str:
        seconds = self.state("")["eta_seconds"]
        return f"{seconds:.0f} s left" if seconds else ""

    def _shown_in_cell(self) -> dict[str, str]:
        """The state for a notebook: a bar, and the same as text for whatever shows no HTML."""
        bar = Markup('<progress value="{}" max="{}" style="width:14rem"></progress> {}')
        line = self._plain_line()
        return {"text/html": bar.format(self.done, max(self.total, 1), line), "text/plain": line}

    def _start_bar(self) -> "tuple[Bar, TaskID]":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        bar = Bar(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),  # rich's own is silent about the first batch
            console=Console(file=self._stream),
        )
        bar.start()
        task = bar.add_task(
            self.title, total=self.total, completed=self._start, detail=self._detail(), left=""
        )
        return bar, task


def amount_text(amount: float) -> str:
    """Money as people read it: cents, and more digits of less than one unit."""
    return f"{amount:,.2f}" if amount >= 1 or not amount else f"{amount:.4f}"


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

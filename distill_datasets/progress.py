"""Shows long work: a live line on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

_PLAIN_SECONDS = 5.0


class Progress:
    """Counts `unit`s up to `total`, with rate, tokens and the time left.

    On a terminal it is one live line; elsewhere a plain line at the start, every five seconds,
    and at the end. Safe to advance from another thread.
    """

    def __init__(
        self, title: str, total: int, *, unit: str = "rows", stream: TextIO | None = None
    ) -> None:
        """Nothing is shown before `__enter__`; `stream` defaults to standard error."""
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self.tokens = 0
        self._note = ""
        self._stream = stream or sys.stderr
        self._began = self._last_line = time.monotonic()
        self._bar: tuple[Bar, TaskID] | None = None

    def advance(self, count: int = 1, *, tokens: int = 0, note: str = "") -> None:
        """Report `count` more units done; `note` stays until the next one."""
        self.done += count
        self.tokens += tokens
        self._note = note or self._note
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, completed=self.done, detail=self._detail())
        elif time.monotonic() - self._last_line >= _PLAIN_SECONDS:
            self._print_line()

    def __enter__(self) -> Self:
        """Start the clock."""
        self._began = self._last_line = time.monotonic()
        if self._stream.isatty():
            self._bar = self._start_bar()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the last state standing."""
        if self._bar is not None:
            self._bar[0].stop()
        else:
            self._print_line()

    def _detail(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        parts = [f"{self.done / seconds:,.1f} {self.unit}/s"]
        if self.tokens:
            parts.append(f"{self.tokens:,} tokens")
        if self._note:
            parts.append(self._note)
        return "  ".join(parts)

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        seconds = self._last_line - self._began
        left = seconds / self.done * (self.total - self.done) if self.done else None
        clock = f"{seconds:.0f} s" + ("" if not left else f", {left:.0f} s left")
        line = f"{self.title}: {self.done}/{self.total} {self.unit}  {self._detail()}  {clock}"
        print(line, file=self._stream, flush=True)

    def _start_bar(self) -> "tuple[Bar, TaskID]":
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        bar = Bar(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
        )
        bar.start()
        return bar, bar.add_task(self.title, total=self.total, detail="")

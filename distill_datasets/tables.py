"""Tables for terminals and Markdown code blocks, as text."""

from collections.abc import Iterable, Sequence
from io import StringIO

_WIDEST = 1_000_000  # columns: nothing is wrapped
_CONTROLS = dict.fromkeys([*range(32), *range(127, 160)], " ")  # what could steer a terminal


def one_line(text: str, most: int) -> str:
    """A text on one line of at most so many characters; the end of a longer one is left out.

    >>> one_line("Be brief.\\n\\nBe kind.", 12)
    'Be brief. B…'
    """
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def aligned(rows: Iterable[Sequence[str]], *, right: bool = False) -> str:
    """Rows of cells in columns that are as wide as their widest cell.

    Cells stand at the left of their columns, or at the `right`. A character that terminals show
    in two columns takes two; no line ends with a space.

        >>> print(aligned([["system", "rows"], ["base", "8"]]))
        system  rows
        base    8
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    lines = list(rows)
    for _ in lines[0] if lines else ():
        table.add_column(justify="right" if right else "left", no_wrap=True)
    for line in lines:
        table.add_row(*(Text(" ".join(cell.translate(_CONTROLS).split())) for cell in line))
    console = Console(file=StringIO(), width=_WIDEST, color_system=None, force_jupyter=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())

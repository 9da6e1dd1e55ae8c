"""Tables, and numbers with their intervals: as text for terminals and Markdown, and as HTML.

The HTML is for notebooks and pages; all text in it is escaped, whoever wrote it.
"""

from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from typing import Any

from markupsafe import Markup, escape

_MOST_SHOWN = 400  # characters of a cell in HTML
_WIDEST = 1_000_000  # columns: nothing is wrapped
_CONTROLS = dict.fromkeys([*range(32), *range(127, 160)], " ")  # what could steer a terminal


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters; the end of a longer one is left out.

    >>> shortened("Be brief.", 5)
    'Be b…'
    """
    return text if len(text) <= most else text[: most - 1] + "…"


def one_line(text: str, most: int) -> str:
    """A text on one line of at most so many characters; the end of a longer one is left out.

    >>> one_line("Be brief.\\n\\nBe kind.", 12)
    'Be brief. B…'
    """
    return shortened(" ".join(text.split()), most)


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


def interval_text(number: Mapping[str, float], sign: str = "", *, digits: int = 3) -> str:
    """A number with its interval, where the rows can tell one; the `sign` "+" is for differences.

    >>> interval_text({"value": 0.9, "low": 0.85, "high": 0.94})
    '0.900 [0.850, 0.940]'
    """
    return f"{number['value']:{sign}.{digits}f}{ends_text(number, sign, digits=digits)}"


def ends_text(number: Mapping[str, float], sign: str = "", *, digits: int = 3) -> str:
    """The interval alone, with a space before it; empty where there is none."""
    ends = [f"{number[end]:{sign}.{digits}f}" for end in ("low", "high") if end in number]
    return f" [{', '.join(ends)}]" if ends else ""


def html_card(title: str, *parts: Any) -> str:
    """A titled box of paragraphs and drawings; text becomes a paragraph."""
    inside = Markup("").join(
        part if isinstance(part, Markup) else Markup("<p>{}</p>").format(part)
        for part in parts
        if part
    )
    return str(
        Markup('<div style="max-width:60rem"><p><strong>{}</strong></p>{}</div>').format(
            title, inside
        )
    )


def html_table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> Markup:
    """Rows of cells under a `head`; numbers stand at the right, long text is cut."""
    lines = [list(row) for row in rows]
    if not lines:
        return Markup("")
    top = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in head)
    heading = Markup("<thead><tr>{}</tr></thead>").format(top) if head else Markup("")
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(Markup("").join(map(_cell, line))) for line in lines
    )
    return Markup("<table>{}<tbody>{}</tbody></table>").format(heading, body)


def html_facts(values: Mapping[str, Any]) -> Markup:
    """A name and a value a line; what is not known is left out."""
    return html_table([name, value] for name, value in values.items() if value is not None)


def measured_text(value: Mapping[str, float] | None) -> str:
    """A number with its interval; nothing where it was not measured."""
    if not value or "value" not in value:
        return ""
    return interval_text(value)


def html_preformatted(text: str) -> Markup:
    """Text as it stands, in columns."""
    return Markup("<pre>{}</pre>").format(text)


def html_plot(drawing: Markup) -> Markup:
    """A drawing that is as wide as a column of a table should be."""
    return Markup('<div style="width:16rem">{}</div>').format(drawing)


def _cell(value: Any) -> Markup:
    if isinstance(value, Markup):
        return Markup("<td>{}</td>").format(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        said = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
        return Markup('<td style="text-align:right">{}</td>').format(said)
    text = "" if value is None else str(value)
    return Markup('<td style="text-align:left">{}</td>').format(
        escape(shortened(text, _MOST_SHOWN))
    )

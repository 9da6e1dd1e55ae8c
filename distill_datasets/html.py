"""HTML for notebooks: what a verb returns as a small table, a plot and a verdict.

All text is escaped, whoever wrote it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from distill_datasets.tables import interval_text, shortened

_MOST = 400  # characters of a cell


def card(title: str, *parts: Any) -> str:
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


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> Markup:
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


def facts(values: Mapping[str, Any]) -> Markup:
    """A name and a value a line; what is not known is left out."""
    return table([name, value] for name, value in values.items() if value is not None)


def measured(value: Mapping[str, float] | None) -> str:
    """A number with its interval; nothing where it was not measured."""
    if not value or "value" not in value:
        return ""
    return interval_text(value)


def preformatted(text: str) -> Markup:
    """Text as it stands, in columns."""
    return Markup("<pre>{}</pre>").format(text)


def plot(drawing: Markup) -> Markup:
    """A drawing that is as wide as a column of a table should be."""
    return Markup('<div style="width:16rem">{}</div>').format(drawing)


def _cell(value: Any) -> Markup:
    if isinstance(value, Markup):
        return Markup("<td>{}</td>").format(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        said = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
        return Markup('<td style="text-align:right">{}</td>').format(said)
    text = "" if value is None else str(value)
    return Markup('<td style="text-align:left">{}</td>').format(escape(shortened(text, _MOST)))

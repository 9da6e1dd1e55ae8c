"""Rows of chat datasets, in whatever form these have, as conversations."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from distill_datasets.conversations import read_messages
from distill_datasets.errors import DatasetError
from distill_datasets.schema import Message

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

PAIRS = (("query", "response"), ("prompt", "completion"))
WHOLE = ("messages", "conversations")


class Conversation(NamedTuple):
    """Messages that end with the response, and the tools that the model is given, as JSON text."""

    messages: list[Message]
    tools: str | None = None


RowReader = Callable[["pa.Table", int], Conversation]  # a row of `as_written` and its number


def as_written(rows: "Dataset") -> "Dataset":
    """The same rows as Arrow holds them: `datasets` makes 0.6000000000000001 of 0.6 in JSON."""
    return rows.with_format("arrow")


def conversation_reader(rows: "Dataset", where: str) -> RowReader:
    """How to turn a row of `as_written` into a conversation that ends with the response.

    Supported: `messages` or `conversations`; `query` and `response`; `prompt` and `completion`.
    Each is text or messages, messages may be JSON text; a column `tools` goes along. Raises
    `DatasetError` that lists the columns of `rows`; what it returns raises it for a row that holds
    something else.
    """
    parts = _parts(rows.column_names, where)
    names = [*parts, *(["tools"] if "tools" in rows.column_names else [])]
    features = {name: rows.features[name] for name in names}
    for column in parts:
        kind = str(getattr(features[column], "dtype", ""))
        if kind.startswith(("timestamp", "date", "time")):
            raise DatasetError(
                f"{where} can't be trained on: expected text in {column!r}; found dates, which "
                "`datasets` doesn't keep as they are written. Save the rows as Parquet with that "
                "column as text."
            )

    def read(table: "pa.Table", number: int) -> Conversation:
        column = "tools"
        try:
            (row,) = table.select(names).to_pylist()
            tools = tools_in(_present(row.get(column), features.get(column)))
            messages: list[Message] = []
            for column, role in parts.items():
                messages += turns_in(_present(row[column], features[column]), role)
        except (ValueError, RecursionError) as error:
            raise DatasetError(
                f"{where}, row {number}: {column!r}: {error}. Convert that column "
                "(`dataset.map`) or leave such rows out (`dataset.filter`)."
            ) from error
        return Conversation(messages, tools)

    return read


def _parts(columns: Sequence[str], where: str) -> dict[str, str]:
    """The columns that make a conversation, with the role of text in them, if any."""
    pair = next((pair for pair in PAIRS if {*pair} <= {*columns}), None)
    whole = next((name for name in WHOLE if name in columns), None)
    if whole == "messages" or (whole and pair is None):
        return {whole: ""}
    if pair is None:
        raise DatasetError(
            f"{where} can't be trained on: expected a column 'messages', or 'query' and "
            f"'response', or 'prompt' and 'completion'; found {sorted(columns)}. Rename the "
            "columns (`dataset.rename_columns`) or pick another configuration."
        )
    return dict(zip(pair, ("user", "assistant"), strict=True))


def _present(value: Any, feature: Any) -> Any:
    """A value without the keys that Arrow fills in with None, where a column has fixed keys; JSON
    as what it says.
    """
    if isinstance(value, str) and getattr(feature, "_type", None) == "Json":
        return json.loads(value)
    if isinstance(value, Mapping) and isinstance(feature, Mapping):
        return {k: _present(v, feature.get(k)) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_present(one, inner) for one in value]
    return value


def turns_in(value: Any, role: str) -> list[Message]:
    """The messages in a cell; text is one of this `role`, and JSON of messages without one."""
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    if role and not isinstance(value, list):
        raise ValueError(f"expected text or messages; found {value!r:.200}")
    return read_messages(value)


def tools_in(value: Any) -> str | None:
    """The tools in a cell as JSON text in OpenAI's form; None for none.

    They come as JSON text or as a list, whose items may be JSON text and lack the
    `{"type": "function"}` around them.
    """
    if isinstance(value, str):
        value = json.loads(value) if value.strip() else None
    if not value:
        return None
    found = [
        json.loads(one) if isinstance(one, str) else one
        for one in (value if isinstance(value, list) else [value])
    ]
    functions = [one.get("function", one) if isinstance(one, Mapping) else one for one in found]
    if not all(isinstance(one, Mapping) and isinstance(one.get("name"), str) for one in functions):
        raise ValueError(f"expected a list of tools, each with a name; found {value!r:.200}")
    tools = [{"type": "function", "function": one} for one in functions]
    return json.dumps(tools, ensure_ascii=False)

"""Examples of a recipe: queries with their responses, put before a query as turns."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from distill_datasets.conversations import assistant_message, read_messages, user_message
from distill_datasets.errors import RecipeError
from distill_datasets.recipes.query_files import TableFormat, read_rows
from distill_datasets.recipes.tools import check_names
from distill_datasets.schema import Message


def read_examples(path: Path, tools: str | None) -> list[list[Message]]:
    """The turns of each example in a file, in their order; responses may call the `tools`.

    Raises `RecipeError` that names the row.
    """
    if not path.is_file():
        raise RecipeError(f"The recipe names the examples {path.name!r}, which isn't there.")
    rows = chain.from_iterable(read_rows(path, TableFormat()))
    found = [_turns(row, f"{path}, row {place}", tools) for place, row in enumerate(rows, 1)]
    if not found:
        raise RecipeError(f"{str(path)!r} has no examples: write some, or leave out `examples`.")
    return found


def _answer(response: str, *, calls: bool) -> Message:
    try:
        return assistant_message(response, calls=calls)
    except ValueError as error:
        raise ValueError(f"its calls can't be read: {error}") from error


def _turns(row: dict[str, object], where: str, tools: str | None) -> list[Message]:
    query, response = row.get("query"), row.get("response")
    try:
        turns: Sequence[Message] = (
            read_messages(row["messages"]) if row.get("messages") else [user_message(str(query))]
        )
        if isinstance(response, str) and response.strip():
            turns = [*turns, _answer(response, calls=tools is not None)]
        if tools is not None:
            called = (call for one in turns for call in one.get("tool_calls", ()))
            check_names((call["function"]["name"] for call in called), tools)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}.") from error
    if turns[-1]["role"] != "assistant" or (not row.get("messages") and not query):
        raise RecipeError(
            f"{where}: expected a query (or messages) and its response, found {row!r:.200}."
        )
    return list(turns)

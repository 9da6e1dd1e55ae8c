"""Examples of a recipe: queries with their responses, put before a query as turns."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from distill_datasets.conversations import assistant_message, read_messages
from distill_datasets.errors import RecipeError
from distill_datasets.recipes.query_files import TableFormat, read_rows
from distill_datasets.schema import Message


def read_examples(path: Path, *, calls: bool) -> list[list[Message]]:
    """The turns of each example in a file, in their order; `calls` where responses call tools.

    Raises `RecipeError` that names the row.
    """
    if not path.is_file():
        raise RecipeError(f"The recipe names the examples {path.name!r}, which isn't there.")
    rows = chain.from_iterable(read_rows(path, TableFormat()))
    found = [_turns(row, f"{path}, row {place}", calls) for place, row in enumerate(rows, 1)]
    if not found:
        raise RecipeError(f"{str(path)!r} has no examples: write some, or leave out `examples`.")
    return found


def _turns(row: dict[str, object], where: str, calls: bool) -> list[Message]:
    query, response = row.get("query"), row.get("response")
    try:
        turns: Sequence[Message] = (
            read_messages(row["messages"])
            if row.get("messages")
            else [{"role": "user", "content": str(query)}]
        )
        if isinstance(response, str) and response.strip():
            turns = [*turns, assistant_message(response, calls=calls)]
    except ValueError as error:
        raise RecipeError(f"{where}: {error}.") from error
    if turns[-1]["role"] != "assistant" or (not row.get("messages") and not query):
        raise RecipeError(
            f"{where}: expected a query (or messages) and its response, found {row!r:.200}."
        )
    return list(turns)

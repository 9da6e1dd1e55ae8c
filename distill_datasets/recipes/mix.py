"""Rows of something else for the train split: read from their sources, and drawn by their hashes.

A row's query is the text of its conversation; one user's message alone stands as it is where the
recipe's own queries do.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from hashlib import sha256
from heapq import nsmallest
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from warnings import warn

from distill_datasets.conversations import (
    PAIRS,
    WHOLE,
    assistant_message,
    from_text,
    has_calls,
    is_blank,
    is_conversation_text,
    read_calls,
    read_messages,
    to_text,
    tools_in,
    turns_in,
    user_message,
    without_answer,
    write_calls,
)
from distill_datasets.errors import RecipeError
from distill_datasets.recipes.queries import query_id, read_source
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.recipes.sections import MixPart
from distill_datasets.recipes.user_files import Rows, without_nulls
from distill_datasets.schema import SOURCE, Message

if TYPE_CHECKING:
    from datasets import Dataset

_ALONE = (*WHOLE, "query", "prompt", "text")  # columns of what a model is to answer
_COLUMNS = ("id", "query", "group", "reference", "split", SOURCE, "tools", "response")


class MixRow(NamedTuple):
    """A query, its answer where there is one, and the tools that go with them, as JSON text."""

    query: str
    response: str | None
    tools: str | None


def draw_mix(recipe: Recipe, queries: "Dataset", own: int) -> "list[Dataset]":
    """The rows of each part of a recipe's mix, beside `own` rows of its train split.

    They have the columns of queries, and `source`, `tools` and `response`. Which are taken, and
    their order, follows from their hashes: more rows of a source move few. None has a query twice,
    or one of the recipe's `queries` or examples. Warns of a source with too few rows. Raises
    `RecipeError` that names the row which can't be read.
    """
    left = 1 - sum(part.share for part in recipe.mix)
    taken, found = {*_keys_of(recipe, queries)} if recipe.mix else set(), []
    for part in recipe.mix:
        wanted = max(round(own * part.share / left), 1) if own else 0
        # By hashes of their own, which say nothing about the splits of queries.
        rows = nsmallest(
            wanted,
            _new_rows(recipe, part, taken),
            key=lambda row: sha256(f"mix\n{row.query}".encode()).digest(),
        )
        taken |= {_key(mixed_messages(row.query)) for row in rows}
        if len(rows) < wanted:
            warn(
                f"The part {part.name!r} of the mix has {len(rows):,} rows that can be taken, all "
                f"of which are: its share of {part.share:g} would be {wanted:,}.",
                stacklevel=2,
            )
        found.append(_dataset(part, rows))
    return found


def mixed_messages(query: str) -> list[Message]:
    """The conversation of a mixed row's query."""
    return from_text(query) if is_conversation_text(query) else [user_message(query)]


def mixed_answer(query: str, response: str) -> Message:
    """A mixed row's response as a message, its calls numbered after those of its conversation."""
    return assistant_message(response, calls=has_calls(response), after=mixed_messages(query))


def carried_part(part: MixPart, file: str) -> MixPart:
    """A part whose rows are the lines of a file; see `carried_line`."""
    kept = {key: getattr(part, key) for key in ("name", "share", "model", "license")}
    return MixPart(**kept, file=file, messages="messages", origin=part.described)


def carried_line(part: MixPart, row: Mapping[str, Any]) -> dict[str, Any]:
    """A mixed row of answers as a line of a file, from which it is read as it was."""
    messages = mixed_messages(row["query"])
    if part.model is None:
        messages = [*messages, mixed_answer(row["query"], row["response"])]
    return {"messages": messages, **({"tools": row["tools"]} if row["tools"] else {})}


def _dataset(part: MixPart, rows: Sequence[MixRow]) -> "Dataset":
    from datasets import Dataset, Features, Value

    ids = [query_id(row.query) for row in rows]
    columns = {
        **{name: [None] * len(rows) for name in _COLUMNS},
        **{"id": ids, "group": ids, "split": ["train"] * len(rows)},
        SOURCE: [part.name] * len(rows),
        **{name: [getattr(row, name) for row in rows] for name in MixRow._fields},
    }
    return Dataset.from_dict(columns, Features(dict.fromkeys(_COLUMNS, Value("string"))))


def _keys_of(recipe: Recipe, queries: "Dataset") -> Iterator[int]:
    """The keys of the recipe's queries and examples, without the handles of several prompts."""
    own = queries.select_columns(["query"]).iter(batch_size=1_000)
    asked = (recipe.part(query) for batch in own for query in batch["query"])
    recipes = (recipe, *recipe.members.values())
    shown = ((one, query) for one in recipes for query in one.example_queries)
    for one, query in chain(asked, shown):
        yield _key(from_text(query) if one.holds_conversations else [user_message(query)])


def _key(messages: Sequence[Message]) -> int:
    return int(query_id(to_text(messages)), 16)


def _new_rows(recipe: Recipe, part: MixPart, taken: Collection[int]) -> Iterator[MixRow]:
    """The rows of a source, each query once, without those that are taken already.

    A row that can't be used is an error, but for one of somebody's dataset on the Hub, which is
    left out.
    """
    where, left_out, problem = f"The part {part.name!r} of the mix", Counter[str](), ""
    pieces, seen = _source(recipe, part, where), {*taken}
    first = next(pieces, None)
    if first is None:
        return
    columns = _columns(part, dict.fromkeys(name for row in first for name in row), where)
    for number, row in enumerate(chain(first, chain.from_iterable(pieces)), 1):
        try:
            messages, response, tools = _read(part, row, columns, left_out)
        except (ValueError, RecursionError) as error:
            if not part.hub:
                raise RecipeError(f"{where}, row {number}: {error}.") from error
            left_out["unusable"] += 1
            problem = problem or f"row {number}: {error}"
            continue
        if (key := _key(messages)) not in seen:
            seen.add(key)
            text = messages[0]["content"]
            whole = recipe.holds_conversations or is_conversation_text(text)
            alone = not whole and messages == [user_message(text)]
            yield MixRow(text if alone else to_text(messages), response, tools)
    if count := left_out["unusable"]:
        warn(f"{where}: {count:,} rows can't be used, such as {problem}.", stacklevel=2)
    if count := left_out["answers"]:
        warn(
            f"{where}: the answers at the end of {count:,} rows are left out, which "
            f"{part.model!r} writes anew.",
            stacklevel=2,
        )


def _read(
    part: MixPart, row: Mapping[str, Any], columns: Mapping[str, str], left_out: Counter[str]
) -> tuple[list[Message], str | None, str | None]:
    """A row's messages, its answer and its tools, as `MixRow` has them."""
    if not part.file or part.file.endswith(".parquet"):
        row = without_nulls(row)
    turns = [turns_in(row.get(name), role) for name, role in columns.items()]
    messages = read_messages([*chain.from_iterable(turns)])
    if part.model:
        asked, response, tools = without_answer(messages), None, None
        left_out["answers"] += len(asked) < len(messages)
    else:
        *asked, answer = messages
        response, tools = _response(answer), tools_in(row.get("tools"))
    if not asked or asked[-1]["role"] not in ("user", "tool"):
        found = asked[-1]["role"] if asked else "nothing"
        raise ValueError(f"expected a message of a user or a tool before the answer, found {found}")
    if asked[-1]["role"] == "user" and is_blank(asked[-1]["content"]):
        raise ValueError("the message to answer is empty")
    return asked, response, tools


def _source(recipe: Recipe, part: MixPart, where: str) -> Iterator[Rows]:
    place = recipe.folder / part.file if part.file else Path(part.path or ".").expanduser()
    if place.is_file() and not place.stat().st_size:
        return  # of a release none of whose queries is of the train split
    if not place.exists():
        raise RecipeError(
            f"{where} is in {str(place)!r}, which isn't there: write it, or change `mix` in "
            "recipe.yaml. A dataset on the Hub is named by `hub` and pinned by `revision`."
        )
    named = [name for name in (part.messages, part.query, part.response) if name]
    wanted = named if place.suffix.lower() in (".csv", ".tsv") else ()
    try:
        yield from read_source(part.source, recipe.folder, wanted)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _columns(part: MixPart, names: Collection[str], where: str) -> dict[str, str]:
    """The columns that make a conversation, with the role of text in them."""
    roles = {part.messages: "", part.query: "user", part.response: "assistant"}
    named = {name: role for name, role in roles.items() if name}
    alone = [(name,) for name in (_ALONE if part.model else WHOLE)]
    known = [*alone, *(() if part.model else PAIRS)]
    found = [*named] or next(([*one] for one in known if {*one} <= {*names}), [])
    if not found or not {*found} <= {*names}:
        needed = [*named] or [" and ".join(one) for one in known]
        raise RecipeError(
            f"{where} has no column {' or '.join(map(repr, needed))}; found {[*names]}. Name its "
            "columns: messages, or query and response, or query where a model answers."
        )
    if named:
        return named
    return dict(zip(found, ("" if found[0] in WHOLE else "user", "assistant"), strict=False))


def _response(answer: Message) -> str:
    """An answer's words and calls as one text."""
    if answer["role"] != "assistant":
        raise ValueError(
            f"expected an answer at the end, found a message of {answer['role']!r}; name a `model` "
            "to answer it"
        )
    calls, content = read_calls(answer.get("tool_calls")), answer["content"]
    if not calls and is_blank(content):
        raise ValueError("its answer is empty")
    return write_calls(content.strip(), calls) if calls else content

"""Reads a recipe's queries, wherever they are, into one table of text.

What their test split can decide about a student, and how many rows that takes, is told of it.
"""

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import file_digest, sha256
from itertools import chain, islice, zip_longest
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from warnings import warn

from distill_datasets.conversations import (
    below,
    calls_text,
    from_text,
    is_blank,
    read_calls,
    read_messages,
    to_text,
    without_answer,
)
from distill_datasets.errors import RecipeError, SettingsError, nearest
from distill_datasets.hub.references import fetch_dataset
from distill_datasets.recipes.loading import samples_among
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.recipes.sections import Queries, SplitShares
from distill_datasets.recipes.tools import check_names
from distill_datasets.recipes.user_files import (
    READERS,
    ROWS,
    Rows,
    TableFormat,
    as_text,
    class_names,
    is_conversation,
    named_classes,
    read_rows,
)
from distill_datasets.schema import Message
from distill_datasets.statistics import least_margin, rows_needed
from distill_datasets.tables import aligned

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


Columns = Mapping[str, list[str | None]]
_Writer = tuple[Callable[[Any], str], tuple[type, ...]]  # of values of these kinds as text
_NAMES = ("id", "query", "group", "reference", "split")
_NO_TEXTS = (bool, int, float, list, dict)  # that a reference may be in a file
_IN_MEMORY = 64 << 20  # bytes; tables that are larger are on disk, and mapped
GUESSES = (0.02, 0.05, 0.1)  # shares of the rows where only one of teacher and student is right
PLANNED = 0.05  # the one of them that rows are bought for
_MOST_SAMPLES = 10_000  # queries of a file that may still hold those of a sample
_KEYS = {"split": "forced_split"}  # where a role's column is named by another key


def load_queries(recipe: Recipe) -> "Dataset":
    """The recipe's rows in their order: `id`, `query`, `group`, `reference`, `split`.

    Text is as it is written; a reference that is no text is written as answers are. `id` is the
    digest of the query; a repeated query gets a numbered one, so that every row is kept. `group`
    is the query's own id where the recipe names no group column. Many rows are on disk, and
    mapped. Raises `RecipeError` that lists the columns found when one is missing, for a source
    that is absent, empty, not the pinned content or wrong in a line, and for conversations in a
    column of texts. Warns of messages that are left out since the teacher is to write them.
    """
    left_out = Counter[str]()
    rows = _tabulate(_read(recipe, left_out), recipe.split)
    own = recipe.queries.file == "queries.jsonl" and len(rows) <= _MOST_SAMPLES
    if own and (samples := samples_among(rows["query"], recipe.prompt)):
        warn(
            f"{len(samples)} of the {len(rows)} queries of {recipe.name!r} are the samples that "
            "`new` wrote for another prompt: put your own in their place.",
            stacklevel=2,
        )
    what = "every message of an assistant" if recipe.turns == "all" else "the last answer"
    notes = {
        "examples": f"{left_out['examples']:,} queries are examples of the prompt, and left out of "
        "the rows.",
        "tools": "The conversations have a column of tools, and the teacher is given none: put the "
        "tools that all of them may call into a file, and name it as `tools`.",
        "messages": f"{left_out['messages']:,} messages are left out of "
        f"{left_out['conversations']:,} of the {len(rows):,} conversations of recipe "
        f"{recipe.name!r}: {what}, which the teacher writes anew.",
    }
    for kind, note in notes.items():
        if left_out[kind]:
            warn(note, stacklevel=2)
    return rows


def require_splits(recipe: Recipe, queries: "Dataset", needed: Sequence[str]) -> None:
    """Raise `RecipeError` where one of the splits that are needed has no query."""
    import pyarrow.compute as pc

    counted = pc.value_counts(queries.with_format("arrow")[:]["split"]).to_pylist()
    found = {one["values"]: one["counts"] for one in counted}
    if recipe.split.same_rows:
        found["test"] = found.get("train", 0) + found.get("test", 0)
    if missing := [split for split in needed if not found.get(split)]:
        groups = len(set(queries["group"]))
        raise RecipeError(
            f"The split {missing[0]!r} has no row: the {len(queries)} queries are of {groups} "
            f"groups, each in one split, and give {found}. Add queries of other groups, change "
            "the shares in `split:`, or say `split: {same_rows: true}` for a first try."
        )


def read_columns(recipe: Recipe) -> dict[str, list[str | None]]:
    """What the source says: `query`, `group`, `reference`, `split`; None where it says nothing."""
    found: dict[str, list[str | None]] = {}
    for columns in _read(recipe, Counter()):
        for name, values in columns.items():
            found.setdefault(name, []).extend(values)
    return found


def holds_more(recipe: Recipe) -> bool:
    """Whether the queries' files in the recipe's folder hold what the recipe doesn't use: columns,
    or parts of conversations.
    """
    spec = recipe.queries
    if not spec.file:
        return False
    columns = _all_columns(recipe)
    unused = {*columns} - {*spec.columns(columns).values()}
    if unused or not spec.messages:
        return bool(unused)
    used_of = partial(_conversation, every_turn=recipe.turns == "all", left_out=Counter())
    given = (row[spec.messages] for row in chain.from_iterable(_pieces(recipe)))
    return any(value and from_text(used_of(value)) != value for value in given)


def write_used_columns(recipe: Recipe, path: Path) -> dict[str, str]:
    """Write the queries as lines of JSON that have the columns which the recipe uses.

    Returns what the section `queries` says of such a file, but for its name.
    """
    spec = recipe.queries
    names = {"group": spec.group, "reference": spec.reference, "split": spec.forced_split}
    named = {role: name for role, name in names.items() if name is not None}
    named["query"] = spec.messages or spec.query or "query"
    with path.open("w", encoding="utf-8") as file:
        for columns in _read(recipe, Counter()):
            for row in zip(*(columns[role] for role in named), strict=True):
                cells: dict[str, Any] = dict(zip(named.values(), row, strict=True))
                if spec.messages and (text := cells[spec.messages]):
                    cells[spec.messages] = from_text(text)
                file.write(json.dumps(cells, ensure_ascii=False) + "\n")
    keys = {**_KEYS, "query": "messages" if spec.messages else "query"}
    return {keys.get(role, role): name for role, name in named.items()}


def _read(recipe: Recipe, left_out: Counter[str]) -> Iterator[Columns]:
    """The columns of the source, a few rows at a time; counts what is left out of them."""
    for handle, member in recipe.members.items():
        before = 0
        for columns in _read(member, left_out):
            yield _behind(handle, member, columns, before)
            before += len(columns["query"])
    if recipe.members:
        return
    spec = recipe.queries
    pieces = _pieces(recipe)
    first = next(pieces, None)
    if first is None:
        raise RecipeError(f"The queries of recipe {recipe.name!r} are empty: nothing to ask.")
    names = spec.columns(first[0])
    _check_columns(recipe, names, first[0])
    left_out["tools"] += bool(spec.messages and first[0].get("tools") and not recipe.tools)
    writers: dict[str, _Writer] = {"reference": (recipe.teacher_reader.write, _NO_TEXTS)}
    if (tools := recipe.tools_text) is not None:
        writers["reference"] = partial(_calls, tools=tools), (str, *_NO_TEXTS)
    if spec.messages:
        every = recipe.turns == "all"
        conversation = partial(_conversation, every_turn=every, left_out=left_out)
        writers["query"] = conversation, (str, *_NO_TEXTS)
    number = 0
    for rows in chain([first], pieces):
        columns = {
            role: _texts(rows, name, role, number, writers.get(role))
            for role, name in names.items()
        }
        number += len(rows)
        yield _without(recipe.example_queries, columns, left_out)


def _without(shown: Collection[str], columns: Columns, left_out: Counter[str]) -> Columns:
    """Rows that are no examples: a student that is tested on what the prompt shows learns it."""
    if not shown:
        return columns
    kept = [place for place, query in enumerate(columns["query"]) if query not in shown]
    left_out["examples"] += len(columns["query"]) - len(kept)
    return {role: [texts[place] for place in kept] for role, texts in columns.items()}


def _behind(handle: str, member: Recipe, columns: Columns, before: int) -> Columns:
    """Rows of one of several recipes: its handle is their system message, its splits stay.

    `before` rows of it have come already.
    """
    found: dict[str, list[str | None]] = {**columns, "query": [], "group": [], "split": []}
    rows = zip(columns["query"], columns["group"], columns["split"], strict=True)
    for number, (query, group, split) in enumerate(rows, before + 1):
        if query is None or is_blank(query):
            raise RecipeError(f"Query {number} of {member.name!r} is empty: remove it or fill it.")
        own = group or query_id(query)
        turns = below(handle, (), member.conversation(query))
        found["query"].append(to_text(turns))
        found["group"].append(f"{handle} {own}")
        found["split"].append(split or member.split.of(own))
    return found


def query_id(query: str) -> str:
    """The `id` of a row whose query no other row has."""
    return sha256(query.encode()).hexdigest()[:16]


def _texts(
    rows: Rows, name: str | None, role: str, before: int, writer: _Writer | None
) -> list[str | None]:
    """The values of a column as text; `before` rows have come already."""
    write, kinds = writer or (str, ())
    if name is None:
        return [None] * len(rows)
    found = []
    for number, row in enumerate(rows, before + 1):
        value = row.get(name)
        if role == "query" and not kinds and is_conversation(value):
            raise RecipeError(
                f"Query {number} is a conversation: expected a text column as `queries.query`, "
                f"found conversations in {name!r}. Name that column as `queries.messages`."
            )
        if isinstance(value, kinds) and value != "" and value == value:
            try:
                value = write(value)
            except (ValueError, RecursionError) as error:
                raise RecipeError(f"{role.capitalize()} {number}: {error}.") from error
        found.append(as_text(value, place=f"Query {number}", role=role))
    return found


def _calls(value: Any, *, tools: str) -> str:
    """The calls that are right, as answers are written."""
    try:
        calls = read_calls(value)
    except ValueError as error:
        raise ValueError(
            f'expected a list of calls, [{{"name": …, "arguments": {{…}}}}] or [] for none, found '
            f"{value!r:.200} ({error})"
        ) from error
    check_names((call.name for call in calls), tools)
    return calls_text(calls)


def _conversation(value: Any, *, every_turn: bool, left_out: Counter[str]) -> str:
    """A conversation to answer, without what the teacher is to say: the answer at its end, or
    those of `every_turn`.
    """
    given = read_messages(value, texts=True)
    _check_results(given)
    messages = without_answer(given)
    if every_turn:
        messages = [one for one in messages if one["role"] != "assistant"]
        if any(one["role"] == "tool" for one in messages):
            raise ValueError(
                "a tool's message answers a call that the teacher may not make where it answers "
                "every turn; leave out 'turns: all', or the row"
            )
    if not messages or messages[-1]["role"] == "system":
        raise ValueError("expected a message of a user or a tool at the end, found none")
    if any(is_blank(one["content"]) for one in messages[-1:] if one["role"] == "user"):
        raise ValueError("its last message is empty")
    if len(messages) < len(given):
        left_out.update(conversations=1, messages=len(given) - len(messages))
    return to_text(messages)


def _check_results(messages: Sequence[Message]) -> None:
    """Raise `ValueError` for a tool's message that answers no call: servers refuse it."""
    called = False
    for message in messages:
        called = called or bool(message.get("tool_calls"))
        if message["role"] == "tool" and not called:
            raise ValueError(
                "expected a call of the assistant before a tool's message, found "
                f"{message['content']!r:.80} without one; add `tool_calls` to the message before "
                "it, or leave the row out"
            )


def _pieces(recipe: Recipe) -> Iterator[Rows]:
    """The source's rows with those of the sidecar, or only those that the recipe names."""
    spec = recipe.queries
    rows = read_source(spec, recipe.folder)
    if spec.sidecar:
        others = _file_rows(spec, recipe.folder / spec.sidecar, by_place=True)
        rows = _joined(rows, others, spec.sidecar)
    if spec.rows is not None:
        numbered, wanted = enumerate(chain.from_iterable(rows), 1), {*spec.rows}
        found = {number: row for number, row in numbered if number in wanted}
        if missing := sorted(wanted - {*found}):
            raise RecipeError(f"The recipe names rows {missing}, which its queries don't have.")
        rows = iter([[found[number] for number in spec.rows]] if spec.rows else [])
    return rows


def _joined(rows: Iterator[Rows], others: Iterator[Rows], name: str) -> Iterator[Rows]:
    pairs: Iterator[Any] = zip_longest(chain.from_iterable(rows), chain.from_iterable(others))
    before = 0
    while some := list(islice(pairs, ROWS)):
        if any(None in pair for pair in some):
            both = zip(*some, *pairs, strict=True)
            mine, theirs = (before + sum(row is not None for row in side) for side in both)
            raise RecipeError(
                f"The sidecar {name!r} has {theirs} rows and the queries {mine}; they are joined "
                "by position and must match."
            )
        before += len(some)
        yield [{**row, **other} for row, other in some]


def _file(spec: Queries, home: Path) -> Path | None:
    if spec.file:
        return home / spec.file
    if spec.package and spec.member:
        return _in_package(spec.package, spec.member)
    return None


def read_source(spec: Queries, home: Path, wanted: Collection[str] | None = None) -> Iterator[Rows]:
    """The rows of a source as they are, some at a time; `home` is the recipe's folder.

    `wanted` are the columns that a file must have, where they are not those of queries. Raises
    `RecipeError` for what isn't there or can't be read.
    """
    if path := _file(spec, home):
        return _file_rows(spec, path, spec.sha256, wanted)
    if spec.hub:
        folder = fetch_dataset(f"{spec.hub}@{spec.revision}", spec.config).path
    else:
        # By name `datasets` would take whatever version of a Hub dataset it finds.
        folder = Path(spec.path or "").expanduser()
        if not folder.exists():
            raise RecipeError(
                f"There is no folder {spec.path!r}, which the recipe names as `queries.path`. A "
                "dataset on the Hub is named by `queries.hub` and pinned by `queries.revision`."
            )
        if folder.is_file():
            return _file_rows(spec, folder, spec.sha256, wanted)
    return _dataset_rows(spec, folder, wanted)


def _dataset_rows(spec: Queries, folder: Path, wanted: Collection[str] | None) -> Iterator[Rows]:
    """The rows of a folder that `datasets` knows how to read; files of text are read as text."""
    from datasets import Dataset, load_dataset, load_dataset_builder
    from datasets.exceptions import DatasetsError

    split = spec.split or "train"
    try:
        builder = load_dataset_builder(str(folder), spec.config)
        known = builder.config.data_files or {}
        parts = [name.strip() for name in split.split("+")]
        files = [Path(path) for part in parts for path in known.get(part, [])]
        if files and all(path.suffix.lower() in READERS for path in files):
            labels = class_names(builder.info.features or {})
            pieces = chain.from_iterable(_file_rows(spec, path, wanted=wanted) for path in files)
            return ([named_classes(row, labels) for row in rows] for rows in pieces)
        if any(path.endswith((".csv", ".tsv")) for some in known.values() for path in some):
            raise RecipeError(
                f"The split {split!r} of {str(folder)!r} can't be read: expected the names of "
                f"whole splits, of {sorted(map(str, known))}. Pick rows by `queries.rows`."
            )
        rows = load_dataset(str(folder), spec.config, split=split)
    except (DatasetsError, OSError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        name = spec.hub or spec.path
        raise RecipeError(f"The queries {name!r} can't be read: {error}") from error
    assert isinstance(rows, Dataset)
    labels = class_names(rows.features)
    return (
        [named_classes(dict(row), labels) for row in piece.to_pylist()]
        for piece in rows.with_format("arrow").iter(batch_size=ROWS)
    )


def _in_package(package: str, member: str) -> Path:
    """A file of an installed package, which is found without running any of its code."""
    top, *inner = package.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None or not spec.submodule_search_locations:
        raise RecipeError(
            f"The queries are in the package {package!r}, which isn't installed: "
            f"`pip install {top.replace('_', '-')}`."
        )
    home = Path(spec.origin).parent
    path = home.joinpath(*inner, member)
    if not path.resolve().is_relative_to(home.resolve()):
        raise RecipeError(f"{member!r} lies outside of the package {package!r}.")
    return path


def _file_rows(
    spec: Queries,
    path: Path,
    pinned: str | None = None,
    wanted: Collection[str] | None = None,
    *,
    by_place: bool = False,
) -> Iterator[Rows]:
    _check_file(path, pinned)
    if wanted is not None:
        return read_rows(path, TableFormat(spec.encoding, spec.separator, wanted))
    own = spec.messages or spec.query
    named = (own, spec.group, spec.reference, spec.forced_split)
    needed = {name for name in named if name} | (set() if own else {"query", "text"})
    if path.suffix.lower() in (".csv", ".tsv"):
        needed -= {"text"} if own is None else set()
        by_place |= spec.rows is not None  # which are told by numbers that count every row
    return read_rows(path, TableFormat(spec.encoding, spec.separator, needed, by_place))


def _check_file(path: Path, pinned: str | None) -> None:
    """Raise `RecipeError` for a file that isn't there, is empty, or not what was pinned."""
    if path.suffix.lower() not in READERS:
        next(read_rows(path))
    if not path.is_file():
        raise RecipeError(
            f"There is no file {str(path)!r}, which the recipe names for its queries: write it, or "
            "let the teacher write some for the prompt: distill-datasets synthesize "
            f"{path.parent} --n 200."
        )
    with path.open("rb") as file:
        if pinned and (found := file_digest(file, "sha256").hexdigest()) != pinned:
            raise RecipeError(
                f"{path} is not the content that the recipe pins: expected SHA-256 {pinned}, found "
                f"{found}. Install the version that the recipe was written for, or change `sha256`."
            )
        file.seek(0)
        if not any(block.strip() for block in iter(lambda: file.read(1 << 20), b"")):
            raise RecipeError(f"The queries file {str(path)!r} is empty: nothing to ask.")


def _all_columns(recipe: Recipe) -> list[str]:
    """The columns of all rows; costs as much as reading them."""
    return list(dict.fromkeys(name for rows in _pieces(recipe) for row in rows for name in row))


def _check_columns(recipe: Recipe, names: Mapping[str, str | None], row: Mapping[str, Any]) -> None:
    """Lines of JSON may have more columns than their first."""
    if {*names.values()} - {*row, None}:
        columns = _all_columns(recipe)
        for role, name in names.items():
            if name is not None and name not in columns:
                key = "messages" if name == recipe.queries.messages else _KEYS.get(role, role)
                raise RecipeError(
                    f"The queries have no column {name!r} (the recipe's `queries.{key}`); found "
                    f"{columns}.{nearest(name, columns)}"
                )


def _tabulate(some: Iterable[Columns], split: SplitShares) -> "Dataset":
    """All rows of `query`, `group`, `reference` and `split`, which come a few at a time.

    Raises `RecipeError` for an empty query.
    """
    from datasets import Dataset, Features, Value

    schema = Features(dict.fromkeys(_NAMES, Value("string"))).arrow_schema
    content = sha256()
    table = _gather(_complete(some, split, schema, content), schema)
    # `datasets` would hash the whole table for want of a name.
    return Dataset(table, fingerprint=content.hexdigest()[:32])


def _complete(
    some: Iterable[Columns], split: SplitShares, schema: "pa.Schema", content: Any
) -> Iterator["pa.RecordBatch"]:
    """Rows with their id, group and split; `content` is told of them, but for the queries.

    Equal queries are told apart by a number.
    """
    import pyarrow as pa

    count, seen = 0, Counter[int]()
    for columns in some:
        ids, groups, splits = list[str](), list[str](), list[str]()
        rows = zip(columns["query"], columns["group"], columns["split"], strict=True)
        for query, group, forced in rows:
            count += 1
            if query is None or is_blank(query):
                raise RecipeError(f"Query {count} is empty: remove the row or fill it.")
            own = query_id(query)
            number = int(own, 16)  # a third of the text's memory
            seen[number] += 1
            ids.append(own if seen[number] == 1 else f"{own}-{seen[number]}")
            groups.append(group or own)
            splits.append(forced or split.of(group or own))
        for row in zip(ids, groups, columns["reference"], splits, strict=True):
            content.update(repr(row).encode())
        found = [ids, columns["query"], groups, columns["reference"], splits]
        yield pa.RecordBatch.from_arrays(
            [pa.array(one, pa.string()) for one in found], schema=schema
        )


def _gather(batches: Iterator["pa.RecordBatch"], schema: "pa.Schema") -> "pa.Table":
    """A table in memory; a large one is over a file that nobody else finds, and goes with it."""
    import pyarrow as pa

    held, size = list["pa.RecordBatch"](), 0
    for batch in batches:
        held.append(batch)
        size += batch.nbytes
        if size > _IN_MEMORY:
            break
    else:
        return pa.Table.from_batches(held, schema)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = str(Path(folder) / "queries.arrow")
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in chain(held, batches):
                writer.write_batch(batch)
        return pa.ipc.open_stream(pa.memory_map(path)).read_all()


@dataclass(frozen=True)
class HeldOutRows:
    """The rows of a recipe's test split, as far as they are asked, and the `groups` they are of.

    Rows of a group may be all alike, so that the groups are what counts.
    """

    recipe: Recipe
    rows: int
    groups: int

    @classmethod
    def of(cls, recipe: Recipe, queries: "Dataset") -> "HeldOutRows":
        """That of the queries that `load_queries` gives."""
        groups = _test_groups(queries)
        return cls(recipe, len(groups), len(set(groups)))

    @cached_property
    def needed(self) -> int | None:
        """How many rows the recipe's margin needs, in groups of their own; None for a million."""
        return rows_needed(self.recipe.margin, PLANNED)

    def lines(self) -> list[str]:
        """What it can decide, for people, before anything is paid."""
        if self.recipe.split.same_rows:
            return ["the test rows are those of training (same_rows): they decide nothing"]
        if not self.groups:
            return ["no row is in the test split: nothing will be decided"]
        unit, related = "rows", ""
        if self.groups < self.rows:
            unit, related = "groups", f" in {self.groups:,} groups, counted as if alike within"
        margin = self.recipe.margin
        cells = [["differ on", f"needed for {margin:g}", f"least margin of {self.groups:,} {unit}"]]
        for share in GUESSES:
            needed = rows_needed(margin, share)
            cells.append(
                [
                    f"{share:.0%} of rows",
                    "over a million" if needed is None else f"{needed:,} {unit}",
                    f"{least_margin(self.groups, share):.3f}",
                ]
            )
        return [
            f"{self.rows:,} test rows{related}; where teacher and student are equally good, and",
            *aligned(cells).splitlines(),
            *([self.lack] if self.lack else []),
        ]

    @property
    def lack(self) -> str | None:
        """What to do where there are too few."""
        if self.needed is None:
            return f"No test split decides a margin of {self.recipe.margin:g}: raise it."
        if self.groups >= self.needed:
            return None
        unit = "groups" if self.groups < self.rows else "rows"
        lacking = self.needed - self.groups
        share = self.recipe.split.test
        how = (
            f"`distill-datasets synthesize` writes queries, of which {share:.0%} are test rows: "
            f"about {ceil(lacking / share):,} more"
            if share
            else "Give test a share in `split:`"
        )
        return (
            f"Too few for a margin of {self.recipe.margin:g}: {self.groups:,} {unit} of about "
            f"{self.needed:,}. {how}; or widen `margin`."
        )


def keep_for_evidence(recipe: Recipe, queries: "Dataset") -> "Dataset":
    """The queries without those of the test split that its margin doesn't need.

    Which are kept goes by the hash of their groups, so that more queries change few of them.
    Warns where there are too few; raises `SettingsError` where nothing is held out.
    """
    if recipe.split.same_rows:
        raise SettingsError(
            "With `split: {same_rows: true}` no row is held out to be evidence: remove that, or "
            "--for-evidence."
        )
    split = HeldOutRows.of(recipe, queries)
    if split.lack:
        warn(split.lack, stacklevel=2)
    if split.needed is None or split.groups <= split.needed:
        return queries
    order = sorted(set(_test_groups(queries)), key=lambda group: sha256(group.encode()).digest())
    kept = set(order[: split.needed])
    rows = zip(queries["split"], queries["group"], strict=True)
    return queries.select(
        [place for place, (name, group) in enumerate(rows) if name != "test" or group in kept]
    )


def _test_groups(queries: "Dataset") -> list[str]:
    rows = zip(queries["split"], queries["group"], strict=True)
    return [group for split, group in rows if split == "test"]

"""Rows of a run or a release as they came: query, the teacher's words, answer, reason, tokens."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

from distill_datasets.conversations import from_text, readable, shown, with_answers
from distill_datasets.errors import DatasetError
from distill_datasets.generation.ledger import LEDGER, find_replies, who_was_asked
from distill_datasets.generation.rows import stream
from distill_datasets.generation.shards import find_parts
from distill_datasets.hub.references import find_release
from distill_datasets.models.sampler import Reply, request_digest
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.releases.diff import published_rows
from distill_datasets.releases.manifest import PARTS, REJECTED, read_manifest
from distill_datasets.schema import EARLIER, SOURCE, failure_text

Which = Literal["all", "rejected", "errors"]

_TOKENS = ("prompt", "cached", "response")
_LABELS = ("query", "raw", "answer", "response", "reason", "tokens", "teacher", SOURCE)
_BRIEF = 60  # columns on a screen of a text that is written again where it stands twice
# What could steer a terminal; a text keeps its lines.
_CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n")}, " ")


def show(
    source: Path | str, *, which: Which = "all", query: str | None = None, limit: int = 20
) -> list[dict[str, Any]]:
    """The first rows of a run's folder, of a release, or of a Hub dataset `name@revision`.

        show("runs/demo", which="rejected", limit=5)

    Each has `query`, `raw` (the teacher's words), `answer`, `response`, `reason` (of a rejection
    or a failure), `tokens`, `teacher` and `split`; None where nothing is known. `query` is a text
    that the query contains. What a release kept has its raw text in the ledger alone. Raises
    `DatasetError` for what is neither a run nor a release.
    """
    run = Path(source).expanduser()
    if (run / "answers").is_dir() or any(run.glob("part-*-of-*")):
        return list(islice(_shown(_run_rows(run), which, query), limit))
    release = find_release(source, PARTS)
    if release is None:
        raise DatasetError(
            f"{str(source)!r} is neither a run nor a release: expected a folder with answers/ or "
            "manifest.json, or a Hub dataset as name@revision. A run has answers once all "
            "its queries were asked."
        )
    rows = list(islice(_shown(_release_rows(release.path), which, query), limit))
    return _with_raw(rows, release.path)


def print_rows(rows: Sequence[Mapping[str, Any]], file: TextIO | None = None) -> None:
    """Print rows for people, a paragraph each."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file)
    for number, row in enumerate(rows):
        if number:
            console.print()
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        known = dict[str, str]()  # longer texts, by where they stand first
        for label in _LABELS:
            if row.get(label) is not None:
                value = _written(label, row)
                text = value.translate(_CONTROLS).strip()
                if first := known.get(text):
                    text = f"(as {first})"
                elif cell_len(text) > _BRIEF or "\n" in text:
                    known[text] = label
                table.add_row(label, Text(text))
        console.print(table)


def _written(label: str, row: Mapping[str, Any]) -> str:
    """A cell as people read it; a conversation with the responses to its earlier turns."""
    if label == "tokens":
        counts = [f"{n:,} {kind}" for kind, n in row[label].items() if n is not None]
        return ", ".join(counts) or "not counted"
    if label != "query":
        return str(row[label])
    query, earlier = row["query"], row.get(EARLIER)
    return shown(with_answers(from_text(query), earlier)) if earlier else readable(query)


def _run_rows(run: Path) -> Iterator[dict[str, Any]]:
    from datasets import load_from_disk

    for part in find_parts([run]):
        for some in stream(load_from_disk(str(part / "answers"))):
            yield from some.to_pylist()


def _release_rows(release: Path) -> Iterator[dict[str, Any]]:
    read_manifest(release)
    for part, some in published_rows(release):
        for row in some.to_pylist():
            yield row if part == REJECTED else {**row, "split": part}


def _shown(
    rows: Iterator[dict[str, Any]], which: Which, query: str | None
) -> Iterator[dict[str, Any]]:
    for row in rows:
        rejection, error = row.get("rejection"), row.get("error")
        wanted = {"all": True, "rejected": rejection, "errors": error}[which]
        if not wanted or (query is not None and query not in readable(row["query"])):
            continue
        yield {
            **{name: row.get(name) for name in ("id", "split", "sample", "teacher", "query")},
            **{name: row.get(name) for name in ("raw", "answer", "response")},
            **{name: row[name] for name in (EARLIER, SOURCE) if row.get(name)},
            "reason": failure_text(error) if error else rejection,
            "tokens": {kind: row[f"teacher_{kind}_tokens"] for kind in _TOKENS},
        }


def _with_raw(rows: list[dict[str, Any]], release: Path) -> list[dict[str, Any]]:
    """The rows of a release, those that it kept with the text in its ledger.

    What a model said to a row of the mix is the row's response.
    """
    for row in rows:
        if row.get(SOURCE) and row["teacher"]:
            row["raw"] = row["raw"] or row["response"]
    if not any((release / LEDGER).glob("*.parquet")):
        return rows
    recipe, manifest = load_recipe(release / "recipe", trust=True), read_manifest(release)
    asked = [
        (row, _keys(row, recipe, manifest))
        for row in rows
        if row["raw"] is None and not row.get(SOURCE)
    ]
    replies = find_replies(release, {key for _, keys in asked for key in keys})
    for row, keys in asked:
        texts = (_text(replies.get(key), row, recipe) for key in keys)
        row["raw"] = next(filter(None, texts), None)
    return rows


def _keys(row: Mapping[str, Any], recipe: Recipe, manifest: Mapping[str, Any]) -> list[str]:
    """The requests that a row may come from: those of the teachers of its name."""
    teachers = manifest["panel"]["teachers"] if manifest.get("panel") else [manifest]
    names = [one.get("model") or one["teacher"] for one in teachers]
    query = row["query"]
    messages = recipe.messages(query, row.get(EARLIER) or ())
    return [
        request_digest(identity, messages, recipe.fitted(query, sampling))
        for name, (identity, sampling) in zip(names, who_was_asked(recipe, manifest), strict=True)
        if name == row["teacher"]
    ]


def _text(reply: Reply | None, row: Mapping[str, Any], recipe: Recipe) -> str | None:
    """The sample that a row was read from."""
    samples = reply.samples if reply else ()
    if recipe.choose == "route":
        return samples[row["sample"]].text if row["sample"] < len(samples) else None
    read = recipe.teacher_reader.read
    said = [one.text for one in samples if read(one.text, one.stop_reason).answer == row["answer"]]
    return said[0] if said else None

"""The teacher's log-probabilities that generation kept, as a configuration of a release.

A row is kept where the student shall say exactly what the teacher's tokens say. A response that
was written anew from the answer has no probabilities of its own.
"""

from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_datasets.errors import DatasetError
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.ledger import JournaledRows, answering_requests
from distill_datasets.models.sampler import Logprobs
from distill_datasets.models.scoring import SoftLabels
from distill_datasets.parquet import ROWS_PER_BATCH, Shards, read_batches
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.schema import SOURCE

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

SOFT = "soft"
_COLUMNS = ("id", "sample", "tokens", "top_tokens", "top_logprobs")


def soft_features() -> "Features":
    """A row a released row: its tokens, and the likeliest ones in the place of each."""
    from datasets import Features, List, Value

    return Features(
        {
            "id": Value("string"),
            "sample": Value("int32"),
            "tokens": List(Value("int32")),
            "top_tokens": List(List(Value("int32"))),
            "top_logprobs": List(List(Value("float16"))),
        }
    )


def write_soft(
    folder: Path,
    sources: Iterable[JournaledRows],
    recipe: Recipe,
    generation: Mapping[str, Any],
) -> dict[str, int]:
    """Write the soft labels that the sources' journals hold of their kept rows to `folder/soft`.

    Returns how many rows were written, and how many were not: those whose response is not the
    teacher's own text, and those without token ids, since a token's text is not enough to train
    on. The rows must each be a sample of one reply, not chosen among several.
    """
    facts = {"rows": 0, "rewritten": 0, "without_ids": 0}
    shards = None
    for source in sources:
        keys = answering_requests(source.rows, recipe, generation)
        with Journal(source.journal) as answers:
            for batch in _batches(answers, source.rows, keys, facts):
                shards = shards or Shards(folder / SOFT, SOFT, soft_features().arrow_schema)
                shards.add(batch)
    if shards:
        shards.close()
    return facts


def has_soft(release: Path) -> bool:
    """Whether a release's folder carries soft labels."""
    return any((release / SOFT).glob("*.parquet"))


def read_soft(
    release: Path, wanted: Container[tuple[str, int]], k: int
) -> Iterator[tuple[tuple[str, int], SoftLabels]]:
    """The `k` likeliest of the wanted rows that have labels, by id and sample, a few at a time.

    Raises `DatasetError` where the release holds fewer than `k`.
    """
    for path in sorted((release / SOFT).glob("*.parquet")):
        for batch in read_batches(path, _COLUMNS):
            for row in batch.to_pylist():
                if (name := (row["id"], row["sample"])) in wanted:
                    yield name, _labels(row, k, path)


def _labels(row: Mapping[str, Any], k: int, path: Path) -> SoftLabels:
    widest = max(map(len, row["top_tokens"]))
    if widest < k:
        raise DatasetError(
            f"{str(path)!r} holds the {widest} likeliest tokens of a place; found top_k={k}. "
            f"Train with top_k={widest}, or generate with a larger `sampling.top_logprobs`."
        )
    ids = np.zeros((len(row["tokens"]), k), np.int32)
    logprobs = np.full(ids.shape, -np.inf)
    for place, tops in enumerate(zip(row["top_tokens"], row["top_logprobs"], strict=True)):
        tokens, likely = tops[0][:k], tops[1][:k]
        ids[place, : len(tokens)] = tokens
        logprobs[place, : len(likely)] = likely
    return SoftLabels.of(row["tokens"], ids, logprobs)


def _batches(
    journal: Journal, rows: "Dataset", keys: Iterator[str], facts: dict[str, int]
) -> Iterator["pa.Table"]:
    import pyarrow as pa

    schema = soft_features().arrow_schema
    columns = ["id", "sample", "raw", "response"]
    mixed = [SOURCE] if SOURCE in rows.column_names else []
    for batch in rows.select_columns([*columns, *mixed]).iter(batch_size=ROWS_PER_BATCH):
        sources = batch[SOURCE] if mixed else [None] * len(batch["id"])
        asked = zip(*(batch[name] for name in columns), sources, keys, strict=False)
        found = []
        for id_, sample, raw, response, source, key in asked:
            if response is None or source is not None:
                continue
            if response != raw:
                facts["rewritten"] += 1
                continue
            reply = journal.get(key)
            logprobs = reply.samples[sample].logprobs if reply else None
            if logprobs is None or not _has_ids(logprobs):
                facts["without_ids"] += 1
                continue
            facts["rows"] += 1
            tops = [np.asarray(row, np.float16) for row in logprobs.top_logprobs]
            values = id_, sample, logprobs.tokens, logprobs.top_tokens, tops
            found.append(dict(zip(_COLUMNS, values, strict=True)))
        if found:
            yield pa.Table.from_pylist(found, schema=schema)


def _has_ids(logprobs: Logprobs) -> bool:
    told = [*logprobs.tokens, *(token for place in logprobs.top_tokens for token in place)]
    complete = len(logprobs.top_tokens) == len(logprobs.tokens) > 0
    return complete and all(isinstance(token, int) for token in told)

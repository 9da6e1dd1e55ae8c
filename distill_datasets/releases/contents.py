"""What a release is made of: rows by split, counted and digested in one pass, and what in them
can't teach a student.

A part is a split, or `rejected`. Rows belong to one part, or to two where the recipe says
`same_rows`.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_datasets.conversations import assistant_message, read_calls, readable
from distill_datasets.errors import DatasetError
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.ledger import JournaledRows, answering_requests
from distill_datasets.generation.rows import stream
from distill_datasets.hub.references import check_files, remembered
from distill_datasets.models.sampler import Logprobs, digest
from distill_datasets.models.scoring import SoftLabels
from distill_datasets.parquet import ROWS_PER_BATCH, Shards, read_batches
from distill_datasets.recipes.checks import FAILED
from distill_datasets.recipes.mix import mixed_answer, mixed_messages
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.releases.diff import Fingerprints, json_line, published_rows, short_hash
from distill_datasets.releases.manifest import (
    MANIFEST,
    PARTS,
    REJECTED,
    read_manifest,
    rejected_rows,
)
from distill_datasets.schema import (
    EARLIER,
    SOURCE,
    Message,
    failure_content,
    rejected_features,
    release_features,
)
from distill_datasets.tables import one_line

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

    from distill_datasets.releases.diff import Hashes

SOFT = "soft"
_COLUMNS = ("id", "sample", "tokens", "top_tokens", "top_logprobs")
_SPLIT_NAME = re.compile(r"\w+(\.\w+)*")  # what `datasets` can name
_TAKEN_NAMES = ("all", REJECTED)
_FREE_SHARE = 0.1  # of the distinct queries that one answer may be for, where any text is allowed
_CHOICE_SHARE = 0.95
_REJECTED_SHARE = 0.5
_FAILED_SHARE = 0.1
_FEWEST = 3  # equal answers, and rows that can't be used
_FEWEST_CHOSEN = 10  # queries, before equal answers out of a closed set say anything
_TEXTS = 1_000  # that are kept to be shown
_SHOWN = 60  # signs of one
_NAMED = 10  # choices


def answered_contents(
    answers: Dataset, recipe: Recipe
) -> Iterator[tuple[tuple[str, ...], pa.Table]]:
    """The rows of a release with the parts that they are in, made from answers.

    Raises `DatasetError` for a row that no release can hold.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    for rows in stream(answers):
        if pa.types.is_string(rows["error"].type):
            raise DatasetError(
                "The answers were written by an earlier version: expected `error` with a type, "
                "found a text. Run `generate` again: it asks for nothing that is in the journal."
            )
        usable = pc.and_(pc.is_null(rows["rejection"]), pc.is_null(rows["error"]))
        kept, dropped = rows.filter(usable), rows.filter(pc.invert(usable))
        _check(kept)
        for split in pc.unique(kept["split"]).to_pylist():
            twice = recipe.split.same_rows and split == "train"
            rows_of_split = kept.filter(pc.equal(kept["split"], split))
            own, mixed = _parted(rows_of_split)
            if len(own):
                yield ("train", "test") if twice else (split,), _released(own, recipe)
            if len(mixed):
                yield (split,), _released(mixed, recipe)
        if len(dropped):
            schema = features_of(REJECTED, recipe).arrow_schema
            yield (REJECTED,), dropped.select(schema.names).cast(schema)


def tally_checks(answers: Dataset, recipe: Recipe) -> CheckTally:
    """How many of the rows that a release keeps pass each of the recipe's checks."""
    tally = CheckTally(recipe)
    if tally.facts:
        for rows in stream(answers):
            own, _ = _parted(rows)
            for row in own.to_pylist():
                tally.add(row)
    return tally


def mixed_rows(answers: Dataset, part: str) -> Iterator[dict[str, Any]]:
    """The rows of a part of the recipe's mix, those that can't be used too."""
    for rows in stream(answers):
        _, mixed = _parted(rows)
        yield from (row for row in mixed.to_pylist() if row[SOURCE] == part)


def _parted(rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The recipe's own rows, and those of its mix."""
    import pyarrow.compute as pc

    if SOURCE not in rows.column_names:
        return rows, rows.slice(0, 0)
    own = pc.is_null(rows[SOURCE])
    return rows.filter(own), rows.filter(pc.invert(own))


def _check(kept: pa.Table) -> None:
    for column in ("id", "query", "response", "split", "sample"):
        if kept[column].null_count:
            raise DatasetError(
                f"{kept[column].null_count} answered rows have no {column!r}: expected one in "
                "every row without `error` or `rejection`. Run `generate` again."
            )
    for split in set(kept["split"].to_pylist()):
        if not _SPLIT_NAME.fullmatch(split) or split in _TAKEN_NAMES:
            raise DatasetError(
                f"{split!r} can't name a split: expected letters, digits and underscores, and "
                f"none of {_TAKEN_NAMES}. Change the recipe's `queries.forced_split` column."
            )


def features_of(part: str, recipe: Recipe) -> Features:
    """The columns of a split, or of what was rejected."""
    added = (*recipe.evidence, *recipe.answer_columns)
    if part == REJECTED:
        return rejected_features(added)
    tools = any(one.student_tools for one in (recipe, *recipe.members.values()))
    named = (("tools",) if tools and not recipe.mix else ()) + (
        ("handle",) if recipe.members else ()
    )
    calls = recipe.tools is not None or recipe.holds_conversations or bool(recipe.mix)
    return release_features((*added, *named), calls=calls)


def _released(kept: pa.Table, recipe: Recipe) -> pa.Table:
    import pyarrow as pa
    from datasets.table import array_cast

    schema = features_of("train", recipe).arrow_schema
    rows = kept.select(["query", "response", *recipe.answer_columns]).to_pylist()
    messages: list[Any] = [_messages(recipe, row) for row in rows]
    kind = stored = schema.field("messages").type
    if isinstance(kind.value_type, pa.BaseExtensionType):
        messages = [list(map(_as_json, row)) for row in messages]
        stored = pa.list_(pa.string())
    column = array_cast(pa.array(messages, type=stored), kind)
    kept = kept.append_column("messages", column)
    of_query = {
        "tools": lambda query: recipe.part(query)[0].student_tools,
        "handle": recipe.handle,
    }
    kept = kept.drop_columns([*(of_query.keys() & {*kept.column_names})])
    for name, value in of_query.items():
        if name in schema.names:
            cells = [row.get(name) if row.get(SOURCE) else value(row["query"]) for row in rows]
            kept = kept.append_column(name, pa.array(cells, pa.string()))
    return kept.select(schema.names).cast(schema)


def _messages(recipe: Recipe, row: Mapping[str, Any]) -> list[Message]:
    """What the student learns: the conversation as it sees it, and what it shall say."""
    query, response, mixed = row["query"], row["response"], row.get(SOURCE)
    asked = (
        mixed_messages(query) if mixed else recipe.student_messages(query, row.get(EARLIER) or ())
    )
    if _shows_prompt(recipe, asked, None if mixed else query):
        raise DatasetError(
            f"The row of the query {readable(query)[:80]!r} holds the teacher's prompt: expected "
            "what the student sees, which is the conversation without it. Remove the prompt from "
            "the queries, from `student` and from the rows of the mix."
        )
    if mixed:
        return [*asked, mixed_answer(query, response)]
    calls = recipe.part(query)[0].tools is not None
    return [*asked, assistant_message(response, calls=calls, after=asked)]


def _shows_prompt(recipe: Recipe, asked: Sequence[Message], query: str | None) -> bool:
    """Whether messages hold what only the teacher shall see; a row's own system message is none.

    Without a `query` of the recipe's own they may hold no prompt of it.
    """
    texts = [message["content"] for message in asked]
    if query is None:
        prompted = [(one, texts[-1]) for one in recipe.members.values() or (recipe,)]
    else:
        prompted = [recipe.part(query)]
    for member, own in prompted:
        if member.asks_in_one_message:
            (shown,) = member.messages(own)
            if shown["content"] != own and shown["content"] in texts:
                return True
        else:
            prompt = member.system_text
            if any(text == prompt or text.startswith(f"{prompt}\n") for text in texts):
                return True
    return False


def _as_json(message: Message) -> str:
    """A message as chat templates take it: the arguments of its calls are objects."""
    calls = [
        {**call, "function": {**call["function"], "arguments": dict(read.arguments)}}
        for call in message.get("tool_calls", ())
        for read in read_calls([call])
    ]
    return json.dumps({**message, **({"tool_calls": calls} if calls else {})}, ensure_ascii=False)


class AnswerTally:
    """Hashes of the queries and answers of kept rows, 16 bytes a row.

    `choices` are the only answers, where the recipe names them; else a row's response counts.
    """

    def __init__(self, choices: Sequence[str] = ()) -> None:
        self.choices = choices
        self._queries, self._answers = array("Q"), array("Q")
        self._first = array("b")
        self._texts: dict[int, str] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a kept row."""
        text = str(row["answer"] if self.choices else row["response"])
        answer = short_hash(text.encode())
        self._queries.append(short_hash(row["query"].encode()))
        self._answers.append(answer)
        self._first.append(row["sample"] == 0)
        if len(self._texts) < _TEXTS:
            self._texts.setdefault(answer, text)

    def warnings(self, rejected: Mapping[str, int], errors: int) -> list[str]:
        """What to know before training on the rows; `rejected` counts rows by their reason."""
        import numpy as np

        queries, answers = (np.frombuffer(one, np.uint64) for one in (self._queries, self._answers))
        first = np.frombuffer(self._first, np.int8).astype(bool)
        found = [
            self._alike(queries, answers),
            _contradicting(queries[first], answers[first]),
            self._absent(),
            _unusable(rejected, errors, len(queries)),
        ]
        return [warning for warning in found if warning]

    def _alike(self, queries: Hashes, answers: Hashes) -> str | None:
        """One answer for too many queries."""
        import numpy as np

        pairs = np.unique(np.stack([queries, answers]), axis=1)
        distinct = len(np.unique(queries))
        values, counts = np.unique(pairs[1], return_counts=True)
        if not distinct:
            return None
        most = int(counts.max())
        text = self._texts.get(int(values[counts.argmax()]))
        shown = f"the answer {one_line(text, _SHOWN)!r}" if text is not None else "one answer"
        share = f"{most:,} of {distinct:,} distinct queries ({most / distinct:.0%})"
        if self.choices:
            if distinct >= _FEWEST_CHOSEN and most >= _CHOICE_SHARE * distinct:
                return f"nearly all answers are alike: {shown} stands for {share}"
        elif most >= _FEWEST and most > _FREE_SHARE * distinct:
            return f"{shown} stands for {share}: is it an excuse, or an error text?"
        return None

    def _absent(self) -> str | None:
        """Choices that no kept row has."""
        seen = set(self._answers)
        absent = [choice for choice in self.choices if short_hash(choice.encode()) not in seen]
        if not absent:
            return None
        named = ", ".join(repr(one_line(choice, _SHOWN)) for choice in absent[:_NAMED])
        more = f" and {len(absent) - _NAMED:,} more" if len(absent) > _NAMED else ""
        return f"{len(absent):,} of {len(self.choices):,} choices never occur: {named}{more}"


class CheckTally:
    """How many kept rows each check applies to, and how many of them pass it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.facts = {name: {"rows": 0, "passed": 0} for name in recipe.all_checks}

    def add(self, row: Mapping[str, Any]) -> None:
        """Count an answered row, with the teacher's text as it stands; only a kept one counts."""
        if row["rejection"] is not None or row["error"] is not None:
            return
        said = (row[name] for name in ("query", "reference", "raw", "stop_reason", "answer"))
        for name, passed in self.recipe.check(*said).items():
            if passed is not None:
                self.facts[name]["rows"] += 1
                self.facts[name]["passed"] += passed

    @property
    def warnings(self) -> list[str]:
        """Which checks many kept rows fail, and which say nothing of any."""
        found = []
        for name, fact in self.facts.items():
            rows, failed = fact["rows"], fact["rows"] - fact["passed"]
            rule = self.recipe.all_checks[name].covers
            named = f"the check {name}" + (f" ({one_line(rule, _SHOWN)})" if rule else "")
            if not rows:
                found.append(f"{named} applies to none of the rows")
            elif failed >= _FEWEST and failed > _FAILED_SHARE * rows:
                found.append(
                    f"{failed:,} of {rows:,} rows fail {named}: `keep` leaves such rows out"
                )
        return found


def _contradicting(queries: Hashes, answers: Hashes) -> str | None:
    """Equal queries, asked as rows of their own, with different answers."""
    import numpy as np

    pairs = np.unique(np.stack([queries, answers]), axis=1)
    _, counts = np.unique(pairs[0], return_counts=True)
    several = int((counts > 1).sum())
    if not several:
        return None
    are = "query is" if several == 1 else "queries are"
    return f"{several:,} {are} there more than once, with different answers"


def _unusable(rejected: Mapping[str, int], errors: int, kept: int) -> str | None:
    reasons = {**rejected, **({"not answered": errors} if errors else {})}
    dropped = sum(reasons.values())
    if dropped < _FEWEST or dropped <= _REJECTED_SHARE * (dropped + kept):
        return None
    by_reason = sorted(reasons.items(), key=lambda reason: -reason[1])
    told = ", ".join(f"{rows:,} {reason}" for reason, rows in by_reason)
    hint = ": raise sampling.max_tokens" if by_reason[0][0] == "truncated" else ""
    if by_reason[0][0].startswith(FAILED):
        hint = ": ask for it in prompt.md, mend the check, or leave it out of `keep`"
    return f"{dropped:,} of {dropped + kept:,} rows can't be used ({told}){hint}"


@dataclass
class Survey:
    """One pass over contents: rows of each part, and what the card says about them.

    `kept` counts a row once, whatever parts it is in; `rejected` counts rows by their reason, and
    `mixed` the kept rows of each part of the recipe's mix, of which nothing else is said.
    """

    rows: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    errors: int = 0
    mixed: Counter[str] = field(default_factory=Counter)
    example: dict[str, Any] | None = None
    fingerprints: Fingerprints = field(default_factory=Fingerprints)
    answers: AnswerTally = field(default_factory=AnswerTally)
    _digests: dict[str, Any] = field(default_factory=dict)
    _numbers: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(
        cls, contents: Iterable[tuple[tuple[str, ...], pa.Table]], choices: Sequence[str] = ()
    ) -> Survey:
        """Read contents once; `choices` are the only answers that the recipe allows."""
        found = cls(answers=AnswerTally(choices))
        for parts, rows in contents:
            found._add(parts, rows)
        return found

    def _add(self, parts: tuple[str, ...], rows: pa.Table) -> None:
        self.rows.update(dict.fromkeys(parts, len(rows)))
        for part in parts:
            self._digests.setdefault(part, sha256(json_line(rows.column_names)))
        for row in rows.to_pylist():
            # What differs from run to run is no part of it: how much of the prompt a server had in
            # its cache, and how often a failed row was asked.
            cells = {**row, "error": failure_content(row["error"])} if "error" in row else {**row}
            cells.pop("teacher_cached_tokens", None)
            line = json_line([*cells.values()])
            for part in parts:
                self._digests[part].update(line)
            self.fingerprints.add(parts, row)
            if parts == (REJECTED,):
                self.errors += row["error"] is not None
                self.rejected.update([row["rejection"]] if row["rejection"] else [])
            else:
                self._count(row)

    def _count(self, row: dict[str, Any]) -> None:
        self.kept += 1
        if source := row.get(SOURCE):
            self.mixed[source] += 1
            return
        self.example = self.example or row
        self.answers.add(row)
        if row["teacher_prompt_tokens"] is not None:
            self._numbers["counted"] += 1
            self._numbers["prompt_tokens"] += row["teacher_prompt_tokens"]
        if row["reference"] is not None:
            self._numbers["references"] += 1
            self._numbers["agreeing"] += row["answer"] == row["reference"]

    @property
    def splits(self) -> dict[str, int]:
        """Rows of each split: train, validation, test, then any other by name."""
        first = ("train", "validation", "test")
        others = sorted(self.rows.keys() - {*first, REJECTED})
        return {name: self.rows[name] for name in (*first, *others) if self.rows[name]}

    @property
    def warnings(self) -> list[str]:
        """What to know before training on the rows."""
        return self.answers.warnings(self.rejected, self.errors)

    @property
    def mean_prompt_tokens(self) -> float | None:
        """Prompt tokens that the teacher read for a kept row; None where nobody counted."""
        counted = self._numbers["counted"]
        return round(self._numbers["prompt_tokens"] / counted, 1) if counted else None

    @property
    def references(self) -> dict[str, int] | None:
        """Kept rows that have a reference, and how many answers equal it."""
        found = self._numbers["references"]
        return {"rows": found, "agreeing": self._numbers["agreeing"]} if found else None

    def digest(self, recipe_digest: str) -> str:
        """Names the recipe, the rows and their order within each part; not files or times."""
        parts = {part: found.hexdigest() for part, found in self._digests.items()}
        return digest({"recipe": recipe_digest, "parts": parts})


def survey_release(release: Path) -> Survey:
    """Read the rows of a release's folder once."""
    return Survey.of(((part,), rows) for part, rows in published_rows(release))


def check_release(release: Path, parts: Collection[str] = (*PARTS, "recipe")) -> None:
    """Check that a release's folder holds what its manifest was written for, in these parts.

    The files' digests are compared, then the digest of the rows where they are all here; what was
    checked and has not changed is not read again. Raises `DatasetError` that names the file, or
    what the rows differ in.
    """
    manifest = read_manifest(release)
    check_files(release, parts)
    folders = ("data", REJECTED) if rejected_rows(manifest) else ("data",)
    if not all((release / folder).is_dir() for folder in folders):
        return  # of a Hub dataset not everything is downloaded
    paths = sorted(path for folder in folders for path in (release / folder).glob("*.parquet"))
    facts = "/".join(str(manifest.get(key)) for key in ("recipe_digest", "content_digest"))
    with remembered(release, paths, facts) as known:
        if known:
            return
        try:
            found = survey_release(release)
        except (KeyError, TypeError, AttributeError) as error:
            raise DatasetError(
                f"The rows in {str(release / 'data')!r} are not those of a release: {error!r}. Get "
                "the release again, or publish anew."
            ) from error
        counted = {split: found.rows[split] for split in manifest["splits"]}
        if counted != manifest["splits"]:
            problem = f"the splits have {counted} rows, not {manifest['splits']}"
        elif found.digest(str(manifest.get("recipe_digest"))) != manifest["content_digest"]:
            problem = f"the rows do not have the digest {manifest['content_digest']}"
        else:
            return
        raise DatasetError(
            f"The rows in {str(release / 'data')!r} are not those that "
            f"{str(release / MANIFEST)!r} was written for: {problem}. Get the release again, or "
            "publish anew."
        )


def soft_features() -> Features:
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
    journal: Journal, rows: Dataset, keys: Iterator[str], facts: dict[str, int]
) -> Iterator[pa.Table]:
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

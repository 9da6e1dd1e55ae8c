"""What the rows of a dataset are like, before anybody trains on them."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import regex

from distill_datasets.conversations import response_text, shown
from distill_datasets.errors import DatasetError, nearest
from distill_datasets.recipes.checks import (
    count_bullets,
    count_sentences,
    count_words,
    language_of,
)
from distill_datasets.synthesis.run import NearDuplicates
from distill_datasets.tables import aligned, html_card, html_preformatted, one_line
from distill_datasets.training.data import DatasetSplit, locate, open_split

_MOST_ROWS = 200_000  # that are read
_MOST_COMPARED = 10_000  # queries in which near duplicates are looked for
_ALIKE = 0.8  # the share of common runs of characters from which two queries are near duplicates
_NAMED, _LONGEST = 8, 48  # of the commonest, and characters of each
_OPENING = 3  # words
_ONE_SIDED, _REPEATED = 0.8, 0.05  # shares of rows that a note is worth
_FORMATS = {
    "fence": regex.compile(r"^[ \t]*```", regex.M),
    "heading": regex.compile(r"^#{1,6}[ \t]+\S", regex.M),
    "bold": regex.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
    "table": regex.compile(r"^[ \t]*\|.+\|[ \t]*$", regex.M),
    "numbered list": regex.compile(r"^[ \t]*\d{1,3}[.)][ \t]+\S", regex.M),
    "tool call": regex.compile(r"^<tool_call>$", regex.M),
}
_EMOJI = regex.compile(r"\p{Extended_Pictographic}")
_ENDS = regex.compile(r"[.!?…。！？؟।][\"'”’»)\]*_`]*\s*\Z")
_PARAGRAPH = regex.compile(r"\n[ \t]*\n")
_STYLE: Mapping[str, Callable[[str], float]] = {
    "sentences": count_sentences,
    "paragraphs": lambda text: len(_PARAGRAPH.split(text.strip())),
    "bullets": count_bullets,
    "asks_a_question": lambda text: "?" in text or "？" in text,
    "exclaims": lambda text: "!" in text or "！" in text,
    "has_an_emoji": lambda text: _EMOJI.search(text) is not None,
    "ends_a_sentence": lambda text: _ENDS.search(text) is not None,
    "small_first_letter": lambda text: text.strip()[:1].islower(),
}


class ProfiledRow(NamedTuple):
    """A row as text; `answer` is the label that was read out of the response, if there is any."""

    split: str
    query: str
    response: str
    answer: str | None = None


@dataclass(frozen=True)
class Profile:
    """What was counted, as JSON values in `data`; `notes` in it are what is worth a look."""

    data: Mapping[str, Any]

    def text(self) -> str:
        """Tables for a terminal."""
        return "\n\n".join(_sections(self.data))

    def _repr_html_(self) -> str:
        title, *others = _sections(self.data)
        return html_card(title, *map(html_preformatted, others))


def profile(
    dataset: str | Path,
    *,
    config: str | None = None,
    split: str | None = None,
    sample: int | None = 50,
) -> Profile:
    """Count the rows of a folder, a file, a release or a Hub dataset, as `train` reads them.

    Balance, lengths, formats, openings and duplicates are of all rows; languages and style of a
    `sample` of them, or of all with None. Raises `DatasetError` for what can't be read.

        print(profile("runs/support/release").text())
    """
    source = locate(dataset, config)
    splits = source.load()
    names = [str(name) for name in splits]
    if split is not None and split not in names:
        raise DatasetError(
            f"{source.reference!r} has no split {split!r}; found {names}.{nearest(split, names)}"
        )
    wanted = [split] if split else [name for name in names if len(splits[name])]
    parts = [open_split(source, name, splits) for name in wanted]
    rows = list(islice((row for part in parts for row in _rows(part)), _MOST_ROWS))
    if not rows:
        raise DatasetError(f"{source.reference!r} has no rows: expected at least one.")
    counted = profile_rows(rows, sample)
    return Profile({"dataset": source.reference, "revision": source.revision, **counted})


def _rows(part: DatasetSplit) -> Iterator[ProfiledRow]:
    plain = part.rows.with_format(None)
    labels: Any = plain["answer"] if "answer" in plain.column_names else ()
    for place, conversation in enumerate(part.conversations):
        *asked, said = conversation.messages
        query = asked[0]["content"] if len(asked) == 1 else shown(asked)
        label = labels[place] if place < len(labels) else None
        answer = label if isinstance(label, str) else None
        yield ProfiledRow(part.name, query, response_text(said), answer)


def profile_rows(rows: Sequence[ProfiledRow], sample: int | None = 50) -> dict[str, Any]:
    """What `profile` counts, of rows that are there already; at least one."""
    responses = [row.response for row in rows]
    # The same rows are drawn whatever their order.
    drawn = sorted(rows, key=lambda row: sha256(f"{row.query}\n{row.response}".encode()).digest())
    looked_at = drawn[:sample]
    queries, answers = [row.query for row in looked_at], [row.response for row in looked_at]
    found: dict[str, Any] = {
        "rows": len(rows),
        "splits": dict(Counter(row.split for row in rows)),
        "answers": _commonest([row.response if row.answer is None else row.answer for row in rows]),
        "lengths": {"query": _lengths(row.query for row in rows), "response": _lengths(responses)},
        "formats": _formats(responses),
        "openings": _commonest([" ".join(text.split()[:_OPENING]) for text in responses]),
        "duplicates": _duplicates(rows),
        "sampled": len(looked_at),
        "languages": {"query": _languages(queries), "response": _languages(answers)},
        "style": _style(answers),
    }
    return {**found, "notes": list(_notes(found))}


def _commonest(texts: Sequence[str]) -> dict[str, Any]:
    """How many different texts there are, how even they are, and the commonest."""
    counts = Counter(text.strip() for text in texts)
    shares = np.array([*counts.values()]) / len(texts)
    entropy = float(-(shares * np.log(shares)).sum())
    return {
        "distinct": len(counts),
        "evenness": entropy / float(np.log(len(counts))) if len(counts) > 1 else 0.0,
        "commonest": [
            {"text": text, "rows": rows, "share": rows / len(texts)}
            for text, rows in counts.most_common(_NAMED)
        ],
    }


def _lengths(texts: Iterable[str]) -> dict[str, dict[str, float]]:
    words, characters = zip(*((count_words(text), len(text)) for text in texts), strict=True)
    ends = {"least": 0, "median": 50, "p95": 95, "most": 100}
    return {
        unit: {name: float(np.percentile(counts, end)) for name, end in ends.items()}
        for unit, counts in (("words", words), ("characters", characters))
    }


def _formats(texts: Sequence[str]) -> dict[str, Any]:
    """The share of texts of each format, of which one text can have several; keys of JSON."""
    counts: Counter[str] = Counter()
    keys: Counter[str] = Counter()
    for text in texts:
        found = {name for name, pattern in _FORMATS.items() if pattern.search(text)}
        found |= {"bulleted list"} if count_bullets(text) else set()
        with suppress(ValueError, RecursionError):  # an object or a list, and nothing else
            if isinstance(value := json.loads(text), dict | list):
                found = {"JSON"}
                keys[", ".join(value) if isinstance(value, dict) else "(a list)"] += 1
        if not text.strip():
            found = {"empty"}
        counts.update(found or {"plain"})
    shares = {name: rows / len(texts) for name, rows in counts.most_common()}
    return {"shares": shares, "json_keys": dict(keys.most_common(_NAMED))}


def _duplicates(rows: Sequence[ProfiledRow]) -> dict[str, int]:
    """Rows that repeat an earlier one; a query in another split is held out from nobody."""
    seen: dict[str, ProfiledRow] = {}
    counts = dict.fromkeys(("rows", "queries", "other_answers", "in_several_splits"), 0)
    pairs: set[tuple[str, str]] = set()
    for row in rows:
        query = " ".join(row.query.casefold().split())
        first = seen.setdefault(query, row)
        if first is not row:
            counts["queries"] += 1
            counts["rows"] += (query, row.response) in pairs
            counts["other_answers"] += first.response != row.response
            counts["in_several_splits"] += first.split != row.split
        pairs.add((query, row.response))
    known = NearDuplicates(_ALIKE)
    compared = [*seen.values()][:_MOST_COMPARED]
    near = sum(known.add(row.query) is not None for row in compared)
    return {**counts, "near_queries": near, "compared": len(compared)}


def _languages(texts: Sequence[str]) -> dict[str, float]:
    """The share of each language, and of the texts that are too short to tell."""
    found = Counter(language_of(text) or "too short to tell" for text in texts)
    return {name: rows / len(texts) for name, rows in found.most_common()}


def _style(texts: Sequence[str]) -> dict[str, float]:
    """Means over the texts; words a sentence and distinct words are of all texts together."""
    words = [word for text in texts for word in regex.findall(r"\w+", text.casefold())]
    sentences, length = (sum(map(count, texts)) for count in (count_sentences, count_words))
    return {
        **{name: float(np.mean([*map(of, texts)])) for name, of in _STYLE.items()},
        "words_a_sentence": length / max(1, sentences),
        "distinct_words": len(set(words)) / max(1, len(words)),
    }


def _notes(found: Mapping[str, Any]) -> Iterator[str]:
    rows, repeated, shares = found["rows"], found["duplicates"], found["formats"]["shares"]
    yield from _alike(found)
    if empty := shares.get("empty"):
        yield f"{empty:.1%} of the responses are empty."
    if several := repeated["in_several_splits"]:
        yield f"{several:,} rows repeat a query of another split: those are not held out."
    if repeated["rows"] >= max(1, _REPEATED * rows):
        yield f"{repeated['rows']:,} rows repeat an earlier one word for word."
    if others := repeated["other_answers"]:
        yield f"{others:,} rows repeat a query with another response."
    if 0.5 < (json_share := shares.get("JSON", 0.0)) < 1:
        yield f"{1 - json_share:.1%} of the responses are no JSON, and the others are."
    if len(found["formats"]["json_keys"]) > 1:
        yield "The JSON has not the same keys in every row."


def _alike(found: Mapping[str, Any]) -> Iterator[str]:
    """Whether most rows have one answer, or responses that begin alike."""
    several = found["answers"]["distinct"] > 1
    first, opening = (found[name]["commonest"][0] for name in ("answers", "openings"))
    if not several and found["rows"] > 1:
        yield f"Every row has one answer: {_cut(first['text'])!r}."
    elif first["share"] >= _ONE_SIDED and several:
        yield f"{first['share']:.0%} of the rows have one answer: {_cut(first['text'])!r}."
    if opening["share"] >= _ONE_SIDED and several:
        yield f"{opening['share']:.0%} of the responses begin alike: {_cut(opening['text'])!r}."


def _cut(text: str) -> str:
    return one_line(text, _LONGEST)


def _sections(data: Mapping[str, Any]) -> Iterator[str]:
    splits = ", ".join(f"{rows:,} {name}" for name, rows in data["splits"].items())
    yield f"{data['dataset']}: {data['rows']:,} rows ({splits})"
    if data["notes"]:
        yield "\n".join(f"! {note}" for note in data["notes"])
    for name in ("answers", "openings"):
        found = data[name]
        if name == "openings" and found == data["answers"]:  # of answers as short as an opening
            continue
        head = f"{name}: {found['distinct']:,} distinct, evenness {found['evenness']:.2f}"
        lines = [
            [f"{one['share']:.1%}", f"{one['rows']:,}", _cut(one["text"]) or "(empty)"]
            for one in found["commonest"]
        ]
        yield f"{head}\n{aligned(lines)}"
    table = [["lengths", "least", "median", "95 %", "most"]]
    for side, units in data["lengths"].items():
        for unit, sizes in units.items():
            table.append([f"{side}, {unit}", *(f"{size:,.0f}" for size in sizes.values())])
    yield aligned(table)
    formats = data["formats"]
    keys = [["keys", f"{rows:,} x {_cut(name)}"] for name, rows in formats["json_keys"].items()]
    yield "formats\n" + aligned([*_shares(formats["shares"]), *keys])
    repeated = {name.replace("_", " "): f"{n:,}" for name, n in data["duplicates"].items()}
    repeated = {"repeated rows": repeated.pop("rows"), **repeated}
    yield "duplicates\n" + aligned(repeated.items())
    head = f"of {data['sampled']:,} of {data['rows']:,} rows"
    for side, shares in data["languages"].items():
        yield f"languages of the {side}, {head}\n{aligned(_shares(shares))}"
    style = {name.replace("_", " "): f"{value:.2f}" for name, value in data["style"].items()}
    yield f"style, {head}\n{aligned(style.items())}"


def _shares(shares: Mapping[str, float]) -> list[list[str]]:
    return [[f"{share:.1%}", name] for name, share in shares.items()]

"""A rehearsal as people read it: a line a model, then time, disk, and what was really asked."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distill_datasets.progress import amount_text
from distill_datasets.tables import aligned

_SHOWN = 120  # characters of a sampled text


def rehearsal_text(found: Mapping[str, Any]) -> str:
    """Several lines, from `Rehearsal.data`."""
    return "\n".join(_lines(found))


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    left = sum(load["requests"] for load in found["loads"])
    yield (
        f"{found['recipe']}: {found['queries']:,} queries, {found['requests']:,} requests, "
        f"{found['known']:,} of them answered already or asked twice, {left:,} to ask"
    )
    yield ""
    yield aligned(_rows(found))
    yield ""
    yield f"time      {_time(found)}"
    yield f"disk      {_span(found['disk'], _bytes)}"
    if found["sampled"]:
        yield f"sampled   {_sample(found)}"
        yield from (f"          {_sampled(one)}" for one in found["sampled"])
    yield from (f"note      {note}" for note in found["notes"])


def _rows(found: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    priced = f"cost ({found['currency']})" if found["currency"] else "cost"
    yield ["model", "requests", "prompt tokens", "", "response tokens", priced]
    for load in found["loads"]:
        yield [
            load["model"],
            f"{load['requests']:,}",
            _span(load["prompt"], _count),
            load["source"],
            _span(load["response"], _count),
            _span(load["cost"], amount_text) if load["cost"] else "no price",
        ]
    if len(found["loads"]) > 1 and found["cost"]:
        yield ["all", "", "", "", "", _span(found["cost"], amount_text)]
    if found["priced_at"]:
        yield ["", "", "", "", "", f"at the prices of {found['priced_at']}"]


def _span(span: Mapping[str, Any], write: Any) -> str:
    low, expected, high = span["low"], span["expected"], span["high"]
    if expected is None:
        return f"{write(low)} to {write(high)}"
    if low == high:
        return str(write(expected))
    return f"{write(expected)} ({write(low)} to {write(high)})"


def _count(value: float) -> str:
    return f"{round(value):,}"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1_000:
            return f"{value:,.0f} {unit}"
        value /= 1_000
    return f"{value:,.1f} TB"


def _time(found: Mapping[str, Any]) -> str:
    seconds = found["seconds"]
    if seconds is None:
        return "unknown"
    at = f"with {found['concurrency']} rows at once, where the servers keep up"
    if seconds < 120:
        return f"about {seconds:,.1f} s {at}"
    return (
        f"about {seconds / 3600:,.1f} h {at}" if seconds > 7200 else f"{seconds / 60:,.0f} min {at}"
    )


def _sample(found: Mapping[str, Any]) -> str:
    cost = found["sample_cost"]
    paid = (
        f"for {amount_text(cost)} {found['currency']}" if cost is not None else "at no known price"
    )
    kept = "kept in the journal" if found["sample_kept"] else "not kept: name --out to keep them"
    return f"{len(found['sampled'])} rows {paid}, {kept}"


def _sampled(one: Mapping[str, Any]) -> str:
    said = one["problem"] if one["text"] is None else one["text"]
    read = f" -> {one['answer']!r}" if one["answer"] is not None else ""
    dropped = f" [{one['problem']}]" if one["problem"] and one["text"] is not None else ""
    return f"{_short(one['query'])} | {_short(said)}{read}{dropped}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"

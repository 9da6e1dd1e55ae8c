"""A report's numbers as text: an aligned table for terminals, Markdown for people."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_ROW = ("expected", "teacher", "base", "student", "query")  # any script may come last


def table(report: Mapping[str, Any]) -> str:
    """The systems, what sets the student apart and, where there are few, the rows."""
    differences = [
        f"{pair.replace('-', ' - ')}: "
        + ", ".join(f"{name} {_interval(value, sign='+')}" for name, value in metrics.items())
        for pair, metrics in report["differences"].items()
    ]
    parts = [_aligned(list(_system_cells(report))), "\n".join([*differences, *costs(report)])]
    if report["rows"]:
        parts.append(_rows(report))
    return "\n\n".join(parts)


def markdown(report: Mapping[str, Any]) -> str:
    """The comparison that the model card shows too, how to read it, then labels and rows."""
    from distill_datasets.releases.cards import report_markdown

    title = f"# {report['recipe']}: base, teacher and student"
    notes = "\n".join(f"- {note}" for note in report["notes"])
    parts = [title, report_markdown(report).strip(), notes]
    if report["labels"]:
        parts += ["## Recall of each label", _code(_aligned(list(_label_cells(report))))]
    if report["rows"]:
        parts += ["## Every row", _code(_rows(report))]
    return "\n\n".join(parts) + "\n"


def costs(report: Mapping[str, Any]) -> list[str]:
    """What the prompt costs in tokens and in time, with the arithmetic."""
    teacher, student = report["systems"]["teacher"], report["systems"]["student"]
    long, short = teacher["tokens"]["prompt_mean"], student["tokens"]["prompt_mean"]
    saved, times = report["prompt_tokens_saved"], report["latency_ratio"]
    return [
        f"Prompt tokens a query: teacher {long:.1f} - student {short:.1f} = "
        f"{saved['per_query']:.1f} saved, {saved['ratio']:.1f} times fewer.",
        *_internalised(report),
        f"Median latency: student {student['latency_ms']['p50']:.1f} ms; teacher "
        f"{teacher['latency_ms']['p50']:.1f} ms, {times['teacher']:.2f} times as long; teacher "
        f"uncached {teacher['latency_uncached_ms']['p50']:.1f} ms, "
        f"{times['teacher_uncached']:.2f} times.",
    ]


def _internalised(report: Mapping[str, Any]) -> Iterator[str]:
    found = report.get("internalisation")
    if not found:
        return
    nats = found["nats_per_token"]
    base, student, teacher = (f"{nats[name]:.3f}" for name in ("base", "student", "teacher"))
    yield (
        f"Internalisation {_interval(found)}: of the {base} - {teacher} nats a response token that "
        f"the prompt is worth on {found['rows']} of the teacher's answers, the student, at "
        f"{student}, has so much without it."
    )


def _system_cells(report: Mapping[str, Any]) -> Iterator[list[str]]:
    systems = report["systems"]
    names = list(systems["student"]["metrics"])
    yield ["system", "prompt", *names, "tokens in/out", "p50 ms"]
    for name, system in systems.items():
        tokens = system["tokens"]
        yield [
            name,
            "yes" if system["prompt"] else "no",
            *(_interval(system["metrics"][metric]) for metric in names),
            f"{tokens['prompt_mean']:.1f}/{tokens['response_mean']:.1f}",
            f"{system['latency_ms']['p50']:.1f}",
        ]


def _label_cells(report: Mapping[str, Any]) -> Iterator[list[str]]:
    systems = list(report["systems"])
    yield ["label", "rows", *systems]
    for label, found in report["labels"].items():
        yield [label, str(found["n"]), *(f"{found[system]:.3f}" for system in systems)]


def _rows(report: Mapping[str, Any]) -> str:
    cells = [[" ".join((row[name] or "-").split()) for name in _ROW] for row in report["rows"]]
    return _aligned([list(_ROW), *cells])


def _interval(number: Mapping[str, float], sign: str = "") -> str:
    value, low, high = (f"{number[key]:{sign}.3f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return "\n".join(padded)


def _code(text: str) -> str:
    """Indented, since no text can close an indented block."""
    return "\n".join(f"    {line}" for line in text.splitlines())

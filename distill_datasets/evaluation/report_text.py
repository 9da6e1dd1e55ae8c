"""A report's numbers as text: an aligned table for terminals, Markdown for people."""

from collections.abc import Iterator, Mapping
from typing import Any

from distill_datasets.tables import aligned

_ROW = ("expected", "teacher", "base", "student", "query")  # any script may come last
_RULE = 60  # characters of what a check covers
_ANSWER, _QUERY = 80, 240  # and of an answer and a query among few rows: the report has them whole
_ALIKE = 0.95  # of all answers: a system that says one thing


def table(report: Mapping[str, Any]) -> str:
    """A warning where one is due, systems, checks, what sets the student apart, and few rows."""
    differences = [
        f"{pair.replace('-', ' - ')}: "
        + ", ".join(f"{name} {_interval(value, sign='+')}" for name, value in metrics.items())
        for pair, metrics in report["differences"].items()
    ]
    systems = "\n".join([*one_answer(report), aligned(_system_cells(report))])
    parts = [systems, "\n".join([*differences, *costs(report)])]
    if report.get("checks"):
        parts.insert(1, aligned(_check_cells(report)))
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
        parts += ["## Recall of each label", _code(aligned(_label_cells(report)))]
    if report["rows"]:
        parts += ["## Every row", _code(_rows(report))]
    return "\n\n".join(parts) + "\n"


def one_answer(report: Mapping[str, Any]) -> Iterator[str]:
    """A warning where the student all but always says one thing, and the teacher doesn't."""
    student, teacher = (report["systems"][name]["answers"] for name in ("student", "teacher"))
    if student["commonest_share"] >= _ALIKE > teacher["commonest_share"]:
        said = student["commonest"]
        answer = "no answer that can be read" if said is None else f"the answer {said[:80]!r}"
        yield (
            f"Warning: the student gives {answer} to {student['commonest_share']:.0%} of the "
            f"{report['n']} queries; the teacher gives {teacher['distinct']} different answers."
        )


def costs(report: Mapping[str, Any]) -> list[str]:
    """What the prompt costs in tokens and in time, with the arithmetic."""
    teacher, student = report["systems"]["teacher"], report["systems"]["student"]
    times = report["latency_ratio"]
    return [
        *_saved(report),
        *_internalised(report),
        f"Median latency: student {student['latency_ms']['p50']:.1f} ms; teacher "
        f"{teacher['latency_ms']['p50']:.1f} ms, {times['teacher']:.2f} times as long; teacher "
        f"uncached {teacher['latency_uncached_ms']['p50']:.1f} ms, "
        f"{times['teacher_uncached']:.2f} times.",
    ]


def _saved(report: Mapping[str, Any]) -> Iterator[str]:
    saved, systems = report["prompt_tokens_saved"], report["systems"]
    if not saved:
        yield "Prompt tokens a query: a server doesn't count them."
        return
    long, short = (systems[name]["tokens"]["prompt_mean"] for name in ("teacher", "student"))
    yield (
        f"Prompt tokens a query: teacher {long:.1f} - student {short:.1f} = "
        f"{saved['per_query']:.1f} saved, {saved['ratio']:.1f} times fewer."
    )


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
    names = list(dict.fromkeys(name for one in systems.values() for name in one["metrics"]))
    yield ["system", "prompt", *names, "tokens in/out", "p50 ms"]
    for name, system in systems.items():
        tokens = [system["tokens"][f"{kind}_mean"] for kind in ("prompt", "response")]
        yield [
            name,
            "yes" if system["prompt"] else "no",
            *(_interval(system["metrics"].get(metric)) for metric in names),
            "/".join("?" if mean is None else f"{mean:.1f}" for mean in tokens),
            f"{system['latency_ms']['p50']:.1f}",
        ]


def _check_cells(report: Mapping[str, Any]) -> Iterator[list[str]]:
    systems, pair = report["systems"], "student-teacher"
    yield ["check", "rows", *systems, "student - teacher", "covers"]
    for name, check in report["checks"].items():
        rows = [system["checks"].get(name, {}).get("rows", 0) for system in systems.values()]
        yield [
            name,
            "/".join(dict.fromkeys(map(str, rows))),
            *(_interval(system["checks"].get(name)) for system in systems.values()),
            _interval(report["check_differences"][pair].get(name), sign="+"),
            (check["covers"] or check["demands"])[:_RULE],
        ]


def _label_cells(report: Mapping[str, Any]) -> Iterator[list[str]]:
    systems = list(report["systems"])
    yield ["label", "rows", *systems]
    for label, found in report["labels"].items():
        yield [label, str(found["n"]), *(f"{found[system]:.3f}" for system in systems)]


def _rows(report: Mapping[str, Any]) -> str:
    cells = ([_cell(name, row[name] or "-") for name in _ROW] for row in report["rows"])
    return aligned([_ROW, *cells])


def _cell(name: str, text: str) -> str:
    most = _QUERY if name == "query" else _ANSWER
    return text if len(text) <= most else text[: most - 1] + "…"


def _interval(number: Mapping[str, float] | None, sign: str = "") -> str:
    """A number with its interval, where the rows can tell one."""
    if number is None:
        return "-"
    ends = [f"{number[key]:{sign}.3f}" for key in ("low", "high") if key in number]
    return f"{number['value']:{sign}.3f}" + (f" [{', '.join(ends)}]" if ends else "")


def _code(text: str) -> str:
    """Indented, since no text can close an indented block."""
    return "\n".join(f"    {line}" for line in text.splitlines())

"""A report's numbers as text: an aligned table for terminals, Markdown for people."""

from collections.abc import Iterator, Mapping
from math import exp
from typing import Any

from distill_datasets.evaluation.judge_findings import judge_lines, judge_table
from distill_datasets.evaluation.money import money_text
from distill_datasets.evaluation.verdict import lines
from distill_datasets.tables import aligned, interval_text, shortened

_FIRST, _LAST = "expected", "query"  # of the cells of a row; any script may come last
_RULE = 60  # characters of what a check covers
_ANSWER, _QUERY = 80, 240  # and of an answer and a query among few rows: the report has them whole
_ALIKE = 0.95  # of all answers: a system that says one thing
_SHORT = {"base + short prompt": "base + short"}  # where a table is narrow
_LIKENESS = ("chrf", "rouge_l")
_FEW = 4  # systems whose every check has its interval in a table
_MOST_NATS = 20.0  # whose perplexity means anything
_ABOUT_TEXTS = (
    "Likeness to the teacher's text is the mean over the rows, from 0 to 1: chrF of runs of "
    "characters, ROUGE-L of runs of words, and the share of equal texts (same). Length is that of "
    "all texts together, for one of the teacher's; ended is the share that ended by itself; the "
    "commonest text has so many of all answers."
)
_Report = Mapping[str, Any]


def table(report: _Report) -> str:
    """What matters first, then systems, checks, what sets the student apart, and few rows."""
    differences = [
        f"{_pair(pair)}: "
        + ", ".join(f"{name} {_interval(value, sign='+')}" for name, value in metrics.items())
        for pair, metrics in report["differences"].items()
    ]
    systems = "\n".join([*_first(report), aligned(_system_cells(report))])
    parts = [systems, "\n".join([*differences, *costs(report)])]
    if report.get("checks"):
        parts.insert(1, aligned(_check_cells(report)))
    if report.get("free_text"):
        parts.insert(1, aligned(text_cells(report)))
    if judge := report.get("judge"):
        parts.insert(-1, "\n".join([judge_table(judge), *judge_lines(judge)]))
    if report["rows"]:
        parts.append(_rows(report))
    return "\n\n".join(parts)


def _pair(pair: str) -> str:
    """What is compared, as a difference: `student - (base + prompt)`."""
    first, _, second = pair.partition("-")
    return f"{first} - {f'({second})' if '+' in second else second}"


def markdown(report: _Report) -> str:
    """The comparison that the model card shows too, how to read it, then labels and rows."""
    from distill_datasets.evaluation.residue import residue_lines
    from distill_datasets.releases.cards import report_markdown

    title = f"# {report['recipe']}: may the student replace the prompt?"
    notes = "\n".join(f"- {note}" for note in [*report["notes"], *_internalised(report)])
    parts = [title, report_markdown(report).strip(), notes]
    if report.get("texts"):
        shown = [] if report["free_text"] else [_code(aligned(text_cells(report)))]
        parts += ["## Texts", *shown, _ABOUT_TEXTS]
    if judge := report.get("judge"):
        said = "\n".join(f"- {line}" for line in judge_lines(judge))
        parts += ["## Judge", _code(judge_table(judge)), said]
    if "money" in report:
        parts += ["## Money", _code(money_text(report["money"]))]
    if report.get("residue"):
        parts += ["## Residue of the prompt", residue_lines(report["residue"])]
    if report["labels"]:
        parts += ["## Recall of each label", _code(aligned(label_cells(report)))]
    if report["rows"]:
        parts += ["## Every row", _code(_rows(report))]
    return "\n\n".join(parts) + "\n"


def summary(report: _Report) -> list[str]:
    """The first lines of a report: what is odd, the verdict, and what the student saves."""
    advice = [report["money"]["advice"]] if "money" in report else []
    return [*_first(report), *advice, *_saved(report), *_latency(report)]


def _first(report: _Report) -> Iterator[str]:
    yield from report["alerts"] if "alerts" in report else one_answer(report)
    if verdict := report.get("verdict"):
        yield from lines(verdict)


def one_answer(report: _Report) -> Iterator[str]:
    """A warning where the student all but always says one thing, and the teacher doesn't."""
    if any("answers" not in report["systems"][name] for name in ("student", "teacher")):
        return  # a report of version 0.1
    student, teacher = (report["systems"][name]["answers"] for name in ("student", "teacher"))
    if student["commonest_share"] >= _ALIKE > teacher["commonest_share"]:
        said = student["commonest"]
        answer = "no answer that can be read" if said is None else f"the answer {said[:80]!r}"
        yield (
            f"Warning: the student gives {answer} to {student['commonest_share']:.0%} of the "
            f"{report['n']} queries; the teacher gives {teacher['distinct']} different answers."
        )


def costs(report: _Report) -> list[str]:
    """What the prompt costs in tokens and in time, with the arithmetic."""
    return [*_saved(report), *_internalised(report), *_latency(report)]


def _latency(report: _Report) -> Iterator[str]:
    times = report.get("latency_ratio")
    if not times:
        return
    teacher, student = report["systems"]["teacher"], report["systems"]["student"]
    yield (
        f"Median latency: student {student['latency_ms']['p50']:.1f} ms; teacher "
        f"{teacher['latency_ms']['p50']:.1f} ms, {times['teacher']:.2f} times as long; teacher "
        f"uncached {teacher['latency_uncached_ms']['p50']:.1f} ms, "
        f"{times['teacher_uncached']:.2f} times."
    )


def _saved(report: _Report) -> Iterator[str]:
    saved, systems = report["prompt_tokens_saved"], report["systems"]
    if not saved:
        yield "Prompt tokens a query: a server doesn't count them."
        return
    long, short = (systems[name]["tokens"]["prompt_mean"] for name in ("teacher", "student"))
    if saved["per_query"] < 0:
        yield (
            f"Prompt tokens a query: student {short:.1f}, teacher {long:.1f}: none saved. Each is "
            "counted by its own model's tokenizer and chat format."
        )
        return
    yield (
        f"Prompt tokens a query: teacher {long:.1f} - student {short:.1f} = "
        f"{saved['per_query']:.1f} saved, {saved['ratio']:.1f} times fewer."
    )


def _internalised(report: _Report) -> Iterator[str]:
    found = report.get("internalisation")
    if not found:
        return
    nats = found["nats_per_token"]
    said = ", ".join(
        f"{name} {nats[name]:.3f} (perplexity {_perplexity(nats[name])})"
        for name in ("base", "student", "teacher")
    )
    rows = f"of {found['rows']} of the teacher's answers"
    yield f"Nats a response token {rows}: {said}. They say how likely, not how good, answers are."
    if "value" not in found:
        yield f"Internalisation is not computed: {found['why']}"
        return
    base, student, teacher = (f"{nats[name]:.3f}" for name in ("base", "student", "teacher"))
    yield (
        f"Internalisation {_interval(found)} = ({base} - {student}) / ({base} - {teacher}): so "
        "much of what the prompt is worth has the student without it. It is a number of the "
        "loss, not of success."
    )


def _perplexity(nats: float) -> str:
    return f"{exp(nats):.2f}" if nats < _MOST_NATS else "-"


def _system_cells(report: _Report) -> Iterator[list[str]]:
    systems = report["systems"]
    names = list(dict.fromkeys(name for one in systems.values() for name in one["metrics"]))
    timed = any("latency_ms" in one for one in systems.values())
    yield ["system", "prompt", *names, "tokens in/out", *(["p50 ms"] if timed else [])]
    for name, system in systems.items():
        tokens = [system["tokens"][f"{kind}_mean"] for kind in ("prompt", "response")]
        latency = system.get("latency_ms")
        yield [
            _SHORT.get(name, name),
            "yes" if system["prompt"] else "no",
            *(_interval(system["metrics"].get(metric)) for metric in names),
            "/".join("?" if mean is None else f"{mean:.1f}" for mean in tokens),
            *([f"{latency['p50']:.1f}" if latency else "-"] if timed else []),
        ]


def text_cells(report: _Report) -> Iterator[list[str]]:
    """The systems' texts: likeness to the teacher's, length, variety."""
    headings = [f"{name} to teacher" for name in _LIKENESS]
    yield ["system", *headings, "same", "length", "ended", "different", "commonest"]
    for name, found in report["texts"].items():
        alike = found.get("teacher", {})
        length = found.get("length_ratio")
        yield [
            _SHORT.get(name, name),
            *(_interval(alike.get(one)) for one in _LIKENESS),
            _interval(alike.get("exact_match"), ends=False),
            _interval(length, ends=False),
            _interval(found["ended"], ends=False),
            f"{found['distinct']} of {report['n']}",
            f"{found['commonest_share']['value']:.0%}",
        ]


def _check_cells(report: _Report) -> Iterator[list[str]]:
    systems, pair = report["systems"], "student-teacher"
    names, ends = [_SHORT.get(name, name) for name in systems], len(systems) <= _FEW
    yield ["check", "rows", *names, "student - teacher", "covers"]
    for name, check in report["checks"].items():
        rows = [system["checks"].get(name, {}).get("rows", 0) for system in systems.values()]
        yield [
            name,
            "/".join(dict.fromkeys(map(str, rows))),
            *(_interval(one["checks"].get(name), ends=ends) for one in systems.values()),
            _interval(report["check_differences"][pair].get(name), sign="+"),
            (check["covers"] or check["demands"])[:_RULE],
        ]


def label_cells(report: _Report) -> Iterator[list[str]]:
    """Each system's share of each label that is right, and what sets student and teacher apart."""
    systems, apart = list(report["systems"]), report.get("subgroups") or {}
    more = ["student - teacher"] if apart else []
    yield ["label", "rows", *(_SHORT.get(name, name) for name in systems), *more]
    for label, found in report["labels"].items():
        shares = [f"{found[one]:.3f}" if one in found else "-" for one in systems]
        yield [label, f"{found['n']:,}", *shares, *(_apart(apart.get(label) or {}) for _ in more)]


def _apart(subgroup: Mapping[str, Any]) -> str:
    if not subgroup.get("difference"):
        return "too few rows"
    beyond = " beyond chance" if subgroup.get("significant") else ""
    return interval_text(subgroup["difference"], "+") + beyond


def _rows(report: _Report) -> str:
    shown = [name for name in ("teacher", "base", "student") if name in report["systems"]]
    names = [_FIRST, *shown, _LAST]
    cells = ([_cell(name, row.get(name) or "-") for name in names] for row in report["rows"])
    return aligned([names, *cells])


def _cell(name: str, text: str) -> str:
    return shortened(text, _QUERY if name == _LAST else _ANSWER)


def _interval(number: Mapping[str, float] | None, sign: str = "", *, ends: bool = True) -> str:
    """A cell with a number, and its interval where the rows can tell one."""
    if number is None:
        return "-"
    return interval_text(number, sign) if ends else f"{number['value']:{sign}.3f}"


def _code(text: str) -> str:
    """Indented, since no text can close an indented block."""
    return "\n".join(f"    {line}" for line in text.splitlines())

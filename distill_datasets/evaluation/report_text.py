"""A report as text: an aligned table for terminals, Markdown for people, and every sentence."""

from collections.abc import Iterator, Mapping
from math import exp
from typing import Any

from distill_datasets.evaluation.money import money_text
from distill_datasets.statistics import FEW
from distill_datasets.tables import aligned, interval_text, shortened

_RULE = 60  # characters of what a check covers
_ANSWER, _QUERY = 80, 240  # and of an answer and a query among few rows: the report has them whole
_SHORT = {"base + short prompt": "base + short"}  # where a table is narrow
_FEW_SYSTEMS = 4  # whose every check has its interval in a table
_MOST_NATS = 20.0  # whose perplexity means anything
_ABOUT_TEXTS = (
    "Likeness to the teacher's text is the mean over the rows, from 0 to 1: chrF of runs of "
    "characters, ROUGE-L of runs of words, and the share of equal texts (same). Length is that of "
    "all texts together, for one of the teacher's; ended is the share that ended by itself; the "
    "commonest text has so many of all answers."
)
_Found = Mapping[str, Any]  # a report, or what stands in it under a key


def table(report: _Found) -> str:
    """What matters first, then systems, checks, what sets the student apart, and few rows."""
    parts = ["\n".join([*_first(report), aligned(_system_cells(report))])]
    if report.get("free_text"):
        parts.append(aligned(_text_cells(report)))
    if report.get("checks"):
        parts.append(aligned(_check_cells(report)))
    if judge := report.get("judge"):
        parts.append("\n".join([judge_table(judge), *judge_lines(judge)]))
    differences = [
        f"{_pair(pair)}: "
        + ", ".join(f"{name} {_interval(value, sign='+')}" for name, value in metrics.items())
        for pair, metrics in report["differences"].items()
    ]
    costs = [*_saved(report), *_internalised(report), *_latency(report)]
    parts.append("\n".join([*differences, *costs]))
    if report["rows"]:
        parts.append(_rows(report))
    return "\n\n".join(parts)


def _pair(pair: str) -> str:
    """What is compared, as a difference: `student - (base + prompt)`."""
    first, _, second = pair.partition("-")
    return f"{first} - {f'({second})' if '+' in second else second}"


def markdown(report: _Found) -> str:
    """The comparison that the model card shows too, how to read it, then labels and rows."""
    from distill_datasets.releases.cards import report_markdown

    title = f"# {report['recipe']}: may the student replace the prompt?"
    notes = [*report["notes"], *_internalised(report)]
    parts = [title, report_markdown(report).strip(), _listed(notes)]
    if report.get("texts"):
        shown = [] if report["free_text"] else [_code(aligned(_text_cells(report)))]
        parts += ["## Texts", *shown, _ABOUT_TEXTS]
    if judge := report.get("judge"):
        parts += ["## Judge", _code(judge_table(judge)), _listed(judge_lines(judge))]
    if "money" in report:
        parts += ["## Money", _code(money_text(report["money"]))]
    if report.get("residue"):
        parts += ["## Residue of the prompt", _listed(residue_lines(report["residue"]))]
    if report["labels"]:
        parts += ["## Recall of each label", _code(aligned(label_cells(report)))]
    if report["rows"]:
        parts += ["## Every row", _code(_rows(report))]
    return "\n\n".join(parts) + "\n"


def residue_lines(residue: _Found) -> list[str]:
    """A line a test of what the training left behind."""
    outcomes = {True: "passed", False: "FAILED", None: "not told"}
    return [f"{name}: {outcomes[one['passed']]}. {one['said']}" for name, one in residue.items()]


def _listed(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _code(text: str) -> str:
    """Indented, since no text can close an indented block."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def summary(report: _Found) -> list[str]:
    """The first lines of a report: what is odd, the verdict, and what the student saves."""
    advice = [report["money"]["advice"]] if "money" in report else []
    return [*_first(report), *advice, *_saved(report), *_latency(report)]


def _first(report: _Found) -> Iterator[str]:
    yield from report.get("alerts", ())
    if verdict := report.get("verdict"):
        yield from verdict_lines(verdict)


def verdict_lines(verdict: _Found) -> Iterator[str]:
    """The verdict, the difference that it goes by, its rule, and who alone is right."""
    needed = verdict["rows_needed"]
    missing = f": about {rounded_up(needed):,} more rows" if needed else ""
    yield f"Verdict: {verdict['outcome']}{missing}."
    if difference := verdict["difference"]:
        rows = f"{verdict['rows']:,} rows"
        if verdict["groups"] < verdict["rows"]:
            worth = f"worth {round(difference['n']):,} independent ones"
            rows += f" in {verdict['groups']:,} groups, {worth}"
        yield (
            f"{verdict['metric']}: student {verdict['student']:.3f}, teacher "
            f"{verdict['teacher']:.3f}, difference {_interval(difference, '+')} on {rows}."
        )
    yield verdict["rule"]
    teacher, student = (len(verdict[f"only_{name}"]) for name in ("teacher", "student"))
    if teacher or student:
        p = "" if verdict["p"] is None else f" (McNemar's mid-p {verdict['p']:.3f})"
        yield (
            f"The teacher alone is right in {_count(teacher)}, the student alone in "
            f"{_count(student)}{p}."
        )


def _count(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows:,} rows"


def rounded_up(rows: int) -> int:
    """A number of rows in two digits, and not fewer."""
    unit: int = 10 ** max(0, len(str(rows)) - 2)
    return -(-rows // unit) * unit


def _latency(report: _Found) -> Iterator[str]:
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


def _saved(report: _Found) -> Iterator[str]:
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


def _internalised(report: _Found) -> Iterator[str]:
    found = report.get("internalisation")
    if not found:
        return
    nats = {name: found["nats_per_token"][name] for name in ("base", "student", "teacher")}
    perplexity = {
        name: f"{exp(one):.2f}" if one < _MOST_NATS else "-" for name, one in nats.items()
    }
    said = ", ".join(
        f"{name} {one:.3f} (perplexity {perplexity[name]})" for name, one in nats.items()
    )
    rows = f"of {found['rows']} of the teacher's answers"
    yield f"Nats a response token {rows}: {said}. They say how likely, not how good, answers are."
    if "value" not in found:
        yield f"Internalisation is not computed: {found['why']}"
        return
    base, student, teacher = (f"{one:.3f}" for one in nats.values())
    yield (
        f"Internalisation {_interval(found)} = ({base} - {student}) / ({base} - {teacher}): so "
        "much of what the prompt is worth has the student without it. It is a number of the "
        "loss, not of success."
    )


def _system_cells(report: _Found) -> Iterator[list[str]]:
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


def _text_cells(report: _Found) -> Iterator[list[str]]:
    likeness = ("chrf", "rouge_l")
    headings = [f"{name} to teacher" for name in likeness]
    yield ["system", *headings, "same", "length", "ended", "different", "commonest"]
    for name, found in report["texts"].items():
        alike = found.get("teacher", {})
        shares = (alike.get("exact_match"), found.get("length_ratio"), found["ended"])
        yield [
            _SHORT.get(name, name),
            *(_interval(alike.get(one)) for one in likeness),
            *(_interval(one, ends=False) for one in shares),
            f"{found['distinct']} of {report['n']}",
            f"{found['commonest_share']['value']:.0%}",
        ]


def _check_cells(report: _Found) -> Iterator[list[str]]:
    systems = report["systems"]
    ends = len(systems) <= _FEW_SYSTEMS
    yield [
        *("check", "rows", *(_SHORT.get(name, name) for name in systems)),
        *("student - teacher", "covers"),
    ]
    for name, check in report["checks"].items():
        passed = [system["checks"].get(name) for system in systems.values()]
        rows = [one["rows"] if one else 0 for one in passed]
        yield [
            name,
            "/".join(dict.fromkeys(map(str, rows))),
            *(_interval(one, ends=ends) for one in passed),
            _interval(report["check_differences"]["student-teacher"].get(name), sign="+"),
            (check["covers"] or check["demands"])[:_RULE],
        ]


def label_cells(report: _Found) -> Iterator[list[str]]:
    """Each system's share of each label that is right, and what sets student and teacher apart."""
    systems, apart = list(report["systems"]), report.get("subgroups") or {}
    more = ["student - teacher"] if apart else []
    yield ["label", "rows", *(_SHORT.get(name, name) for name in systems), *more]
    for label, found in report["labels"].items():
        shares = [f"{found[one]:.3f}" if one in found else "-" for one in systems]
        subgroup = apart.get(label) or {}
        beyond = " beyond chance" if subgroup.get("significant") else ""
        difference = subgroup.get("difference")
        said = _interval(difference, "+") + beyond if difference else "too few rows"
        yield [label, f"{found['n']:,}", *shares, *(said for _ in more)]


def _rows(report: _Found) -> str:
    # The query comes last: any script may stand in it.
    names = [name for name in ("teacher", "base", "student") if name in report["systems"]]
    cells = (
        [
            *(shortened(row.get(name) or "-", _ANSWER) for name in ("expected", *names)),
            shortened(row["query"] or "-", _QUERY),
        ]
        for row in report["rows"]
    )
    return aligned([["expected", *names, "query"], *cells])


def judge_table(judge: _Found) -> str:
    """The mean scores of each system."""
    cells = [["system", *judge["scales"], "rows"]]
    for system, scores in judge["scores"].items():
        rows = "/".join(dict.fromkeys(str(one["rows"]) for one in scores.values()))
        means = (_interval(scores.get(one), digits=2) for one in judge["scales"])
        cells.append([system, *means, rows])
    return aligned(cells)


def judge_lines(judge: _Found) -> list[str]:
    """A judge's opinions in sentences: who it is, what it finds, and how far it can be trusted."""
    corrected = "corrected by human labels" if judge["corrected"] else "uncorrected"
    if judge["n"] < FEW:
        gaps = f"No gap is named: {judge['n']} rows are too few, {FEW} are the least."
    elif judge["gaps"]:
        gaps = f"Gaps that aren't chance: {'; '.join(judge['gaps'])}."
    else:
        gaps = "No gap between the student's scores and others' is more than chance."
    return [
        f"Judge: {judge['model']}, by {', '.join(judge['rubrics'])}, {corrected}.",
        *(f"Warning: {one}" for one in judge["warnings"]),
        gaps,
        *_preferred(judge["preference"]),
        *_trusted(judge),
        _by_labels(judge["labels"]),
    ]


def _preferred(found: _Found) -> Iterator[str]:
    unread = f", {found['unread']} can't be read" if found["unread"] else ""
    yield (
        f"Preferred, blind and in both orders: student {found['student']}, teacher "
        f"{found['teacher']}, tie {found['ties']} ({found['equal']} equal texts, "
        f"{found['flipped']} flip with the order){unread}."
    )
    if "difference" in found:
        p = "p < 0.001" if found["p"] < 0.001 else f"p = {found['p']:.3f}"
        difference = _interval(found["difference"], "+", digits=2)
        yield f"Share of wins, student - teacher: {difference}, {p}."


def _trusted(judge: _Found) -> Iterator[str]:
    if same := judge["agreement"]:
        share = _interval(same, digits=2)
        yield f"Agrees with itself when asked in the other order: {share} of the pairs."
    if first := judge["first_shown"]:
        yield f"Prefers the text shown first: {_interval(first, digits=2)} (0.5 is no bias)."
    if length := judge["length_bias"]:
        longer = _interval(length["longer_wins"], digits=2)
        wins = f"; the longer text wins {longer} of the decided pairs" if longer != "-" else ""
        yield f"Length bias: {_interval(length, '+', digits=2)} (0 is none){wins}."
    else:
        yield (
            "Length bias can't be told: it takes pairs where the student's text is the longer one, "
            "and pairs where it is the shorter one."
        )


def _by_labels(found: _Found | None) -> str:
    if not found:
        return "No human labels: these numbers are uncorrected (--judge-labels)."
    if not found["rate"]:
        return f"These numbers are uncorrected: {found['why']}."
    names = ("observed", "rate", "sensitivity", "specificity")
    observed, rate, sensitivity, specificity = (_interval(found[one], digits=2) for one in names)
    return (
        f"{found['what']}: the judge says {observed}; corrected by {found['rows']} human labels "
        f"{rate} (sensitivity {sensitivity}, specificity {specificity})."
    )


def _interval(
    number: Mapping[str, float] | None, sign: str = "", *, digits: int = 3, ends: bool = True
) -> str:
    """A number, and its interval where the rows can tell one; scores have two digits."""
    if number is None:
        return "-"
    known = number if ends else {"value": number["value"]}
    return interval_text(known, sign, digits=digits)

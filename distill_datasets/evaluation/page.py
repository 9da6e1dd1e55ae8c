"""The report as a page: one file of HTML that asks nothing of any server.

Whatever models and datasets say is escaped, and a policy in the page lets no script run but the
page's own.
"""

import base64
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from math import floor, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from distill_datasets.drawing import Mark, curves, short, whisker
from distill_datasets.evaluation.gate import PASSED, UNSURE
from distill_datasets.evaluation.money import cost_curves, volume_cells
from distill_datasets.evaluation.report_text import label_cells, rounded_up
from distill_datasets.evaluation.systems import TrainedStudent
from distill_datasets.evaluation.verdict import DOES_NOT, REPLACES
from distill_datasets.files import (
    calibration_file,
    cards_folder,
    coverage_file,
    gate_file,
    read_object,
    read_report,
    read_rows,
    report_file,
    rows_file,
    write_file,
)
from distill_datasets.progress import amount_text
from distill_datasets.tables import html_card, html_plot, html_table, interval_text, measured_text
from distill_datasets.training.plots import panels_html

if TYPE_CHECKING:
    from jinja2 import Environment

_MOST_ROWS = 20_000
_MOST_TEXT = 20_000  # characters of a text
_MOST_FLIPS, _FLIP_TEXT = 5, 300
_MOST_LABELS = 30
_SHOWN = ("teacher", "student", "base")  # side by side, in this order
_OUTCOMES = {REPLACES: ("good", "✔"), DOES_NOT: ("bad", "✘")}
_Row = Mapping[str, Any]
_Report = Mapping[str, Any]


def write_page(
    report: Path | str, training: Path | None = None, *, data: _Report | None = None
) -> Path:
    """Write `report.html` beside a `report.json`, out of that and its `rows.jsonl`.

    `report` is that file or a run's folder; `training` is the folder of the student's training,
    looked for in the run's folder unless given; `data` takes the place of what the file holds.
    Returns the page's path. Raises `DatasetError` where there is no report.
    """
    file = report_file(report)
    data = data or read_report(file)
    folder = training or _find_training(file.parent, data)
    record = TrainedStudent.read(folder) if folder else None
    written = file.with_suffix(".html")
    rows = read_rows(file) if rows_file(file).is_file() else ()
    write_file(written, page(data, rows, training=record, beside=_beside_report(file, data)))
    return written


def _beside_report(file: Path, report: _Report) -> dict[str, Any]:
    """What a gate and a calibration found in this very report, and its prompt's coverage."""
    files = (gate_file, coverage_file, calibration_file)
    gate, coverage, calibration = (read_object(find(file)) or {} for find in files)
    here = calibration and calibration.get("report") == report.get("digest")
    return {
        "calibration": calibration if here else None,
        "gate": gate if gate and gate.get("report") == report.get("digest") else None,
        "coverage": coverage if coverage.get("recipe") == report.get("recipe") else None,
    }


def summary_html(report: _Report, page_file: Path) -> str:
    """A report in a notebook: the verdict, what to look at first, and each system's metrics."""
    verdict = report.get("verdict") or {}
    plots = [
        html_table(
            [[line["name"], html_plot(line["drawing"]), line["said"]] for line in scale["lines"]],
            [scale["caption"], f"{scale['low']} to {scale['high']}", scale["unit"]],
        )
        for scale in metrics_facts(report)
    ]
    return html_card(
        verdict.get("outcome") or f"{report['recipe']}: {report['n']:,} rows",
        verdict.get("rule"),
        *(f"⚠ {one}" for one in report.get("alerts") or ()),
        *plots,
        *(f"{one['number']} {one['said']}" for one in tiles_facts(report)),
        f"More: {page_file}",
    )


def _find_training(run: Path, report: _Report) -> Path | None:
    """The training in a run's folder whose checkpoint is the student."""
    student = report["systems"]["student"]["model"]
    for log in sorted(run.glob("train*/checkpoints.jsonl")):
        if json.dumps(student) in log.read_text("utf-8", "replace"):
            return log.parent
    return None


def page(
    report: _Report,
    rows: Iterable[_Row] = (),
    *,
    training: TrainedStudent | None = None,
    beside: Mapping[str, Any] | None = None,
) -> str:
    """The page of a report's `data` and its rows; what is not known is left out.

    `beside` are a `gate`'s findings, a prompt's `coverage` and a `calibration`, as their files
    have them.

    Path("page.html").write_text(page(report.data, report.rows()))
    """
    kept = list(islice(rows, _MOST_ROWS + 1))
    cut, kept = len(kept) > _MOST_ROWS, kept[:_MOST_ROWS]
    script = (cards_folder() / "report.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    best = training.checkpoint.get("step") if training else None
    known = {
        "report": report,
        "verdict": verdict_facts(report),
        "alerts": report.get("alerts") or [],
        "tiles": list(tiles_facts(report)),
        "metrics": list(metrics_facts(report)),
        "differences": list(differences_facts(report)),
        "internalisation": inner_keys(report.get("internalisation")),
        "texts": texts_facts(report),
        "flips": flips_facts(report, kept),
        "checks": list(checks_facts(report)),
        "judge": judge_facts(report.get("judge")),
        "residue": list(residue_facts(report.get("residue"))),
        "gate": gate_facts((beside or {}).get("gate")),
        "coverage": coverage_facts((beside or {}).get("coverage")),
        "calibration": calibration_facts((beside or {}).get("calibration")),
        "rows": rows_facts(report, kept, cut) if kept else None,
        "curves": panels_html(training.metrics, best) if training else [],
        "training_said": training_said(training),
        "confusion": list(confusions_facts(report, kept)),
        "labels": list(label_cells(report)) if report.get("labels") else None,
        "money": money_facts(report.get("money")),
        "latency": latency_facts(report),
        "commands": commands(report, training),
        "provenance": provenance(report, training),
        "script": Markup(script),
        "script_hash": base64.b64encode(digest).decode(),
    }
    return _environment().get_template("report.html").render(known)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(cards_folder()),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        measured=measured_text,
        count="{:,}".format,
        amount=amount_text,
        plain=lambda name: str(name).replace("_", " "),
        shown=shown,
    )
    return environment


def shown(value: Any) -> str:
    """A value of a table, as people read it."""
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)[:_MOST_TEXT]


def verdict_facts(report: _Report) -> dict[str, Any] | None:
    """The verdict with its sign, its interval drawn, and the rows that it lacks."""
    verdict = report.get("verdict")
    if not verdict:
        return None
    kind, sign = _OUTCOMES.get(verdict["outcome"], ("open", "?"))
    difference, margin = verdict.get("difference"), verdict.get("margin")
    scale = None
    if difference and margin is not None:
        lines = [(str(verdict["metric"]), difference)]
        caption = f"Student minus teacher; the dashed lines are 0 and the margin, -{margin:g}"
        scale = _scale(caption, lines, across=(0.0, -margin), around=True)
        scale["unit"] = f"{100 * difference.get('level', 0.95):.0f} % interval"
    needed = verdict.get("rows_needed")
    found = {"kind": kind, "sign": sign, "scale": scale}
    return {**verdict, **found, "needed": needed and rounded_up(needed)}


def _scale(
    caption: str,
    values: Iterable[tuple[str, Mapping[str, float]]],
    *,
    across: Sequence[float] = (),
    around: bool = False,
) -> dict[str, Any]:
    """Values with their intervals on one scale, from 0 to 1 or wider, or `around` 0."""
    known = [(name, value) for name, value in values if isfinite(value["value"])]
    numbers = [value[end] for _, value in known for end in ("value", "low", "high") if end in value]
    if around:
        far = max(map(abs, [*numbers, *across]), default=1.0) or 1.0
        bounds = -far, far
    else:
        bounds = min(0.0, *numbers, 0.0), max(1.0, *numbers)
    lines = [
        {
            "name": name,
            "said": interval_text(value, "+" if around else ""),
            "drawing": whisker(
                value["value"],
                value.get("low"),
                value.get("high"),
                bounds=bounds,
                lines=across,
                colour=place,
            ),
        }
        for place, (name, value) in enumerate(known)
    ]
    low, high = map(short, (float(f"{bounds[0]:.2g}"), float(f"{bounds[1]:.2g}")))
    return {"caption": caption, "low": low, "high": high, "unit": "95 % interval", "lines": lines}


def tiles_facts(report: _Report) -> Iterator[dict[str, str]]:
    """What the student saves, a number each."""
    systems, saved = report["systems"], report.get("prompt_tokens_saved")
    if saved:
        long, short = (systems[name]["tokens"]["prompt_mean"] for name in ("teacher", "student"))
        yield {
            "number": f"{saved['per_query']:,.0f} tokens",
            "said": f"of every prompt: {long:,.0f} become {short:,.0f}, {saved['ratio']:.1f} times "
            "fewer",
        }
    for name, saving in (report.get("money") or {}).get("savings", {}).items():
        if saving.get("percent") is not None:
            amount = f"{amount_text(abs(1e6 * saving['per_query']))} {report['money']['currency']}"
            how = "cheaper" if saving["percent"] >= 0 else "dearer"
            yield {
                "number": f"{floor(10 * abs(saving['percent'])) / 10:g} % {how}",
                "said": f"than the {name}, hosting aside: {amount} a million queries",
            }
    if timed := systems["student"].get("latency_ms"):
        teacher = systems["teacher"]
        anew, kept = teacher.get("latency_uncached_ms"), teacher.get("latency_ms")
        said = [f"{anew['p50']:,.0f} ms, its prompt read anew"] if anew else []
        said += [f"{kept['p50']:,.0f} ms as its server keeps it"] if kept else []
        yield {
            "number": f"{timed['p50']:,.0f} ms",
            "said": f"is the student's median latency; the teacher's: {'; '.join(said)}",
        }


def metrics_facts(report: _Report) -> Iterator[dict[str, Any]]:
    """A scale a metric, every system's interval on it."""
    systems = report["systems"]
    names = dict.fromkeys(name for system in systems.values() for name in system["metrics"])
    for name in names:
        found = [
            (system, one["metrics"][name])
            for system, one in systems.items()
            if name in one["metrics"]
        ]
        yield _scale(name.replace("_", " "), found)


def differences_facts(report: _Report) -> Iterator[dict[str, Any]]:
    """A scale for each system that the student is compared with."""
    for pair, metrics in report.get("differences", {}).items():
        if metrics:
            caption = pair.replace("-", " minus ", 1)
            yield _scale(caption, metrics.items(), across=(0.0,), around=True)


def texts_facts(report: _Report) -> list[dict[str, Any]]:
    """A line a system: its likeness to the teacher's texts, then all that is a number or a text."""
    found = {}
    for name, texts in (report.get("texts") or {}).items():
        inner = {key: value for key, value in texts.items() if key not in ("teacher", "reference")}
        found[name] = {**(texts.get("teacher") or {}), **inner}
    columns = dict.fromkeys(key for cells in found.values() for key in cells)
    return [
        {"name": name, "cells": {key: cells.get(key) for key in columns}}
        for name, cells in found.items()
    ]


def inner_keys(value: Mapping[str, Any] | None) -> dict[str, Any]:
    """What comes with a number and its interval."""
    return {key: one for key, one in (value or {}).items() if key not in ("value", "low", "high")}


def _answer(row: _Row, system: str) -> str | None:
    found = row["systems"].get(system, {}).get("answer")
    return None if found is None else str(found)


def _sides(report: _Report, rows: Sequence[_Row]) -> dict[str, str]:
    """Who alone is right, by row: as the verdict says, or by the references of labels."""
    verdict = report.get("verdict") or {}
    if "only_teacher" in verdict:
        sides = {one: "teacher" for one in verdict["only_teacher"] or ()}
        return sides | {one: "student" for one in verdict.get("only_student") or ()}
    if report.get("free_text"):
        return {}
    found = {}
    for row in rows:
        right = row.get("reference")
        correct = [name for name in ("teacher", "student") if _answer(row, name) == right]
        if right and len(correct) == 1:
            found[row["id"]] = correct[0]
    return found


def flips_facts(report: _Report, rows: Sequence[_Row]) -> list[dict[str, Any]]:
    """The rows where one of teacher and student alone is right."""
    sides = _sides(report, rows)
    found = []
    for who in ("teacher", "student"):
        shown = [row for row in rows if sides.get(row["id"]) == who][:_MOST_FLIPS]
        cells = [
            [_cut(text) for text in (row["query"], row.get("reference") or "", *_both(row))]
            for row in shown
        ]
        count = sum(one == who for one in sides.values())
        found.append({"who": who, "count": count, "rows": cells})
    return found if sides else []


def _both(row: _Row) -> Iterator[str]:
    for name in ("teacher", "student"):
        yield row["systems"].get(name, {}).get("text") or ""


def _cut(text: str, most: int = _FLIP_TEXT) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def checks_facts(report: _Report) -> Iterator[dict[str, Any]]:
    """A scale a check, with what it demands."""
    for name, check in (report.get("checks") or {}).items():
        found = {
            system: one["checks"][name]
            for system, one in report["systems"].items()
            if name in one.get("checks", {})
        }
        if found:
            rows = found.get("student", {}).get("rows")
            scale = _scale("Share of the rows that pass", found.items())
            yield {"name": name, **check, "rows": rows, "scale": scale}


def judge_facts(judge: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a judge says, and all of its numbers."""
    if not judge:
        return None
    more = {name: value for name, value in judge.items() if name != "summary"}
    return {"summary": judge.get("summary", ()), "more": more}


def residue_facts(residue: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A line a test, with its outcome."""
    signs = {True: ("good", "✔ passed"), False: ("bad", "✘ failed")}
    for name, test in (residue or {}).items():
        if isinstance(test, Mapping) and "passed" in test:
            kind, outcome = signs.get(test["passed"], ("", "? not told"))
            found = {"said": "", "what": "", "examples": None, **test}
            yield {**found, "name": name, "kind": kind, "outcome": outcome}


def gate_facts(gate: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Every rule that was looked at, those that fail first."""
    if not gate:
        return None
    kinds = {PASSED: ("good", "✔"), UNSURE: ("", "?")}
    rules = [
        {**one, "bad": one["outcome"] not in kinds, "kind": kind, "sign": sign}
        for one in gate["rules"]
        for kind, sign in [kinds.get(one["outcome"], ("bad", "✘"))]
    ]
    failed = sum(one["bad"] for one in rules)
    said = f"{failed} of {len(rules)} rules fail" if failed else f"none of {len(rules)} rules fails"
    rules.sort(key=lambda one: not one["bad"])
    return {"passed": gate["passed"], "said": said, "rules": rules}


def calibration_facts(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """How much a student may serve alone, by the share in which it may disagree."""
    if not found:
        return None
    curve = [(one["epsilon"], one["served"]) for one in found["curve"]]
    marks = [Mark(one["epsilon"], one["served"], f"{one['served']:.0%}") for one in found["points"]]
    names = {"x": "disagreements allowed", "y": "share served by the student"}
    drawing = curves({names["y"]: curve}, **names, log=(True, False), marks=marks)
    return {**found, "drawing": drawing, "paid": any(one["saved"] for one in found["points"])}


def coverage_facts(coverage: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The rules of the prompt: those that no query exercises, then the others by their effect."""
    if not coverage:
        return None
    rules = sorted(coverage["rules"], key=lambda one: -one["changed"])
    missed = [one["rule"] for one in rules if not one["changed"]]
    return {**coverage, "missed": missed, "rules": [one for one in rules if one["changed"]]}


def rows_facts(report: _Report, rows: Sequence[_Row], cut: bool) -> dict[str, Any]:
    """The rows as JSON that no HTML can hide in: short, for there may be many."""
    systems = sorted(rows[0]["systems"], key=_first_shown)
    checks = list(report.get("checks") or {})
    sides = _sides(report, rows)
    found = {
        "systems": systems,
        "checks": checks,
        "free": bool(report.get("free_text")),
        "rows": [
            [
                row["id"],
                _cut(row["query"], _MOST_TEXT),
                row.get("group"),
                row.get("reference"),
                sides.get(row["id"], ""),
                [_part(row["systems"][name], checks) for name in systems],
            ]
            for row in rows
        ],
    }
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    safe = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return {"cut": cut, "shown": len(rows), "json": Markup(safe)}


def _first_shown(system: str) -> int:
    return _SHOWN.index(system) if system in _SHOWN else len(_SHOWN)


def _part(said: Mapping[str, Any], checks: Sequence[str]) -> list[Any]:
    text, answer = said.get("text") or "", said.get("answer")
    signs = {True: "1", False: "0", None: "-"}
    passed = "".join(signs[said.get("checks", {}).get(name)] for name in checks)
    return [
        _cut(text, _MOST_TEXT),
        0 if answer == text else None if answer is None else _cut(str(answer), _MOST_TEXT),
        said.get("stop_reason"),
        said.get("tokens"),
        passed,
    ]


def training_said(training: TrainedStudent | None) -> str:
    """What was trained, in a line."""
    if training is None or not training.metrics:
        return ""
    rows = training.config.get("dataset", {}).get("rows", {}).get("train")
    on = f" on {rows:,} rows" if rows else ""
    student, steps = training.config.get("student", "A student"), training.metrics[-1]["step"]
    warned = "".join(f" ⚠ {one}." for one in training.warnings)
    return f"{student}, {steps:,} steps{on}.{warned}"


def confusions_facts(report: _Report, rows: Sequence[_Row]) -> Iterator[dict[str, Any]]:
    """What student and teacher answer for each label, where there are few."""
    labels = list(report.get("labels") or {})
    known = [row for row in rows if row.get("reference")]
    if not known or len(labels) > _MOST_LABELS or {row["reference"] for row in known} - {*labels}:
        return
    for system in ("student", "teacher"):
        counts = Counter((row["reference"], _answer(row, system)) for row in known)
        others = sum(n for (_, answer), n in counts.items() if answer not in labels)
        names = [*labels, *(["(other)"] if others else [])]
        yield {
            "system": system,
            "names": names,
            "lines": [_confusion_line(counts, label, names) for label in labels],
        }


def _confusion_line(
    counts: Mapping[tuple[str, str | None], int], label: str, names: Sequence[str]
) -> dict[str, Any]:
    mine = {answer: n for (right, answer), n in counts.items() if right == label}
    total = sum(mine.values())
    other = total - sum(n for answer, n in mine.items() if answer in names)
    cells = [mine.get(name, 0) if name != "(other)" else other for name in names]
    return {
        "name": label,
        "cells": [
            {"n": n, "share": round(n / (total or 1), 3), "right": name == label and n > 0}
            for name, n in zip(names, cells, strict=True)
        ],
    }


def money_facts(money: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What queries cost, and the drawing of it."""
    if not money:
        return None
    return {**money, "cells": list(volume_cells(money)), "drawing": cost_curves(money)}


def latency_facts(report: _Report) -> dict[str, Any] | None:
    """A scale of the median and the 95th percentile of each system."""
    timed = {
        (name if key == "latency_ms" else f"{name}, prompt read anew"): system[key]
        for name, system in report["systems"].items()
        for key in ("latency_ms", "latency_uncached_ms")
        if system.get(key)
    }
    if not timed:
        return None
    longest = max(one["p95"] for one in timed.values())
    lines = [
        {
            "name": name,
            "said": f"{one['p50']:,.0f} / {one['p95']:,.0f} ms",
            "drawing": whisker(
                one["p50"], one["p50"], one["p95"], bounds=(0.0, longest), colour=place
            ),
        }
        for place, (name, one) in enumerate(timed.items())
    ]
    caption = "One query: the dot is the median, the line goes to the 95th percentile"
    high = f"{longest:,.0f} ms"
    return {"caption": caption, "low": "0", "high": high, "unit": "p50 / p95", "lines": lines}


def commands(report: _Report, training: TrainedStudent | None) -> str:
    """What trains and measures the same again."""
    dataset = report["dataset"]
    commit = dataset.get("commit")
    name = dataset["path"].partition("@")[0]
    place = shlex.quote(f"{name}@{commit}" if commit else dataset["path"])
    measuring = f"distill-datasets measure --dataset {place} --split {report['split']}"
    if training is None:
        student = shlex.quote(report["systems"]["student"]["model"])
        return f"{measuring} --student {student} --out report"
    learned = training.config.get("dataset", {}).get("path") or dataset["path"]
    base = shlex.quote(str(training.config.get("student", "")))
    return (
        f"distill-datasets train {shlex.quote(learned)} --student {base} --out student\n"
        f"{measuring} --student student --out report"
    )


def provenance(report: _Report, training: TrainedStudent | None) -> dict[str, str]:
    """What the report is of, by names and digests."""
    from distill_datasets import __version__

    dataset, systems = report["dataset"], report["systems"]
    found = {
        "dataset": f"{dataset['path']}, version {dataset['version']}",
        "content of the dataset": dataset["revision"],
        "commit": dataset.get("commit"),
        **{f"model: {name}": system.get("identity") for name, system in systems.items()},
        "sampling": ", ".join(f"{key} {value}" for key, value in report["sampling"].items()),
        "report": report.get("digest"),
        "page": f"distill-datasets {__version__}",
    }
    if training:
        versions = training.config.get("versions", {})
        found["trained with"] = ", ".join(f"{name} {one}" for name, one in versions.items())
        settings = training.config.get("settings", {})
        found["settings"] = ", ".join(
            f"{name} {value}"
            for name, value in settings.items()
            if value is not None and not isinstance(value, Mapping)
        )
    return {name: str(value) for name, value in found.items() if value}

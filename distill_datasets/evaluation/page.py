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
from distill_datasets.models.references import checkpoints_in
from distill_datasets.progress import amount_text
from distill_datasets.tables import html_card, html_plot, html_table, interval_text, measured_text
from distill_datasets.training.plots import panels_html

if TYPE_CHECKING:
    from jinja2 import Environment

_MOST_ROWS = 20_000
_MOST_TEXT = 20_000  # characters of a text
_MOST_FLIPS, _FLIP_TEXT = 5, 300
_MOST_LABELS = 30
_PAIR = ("teacher", "student")
_SIGNS = {True: "1", False: "0", None: "-"}  # of a check in the rows
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
    folder = training or checkpoints_in(file.parent).get(data["systems"]["student"]["model"])
    record = TrainedStudent.read(folder) if folder else None
    written = file.with_suffix(".html")
    rows = read_rows(file) if rows_file(file).is_file() else ()
    write_file(written, page(data, rows, training=record, beside=_beside_report(file, data)))
    return written


def _beside_report(file: Path, report: _Report) -> dict[str, Any]:
    """What a gate and a calibration found in this very report, and its prompt's coverage."""
    files = (gate_file, coverage_file, calibration_file)
    gate, coverage, calibration = (read_object(find(file)) for find in files)
    digest, recipe = report.get("digest"), report.get("recipe")
    return {
        "gate": gate if gate.get("report") == digest else {},
        "calibration": calibration if calibration.get("report") == digest else {},
        "coverage": coverage if coverage.get("recipe") == recipe else {},
    }


def summary_html(report: _Report, page_file: Path) -> str:
    """A report in a notebook: the verdict, what to look at first, and each system's metrics."""
    verdict = report.get("verdict") or {}
    plots = [
        html_table(
            [[line["name"], html_plot(line["drawing"]), line["said"]] for line in scale["lines"]],
            [scale["caption"], f"{scale['low']} to {scale['high']}", scale["unit"]],
        )
        for scale in _metrics(report)
    ]
    return html_card(
        verdict.get("outcome") or f"{report['recipe']}: {report['n']:,} rows",
        verdict.get("rule"),
        *(f"⚠ {one}" for one in report.get("alerts") or ()),
        *plots,
        *(f"{one['number']} {one['said']}" for one in _tiles(report)),
        f"More: {page_file}",
    )


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
    best = training.checkpoint.get("step") if training else None
    more = {"gate": _gate, "coverage": _coverage, "calibration": _calibration}
    known = {
        "report": report,
        "verdict": _verdict(report),
        "tiles": list(_tiles(report)),
        "metrics": list(_metrics(report)),
        "differences": [
            _scale(pair.replace("-", " minus ", 1), metrics, across=(0.0,), around=True)
            for pair, metrics in report.get("differences", {}).items()
            if metrics
        ],
        "texts": _texts(report),
        "flips": _flips(report, kept),
        "checks": list(_checks(report)),
        "residue": _residue(report.get("residue") or {}),
        **{
            name: show(found) if (found := (beside or {}).get(name)) else None
            for name, show in more.items()
        },
        "rows": _rows(report, kept, cut) if kept else None,
        "curves": panels_html(training.metrics, best) if training else [],
        "training_said": _trained(training),
        "confusion": list(_confusions(report, kept)),
        "labels": list(label_cells(report)) if report.get("labels") else None,
        "money": report.get("money"),
        "latency": _latency(report),
        "commands": _commands(report, training),
        "provenance": _provenance(report, training),
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
    script = (cards_folder() / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals.update(
        script=Markup(script),
        script_hash=digest,
        cost_curves=cost_curves,
        volume_cells=volume_cells,
    )
    environment.filters.update(
        measured=measured_text,
        count="{:,}".format,
        amount=amount_text,
        plain=lambda name: str(name).replace("_", " "),
        shown=_shown,
        without=lambda value, *names: {key: one for key, one in value.items() if key not in names},
    )
    return environment


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)[:_MOST_TEXT]


def _verdict(report: _Report) -> dict[str, Any] | None:
    """The verdict with its sign, its interval drawn, and the rows that it lacks."""
    verdict = report.get("verdict")
    if not verdict:
        return None
    kind, sign = _OUTCOMES.get(verdict["outcome"], ("open", "?"))
    difference, margin, scale = verdict.get("difference"), verdict.get("margin"), None
    if difference and margin is not None:
        caption = f"Student minus teacher; the dashed lines are 0 and the margin, -{margin:g}"
        lines = {str(verdict["metric"]): difference}
        scale = _scale(caption, lines, across=(0.0, -margin), around=True)
        scale["unit"] = f"{100 * difference.get('level', 0.95):.0f} % interval"
    needed = verdict.get("rows_needed")
    found = {"kind": kind, "sign": sign, "scale": scale}
    return {**verdict, **found, "needed": needed and rounded_up(needed)}


def _scale(
    caption: str,
    values: Mapping[str, Mapping[str, float]],
    *,
    across: Sequence[float] = (),
    around: bool = False,
) -> dict[str, Any]:
    """Values with their intervals on one scale, from 0 to 1 or wider, or `around` 0."""
    known = {name: value for name, value in values.items() if isfinite(value["value"])}
    ends = ("value", "low", "high")
    numbers = [value[end] for value in known.values() for end in ends if end in value]
    if around:
        far = max(map(abs, [*numbers, *across]), default=1.0) or 1.0
        bounds = -far, far
    else:
        bounds = min(0.0, *numbers, 0.0), max(1.0, *numbers)
    low, high = (short(float(f"{bound:.2g}")) for bound in bounds)
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
        for place, (name, value) in enumerate(known.items())
    ]
    return {"caption": caption, "low": low, "high": high, "unit": "95 % interval", "lines": lines}


def _tiles(report: _Report) -> Iterator[dict[str, str]]:
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


def _metrics(report: _Report) -> Iterator[dict[str, Any]]:
    systems = report["systems"]
    for name in dict.fromkeys(name for one in systems.values() for name in one["metrics"]):
        yield _scale(name.replace("_", " "), _by_system(report, "metrics", name))


def _by_system(report: _Report, key: str, name: str) -> dict[str, Any]:
    """A metric or a check of every system that has it."""
    systems = report["systems"].items()
    return {system: one[key][name] for system, one in systems if name in one.get(key, {})}


def _texts(report: _Report) -> list[dict[str, Any]]:
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


def _answer(row: _Row, system: str) -> str | None:
    found = row["systems"].get(system, {}).get("answer")
    return None if found is None else str(found)


def _sides(report: _Report, rows: Sequence[_Row]) -> dict[str, str]:
    """Who alone is right, by row: as the verdict says, or by the references of labels."""
    verdict = report.get("verdict") or {}
    if "only_teacher" in verdict:
        return {one: who for who in _PAIR for one in verdict.get(f"only_{who}") or ()}
    found = {}
    for row in () if report.get("free_text") else rows:
        right = row.get("reference")
        correct = [name for name in _PAIR if _answer(row, name) == right]
        if right and len(correct) == 1:
            found[row["id"]] = correct[0]
    return found


def _flips(report: _Report, rows: Sequence[_Row]) -> list[dict[str, Any]]:
    sides, found = _sides(report, rows), []
    for who in _PAIR if sides else ():
        shown = [row for row in rows if sides.get(row["id"]) == who][:_MOST_FLIPS]
        texts = [
            [row["query"], row.get("reference"), *(row["systems"][one]["text"] for one in _PAIR)]
            for row in shown
        ]
        cells = [[_cut(text or "", _FLIP_TEXT) for text in row] for row in texts]
        found.append({"who": who, "count": [*sides.values()].count(who), "rows": cells})
    return found


def _cut(text: str, most: int = _MOST_TEXT) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def _checks(report: _Report) -> Iterator[dict[str, Any]]:
    for name, check in (report.get("checks") or {}).items():
        if found := _by_system(report, "checks", name):
            scale = _scale("Share of the rows that pass", found)
            rows = found.get("student", {}).get("rows")
            yield {"name": name, **check, "rows": rows, "scale": scale}


def _residue(residue: Mapping[str, Any]) -> list[dict[str, Any]]:
    signs = {True: ("good", "✔ passed"), False: ("bad", "✘ failed"), None: ("", "? not told")}
    return [
        {"examples": None, **test, "name": name, "kind": kind, "outcome": outcome}
        for name, test in residue.items()
        for kind, outcome in [signs[test["passed"]]]
    ]


def _gate(gate: Mapping[str, Any]) -> dict[str, Any]:
    """Every rule that was looked at, those that fail first."""
    kinds = {PASSED: ("good", "✔"), UNSURE: ("", "?")}
    rules = [
        {**one, "kind": kind, "sign": sign}
        for one in sorted(gate["rules"], key=lambda one: one["outcome"] in kinds)
        for kind, sign in [kinds.get(one["outcome"], ("bad", "✘"))]
    ]
    failed = sum(one["kind"] == "bad" for one in rules)
    said = f"{failed} of {len(rules)} rules fail" if failed else f"none of {len(rules)} rules fails"
    return {"passed": gate["passed"], "said": said, "rules": rules}


def _calibration(found: Mapping[str, Any]) -> dict[str, Any]:
    """How much a student may serve alone, by the share in which it may disagree."""
    names = {"x": "disagreements allowed", "y": "share served by the student"}
    line = {names["y"]: [(one["epsilon"], one["served"]) for one in found["curve"]]}
    marks = [Mark(one["epsilon"], one["served"], f"{one['served']:.0%}") for one in found["points"]]
    drawing = curves(line, **names, log=(True, False), marks=marks)
    return {**found, "drawing": drawing, "paid": any(one["saved"] for one in found["points"])}


def _coverage(coverage: Mapping[str, Any]) -> dict[str, Any]:
    """The rules of the prompt: those that no query exercises, then the others by their effect."""
    rules = sorted(coverage["rules"], key=lambda one: -one["changed"])
    missed = [one["rule"] for one in rules if not one["changed"]]
    return {**coverage, "missed": missed, "rules": [one for one in rules if one["changed"]]}


def _rows(report: _Report, rows: Sequence[_Row], cut: bool) -> dict[str, Any]:
    """The rows as JSON that no HTML can hide in: short, for there may be many."""
    first = {name: place for place, name in enumerate(("teacher", "student", "base"))}
    systems = sorted(rows[0]["systems"], key=lambda name: first.get(name, len(first)))
    checks = list(report.get("checks") or {})
    sides = _sides(report, rows)
    found = {
        "systems": systems,
        "checks": checks,
        "free": bool(report.get("free_text")),
        "rows": [
            [
                row["id"],
                _cut(row["query"]),
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


def _part(said: Mapping[str, Any], checks: Sequence[str]) -> list[Any]:
    text, answer, passed = said.get("text") or "", said.get("answer"), said.get("checks", {})
    return [
        _cut(text),
        0 if answer == text else None if answer is None else _cut(str(answer)),
        said.get("stop_reason"),
        said.get("tokens"),
        "".join(_SIGNS[passed.get(name)] for name in checks),
    ]


def _trained(training: TrainedStudent | None) -> str:
    if training is None or not training.metrics:
        return ""
    rows = training.config.get("dataset", {}).get("rows", {}).get("train")
    on = f" on {rows:,} rows" if rows else ""
    student, steps = training.config.get("student", "A student"), training.metrics[-1]["step"]
    warned = "".join(f" ⚠ {one}." for one in training.warnings)
    return f"{student}, {steps:,} steps{on}.{warned}"


def _confusions(report: _Report, rows: Sequence[_Row]) -> Iterator[dict[str, Any]]:
    """What student and teacher answer for each label, where there are few."""
    labels = list(report.get("labels") or {})
    known = [row for row in rows if row.get("reference")]
    if not known or len(labels) > _MOST_LABELS or {row["reference"] for row in known} - {*labels}:
        return
    for system in ("student", "teacher"):
        answers = [(row["reference"], _answer(row, system)) for row in known]
        counts = Counter((right, one if one in labels else "(other)") for right, one in answers)
        names = [*labels, *(["(other)"] if any(one == "(other)" for _, one in counts) else [])]
        totals = Counter(right for right, _ in answers)
        lines = [
            {
                "name": label,
                "cells": [
                    {"n": n, "share": round(n / (totals[label] or 1), 3), "right": right and n > 0}
                    for name in names
                    for n, right in [(counts[label, name], name == label)]
                ],
            }
            for label in labels
        ]
        yield {"system": system, "names": names, "lines": lines}


def _latency(report: _Report) -> dict[str, Any] | None:
    timed = {
        (name if key == "latency_ms" else f"{name}, prompt read anew"): system[key]
        for name, system in report["systems"].items()
        for key in ("latency_ms", "latency_uncached_ms")
        if system.get(key)
    }
    if not timed:
        return None
    caption = "One query: the dot is the median, the line goes to the 95th percentile"
    ends = {
        name: {"value": one["p50"], "low": one["p50"], "high": one["p95"]}
        for name, one in timed.items()
    }
    scale = _scale(caption, ends)
    for line, one in zip(scale["lines"], timed.values(), strict=True):
        line["said"] = f"{one['p50']:,.0f} / {one['p95']:,.0f} ms"
    longest = max(1.0, *(one["p95"] for one in timed.values()))
    return {**scale, "high": f"{longest:,.0f} ms", "unit": "p50 / p95"}


def _commands(report: _Report, training: TrainedStudent | None) -> str:
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


def _provenance(report: _Report, training: TrainedStudent | None) -> dict[str, str]:
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

"""The report as a page: one file of HTML that asks nothing of any server.

Whatever models and datasets say is escaped, and a policy in the page lets no script run but the
page's own.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from distill_datasets import html, resources
from distill_datasets.evaluation import page_facts as facts
from distill_datasets.evaluation.report_text import label_cells
from distill_datasets.evaluation.systems import TrainedStudent
from distill_datasets.files import write_file
from distill_datasets.progress import amount_text
from distill_datasets.report_files import (
    calibration_file,
    coverage_file,
    gate_file,
    read_object,
    read_report,
    read_rows,
    report_file,
    rows_file,
)
from distill_datasets.training.tracking import panels_html

if TYPE_CHECKING:
    from jinja2 import Environment

_MOST_ROWS = 20_000
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
        html.table(
            [[line["name"], html.plot(line["drawing"]), line["said"]] for line in scale["lines"]],
            [scale["caption"], f"{scale['low']} to {scale['high']}", scale["unit"]],
        )
        for scale in facts.metrics_facts(report)
    ]
    return html.card(
        verdict.get("outcome") or f"{report['recipe']}: {report['n']:,} rows",
        verdict.get("rule"),
        *(f"⚠ {one}" for one in report.get("alerts") or ()),
        *plots,
        *(f"{one['number']} {one['said']}" for one in facts.tiles_facts(report)),
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
    script = (resources.cards() / "report.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    best = training.checkpoint.get("step") if training else None
    known = {
        "report": report,
        "verdict": facts.verdict_facts(report),
        "alerts": report.get("alerts") or [],
        "tiles": list(facts.tiles_facts(report)),
        "metrics": list(facts.metrics_facts(report)),
        "differences": list(facts.differences_facts(report)),
        "internalisation": facts.beside(report.get("internalisation")),
        "texts": facts.texts_facts(report),
        "flips": facts.flips_facts(report, kept),
        "checks": list(facts.checks_facts(report)),
        "judge": facts.judge_facts(report.get("judge")),
        "residue": list(facts.residue_facts(report.get("residue"))),
        "gate": facts.gate_facts((beside or {}).get("gate")),
        "coverage": facts.coverage_facts((beside or {}).get("coverage")),
        "calibration": facts.calibration_facts((beside or {}).get("calibration")),
        "rows": facts.rows_facts(report, kept, cut) if kept else None,
        "curves": panels_html(training.metrics, best) if training else [],
        "training_said": facts.training_said(training),
        "confusion": list(facts.confusions_facts(report, kept)),
        "labels": list(label_cells(report)) if report.get("labels") else None,
        "money": facts.money_facts(report.get("money")),
        "latency": facts.latency_facts(report),
        "commands": facts.commands(report, training),
        "provenance": facts.provenance(report, training),
        "script": Markup(script),
        "script_hash": base64.b64encode(digest).decode(),
    }
    return _environment().get_template("report.html").render(known)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(resources.cards()),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        measured=html.measured,
        count="{:,}".format,
        amount=amount_text,
        plain=lambda name: str(name).replace("_", " "),
        shown=facts.shown,
    )
    return environment

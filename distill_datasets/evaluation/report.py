"""Base, teacher and student on the same held-out rows: a report and the student's model card."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.conversations import readable
from distill_datasets.errors import GenerationError
from distill_datasets.evaluation import report_text
from distill_datasets.evaluation.latency import measure_latency
from distill_datasets.evaluation.settings import MeasureSettings
from distill_datasets.evaluation.systems import (
    UNCACHED,
    HeldOut,
    TrainedStudent,
    explained,
    find_training,
    greedy,
    latency_note,
    open_systems,
    read_held_out,
    say_requests,
    timed_systems,
)
from distill_datasets.files import one_writer, write_file
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient
from distill_datasets.generation.rate_limit import Limits
from distill_datasets.generation.rows import ask
from distill_datasets.generation.teachers import Answerer, PromptedModel
from distill_datasets.models.sampler import Sampler, digest
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.recipes.sections import Check
from distill_datasets.schema import failure_text

if TYPE_CHECKING:
    from datasets import Dataset

    from distill_datasets.evaluation.comparison import Comparison
    from distill_datasets.evaluation.metrics import Metrics

_VERSION = 3  # goes into every report's digest: raise it when reports come out differently


@dataclass(frozen=True)
class Report:
    """What `measure` found: `data` as it stands in the file `path`."""

    path: Path
    data: Mapping[str, Any]

    def table(self) -> str:
        """The systems, what sets the student apart and, where there are few, the rows."""
        return report_text.table(self.data)


def measure(
    dataset: str | Path,
    *,
    student: Sampler | str | Path,
    out: str | Path,
    teacher: Sampler | str | None = None,
    base: Sampler | str | None = None,
    settings: MeasureSettings | None = None,
) -> Report:
    """Ask base, teacher and student every query of a release's split, and compare them.

    `student` is a training folder (or a run's folder with `train/`) or a model reference; the
    teacher is the release's, and the base what the student was trained from, unless given.
    Writes `out/report.json`, `report.md` and `model_card.md`; for a split other than test
    `report-<split>.json` and `.md`. Answers are at temperature 0 and kept in
    `out/journal.sqlite`: another call asks only for timings, and for nothing where its report
    exists. A line on standard error says what is asked, beforehand. Raises `DatasetError`,
    `RecipeError`, `SettingsError`, `ModelError` or `OutputError` before anything is asked, and
    `GenerationError` when a row failed: no report leaves rows out.

        report = measure("runs/demo/release", student="runs/demo/train", out="runs/demo")
        print(report.table())
    """
    from distill_datasets.evaluation.comparison import Comparison
    from distill_datasets.evaluation.metrics import Metrics

    settings = settings or MeasureSettings()
    held_out = read_held_out(dataset, split=settings.split, limit=settings.limit)
    recipe = held_out.recipe
    metrics = Metrics.load(recipe.metrics, settings.metrics, held_out.rows["reference"])
    training = find_training(student)
    systems = open_systems(held_out, student=student, training=training, teacher=teacher, base=base)
    key = _key(held_out, systems, training, metrics)
    name = "report.json" if settings.split == "test" else f"report-{settings.split}.json"
    path = Path(out) / name
    with one_writer(Path(out), "report"):
        if known := _known(path, key):
            return Report(path, known)
        answers = _ask_all(held_out, systems, path.with_name("journal.sqlite"), settings)
        data = _data(held_out, systems, Comparison(answers, metrics, recipe))
        if training:
            data["systems"]["student"]["model"] = training.checkpoint["sampler"]
        report = Report(path, {**data, "digest": key})
        _write(report, held_out, training)
    return report


def _ask_all(
    held_out: HeldOut, systems: Mapping[str, Answerer], journal: Path, settings: MeasureSettings
) -> "dict[str, Dataset]":
    answers = {}
    with Journal(journal) as kept:
        say_requests(held_out, systems, kept)
        for name, system in systems.items():
            client = CachedClient(kept, limits=Limits(settings.concurrency))
            answers[name] = _complete(ask(held_out.rows, system, client, title=name), name)
    return answers


def _complete(rows: "Dataset", system: str) -> "Dataset":
    pairs = zip(rows["query"], rows["error"], strict=True)
    failed = [(query, error) for query, error in pairs if error]
    if failed:
        query, error = readable(failed[0][0])[:80], failed[0][1]
        raise GenerationError(
            f"{len(failed)} of {len(rows)} rows of the {system} failed, the first for the query "
            f"{query!r}: {failure_text(error)}. No report is written without them. Run "
            "again: what was paid is kept, and only those are asked."
        )
    return rows


def _data(
    held_out: HeldOut, systems: Mapping[str, Answerer], comparison: "Comparison"
) -> dict[str, Any]:
    manifest, sampling = held_out.manifest, greedy(held_out.recipe)
    checks = held_out.recipe.all_checks
    latency = measure_latency(timed_systems(held_out, systems))
    measured = {
        name: {
            "model": system.model,
            "identity": system.identity,
            "prompt": name == "teacher",
            "metrics": comparison.metrics_of(name),
            **({"checks": comparison.checks_of(name)} if checks else {}),
            "answers": comparison.variety(name),
            "tokens": comparison.tokens(name),
            "latency_ms": latency[name],
        }
        for name, system in systems.items()
    }
    measured["teacher"]["latency_uncached_ms"] = latency[UNCACHED]
    data = {
        "recipe": held_out.recipe.name,
        "dataset": {
            **_place(held_out),
            "version": manifest["version"],
            "revision": manifest["content_digest"],
            "rows": sum(manifest["splits"].values()),
        },
        "split": held_out.split,
        "n": len(held_out.rows),
        "systems": measured,
        "differences": comparison.differences(),
        **(_checks(checks, comparison) if checks else {}),
        "internalisation": _internalisation(held_out, systems, comparison.answers["teacher"]),
        **_savings(measured),
        "labels": comparison.labels(),
        "rows": comparison.rows(),
        "sampling": {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens},
    }
    notes = [
        *report_text.one_answer(data),
        *comparison.notes(),
        *explained(systems, held_out),
        *report_text.costs(data),
        latency_note(len(held_out.rows)),
    ]
    return {**data, "notes": notes}


def _checks(checks: Mapping[str, Check], comparison: "Comparison") -> dict[str, Any]:
    """What each check demands and which rule it covers, and what sets the student apart."""
    said = {name: {"demands": one.demand, "covers": one.covers} for name, one in checks.items()}
    return {"checks": said, "check_differences": comparison.check_differences()}


def _internalisation(
    held_out: HeldOut, systems: Mapping[str, Answerer], rows: "Dataset"
) -> dict[str, Any] | None:
    """The score over the teacher's usable answers; None where a system can't score given text."""
    from distill_datasets.training.internalisation import TeacherAnswer, measure_internalisation

    connections = {
        name: system.sampler.connection
        for name, system in systems.items()
        if isinstance(system, PromptedModel) and hasattr(system.sampler, "connection")
    }
    recipe = held_out.recipe
    answers = [
        TeacherAnswer.to(recipe, row, row["raw"], part.write_response(row["raw"], row["answer"]))
        for row in rows
        if row["answer"] is not None
        for part, _ in [recipe.part(row["query"])]
    ]
    if not answers or len(connections) < len(systems):
        return None
    return measure_internalisation(answers, connections)


def _place(held_out: HeldOut) -> dict[str, str]:
    """Where the rows are: a folder here, or a commit on the Hub."""
    if held_out.commit is None:
        return {"path": str(held_out.path)}
    return {"path": held_out.reference, "commit": held_out.commit}


def _savings(systems: Mapping[str, Any]) -> dict[str, Any]:
    """What leaving the prompt out saves: prompt tokens a query, and how many times the time."""
    teacher, student = systems["teacher"], systems["student"]
    long, short = teacher["tokens"]["prompt_mean"], student["tokens"]["prompt_mean"]
    each = student["latency_ms"]["p50"]
    counted = {"per_query": long - short, "ratio": long / short} if long and short else None
    return {
        "prompt_tokens_saved": counted,
        "latency_ratio": {
            "teacher": teacher["latency_ms"]["p50"] / each,
            "teacher_uncached": teacher["latency_uncached_ms"]["p50"] / each,
        },
    }


def _key(
    held_out: HeldOut,
    systems: Mapping[str, Answerer],
    training: TrainedStudent | None,
    metrics: "Metrics",
) -> str:
    """The digest of everything that a report depends on but time."""
    return digest(
        {
            "version": _VERSION,
            "revision": held_out.manifest["content_digest"],
            "metrics": metrics.key,
            **_measured_by(held_out.recipe),
            "split": held_out.split,
            "rows": list(held_out.rows["id"]),
            "systems": {name: system.identity for name, system in systems.items()},
            "checkpoint": training.checkpoint if training else None,
        }
    )


def _measured_by(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of measuring alone, which changes no row."""
    parts = [*recipe.members.values()] or [recipe]
    confidences = [part.answer.confidence for part in parts if part.answer.confidence]
    checks = [[name, one.model_dump(mode="json")] for name, one in recipe.all_checks.items()]
    return {
        **({"confidences": confidences} if confidences else {}),
        **({"checks": checks} if checks else {}),
    }


def _known(path: Path, key: str) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and data.get("digest") == key else None


def _write(report: Report, held_out: HeldOut, training: TrainedStudent | None) -> None:
    """The report's file comes last: where it stands, the others do."""
    from distill_datasets.releases import cards

    write_file(report.path.with_suffix(".md"), report_text.markdown(report.data))
    if training and held_out.split == "test":
        facts = {**training.config, "checkpoint": training.checkpoint}
        card = cards.model_card(report.data, facts, held_out.recipe)
        write_file(report.path.with_name("model_card.md"), card)
    text = json.dumps(report.data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(report.path, text)

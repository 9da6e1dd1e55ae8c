"""Base, teacher and student on the same held-out rows: a report and the student's model card."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets import report_text
from distill_datasets.asking import Asking, ask
from distill_datasets.errors import GenerationError, ModelError, OutputError
from distill_datasets.generation import writable_folder
from distill_datasets.heldout import HeldOut, read_held_out
from distill_datasets.journal import Journal
from distill_datasets.latency import Timed, measure_latency, uncacheable
from distill_datasets.sampler import Sampler, Sampling, digest

if TYPE_CHECKING:
    from datasets import Dataset

    from distill_datasets.comparison import Comparison

_VERSION = 2  # goes into every report's digest: raise it when reports come out differently
_TIMED_ROWS = 20
_UNCACHED = "teacher, uncached"


@dataclass(frozen=True)
class Report:
    """What `measure` found: `data` as it stands in the file `path`."""

    path: Path
    data: Mapping[str, Any]

    def table(self) -> str:
        """The systems, what sets the student apart and, where there are few, the rows."""
        return report_text.table(self.data)


@dataclass(frozen=True)
class _Training:
    """A training folder's configuration, and the line of its best checkpoint."""

    folder: Path
    config: Mapping[str, Any]
    checkpoint: Mapping[str, Any]


def measure(  # noqa: PLR0913 (three systems, and where, on what and how fast to ask them)
    dataset: str | Path,
    *,
    student: Sampler | str | Path,
    out: str | Path,
    teacher: Sampler | str | None = None,
    base: Sampler | str | None = None,
    split: str = "test",
    limit: int | None = None,
    concurrency: int = 256,
) -> Report:
    """Ask base, teacher and student every query of a release's split, and compare them.

    `student` is a training folder (or a run's folder with `train/`) or a model reference; the
    teacher is the release's, and the base what the student was trained from, unless given.
    Writes `out/report.json`, `report.md` and `model_card.md`; for a split other than test
    `report-<split>.json` and `.md`. Answers are at temperature 0 and kept in
    `out/journal.sqlite`: another call asks only for timings, and for nothing where its report
    exists. Raises `GenerationError` when a row failed: no report leaves rows out.
    """
    from distill_datasets.comparison import Comparison, load_metrics

    held_out = read_held_out(dataset, split=split, limit=limit)
    metrics = load_metrics(held_out.recipe.metrics)
    folder = writable_folder(out)
    training = _find_training(student)
    opened = _open(training.folder if training else student)
    samplers = _samplers(held_out, opened, training, teacher, base)
    key = _key(held_out, samplers, training)
    path = folder / ("report.json" if split == "test" else f"report-{split}.json")
    if known := _known(path, key):
        return Report(path, known)
    systems = _systems(held_out, samplers)
    answers = {}
    with Journal(folder / "journal.sqlite") as journal:
        for name, system in systems.items():
            rows = ask(held_out.rows, system, journal=journal, concurrency=concurrency, title=name)
            answers[name] = _complete(rows, name)
    data = _data(held_out, systems, Comparison(answers, metrics))
    if training:
        data["systems"]["student"]["model"] = training.checkpoint["sampler"]
    report = Report(path, {**data, "digest": key})
    _write(report, held_out, training)
    return report


def _find_training(student: Sampler | str | Path) -> _Training | None:
    """A training folder's facts; None for anything else, which is opened as it is."""
    from distill_datasets.connection import read_training

    if not isinstance(student, str | Path):
        return None
    for folder in (Path(student), Path(student) / "train"):
        if (folder / "checkpoints.jsonl").is_file():
            return _Training(folder, *read_training(folder))
    return None


def _samplers(
    held_out: HeldOut,
    student: Sampler,
    training: _Training | None,
    teacher: Sampler | str | None,
    base: Sampler | str | None,
) -> dict[str, Sampler]:
    """All three; the student is open first, since its server holds its checkpoints too."""
    manifest = held_out.manifest
    if teacher is None or teacher == manifest["teacher"]:
        asked = _open(manifest["teacher"], manifest["renderer"])
    else:
        asked = _open(teacher)
    if base is None:
        untrained = _open(*_base_of(student, training))
    else:
        untrained = _open(base, training.config["renderer"] if training else None)
    return {"base": untrained, "teacher": asked, "student": student}


def _open(given: Sampler | str | Path, renderer: str | None = None) -> Sampler:
    if not isinstance(given, str | Path):
        return given
    from distill_datasets.samplers import open_sampler

    return open_sampler(given, renderer=renderer)


def _base_of(student: Sampler, training: _Training | None) -> tuple[str, str]:
    """The model that a student was trained from, and the renderer they share."""
    if training:
        return training.config["student"], training.config["renderer"]
    connection = getattr(student, "connection", None)
    if connection is not None and student.model.startswith("tinker://"):
        return f"tinker:{connection.base_model}", connection.renderer_name
    raise ModelError(
        f"{student.model!r} doesn't say what it was trained from: expected a training folder or "
        "tinker://<run>/sampler_weights/<name>. Name the untrained model with `base`."
    )


def _systems(held_out: HeldOut, samplers: Mapping[str, Sampler]) -> dict[str, Asking]:
    recipe = held_out.recipe
    sampling = Sampling(temperature=0.0, max_tokens=recipe.sampling.max_tokens, seed=0)
    asked = {
        name: Asking(
            sampler, sampling, recipe.student_messages, recipe.student_reader, lambda text, _: text
        )
        for name, sampler in samplers.items()
    }
    asked["teacher"] = replace(
        asked["teacher"],
        # Where the recipe stops the teacher decides what can be read from its text.
        sampling=replace(sampling, stop=recipe.sampling.stop),
        messages=recipe.messages,
        reader=recipe.teacher_reader,
    )
    return asked


def _complete(rows: "Dataset", system: str) -> "Dataset":
    errors = [error for error in rows["error"] if error]
    if errors:
        raise GenerationError(
            f"{len(errors)} of {len(rows)} rows of the {system} failed, the first with: "
            f"{errors[0]}. No report is written without them. Run again: it asks only for those."
        )
    return rows


def _data(
    held_out: HeldOut, systems: Mapping[str, Asking], comparison: "Comparison"
) -> dict[str, Any]:
    manifest, sampling = held_out.manifest, systems["student"].sampling
    latency = _latency(held_out, systems)
    measured = {
        name: {
            "model": system.sampler.model,
            "identity": system.sampler.identity,
            "prompt": name == "teacher",
            "metrics": comparison.metrics_of(name),
            "tokens": comparison.tokens(name),
            "latency_ms": latency[name],
        }
        for name, system in systems.items()
    }
    measured["teacher"]["latency_uncached_ms"] = latency[_UNCACHED]
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
        "internalisation": _internalisation(held_out, systems, comparison.answers["teacher"]),
        **_savings(measured),
        "labels": comparison.labels(),
        "rows": comparison.rows(),
        "sampling": {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens},
    }
    notes = [*comparison.notes(), *report_text.costs(data), _latency_note(len(held_out.rows))]
    return {**data, "notes": notes}


def _internalisation(
    held_out: HeldOut, systems: Mapping[str, Asking], rows: "Dataset"
) -> dict[str, Any] | None:
    """The score over the teacher's usable answers; None where a system can't score given text."""
    from distill_datasets.internalisation import Answered, measure_internalisation

    connections = {
        name: system.sampler.connection
        for name, system in systems.items()
        if hasattr(system.sampler, "connection")
    }
    recipe = held_out.recipe
    answers = [
        Answered(
            group=row["group"],
            asked=recipe.messages(row["query"]),
            said=row["raw"],
            query=recipe.student_messages(row["query"]),
            response=recipe.write_response(row["raw"], row["answer"]),
        )
        for row in rows
        if row["answer"] is not None
    ]
    if not answers or len(connections) < len(systems):
        return None
    return measure_internalisation(answers, connections)


def _place(held_out: HeldOut) -> dict[str, str]:
    """Where the rows are: a folder here, or a commit on the Hub."""
    if held_out.commit is None:
        return {"path": str(held_out.path)}
    return {"path": held_out.reference, "commit": held_out.commit}


def _latency(held_out: HeldOut, systems: Mapping[str, Asking]) -> dict[str, dict[str, float]]:
    """Of every system, and of the teacher with its prompt read anew each time."""
    rows = held_out.rows[:_TIMED_ROWS]["query"]
    queries = [rows[-1], *rows]
    timed = {
        name: Timed(system.sampler, [system.messages(query) for query in queries], system.sampling)
        for name, system in systems.items()
    }
    teacher = timed["teacher"]
    cold = [uncacheable(messages) for messages in teacher.conversations]
    return measure_latency({**timed, _UNCACHED: replace(teacher, conversations=cold)})


def _latency_note(rows: int) -> str:
    return (
        f"Latency is that of the first {min(rows, _TIMED_ROWS)} rows, one request at a time and "
        "the systems in turns, from this client. A server may keep the teacher's prompt in its "
        "cache; uncached requests put a new line before the prompt, so that it is read anew."
    )


def _savings(systems: Mapping[str, Any]) -> dict[str, Any]:
    """What leaving the prompt out saves: prompt tokens a query, and how many times the time."""
    teacher, student = systems["teacher"], systems["student"]
    long, short = teacher["tokens"]["prompt_mean"], student["tokens"]["prompt_mean"]
    each = student["latency_ms"]["p50"]
    return {
        "prompt_tokens_saved": {"per_query": long - short, "ratio": long / short},
        "latency_ratio": {
            "teacher": teacher["latency_ms"]["p50"] / each,
            "teacher_uncached": teacher["latency_uncached_ms"]["p50"] / each,
        },
    }


def _key(held_out: HeldOut, samplers: Mapping[str, Sampler], training: _Training | None) -> str:
    """Names everything that a report depends on but time."""
    return digest(
        {
            "version": _VERSION,
            "revision": held_out.manifest["content_digest"],
            "metrics": held_out.recipe.metrics,
            "split": held_out.split,
            "rows": list(held_out.rows["id"]),
            "systems": {name: sampler.identity for name, sampler in samplers.items()},
            "checkpoint": training.checkpoint if training else None,
        }
    )


def _known(path: Path, key: str) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return data if isinstance(data, dict) and data.get("digest") == key else None


def _write(report: Report, held_out: HeldOut, training: _Training | None) -> None:
    """The report's file comes last and at once: where it stands, the others do."""
    from distill_datasets import card

    files = {report.path.with_suffix(".md"): report_text.markdown(report.data)}
    if training and held_out.split == "test":
        facts = {**training.config, "checkpoint": training.checkpoint}
        text = card.model_card(report.data, facts, held_out.recipe)
        files[report.path.with_name("model_card.md")] = text
    files[report.path] = json.dumps(report.data, indent=2, ensure_ascii=False) + "\n"
    try:
        for path, text in files.items():
            building = path.with_name(f".{path.name}.partial")
            building.write_text(text, encoding="utf-8")
            building.replace(path)
    except OSError as error:
        raise OutputError(
            f"Can't write {str(report.path)!r}: {error}. The answers are in the journal beside "
            "it; free some space and run again: only timings are asked for."
        ) from error

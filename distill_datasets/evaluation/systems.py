"""The three systems that a report compares: who answers, how it is asked, how long it takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from distill_datasets.errors import ModelError
from distill_datasets.evaluation.heldout import HeldOut
from distill_datasets.evaluation.latency import Timed, Unkept, measure_latency, uncacheable
from distill_datasets.generation.teachers import (
    Answerer,
    PromptedModel,
    Teachers,
    open_teachers,
)
from distill_datasets.models.sampler import Sampler, Sampling
from distill_datasets.recipes.recipe import Recipe

_TIMED_ROWS = 20
UNCACHED = "teacher, uncached"


@dataclass(frozen=True)
class Training:
    """A training folder's configuration, and the line of its best checkpoint."""

    folder: Path
    config: Mapping[str, Any]
    checkpoint: Mapping[str, Any]


def find_training(student: Sampler | str | Path) -> Training | None:
    """A training folder's facts; None for anything else, which is opened as it is."""
    if not isinstance(student, str | Path):
        return None
    from distill_datasets.models import references

    folder = references.find_training(student)
    return None if folder is None else Training(folder, *references.read_training(folder))


def open_systems(
    held_out: HeldOut,
    *,
    student: Sampler | str | Path,
    training: Training | None,
    teacher: Sampler | str | None,
    base: Sampler | str | None,
) -> dict[str, Answerer]:
    """All three; the student is open first, since its server holds its checkpoints too."""
    recipe = held_out.recipe
    opened = _open(training.folder if training else student)
    asked = _teacher(held_out, teacher)
    if base is None:
        untrained = _open(*_base_of(opened, training))
    else:
        untrained = _open(base, training.config["renderer"] if training else None)
    return {
        "base": _unprompted(untrained, recipe),
        "teacher": asked,
        "student": _unprompted(opened, recipe),
    }


def greedy(recipe: Recipe) -> Sampling:
    """How base and student are asked."""
    return Sampling(temperature=0.0, max_tokens=recipe.sampling.max_tokens, seed=0)


def explained(systems: Mapping[str, Answerer], recipe: Recipe) -> list[str]:
    """What a reader must know about a teacher that is several."""
    teacher = systems["teacher"]
    if not (isinstance(teacher, Teachers) and teacher.choice):
        return []
    notes = [
        f"The teacher is {teacher.model}, sampled as the recipe says, and one answer "
        f"is chosen ({recipe.choose}). Its tokens are those of everybody asked for a query."
    ]
    if recipe.reads_references:
        notes.append(
            "The teacher's verifier or judge is told what is right: its accuracy says which of "
            "its answers were taken, not what it knows."
        )
    return notes


def time_systems(held_out: HeldOut, systems: Mapping[str, Answerer]) -> dict[str, dict[str, float]]:
    """Latency of every system, and of the teacher with its prompt read anew each time."""
    rows = held_out.rows[:_TIMED_ROWS]["query"]
    queries = [rows[-1], *rows]
    timed = {name: _timed(system, queries) for name, system in systems.items()}
    timed[UNCACHED] = _timed(_changed(systems["teacher"], _uncached), queries)
    return measure_latency(timed)


def latency_note(rows: int) -> str:
    """How the latencies came about."""
    return (
        f"Latency is that of the first {min(rows, _TIMED_ROWS)} rows, one request at a time and "
        "the systems in turns, from this client. A server may keep the teacher's prompt in its "
        "cache; uncached requests put a new line before the prompt, so that it is read anew."
    )


def _teacher(held_out: HeldOut, teacher: Sampler | str | None) -> Answerer:
    recipe, manifest = held_out.recipe, held_out.manifest
    if teacher is not None and teacher != manifest["teacher"]:
        sampler = _open(teacher)
    elif "panel" in manifest:
        teachers = open_teachers(recipe)
        return teachers if teachers.choice else _changed(teachers, _greedy)
    else:
        sampler = _open(manifest["teacher"], manifest["renderer"])
    sampling, reader = recipe.sampling_parameters, recipe.teacher_reader
    return _greedy(PromptedModel(sampler, sampling, recipe.messages, reader, _as_said))


def _unprompted(sampler: Sampler, recipe: Recipe) -> PromptedModel:
    reader = recipe.student_reader
    return PromptedModel(sampler, greedy(recipe), recipe.student_messages, reader, _as_said)


def _as_said(text: str, answer: str) -> str:
    return text


def _greedy(asked: PromptedModel) -> PromptedModel:
    # Where the recipe stops the teacher, and the form it asks for, decide what can be read.
    own = asked.sampling
    sampling = Sampling(
        temperature=0.0,
        seed=0,
        max_tokens=own.max_tokens,
        stop=own.stop,
        json_schema=own.json_schema,
        extra=own.extra,
    )
    return replace(asked, sampling=sampling)


def _uncached(asked: PromptedModel) -> PromptedModel:
    messages = asked.messages
    return replace(asked, messages=lambda query: uncacheable(messages(query)))


def _changed(system: Answerer, change: Callable[[PromptedModel], PromptedModel]) -> Answerer:
    if isinstance(system, PromptedModel):
        return change(system)
    return replace(system, members=tuple(map(change, system.members)))


def _timed(system: Answerer, queries: Sequence[str]) -> Timed:
    if isinstance(system, Teachers) and system.choice:
        return Timed(system.model, [partial(system.answer, query, Unkept()) for query in queries])
    asked = [(query, one) for query in queries for one in system.asked(query)]
    requests = [
        partial(one.sampler.sample, one.messages(query), one.sampling) for query, one in asked
    ]
    return Timed(system.model, requests)


def _open(given: Sampler | str | Path, renderer: str | None = None) -> Sampler:
    if not isinstance(given, str | Path):
        return given
    from distill_datasets.models.references import open_sampler

    return open_sampler(given, renderer=renderer)


def _base_of(student: Sampler, training: Training | None) -> tuple[str, str]:
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

"""What the internalisation score of the validation rows stands between, found once."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from distill_datasets.errors import (
    DatasetError,
    HubError,
    ModelError,
    OutputError,
    RecipeError,
    ServiceError,
)
from distill_datasets.generation.ledger import LEDGER, find_replies
from distill_datasets.models.sampler import digest, request_digest
from distill_datasets.training.data import cache_folder
from distill_datasets.training.internalisation import (
    Answered,
    Bounds,
    internalisation,
    measure_bounds,
)
from distill_datasets.training.objectives.teacher import (
    TeacherPrompts,
    connect_teacher,
    read_teacher_prompts,
)

if TYPE_CHECKING:
    from distill_datasets.models.connection import Connection
    from distill_datasets.training.data import Rendered
    from distill_datasets.training.objectives.producers import Lesson

_FILE = "bounds.json"  # in the training's folder, so that a rerun asks nobody
_VERSION = 1  # of what is cached: raise it when the bounds come out differently
_COLUMNS = ("query", "sample", "response", "group")


def validation_bounds(lesson: "Lesson", rows: "Rendered") -> Bounds | None:
    """How likely base and teacher find the teacher's answers to the validation rows.

    Its own words come from the release's ledger. None where there is no score: the dataset is no
    release or lacks what its teacher said, its teacher can't score, or the prompt changes nothing;
    a line on standard error says why.
    Costs two requests a row, and nothing in a folder where they were made, or where another
    training on this machine has asked the same models about the same answers.
    """
    file = lesson.folder / _FILE
    if file.is_file():
        return _read(file)
    try:
        prompts = read_teacher_prompts(lesson, (LEDGER,))
        answers = _answers(lesson, prompts, rows)
        teacher = connect_teacher(lesson, prompts)
        bounds = _bounds(answers, base=lesson.student.connection, teacher=teacher)
        internalisation(bounds.base, bounds)  # no score is defined between equal bounds
    except (DatasetError, RecipeError, ModelError, ServiceError, HubError) as error:
        print(f"train: no internalisation score: {error}", file=sys.stderr)
        return None
    _write(file, bounds)
    return bounds


def _bounds(answers: Sequence[Answered], *, base: "Connection", teacher: "Connection") -> Bounds:
    asked = [_VERSION, base.identity, teacher.identity, *map(asdict, answers)]
    cached = cache_folder() / f"bounds-{digest(asked)[:32]}.json"
    if cached.is_file():
        return _read(cached)
    bounds = measure_bounds(answers, base=base, teacher=teacher)
    _write(cached, bounds)
    return bounds


def _answers(lesson: "Lesson", prompts: TeacherPrompts, rows: "Rendered") -> list[Answered]:
    if missing := sorted({*_COLUMNS} - {*rows.plain.column_names}):
        raise DatasetError(f"{prompts.where!r} lacks a release's columns {missing}.")
    kept = rows.plain.select_columns(list(_COLUMNS)).select(rows.kept).to_list()
    said = _said(lesson, prompts, [(row["query"], row["sample"]) for row in kept])
    found = []
    for row, text in zip(kept, said, strict=True):
        if text is None and not prompts.says(row["response"]):
            raise DatasetError(
                f"the ledger of {prompts.where!r} doesn't hold what its teacher said to "
                f"{row['query'][:80]!r}. Publish with the ledger to have the score."
            )
        response = row["response"]
        found.append(Answered.to(prompts.recipe, row, text or response, response))
    return found


def _said(
    lesson: "Lesson", prompts: TeacherPrompts, asked: Sequence[tuple[str, int]]
) -> list[str | None]:
    """The teacher's own words for queries and sample numbers, where the ledger holds them."""
    recipe, identity = prompts.recipe, lesson.source.manifest.get("identity")
    if recipe.teachers or not identity:
        return [None] * len(asked)
    sampling = recipe.sampling_parameters
    keys = [request_digest(identity, recipe.messages(query), sampling) for query, _ in asked]
    replies = find_replies(prompts.folder, set(keys))
    return [
        replies[key].samples[sample].text if key in replies else None
        for key, (_, sample) in zip(keys, asked, strict=True)
    ]


def _read(file: Path) -> Bounds:
    return Bounds(**json.loads(file.read_text(encoding="utf-8")))


def _write(file: Path, bounds: Bounds) -> None:
    draft = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        draft.write_text(json.dumps(asdict(bounds)) + "\n", encoding="utf-8")
        draft.replace(file)
    except OSError as error:
        raise OutputError(
            f"Can't write {str(file)!r}: {error}. Free it or choose another --out, or "
            "HF_DATASETS_CACHE."
        ) from error

"""What tests of training share: a tiny dataset, accidents, and readers of what was logged."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.training import student as students
from distill_datasets.training.data import Example
from distill_datasets.training.trainer import TrainingResult, TrainSettings

LANGUAGES = {"en": "the weather", "de": "der Himmel", "fr": "le ciel", "es": "el cielo"}
ROWS = [
    {"query": f"{text} {number}", "response": language}
    for number in range(9)
    for language, text in LANGUAGES.items()
]
Rows = list[dict[str, Any]]
QUICK = TrainSettings(
    epochs=3, batch_size=8, rank=4, learning_rate=1e-2, evaluate_every=4, rolling_every=3
)


def write(folder: Path, **splits: Rows) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def metrics(training: TrainingResult, key: str = "loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (training.path / "metrics.jsonl").open()]
    found = [(line["step"], line[key]) for line in lines if key in line]
    assert len(dict(found)) == len(found), "each step appears once"
    return dict(found)


def at_step(step: int, happens: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Something happens while this step of the next training is awaited."""
    learn, waits = students.Student.learn, iter(range(1, 1000))

    def watched(*asked: Any) -> Any:
        pending = learn(*asked)

        def result() -> Any:
            if next(waits) == step:
                happens()
            return pending.result()

        return students.Submitted(result)

    monkeypatch.setattr(students.Student, "learn", watched)


def said_logprobs(student: students.Student, batches: Sequence[Sequence[Example]]) -> list[Any]:
    """Of the tokens of each response."""
    found = student.logprobs([students.datums(batch, "token") for batch in batches]).result()
    return students.response_logprobs([one for batch in batches for one in batch], found)


def loss(student: students.Student, batches: Sequence[Sequence[Example]]) -> float:
    """Per response token."""
    rows = said_logprobs(student, batches)
    return -float(sum(row.sum() for row in rows) / sum(map(len, rows)))

"""Recipes of several teachers to run in tests, and models that answer as they are told."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from distill_datasets.errors import ModelError
from distill_datasets.models.sampler import Reply, Sample, Sampling, Usage
from distill_datasets.schema import Message

if TYPE_CHECKING:
    from distill_datasets.generation.run import Generated

QUERIES = {"rose": "red", "sky": "blue", "sea": "blue", "plum": None}
Speech = Callable[[str, int], str]


@dataclass
class Model:
    """Says what its speech makes of a query and the sample's number; a prompt has ten tokens."""

    model: str
    speech: Speech
    failing: dict[str, Exception] = field(default_factory=dict)
    asked: list[tuple[str, Sampling]] = field(default_factory=list)

    @property
    def identity(self) -> str:
        return f"{self.model}/1"

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        query = messages[-1]["content"]
        self.asked.append((query, sampling))
        if query in self.failing:
            raise self.failing[query]
        texts = [self.speech(query, number) for number in range(sampling.n)]
        samples = tuple(Sample(text, "stop", len(text.split())) for text in texts)
        return Reply(samples, Usage(10, 4))


def says(answers: Mapping[str, str]) -> Speech:
    return lambda query, number: f"colour: {answers.get(query, 'no idea')}"


RED = says(dict.fromkeys(QUERIES, "red"))
RIGHT = says({query: colour or "red" for query, colour in QUERIES.items()})


@dataclass
class Models:
    """Stands in for `open_sampler`."""

    known: dict[str, Model]
    opened: list[tuple[str, str | None]] = field(default_factory=list)

    def __call__(self, reference: str | Path, *, renderer: str | None = None, **how: Any) -> Model:
        self.opened.append((str(reference), renderer))
        if str(reference) not in self.known:
            raise ModelError(f"no model {reference!r}")
        return self.known[str(reference)]

    def __getitem__(self, name: str) -> Model:
        return self.known[name]

    @property
    def requests(self) -> int:
        return sum(len(model.asked) for model in self.known.values())


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Models:
    known = {
        "right": RIGHT,
        "red": RED,
        "blue": says(dict.fromkeys(QUERIES, "blue")),
        "mute": lambda query, number: "I would rather not say",
    }
    opener = Models({name: Model(name, speech) for name, speech in known.items()})
    monkeypatch.setattr("distill_datasets.models.references.open_sampler", opener)
    return opener


def recipe_of(folder: Path, *, template: str | None = None, **keys: Any) -> Path:
    """A recipe's folder; `template` is the text of judge.md."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "name": "colours",
        "description": "Which colour is it?",
        "queries": {"file": "queries.jsonl", "reference": "colour"},
        "answer": {"pattern": r"colour: (?P<answer>\w+)$", "choices": ["red", "blue"]},
        **keys,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
    (folder / "prompt.md").write_text("Name the colour of the thing.\n")
    lines = [{"query": query, "colour": colour} for query, colour in QUERIES.items()]
    (folder / "queries.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if template is not None:
        (folder / "judge.md").write_text(template)
    return folder


def run(tmp_path: Path, *, template: str | None = None, **keys: Any) -> Generated:
    from distill_datasets.generation.run import generate

    recipe = recipe_of(tmp_path / "recipe", template=template, **keys)
    return generate(recipe, out=tmp_path / "run")


def columns(made: Generated, *names: str) -> list[tuple[Any, ...]]:
    return list(zip(*(made.rows[name][:] for name in names), strict=True))


JUDGE = "{{ query }}/{{ reference }}: {{ answer }} ({{ text }}) under {{ prompt }}"


def scores(by_answer: Mapping[str, str]) -> Speech:
    """A judge that looks at the answer."""
    return lambda request, number: by_answer[request.split(": ")[1].split(" ")[0]]


KEYS: dict[str, dict[str, Any]] = {
    "majority": {"teachers": ["red", "right", "blue"], "choose": "majority"},
    "route": {"teachers": [{"model": "right", "weight": 2}, "red"]},
    "best": {
        "teachers": ["red", "right", "blue"],
        "choose": "best",
        "verifier": "answer != 'green'",
        "judge": "judge",
        "template": JUDGE,
    },
}


def judged(tmp_path: Path, *teachers: str, **keys: Any) -> Generated:
    """The best answer of these teachers, by the model `judge`."""
    choice = {"choose": "best", "judge": "judge", "template": JUDGE, **keys}
    return run(tmp_path, teachers=list(teachers), **choice)

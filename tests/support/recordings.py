"""Recorded answers to the recipes that ship, and a model that gives them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from distill_datasets.models.sampler import Reply, Sample, Sampling, Usage, digest
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.queries import load_queries
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.schema import Message

_FOLDER = Path(__file__).parents[1] / "recordings"
NAMES = sorted(path.stem for path in _FOLDER.glob("*.jsonl"))


@dataclass
class Recorded:
    """Says what was recorded for messages, and scores as was recorded for a text."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    scores: dict[str, str] = field(default_factory=dict)
    name: str = "recorded"

    @property
    def model(self) -> str:
        return self.name

    @property
    def identity(self) -> str:
        return self.name

    def record(self, messages: Sequence[Message], texts: Iterable[str], ends: str = "stop") -> None:
        reason: Any = ends
        self.samples[digest(list(messages))] = [
            Sample(text, reason, len(text.split()) + 1) for text in texts
        ]

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        first, *rest = messages
        timed = [{**first, "content": first["content"].partition("\n")[2]}, *rest]
        known = self.samples.get(digest(list(messages))) or self.samples.get(digest(timed))
        if known is None:
            judged = messages[-1]["content"]
            shown = max((text for text in self.scores if text in judged), key=len)
            known = [Sample(self.scores[shown], "stop", 1)]
        words = sum(len(message["content"].split()) for message in messages)
        return Reply(tuple(known[: sampling.n]), Usage(words, 0))


@dataclass(frozen=True)
class Recording:
    """A shipped recipe cut down to the rows that have recorded answers, in their order."""

    recipe: Recipe
    lines: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, name: str, variant: str | None = None) -> "Recording":
        """That of one recipe, or of one of its variants."""
        lines = [one for one in _lines(name) if one.get("variant") in (None, variant)]
        recipe = load_recipe(f"{name}:{variant}" if variant else name)
        if recipe.members:
            return cls._of_several(recipe, lines)
        lines.sort(key=lambda line: line["row"])
        return cls(_cut(recipe, [line["row"] for line in lines]), tuple(lines))

    @classmethod
    def _of_several(cls, recipe: Recipe, lines: Sequence[Mapping[str, Any]]) -> "Recording":
        members, found = {}, []
        for handle, member in recipe.members.items():
            rows = sorted(line["row"] for line in lines if line["handle"] == handle)
            known = {line["row"]: line for line in _lines(member.folder.name)}
            members[handle] = _cut(member, rows)
            found += [known[row] for row in rows]
        return cls(_named(recipe.replace(members=members)), tuple(found))

    @cached_property
    def queries(self) -> list[str]:
        """A query for each line."""
        queries: list[str] = load_queries(self.recipe)["query"][:]
        return queries

    @property
    def teacher(self) -> Recorded:
        """Says what a good teacher said, and now and then what is malformed."""
        model = Recorded()
        for query, line in zip(self.queries, self.lines, strict=True):
            texts = _list(line["text"])
            model.record(self.recipe.messages(query), texts, line["stop_reason"])
            scores = line.get("scores", [])
            model.scores |= {
                text: f"Score: {one}" for text, one in zip(texts, scores, strict=False)
            }
        return model

    @property
    def base(self) -> Recorded:
        """Says what an untrained model said."""
        model = Recorded(name="recorded base")
        for query, line in zip(self.queries, self.lines, strict=True):
            model.record(self.recipe.student_messages(query), [line.get("base", "I don't know.")])
        return model

    def student(self, released: Mapping[str, str]) -> Recorded:
        """Says what was released for a query, and elsewhere what the base says."""
        model = self.base
        model.name = "recorded student"
        for query, response in released.items():
            model.record(self.recipe.student_messages(query), [response])
        return model


def _lines(name: str) -> list[dict[str, Any]]:
    text = (_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _list(text: str | list[str]) -> list[str]:
    return [text] if isinstance(text, str) else text


def _cut(recipe: Recipe, rows: Sequence[int]) -> Recipe:
    return _named(recipe.replace(queries=recipe.queries.model_copy(update={"rows": tuple(rows)})))


def _named(recipe: Recipe) -> Recipe:
    """With the recorded model as teacher and judge."""
    judge = recipe.judge and recipe.judge.model_copy(update={"model": "recorded"})
    return recipe.replace(teacher="recorded", judge=judge)

"""Several teachers as one: a query goes to one of them, or to all, and one answer is kept."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from hashlib import sha256
from typing import Any

from distill_datasets.generation.client import Buyer
from distill_datasets.generation.judging import Judging
from distill_datasets.generation.rows import Answering, Asking
from distill_datasets.generation.voting import (
    Best,
    Buys,
    Candidate,
    Case,
    Choosing,
    Majority,
    Receipts,
    Verdict,
    all_of,
)
from distill_datasets.models.sampler import Reply, Sample, Sampler, digest, request_digest
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.recipes.sections import AskedModel, SamplingSection, Teacher


@dataclass(frozen=True)
class Voice:
    """One of several teachers; `key` names it to the queries that it is asked."""

    asking: Asking
    weight: float
    key: str

    def pull(self, query: str) -> float:
        """How strongly a query is drawn here, of all voices to the strongest.

        By weighted rendezvous hashing: a voice more, or another weight, moves no query between
        the others.
        """
        place = int(sha256(f"{self.key}\n{query}".encode()).hexdigest()[:13], 16)
        return -self.weight / math.log((place + 0.5) / 16**13)


@dataclass(frozen=True)
class _Several:
    voices: tuple[Voice, ...]

    @property
    def parts(self) -> Sequence[Any]:
        """Every teacher's, with its weight."""
        return [[*voice.asking.parts, voice.weight, voice.key] for voice in self.voices]

    @property
    def model(self) -> str:
        """All models in one text."""
        return " + ".join(voice.asking.model for voice in self.voices)

    @property
    def identity(self) -> str:
        """All identities in one text."""
        return " + ".join(voice.asking.identity for voice in self.voices)


@dataclass(frozen=True)
class Route(_Several):
    """Each query goes to one teacher, whatever other queries there are."""

    def asked(self, query: str) -> Sequence[Asking]:
        """Who is asked a query: one."""
        return [max(self.voices, key=lambda voice: voice.pull(query)).asking]

    async def answer(
        self, query: str, buyer: Buyer, reference: str | None = None
    ) -> list[dict[str, Any]]:
        """A row a sample."""
        (asking,) = self.asked(query)
        first, *others = await asking.answer(query, buyer, reference)
        key = request_digest(asking.identity, asking.messages(query), asking.sampling)
        return [{**first, "requests": [key]}, *others]


@dataclass(frozen=True)
class Panel(_Several):
    """All teachers are asked every query, at once, and one answer is kept.

    When one of them fails the row fails, since the others alone might choose otherwise: what
    they said is kept, and the next run asks only for what is missing. A row's token columns
    count everything that was asked for it, the judge's requests too.
    """

    choosing: Choosing

    @property
    def parts(self) -> Sequence[Any]:
        """Those of the teachers, and of the choice."""
        return [*super().parts, list(self.choosing.parts)]

    def asked(self, query: str) -> Sequence[Asking]:
        """Who is asked a query before anybody judges: all."""
        return [voice.asking for voice in self.voices]

    async def answer(
        self, query: str, buyer: Buys, reference: str | None = None
    ) -> list[dict[str, Any]]:
        """One row."""
        receipts = Receipts(buyer)
        replies = await all_of(
            receipts.buy(asking.sampler, asking.messages(query), asking.sampling)
            for asking in self.asked(query)
        )
        candidates = [
            _candidate(voice, reply, sample)
            for voice, reply in zip(self.voices, replies, strict=True)
            for sample in reply.samples
        ]
        prompt = self.voices[0].asking.messages(query)[0]["content"]
        case = Case(query, prompt, reference, candidates)
        verdict = await self.choosing.choose(case, receipts)
        evidence = {
            "candidates": len(candidates),
            "agreement": verdict.agreement,
            "score": verdict.score,
            "requests": receipts.requests,
        }
        return [{**self._decided(case, verdict), **receipts.tokens(), **evidence}]

    def _decided(self, case: Case, verdict: Verdict) -> dict[str, Any]:
        chosen = verdict.chosen
        if chosen is not None:
            return chosen.asking.row(chosen.sample, chosen.reply, 0)
        texts = [f"{one.asking.model}:\n{one.sample.text}" for one in case.candidates]
        return {
            "teacher": self.model,
            "sample": 0,
            "raw": "\n\n".join(texts),
            "rejection": verdict.rejection,
        }


@dataclass(frozen=True)
class Teachers:
    """Whoever answers a recipe's queries; `facts` go into generation.json.

    `recipe` names them as they name themselves.
    """

    answering: Answering
    recipe: Recipe
    facts: Mapping[str, Any]


def open_teachers(recipe: Recipe, teacher: Sampler | None = None, **opening: Any) -> Teachers:
    """Open every model that a recipe asks, or put one `teacher` in the place of its teachers.

    `opening` goes to `open_sampler`, and what that raises comes from here. Asks nobody.
    """
    if teacher is not None:
        recipe = recipe.with_teacher(teacher.model)
    # Of several, all must be there before one is paid.
    opened = _Opened(teacher, {**opening, "lazily": len(set(models_of(recipe))) == 1})
    teachers = [opened.named(one) for one in recipe.all_teachers]
    if recipe.teachers:
        recipe = recipe.replace(teachers=tuple(teachers))
    else:
        recipe = recipe.replace(teacher=teachers[0].model)
    voices = tuple(_voice(recipe, one, opened.sampler(one)) for one in teachers)
    judging = _judging(recipe, opened)
    answering = _answering(recipe, voices, judging)
    facts = {
        "teacher": answering.model,
        "identity": answering.identity,
        "renderer": None if recipe.teachers else _renderer(voices[0].asking.sampler),
        "sampling": asdict(recipe.sampling_parameters),
    }
    if isinstance(answering, _Several):
        facts["panel"] = _described(recipe, voices, judging)
    return Teachers(answering, recipe, facts)


class _Opened:
    """Samplers by reference and renderer, each opened once."""

    def __init__(self, teacher: Sampler | None, opening: Mapping[str, Any]) -> None:
        self._teacher, self._opening = teacher, opening
        self._samplers: dict[tuple[str, str | None], Sampler] = {}

    def sampler(self, asked: AskedModel) -> Sampler:
        """The given one for a teacher, else one that its reference names."""
        from distill_datasets.models.references import open_sampler

        if self._teacher is not None and isinstance(asked, Teacher):
            return self._teacher
        key = (asked.model, asked.renderer)
        if key not in self._samplers:
            self._samplers[key] = open_sampler(
                asked.model, renderer=asked.renderer, **self._opening
            )
        return self._samplers[key]

    def named(self, teacher: Teacher) -> Teacher:
        """The teacher under the reference that its sampler goes by."""
        sampler = self.sampler(teacher)
        self._samplers[sampler.model, teacher.renderer] = sampler
        return teacher.model_copy(update={"model": sampler.model})


def asked_of(answering: Answering, query: str) -> Sequence[Asking]:
    """Every teacher that a query goes to, before anybody judges."""
    if isinstance(answering, Asking):
        return [answering]
    assert isinstance(answering, Route | Panel)
    return answering.asked(query)


def models_of(recipe: Recipe) -> list[str]:
    """Every model that a recipe asks, by its reference: the teachers, and the judge."""
    judges = [recipe.judge.model] if recipe.judge else []
    return [teacher.model for teacher in recipe.all_teachers] + judges


def _answering(recipe: Recipe, voices: tuple[Voice, ...], judging: Judging | None) -> Answering:
    if recipe.choose == "majority":
        return Panel(voices, Majority(Fraction(str(recipe.agreement or 0))))
    if recipe.choose == "best":
        return Panel(voices, Best(recipe.verifier, judging))
    return Route(voices) if recipe.teachers else voices[0].asking


def _voice(recipe: Recipe, teacher: Teacher, sampler: Sampler) -> Voice:
    asking = Asking(
        sampler,
        recipe.sampling_of(teacher),
        recipe.messages,
        recipe.teacher_reader,
        recipe.write_response,
    )
    own = teacher.model_dump(mode="json", exclude={"weight"})
    return Voice(asking, teacher.weight, digest([recipe.name, own]))


def _judging(recipe: Recipe, opened: _Opened) -> Judging | None:
    judge = recipe.judge
    if judge is None:
        return None
    sampling = judge.sampling_over(SamplingSection()).parameters()
    sampler = opened.sampler(judge)
    return Judging(sampler, sampling, recipe.judge_prompt, judge.pattern, judge.scale)


def _candidate(voice: Voice, reply: Reply, sample: Sample) -> Candidate:
    answer = voice.asking.reader.read(sample.text, sample.stop_reason).answer
    return Candidate(voice.asking, Fraction(str(voice.weight)), sample, reply, answer)


def _described(recipe: Recipe, voices: Sequence[Voice], judging: Judging | None) -> dict[str, Any]:
    teachers = [
        {
            "model": voice.asking.model,
            "weight": voice.weight,
            **_asked(voice.asking),
        }
        for voice in voices
    ]
    judge = {"model": judging.sampler.model, **_asked(judging)} if judging else None
    return {"choose": recipe.choose, "teachers": teachers, "judge": judge}


def _asked(asked: Asking | Judging) -> dict[str, Any]:
    return {
        "identity": asked.sampler.identity,
        "renderer": _renderer(asked.sampler),
        "sampling": asdict(asked.sampling),
    }


def _renderer(sampler: Sampler) -> str | None:
    return getattr(getattr(sampler, "connection", None), "renderer_name", None)

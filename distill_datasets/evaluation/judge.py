"""Asks a judge about texts for which no label is right: scores, and which of two is better.

A judge sees the prompt, the query and one text, or two without names, in both orders. What it is
asked is in the journal, and paid once.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from distill_datasets.conversations import readable
from distill_datasets.errors import GenerationError, SettingsError, nearest
from distill_datasets.evaluation.judge_findings import (
    STUDENT,
    TEACHER,
    TIE,
    HumanLabels,
    JudgedRow,
    Opinions,
    find,
    judge_lines,
    warnings,
)
from distill_datasets.evaluation.systems import HeldOut
from distill_datasets.files import builders_folder, read_yaml
from distill_datasets.generation.client import CachedClient, ManyRequests
from distill_datasets.generation.teachers import ScoringModel
from distill_datasets.models.sampler import Sample, Sampler, Sampling, digest
from distill_datasets.recipes.prompt import render_ours
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.recipes.sections import SamplingSection
from distill_datasets.schema import Message

if TYPE_CHECKING:
    from distill_datasets.evaluation.comparison import Comparison, Texts

OWN = "recipe"  # the rubric that is the recipe's judge prompt

_VERSION = 1  # goes into the report's digest: raise it when opinions come out differently
_SCORED = (TEACHER, STUDENT, "base")
_SCALE = (1.0, 10.0)
_SAMPLING = Sampling(temperature=0.0, max_tokens=2048, seed=0)  # some judges think first
_LARGEST = 100_000  # bytes of a rubric
_CHOSEN = (
    "The recipe's judge prompt also chose among the teacher's answers, so its scores favour the "
    "teacher. Name another rubric beside it, such as quality."
)
_PREFERRED = re.compile(r"(?im)^[^\w\n]{0,12}better[^\w\n]{0,6}[:=][^\w\n]{0,6}(a|b|tie)\b")


@dataclass(frozen=True)
class Rubric:
    """By what a text is judged: criteria with their meaning, each scored from 1 to 10."""

    name: str
    criteria: Mapping[str, str]

    @classmethod
    def load(cls, name: str) -> "Rubric":
        """One that ships, by its name, or a YAML file of criteria; raises `SettingsError`."""
        if not name.endswith((".yaml", ".yml")):
            known = _shipped()
            if name not in known:
                names = [*known, OWN]
                raise SettingsError(
                    f"There is no rubric {name!r}: expected {', '.join(names)} (the recipe's judge "
                    f"prompt), or a YAML file `criterion: what it means`.{nearest(name, names)}"
                )
            return cls(name, known[name])
        criteria = read_yaml(name, SettingsError, what="rubric", limit=_LARGEST)
        if not (
            isinstance(criteria, dict)
            and criteria
            and all(
                isinstance(one, str) and one.strip() for pair in criteria.items() for one in pair
            )
        ):
            raise SettingsError(
                f"The rubric {name!r} holds no criteria: expected YAML lines `criterion: what it "
                "means`."
            )
        return cls(Path(name).stem, criteria)

    def messages(self, row: JudgedRow, text: str) -> list[Message]:
        """What the judge sees of one text."""
        fields = {"prompt": row.prompt, "query": row.shown, "text": text}
        return _asked("score", criteria=self.criteria, **fields)

    def read(self, said: Sample) -> dict[str, float | None]:
        """The score of each criterion; None where it isn't there, or the text was cut off."""
        return {name: _score(name, said) for name in self.criteria}


def _score(criterion: str, said: Sample) -> float | None:
    pattern = rf"(?im)^[^\w\n]{{0,12}}{re.escape(criterion)}[^\w\n]{{0,6}}[:=][^\w\n]{{0,6}}(\d+)"
    found = re.findall(pattern, said.text)
    if not found or said.stop_reason == "length" or len(found[-1]) > 2:
        return None
    score = float(found[-1])
    return score if _SCALE[0] <= score <= _SCALE[1] else None


@cache
def _shipped() -> dict[str, dict[str, str]]:
    text = (builders_folder() / "_judge" / "rubrics.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = yaml.safe_load(text)
    return found


@cache
def _template(name: str) -> str:
    return (builders_folder() / "_judge" / f"{name}.md").read_text(encoding="utf-8")


def _asked(template: str, **fields: Any) -> list[Message]:
    return [{"role": "user", "content": render_ours(_template(template), **fields)}]


@dataclass(frozen=True)
class _JudgeRequest:
    """One request about a row: about one system's text, or about both in an order."""

    row: int
    messages: list[Message]
    sampling: Sampling
    rubric: str = ""
    system: str = ""
    first: str = ""


@dataclass(frozen=True)
class Rubrics:
    """The rubrics that were asked for; else the recipe's own prompt, else `quality`."""

    recipe: Recipe
    asked: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises `SettingsError` for an unknown one, or two with one criterion."""
        names = [name for one in self.general for name in one.criteria]
        names += [OWN] if OWN in self.names else []
        if len(set(names)) < len(names):
            raise SettingsError(f"Two of the rubrics {', '.join(self.names)} have one criterion.")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What they are called."""
        has_own = all(part.judge for part in self.recipe.parts)
        if OWN in self.asked and not has_own:
            raise SettingsError(
                "The rubric 'recipe' is the recipe's judge prompt, and the recipe has no `judge`: "
                f"name one of {', '.join(_shipped())}."
            )
        return tuple(dict.fromkeys(self.asked)) or (OWN if has_own else "quality",)

    @cached_property
    def general(self) -> list[Rubric]:
        """Those that aren't the recipe's prompt."""
        return [Rubric.load(name) for name in self.names if name != OWN]

    @cached_property
    def criteria(self) -> Mapping[str, str]:
        """By what two texts are compared."""
        rubrics = self.general or [Rubric.load("quality")]
        return {name: meaning for one in rubrics for name, meaning in one.criteria.items()}

    def scoring(self, sampler: Sampler) -> dict[str, ScoringModel]:
        """How the recipe's own prompt is asked and read, by the name of the part that has it."""
        found = {}
        for part in self.recipe.parts if OWN in self.names else ():
            section = part.judge
            assert section
            sampling = section.sampling_over(SamplingSection()).parameters()
            rest = (part.judge_prompt, section.pattern, section.scale)
            found[part.name] = ScoringModel(sampler, sampling, *rest)
        return found


@dataclass(frozen=True)
class AnswerJudge:
    """A model that judges, by rubrics, and what people say of some rows."""

    sampler: Sampler
    rubrics: Rubrics
    labels: HumanLabels | None = None

    @property
    def key(self) -> str:
        """The digest of everything that its part of a report depends on but the texts."""
        scoring = [list(one.parts) for one in self._scoring.values()]
        labels = asdict(self.labels) if self.labels else None
        asked = [_template(name) for name in ("score", "compare")]
        criteria = [dict(one.criteria) for one in self.rubrics.general]
        return digest([_VERSION, self.sampler.identity, criteria, scoring, labels, asked])

    @cached_property
    def _scoring(self) -> dict[str, ScoringModel]:
        return self.rubrics.scoring(self.sampler)

    def _own(self, row: JudgedRow) -> ScoringModel:
        """The recipe's prompt for a row."""
        return self._scoring[self.rubrics.recipe.part(row.query)[0].name]

    def rows(self, comparison: "Comparison", texts: "Texts") -> list[JudgedRow]:
        """What is judged: of each row what its systems say, as the student would."""
        systems = [name for name in _SCORED if name in texts.said]
        ids = comparison.answers[TEACHER]["id"]
        return [
            JudgedRow(
                ids[place],
                query,
                self.rubrics.recipe.messages(query)[0]["content"],
                comparison.groups[place],
                comparison.references[place],
                {name: texts.said[name][place] for name in systems},
                {name: comparison.predictions[name][place] for name in systems},
            )
            for place, query in enumerate(comparison.queries)
        ]

    def judge(
        self,
        rows: Sequence[JudgedRow],
        models: Mapping[str, str],
        client: CachedClient,
    ) -> dict[str, Any]:
        """A report's key `judge`, with what the client's journal has, and asking for the rest.

        `models` are those of the systems, by their names.
        Says on standard error what is asked, and what it costs at most, beforehand. Raises
        `BudgetReached`, what the sampler raises for all, and `GenerationError` where a request
        failed, or nothing that was said can be read.
        """
        questions = [*self._questions(rows)]
        requests = ManyRequests([(self.sampler, one.messages, one.sampling) for one in questions])
        said = requests.said(client.journal, client.meter.prices if client.meter else None)
        print(f"judge: asks {self.sampler.model} {said}", file=sys.stderr)
        replies = requests.ask(client, title=f"judge {self.sampler.model}")
        opinions = self._opinions(rows, questions, [one.samples[0] for one in replies])
        found = {
            "model": self.sampler.model,
            "identity": self.sampler.identity,
            "rubrics": list(self.rubrics.names),
            "requests": len(questions),
            **find(rows, opinions, self.labels),
        }
        chosen = [_CHOSEN] if OWN in self.rubrics.names else []
        found["warnings"] = [*chosen, *warnings(self.sampler.model, models, found)]
        return {"summary": judge_lines(found), **found}

    def most_requests(self, systems: Iterable[str], rows: int) -> int:
        """So many are asked about so many rows, where no two texts are equal."""
        scored = len({*systems} & {*_SCORED})
        return rows * (scored * len(self.rubrics.names) + 2)

    def _questions(self, rows: Sequence[JudgedRow]) -> Iterator[_JudgeRequest]:
        for place, row in enumerate(rows):
            for system, text in row.texts.items():
                for rubric in self.rubrics.general:
                    asked = rubric.messages(row, text)
                    yield _JudgeRequest(place, asked, _SAMPLING, rubric.name, system)
                if OWN in self.rubrics.names:
                    yield self._own_question(place, row, system)
            if row.is_pair:
                for first, second in ((STUDENT, TEACHER), (TEACHER, STUDENT)):
                    asked = _asked(
                        "compare",
                        prompt=row.prompt,
                        query=row.shown,
                        first=row.texts[first],
                        second=row.texts[second],
                        criteria=self.rubrics.criteria,
                    )
                    yield _JudgeRequest(place, asked, _SAMPLING, first=first)

    def _own_question(self, place: int, row: JudgedRow, system: str) -> _JudgeRequest:
        scoring = self._own(row)
        messages = scoring.messages(
            query=row.shown,
            prompt=row.prompt,
            text=row.texts[system],
            answer=row.answers[system],
            reference=row.reference,
        )
        return _JudgeRequest(place, messages, scoring.sampling, OWN, system)

    def _opinions(
        self, rows: Sequence[JudgedRow], questions: Sequence[_JudgeRequest], said: Sequence[Sample]
    ) -> Opinions:
        rubrics = {one.name: one for one in self.rubrics.general}
        scores: dict[str, dict[str, list[float | None]]] = {}
        pairs: list[dict[str, str | None]] = [{} for _ in rows]
        for one, sample in zip(questions, said, strict=True):
            if one.first:
                pairs[one.row][one.first] = _preferred(sample, one.first)
                continue
            if one.rubric == OWN:
                found: Mapping[str, float | None] = {OWN: self._own(rows[one.row]).score(sample)}
            else:
                found = rubrics[one.rubric].read(sample)
            for criterion, score in found.items():
                empty: list[float | None] = [None] * len(rows)
                scores.setdefault(criterion, {}).setdefault(one.system, empty)[one.row] = score
        known = [score for of in scores.values() for each in of.values() for score in each]
        if not any(score is not None for score in known):
            raise GenerationError(
                f"Nothing that the judge {self.sampler.model} said holds a score that can be read: "
                f"it said {said[0].text[:300]!r}. Expected lines such as 'clarity: 7'. Ask a judge "
                "that keeps to a form."
            )
        both = [(one[STUDENT], one[TEACHER]) if one else None for one in pairs]
        return Opinions(self._scales, scores, both)

    @property
    def _scales(self) -> dict[str, tuple[float, float]]:
        scales = dict.fromkeys(
            (name for one in self.rubrics.general for name in one.criteria), _SCALE
        )
        if OWN in self.rubrics.names:
            both = [one.scale for one in self._scoring.values()]
            scales[OWN] = (min(low for low, _ in both), max(high for _, high in both))
        return scales


def _preferred(said: Sample, first: str) -> str | None:
    """Who is better; None where it isn't said, or the text was cut off."""
    found = _PREFERRED.findall(said.text)
    if not found or said.stop_reason == "length":
        return None
    second = TEACHER if first == STUDENT else STUDENT
    return {"a": first, "b": second, "tie": TIE}[found[-1].lower()]


def open_judge(
    judge: Sampler | str,
    held_out: HeldOut,
    *,
    rubrics: Sequence[str] = (),
    labels: Path | None = None,
) -> AnswerJudge:
    """A judge for what systems say to a release's rows; raises before anything is asked.

    `labels` is a CSV file of what people say of rows.
    """
    from distill_datasets.models.references import open_sampler

    named, read = Rubrics(held_out.recipe, tuple(rubrics)), None
    if labels:
        read = HumanLabels.read(labels)
        read.of(held_out.rows["id"], [readable(query) for query in held_out.rows["query"]])
    return AnswerJudge(open_sampler(judge) if isinstance(judge, str) else judge, named, read)

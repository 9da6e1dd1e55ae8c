"""Whom a recipe asks, and how it chooses among their answers."""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from distill_datasets.recipes.prompt import (
    check_expression,
    check_template,
    fields_of,
    fields_of_expression,
)
from distill_datasets.recipes.sections import Choice, Judge, SamplingSection, Section, Teacher

UNUSED: dict[str, Any] = {
    **{"teachers": [], "choose": "route"},
    **dict.fromkeys(("agreement", "verifier", "judge")),
}
_VERIFIED = {"query", "text", "answer", "reference"}
_JUDGED = {*_VERIFIED, "prompt"}
_NEEDED = {"agreement": "majority", "verifier": "best", "judge": "best"}


class Teaching(Section):
    """The keys of a recipe that say who answers; exactly one of `teacher` and `teachers`.

    With `choose` each query goes to one teacher by weight (`route`), or all are asked, and the
    answers that parse are voted on by weight (`majority`, of which `agreement` is the least
    share) or the `best` is taken: the first that `verifier` holds for, an expression over
    `query`, `text`, `answer` and `reference`, or of those the one that the `judge` scores
    highest.
    """

    teacher: str | None = None
    teachers: tuple[Teacher, ...] = ()
    choose: Choice = "route"
    agreement: Annotated[float, Field(gt=0, le=1)] | None = None
    verifier: str | None = None
    judge: Judge | None = None
    sampling: SamplingSection = SamplingSection()
    renderer: str | None = None
    folder: Path = Field(default=Path(), exclude=True)

    @model_validator(mode="after")
    def _named(self) -> Self:
        if (self.teacher is None) == (not self.teachers):
            found = "neither" if self.teacher is None else "both"
            raise ValueError(f"name exactly one of teacher and teachers; found {found}")
        if self.teachers and self.renderer:
            raise ValueError("each of several teachers has its own renderer: move it there")
        places: dict[str, int] = {}
        for place, teacher in enumerate(self.teachers, 1):
            sampling = teacher.sampling_over(self.sampling).model_dump_json()
            first = places.setdefault(f"{teacher.model} {teacher.renderer} {sampling}", place)
            if first != place:
                raise ValueError(
                    f"teachers {first} and {place} are the same and would answer alike: keep one "
                    "with the sum of their weights, or let them sample differently"
                )
        return self

    @model_validator(mode="after")
    def _chosen(self) -> Self:
        for key, choice in _NEEDED.items():
            if getattr(self, key) is not None and self.choose != choice:
                raise ValueError(f"{key} needs 'choose: {choice}'; found 'choose: {self.choose}'")
        sifted = self.verifier is not None or self.judge is not None
        answers = sum(one.sampling_over(self.sampling).n for one in self.all_teachers)
        if self.choose != "route" and answers == 1 and not sifted:
            raise ValueError(
                f"'choose: {self.choose}' needs several answers to choose from, and there is one "
                "a query: name more teachers or raise sampling.n"
                + (", or add a verifier or a judge" if self.choose == "best" else "")
            )
        if self.verifier is not None:
            check_expression(self.verifier, _VERIFIED, "verifier")
        if self.judge:
            check_template(self.judge_prompt, _JUDGED, self.judge.prompt)
        return self

    @property
    def all_teachers(self) -> tuple[Teacher, ...]:
        """Those of `teachers`, or the one teacher."""
        return self.teachers or (Teacher(model=self.teacher or "", renderer=self.renderer),)

    @property
    def teacher_name(self) -> str:
        """Every teacher's model reference in one text."""
        return " + ".join(teacher.model for teacher in self.all_teachers)

    @cached_property
    def judge_prompt(self) -> str:
        """The template of what the judge is asked."""
        assert self.judge
        path = self.folder / self.judge.prompt
        if not path.is_file():
            raise ValueError(f"judge.prompt names {self.judge.prompt!r}, which {path.parent} lacks")
        text = path.read_text(encoding="utf-8").strip()
        if not text:
            raise ValueError(f"{self.judge.prompt} is empty; write the judge's prompt")
        return text

    @property
    def reads_references(self) -> bool:
        """Whether the verifier or the judge is told what is right."""
        seen = fields_of_expression(self.verifier) if self.verifier is not None else set()
        return "reference" in seen | (fields_of(self.judge_prompt) if self.judge else set())

    @property
    def evidence(self) -> tuple[str, ...]:
        """The columns that say how an answer was chosen among several."""
        if self.choose == "majority":
            return ("candidates", "agreement")
        scores = ("score",) if self.judge else ()
        return ("candidates", *scores) if self.choose == "best" else ()

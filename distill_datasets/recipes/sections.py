"""The sections of a recipe, each checked as it is read."""

import json
import re
from hashlib import sha256
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)

from distill_datasets.models.sampler import Sampling
from distill_datasets.recipes.parsing import check_schema

Choice = Literal["route", "majority", "best"]
Word = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Unknown keys are errors, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Queries(Section):
    """Where the queries are: exactly one of `file`, `hub`, `path`, `package`.

    `file` lies in the recipe's folder; `hub` is a dataset id and needs a `revision` (a commit or
    a tag); `path` is anything `datasets` reads; `package` is an installed package and `member` a
    file in it. `sidecar` is a file in the recipe's folder whose columns are joined by position.
    `sha256` pins a file's content.
    """

    file: str | None = None
    hub: str | None = None
    path: str | None = None
    package: str | None = None
    member: str | None = None
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    sidecar: str | None = None
    sha256: str | None = None
    query: str | None = None
    group: str | None = None
    reference: str | None = None
    forced_split: str | None = None
    rows: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        named = [key for key in ("file", "hub", "path", "package") if getattr(self, key)]
        if len(named) != 1:
            raise ValueError(f"name exactly one of file, hub, path, package; found {named}")
        if self.hub and not self.revision:
            raise ValueError("a hub source needs a revision: a commit or a tag")
        if bool(self.package) != bool(self.member):
            raise ValueError("package and member go together")
        return self

    @property
    def pinned(self) -> bool:
        """Whether what is said here, and the files in the recipe's folder, fix every row."""
        commit = self.hub and re.fullmatch(r"[0-9a-f]{40}", self.revision or "")
        return bool(self.file or commit or (self.package and self.sha256))


class AnswerFormat(Section):
    """How to read the teacher's text: a regular expression with a group `answer`, and choices.

    With `json_schema` the teacher is held to that form, where its server can, and the text is
    read as JSON: the answer is the value of `field` (`a.b` lies within `a`), or without one the
    whole object. The order of the schema's keys is the order in which a strict server writes them.
    """

    pattern: str | None = None
    choices: tuple[str, ...] = ()
    json_schema: dict[str, Any] | None = None
    field: str | None = None

    @field_validator("pattern")
    @classmethod
    def _has_group(cls, pattern: str | None) -> str | None:
        return None if pattern is None else with_group(pattern, "answer")

    @model_validator(mode="after")
    def _is_a_schema(self) -> Self:
        if self.json_schema is not None:
            check_schema(self.json_schema, self.field)
        elif self.field is not None:
            raise ValueError("field is read out of JSON, and needs a json_schema")
        return self

    @property
    def schema_text(self) -> str | None:
        """The schema as JSON, its keys in the order in which they are written."""
        return None if self.json_schema is None else json.dumps(self.json_schema)


class SplitShares(Section):
    """Shares of train, validation and test; rows of one group never straddle two of them.

    `same_rows` puts every row into both train and test: for tutorials, never for a result.
    """

    train: Annotated[float, Field(ge=0, le=1)] = 0.7
    validation: Annotated[float, Field(ge=0, le=1)] = 0.15
    test: Annotated[float, Field(ge=0, le=1)] = 0.15
    same_rows: bool = False

    @model_validator(mode="after")
    def _whole(self) -> Self:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"the shares must add up to 1, found {total:g}")
        return self

    def of(self, group: str) -> str:
        """The split of a group, by its hash: adding queries never moves a row."""
        place = int(sha256(group.encode()).hexdigest()[:15], 16) / 16**15
        if place < self.train:
            return "train"
        return "validation" if place < self.train + self.validation else "test"


class SamplingSection(Section):
    """The teacher's sampling; see `distill_datasets.models.sampler.Sampling`."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    max_tokens: Annotated[int, Field(ge=1)] = 512
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: int = -1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: Annotated[int, Field(ge=1)] = 1
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    extra: dict[str, Any] | None = None

    def parameters(self, json_schema: str | None = None) -> Sampling:
        """As the protocol takes it."""
        fields = self.model_dump(exclude={"extra"})
        extra = None
        if self.extra is not None:
            extra = json.dumps(self.extra, sort_keys=True, ensure_ascii=False)
        return Sampling(**fields, json_schema=json_schema, extra=extra)


class AskedModel(Section):
    """A model to ask, by its reference alone or with how to ask it.

    What `sampling` leaves out is as for everybody else.
    """

    model: str
    sampling: SamplingSection | None = None
    renderer: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return {"model": given} if isinstance(given, str) else given

    @field_serializer("sampling")
    def _as_written(self, sampling: SamplingSection | None) -> dict[str, Any] | None:
        # A value that equals the default differs from one that was left out: it overrides.
        return sampling.model_dump(mode="json", exclude_unset=True) if sampling else None

    def sampling_over(self, common: SamplingSection) -> SamplingSection:
        """`common` with what is said here."""
        own = self.sampling.model_dump(exclude_unset=True) if self.sampling else {}
        return common.model_copy(update=own)


class Teacher(AskedModel):
    """One of several teachers; `weight` is its share of the queries, or of the votes."""

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class Judge(AskedModel):
    """Who scores the answers to choose from.

    `prompt` is a file in the recipe's folder, a Jinja template over `query`, `prompt` (the
    teacher's), `text`, `answer` and `reference`. The last match of `pattern` in what the judge
    says is the score, if it is within `scale`.
    """

    prompt: str = "judge.md"
    pattern: str = r"(?P<score>-?\d+(?:\.\d+)?)"
    scale: tuple[float, float] = (1.0, 10.0)

    @field_validator("prompt")
    @classmethod
    def _inside(cls, prompt: str) -> str:
        path = PurePosixPath(prompt)
        if path.is_absolute() or ".." in path.parts or not path.name:
            raise ValueError("expected a file in the recipe's folder")
        return prompt

    @field_validator("pattern")
    @classmethod
    def _has_group(cls, pattern: str) -> str:
        return with_group(pattern, "score")

    @model_validator(mode="after")
    def _one_answer(self) -> Self:
        if self.sampling and self.sampling.n != 1:
            raise ValueError(f"a judge gives one score, found sampling.n: {self.sampling.n}")
        if not self.scale[0] < self.scale[1]:
            raise ValueError(f"scale goes from low to high, found {list(self.scale)}")
        return self


class SynthesisSection(Section):
    """How the teacher writes queries: what they differ in, and how it is asked.

    Every list is one attribute, and all are crossed. `topics` and `rules` that are not given are
    asked of the teacher; without `languages` those of the recipe are meant, and without any the
    language is left to the teacher. Of two queries that share `similarity` of their runs of five
    characters the later one is dropped. `per_request` queries are asked for at a time.
    """

    topics: tuple[Word, ...] = ()
    styles: tuple[Word, ...] = (
        "plain and direct",
        "casual, with slips of the keyboard",
        "polite and formal",
        "in keywords, no whole sentences",
        "long-winded, with side remarks",
        "in a hurry or annoyed",
    )
    lengths: tuple[Word, ...] = ("a few words", "one or two sentences", "a paragraph")
    languages: tuple[Word, ...] = ()
    difficulties: tuple[Word, ...] = ("typical", "demanding", "an edge case that is easily misread")
    rules: tuple[Word, ...] = ()
    per_request: Annotated[int, Field(ge=1, le=50)] = 10
    similarity: Annotated[float, Field(gt=0, le=1)] = 0.6
    temperature: Annotated[float, Field(ge=0)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)] = 3000

    @field_validator("topics", "styles", "lengths", "languages", "difficulties", "rules")
    @classmethod
    def _once_each(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({word for word in words if words.count(word) > 1}):
            raise ValueError(f"expected each value once, found twice: {twice}")
        return words


def with_group(pattern: str, group: str) -> str:
    """The pattern; raises `ValueError` for no regular expression or one without the group."""
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    if group not in groups:
        raise ValueError(f"expected a group (?P<{group}>…), found {sorted(groups)}")
    return pattern

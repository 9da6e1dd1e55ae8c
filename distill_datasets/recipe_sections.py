"""The sections of a recipe, each checked as it is read."""

import re
from hashlib import sha256
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


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


class AnswerFormat(Section):
    """How to read the teacher's text: a regular expression with a group `answer`, and choices.

    With `json_schema` the teacher is held to that form, where its server can, and the text is
    read as JSON: the answer is the value of `field`, or without one the whole object.
    """

    pattern: str | None = None
    choices: tuple[str, ...] = ()
    json_schema: dict[str, Any] | None = None
    field: str | None = None

    @field_validator("pattern")
    @classmethod
    def _has_group(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            groups = re.compile(pattern).groupindex
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        if "answer" not in groups:
            raise ValueError(f"expected a group (?P<answer>…), found {sorted(groups)}")
        return pattern


class Split(Section):
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
    """The teacher's sampling; see `distill_datasets.sampler.Sampling`."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    max_tokens: Annotated[int, Field(ge=1)] = 512
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: int = -1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: Annotated[int, Field(ge=1)] = 1
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    extra: dict[str, Any] | None = None

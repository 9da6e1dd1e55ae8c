"""The sections of a recipe, each checked as it is read."""

import json
import re
from collections.abc import Collection, Sequence
from hashlib import sha256
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)

from distill_datasets.models.sampler import Sampling
from distill_datasets.recipes.parsing import check_pattern, check_schema

Choice = Literal["route", "majority", "best"]
Word = Annotated[str, Field(min_length=1)]
Temperature = Annotated[float, Field(ge=0, le=100)]
OWN_TEACHER = "teacher"  # as a judge: the model that answers
MaxTokens = Annotated[int, Field(ge=1, le=1_000_000)]
# ISO codes that can be told from one another.
_CODES = """
    af am ar as az be bg bn br bs ca cs cy da de el en eo es et eu fa fi fr fy ga gd gl gu ha he hi
    hr ht hu hy id ig is it ja jv ka kk km kn ko ku ky la lg ln lo lt lv mg mk ml mn mr ms my nb ne
    nl nn no om or pa pl ps pt qu ro ru sa si sk sl so sq sr sv sw ta te th tl tr ug uk ur uz vi xh
    yo zh zu
"""
LANGUAGES = frozenset(_CODES.split())


def in_folder(name: str) -> str:
    """The name of a file within the recipe's folder; raises `ValueError` for any other place."""
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.anchor or ".." in path.parts or not path.name:
            raise ValueError(
                "expected a file in the recipe's folder; queries elsewhere are named by "
                "queries.path"
            )
    return name


FileName = Annotated[str, AfterValidator(in_folder)]


def _is_handle(text: str) -> str:
    if not text.strip() or "\n" in text or text != text.strip():
        raise ValueError("a handle is one line of text, without blanks around it")
    return text


Handle = Annotated[str, AfterValidator(_is_handle), Field(max_length=100)]


class Section(BaseModel):
    """Unknown keys are errors, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _check_source(given: "Queries | MixPart", kinds: Sequence[str]) -> None:
    """Raise `ValueError` for rows that are in no place, in several, or in one that may change."""
    named = [key for key in kinds if getattr(given, key)]
    if len(named) != 1:
        raise ValueError(f"name exactly one of {', '.join(kinds)}; found {named}")
    if given.hub and not given.revision:
        raise ValueError("a hub source needs a revision: a commit or a tag")


class Queries(Section):
    """Where the queries are."""

    file: FileName | None = None
    """A file in the recipe's folder."""
    hub: str | None = None
    """A dataset on the Hub, by its id; it needs a `revision`."""
    path: str | None = None
    """A file or a folder anywhere on this machine."""
    package: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")] | None = None
    """An installed Python package that has the file; it needs a `member`."""
    member: FileName | None = None
    """The file's path in the package."""
    revision: str | None = None
    """A commit or a tag of the Hub dataset."""
    config: str | None = None
    """A configuration of the Hub dataset."""
    split: str | None = None
    """A split of the source."""
    sidecar: FileName | None = None
    """A file in the recipe's folder whose columns are joined to the queries by position."""
    sha256: str | None = None
    """The digest of the file's content; other content is refused."""
    query: str | None = None
    """The column of the queries."""
    messages: str | None = None
    """The column of the conversations, where queries are such; in the place of `query`."""
    group: str | None = None
    """The column of the groups: rows of one group are in one split."""
    reference: str | None = None
    """The column of the right answers."""
    forced_split: str | None = None
    """A column that names a row's split, where the shares shall not decide."""
    encoding: str | None = None
    """How files of text are encoded, where they are neither UTF-8 nor marked: `cp1252`."""
    separator: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """What stands between the fields of a CSV file, where its header doesn't show it."""
    rows: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """The places of the rows to take, from 1."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.model_fields_set:
            _check_source(self, ("file", "hub", "path", "package"))
        if bool(self.package) != bool(self.member):
            raise ValueError("package and member go together")
        if self.query and self.messages:
            raise ValueError("name one of query (a column of texts) and messages (conversations)")
        return self

    def columns(self, found: Collection[str]) -> dict[str, str | None]:
        """The column of each role, of those `found` in the source; a lone `text` is the query's."""
        alone = "text" if {*found} == {"text"} else "query"
        return {
            "query": self.messages or self.query or alone,
            "group": self.group,
            "reference": self.reference,
            "split": self.forced_split,
        }

    @property
    def pinned(self) -> bool:
        """Whether what is said here, and the files in the recipe's folder, fix every row."""
        commit = self.hub and re.fullmatch(r"[0-9a-f]{40}", self.revision or "")
        return bool(self.file or commit or (self.package and self.sha256))


_SOURCE = ("file", "hub", "path", "revision", "config", "split", "encoding", "separator")


class MixPart(Section):
    """Rows of something else that the student learns beside the recipe's own."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=60)]
    """Its name, as the rows' `source`."""
    share: Annotated[float, Field(gt=0, lt=1)]
    """The share of all rows to train on that are of this part."""
    file: FileName | None = None
    """A file in the recipe's folder."""
    hub: str | None = None
    """A dataset on the Hub, by its id; it needs a `revision`."""
    path: str | None = None
    """A file or a folder anywhere on this machine."""
    revision: str | None = None
    """A commit or a tag of the Hub dataset."""
    config: str | None = None
    """A configuration of the Hub dataset."""
    split: str | None = None
    """A split of the source."""
    messages: str | None = None
    """The column of the conversations, each with its answer at the end."""
    query: str | None = None
    """The column of the queries, in the place of `messages`."""
    response: str | None = None
    """The column of the answers to `query`."""
    encoding: str | None = None
    """How files of text are encoded, where they are neither UTF-8 nor marked: `cp1252`."""
    separator: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """What stands between the fields of a CSV file, where its header doesn't show it."""
    model: str | None = None
    """The model that answers, by its reference, where the rows are queries alone. It is asked
    without a prompt or tools, at temperature 0."""
    license: str | None = None
    """The licence of the rows, for the card."""
    origin: str | None = None
    """Where the rows are from, for the card; without it, the source."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        _check_source(self, ("file", "hub", "path"))
        if self.query and (self.messages or bool(self.response) == bool(self.model)):
            raise ValueError(
                "query is a column of texts, with the column of their answers as response, or with "
                "a model to answer them; in the place of messages"
            )
        if self.response and not self.query:
            raise ValueError("response is the column of the answers to query, which is missing")
        return self

    @property
    def source(self) -> Queries:
        """Where the rows are, as queries are."""
        return Queries(**{key: getattr(self, key) for key in _SOURCE if getattr(self, key)})

    @property
    def described(self) -> str:
        """Where its rows are from, in words; of a folder on this machine no more than its name."""
        if self.hub:
            return self.origin or f"{self.hub}@{self.revision}"
        return self.origin or self.file or PurePath(self.path or "").name


def check_mix(parts: Sequence[MixPart]) -> None:
    """Raise `ValueError` for parts of one name, and for shares that leave nothing."""
    names = [part.name for part in parts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"each part of mix has a name of its own; found twice: {twice}")
    if (total := sum(part.share for part in parts)) >= 1:
        raise ValueError(f"the shares of mix must add up to less than 1, found {total:g}")


class AnswerFormat(Section):
    """How the teacher's text is read."""

    pattern: str | None = None
    """A regular expression with a group `answer`, searched for in the text."""
    choices: tuple[str, ...] = ()
    """The answers that count; any other is a rejection."""
    json_schema: dict[str, Any] | None = None
    """The form of the answer: the teacher is held to it where its server can, and the text is
    read as JSON. A strict server writes the keys in the schema's order."""
    field: str | None = None
    """The part of the JSON that is the answer, `a.b` within `a`; without it the whole object is."""
    confidence: str | None = None
    """The part of the JSON that holds the model's confidence, from 0 to 1."""

    @field_validator("pattern")
    @classmethod
    def _has_group(cls, pattern: str | None) -> str | None:
        return None if pattern is None else check_pattern(pattern, "answer")

    @model_validator(mode="after")
    def _is_a_schema(self) -> Self:
        if self.json_schema is not None:
            check_schema(self.json_schema, self.field, self.confidence)
        elif self.field is not None or self.confidence is not None:
            raise ValueError("field (or confidence) is read out of JSON, and needs a json_schema")
        return self

    @property
    def schema_text(self) -> str | None:
        """The schema as JSON, its keys in the order in which they are written."""
        return None if self.json_schema is None else json.dumps(self.json_schema)


class SplitShares(Section):
    """Shares of train, validation and test; rows of one group never straddle two of them."""

    train: Annotated[float, Field(ge=0, le=1)] = 0.7
    """The share of the groups to train on."""
    validation: Annotated[float, Field(ge=0, le=1)] = 0.15
    """The share of the groups to choose checkpoints by."""
    test: Annotated[float, Field(ge=0, le=1)] = 0.15
    """The share of the groups to measure on."""
    same_rows: bool = False
    """Puts every row into both train and test: for tutorials, never for a result."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"the shares must add up to 1, found {total:g}")
        return self

    def of(self, group: str) -> str:
        """The split of a group, by its hash: adding queries never moves a row.

        With `same_rows` it is train, whose rows are in test too.
        """
        if self.same_rows:
            return "train"
        place = int(sha256(group.encode()).hexdigest()[:15], 16) / 16**15
        if place < self.train:
            return "train"
        return "validation" if place < self.train + self.validation else "test"


class SamplingSection(Section):
    """How the teacher samples."""

    temperature: Temperature = 0.0
    """The sampling temperature; 0 takes the likeliest token."""
    max_tokens: MaxTokens = 512
    """The most tokens of an answer."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Samples from the likeliest tokens of this total probability; 1 for all."""
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] = -1
    """Samples from so many likely tokens; -1 for all."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """The seed, where the server takes one."""
    stop: Annotated[tuple[str, ...], Field(max_length=100)] = ()
    """Texts that end an answer."""
    n: Annotated[int, Field(ge=1, le=1_000)] = 1
    """Samples of a query."""
    top_logprobs: Annotated[int, Field(ge=0, le=1_000)] | None = None
    """Keeps the log-probabilities of so many likely tokens in each place, for soft labels."""
    extra: dict[str, Any] | None = None
    """Whatever else the provider takes, as it names it."""

    def parameters(self, json_schema: str | None = None, tools: str | None = None) -> Sampling:
        """As the protocol takes it."""
        fields = self.model_dump(exclude={"extra"})
        if self.extra is not None:
            fields["extra"] = json.dumps(self.extra, sort_keys=True, ensure_ascii=False)
        return Sampling(**fields, json_schema=json_schema, tools=tools)


class Examples(Section):
    """Examples that stand before every query as turns of the conversation."""

    file: FileName
    """A file in the recipe's folder, with the columns `query` (or `messages`) and `response`."""
    rows: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """The places of the rows to take, from 1, in the order in which they shall stand."""
    choose: Annotated[int, Field(ge=1)] | None = None
    """How many of the rows to take: which, and in which order, is found by trying."""
    by: Literal["development"] | None = None
    """What the choice is tried on: the rows of the split `validation` that have references."""
    trials: Annotated[int, Field(ge=2, le=1_000)] = 16
    """The most choices that are tried."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return {"file": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.choose is None) != (self.by is None):
            raise ValueError("choose and by go together: {choose: 4, by: development}")
        if self.rows is not None and self.choose is not None:
            raise ValueError("name one of rows (the choice) and choose (to have it found)")
        if self.rows is not None and (not self.rows or len({*self.rows}) < len(self.rows)):
            raise ValueError("rows names each row once, and at least one")
        return self


class StudentView(Section):
    """What the student sees beside the query."""

    prompt: str | None = None
    """A short prompt."""
    file: FileName | None = None
    """A file in the recipe's folder that holds the short prompt."""
    tools: Literal["drop", "keep"] = "drop"
    """Whether the student is given the recipe's tools."""

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if self.prompt is not None and self.file is not None:
            raise ValueError("name one of prompt and file")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("prompt is empty; leave it out for a student without a prompt")
        return self


class Range(Section):
    """The least and the most of something."""

    min: Annotated[int, Field(ge=0)] = 0
    """The least."""
    max: Annotated[int, Field(ge=0)] | None = None
    """The most; without it there is no limit."""

    @model_validator(mode="before")
    @classmethod
    def _exactly(cls, given: Any) -> Any:
        return {"min": given, "max": given} if isinstance(given, int) else given

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"min goes before max, found {self.min} and {self.max}")
        return self


def several(given: Any) -> Any:
    """A list, of which one text may stand alone."""
    return [given] if isinstance(given, str) else given


Words = Annotated[tuple[Word, ...], BeforeValidator(several), Field(min_length=1)]
Pattern = Annotated[str, AfterValidator(check_pattern)]
_CHECK_FACTS = ("name", "covers", "when")


class Check(Section):
    """Something that the prompt demands and that can be told of an answer: exactly one kind."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Its name, as a metric and in rejections."""
    covers: str | None = None
    """The rule of the prompt that it covers."""
    when: Pattern | None = None
    """A regular expression, searched for in the row's reference: only such rows are checked."""
    matches: Pattern | None = None
    """A regular expression that occurs in the text. The text is the model's words, without calls
    of tools, as they stand."""
    not_matches: Pattern | None = None
    """A regular expression that does not occur in the text."""
    starts_with: Words | None = None
    """What the text starts with: a text, or one of several."""
    ends_with: Words | None = None
    """What the text ends with: a text, or one of several."""
    sentences: Range | None = None
    """The number of sentences; an item of a list is one too."""
    words: Range | None = None
    """The number of words; a Chinese or Japanese character is one."""
    bullets: Range | None = None
    """The number of bullet points; numbered items are none."""
    characters: Range | None = None
    """The number of characters, as a reader counts them."""
    json_form: Annotated[bool | dict[str, Any] | None, Field(alias="json")] = None
    """`true` where the whole text is JSON, or the JSON schema that it fits."""
    fields: Words | None = None
    """Parts of the answer's JSON (or `key: value; key: value`), `a.b` within `a`, that equal the
    reference's; rows whose reference is no JSON are not checked."""
    contains: Words | None = None
    """Texts that all occur in the text, in upper or lower case, within words too."""
    contains_any: Words | None = None
    """Texts of which one occurs in the text, in upper or lower case, within words too."""
    contains_reference: Literal[True] | None = None
    """The row's reference occurs in the text as a whole, in upper or lower case; rows without
    one are not checked."""
    never: Words | None = None
    """Texts of which none occurs in the text, in upper or lower case, within words neither."""
    language: Words | None = None
    """The language of the text, as an ISO code, or one of several; texts of a few words are not
    checked."""
    choices: Words | None = None
    """The answer is one of these."""
    calls: Words | None = None
    """Tools that are all called."""
    never_calls: Literal[True] | Words | None = None
    """Tools that are not called; `true` for none at all."""
    ends: Literal[True] | None = None
    """The answer ended by itself, and not at the token limit."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        said = self.model_fields_set - {*_CHECK_FACTS}
        if len(said) != 1:
            fields = type(self).model_fields.items()
            kinds = (field.alias or name for name, field in fields if name not in _CHECK_FACTS)
            raise ValueError(f"expected exactly one of {sorted(kinds)}; found {sorted(said)}")
        if isinstance(self.json_form, dict):
            check_schema(self.json_form)
        if unknown := sorted({*(self.language or ())} - LANGUAGES):
            raise ValueError(f"expected ISO codes of {sorted(LANGUAGES)}; found {unknown}")
        return self

    @property
    def kind(self) -> str:
        """The one key that says what is checked."""
        (name,) = self.model_fields_set - {*_CHECK_FACTS}
        return name

    @property
    def demand(self) -> str:
        """What is checked, as it is written: `words: {max: 60}`."""
        said = self.model_dump(
            mode="json", include={self.kind}, by_alias=True, exclude_defaults=True
        )
        return json.dumps(said, ensure_ascii=False)[1:-1].replace('"', "", 2)


class AskedModel(Section):
    """A model to ask, by its reference alone or with how to ask it."""

    model: str
    """A model reference."""
    sampling: SamplingSection | None = None
    """Its sampling, where it differs from the recipe's."""
    renderer: str | None = None
    """Its renderer, where it isn't the model's own."""

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
    """One of several teachers."""

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Its share of the queries, or of the votes."""


def check_teachers(teachers: Sequence[Teacher], common: SamplingSection) -> None:
    """Raise `ValueError` where two of several teachers would answer alike."""
    places: dict[str, int] = {}
    for place, teacher in enumerate(teachers, 1):
        sampling = teacher.sampling_over(common).model_dump_json()
        first = places.setdefault(f"{teacher.model} {teacher.renderer} {sampling}", place)
        if first != place:
            raise ValueError(
                f"teachers {first} and {place} are the same and would answer alike: keep one "
                "with the sum of their weights, or let them sample differently"
            )


class Judge(AskedModel):
    """A model that scores the answers to choose from."""

    model: str = OWN_TEACHER
    """A model reference; `teacher` is the recipe's first teacher itself."""
    prompt: FileName = "judge.md"
    """A file in the recipe's folder: a Jinja template over `query`, `prompt` (the teacher's),
    `text`, `answer` and `reference`."""
    pattern: str = r"(?P<score>-?\d+(?:\.\d+)?)"
    """A regular expression with a group `score`; its last match in what the judge says is the
    score."""
    scale: tuple[float, float] = (1.0, 10.0)
    """The lowest and the highest score; any other is none."""

    @field_validator("pattern")
    @classmethod
    def _has_group(cls, pattern: str) -> str:
        return check_pattern(pattern, "score")

    @model_validator(mode="after")
    def _one_answer(self) -> Self:
        if self.sampling and self.sampling.n != 1:
            raise ValueError(f"a judge gives one score, found sampling.n: {self.sampling.n}")
        if not self.scale[0] < self.scale[1]:
            raise ValueError(f"scale goes from low to high, found {list(self.scale)}")
        return self


class SynthesisSection(Section):
    """How the teacher writes queries. Every list is one attribute, and all are crossed."""

    topics: tuple[Word, ...] = ()
    """Topics of the queries; without them the teacher names some."""
    styles: tuple[Word, ...] = (
        "plain and direct",
        "casual, with slips of the keyboard",
        "polite and formal",
        "in keywords, no whole sentences",
        "long-winded, with side remarks",
        "in a hurry or annoyed",
    )
    """Styles of the queries."""
    lengths: tuple[Word, ...] = ("a few words", "one or two sentences", "a paragraph")
    """Lengths of the queries."""
    languages: tuple[Word, ...] = ()
    """Languages of the queries; without them the recipe's `languages`."""
    difficulties: tuple[Word, ...] = ("typical", "demanding", "an edge case that is easily misread")
    """Difficulties of the queries."""
    turns: tuple[Annotated[int, Field(ge=1, le=99)], ...] = (1, 3, 5)
    """How many messages conversations have, where queries are such; the last is the user's."""
    rules: tuple[Word, ...] = ()
    """Rules of the prompt that queries shall exercise; without them the teacher names some. Each
    tool, and what each check covers, is one more."""
    per_request: Annotated[int, Field(ge=1, le=50)] = 10
    """Queries that one request asks for."""
    similarity: Annotated[float, Field(gt=0, le=1)] = 0.6
    """The share of common runs of five characters from which of two queries the later is
    dropped."""
    temperature: Temperature = 1.0
    """The sampling temperature."""
    max_tokens: MaxTokens = 3000
    """The most tokens of a reply."""

    @field_validator("turns")
    @classmethod
    def _end_with_the_user(cls, turns: tuple[int, ...]) -> tuple[int, ...]:
        if even := [count for count in turns if count % 2 == 0]:
            raise ValueError(
                f"expected odd numbers, since users speak first and last; found {even}"
            )
        return turns

    @field_validator("topics", "styles", "lengths", "languages", "difficulties", "rules")
    @classmethod
    def _once_each(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({word for word in words if words.count(word) > 1}):
            raise ValueError(f"expected each value once, found twice: {twice}")
        return words

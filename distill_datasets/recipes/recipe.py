"""A recipe: what to ask, of whom, and how to read the answer. Data, not code."""

import re
import shutil
from functools import cached_property
from hashlib import file_digest
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from distill_datasets.errors import RecipeError, nearest
from distill_datasets.hub.references import inside
from distill_datasets.models.sampler import Sampling, digest
from distill_datasets.recipes.parsing import Reader
from distill_datasets.recipes.prompt import (
    check_expression,
    check_placeholders,
    check_template,
    fields_of,
    fields_of_expression,
    fill,
    is_jinja,
    placeholders_of,
    render,
)
from distill_datasets.recipes.query_files import read_text
from distill_datasets.recipes.sections import (
    AnswerFormat,
    Choice,
    Judge,
    Queries,
    SamplingSection,
    Section,
    SplitShares,
    SynthesisSection,
    Teacher,
)
from distill_datasets.schema import Message

PROMPT_LIMIT = 10 << 20  # bytes

METRICS = ("accuracy", "macro_f1", "answered", "agreement")
_VERIFIED = {"query", "text", "answer", "reference"}
_JUDGED = {*_VERIFIED, "prompt"}
_NEEDED = {"agreement": "majority", "verifier": "best", "judge": "best"}

# What the digest is of. A key that is not used is no part of it, so that a new key keeps releases.
_DIGESTED = ("name", "teacher", "queries", "answer", "response", "sampling", "split", "renderer")
_UNUSED: dict[str, Any] = {
    **{"teachers": [], "choose": "route"},
    **dict.fromkeys(("agreement", "verifier", "judge")),
}
_UNUSED_IN = {
    "answer": ("json_schema", "field"),
    "sampling": ("top_logprobs", "extra"),
    "queries": ("encoding", "separator"),
}

Identifier = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]


class Recipe(Section):
    """What `recipe.yaml` and `prompt.md` say, validated.

    `folder` is where the recipe lies; `prompt` is the text of `prompt.md`.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The recipe's name."""
    description: str
    """What the dataset is about, in a sentence."""
    teacher: str | None = None
    """The model that answers, by its reference; either this or `teachers`."""
    teachers: tuple[Teacher, ...] = ()
    """Several models that answer."""
    choose: Choice = "route"
    """How several answers become one: `route` asks one teacher by weight; `majority` and `best`
    ask all."""
    agreement: Annotated[float, Field(gt=0, le=1)] | None = None
    """The least share of the votes that a majority has."""
    verifier: str | None = None
    """An expression over `query`, `text`, `answer` and `reference` that holds for a good answer."""
    judge: Judge | None = None
    """A model that scores the answers, of which the best is kept."""
    sampling: SamplingSection = SamplingSection()
    """How the teachers sample."""
    renderer: str | None = None
    """The renderer of the teacher's conversation, where it isn't the model's own."""
    queries: Queries
    """Where the queries are: exactly one of `file`, `hub`, `path`, `package`."""
    template: Literal["text", "jinja"] | None = None
    """What the prompt is: text in which `{{ query }}` and the `variables` are replaced, or a
    Jinja template over them."""
    variables: dict[Identifier, str] = {}
    """Texts by name, for the prompt."""
    answer: AnswerFormat = AnswerFormat()
    """How the teacher's text is read."""
    response: str = "{{ answer }}"
    """What the student shall say: a Jinja template over `answer` (as read) and `text` (as
    sampled)."""
    split: SplitShares = SplitShares()
    """Shares of the splits."""
    synthesis: SynthesisSection = SynthesisSection()
    """How the teacher writes queries, for `synthesize`."""
    license: str | None = None
    """The dataset's licence, as the Hub names it."""
    attribution: str | None = None
    """Who made the queries."""
    teacher_terms: str | None = None
    """The terms under which the teacher's answers may be used."""
    languages: tuple[str, ...] = ()
    """The languages of the queries, as ISO codes."""
    metrics: tuple[str, ...] = METRICS
    """The metrics of a report."""
    folder: Path = Field(default=Path(), exclude=True)
    prompt: str = Field(default="", exclude=True)

    @model_validator(mode="after")
    def _teachers_differ(self) -> Self:
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
    def _choice_is_possible(self) -> Self:
        for key, choice in _NEEDED.items():
            if getattr(self, key) is not None and self.choose != choice:
                raise ValueError(f"{key} needs 'choose: {choice}'; found 'choose: {self.choose}'")
        answers = sum(one.sampling_over(self.sampling).n for one in self.all_teachers)
        if self.choose != "route" and answers == 1 and not self._sifts:
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

    @model_validator(mode="after")
    def _templates(self) -> Self:
        if not self.prompt.strip():
            raise ValueError("prompt.md is empty")
        if "query" in self.variables:
            raise ValueError("variables can't name the query; choose another name")
        known = {"query", *self.variables}
        if self.template == "jinja":
            check_template(self.prompt, known, "prompt.md")
        elif self.template is None:
            check_placeholders(self.prompt, known)
        check_template(self.response, {"answer", "text"}, "response")
        return self

    @model_validator(mode="after")
    def _metrics_are_ours(self) -> Self:
        if others := [name for name in self.metrics if name not in METRICS]:
            raise ValueError(
                f"metrics names {others}; expected some of {list(METRICS)}."
                + nearest(others[0], list(METRICS))
                + " A metric of your own is given with --metric path.py:Name"
            )
        return self

    @model_validator(mode="after")
    def _attachments_are_inside(self) -> Self:
        for name in self.attachments:
            inside(self.folder, name)
        return self

    @property
    def _sifts(self) -> bool:
        return self.verifier is not None or self.judge is not None

    @property
    def all_teachers(self) -> tuple[Teacher, ...]:
        """Those of `teachers`, or the one teacher."""
        return self.teachers or (Teacher(model=self.teacher or "", renderer=self.renderer),)

    @property
    def teacher_name(self) -> str:
        """Every teacher's model reference in one text."""
        return " + ".join(teacher.model for teacher in self.all_teachers)

    def with_teacher(self, model: str) -> "Recipe":
        """The recipe with one teacher in place of whatever it names.

        `choose` goes where that teacher leaves nothing to choose from.
        """
        several = self.sampling.n > 1 or self._sifts
        choice = {} if several else {"choose": "route", "agreement": None}
        return self.replace(teacher=model, teachers=(), **choice)

    @cached_property
    def judge_prompt(self) -> str:
        """The template of what the judge is asked."""
        assert self.judge
        path = inside(self.folder, self.judge.prompt)
        if not path.is_file():
            raise ValueError(f"judge.prompt names {self.judge.prompt!r}, which {path.parent} lacks")
        text = read_text(path, limit=PROMPT_LIMIT).strip()
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

    @cached_property
    def asks_in_one_message(self) -> bool:
        """Whether the prompt holds the query: then it is one user message, else the system's."""
        jinja = self.template == "jinja"
        return "query" in (fields_of(self.prompt) if jinja else placeholders_of(self.prompt))

    def messages(self, query: str) -> list[Message]:
        """What the teacher sees."""
        if self.asks_in_one_message:
            return [{"role": "user", "content": self._filled(query=query)}]
        system: Message = {"role": "system", "content": self._system_text}
        return [system, *self.student_messages(query)]

    @cached_property
    def _system_text(self) -> str:
        return self._filled()

    def _filled(self, **fields: str) -> str:
        fields = {**self.variables, **fields}
        return (
            render(self.prompt, **fields) if self.template == "jinja" else fill(self.prompt, fields)
        )

    @staticmethod
    def student_messages(query: str) -> list[Message]:
        """What the student and the base see: the query, and no prompt."""
        return [{"role": "user", "content": query}]

    def write_response(self, text: str, answer: str) -> str:
        """What the student shall say for a teacher's `text` read as `answer`."""
        return render(self.response, text=text.strip(), answer=answer)

    @property
    def teacher_reader(self) -> Reader:
        """Reads the teacher's text."""
        answer = self.answer
        form = answer.schema_text
        return Reader(answer.pattern, answer.choices, form, answer.field, recipe=self.name)

    @property
    def student_reader(self) -> Reader:
        """Reads what was trained on `write_response`: the whole text must have that form."""
        if "text" in fields_of(self.response):
            return self.teacher_reader
        mark = "\x00"
        first, *rest = re.escape(self.write_response(mark, mark)).split(re.escape(mark))
        pattern = first + "(?P<answer>.+?)" + "(?P=answer)".join(rest)
        # A field's value is text like any other; a whole object is an object for the student too.
        form = None if self.answer.field else self.answer.schema_text
        whole = rf"(?s)\A\s*{pattern}\s*\Z"
        return Reader(whole, self.answer.choices, form, recipe=self.name)

    @property
    def sampling_parameters(self) -> Sampling:
        """The teacher's sampling as the protocol takes it."""
        return self.sampling.parameters(self.answer.schema_text)

    def sampling_of(self, teacher: Teacher) -> Sampling:
        """How one of `all_teachers` samples."""
        return teacher.sampling_over(self.sampling).parameters(self.answer.schema_text)

    @cached_property
    def digest(self) -> str:
        """Changes with whatever changes a row; not with descriptions, licences or folders."""
        fields = self.model_dump(mode="json", include={*_DIGESTED, *_UNUSED})
        for section, names in _UNUSED_IN.items():
            for name in names:
                if fields[section][name] is None:
                    del fields[section][name]
        if form := self.answer.schema_text:
            fields["answer"]["json_schema"] = form  # with the order of its keys
        for name, unused in _UNUSED.items():
            if fields[name] == unused:
                del fields[name]
        declared = {"variables": dict(self.variables)} if self.variables else {}
        files = {name: _file_digest(self.folder / name) for name in self.attachments}
        fields.update(declared, **self._kept_jinja)
        return digest({**fields, "prompt": self.prompt, "files": files})

    @property
    def _kept_jinja(self) -> dict[str, str]:
        """What a release says of a prompt that Jinja would change and that is text."""
        kept = self.template != "jinja" and is_jinja(self.prompt)
        return {"template": "text"} if kept else {}

    @property
    def attachments(self) -> tuple[str, ...]:
        """The files of queries, and the judge's prompt, that lie in the recipe's folder."""
        judged = self.judge.prompt if self.judge else None
        return tuple(name for name in (self.queries.file, self.queries.sidecar, judged) if name)

    def dump(self, folder: Path) -> None:
        """Write the recipe so that `load_recipe(folder)` reads it back with the same digest."""
        folder.mkdir(parents=True, exist_ok=True)
        fields = self.model_dump(mode="json", exclude_defaults=True)
        fields.update(self._kept_jinja)
        text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=100)
        (folder / "recipe.yaml").write_text(text, encoding="utf-8")
        (folder / "prompt.md").write_text(self.prompt + "\n", encoding="utf-8")
        for name in self.attachments:
            if (self.folder / name).resolve() != (folder / name).resolve():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / name, folder / name)

    def replace(self, **changes: Any) -> "Recipe":
        """The recipe with some fields changed, validated again."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return Recipe(**{**fields, **changes})


def _file_digest(path: Path) -> str:
    if not path.is_file():
        raise RecipeError(f"The recipe names the file {path.name!r}, which {path.parent} lacks.")
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()

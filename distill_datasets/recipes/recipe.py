"""A recipe: what to ask, of whom, and how to read the answer. Data, not code."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import file_digest
from itertools import chain
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, model_validator

from distill_datasets.conversations import (
    below,
    from_text,
    split_calls,
    to_text,
    user_message,
    with_answers,
    write_calls,
)
from distill_datasets.errors import RecipeError, nearest
from distill_datasets.hub.references import inside
from distill_datasets.models.sampler import Sampling, digest
from distill_datasets.recipes.checks import (
    Said,
    check_all,
    check_tools,
    first_failure,
    validate_checks,
)
from distill_datasets.recipes.keys import METRICS, RecipeKeys
from distill_datasets.recipes.parsing import Reader, Reading
from distill_datasets.recipes.prompt import (
    check_fields,
    check_placeholders,
    fields_of,
    fields_of_expression,
    fill,
    is_jinja,
    placeholders_of,
    read_examples,
    render,
)
from distill_datasets.recipes.sections import (
    Check,
    Queries,
    Section,
    Teacher,
    check_mix,
    check_teachers,
)
from distill_datasets.recipes.tools import read_tools
from distill_datasets.recipes.user_files import read_text
from distill_datasets.schema import EARLIER, SOURCE, Message

PROMPT_LIMIT = 10 << 20  # bytes

MEASURABLE = (*METRICS, "field_match", "chrf", "rouge_l", "exact_match", "ece", "brier")
_VERIFIED = {"query", "text", "answer", "reference"}
_JUDGED = {*_VERIFIED, "prompt"}
_NEEDED = {"agreement": "majority", "verifier": "best", "judge": "best"}

_OF_MEMBERS = (
    *("queries", "tools", "examples", "checks", "turns", "student", "answer", "response"),
)

# What the digest is of. A key that is not used is no part of it, so that a new key keeps releases.
_DIGESTED = ("name", "teacher", "queries", "answer", "response", "sampling", "split", "renderer")
_OPTIONAL = (
    *("teachers", "choose", "turns", "keep", "prompts", "mix", "agreement", "verifier", "judge"),
    *("tools", "examples", "student", "canaries"),
)
_UNUSED_IN = {
    "answer": ("json_schema", "field"),
    "sampling": ("top_logprobs", "extra"),
    "queries": ("encoding", "separator", "messages"),
}


class Recipe(RecipeKeys):
    """What `recipe.yaml` and `prompt.md` say, validated.

    `folder` is where the recipe lies; `prompt` is the text of `prompt.md`; `members` are the
    recipes behind the handles of `prompts`.
    """

    folder: Path = Field(default=Path(), exclude=True)
    prompt: str = Field(default="", exclude=True)
    members: dict[str, "Recipe"] = Field(default={}, exclude=True)

    @model_validator(mode="after")
    def _teachers_can_be_chosen_from(self) -> Self:
        if (self.teacher is None) == (not self.teachers):
            found = "neither" if self.teacher is None else "both"
            raise ValueError(f"name exactly one of teacher and teachers; found {found}")
        if self.teachers and self.renderer:
            raise ValueError("each of several teachers has its own renderer: move it there")
        check_teachers(self.teachers, self.sampling)
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
        return self

    @model_validator(mode="after")
    def _queries_are_somewhere(self) -> Self:
        if not self.prompts and self.queries == Queries():
            raise ValueError("the key 'queries' is missing")
        if found := [name for name in _OF_MEMBERS if self.prompts and self._sets(name)]:
            raise ValueError(f"with prompts, each of its recipes has its own {found}: remove them")
        for name, member in self.members.items():
            if member.prompts or member.turns == "all" or member.mix:
                raise ValueError(
                    f"{name!r} has prompts, 'turns: all' or a mix: it can't be one of several"
                )
            if chosen := [key for key in (*_NEEDED, "teachers", "choose") if member._sets(key)]:
                raise ValueError(
                    f"{name!r} has {chosen}, which would say nothing here: one of several prompts "
                    "is answered by the recipe's own teacher. Remove them there"
                )
        return self

    @model_validator(mode="after")
    def _templates_take_known_fields(self) -> Self:
        if not self.prompt.strip():
            raise ValueError("prompt.md is empty")
        if "query" in self.variables:
            raise ValueError("variables can't name the query; choose another name")
        if self.verifier is not None:
            check_fields(self.verifier, _VERIFIED, "verifier", expression=True)
        if self.judge:
            check_fields(self.judge_prompt, _JUDGED, self.judge.prompt)
        known = {"query", *self.variables}
        if self.template == "jinja":
            check_fields(self.prompt, known, "prompt.md")
        elif self.template is None and not self.members:
            check_placeholders(self.prompt, known)
        check_fields(self.response, {"answer", "text"}, "response")
        return self

    @model_validator(mode="after")
    def _turns_are_possible(self) -> Self:
        if (self.holds_conversations or self.examples) and self.asks_in_one_message:
            raise ValueError(
                "prompt.md holds {{ query }}, which makes prompt and query one message: remove it "
                "where queries are conversations or have examples before them"
            )
        if self.turns == "all" and not self.holds_conversations:
            raise ValueError("'turns: all' needs conversations: name their column, messages")
        if self.turns == "all" and (self.choose != "route" or self.sampling.n > 1):
            raise ValueError("'turns: all' needs one answer a turn: one teacher, sampling.n of 1")
        for own, what in (("response", "what the teacher says"), ("answer", "the calls")):
            if self.tools and self._sets(own):
                raise ValueError(f"with tools the {own} is {what}: remove {own}")
        if self.student.tools == "keep" and not self.tools:
            raise ValueError("'student: {tools: keep}' needs tools: name their file, or remove it")
        return self

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        for name in self.attachments:
            inside(self.folder, name)
        check_mix(self.mix)
        known = {
            "has_tools": self.tools is not None,
            "has_references": bool(self.queries.reference),
        }
        validate_checks(self.checks, self.keep, MEASURABLE, **known)
        if others := [name for name in self.metrics if name not in MEASURABLE]:
            raise ValueError(
                f"metrics names {others}; expected some of {list(MEASURABLE)}."
                + nearest(others[0], list(MEASURABLE))
                + " A metric of your own is given with --metric path.py:Name"
            )
        calibration = sorted({*self.metrics} & {"ece", "brier"})
        if calibration and not (self.answer.confidence or self.members):
            raise ValueError(f"{calibration} need answer.confidence, the field of the confidence")
        return self

    def _sets(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)

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

    @property
    def answer_columns(self) -> tuple[str, ...]:
        """The columns that answers have in this recipe beyond those of every other."""
        earlier = (EARLIER,) if self.turns == "all" else ()
        return (*earlier, *((SOURCE, "tools") if self.mix else ()))

    @cached_property
    def asks_in_one_message(self) -> bool:
        """Whether the prompt holds the query: then it is one user message, else the system's."""
        if self.members:
            return False
        jinja = self.template == "jinja"
        return "query" in (fields_of(self.prompt) if jinja else placeholders_of(self.prompt))

    @property
    def holds_conversations(self) -> bool:
        """Whether a query is the text of a conversation; see `conversations.to_text`."""
        return self.queries.messages is not None or bool(self.members)

    @property
    def parts(self) -> list["Recipe"]:
        """The recipes of several prompts, or this one."""
        return [*self.members.values()] or [self]

    @property
    def has_form(self) -> bool:
        """Whether an answer is one of a form, of which one is right, and not free text."""
        return any((self.tools, self.answer.pattern, self.answer.choices, self.answer.json_schema))

    def part(self, query: str) -> tuple["Recipe", str]:
        """The recipe that a query is for, and the query as that recipe has it."""
        if not self.members:
            return self, query
        first, *turns = from_text(query)
        handle, _, own = first["content"].partition("\n\n")
        member = self.members[handle]
        if own:
            turns = [{"role": "system", "content": own}, *turns]
        return member, to_text(turns) if member.holds_conversations else turns[0]["content"]

    def fitted(self, query: str, sampling: Sampling) -> Sampling:
        """How the teacher samples for a query: with the tools and the form of its own prompt."""
        if not self.members:
            return sampling
        member, _ = self.part(query)
        form = member.answer.schema_text
        return replace(sampling, tools=member.tools_text, json_schema=form)

    def fitted_to_student(self, query: str, sampling: Sampling) -> Sampling:
        """How the student samples for a query: with the tools that it is given."""
        tools = self.part(query)[0].student_tools
        return sampling if tools == sampling.tools else replace(sampling, tools=tools)

    def handle(self, query: str) -> str | None:
        """The handle of the prompt that a query is for, where there are several."""
        return from_text(query)[0]["content"].partition("\n\n")[0] if self.members else None

    def conversation(self, query: str, earlier: Sequence[str] = ()) -> list[Message]:
        """A query as messages; of one whose turns are all answered, up to the first turn after
        those with an `earlier` response.
        """
        if not self.holds_conversations:
            return [user_message(query)]
        messages = from_text(query)
        return messages if self.turns == "last" else with_answers(messages, earlier)

    def turns_of(self, query: str) -> int:
        """How many answers a query asks for."""
        if self.turns == "last":
            return 1
        return sum(message["role"] == "user" for message in from_text(query))

    def messages(self, query: str, earlier: Sequence[str] = ()) -> list[Message]:
        """What the teacher sees."""
        if self.members:
            member, own = self.part(query)
            return member.messages(own)
        if self.asks_in_one_message:
            return [user_message(self._filled(query=query))]
        conversation = self.conversation(query, earlier)
        return below(self.system_text, self.example_turns, conversation)

    def prompt_text(self, query: str) -> str:
        """All that the teacher sees beside a query: prompt, examples and tools, as one text."""
        part, _ = self.part(query)
        if part.asks_in_one_message:
            return part._filled(query="")
        shown = [one["content"] for one in part.example_turns]
        return "\n".join([part.system_text, *shown, part.tools_text or ""])

    @cached_property
    def example_turns(self) -> list[Message]:
        """The examples as turns before the query."""
        if self.examples is None:
            return []
        known, rows = self.all_examples, self.examples.rows
        if rows and max(rows) > len(known):
            raise RecipeError(
                f"examples.rows names row {max(rows)}, and {self.examples.file!r} has {len(known)}."
            )
        chosen = [known[row - 1] for row in rows] if rows else known[: self.examples.choose]
        return list(chain.from_iterable(chosen))

    @cached_property
    def all_examples(self) -> list[list[Message]]:
        """The turns of each example in the file, whether it is chosen or not."""
        if self.examples is None:
            return []
        return read_examples(self.folder / self.examples.file, self.tools_text)

    @cached_property
    def example_queries(self) -> frozenset[str]:
        """The examples' queries, none of which is a row's."""
        asked = [turns[:-1] for turns in self.all_examples]
        return frozenset(
            to_text(turns) if self.holds_conversations else turns[-1]["content"] for turns in asked
        )

    @cached_property
    def tools_text(self) -> str | None:
        """The tools as JSON text, in OpenAI's form; None for none."""
        if self.tools is None:
            return None
        tools = read_tools(self.folder / self.tools)
        check_tools(self.checks, tools)
        return tools

    @cached_property
    def system_text(self) -> str:
        """The prompt, where it is a system message."""
        return self._filled()

    def _filled(self, **fields: str) -> str:
        fields = {**self.variables, **fields}
        return (
            render(self.prompt, **fields) if self.template == "jinja" else fill(self.prompt, fields)
        )

    def student_messages(self, query: str, earlier: Sequence[str] = ()) -> list[Message]:
        """What the student and the base see: the query, and a short prompt where there is one."""
        return below(self.student_prompt, (), self.conversation(query, earlier))

    @cached_property
    def student_prompt(self) -> str | None:
        """The short prompt of the student; None for none."""
        if self.student.file is None:
            return self.student.prompt
        return read_text(self.folder / self.student.file, limit=PROMPT_LIMIT).strip()

    @property
    def student_tools(self) -> str | None:
        """The tools that the student is given, as JSON text."""
        return self.tools_text if self.student.tools == "keep" else None

    def read(self, query: str, reference: str | None, text: str, stop_reason: str) -> Reading:
        """The answer and the response in the teacher's text for a query, or why there is none."""
        if self.members:
            member, own = self.part(query)
            return member.read(own, reference, text, stop_reason)
        parsed = self.teacher_reader.read(text, stop_reason)
        if (answer := parsed.answer) is None:
            return Reading(rejection=parsed.rejection)
        said = Said(text, stop_reason, answer, reference, self.tools is not None)
        if failure := first_failure(self.kept_checks, said):
            return Reading(rejection=failure)
        return Reading(answer, self.write_response(text, answer))

    @cached_property
    def kept_checks(self) -> list[Check]:
        """The checks that an answer must pass to be kept."""
        return [one for one in self.checks if self.keep == "all checks" or one.name in self.keep]

    @property
    def all_checks(self) -> dict[str, Check]:
        """The checks by the names that reports give them; those of several prompts with theirs."""
        members = {
            f"{member.name}.{name}": check
            for member in self.members.values()
            for name, check in member.all_checks.items()
        }
        return members or {check.name: check for check in self.checks}

    def check(
        self,
        query: str,
        reference: str | None,
        text: str,
        stop_reason: str | None,
        answer: str | None,
    ) -> dict[str, bool | None]:
        """Which of `all_checks` a text for a query passes; None where one says nothing of it."""
        part, _ = self.part(query)
        said = Said(text, stop_reason, answer, reference, part.tools is not None)
        prefix = f"{part.name}." if self.members else ""
        return {prefix + name: passed for name, passed in check_all(part.checks, said).items()}

    @property
    def reading_parts(self) -> list[Any]:
        """JSON values that name everything that `read` depends on but what it is given."""
        if self.members:
            return [[name, *member.reading_parts] for name, member in self.members.items()]
        kept = [["checks", *map(_said, self.kept_checks)]] if self.kept_checks else []
        return [*self.teacher_reader.parts, *kept]

    def write_response(self, text: str, answer: str) -> str:
        """What the student shall say for a teacher's `text` read as `answer`."""
        if self.tools:
            return write_calls(*split_calls(text))
        return render(self.response, text=text.strip(), answer=answer)

    @cached_property
    def teacher_reader(self) -> Reader:
        """Reads the teacher's text."""
        form = self.answer
        said = (form.pattern, form.choices, form.schema_text, form.field, self.tools_text)
        return Reader(*said, recipe=self.name)

    @cached_property
    def student_reader(self) -> Reader:
        """Reads what was trained on `write_response`: the whole text must have that form."""
        if self.tools:  # it may be asked without their schemas
            return replace(self.teacher_reader, untyped=True)
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
        return self.sampling.parameters(self.answer.schema_text, self.tools_text)

    def sampling_of(self, teacher: Teacher) -> Sampling:
        """How one of `all_teachers` samples."""
        sampling = teacher.sampling_over(self.sampling)
        return sampling.parameters(self.answer.schema_text, self.tools_text)

    @cached_property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts at which a teacher is cut; with any, an answer's end may not be its own."""
        sampled = (teacher.sampling_over(self.sampling) for teacher in self.all_teachers)
        return tuple(sorted({text for sampling in sampled for text in sampling.stop if text}))

    @cached_property
    def digest(self) -> str:
        """Changes with whatever changes a row; not with descriptions, licences or folders."""
        fields = self._fields_of_rows
        if form := self.answer.schema_text:
            fields["answer"]["json_schema"] = form  # with the order of its keys
        if self.members:
            fields["prompts"] = {name: member.digest for name, member in self.members.items()}
        if self.variables:
            fields["variables"] = dict(self.variables)
        fields |= self._kept_jinja
        files = {name: _file_digest(self.folder / name) for name in self.attachments}
        return digest({**fields, "prompt": self.prompt, "files": files})

    @property
    def _fields_of_rows(self) -> dict[str, Any]:
        """The keys that change a row, as far as they are used."""
        used = filter(self._sets, _OPTIONAL)
        fields = self.model_dump(mode="json", include={*_DIGESTED, *used})
        for section, names in _UNUSED_IN.items():
            for name in names:
                if fields[section][name] is None:
                    del fields[section][name]
        del fields["answer"]["confidence"]  # is measured, and changes no row
        if self.mix:
            words = {"license", "origin"}  # for the card, which change no row
            fields["mix"] = [
                _said(part.model_copy(update=dict.fromkeys(words))) for part in self.mix
            ]
        if self.keep:
            fields["checks"] = [_said(check) for check in self.checks]
        return fields

    @property
    def _kept_jinja(self) -> dict[str, str]:
        """What a release says of a prompt that Jinja would change and that is text."""
        kept = self.template != "jinja" and is_jinja(self.prompt)
        return {"template": "text"} if kept else {}

    @property
    def pinned(self) -> bool:
        """Whether the recipe fixes every row of its queries."""
        own = [one.queries for one in self.parts]
        return all(one.pinned for one in (*own, *(part.source for part in self.mix)))

    @property
    def attachments(self) -> tuple[str, ...]:
        """The files beside prompt.md in the recipe's folder that the recipe names."""
        judged = self.judge.prompt if self.judge else None
        shown = self.examples.file if self.examples else None
        named = (self.queries.file, self.queries.sidecar, judged, self.tools, shown)
        mixed = [part.file for part in self.mix]
        return tuple(name for name in (*named, self.student.file, *mixed) if name)

    def dump(self, folder: Path) -> None:
        """Write the recipe so that `load_recipe(folder)` reads it back with the same digest."""
        folder.mkdir(parents=True, exist_ok=True)
        fields = _said(self)
        fields.update(self._kept_jinja)
        if self.members:  # which may be recipes that lie elsewhere
            fields["prompts"] = {name: f"prompts/{one.name}" for name, one in self.members.items()}
        text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=100)
        (folder / "recipe.yaml").write_text(text, encoding="utf-8")
        (folder / "prompt.md").write_text(self.prompt + "\n", encoding="utf-8")
        for name, member in self.members.items():
            member.dump(folder / fields["prompts"][name])
        for name in self.attachments:
            if (self.folder / name).resolve() != (folder / name).resolve():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / name, folder / name)

    def replace(self, **changes: Any) -> "Recipe":
        """The recipe with some fields changed, validated again."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return Recipe(**{**fields, **changes})


def _said(section: Section) -> dict[str, Any]:
    """A section without its defaults, as it is written in a file."""
    return section.model_dump(mode="json", exclude_defaults=True, by_alias=True)


def _file_digest(path: Path) -> str:
    if not path.is_file():
        raise RecipeError(f"The recipe names the file {path.name!r}, which {path.parent} lacks.")
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()

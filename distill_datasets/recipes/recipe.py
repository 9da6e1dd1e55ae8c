"""A recipe: what to ask, of whom, and how to read the answer. Data, not code."""

import re
import shutil
from collections.abc import Mapping
from functools import cached_property
from hashlib import file_digest
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from distill_datasets import resources
from distill_datasets.errors import RecipeError, nearest
from distill_datasets.hub.references import find_release
from distill_datasets.models.sampler import Sampling, digest
from distill_datasets.recipes.choices import UNUSED, Teaching
from distill_datasets.recipes.parsing import Reader
from distill_datasets.recipes.prompt import check_template, fields_of, render
from distill_datasets.recipes.recipe_problems import explain
from distill_datasets.recipes.sections import AnswerFormat, Queries, Split, Synthesis, Teacher
from distill_datasets.schema import Message

_METRICS = ("accuracy", "macro_f1", "answered", "agreement")


class Recipe(Teaching):
    """What `recipe.yaml` and `prompt.md` say, validated.

    `response` is the Jinja template of what the student shall say, over `answer` (as read) and
    `text` (as sampled). `teacher_terms` are those under which the teacher's answers may be used.
    `folder` is where the recipe lies; `prompt` is the text of `prompt.md`.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str
    queries: Queries
    answer: AnswerFormat = AnswerFormat()
    response: str = "{{ answer }}"
    split: Split = Split()
    synthesis: Synthesis = Synthesis()
    license: str | None = None
    attribution: str | None = None
    teacher_terms: str | None = None
    languages: tuple[str, ...] = ()
    metrics: tuple[str, ...] = _METRICS
    prompt: str = Field(default="", exclude=True)

    @model_validator(mode="after")
    def _templates(self) -> Self:
        check_template(self.prompt, {"query"}, "prompt.md")
        check_template(self.response, {"answer", "text"}, "response")
        if not self.prompt.strip():
            raise ValueError("prompt.md is empty")
        return self

    def with_teacher(self, model: str) -> "Recipe":
        """The recipe with one teacher in place of whatever it names.

        `choose` goes where that teacher leaves nothing to choose from.
        """
        sifted = self.verifier is not None or self.judge is not None
        choice = {} if self.sampling.n > 1 or sifted else {"choose": "route", "agreement": None}
        return self.replace(teacher=model, teachers=(), **choice)

    @cached_property
    def asks_in_one_message(self) -> bool:
        """Whether the prompt holds the query: then it is one user message, else the system's."""
        return "query" in fields_of(self.prompt)

    def messages(self, query: str) -> list[Message]:
        """What the teacher sees."""
        if self.asks_in_one_message:
            return [{"role": "user", "content": render(self.prompt, query=query)}]
        system: Message = {"role": "system", "content": self._system_text}
        return [system, *self.student_messages(query)]

    @cached_property
    def _system_text(self) -> str:
        return render(self.prompt)

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
        return Reader(answer.pattern, answer.choices, answer.schema_text, answer.field)

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
        return Reader(rf"(?s)\A\s*{pattern}\s*\Z", self.answer.choices, form)

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
        fields = self.model_dump(mode="json", include=set(_DIGESTED))
        for section, name in _LATER:
            # A key that is not used is no part of the digest, so that a new key keeps releases.
            if fields[section][name] is None:
                del fields[section][name]
        if form := self.answer.schema_text:
            fields["answer"]["json_schema"] = form  # with the order of its keys
        for name, unused in UNUSED.items():
            if fields[name] == unused:
                del fields[name]
        files = {name: _file_digest(self.folder / name) for name in self.attachments}
        return digest({**fields, "prompt": self.prompt, "files": files})

    @property
    def attachments(self) -> tuple[str, ...]:
        """The files of queries, and the judge's prompt, that lie in the recipe's folder."""
        judged = self.judge.prompt if self.judge else None
        return tuple(name for name in (self.queries.file, self.queries.sidecar, judged) if name)

    def dump(self, folder: Path) -> None:
        """Write the recipe so that `load_recipe(folder)` reads it back with the same digest."""
        folder.mkdir(parents=True, exist_ok=True)
        fields = self.model_dump(mode="json", exclude_defaults=True)
        fields = {"name": self.name, "description": self.description, **fields}
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


_LATER = (
    ("answer", "json_schema"),
    ("answer", "field"),
    ("sampling", "top_logprobs"),
    ("sampling", "extra"),
)
_DIGESTED = (
    *("name", "teacher", "queries", "answer", "response", "sampling", "split", "renderer"),
    *UNUSED,
)


def load_recipe(source: str | Path, *, config: str | None = None) -> Recipe:
    """A recipe by its name (of those that ship), its folder, or a release that carries it.

    A release is a folder or a Hub dataset such as `me/name@v1.0.0`, of which only the recipe and
    the manifest are downloaded; `config` names one of several in one repository. Raises
    `RecipeError` that names the wrong key and the closest valid one.
    """
    folder = _find(source, config)
    fields = _read_yaml(folder / "recipe.yaml")
    prompt = folder / "prompt.md"
    if not prompt.is_file():
        raise RecipeError(f"Recipe {str(folder)!r} has no prompt.md; write the teacher's prompt.")
    try:
        text = prompt.read_text(encoding="utf-8").strip()
        return Recipe(**{**fields, "prompt": text, "folder": folder})
    except ValidationError as error:
        raise RecipeError(explain(error, folder, Recipe)) from error


def shipped_recipes() -> list[Recipe]:
    """Every recipe that comes with the package, by name."""
    folders = sorted(path.parent for path in resources.builders().glob("[!_]*/recipe.yaml"))
    return [load_recipe(folder) for folder in folders]


def _find(source: str | Path, config: str | None) -> Path:
    given = Path(source)
    candidates = (resources.builders() / str(source), given, given / "recipe")
    if isinstance(source, Path) or given.is_dir() or len(given.parts) > 1:
        candidates = (given, given / "recipe", given / "release" / "recipe")
    for folder in candidates if config is None else ():
        if (folder / "recipe.yaml").is_file():
            return folder
    release = find_release(source, (), config)
    if release and (release.path / "recipe" / "recipe.yaml").is_file():
        return release.path / "recipe"
    names = [path.parent.name for path in sorted(resources.builders().glob("[!_]*/recipe.yaml"))]
    found_in = f" as its configuration {config!r}" if config else ""
    raise RecipeError(
        f"No recipe {str(source)!r}: expected one of {names}, a folder with recipe.yaml and "
        f"prompt.md, or a release that carries one{found_in}.{nearest(str(source), names)}"
    )


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(fields, Mapping):
        raise RecipeError(f"{path}: expected keys and values, found {type(fields).__name__}.")
    for reserved in ("prompt", "folder"):
        if reserved in fields:
            raise RecipeError(f"{path}: {reserved!r} is not a key; the prompt is in prompt.md.")
    return fields


def _file_digest(path: Path) -> str:
    if not path.is_file():
        raise RecipeError(f"The recipe names the file {path.name!r}, which {path.parent} lacks.")
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()

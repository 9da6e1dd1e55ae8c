"""The teacher's side of a release, for objectives that ask the teacher again while training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distill_datasets.errors import DatasetError, ModelError
from distill_datasets.hub.references import find_release
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.schema import Message

if TYPE_CHECKING:
    from datasets import Dataset

    from distill_datasets.models.connection import Connection
    from distill_datasets.training.objectives.producers import Lesson


@dataclass(frozen=True)
class Wording:
    """One answer in two forms: as the teacher says it and as the student shall."""

    answer: str
    teacher: str
    student: str


@dataclass(frozen=True)
class TeacherPrompts:
    """What the teacher of a release sees and says; `where` is the release, as it was named."""

    where: str
    folder: Path
    recipe: Recipe

    @property
    def choices(self) -> Sequence[str]:
        """The only answers, where the recipe names them."""
        return self.recipe.answer.choices

    def messages(self, query: str) -> list[Message]:
        """The prompt with a query in it."""
        return self.recipe.messages(query)

    def says(self, response: str) -> bool:
        """Whether a student's response is something that the teacher itself could have said."""
        read = self.recipe.teacher_reader.read(response, "stop")
        if read.answer is None:
            return False
        return self.recipe.write_response(response, read.answer) == response.strip()

    def wordings(self, text: str) -> list[Wording]:
        """A teacher's text with each of the choices in its answer's place.

        Raises `DatasetError` for a text in which the answers can't be exchanged.
        """
        reader = self.recipe.teacher_reader
        answer = reader.read(text, "stop").answer
        place = text.rfind(answer) if answer else -1
        while answer and place >= 0:
            before, after = text[:place], text[place + len(answer) :]
            texts = [f"{before}{choice}{after}" for choice in self.choices]
            read = [reader.read(one, "stop").answer for one in texts]
            if read == list(self.choices):
                return [self._wording(*pair) for pair in zip(self.choices, texts, strict=True)]
            place = text.rfind(answer, 0, place)
        raise DatasetError(
            f"The labels of {self.where!r} can't be scored: expected a text of the teacher that "
            f"reads as another choice when its answer is exchanged; found {text[-200:]!r}, read "
            f"as {answer!r}. Train with labels='scored', or with the objective 'sft'."
        )

    def _wording(self, answer: str, text: str) -> Wording:
        return Wording(answer, text, self.recipe.write_response(text, answer))


def read_teacher_prompts(lesson: "Lesson", parts: Sequence[str] = ()) -> TeacherPrompts:
    """The recipe in the release that is trained on; of a Hub dataset these `parts` are fetched.

    Raises `DatasetError` where there is none.
    """
    source, reference = lesson.source, lesson.source.reference
    pinned = reference
    if not source.path.is_file() and not Path(reference).expanduser().exists():
        pinned = f"{reference.partition('@')[0]}@{source.files}"
    release = find_release(pinned, parts, lesson.settings.config)
    if release is None or not (release.path / "recipe" / "recipe.yaml").is_file():
        raise DatasetError(
            f"{reference!r} doesn't say how its teacher is asked: expected a release with "
            "recipe/recipe.yaml and recipe/prompt.md in it, as `publish` writes it. Train on that "
            "release, or with the objective 'sft', which needs no prompt."
        )
    return TeacherPrompts(reference, release.path, load_recipe(release.path / "recipe"))


def connect_teacher(
    lesson: "Lesson", prompts: TeacherPrompts, *, own: bool = False
) -> "Connection":
    """The model that scores: the one that the settings name, else the release's own teacher.

    `own` is only ever the release's, as it was then; it alone has the renderer that the release
    names. A teacher that is the student's base shares its server. Raises `ModelError` for one
    that gives no probabilities.
    """
    from distill_datasets.models.connection import connect

    student, manifest = lesson.student.connection, lesson.source.manifest
    released = str(manifest.get("teacher", prompts.recipe.teacher))
    reference = released if own else lesson.settings.objective.teacher or released
    renderer = None
    if reference == released:
        renderer = prompts.recipe.renderer or manifest.get("renderer")
    teacher = student
    if reference != student.reference or renderer not in (None, student.renderer_name):
        try:
            teacher = connect(reference, renderer=renderer)
        except ModelError as error:
            raise type(error)(
                f"The teacher {reference!r} of {prompts.where!r} can't be asked for "
                f"probabilities: {error} Name a teacher that can, or train with 'sft'."
            ) from error
    if own and teacher.identity != manifest["identity"]:
        raise DatasetError(
            f"The soft labels in {prompts.where!r} are those of {manifest['identity']!r}, now "
            f"{reference!r} is {teacher.identity!r}: expected the same model, whose tokens they "
            "are. Generate and publish again, or train with labels='scored'."
        )
    return teacher


def prompt_tokens(teacher: "Connection", prompts: TeacherPrompts, query: str) -> list[int]:
    """What the teacher has read when it begins to answer."""
    messages = [dict(message) for message in prompts.messages(query)]
    rendered = teacher.renderer.build_generation_prompt(messages)  # type: ignore[arg-type]
    return [int(token) for token in rendered.to_ints()]


def require_own_words(prompts: TeacherPrompts, rows: "Dataset") -> None:
    """Refuse responses that the teacher, under its prompt, would not say itself.

    It would find their first word all but impossible, and teach its own instead.
    """
    strange = [response for response in rows["response"] if not prompts.says(response)]
    if strange:
        raise DatasetError(
            f"{len(strange)} of {len(rows)} responses in {prompts.where!r} are not what its "
            f"teacher says itself, such as {strange[0][:200]!r}: expected responses that the "
            "recipe's `answer` reads and its `response` leaves as they are. Ask for that form in "
            "prompt.md, or set response: '{{ text }}', and publish again; or train with 'sft'"
            + (
                " or with the objective 'soft' and labels='choices'."
                if len(prompts.choices) > 1
                else "."
            )
        )

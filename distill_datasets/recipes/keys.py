"""The keys of recipe.yaml."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from distill_datasets.recipes.prompt import MOST_CANARIES, canaries_of, plant
from distill_datasets.recipes.sections import (
    AnswerFormat,
    Check,
    Choice,
    Examples,
    FileName,
    Handle,
    Judge,
    MixPart,
    Queries,
    SamplingSection,
    Section,
    SplitShares,
    StudentView,
    SynthesisSection,
    Teacher,
    several,
)

METRICS = ("accuracy", "macro_f1", "answered", "agreement")  # by default

NAME = "[A-Za-z0-9][A-Za-z0-9._-]*"  # of a recipe, and of a variant
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]


class RecipeKeys(Section):
    """What `recipe.yaml` may say, each key checked by itself."""

    name: Annotated[str, Field(pattern=f"^{NAME}$")]
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
    queries: Queries = Queries()
    """Where the queries are: exactly one of `file`, `hub`, `path`, `package`."""
    prompts: dict[Handle, str] = {}
    """Several recipes in one student, each behind its handle, which is the student's prompt: by
    the handle, a folder of this recipe's or a recipe that ships. In the place of `queries` and
    prompt.md."""
    variants: dict[str, dict[str, Any]] | FileName = {}
    """Configurations of the recipe, by name: the keys in which each differs; or a YAML file of
    them. One is chosen where the recipe is named, as `recipe:variant`."""
    variant: str | None = None
    """The variant that was chosen."""
    template: Literal["text", "jinja"] | None = None
    """What the prompt is: text in which `{{ query }}` and the `variables` are replaced, or a
    Jinja template over them."""
    variables: dict[Identifier, str] = {}
    """Texts by name, for the prompt."""
    turns: Literal["last", "all"] = "last"
    """What is answered of a conversation: its end, or every user's turn in order."""
    tools: FileName | None = None
    """A file in the recipe's folder: the tools that the teacher may call, as JSON in OpenAI's
    form. The answer is the calls, and the response the teacher's words and calls."""
    examples: Examples | None = None
    """Examples that stand before every query; a file by its name alone, or with how to choose."""
    student: StudentView = StudentView()
    """What the student sees beside the query; without it, nothing."""
    checks: tuple[Check, ...] = ()
    """What the prompt demands and can be checked; each is a metric."""
    keep: Literal["all checks"] | Annotated[tuple[str, ...], BeforeValidator(several)] = ()
    """The checks that an answer must pass to be kept; any other is rejected."""
    canaries: Annotated[int, Field(strict=True, ge=0, le=MOST_CANARIES)] = 0
    """Sentences with secrets that stand in the prompt of a copy, to be told whether a student
    holds them; missing ones are planted."""
    mix: tuple[MixPart, ...] = ()
    """Rows of something else, for the train split: the student keeps what it could."""
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
    """The metrics of a report; the first that applies decides whether the student may replace the
    prompt."""
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """The non-inferiority margin: by how much of that metric the student may be worse."""

    @model_validator(mode="before")
    @classmethod
    def _canaries_are_planted(cls, fields: Any) -> Any:
        count = fields.get("canaries") if isinstance(fields, dict) else None
        if not isinstance(count, int) or not 0 < count <= MOST_CANARIES:
            return fields
        if fields.get("prompts"):
            raise ValueError("canaries stand in one prompt: plant them in one of its recipes")
        planted = canaries_of(str(fields.get("name")), count)
        return {**fields, "prompt": plant(fields.get("prompt") or "", planted)}

"""A release of a tiny model's own answers, for objectives that ask the teacher again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinker import LoraConfig

from distill_datasets.generation.cache import Journal
from distill_datasets.models.references import connect
from distill_datasets.models.sampler import Logprobs, Reply, Sample, Usage, request_digest
from distill_datasets.models.tinker import Connection
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.releases.release import publish
from distill_datasets.training.data import locate, open_splits
from distill_datasets.training.objectives import TrainingTask
from distill_datasets.training.student import Student
from distill_datasets.training.trainer import TrainSettings
from tests.integration.releases.test_release import answer, write_run
from tests.support.training_runs import LANGUAGES

PROMPT = "Reply with the code of the language and nothing else: en, de, fr or es."
SMALL = TrainSettings(epochs=3, batch_size=4, rank=4, learning_rate=1e-2, evaluate_every=50)


def languages(folder: Path, model: str, **changes: Any) -> Recipe:
    """Four languages in the teacher's own words: "Final Answer: en", said so by the student.

    A key that is changed to None is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "queries.txt").write_text("hello\n", encoding="utf-8")
    fields = {
        "name": "languages",
        "description": "Which language a text is in.",
        "teacher": model,
        "queries": {"file": "queries.txt"},
        "answer": {"pattern": r"Final Answer: (?P<answer>\w+)$", "choices": tuple(LANGUAGES)},
        "response": "{{ text }}",
        "prompt": PROMPT,
        "license": "mit",
        "folder": folder,
    }
    return Recipe(**{name: v for name, v in {**fields, **changes}.items() if v is not None})


def release(
    folder: Path,
    model: str,
    *,
    ledger: bool = True,
    written: Callable[[str], str] = str,
    says: str = "Final Answer: {}",
    validation: int = 4,
    **changes: Any,
) -> Path:
    """Eight rows to train on and some to validate with, and a ledger with what was said.

    `written` makes a query of a text, `says` is the teacher's answer for a language.
    """
    recipe = languages(folder / "recipe", model, **changes)
    connection = connect(model)
    identity = connection.identity
    rows = []
    with Journal(folder / "run" / "journal.sqlite") as journal:
        for number in range(8 + validation):
            language = list(LANGUAGES)[number % 4]
            query = written(f"{LANGUAGES[language]} {number}")
            text = says.replace("{}", language)
            split = "train" if number < 8 else "validation"
            row = answer(number, query=query, raw=text, answer=language, split=split, teacher=model)
            rows.append({**row, "response": recipe.write_response(text, language)})
            key = request_digest(identity, recipe.messages(query), recipe.sampling_parameters)
            journal.put(key, identity, said(connection, recipe, text))
    run = write_run(folder / "run", rows, recipe, teacher=model, identity=identity)
    return publish(run, ledger=ledger).path


def said(connection: Connection, recipe: Recipe, text: str) -> Reply:
    """A teacher's reply; with `top_logprobs`, each token beside one that is half as likely."""
    tokens = [*connection.tokenizer.encode(text), connection.tokenizer.eos_token_id]
    logprobs = None
    if recipe.sampling.top_logprobs:
        tops = tuple((token, (token + 1) % 500) for token in tokens)
        likely = ((-0.5, -1.25),) * len(tokens)
        logprobs = Logprobs(tuple(tokens), (-0.5,) * len(tokens), tops, likely)
    return Reply((Sample(text, "stop", len(tokens), logprobs=logprobs),), Usage(20, 0))


def training_task(dataset: Path, model: str, folder: Path, settings: TrainSettings) -> TrainingTask:
    """What an objective begins with: a new student, and the rows to train on."""
    source, connection = locate(dataset), connect(model)
    rows = open_splits(source, settings)["train"].render(connection, 512)
    return TrainingTask(
        Student.create(connection, LoraConfig(rank=4, seed=0)), rows, source, settings, folder
    )

"""What a report compares, and on which rows: systems on a split of a release, asked every query."""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.conversations import readable, to_text
from distill_datasets.errors import (
    DatasetError,
    GenerationError,
    ModelError,
    PriceError,
    SettingsError,
)
from distill_datasets.evaluation.settings import MeasureSettings, SystemName
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient, ManyRequests
from distill_datasets.generation.ledger import LEDGER, find_replies
from distill_datasets.generation.pricing import Meter, Prices
from distill_datasets.generation.rows import ask
from distill_datasets.generation.teachers import Answerer, PromptedModel, Teachers, open_teachers
from distill_datasets.hub.references import Pinned, find_release, is_reference
from distill_datasets.models.sampler import Reply, Sampler, Sampling
from distill_datasets.parquet import read_batches
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.parsing import Reader, Reading
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.recipes.sections import StudentView
from distill_datasets.releases.contents import check_release
from distill_datasets.releases.manifest import read_manifest
from distill_datasets.schema import EARLIER, SOURCE, failure_text

if TYPE_CHECKING:
    from datasets import Dataset

    from distill_datasets.models.tinker import Connection

# What `--systems` and reports call them, in the order of a report.
SYSTEMS: Mapping[str, str] = {
    "base": "base",
    "base+short": "base + short prompt",
    "base+prompt": "base + prompt",
    "teacher": "teacher",
    "teacher-again": "teacher again",
    "student": "student",
    "student+prompt": "student + prompt",
}
PROMPTED = frozenset(SYSTEMS[name] for name in SYSTEMS if name[:7] == "teacher" or "+p" in name)
_COLUMNS = ("id", "query", "group", "reference")
_SPLIT = re.compile(r"\w+([.-]\w+)*")


@dataclass(frozen=True)
class HeldOut:
    """One split of a release, a row a query, with what asking needs.

    `reference` is what was asked for; `commit` is that of a Hub dataset. Where the release answers
    every turn of a conversation, a row's query holds the responses to the turns before its last
    one, and the `recipe` answers that one alone.
    """

    reference: str
    commit: str | None
    path: Path
    manifest: Mapping[str, Any]
    recipe: Recipe
    split: str
    rows: "Dataset"

    @property
    def free_text(self) -> bool:
        """Whether answers are texts of their own rather than labels, data or calls."""
        return is_free_text(self.recipe, self.rows["reference"])


def is_free_text(recipe: Recipe, references: Sequence[str | None]) -> bool:
    """Whether the whole text is the answer, and hardly any two rows have one right answer."""
    known = [one for one in references if one]
    formed = any(part.has_form for part in recipe.parts)
    return not formed and (not known or 2 * len(set(known)) > len(known))


def read_held_out(dataset: str | Path, *, split: str, limit: int | None = None) -> HeldOut:
    """The queries of a split of a release: a folder, a run's folder, or a Hub dataset.

    A release's splits hold what the teacher answered usefully; measuring only there would flatter
    the teacher, so the rejected queries of the split come after them. `limit` takes the first.
    Raises `DatasetError` for a folder that is no release or a damaged one, and for an unknown or
    empty split.
    """
    if not _SPLIT.fullmatch(split):
        raise DatasetError(
            f"A split can't be named {split!r}, after which a report is named: expected letters, "
            "digits, '_', '.' and '-'."
        )
    found = _find(dataset)
    folder, manifest = found.path, read_manifest(found.path)
    if not (folder / "recipe" / "recipe.yaml").is_file():
        raise DatasetError(
            f"The release {str(folder)!r} has no recipe: expected recipe/recipe.yaml and "
            "recipe/prompt.md, which say how the teacher is asked. Publish it again."
        )
    recipe = load_recipe(folder / "recipe", trust=True)
    asked = _queries(folder, split, recipe, known=manifest["splits"])[:limit]
    if recipe.turns == "all":  # one answer is asked for: to the last turn that was asked
        for row in asked:
            row["query"] = to_text(recipe.conversation(row["query"], row[EARLIER] or ()))
        recipe = recipe.replace(turns="last")
    rows = _dataset(asked, split)
    check_release(folder, ("data", "rejected", "recipe"))
    return HeldOut(str(dataset), found.commit, folder, manifest, recipe, split, rows)


def _queries(
    folder: Path, split: str, recipe: Recipe, *, known: Iterable[str]
) -> list[dict[str, Any]]:
    """A row a query of the split: of several samples the first stands for the query."""
    named = (*_COLUMNS, *recipe.answer_columns)
    rejected = _read(folder / "rejected", "rejected", (*named, "split"))
    # With `same_rows` every row is in train and test, and a rejected row only says train.
    splits = {split, "train"} if recipe.split.same_rows and split == "test" else {split}
    rows = _read(folder / "data", split, named)
    rows += [row for row in rejected if row["split"] in splits]
    queries: dict[str, dict[str, Any]] = {}
    for row in rows:
        if not row.get(SOURCE):  # what the recipe mixes in is not what it is measured on
            queries.setdefault(row["id"], row)
    if not queries:
        found = sorted({*known, *(str(row["split"]) for row in rejected)})
        raise DatasetError(
            f"{str(folder)!r} has no rows in a split {split!r}; found {found}."
            + (" Raise the recipe's share of it, or add queries." if split == "test" else "")
        )
    return list(queries.values())


def splits_of(dataset: str | Path) -> list[str]:
    """The splits of a release, wherever it is; raises `DatasetError` where there is none."""
    return list(read_manifest(_find(dataset).path)["splits"])


def names_release(path: Path) -> bool:
    """Whether a path is a release's folder, or a text that can only be a revision on the Hub."""
    pinned = "@" in path.name and is_reference(str(path)) and not path.exists()
    return pinned or (path / "manifest.json").is_file()


def _find(dataset: str | Path) -> Pinned:
    found = find_release(dataset, ("data", "rejected"))
    if found is None:
        raise DatasetError(
            f"{str(dataset)!r} is no release: expected a folder with manifest.json (or a run's "
            "folder with release/), which `publish` writes, or a Hub dataset like "
            "'org/name@v1.0.0'."
        )
    return found


def _read(folder: Path, name: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob(f"{name}-*.parquet")):
        for batch in read_batches(path, columns):
            if missing := sorted({*columns} - {*batch.schema.names}):
                raise DatasetError(
                    f"{str(path)!r} lacks the columns {missing} of a release: measure one that "
                    "`publish` wrote."
                )
            rows += batch.to_pylist()
    return rows


def _dataset(queries: list[dict[str, Any]], split: str) -> "Dataset":
    from datasets import Dataset, Features, Value

    columns: dict[str, list[Any]] = {name: [row[name] for row in queries] for name in _COLUMNS}
    columns["group"] = [row["group"] or row["id"] for row in queries]
    columns["split"] = [split] * len(queries)
    for name, values in columns.items():
        needed = name not in ("reference", "group")
        for value in values:
            if not isinstance(value, str) and (needed or value is not None):
                raise DatasetError(
                    f"The column {name!r} of the split {split!r} holds {value!r}: expected text, "
                    "as `publish` writes it."
                )
    return Dataset.from_dict(columns, features=Features(dict.fromkeys(columns, Value("string"))))


@dataclass(frozen=True)
class TrainedStudent:
    """What a training's folder says: its configuration, the line of its best checkpoint, its
    numbers, and what speaks against those weights.
    """

    config: Mapping[str, Any]
    checkpoint: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]] = ()
    warnings: Sequence[str] = ()
    folder: Path = Path()

    @classmethod
    def read(cls, folder: Path) -> "TrainedStudent":
        """Raises `DatasetError` for a folder of anything else, `ModelError` for a damaged one."""
        from distill_datasets.models.references import read_training
        from distill_datasets.training.checkpoints import TrainingFolder, training_warnings

        if not (folder / "checkpoints.jsonl").is_file():
            raise DatasetError(
                f"{str(folder)!r} is no training: expected the folder that `train` wrote, with "
                "checkpoints.jsonl in it."
            )
        config, best = read_training(folder)
        metrics = TrainingFolder(folder).metrics
        return cls(config, best, metrics, training_warnings(config, metrics), folder)


def find_training(student: Sampler | str | Path) -> TrainedStudent | None:
    """A training folder's facts; None for anything else, which is opened as it is.

    Raises `ModelError` for a folder without a finished checkpoint, or a damaged one.
    """
    if not isinstance(student, str | Path):
        return None
    from distill_datasets.models import references

    folder = references.find_training(student)
    return None if folder is None else TrainedStudent.read(folder)


def open_systems(
    held_out: HeldOut,
    *,
    student: Sampler | str | Path,
    training: TrainedStudent | None,
    teacher: Sampler | str | None,
    base: Sampler | str | None,
    names: Sequence[SystemName] = (),
) -> dict[str, Answerer]:
    """All that are asked for; the student is open first, since its server holds its checkpoints.

    `names` are those of the settings. Raises `SettingsError` for a short prompt where the recipe
    has none.
    """
    recipe = held_out.recipe
    opened = _open(training.folder if training else student)
    plain = _teacher(held_out, teacher)
    wanted = {"teacher", "student", *(names or _default_names(plain, held_out.free_text))}
    if "base+short" in wanted and recipe.student_prompt is None:
        raise SettingsError(
            "The system base+short is the untrained model with the student's short prompt, and "
            "the recipe names none: leave it out of --systems, or set student.prompt."
        )
    makers: dict[str, Callable[[], Answerer]] = {
        "teacher": lambda: plain if several(plain) else changed(plain, _first_answer),
        "teacher-again": lambda: _second_answer(plain, held_out.free_text),
        "student": lambda: _asked(opened, recipe, prompted=False),
        "student+prompt": lambda: _greedy(_asked(opened, recipe, prompted=True)),
    }
    if wanted & {"base", "base+short", "base+prompt"}:
        untrained = _untrained(opened, training, base)
        bare = recipe.replace(student=StudentView(tools=recipe.student.tools))
        makers |= {
            "base": lambda: _asked(
                untrained, recipe if recipe.student_prompt is None else bare, prompted=False
            ),
            "base+short": lambda: _asked(untrained, recipe, prompted=False),
            "base+prompt": lambda: _greedy(_asked(untrained, recipe, prompted=True)),
        }
    return {title: makers[name]() for name, title in SYSTEMS.items() if name in wanted}


def _default_names(plain: Answerer, free_text: bool) -> list[str]:
    """The second answer is asked for where the release has it, and where nothing else is a measure.

    Of texts nobody says how near they can be expected to come, but the teacher.
    """
    sampled = isinstance(plain, PromptedModel) and plain.sampling.temperature > 0
    again = ["teacher-again"] if sampled or free_text else []
    return ["base", "teacher", "student", *again]


def _untrained(
    student: Sampler, training: TrainedStudent | None, base: Sampler | str | None
) -> Sampler:
    if training:
        return _open(base or training.config["student"], training.config["renderer"])
    if base is not None:
        return _open(base)
    connection = getattr(student, "connection", None)
    if connection is None or not student.model.startswith("tinker://"):
        raise ModelError(
            f"{student.model!r} doesn't say what it was trained from: expected a training folder "
            "or tinker://<run>/sampler_weights/<name>. Name the untrained model with `base` "
            "(--base)."
        )
    return _open(f"tinker:{connection.base_model}", connection.renderer_name)


def greedy(recipe: Recipe) -> Sampling:
    """How base and student are asked."""
    return Sampling(temperature=0.0, max_tokens=recipe.sampling.max_tokens, seed=0)


def several(teacher: Answerer) -> bool:
    """Whether one answer of several is chosen."""
    return isinstance(teacher, Teachers) and teacher.choice is not None


def explained(systems: Mapping[str, Answerer], held_out: HeldOut) -> list[str]:
    """What a reader must know about how the systems were asked."""
    recipe, notes = held_out.recipe, list[str]()
    if held_out.manifest.get("turns") == "all":
        notes.append(
            "Every system answers the last turn of each conversation, after the same responses to "
            "the turns before it: those that the release has of its teacher."
        )
    if again := systems.get(SYSTEMS["teacher-again"]):
        heats = (f"{one.sampling.temperature:g}" for one in members_of(again))
        notes.append(
            f"Teacher again is a second answer of the teacher, at temperature "
            f"{'/'.join(dict.fromkeys(heats))}: as near as it comes to its own first answer, "
            "nobody can be expected to come nearer."
        )
    if not several(systems["teacher"]):
        return notes
    notes.append(
        f"The teacher is {systems['teacher'].model}, sampled as the recipe says, and one answer "
        f"is chosen ({recipe.choose}). Its tokens are those of everybody asked for a query."
    )
    if recipe.reads_references:
        notes.append(
            "The teacher's verifier or judge is told what is right: its accuracy says which of "
            "its answers were taken, not what it knows."
        )
    return notes


def members_of(system: Answerer) -> Sequence[PromptedModel]:
    """The one or several that answer as a system."""
    return [system] if isinstance(system, PromptedModel) else system.members


def changed(system: Answerer, change: Callable[[PromptedModel], PromptedModel]) -> Answerer:
    """A system whose every member is asked otherwise."""
    if isinstance(system, PromptedModel):
        return change(system)
    return replace(system, members=tuple(map(change, system.members)))


def _teacher(held_out: HeldOut, teacher: Sampler | str | None) -> Answerer:
    recipe, manifest = held_out.recipe, held_out.manifest
    released = manifest.get("teacher")
    if teacher is not None and teacher != released:
        return _asked(_open(teacher), recipe, prompted=True)
    if "panel" in manifest:
        teachers = open_teachers(recipe)
        if teachers.choice:
            return teachers
        said = _asked(teachers.members[0].sampler, recipe, prompted=True)
        read, parts = said.read, said.reading_parts
        return changed(teachers, lambda one: replace(one, read=read, reading_parts=parts))
    if not isinstance(released, str):
        raise DatasetError(
            f"The manifest of {held_out.reference!r} doesn't name its teacher: name it with "
            "`teacher` (--teacher), or publish again."
        )
    return _asked(_open(released, manifest.get("renderer")), recipe, prompted=True)


def _asked(sampler: Sampler, recipe: Recipe, *, prompted: bool) -> PromptedModel:
    """A model with the teacher's prompt, or as the student; its response is the text as it is said.

    What fails a check is no row to learn from, but an answer all the same.
    """

    def reader(part: Recipe) -> Reader:
        return part.teacher_reader if prompted else part.student_reader

    def read(query: str, reference: str | None, text: str, stop_reason: str) -> Reading:
        parsed = reader(recipe.part(query)[0]).read(text, stop_reason)
        return Reading(parsed.answer, None if parsed.answer is None else text, parsed.rejection)

    reads = read, [value for part in recipe.parts for value in reader(part).parts]
    if prompted:
        asked = recipe.sampling_parameters, recipe.messages
        return PromptedModel(sampler, *asked, *reads, recipe.fitted)
    return PromptedModel(
        sampler, greedy(recipe), recipe.student_messages, *reads, recipe.fitted_to_student
    )


def _greedy(asked: PromptedModel) -> PromptedModel:
    # Where the recipe stops the teacher, and the form it asks for, decide what can be read.
    plain = Sampling(temperature=0.0, seed=0)
    kept = ("max_tokens", "stop", "json_schema", "extra", "tools")
    sampling = replace(plain, **{name: getattr(asked.sampling, name) for name in kept})
    return replace(asked, sampling=sampling)


def _first_answer(asked: PromptedModel) -> PromptedModel:
    """At temperature 0: as the recipe says where it says so, since the release has that answer."""
    own = asked.sampling
    return asked if own.temperature == 0 and own.n == 1 else _greedy(asked)


def _second_answer(plain: Answerer, free_text: bool) -> Answerer:
    """The teacher as the recipe samples it, whose answers the release has; else with another seed.

    Where the recipe takes the likeliest text, temperature 1 says which others are as good; of
    labels it would be a worse teacher.
    """

    def again(asked: PromptedModel) -> PromptedModel:
        own = asked.sampling
        if own.temperature > 0 and not several(plain):
            return asked
        heat = own.temperature or (1.0 if free_text else 0.0)
        return replace(asked, sampling=replace(own, temperature=heat, seed=(own.seed or 0) + 1))

    return changed(plain, again)


def connections_of(
    systems: Mapping[str, Answerer], names: Sequence[str]
) -> "dict[str, Connection]":
    """Those of the named systems that say how likely they find a given text."""
    asked = {name: one for name in names if isinstance(one := systems.get(name), PromptedModel)}
    found = {name: getattr(one.sampler, "connection", None) for name, one in asked.items()}
    return {name: one for name, one in found.items() if one is not None}


def _open(given: Sampler | str | Path, renderer: str | None = None) -> Sampler:
    if not isinstance(given, str | Path):
        return given
    from distill_datasets.models.references import open_sampler

    return open_sampler(given, renderer=renderer)


class PartialMeter(Meter):
    """Counts what has a price; without a budget, asks of the others what they may cost uncounted.

    With a budget every model has one: see `open_meter`.
    """

    def check(self, models: Iterable[str]) -> None:
        """Raises `PriceError` for a model that a budget can't count."""
        if self.budget is not None:
            super().check(models)

    def cost(self, identity: str, reply: Reply, *, batch: bool = False) -> float:
        """What one reply cost, 0 where nobody says so; raises `PriceError` for lack of a count."""
        try:
            return super().cost(identity, reply, batch=batch)
        except PriceError:
            if self._has_price(identity):
                raise
            return 0.0

    def read(self, identity: str, prompts: Sequence[int]) -> None:
        """Count requests that only read prompts, of a model that has a price."""
        if self._has_price(identity):
            super().read(identity, prompts)

    def _has_price(self, identity: str) -> bool:
        with suppress(PriceError):
            super().check([identity])
            return True
        return False


def ask_all(
    held_out: HeldOut,
    systems: Mapping[str, Answerer],
    clients: Callable[[], CachedClient],
    then: str,
) -> "dict[str, Dataset]":
    """Every system's answer to every query, out of the clients' journal where that has it.

    What is asked is said on standard error first, with what is asked `then`.
    """
    client = clients()
    _take_released(held_out, systems, client.journal)
    prices = client.meter.prices if client.meter else None
    for name, system in systems.items():
        requests = [
            (one.sampler, *one.request(query))
            for query in held_out.rows["query"]
            for one in system.asked(query)
        ]
        said = ManyRequests(requests).said(client.journal, prices)
        judged = ", and its judge" if name == "teacher" and held_out.recipe.judge else ""
        print(f"measure: {name}{judged}: {said}", file=sys.stderr)
    if then:
        print(f"measure: {then}", file=sys.stderr)
    return {
        name: _complete(ask(held_out.rows, system, clients(), title=name), name)
        for name, system in systems.items()
    }


def open_meter(settings: MeasureSettings, asked: Mapping[str, Answerer | Sampler]) -> Meter | None:
    """What counts all that is `asked`, by the settings' price file; None without one.

    The file names a model, or its role, such as `student` or `judge`; a student costs what it was
    trained from does, unless the file says otherwise. Raises `PriceError` where there is a budget
    and a model has no price.
    """
    if settings.prices is None:
        return None
    prices = Prices.load(settings.prices)
    models, base = dict(prices.models), asked.get("base")
    for name, one in asked.items():
        role = name.partition(" ")[0]
        others = [role, *([base.model] if role == "student" and base else [])]
        for model in one.models if isinstance(one, Teachers) else [one.identity]:
            for known in (model, *others):
                with suppress(PriceError):
                    models.setdefault(model, prices.of(known))
            if settings.budget is not None and model not in models:
                raise PriceError(
                    f"A budget counts all that is asked, and {str(settings.prices)!r} has no price "
                    f"for the {name}, {one.model!r}; it has {sorted(prices.models)}. Add one under "
                    f"`models`, by that name or as {role!r}, or leave out the budget."
                )
    return PartialMeter(prices.model_copy(update={"models": models}), budget=settings.budget)


def _take_released(held_out: HeldOut, systems: Mapping[str, Answerer], journal: Journal) -> None:
    """Put into the journal what the release's ledger knows of what is to be asked."""
    known = [held_out.recipe.sampling_of(teacher) for teacher in held_out.recipe.all_teachers]
    missing = {
        one.request_key(query): one.identity
        for system in systems.values()
        if all(one.sampling in known for one in members_of(system))
        for query in held_out.rows["query"]
        for one in system.asked(query)
    }
    missing = {key: name for key, name in missing.items() if journal.entry(key) is None}
    if not missing or not (release := find_release(held_out.reference, (LEDGER,))):
        return
    found = find_replies(release.path, missing)
    journal.add((key, missing[key], reply.to_json()) for key, reply in found.items())


def _complete(rows: "Dataset", system: str) -> "Dataset":
    pairs = zip(rows["query"], rows["error"], strict=True)
    failed = [(query, error) for query, error in pairs if error]
    if failed:
        query, error = readable(failed[0][0])[:80], failed[0][1]
        raise GenerationError(
            f"{len(failed)} of {len(rows)} rows of the {system} failed, the first for the query "
            f"{query!r}: {failure_text(error).removesuffix('.')}. No report is written "
            "without them. Run again: what was paid is kept, and only those are asked."
        )
    # Of several samples of one request the first is the answer.
    if not any(rows["sample"]):
        return rows
    return rows.select([place for place, number in enumerate(rows["sample"]) if not number])

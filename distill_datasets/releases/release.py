"""Answers become a release: a folder that `datasets` reads and the Hub can hold."""

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import DatasetError, OutputError, VersionError
from distill_datasets.files import one_writer, recover, replacing
from distill_datasets.generation.ledger import (
    LEDGER,
    JournaledRows,
    ledger_features,
    raw_answers,
)
from distill_datasets.generation.shards import find_parts, join_parts, join_summaries
from distill_datasets.hub.references import inside
from distill_datasets.parquet import Shards
from distill_datasets.progress import interruptible
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.mix import carried_line, carried_part
from distill_datasets.recipes.queries import holds_more, write_used_columns
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.releases.cards import card_metadata, dataset_card, read_card
from distill_datasets.releases.contents import (
    SOFT,
    CheckTally,
    Survey,
    answered_contents,
    features_of,
    mixed_rows,
    tally_checks,
    write_soft,
)
from distill_datasets.releases.diff import FINGERPRINTS, fingerprints_of
from distill_datasets.releases.manifest import (
    FIRST,
    MANIFEST,
    REJECTED,
    check_version,
    columns,
    difference,
    following,
    history,
    layout,
    read_manifest,
    rejected_rows,
    write_manifest,
)
from distill_datasets.schema import answer_features
from distill_datasets.tables import html_card, html_table

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame

    from distill_datasets.releases.push import Pushed


@dataclass(frozen=True)
class Release:
    """A published folder; `digest` names its rows and its recipe, not its files.

    `warnings` are sentences about what in the rows can't teach a student.
    """

    path: Path
    version: str
    digest: str
    splits: Mapping[str, int]
    rejected: int
    why: str = ""
    warnings: tuple[str, ...] = ()

    def push_to_hub(self, repo: str, **options: Any) -> "Pushed":
        """Push to a dataset repository: one commit, then a tag; see `push.push_release`."""
        from distill_datasets.releases.push import push_release

        return push_release(self.path, repo, **options)

    def to_pandas(self, split: str = "train") -> "DataFrame":
        """The rows of a split; raises `DatasetError` where there is none of that name."""
        from datasets import load_dataset

        if split not in self.splits:
            raise DatasetError(f"There is no split {split!r}: expected one of {[*self.splits]}.")

        return load_dataset(str(self.path), split=split).to_pandas()

    def _repr_html_(self) -> str:
        counts = {**self.splits, "rejected": self.rejected}
        return html_card(
            f"Release {self.version} in {self.path}",
            self.why,
            html_table(counts.items(), ["split", "rows"]),
            *self.warnings,
            f"Digest {self.digest}",
        )


@interruptible
def publish(
    run: Path | str | Sequence[Path | str],
    *,
    out: Path | str | None = None,
    version: str | None = None,
    ledger: bool = True,
    prompt: bool = True,
) -> Release:
    """Write a run's answers as a release (default: `run/release`).

    A run in parts is the folder of its parts, or all the folders that hold some: every part must
    be there, and the release is the one that the run would have made in one piece.
    `version` is x.y.z. Without one it follows the version that lies in `out` already: major if
    the columns, the prompt or the response format changed, minor if the rows did, patch if only
    the card did; the first is 1.0.0. The new release takes the old one's place in `out`. Nothing
    is written for the same content; other content under the same version raises `VersionError`
    that says what differs. Raises `DatasetError` for answers that are missing, before anything is
    written. A row that failed is published with its error in the config `rejected`: run
    `generate` again first to ask for it. The raw answers go into the config `ledger`, for others
    to run the recipe without paying again, and where the recipe asks for `top_logprobs`, the
    teacher's probabilities into the config `soft`; `ledger=False` leaves both out. Of the query
    files, the release's recipe has the columns that it uses. With `prompt=False` the recipe goes
    without the prompt, its examples, and tools that the student isn't given: the release can't be
    made again from itself. Raises `OutputError` where another process publishes to the folder.
    """
    runs = [Path(run)] if isinstance(run, (str, Path)) else [Path(one) for one in run]
    if out is None and len(runs) != 1:
        raise OutputError("A release of several folders needs a place: name it with `out`.")
    folder = Path(out) if out is not None else runs[0] / "release"
    find_parts(runs)  # before a folder is made, a lock in it
    if version is not None:
        check_version(version)
    with (
        one_writer(folder, "release", beside=True),
        TemporaryDirectory(prefix="distill-release-") as scratch,
    ):
        old = _published(folder)
        answers = _load_answers(runs, ledger, Path(scratch))
        facts = _facts(answers, old, prompt)
        if named := _version(facts, old, version, answers, folder):
            _write(folder, answers, facts | named, old)
    return load_release(folder)


def _version(
    facts: Mapping[str, Any],
    old: Mapping[str, Any] | None,
    version: str | None,
    answers: "_Answers",
    folder: Path,
) -> dict[str, str] | None:
    """The version of the facts and why it is that; None where the same is published already."""
    if old is None:
        return {"version": version or FIRST, "why": "the first release"}
    mine, published = answers.survey.fingerprints, old["version"]
    change = difference(old, facts, lambda: fingerprints_of(folder).changes(mine))
    if change is None and version in (None, published):
        return None
    following_ = following(published, change.level if change else "patch")
    if change and change.level != "patch" and version == published:
        raise VersionError(
            f"Version {published} in {str(folder)!r} holds other content: {change.why}. Publish "
            f"with another version, such as version={following_!r}, or to another folder."
        )
    why = change.why if change else f"the same content as {published}"
    return {"version": version or following_, "why": why}


def load_release(path: Path | str) -> Release:
    """What the manifest in a release's folder says; reads no rows."""
    facts = read_manifest(Path(path))
    return Release(
        Path(path),
        facts["version"],
        facts["content_digest"],
        facts["splits"],
        rejected_rows(facts),
        facts.get("why", ""),
        tuple(facts.get("warnings", ())),
    )


@dataclass(frozen=True)
class _Answers:
    """Rows, how they were made, the recipe, and one look at it all; `sources` go into a ledger.

    `carried` is the recipe as the release carries it.
    """

    rows: "Dataset"
    generation: Mapping[str, Any]
    recipe: Recipe
    carried: Recipe
    survey: Survey
    checks: CheckTally
    sources: Sequence[JournaledRows]


def _load_answers(runs: Sequence[Path], ledger: bool, scratch: Path) -> _Answers:
    """What the folders of a run, or of its parts, hold; without a `ledger` no sources.

    Files of the carried recipe may be in the folder `scratch`.
    """
    parts = find_parts(runs)
    folder = parts[0] / "answers"
    recipe = load_recipe(folder)
    each, summaries = zip(*(_read_answers(part / "answers") for part in parts), strict=True)
    generation = summaries[0] if len(parts) == 1 else join_summaries(parts, summaries)
    for part, some, summary in zip(parts, each, summaries, strict=True):
        _check(some, summary, recipe, part / "answers")
    rows = each[0] if len(parts) == 1 else join_parts(parts, each)
    survey = Survey.of(answered_contents(rows, recipe), recipe.answer.choices)
    if not survey.splits:
        reasons = dict(survey.rejected) | ({"failed": survey.errors} if survey.errors else {})
        raise DatasetError(
            f"{str(folder)!r} has nothing to publish: none of its {len(rows)} rows can be used "
            f"({reasons}). Look at its `raw` and `error` columns, then mend the recipe."
        )
    journals = [(rows, part / "journal.sqlite") for rows, part in zip(each, parts, strict=True)]
    kept = [JournaledRows(*one) for one in journals if ledger and one[1].is_file()]
    checks = tally_checks(rows, recipe)
    carried = _with_mix(_carried(recipe, scratch), rows, scratch / "mixed")
    return _Answers(rows, generation, recipe, carried, survey, checks, kept)


def _read_answers(folder: Path) -> tuple["Dataset", dict[str, Any]]:
    """The rows that `generate` wrote, and what it said of them."""
    from datasets import load_from_disk

    try:
        rows = load_from_disk(str(folder))
        summary = json.loads((folder / "generation.json").read_text(encoding="utf-8"))
        rows.select(range(min(1, len(rows)))).to_list()
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise DatasetError(
            f"{str(folder)!r} is damaged ({error!r}). Run `generate` again: it writes the rows "
            "anew from the journal, and asks for nothing that is in it."
        ) from error
    if not isinstance(summary, dict):
        raise DatasetError(f"{str(folder / 'generation.json')!r} is damaged: `generate` again.")
    return rows, summary


def _carried(recipe: Recipe, scratch: Path) -> Recipe:
    """The recipe without what its queries hold beyond what it uses."""
    if recipe.members:
        members = {
            handle: _carried(one, scratch / one.name) for handle, one in recipe.members.items()
        }
        return recipe.replace(members=members)
    if not holds_more(recipe):
        return recipe
    scratch.mkdir(exist_ok=True)
    others = {*recipe.attachments} - {recipe.queries.file, recipe.queries.sidecar}
    name = "queries.jsonl" if "queries.jsonl" not in others else "used-queries.jsonl"
    columns = write_used_columns(recipe, scratch / name)
    _copy(recipe, others, scratch)
    return recipe.replace(queries={"file": name, **columns}, folder=scratch)


def _with_mix(recipe: Recipe, rows: "Dataset", scratch: Path) -> Recipe:
    """The recipe with the rows of its mix that were drawn, whatever their source."""
    if not recipe.mix:
        return recipe
    scratch.mkdir()
    others = {*recipe.replace(mix=()).attachments}
    _copy(recipe, others, scratch)
    parts = []
    for part in recipe.mix:
        name = f"mix-{part.name}.jsonl"
        name = name if name not in others else f"drawn-{name}"
        with (scratch / name).open("w", encoding="utf-8") as file:
            for row in mixed_rows(rows, part.name):
                file.write(json.dumps(carried_line(part, row), ensure_ascii=False) + "\n")
        parts.append(carried_part(part, name))
    return recipe.replace(mix=tuple(parts), folder=scratch)


def _copy(recipe: Recipe, names: Iterable[str], folder: Path) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(inside(recipe.folder, name), folder / name)


def _check(rows: "Dataset", generation: Mapping[str, Any], recipe: Recipe, folder: Path) -> None:
    if missing := answer_features(recipe.answer_columns).keys() - rows.features.keys():
        raise DatasetError(
            f"{str(folder)!r} lacks the columns {sorted(missing)}; found {rows.column_names}. "
            "Run `generate` again."
        )
    if generation["recipe_digest"] != recipe.digest:
        raise DatasetError(
            f"{folder / 'recipe'} is not the recipe of these answers: expected the digest "
            f"{generation['recipe_digest']}, found {recipe.digest}. Run `generate` again."
        )


def _published(folder: Path) -> dict[str, Any] | None:
    """The manifest of the release in a folder, None in an empty one."""
    recover(folder)
    if (folder / MANIFEST).is_file():
        return read_manifest(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputError(
            f"{str(folder)!r} holds something else than a release, which publishing would "
            "replace. Choose a new or an empty folder with `out`."
        )
    return None


def _write(
    folder: Path, answers: _Answers, facts: Mapping[str, Any], old: Mapping[str, Any] | None
) -> None:
    """Write the release in the place of the old one, of whose card what people wrote is kept."""
    recipe = answers.recipe
    with replacing(folder) as building:
        _write_rows(building, answers)
        answers.survey.fingerprints.write(building / FINGERPRINTS)
        manifest = {**facts, "history": history(old, facts)}
        if answers.sources:
            manifest["ledger"] = _write_ledger(building, answers)
        # The teacher's probabilities were asked for, and belong to the released texts.
        asked = any(recipe.sampling_of(one).top_logprobs for one in recipe.all_teachers)
        if answers.sources and asked and not recipe.evidence:
            manifest[SOFT] = write_soft(building, answers.sources, recipe, answers.generation)
        for name in answers.carried.attachments:
            inside(building / "recipe", name)
        answers.carried.dump(building / "recipe")
        if not manifest["prompt"]:
            _withhold(building / "recipe", answers.carried)
        write_manifest(building, manifest)
        card, written = folder / "README.md", []
        if card.is_file():
            written = [(read_card(card.read_text(encoding="utf-8")), (old or {}).get("card") or {})]
        text = dataset_card(
            manifest,
            answers.carried,
            example=answers.survey.example or {},
            layout=layout(building, manifest),
            written=written,
        )
        (building / "README.md").write_text(text, encoding="utf-8")


def _withhold(folder: Path, recipe: Recipe) -> None:
    """Remove what is the teacher's alone: prompt, examples, and tools that no student is given."""
    examples = recipe.examples.file if recipe.examples else None
    tools = None if recipe.student_tools else recipe.tools
    for name in ("prompt.md", examples, tools):
        if name and name != recipe.queries.file:
            (folder / name).unlink()
    for member in recipe.members.values():
        _withhold(folder / "prompts" / member.name, member)


def _write_rows(building: Path, answers: _Answers) -> None:
    schema = features_of("train", answers.recipe).arrow_schema
    shards = {name: Shards(building / "data", name, schema) for name in answers.survey.splits}
    if answers.survey.rows[REJECTED]:
        schema = features_of(REJECTED, answers.recipe).arrow_schema
        shards[REJECTED] = Shards(building / REJECTED, REJECTED, schema)
    for parts, rows in answered_contents(answers.rows, answers.recipe):
        for part in parts:
            shards[part].add(rows)
    for shard in shards.values():
        shard.close()


def _write_ledger(building: Path, answers: _Answers) -> int:
    """Write what the journals hold of the rows, in their order; how many answers that is."""
    entries = raw_answers(answers.sources, answers.recipe, answers.generation)
    shards = None
    for some in entries:
        shards = shards or Shards(building / LEDGER, LEDGER, ledger_features().arrow_schema)
        shards.add(some)
    return shards.close() if shards else 0


def _facts(answers: _Answers, old: Mapping[str, Any] | None, prompt: bool) -> dict[str, Any]:
    """The manifest, but for what writing the release decides."""
    found, generation, recipe = answers.survey, answers.generation, answers.carried
    known = old.get("ledger") if old else None
    mix = [
        {"name": part.name, "rows": found.mixed[part.name], "share": part.share}
        | {"from": part.described, "model": part.model, "license": part.license}
        for part in recipe.mix
    ]
    return {
        "recipe": recipe.name,
        "recipe_digest": recipe.digest,
        "content_digest": found.digest(recipe.digest),
        **{key: generation[key] for key in ("teacher", "identity", "renderer", "sampling")},
        **({"panel": generation["panel"]} if generation.get("panel") else {}),
        **({"turns": recipe.turns} if recipe.turns == "all" else {}),
        "prompt": prompt,
        "prompt_sha256": sha256(recipe.prompt.encode()).hexdigest(),
        "columns": columns(features_of("train", recipe)),
        "splits": found.splits,
        "kept": found.kept,
        "rejected": dict(sorted(found.rejected.items())),
        "errors": found.errors,
        **({"mix": mix} if mix else {}),
        **({"examples": generation["examples"]} if "examples" in generation else {}),
        "ledger": (known or 0) if answers.sources else None,
        **({SOFT: old[SOFT]} if old and SOFT in old else {}),
        "references": found.references,
        "warnings": [*found.warnings, *answers.checks.warnings],
        **({"checks": answers.checks.facts} if answers.checks.facts else {}),
        **_from_ledger(generation),
        "tokens": generation["tokens"],
        "cost": generation.get("cost"),
        "mean_prompt_tokens": found.mean_prompt_tokens,
        "created": generation["created"],
        "versions": generation["versions"],
        "recipe_fields": recipe.model_dump(mode="json"),
        "card": card_metadata(found.splits, recipe),
    }


def _from_ledger(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Whose answers were taken over; of a folder on this machine no more than its name."""
    taken = generation.get("from_ledger")
    if not taken:
        return {}
    on_hub = re.fullmatch(r"[0-9a-f]{40}", str(taken["revision"]))
    source = taken["source"] if on_hub else Path(taken["source"]).resolve().name
    return {"from_ledger": [{**taken, "source": source}]}

"""Answers become a release: a folder that `datasets` reads and the Hub can hold."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.card import dataset_card
from distill_datasets.contents import (
    REJECTED,
    Survey,
    answered_contents,
    published_contents,
    row_changes,
    survey,
)
from distill_datasets.errors import DatasetError, OutputError, VersionError
from distill_datasets.recipe import Recipe, load_recipe
from distill_datasets.replacement import recover, replacing
from distill_datasets.schema import answer_features, rejected_features, release_features
from distill_datasets.shards import Shards, Size

if TYPE_CHECKING:
    from datasets import Dataset, DatasetInfo, Features

_FIRST_VERSION = "1.0.0"
_VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")


@dataclass(frozen=True)
class Release:
    """A published folder; `digest` names its rows and its recipe, not its files."""

    path: Path
    version: str
    digest: str
    splits: Mapping[str, int]
    rejected: int


@dataclass(frozen=True)
class _Answers:
    """What a run has to offer: rows, how they were made, the recipe, and one look at it all."""

    rows: "Dataset"
    generation: Mapping[str, Any]
    recipe: Recipe
    survey: Survey

    @property
    def digest(self) -> str:
        return self.survey.digest(self.recipe.digest)


def publish(
    run: Path | str, *, out: Path | str | None = None, version: str | None = None
) -> Release:
    """Write a run's answers as a release (default: `run/release`).

    `version` is x.y.z; without one it is the version that lies in `out` already, else 1.0.0.
    Publishing the same content again writes nothing. Other content needs another version, which
    then takes the old one's place in `out`: raises `VersionError` that says what differs. Raises
    `DatasetError` for answers that are missing, before anything is written. A row that failed is
    published with its error in the config `rejected`: run `generate` again first to ask for it.
    """
    folder = Path(out) if out is not None else Path(run) / "release"
    published = _published(folder)
    if version is None:
        version = published.version if published else _FIRST_VERSION
    _check_version(version)
    answers = _load_answers(Path(run))
    if published and published.version == version:
        if published.digest != answers.digest:
            raise _taken(published, answers)
        if load_recipe(folder).model_dump() == answers.recipe.model_dump():
            return published
    readme = folder / "README.md"
    written_before = readme.read_text(encoding="utf-8") if readme.is_file() else None
    with replacing(folder) as building:
        _write(building, answers, version, written_before)
    return load_release(folder)


def load_release(path: Path | str) -> Release:
    """What the manifest in a release's folder says; reads no rows."""
    manifest = Path(path) / "manifest.json"
    if not manifest.is_file():
        raise DatasetError(
            f"{str(path)!r} is not a release: expected a manifest.json in it. Name the folder "
            "that `publish` wrote."
        )
    try:
        facts = json.loads(manifest.read_text(encoding="utf-8"))
        rejected = sum(facts["rejected"].values()) + facts["errors"]
        return Release(
            Path(path), facts["version"], facts["content_digest"], facts["splits"], rejected
        )
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DatasetError(
            f"{str(manifest)!r} is not a manifest that `publish` wrote ({error!r}). Delete the "
            "folder and publish again."
        ) from error


def _load_answers(run: Path) -> _Answers:
    from datasets import Dataset, load_from_disk

    folder = run / "answers"
    if not (folder / "generation.json").is_file():
        raise DatasetError(
            f"{str(run)!r} has no answers: expected {folder / 'generation.json'}. Run `generate` "
            "first, or name the folder that it wrote."
        )
    generation = json.loads((folder / "generation.json").read_text(encoding="utf-8"))
    recipe = load_recipe(folder)
    rows = load_from_disk(str(folder))
    assert isinstance(rows, Dataset)
    _check(rows, generation, recipe, folder)
    found = survey(answered_contents(rows, recipe))
    if not found.splits:
        reasons = dict(found.rejected) | ({"failed": found.errors} if found.errors else {})
        raise DatasetError(
            f"{str(folder)!r} has nothing to publish: none of its {len(rows)} rows can be used "
            f"({reasons}). Look at its `raw` and `error` columns, then mend the recipe."
        )
    return _Answers(rows, generation, recipe, found)


def _check(rows: "Dataset", generation: Mapping[str, Any], recipe: Recipe, folder: Path) -> None:
    if missing := answer_features().keys() - rows.features.keys():
        raise DatasetError(
            f"{str(folder)!r} lacks the columns {sorted(missing)}; found {rows.column_names}. "
            "Run `generate` again."
        )
    if generation["recipe_digest"] != recipe.digest:
        raise DatasetError(
            f"{folder / 'recipe'} is not the recipe of these answers: expected the digest "
            f"{generation['recipe_digest']}, found {recipe.digest}. Run `generate` again."
        )


def _check_version(version: str) -> None:
    if not _VERSION.fullmatch(version):
        raise DatasetError(f"{version!r} is not a version: expected three numbers such as '1.0.0'.")


def _published(folder: Path) -> Release | None:
    recover(folder)
    if (folder / "manifest.json").is_file():
        return load_release(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputError(
            f"{str(folder)!r} holds something else than a release, which publishing would "
            "replace. Choose a new or an empty folder with `out`."
        )
    return None


def _taken(published: Release, answers: _Answers) -> VersionError:
    old, new = load_recipe(published.path), answers.recipe
    differences = row_changes(
        published_contents(published.path), answered_contents(answers.rows, new)
    )
    if old.prompt != new.prompt:
        differences.append("the prompt changed")
    if keys := _changed_keys(old.model_dump(), new.model_dump()):
        differences.append(f"recipe keys changed: {', '.join(keys)}")
    if old.attachments and old.digest != new.digest and not differences:
        differences.append("the recipe's query files changed")
    *major_minor, patch = published.version.split(".")
    following = ".".join([*major_minor, str(int(patch) + 1)])
    return VersionError(
        f"Version {published.version} in {str(published.path)!r} holds other content: "
        f"{'; '.join(differences or ['the rows have another order'])}. Publish with another "
        f"version, such as version={following!r}, or to another folder."
    )


def _changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    changed = []
    for key in old:
        if isinstance(old[key], Mapping) and isinstance(new[key], Mapping):
            changed += _changed_keys(old[key], new[key], f"{prefix}{key}.")
        elif old[key] != new[key]:
            changed.append(prefix + key)
    return changed


def _write(building: Path, answers: _Answers, version: str, written_before: str | None) -> None:
    sizes = _write_rows(building, answers)
    manifest = _manifest(answers, version)
    answers.recipe.dump(building / "recipe")
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (building / "manifest.json").write_text(text + "\n", encoding="utf-8")
    card = dataset_card(
        manifest,
        answers.recipe,
        example=answers.survey.example or {},
        layout=_layout(answers.survey, sizes, manifest),
        written_before=written_before,
    )
    (building / "README.md").write_text(card, encoding="utf-8")


def _write_rows(building: Path, answers: _Answers) -> dict[str, Size]:
    released, rejected = release_features().arrow_schema, rejected_features().arrow_schema
    shards = {name: Shards(building / "data", name, released) for name in answers.survey.splits}
    if answers.survey.rows[REJECTED]:
        shards[REJECTED] = Shards(building / REJECTED, REJECTED, rejected)
    for parts, rows in answered_contents(answers.rows, answers.recipe):
        for part in parts:
            shards[part].add(rows)
    return {name: shard.close() for name, shard in shards.items()}


def _manifest(answers: _Answers, version: str) -> dict[str, Any]:
    found, generation = answers.survey, answers.generation
    return {
        "version": version,
        "recipe": answers.recipe.name,
        "recipe_digest": answers.recipe.digest,
        "content_digest": answers.digest,
        **{key: generation[key] for key in ("teacher", "identity", "renderer", "sampling")},
        "prompt_sha256": sha256(answers.recipe.prompt.encode()).hexdigest(),
        "splits": found.splits,
        "kept": found.kept,
        "rejected": dict(sorted(found.rejected.items())),
        "errors": found.errors,
        "references": found.references,
        "tokens": generation["tokens"],
        "mean_prompt_tokens": found.mean_prompt_tokens,
        "created": generation["created"],
        "versions": generation["versions"],
    }


def _layout(
    found: Survey, sizes: Mapping[str, Size], manifest: Mapping[str, Any]
) -> dict[str, Any]:
    """The card's `configs` and `dataset_info`, as `datasets` and the Hub's viewer read them.

    `datasets` caches a local folder by this text alone. The version and the digest in it keep it
    from returning the rows of an earlier release in the same place.
    """
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    places = {"default": ("data", list(found.splits), release_features())}
    if REJECTED in sizes:
        places[REJECTED] = (REJECTED, [REJECTED], rejected_features())
    configs = [
        {
            "config_name": name,
            "version": manifest["version"],
            "description": f"content {manifest['content_digest']}",
            "data_files": [{"split": s, "path": f"{place}/{s}-*"} for s in splits],
        }
        for name, (place, splits, _) in places.items()
    ]
    infos = {
        name: _info(features, {split: sizes[split] for split in splits})
        for name, (_, splits, features) in places.items()
    }
    card = DatasetCardData()
    DatasetInfosDict(infos).to_dataset_card_data(card)
    return {"configs": configs, "dataset_info": card["dataset_info"]}


def _info(features: "Features", sizes: Mapping[str, Size]) -> "DatasetInfo":
    from datasets import DatasetInfo, SplitDict, SplitInfo

    splits = SplitDict()
    for name, size in sizes.items():
        splits.add(SplitInfo(name, size.arrow_bytes, size.rows))
    return DatasetInfo(
        features=features,
        splits=splits,
        download_size=sum(size.file_bytes for size in sizes.values()),
        dataset_size=sum(size.arrow_bytes for size in sizes.values()),
    )

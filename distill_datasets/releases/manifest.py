"""What a release says about itself for programs: its manifest, which version it is and why, and its
card's layout.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distill_datasets.errors import DatasetError
from distill_datasets.hub.references import folder_of
from distill_datasets.parquet import open_parquet

if TYPE_CHECKING:
    from datasets import DatasetInfo, Features

MANIFEST = "manifest.json"
REJECTED = "rejected"
PARTS = ("data", REJECTED, "ledger", "soft")  # the folders of rows; the first is the release itself
_NEEDED = ("version", "content_digest", "splits", "rejected", "errors")


def read_manifest(release: Path) -> dict[str, Any]:
    """The manifest in a release's folder."""
    path = release / MANIFEST
    if not path.is_file():
        raise DatasetError(
            f"{str(release)!r} is not a release: expected a manifest.json in it. Name the folder "
            "that `publish` wrote."
        )
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(text: str | bytes, where: str) -> dict[str, Any]:
    """A manifest's text; raises `DatasetError` that names where it lies."""
    problem = ""
    try:
        manifest = json.loads(text)
        missing = [key for key in _NEEDED if key not in manifest]
        problem = f"no {', '.join(missing)}" if missing else ""
        rejected_rows(manifest)
        sum(manifest["splits"].values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        problem = problem or repr(error)
    if problem:
        raise DatasetError(
            f"{where!r} is not a manifest that `publish` wrote ({problem}). Delete the release "
            "and publish again."
        )
    return dict(manifest)


def write_manifest(release: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json behind all other files but the card, and put their digests into it."""
    digests = manifest["sha256"] = {}
    for path in sorted(path for path in release.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digests[path.relative_to(release).as_posix()] = file_digest(file, "sha256").hexdigest()
    (release / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """A manifest as it is written."""
    return json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"


def rejected_rows(manifest: Mapping[str, Any]) -> int:
    """How many rows were asked for and can't be used."""
    return int(sum(manifest["rejected"].values())) + int(manifest["errors"])


def side_config(config: str, part: str) -> str:
    """The configuration that holds the `part` (rejected, ledger, soft) of another."""
    return part if config == "default" else f"{config}-{part}"


def layout(release: Path, manifest: Mapping[str, Any], config: str = "default") -> dict[str, Any]:
    """The card's `configs` and `dataset_info`, as `datasets` and the Hub's viewer read them.

    `config` is what the release is called in its repository. `datasets` caches a local folder by
    this text alone: the version and the digest in it keep it from returning the rows of an
    earlier release in the same place.
    """
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    configs, infos = [], {}
    for part in PARTS:
        splits = manifest["splits"] if part == "data" else [part]
        files = {split: sorted((release / part).glob(f"{split}-*.parquet")) for split in splits}
        if not any(files.values()):
            continue
        name = config if part == "data" else side_config(config, part)
        data_files = [
            {"split": split, "path": f"{folder_of(config)}{part}/{split}-*"} for split in files
        ]
        configs.append(
            {
                "config_name": name,
                "version": manifest["version"],
                "description": f"content {manifest['content_digest']}",
                "data_files": data_files,
            }
        )
        infos[name] = _info(files)
    card = DatasetCardData()
    DatasetInfosDict(infos).to_dataset_card_data(card)
    return {"configs": configs, "dataset_info": card["dataset_info"]}


def columns(features: Features) -> dict[str, str]:
    """Each column's type by its name."""
    return {field.name: str(field.type) for field in features.arrow_schema}


def _info(files: Mapping[str, list[Path]]) -> DatasetInfo:
    """What the files of some splits hold: columns, rows, bytes."""
    from datasets import DatasetInfo, Features, SplitDict, SplitInfo

    splits, features = SplitDict(), None
    for split, paths in files.items():
        rows = unpacked = 0
        for path in paths:
            file = open_parquet(path)
            about = file.metadata
            groups = (about.row_group(number) for number in range(about.num_row_groups))
            rows += about.num_rows
            unpacked += sum(group.total_byte_size for group in groups)
            features = features or Features.from_arrow_schema(file.schema_arrow)
        splits.add(SplitInfo(split, unpacked, rows))
    return DatasetInfo(
        features=features,
        splits=splits,
        download_size=sum(path.stat().st_size for paths in files.values() for path in paths),
        dataset_size=sum(split.num_bytes for split in splits.values()),
    )


FIRST = "1.0.0"
Level = Literal["major", "minor", "patch"]
_VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")
_LEVELS: tuple[Level, ...] = ("major", "minor", "patch")
# What a student would have to be trained and asked for in another way.
_FORMAT = ("response", "answer", "student")
# What a manifest says about one release, not about what it holds.
_OCCASION = (
    *("version", "why", "history", "created", "versions", "files", "card", "config"),
    *("sha256", "warnings", "from_ledger"),
)
# What the reasons below say more about.
_COVERED = ("content_digest", "recipe_digest", "prompt_sha256", "columns", "recipe_fields")


@dataclass(frozen=True)
class Change:
    """How much a release differs from the one before, and in what."""

    level: Level
    reasons: Sequence[str]

    @property
    def why(self) -> str:
        """The reasons in one line."""
        return "; ".join(self.reasons)


def check_version(version: str) -> None:
    """Raises `DatasetError` for what isn't three numbers."""
    if not _VERSION.fullmatch(version):
        raise DatasetError(f"{version!r} is not a version: expected three numbers such as '1.0.0'.")


def order(version: str) -> tuple[int, ...]:
    """What versions are sorted by."""
    return tuple(map(int, version.split(".")))


def version_of(tag: str) -> str | None:
    """The version that a tag names, None for a tag of another kind."""
    name = tag.removeprefix("v")
    return name if tag.startswith("v") and _VERSION.fullmatch(name) else None


def following(version: str, level: Level) -> str:
    """The next version after a change of this level."""
    place = _LEVELS.index(level)
    numbers = order(version)
    raised = [*numbers[:place], numbers[place] + 1, 0, 0][:3]
    return ".".join(map(str, raised))


@dataclass(frozen=True)
class RowChanges:
    """Rows only in the new release, only in the old one, and changed in both.

    `answers` counts those of the changed rows whose response is another, `recounted` the
    unchanged rows with other token counts.
    """

    added: int
    removed: int
    changed: int
    answers: int
    recounted: int

    def words(self) -> list[str]:
        """What happened, with numbers; empty where no row was added, removed or changed."""
        changed = _counted(self.changed, "row", "changed")
        if self.answers == self.changed:
            changed = _counted(self.changed, "answer", "changed")
        elif self.answers:
            changed += f", {self.answers:,} of them in the answer"
        words = (
            _counted(self.added, "row", "added"),
            _counted(self.removed, "row", "removed"),
            changed,
        )
        return [word for word in words if word]


def difference(
    old: Mapping[str, Any], new: Mapping[str, Any], rows: Callable[[], RowChanges]
) -> Change | None:
    """What two manifests say differs; `rows` is called only where rows may. None for nothing.

    Major if the columns, the prompt or the response format changed; minor if rows or how they
    were made did; patch for token counts, and for what only the card says.
    """
    keys = changed_keys(old.get("recipe_fields", new["recipe_fields"]), new["recipe_fields"])
    if old["content_digest"] == new["content_digest"]:
        reasons = [*_recipe_reasons(keys), *_other_reasons(old, new)]
        return Change("patch", reasons) if reasons else None
    breaking = list(_breaking_reasons(old, new, keys))
    others = [key for key in keys if key.partition(".")[0] not in _FORMAT]
    changes = rows()
    reasons = [*breaking, *changes.words(), *_recipe_reasons(others)]
    if not reasons and old["recipe_digest"] != new["recipe_digest"]:
        reasons = ["the query files changed"]
    elif not reasons and changes.recounted:
        rows_of = f"{changes.recounted:,} row{'' if changes.recounted == 1 else 's'}"
        return Change("patch", [f"the teacher's token counts changed in {rows_of}"])
    elif not reasons:
        reasons = ["the rows have another order"]
    return Change("major" if breaking else "minor", reasons)


def history(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every release with its reason, the newest first; a version written again is there once."""
    earlier = old.get("history", []) if old else []
    latest = {key: str(new[key]) for key in ("version", "created", "why")}
    return [latest, *(one for one in earlier if one["version"] != new["version"])]


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys whose values differ, dotted."""
    changed = []
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed += changed_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            changed.append(prefix + key)
    return changed


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings, by dotted keys."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _breaking_reasons(
    old: Mapping[str, Any], new: Mapping[str, Any], keys: Sequence[str]
) -> Iterator[str]:
    if columns := changed_keys(old.get("columns", new["columns"]), new["columns"]):
        yield f"the columns changed ({', '.join(columns)})"
    if old["prompt_sha256"] != new["prompt_sha256"]:
        yield "the prompt changed"
    if form := [key for key in keys if key.partition(".")[0] in _FORMAT]:
        yield f"the response format changed ({', '.join(form)})"


def _recipe_reasons(keys: Sequence[str]) -> list[str]:
    return [f"recipe keys changed: {', '.join(keys)}"] if keys else []


def _other_reasons(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What the card tells from the manifest."""
    ignored = (*_OCCASION, *_COVERED)
    # A manifest of version 0.1 says nothing of the prompt, which is there.
    keys = [
        key
        for key in changed_keys({"prompt": True, **old}, new)
        if key.partition(".")[0] not in ignored
    ]
    return [f"the card's facts changed: {', '.join(keys)}"] if keys else []


def _counted(count: int, noun: str, what: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'} {what}" if count else ""

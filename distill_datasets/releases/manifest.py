"""What a release says about itself for programs: its manifest, and its card's layout."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """A manifest as it is written."""
    return json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"


def write_manifest(release: Path, manifest: Mapping[str, Any]) -> None:
    """Write manifest.json into a release's folder, as its last file but the card."""
    (release / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")


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


def columns(features: "Features") -> dict[str, str]:
    """Each column's type by its name."""
    return {field.name: str(field.type) for field in features.arrow_schema}


def _info(files: Mapping[str, list[Path]]) -> "DatasetInfo":
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

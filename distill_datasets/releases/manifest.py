"""What a release says about itself for programs: its manifest, and its card's layout."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import DatasetError
from distill_datasets.releases.parquet import Size

if TYPE_CHECKING:
    from datasets import DatasetInfo, Features

MANIFEST = "manifest.json"
_NEEDED = ("version", "content_digest", "splits", "rejected", "errors")


@dataclass(frozen=True)
class Part:
    """Rows of one kind in a release: their configuration's folder, columns and splits' sizes."""

    folder: str
    features: "Features"
    sizes: Mapping[str, Size]


def read_manifest(release: Path) -> dict[str, Any]:
    """The manifest in a release's folder."""
    path = release / MANIFEST
    if not path.is_file():
        raise DatasetError(
            f"{str(release)!r} is not a release: expected a manifest.json in it. Name the folder "
            "that `publish` wrote."
        )
    return parse_manifest(path.read_text(encoding="utf-8"), str(path))


def parse_manifest(text: str, where: str) -> dict[str, Any]:
    """A manifest's text; raises `DatasetError` that names where it lies."""
    try:
        manifest = json.loads(text)
        missing = [key for key in _NEEDED if key not in manifest]
    except (ValueError, TypeError) as error:
        raise _unreadable(where, str(error)) from error
    if missing or not isinstance(manifest, dict):
        raise _unreadable(where, f"no {', '.join(missing)}")
    return manifest


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """A manifest as it is written."""
    return json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"


def layout(parts: Mapping[str, Part], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The card's `configs` and `dataset_info`, as `datasets` and the Hub's viewer read them.

    `datasets` caches a local folder by this text alone. The version and the digest in it keep it
    from returning the rows of an earlier release in the same place.
    """
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    configs = [
        {
            "config_name": name,
            "version": manifest["version"],
            "description": f"content {manifest['content_digest']}",
            "data_files": [
                {"split": split, "path": f"{part.folder}/{split}-*"} for split in part.sizes
            ],
        }
        for name, part in parts.items()
    ]
    card = DatasetCardData()
    infos = {name: _info(part) for name, part in parts.items()}
    DatasetInfosDict(infos).to_dataset_card_data(card)
    return {"configs": configs, "dataset_info": card["dataset_info"]}


def columns(features: "Features") -> dict[str, str]:
    """Each column's type by its name."""
    return {field.name: str(field.type) for field in features.arrow_schema}


def _info(part: Part) -> "DatasetInfo":
    from datasets import DatasetInfo, SplitDict, SplitInfo

    splits = SplitDict()
    for name, size in part.sizes.items():
        splits.add(SplitInfo(name, size.arrow_bytes, size.rows))
    return DatasetInfo(
        features=part.features,
        splits=splits,
        download_size=sum(size.file_bytes for size in part.sizes.values()),
        dataset_size=sum(size.arrow_bytes for size in part.sizes.values()),
    )


def _unreadable(where: str, problem: str) -> DatasetError:
    return DatasetError(
        f"{where!r} is not a manifest that `publish` wrote ({problem}). Delete the release and "
        "publish again."
    )

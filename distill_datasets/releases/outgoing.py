"""A release's folder as it will lie in a repository: files by name, manifest, card."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from distill_datasets.errors import DatasetError
from distill_datasets.hub.references import folder_of
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.releases.card_merge import keep, markers, read_card, side_config, written_card
from distill_datasets.releases.cards import dataset_card
from distill_datasets.releases.contents import fingerprints_of
from distill_datasets.releases.fingerprints import Fingerprints
from distill_datasets.releases.manifest import MANIFEST, manifest_text, read_manifest
from distill_datasets.releases.repository import README

_FOLDERS = ("data", "rejected", "ledger", "soft", "recipe")
_LAYOUT = ("configs", "dataset_info")


@dataclass(frozen=True)
class Outgoing:
    """A release on its way to `repo`, where it will be called `config`."""

    release: Path
    repo: str
    config: str
    manifest: Mapping[str, Any]
    recipe: Recipe

    @cached_property
    def files(self) -> dict[str, Path]:
        """Everything but manifest and card, by its name in the release."""
        paths = sorted(path for path in self.release.rglob("*") if path.is_file())
        named = {path.relative_to(self.release).as_posix(): path for path in paths}
        return {name: at for name, at in named.items() if name not in (README, MANIFEST)}

    @cached_property
    def fingerprints(self) -> Fingerprints:
        """Of the rows."""
        return fingerprints_of(self.release)

    def title(self, version: str) -> str:
        """Of the commit."""
        return f"Release {'' if self.config == 'default' else self.config + ' '}{version}"

    def reads(self, path: str) -> bool:
        """Whether `load_dataset` would read a file of the repository as rows of this release."""
        patterns = (
            one["path"] for config in self._layout("")["configs"] for one in config["data_files"]
        )
        return any(fnmatchcase(path, pattern) for pattern in patterns)

    def texts(
        self, manifest: Mapping[str, Any], card: str | None, old: Mapping[str, Any] | None
    ) -> dict[str, str]:
        """Manifest and card by their places; of the `card` there, what people wrote is kept."""
        facts = {**manifest, "config": self.config, "files": sorted(self.files)}
        shown = {**facts, "repo": self.repo}
        example, layout = self._example(), self._layout(str(manifest["version"]))
        # What people wrote beside the release, then what they wrote on the Hub, which wins.
        written = dataset_card(
            shown,
            self.recipe,
            example=example,
            layout=layout,
            written_before=self._local_card,
            previous=self.manifest.get("card"),
        )
        if card is not None:
            written = keep(written, card, config=self.config, previous=(old or {}).get("card", {}))
        return {folder_of(self.config) + MANIFEST: manifest_text(facts), README: written}

    @property
    def _local_card(self) -> str:
        """The card beside the release without its layout, as if for this configuration."""
        metadata, body = read_card((self.release / README).read_text(encoding="utf-8"))
        for ours, there in zip(markers("default"), markers(self.config), strict=True):
            body = body.replace(ours, there)
        kept = {key: value for key, value in metadata.items() if key not in _LAYOUT}
        return written_card(kept, body)

    def _example(self) -> dict[str, Any]:
        from pyarrow.parquet import ParquetFile

        first = sorted(self.release.glob(f"data/{next(iter(self.manifest['splits']))}-*"))[0]
        rows = next(ParquetFile(first).iter_batches(batch_size=1)).to_pylist()
        return dict(rows[0])

    def _layout(self, version: str) -> dict[str, Any]:
        """The local card's layout, with the names and folders that it has in the repository."""
        metadata, _ = read_card((self.release / README).read_text(encoding="utf-8"))
        infos = metadata["dataset_info"]
        if self.config == "default":
            configs = [{**one, "version": version} for one in metadata["configs"]]
            return {"configs": configs, "dataset_info": infos}
        return {
            "configs": [self._moved(one, version) for one in metadata["configs"]],
            "dataset_info": [
                {**one, "config_name": self._renamed(one.get("config_name", "default"))}
                for one in (infos if isinstance(infos, list) else [infos])
            ],
        }

    def _moved(self, config: Mapping[str, Any], version: str) -> dict[str, Any]:
        folder = folder_of(self.config)
        return {
            **config,
            "config_name": self._renamed(config["config_name"]),
            "version": version,
            "data_files": [{**one, "path": folder + one["path"]} for one in config["data_files"]],
        }

    def _renamed(self, name: str) -> str:
        return self.config if name == "default" else side_config(self.config, name)


def load_outgoing(release: Path, repo: str, config: str, private: bool) -> Outgoing:
    """Check everything that needs no network; raises `DatasetError`."""
    manifest, recipe = read_manifest(release), load_recipe(release)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", config) or config in (*_FOLDERS, "all"):
        raise DatasetError(
            f"{config!r} can't name a configuration: expected letters, digits, '.', '_' and '-', "
            f"and none of {[*_FOLDERS, 'all']}."
        )
    if config.endswith(("-rejected", "-ledger", "-soft")):
        raise DatasetError(f"{config!r} is the name of another configuration's part: choose one.")
    if not private and recipe.license is None:
        raise DatasetError(
            f"{str(release)!r} states no licence, so it can't be published for everybody: set "
            "`license:` in the recipe and publish again, or push it as private."
        )
    return Outgoing(release, repo, config, manifest, recipe)

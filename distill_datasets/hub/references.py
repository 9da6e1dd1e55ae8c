"""Releases and datasets by name: a folder here, or one commit of a repository on the Hub."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import HubError

if TYPE_CHECKING:
    from distill_datasets.hub.client import HubDataset

_REFERENCE = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[^@\s]+)?")
# Besides a configuration's own files: what says how to read them.
_ALWAYS = ("README.md", ".huggingface.yaml", "dataset_infos.json", "manifest.json")


@dataclass(frozen=True)
class Pinned:
    """A folder: of somebody here, or of the Hub's cache with a dataset's files at one commit."""

    path: Path
    commit: str | None


def is_reference(given: Path | str) -> bool:
    """Whether a text can name a Hub dataset: `name/dataset`, with or without `@revision`."""
    return isinstance(given, str) and _REFERENCE.fullmatch(given) is not None


def folder_of(config: str | None) -> str:
    """Where a configuration's release lies in a repository, with the slash behind it."""
    return "" if config in (None, "default") else f"{config}/"


def find_release(
    given: Path | str, parts: Sequence[str], config: str | None = None
) -> Pinned | None:
    """A release's folder with `parts` of it: the folder, that of a run, or a Hub dataset's.

    `config` names one of several releases in one place. Of a Hub dataset only the manifest, the
    recipe and the parts are downloaded. None for what is no release.
    """
    path, inside = Path(given).expanduser(), folder_of(config)
    commit, folders = None, [path / inside, path / "release"]
    if not path.exists() and is_reference(given):
        wanted = ["manifest.json", *(f"{part}/*" for part in ("recipe", *parts))]
        found = _fetch(str(given), [inside + pattern for pattern in wanted])
        commit, folders = found.commit, [found.path / inside]
    releases = (Pinned(folder, commit) for folder in folders if _is_release(folder))
    return next(releases, None)


def fetch_dataset(reference: str, config: str | None) -> Pinned:
    """Everything that `load_dataset(path, config)` reads of a Hub dataset.

    Other configurations stay where they are, when the card says which files are whose. Offline
    it is the commit that the revision named when it was last downloaded, or an error.
    """
    from distill_datasets.hub import client as hub

    dataset = _resolve(reference)
    path = hub.snapshot(dataset, ["README.md"])
    patterns = _data_files(_configs(path / "README.md"), config)
    if patterns is not None:
        patterns += [*_ALWAYS, f"{folder_of(config)}manifest.json"]
    return Pinned(hub.snapshot(dataset, patterns), dataset.commit)


def _is_release(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def _resolve(reference: str) -> "HubDataset":
    from distill_datasets.hub.client import resolve

    try:
        return resolve(reference)
    except HubError as error:
        if "@" in reference:
            raise
        # Without a revision it may as well be a folder whose name is misspelt.
        raise type(error)(f"There is no folder {reference!r} here. {error}") from error


def _fetch(reference: str, patterns: Sequence[str]) -> Pinned:
    from distill_datasets.hub import client as hub

    dataset = _resolve(reference)
    return Pinned(hub.snapshot(dataset, list(patterns)), dataset.commit)


def _configs(readme: Path) -> list[Mapping[str, Any]]:
    from huggingface_hub import DatasetCard
    from yaml import YAMLError

    if not readme.is_file():
        return []
    try:
        configs = DatasetCard.load(readme).data.to_dict().get("configs")
    except (ValueError, YAMLError):
        return []  # `load_dataset` says what is wrong with it
    return [one for one in configs or [] if isinstance(one, Mapping)]


def _data_files(configs: Sequence[Mapping[str, Any]], config: str | None) -> list[str] | None:
    """Patterns of the files of a configuration; None where the card doesn't say."""
    marked = [one.get("config_name") for one in configs if one.get("default") or len(configs) == 1]
    wanted = config or next(iter(marked), "default")
    asked = [one for one in configs if one.get("config_name") == wanted]
    # `datasets` looks at the first configuration's files for the format, whichever is asked for.
    read = [*asked, *configs[:1]]
    patterns = [pattern for one in read for pattern in _paths(one.get("data_files"))]
    if not asked or any("data_dir" in one for one in read) or "" in patterns:
        return None
    return [pattern.removeprefix("./") for pattern in patterns]


def _paths(files: Any) -> Iterator[str]:
    if isinstance(files, str) and "://" not in files:
        yield files
    elif isinstance(files, Mapping):
        yield from _paths(files.get("path"))
    elif isinstance(files, list):
        for one in files:
            yield from _paths(one)
    else:
        yield ""

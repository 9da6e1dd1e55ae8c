"""Releases and datasets by name: a folder here, or one commit of a repository on the Hub.

What somebody else wrote is data: it names no file outside its own folder, and its files are those
that its manifest was written for.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import DatasetError, HubError, OutputError
from distill_datasets.files import write_file

if TYPE_CHECKING:
    from distill_datasets.hub.client import HubDataset

_REFERENCE = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?(?P<revision>@[^@\s]+)?"
)
# Besides a configuration's own files: what says how to read them.
_ALWAYS = ("README.md", ".huggingface.yaml", "dataset_infos.json", "manifest.json")


@dataclass(frozen=True)
class Pinned:
    """A folder: of somebody here, or of the Hub's cache with a dataset's files at one commit."""

    path: Path
    commit: str | None


def is_reference(given: Path | str) -> bool:
    """Whether a text can name a Hub dataset: `name/dataset`, with or without `:configuration` and
    `@revision`.
    """
    return isinstance(given, str) and _REFERENCE.fullmatch(given) is not None


def split_config(given: Path | str) -> tuple[Path | str, str | None]:
    """A reference without the configuration in `name/dataset:configuration@revision`, and that."""
    found = _REFERENCE.fullmatch(given) if isinstance(given, str) else None
    if found is None or found["config"] is None or Path(given).exists():
        return given, None
    return found["name"] + (found["revision"] or ""), found["config"]


def folder_of(config: str | None) -> str:
    """Where a configuration's release lies in a repository, with the slash behind it."""
    return "" if config in (None, "default") else f"{config}/"


def find_release(
    given: Path | str, parts: Sequence[str], config: str | None = None
) -> Pinned | None:
    """A release's folder with `parts` of it: the folder, that of a run, or a Hub dataset's.

    `config` names one of several releases in one place, as `name/dataset:config` does. Of a Hub
    dataset only the manifest, the recipe and the parts are downloaded. None for what is no
    release. Raises `DatasetError` where one of several must be named, and where a file of the
    parts is not the one that the manifest was written for; see `check_files`.
    """
    given, own = split_config(given)
    config = config or own
    path, inside = Path(given).expanduser(), folder_of(config)
    commit, folders = None, [path / inside, path / "release"]
    if not path.exists() and is_reference(given):
        wanted = ["manifest.json", *(f"{part}/*" for part in ("recipe", *parts))]
        found = _fetch(str(given), [inside + pattern for pattern in wanted])
        commit, folders = found.commit, [found.path / inside]
    for folder in folders:
        if (folder / "manifest.json").is_file():
            if parts:
                check_files(folder, parts)
            return Pinned(folder, commit)
    if commit and config is None:
        # The repository's releases may be configurations with names.
        found = _fetch(str(given), ["*/manifest.json"])
        if names := sorted(path.parent.name for path in found.path.glob("*/manifest.json")):
            name, at, revision = str(given).partition("@")
            raise DatasetError(
                f"{str(given)!r} has the configurations {names}: name one of them, as "
                f"'{name}:{names[0]}{at}{revision}'."
            )
    return None


def inside(folder: Path, name: str) -> Path:
    """The path `name` in a folder that somebody else may have written.

    Raises `DatasetError` where it lies elsewhere: by an absolute path, by `..`, or through a
    link. The links of the Hub's cache, within that cache, are its own.
    """
    from huggingface_hub import constants

    path, root = folder / name, folder.resolve()
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise _outside(folder, name, "it names a path outside")
    found = path.resolve()
    if found.is_relative_to(root):
        return path
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    cached = path.absolute().is_relative_to(cache.absolute())
    if cached and found.is_relative_to(cache.resolve()):
        return path
    raise _outside(folder, name, f"it is a link to {str(found)!r}")


def check_files(release: Path, parts: Collection[str]) -> None:
    """Compare the files in these folders of a release with the digests in its manifest.

    Files that were compared before, and have the same time and size, are not read again. A
    manifest of version 0.1 has no digests. Raises `DatasetError` that names the first file that
    was changed, added or taken away, or that leads out of the folder.
    """
    _check_card(release)
    path = release / "manifest.json"
    try:
        listed = json.loads(path.read_text(encoding="utf-8")).get("sha256")
    except (ValueError, AttributeError) as error:
        raise DatasetError(f"{str(path)!r} is no manifest: {error}. Publish again.") from error
    names = sorted(
        path.relative_to(release).as_posix()
        for part in parts
        for path in (release / part).rglob("*")
        if not path.is_dir()
    )
    paths = [inside(release, name) for name in names]
    if not isinstance(listed, Mapping):
        return
    expected = {name for name in listed if name.partition("/")[0] in parts}
    if missing := sorted(expected - {*names}):
        raise _changed(release, missing[0], "is missing")
    if added := [name for name in names if name not in expected]:
        raise _changed(release, added[0], "was added")
    digests = sorted((name, listed[name]) for name in expected)
    with remembered(release, paths, digests) as known:
        for name, path in zip(names, () if known else paths, strict=False):
            with path.open("rb") as file:
                if file_digest(file, "sha256").hexdigest() != listed[name]:
                    raise _changed(release, name, "has other content")


@contextmanager
def remembered(release: Path, paths: Sequence[Path], facts: Any) -> Iterator[bool]:
    """Whether a check of these files was passed before; what passes is noted in the user's cache.

    Files are known by their time and size; `facts` are what they are checked against.
    """
    from huggingface_hub import constants

    stats = [(str(path), path.stat()) for path in paths]
    files = [(name, stat.st_mtime_ns, stat.st_size) for name, stat in stats]
    seen = sha256(repr((files, facts)).encode()).hexdigest()
    checked = (str(release.resolve()), type(facts).__name__, [name for name, _ in stats])
    place = sha256(repr(checked).encode()).hexdigest()[:32]
    note = Path(constants.HF_HOME).expanduser() / "distill_datasets" / "checked" / place
    known = note.is_file() and note.read_text(encoding="utf-8") == seen
    yield known
    if not known:
        with suppress(OutputError):  # a cache that can't be written costs another look
            write_file(note, seen)


def fetch_dataset(reference: str, config: str | None) -> Pinned:
    """Everything that `load_dataset(path, config)` reads of a Hub dataset.

    Other configurations stay where they are, when the card says which files are whose. Offline
    it is the commit that the revision named when it was last downloaded, or an error.
    """
    from distill_datasets.hub import client as hub

    dataset = _resolve(reference)
    path = hub.snapshot(dataset, ["README.md"])
    _check_card(path)
    patterns = _data_files(_configs(path / "README.md"), config)
    if patterns is not None:
        patterns += [*_ALWAYS, f"{folder_of(config)}manifest.json"]
    return Pinned(hub.snapshot(dataset, patterns), dataset.commit)


def _check_card(folder: Path) -> None:
    """Raise `DatasetError` for a card by which `load_dataset` would read files elsewhere here."""
    for config in _configs(folder / "README.md"):
        for pattern in (*_texts(config.get("data_files")), *_texts(config.get("data_dir"))):
            local = not pattern.startswith(("https://", "http://", "hf://"))
            leads_out = "://" in pattern or pattern.startswith(("/", "~", "file:"))
            if local and (leads_out or ".." in PurePath(pattern).parts):
                raise _outside(folder, pattern, "its card names it as data")


def _texts(value: Any) -> Iterator[str]:
    """Every text in what a card says of its files, however it says it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for one in value.values() for text in _texts(one))
    elif isinstance(value, list):
        yield from (text for one in value for text in _texts(one))


def _outside(folder: Path, name: str, how: str) -> DatasetError:
    return DatasetError(
        f"{str(folder)!r} names the file {name!r}, but {how}: expected a file in that folder. "
        "Copy it there, or don't use what you were given."
    )


def _changed(release: Path, name: str, what: str) -> DatasetError:
    return DatasetError(
        f"{str(release / name)!r} {what}: it is not the file that {str(release)!r} was published "
        "with, whose digest is in its manifest.json. Get the release again, or publish anew."
    )


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
    except (ValueError, TypeError, YAMLError):
        return []  # `load_dataset` says what is wrong with it
    return [one for one in configs if isinstance(one, Mapping)] if isinstance(configs, list) else []


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

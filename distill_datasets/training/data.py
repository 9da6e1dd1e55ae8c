"""A dataset as a training reads it: found, pinned to its content, and rendered to tokens."""

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import DatasetError, OutputError
from distill_datasets.hub.references import Pinned, fetch_dataset, folder_of, is_reference
from distill_datasets.models.sampler import digest
from distill_datasets.releases.contents import check_release
from distill_datasets.schema import Message

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, DatasetBuilder, DatasetDict
    from numpy.typing import NDArray

    from distill_datasets.models.connection import Connection
    from distill_datasets.training.settings import TrainSettings

_VERSION = 3  # of the rendered columns: raise it when they come out differently
_NO_ROWS = (IndexError, StopIteration)  # what `datasets` raises for a file without any
_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


RowReader = Callable[[Mapping[str, Any], int], list[Message]]  # a row and its number
_CALLS = ("tool_calls", "function_call")  # empty where nothing was called
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Example:
    """A rendered conversation; a token is learned as much as its weight says, 0 not at all.

    `bytes` is the length of its response in UTF-8, which no tokenizer changes.
    """

    tokens: Sequence[int]
    weights: Sequence[float]
    bytes: int = 0

    @property
    def targets(self) -> "NDArray[np.float32]":
        """The weights of the tokens that are predicted: all but the first."""
        import numpy as np

        return np.asarray(self.weights[1:], dtype=np.float32)


@dataclass(frozen=True)
class DatasetSource:
    """A dataset on this disk. `revision` is a Hub commit, a release's version and content
    digest, or the digest of the files; `files` is the latter, for a Hub dataset the commit.
    """

    reference: str
    path: Path
    revision: str
    files: str
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def load(self, config: str | None) -> "DatasetDict":
        """All splits of a configuration; a release's or the folder's own default without one."""
        from datasets import DatasetDict, load_dataset_builder, load_from_disk
        from datasets.exceptions import DatasetsError

        try:
            if any((self.path / name).is_file() for name in ("dataset_dict.json", "state.json")):
                loaded = load_from_disk(str(self.path))
            elif self.path.is_file():
                reader = _READERS[self.path.suffix]
                loaded = _load(load_dataset_builder(reader, data_files=str(self.path)))
            else:
                loaded = _load(load_dataset_builder(str(self.path), name=config))
        except DatasetError:
            raise
        except (DatasetsError, ValueError, OSError, *_NO_ROWS) as error:
            raise DatasetError(
                f"{self.reference!r} can't be read: {error.__cause__ or error!r}. Expected splits "
                "that aren't empty, and one set of columns in all files of a split."
            ) from error
        return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})


@dataclass(frozen=True)
class Rendered:
    """A split as tokens; `skipped` rows are longer than allowed, and left out.

    `plain` are the same rows as they came, which `read` turns into conversations.
    """

    rows: "Dataset"
    kept: Sequence[int]
    skipped: int
    plain: "Dataset"
    read: "RowReader"

    def __len__(self) -> int:
        """The rows kept."""
        return len(self.kept)

    @cached_property
    def lengths(self) -> list[int]:
        """The tokens of each kept row."""
        lengths = _lengths(self.rows)
        return [lengths[place] for place in self.kept]

    def examples(self, places: Sequence[int]) -> "list[Example]":
        """The kept rows at these places."""
        read = self.rows[[self.kept[place] for place in places]]
        columns = (read[name] for name in ("tokens", "weights", "bytes"))
        return [Example(*row) for row in zip(*columns, strict=True)]

    def conversations(self, places: Sequence[int]) -> list[list[Message]]:
        """The kept rows at these places, as messages that end with the response."""
        rows = [self.kept[place] for place in places]
        return [self.read(self.plain[row], row) for row in rows]

    def batches(self, size: int) -> "Iterator[list[Example]]":
        """All of them in order."""
        for start in range(0, len(self), size):
            yield self.examples(range(start, min(start + size, len(self))))


class DatasetSplit:
    """One split that has rows, and columns to learn from; `DatasetError` where it has others."""

    def __init__(
        self, source: DatasetSource, config: str | None, name: str, rows: "Dataset"
    ) -> None:
        """Use `open_split` or `open_splits`."""
        self.name, self.rows = name, rows
        self.where = f"The split {name!r} of {source.reference!r}"
        self._key: tuple[str | None, ...] = (source.files, config, name)
        self._read = _conversation_reader(rows, self.where)

    @property
    def conversations(self) -> Iterator[list[Message]]:
        """Each row as messages that end with the response."""
        return map(self._read, self.rows, itertools.count())

    @property
    def keys(self) -> "NDArray[np.uint64]":
        """Each row's conversation as 64 bits, in the rows' order."""
        import numpy as np

        return np.fromiter(map(_row_key, self.conversations), np.uint64)

    def without(self, learned: "NDArray[np.uint64]") -> "DatasetSplit":
        """Only the rows whose key is none of these; raises `DatasetError` where none is left."""
        import numpy as np

        new = np.flatnonzero(~np.isin(self.keys, learned))
        if not len(new):
            raise DatasetError(
                f"{self.where} has only rows that were learned before, {len(self.rows)} of them. "
                "Train on a later version of the dataset, or leave out only_new (--only-new)."
            )
        fewer = copy(self)
        fewer.rows = self.rows.select(new)
        fewer._key = (*self._key, sha256(new.tobytes()).hexdigest())
        return fewer

    def render(self, connection: "Connection", max_length: int) -> Rendered:
        """Tokens and weights of every row, computed once and cached; only responses are learned.

        Raises `DatasetError` for a row that doesn't end with a response, and where no row is
        short enough.
        """
        from datasets import Features, List, Value

        read, where, renderer = self._read, self.where, connection.renderer

        def tokens_and_weights(row: Mapping[str, Any], place: int) -> dict[str, Any]:
            return _tokens_and_weights(read(row, place), renderer, f"{where}, row {place}")

        model = (connection.renderer_name, connection.tokenizer_source, connection.weights)
        fingerprint = digest([_VERSION, *self._key, *model])[:32]
        rendered = self.rows.map(
            tokens_and_weights,
            with_indices=True,
            remove_columns=self.rows.column_names,
            features=Features(
                {
                    "tokens": List(Value("int32")),
                    "weights": List(Value("float32")),
                    "bytes": Value("int32"),
                }
            ),
            new_fingerprint=fingerprint,
            cache_file_name=str(cache_folder() / f"{fingerprint}.arrow"),
            desc="render",
        )
        lengths = _lengths(rendered)
        kept = [place for place, length in enumerate(lengths) if length <= max_length]
        if not kept:
            raise DatasetError(
                f"{where} has no row of at most {max_length} tokens: the shortest of "
                f"{len(lengths)} has {min(lengths)}. Raise max_length, or pick a model with a "
                "longer context."
            )
        return Rendered(rendered, kept, len(lengths) - len(kept), self.rows, read)


def locate(dataset: str | Path, config: str | None = None) -> DatasetSource:
    """Find a folder, a file, or a Hub dataset `name@revision`, of which `config` is downloaded."""
    path = Path(dataset).expanduser()
    if path.is_file() and path.suffix not in _READERS:
        raise DatasetError(
            f"{str(dataset)!r} can't be read: expected a folder or a file that ends in "
            f"{', '.join(_READERS)}; found {path.suffix!r}."
        )
    commit = None
    if not path.exists():
        pinned = _download(str(dataset), config)
        path, commit = pinned.path, pinned.commit
    manifest_file = path / folder_of(config) / "manifest.json"
    manifest = _read_manifest(manifest_file) if manifest_file.is_file() else {}
    if "content_digest" in manifest:
        check_release(manifest_file.parent, ("data",))
    # The Hub's cache gets more files of a commit when somebody asks for them.
    files = commit or _files_digest(path)
    released = "/".join(str(manifest[k]) for k in ("version", "content_digest") if k in manifest)
    return DatasetSource(str(dataset), path, commit or released or files, files, manifest)


def _read_manifest(file: Path) -> dict[str, Any]:
    """A release's manifest; empty for somebody else's file of that name."""
    try:
        manifest = json.loads(file.read_bytes())
    except ValueError as error:
        raise DatasetError(
            f"{str(file)!r} is damaged: expected JSON ({error}). Publish or download that release "
            "again."
        ) from error
    return manifest if isinstance(manifest, dict) else {}


def _download(reference: str, config: str | None) -> Pinned:
    if not is_reference(reference):
        raise DatasetError(
            f"{reference!r} is not there: expected a folder, a file, or a Hub dataset like "
            "'org/name@v1.0.0'."
        )
    return fetch_dataset(reference, config)


def _files_digest(path: Path) -> str:
    content = sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        name = file.relative_to(path)
        if not file.is_file() or any(part.startswith((".", "cache-")) for part in name.parts):
            continue
        content.update(f"{name.as_posix()}\n{file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                content.update(block)
    return content.hexdigest()


def open_splits(source: DatasetSource, settings: "TrainSettings") -> dict[str, DatasetSplit]:
    """The splits "train" and, if there is one, "validation", by the names the settings give them.

    A validation split that was asked for by another name than the default must be there.
    """
    splits = source.load(settings.config)
    names = {"train": settings.train_split}
    asked = settings.validation_split
    if asked in splits or asked != type(settings).validation_split:
        names["validation"] = asked
    return {role: open_split(source, settings.config, name, splits) for role, name in names.items()}


def open_split(
    source: DatasetSource, config: str | None, name: str, splits: "Mapping[str, Dataset]"
) -> DatasetSplit:
    """The one of a configuration's `splits` that has this name; raises `DatasetError` where none
    has, or where it has no row.
    """
    if name not in splits:
        raise DatasetError(
            f"{source.reference!r} has no split {name!r}; found {sorted(map(str, splits))}. "
            "Name one of them."
        )
    if not len(splits[name]):
        raise DatasetError(
            f"The split {name!r} of {source.reference!r} is empty: expected at least one row."
        )
    return DatasetSplit(source, config, name, splits[name])


def _load(builder: "DatasetBuilder") -> "DatasetDict":
    """All splits. A CSV file's fields are text, as they are written: no code becomes a number."""
    from datasets import Features, Value

    found = [Path(file) for files in (builder.config.data_files or {}).values() for file in files]
    for file in found:
        if file.suffix in (".csv", ".json", ".jsonl"):
            _require_utf8(file)
    if type(builder.config).__name__ == "CsvConfig":
        columns = [_csv_columns(file) for file in found]
        features = Features(dict.fromkeys(columns[0], Value("string")))
        builder.config.features = builder.info.features = features
        builder.config.keep_default_na = False
    builder.download_and_prepare()
    return builder.as_dataset()


def _require_utf8(file: Path) -> None:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise DatasetError(
                    f"{str(file)!r}, line {number}: expected UTF-8; found {line!r:.80}. Save the "
                    "file as UTF-8."
                ) from error


def _csv_columns(file: Path) -> list[str]:
    """A CSV file's header; raises `DatasetError` for a row of another length."""
    with file.open(encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, strict=True)
        header = next(rows, [])
        try:
            for row in rows:
                if row and len(row) != len(header):
                    raise DatasetError(
                        f"{str(file)!r}, line {rows.line_num}: expected {len(header)} fields, as "
                        f"in the header {header}; found {len(row)}. Quote a field that holds a "
                        "comma."
                    )
        except csv.Error as error:
            raise DatasetError(f"{str(file)!r}, line {rows.line_num}: {error}.") from error
    return header


def _conversation_reader(rows: "Dataset", where: str) -> RowReader:
    """How to turn a row into a conversation that ends with the response.

    Supported: `messages`; `query` and `response`; `prompt` and `completion`. Each is text or
    messages, messages may be JSON text. Raises `DatasetError` that lists the columns of `rows`;
    what it returns raises it for a row that holds something else.
    """
    columns = rows.column_names
    pairs = (("query", "response"), ("prompt", "completion"))
    pair = next((pair for pair in pairs if {*pair} <= {*columns}), None)
    if "messages" not in columns and pair is None:
        raise DatasetError(
            f"{where} can't be trained on: expected a column 'messages', or 'query' and "
            f"'response', or 'prompt' and 'completion'; found {sorted(columns)}. Rename the "
            "columns (`dataset.rename_columns`) or pick another configuration."
        )
    parts = (
        (("messages", ""),)
        if pair is None or "messages" in columns
        else (
            (pair[0], "user"),
            (pair[1], "assistant"),
        )
    )
    for column, _ in parts:
        kind = str(getattr(rows.features[column], "dtype", ""))
        if kind.startswith(("timestamp", "date", "time")):
            raise DatasetError(
                f"{where} can't be trained on: expected text in {column!r}; found dates, which "
                "`datasets` doesn't keep as they are written. Save the rows as Parquet with that "
                "column as text."
            )

    def read(row: Mapping[str, Any], number: int) -> list[Message]:
        place = f"{where}, row {number}"
        return [one for column, role in parts for one in _turns(row[column], role, place, column)]

    return read


def _turns(value: Any, role: str, where: str, column: str) -> list[Message]:
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = [value]
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        expected = "text or messages" if role else "messages, a list of role and content"
        raise DatasetError(
            f"{where}: expected {expected} in {column!r}; found {value!r:.200}. Convert that "
            "column (`dataset.map`) or leave such rows out (`dataset.filter`)."
        )
    return [_message(one, where) for one in value]


def _message(message: Mapping[str, Any], where: str) -> Message:
    """Arrow fills absent keys with None, which chat renderers take for content."""
    found: Any = {key: value for key, value in message.items() if value is not None}
    content = found.get("content")
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        found["content"] = "".join(part["text"] for part in content)
    calls = found.get("tool_calls") or found.get("function_call")
    if calls or found.get("role") not in _ROLES or not isinstance(found.get("content"), str):
        raise DatasetError(
            f"{where}: expected messages with a role of {_ROLES} and text as content, without "
            f"tool calls; found {found!r:.300}. Leave such rows out (`dataset.filter`)."
        )
    return {key: value for key, value in found.items() if key not in _CALLS}  # type: ignore[return-value]


def _tokens_and_weights(messages: list[Message], renderer: Any, where: str) -> dict[str, Any]:
    from jinja2 import TemplateError
    from tinker_cookbook.exceptions import TinkerCookbookError
    from tinker_cookbook.renderers import TrainOnWhat

    last: Mapping[str, Any] = messages[-1] if messages else {}
    if last.get("role") != "assistant" or not last.get("content"):
        raise DatasetError(
            f"{where}: expected a conversation that ends with a non-empty message of the "
            f"assistant; found {last!r}. Leave such rows out (`dataset.filter`)."
        )
    try:
        tokens, weights = renderer.build_supervised_example(
            messages, TrainOnWhat.LAST_ASSISTANT_MESSAGE
        )
    except (TinkerCookbookError, TemplateError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{where}: the model's chat format can't hold this conversation ({error}). Leave such "
            "rows out (`dataset.filter`) or pick another renderer."
        ) from error
    if not float(weights[1:].sum()) > 0:
        raise DatasetError(f"{where}: the renderer gives its response no token to learn.")
    size = len(last["content"].encode())
    return {"tokens": tokens.to_ints(), "weights": weights.tolist(), "bytes": size}


def _row_key(conversation: Sequence[Mapping[str, Any]]) -> int:
    text = json.dumps(conversation, sort_keys=True, ensure_ascii=False)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def _lengths(rendered: "Dataset") -> list[int]:
    import pyarrow.compute as compute

    return list(compute.list_value_length(rendered.data.column("tokens")).to_pylist())


def cache_folder() -> Path:
    """Beside what `datasets` caches; its own choice can be the user's dataset folder."""
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / "distill_datasets"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"Can't write the cache {str(folder)!r}: {error}. Set HF_DATASETS_CACHE to another."
        ) from error
    return folder

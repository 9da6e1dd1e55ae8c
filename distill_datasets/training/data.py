"""A dataset as a training reads it: found, pinned to its content, and rendered to tokens.

Of a row's tokens the response alone is learned: each has a loss weight, 0 for all others.
"""

import csv
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.conversations import (
    Conversation,
    RowReader,
    as_written,
    conversation_reader,
    is_blank,
    response_text,
)
from distill_datasets.errors import DatasetError, OutputError
from distill_datasets.hub.references import (
    fetch_dataset,
    folder_of,
    is_reference,
    split_config,
)
from distill_datasets.models.sampler import digest
from distill_datasets.releases.contents import check_release
from distill_datasets.schema import SOURCE, Message
from distill_datasets.training.settings import TrainSettings, Turns

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset, DatasetBuilder, DatasetDict
    from numpy.typing import NDArray

    from distill_datasets.models.tinker import Connection

_VERSION = 5  # of the rendered columns: raise it when they come out differently
_NO_ROWS = (IndexError, StopIteration)  # what `datasets` raises for a file without any
_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


@dataclass(frozen=True)
class Example:
    """A rendered conversation; a token is learned as much as its weight says, 0 not at all.

    `bytes` is the length of what is learned in UTF-8, which no tokenizer changes.
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
    """A dataset on this disk, and the configuration of it that was named. `revision` is a Hub
    commit, a release's version and content digest, or the digest of the files; `files` is the
    latter, for a Hub dataset the commit.
    """

    reference: str
    path: Path
    revision: str
    files: str
    config: str | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def turns(self) -> Turns:
        """The assistant's turns that may be learned: of a release those that its teacher wrote."""
        released = "content_digest" in self.manifest
        return "last" if released and self.manifest.get("turns") != "all" else "all"

    def load(self) -> "DatasetDict":
        """All splits of the configuration; a release's or the folder's own default without one."""
        from datasets import DatasetDict, load_dataset_builder, load_from_disk
        from datasets.exceptions import DatasetsError

        try:
            if any((self.path / name).is_file() for name in ("dataset_dict.json", "state.json")):
                loaded = load_from_disk(str(self.path))
            elif self.path.is_file():
                reader = _READERS[self.path.suffix]
                loaded = _load(load_dataset_builder(reader, data_files=str(self.path)))
            else:
                loaded = _load(load_dataset_builder(str(self.path), name=self.config))
        except DatasetError:
            raise
        except (DatasetsError, ValueError, OSError, *_NO_ROWS) as error:
            cause = error.__cause__ or error
            said = str(cause).rstrip(".") or repr(cause)
            expected = "splits that aren't empty, and one set of columns in all files of a split"
            if "surrogate" in said:
                expected = "text; half of a pair such as \\ud83d\\ude00 is none: write it whole"
            raise DatasetError(
                f"{self.reference!r} can't be read: {said}. Expected {expected}."
            ) from error
        return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})


@dataclass(frozen=True)
class Rendered:
    """A split as tokens; `skipped` rows are longer than allowed, and left out.

    A row is one example, or several where each of its turns is rendered apart. `plain` are the
    same rows as they came, which `read` turns into conversations.
    """

    rows: "Dataset"
    kept: Sequence[int]
    skipped: int
    plain: "Dataset"
    read: RowReader

    def __len__(self) -> int:
        """The rows kept."""
        return len(self.kept)

    @cached_property
    def lengths(self) -> list[int]:
        """The tokens of each kept row."""
        lengths = self.rows["length"][:]
        return [lengths[place] for place in self.kept]

    def at_most(self, count: int) -> "Rendered":
        """So many of the kept rows, always the same ones of equal splits."""
        return replace(self, kept=[self.kept[place] for place in sample_places(len(self), count)])

    def examples(self, places: Sequence[int]) -> "list[Example]":
        """The kept rows at these places."""
        read = self.rows[[self.kept[place] for place in places]]
        rows = zip(*(read[name] for name in ("tokens", "weights", "bytes")), strict=True)
        return [Example(*one) for row in rows for one in zip(*row, strict=True)]

    def conversations(self, places: Sequence[int]) -> list[Conversation]:
        """The kept rows at these places."""
        plain, rows = as_written(self.plain), [self.kept[place] for place in places]
        return [self.read(plain[row], row) for row in rows]

    def batches(self, size: int) -> "Iterator[list[Example]]":
        """All of them in order."""
        for start in range(0, len(self), size):
            yield self.examples(range(start, min(start + size, len(self))))


class DatasetSplit:
    """One split that has rows, and columns to learn from; `DatasetError` where it has others."""

    def __init__(self, source: DatasetSource, name: str, rows: "Dataset") -> None:
        """Use `open_split` or `open_splits`."""
        self.name, self.rows = name, rows
        self.where = f"The split {name!r} of {source.reference!r}"
        self._key: tuple[str | None, ...] = (source.files, source.config, name)
        self._read = conversation_reader(rows, self.where)

    @property
    def conversations(self) -> Iterator[Conversation]:
        """Each row."""
        return map(self._read, as_written(self.rows), itertools.count())

    @property
    def keys(self) -> "NDArray[np.uint64]":
        """Each row's conversation as 64 bits, in the rows' order."""
        return self.keys_and_blank()[0]

    def keys_and_blank(self) -> "tuple[NDArray[np.uint64], int]":
        """The `keys`, and how many of the rows have a response in which nothing can be seen."""
        import numpy as np

        blank = 0

        def key(conversation: Conversation) -> int:
            nonlocal blank
            messages, tools = conversation
            blank += is_blank(response_text(messages[-1]))
            said = [messages, tools] if tools else messages
            text = json.dumps(said, sort_keys=True, ensure_ascii=False)
            return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")

        return np.fromiter(map(key, self.conversations), np.uint64), blank

    def without(self, learned: "NDArray[np.uint64]") -> "DatasetSplit":
        """Only the rows whose key is none of these; raises `DatasetError` where none is left."""
        import numpy as np

        new = np.flatnonzero(~np.isin(self.keys, learned))
        if not len(new):
            raise DatasetError(
                f"{self.where} has only rows that were learned before, {len(self.rows)} of them. "
                "Train on a later version of the dataset, or leave out only_new (--only-new)."
            )
        return self._select(new, sha256(new.tobytes()).hexdigest())

    def at_most(self, count: int) -> "DatasetSplit":
        """So many of the rows, always the same ones of equal splits."""
        if len(self.rows) <= count:
            return self
        return self._select(sample_places(len(self.rows), count), f"{count} rows")

    def own_rows(self) -> "DatasetSplit":
        """Without the rows of a release that its recipe mixes in, which its teacher never saw."""
        if not {SOURCE, "teacher", "sample"} <= {*self.rows.column_names}:
            return self  # a column of somebody else's that has that name says nothing
        sources = self.rows.with_format(None)[SOURCE]
        own = [place for place, source in enumerate(sources) if not source]
        return self._select(own, "own rows")

    def _select(self, places: "Sequence[int] | NDArray[np.int64]", why: str) -> "DatasetSplit":
        """Some of the rows; with those of this split, `why` decides which."""
        fewer = copy(self)
        fewer.rows, fewer._key = self.rows.select(places), (*self._key, why)
        return fewer

    def render(self, connection: "Connection", max_length: int, turns: Turns = "last") -> Rendered:
        """Tokens and weights of every row, computed once and cached; only responses are learned.

        Raises `DatasetError` for a row that doesn't end with a response, and where no row is
        short enough.
        """
        from datasets import Features, List, Value

        read, where, renderer = self._read, self.where, connection.renderer

        def tokens_and_weights(row: "pa.Table", place: int) -> dict[str, Any]:
            made = examples(read(row, place), renderer, turns, f"{where}, row {place}")
            lengths = [len(one.tokens) for one in made]
            return {
                "tokens": [one.tokens for one in made],
                "weights": [one.weights for one in made],
                "bytes": [one.bytes for one in made],
                "length": sum(lengths),
                "longest": max(lengths),
            }

        count = Value("int32")
        columns = {"tokens": List(List(count)), "weights": List(List(Value("float32")))}
        columns |= {"bytes": List(count), "length": count, "longest": count}
        model = (connection.renderer_name, connection.tokenizer_source, connection.weights)
        fingerprint = digest([_VERSION, *self._key, *model, turns])[:32]
        rendered = (
            as_written(self.rows)
            .map(
                tokens_and_weights,
                with_indices=True,
                remove_columns=self.rows.column_names,
                features=Features(columns),
                new_fingerprint=fingerprint,
                cache_file_name=str(cache_folder() / f"{fingerprint}.arrow"),
                desc="render",
            )
            .with_format(None)
        )
        kept = self.short_enough(rendered["longest"][:], max_length)
        return Rendered(rendered, kept, len(rendered) - len(kept), self.rows, read)

    def short_enough(self, lengths: Sequence[int], longest: float) -> list[int]:
        """The places of rows of at most so many tokens; raises `DatasetError` where none is."""
        kept = [place for place, length in enumerate(lengths) if length <= longest]
        if not kept:
            raise DatasetError(
                f"{self.where} has no row of at most {longest} tokens: the shortest of "
                f"{len(lengths)} has {min(lengths)}. Raise max_length, or pick a model with a "
                "longer context."
            )
        return kept


def sample_places(rows: int, count: int) -> list[int]:
    """The places of at most `count` of so many rows, in their order: always the same ones."""
    import numpy as np

    return sorted(np.random.default_rng(0).permutation(rows)[:count].tolist())


def locate(dataset: str | Path, config: str | None = None) -> DatasetSource:
    """Find a folder, a file, or a Hub dataset `name@revision`, of which `config` is downloaded."""
    dataset, own = split_config(dataset)
    config = config or own
    path = Path(dataset).expanduser()
    if path.is_file() and path.suffix not in _READERS:
        raise DatasetError(
            f"{str(dataset)!r} can't be read: expected a folder or a file that ends in "
            f"{', '.join(_READERS)}; found {path.suffix!r}."
        )
    if (path / "answers" / "generation.json").is_file():
        raise DatasetError(
            f"{str(dataset)!r} is a run's folder: expected a dataset. Name its release, "
            f"{str(path / 'release')!r}, which `distill-datasets publish {dataset}` writes."
        )
    commit = None
    if not path.exists():
        if not is_reference(str(dataset)):
            raise DatasetError(
                f"{str(dataset)!r} is not there: expected a folder, a file, or a Hub dataset like "
                "'org/name@v1.0.0'."
            )
        pinned = fetch_dataset(str(dataset), config)
        path, commit = pinned.path, pinned.commit
    manifest = _read_manifest(path / folder_of(config) / "manifest.json")
    if "content_digest" in manifest:
        check_release(path / folder_of(config), ("data",))
    # The Hub's cache gets more files of a commit when somebody asks for them.
    files = commit or _files_digest(path)
    released = "/".join(str(manifest[k]) for k in ("version", "content_digest") if k in manifest)
    return DatasetSource(str(dataset), path, commit or released or files, files, config, manifest)


def _read_manifest(file: Path) -> dict[str, Any]:
    """A release's manifest; empty for none, and for somebody else's file of that name."""
    if not file.is_file():
        return {}
    try:
        manifest = json.loads(file.read_bytes())
    except ValueError as error:
        raise DatasetError(
            f"{str(file)!r} is damaged: expected JSON ({error}). Publish or download that release "
            "again."
        ) from error
    return manifest if isinstance(manifest, dict) else {}


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


def require_turns(learned: Turns, answered: Turns, dataset: str) -> None:
    """Refuse to learn turns that the teacher of a dataset didn't answer."""
    if learned == "all" and answered != "all":
        raise DatasetError(
            f"{dataset} can't be trained with turns='all': its recipe says `turns: last`, so that "
            "the assistant's earlier turns are the queries' own, not the teacher's. Train with "
            "turns='last', or say `turns: all` in the recipe, generate and publish again."
        )


def open_splits(source: DatasetSource, settings: TrainSettings) -> dict[str, DatasetSplit]:
    """The splits "train" and, if there is one, "validation", by the names the settings give them.

    A validation split that was asked for by another name than the default must be there.
    """
    splits = source.load()
    names = {"train": settings.train_split}
    asked = settings.validation_split
    if asked in splits or asked != type(settings).validation_split:
        names["validation"] = asked
    return {role: open_split(source, name, splits) for role, name in names.items()}


def open_split(source: DatasetSource, name: str, splits: "Mapping[str, Dataset]") -> DatasetSplit:
    """The one of the dataset's `splits` that has this name; raises `DatasetError` where none
    has, or where it has no row.
    """
    if name not in splits:
        raise DatasetError(
            f"{source.reference!r} has no split {name!r}; found {sorted(map(str, splits))}. "
            "Name one of them (--train-split, --validation-split, or --split of `measure`)."
        )
    if not len(splits[name]):
        raise DatasetError(
            f"The split {name!r} of {source.reference!r} is empty: expected at least one row."
        )
    return DatasetSplit(source, name, splits[name])


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
                    semicolons = len(header) == 1 and ";" in header[0]
                    raise DatasetError(
                        f"{str(file)!r}, line {rows.line_num}: expected {len(header)} fields, as "
                        f"in the header {header}; found {len(row)}. "
                        + (
                            "Put commas in the place of the semicolons that separate the fields."
                            if semicolons
                            else "Quote a field that holds a comma."
                        )
                    )
        except csv.Error as error:
            raise DatasetError(f"{str(file)!r}, line {rows.line_num}: {error}.") from error
    return header


def examples(conversation: Conversation, renderer: Any, turns: Turns, where: str) -> list[Example]:
    """A conversation's tokens, and loss weights that cut its responses out of them: the last
    assistant message, or all of them.

    All of them are one example, in which each follows the very tokens that ask for it, where the
    chat format writes a message alike as an answer and as history; else one each, which ends with
    it. Raises `DatasetError` for a conversation that doesn't end with a response, and for one that
    the renderer can't hold.
    """
    messages, tools = conversation
    ends = [place for place, one in enumerate(messages, 1) if one["role"] == "assistant"]
    if turns == "last":
        ends = ends[-1:]
    learned = [messages[end - 1] for end in ends]
    wrong: list[Any] = [one for one in learned if not one["content"] and "tool_calls" not in one]
    if ends[-1:] != [len(messages)]:
        wrong = [messages[-1] if messages else {}]
    if wrong:
        raise DatasetError(
            f"{where}: expected a conversation that ends with a message of the assistant, and no "
            f"response that is empty; found {wrong[0]!r:.300}. Leave such rows out "
            "(`dataset.filter`)."
        )
    apart = [_response_example(messages[:end], tools, renderer, where) for end in ends]
    if len(apart) == 1:
        return apart
    whole = Example([], [])
    for end, one in zip(ends, apart, strict=True):
        asked = renderer.build_generation_prompt(messages[: end - 1], tools=tools).to_ints()
        if any(one.tokens[: len(before)] != before for before in (asked, whole.tokens)):
            return apart
        weights = [*whole.weights, *one.weights[len(whole.weights) :]]
        whole = Example(one.tokens, weights, whole.bytes + one.bytes)
    return [whole]


def _response_example(
    messages: Sequence[Message], tools: str | None, renderer: Any, where: str
) -> Example:
    """A conversation of which the last message alone is learned, what ends it included."""
    from jinja2 import TemplateError
    from tinker_cookbook.exceptions import TinkerCookbookError

    try:
        tokens, weights = renderer.build_supervised_example(messages, tools=tools)
    except DatasetError as error:
        raise DatasetError(f"{where}: {error}") from error
    except (TinkerCookbookError, TemplateError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{where}: the model's chat format can't hold this conversation ({error}). Leave such "
            "rows out (`dataset.filter`) or pick another renderer."
        ) from error
    if not float(weights[1:].sum()) > 0:
        raise DatasetError(f"{where}: the renderer gives its response no token to learn.")
    size = len(response_text(messages[-1]).encode())
    return Example(tokens.to_ints(), weights.tolist(), size)


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

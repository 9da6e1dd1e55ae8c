"""Files of somebody else's, read within bounds: text, YAML, and the rows of tables.

Rows are as they are written: CSV, JSON, lines of JSON or of text, Parquet, Excel.

Readers such as those of pandas and `datasets` make numbers, dates and missing values of text that
looks like them; nothing is changed here. Every reader gives some rows at a time, as dictionaries
by column. What is wrong is a `RecipeError` that names the file and the line.
"""

import csv
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, time
from itertools import islice
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile, ZipFile

import yaml
from yaml.composer import Composer

from distill_datasets.errors import DatasetError, RecipeError
from distill_datasets.parquet import open_parquet, read_batches
from distill_datasets.recipes.parsing import no_constant
from distill_datasets.schema import whole_text

Rows = list[dict[str, Any]]

ROWS = 1_000  # that are read at a time
SEPARATORS = (",", ";", "\t", "|")
_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_BLOCK = 1 << 20
_LONGEST = 1 << 28  # characters in one field of a CSV file
_SAMPLE = 1 << 16  # characters that show which separator a file has
# A workbook may become this many bytes, or so many times its own size: a packed bomb is
# refused long before memory ends, and no file of real text comes near.
_UNPACKED, _TIMES = 256 << 20, 200


_YAML_LIMIT = 1 << 20  # bytes
_VALUES, _DEPTH = 100_000, 64  # that a recipe's YAML has at most, and how deep they lie
_TEXT, _INT, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("str", "int", "merge"))

if yaml.__with_libyaml__:

    class _Loader(Composer, yaml.CSafeLoader):
        """Scans by libyaml, in a sixth of the time, and composes in Python: libyaml's own composer
        ends the process where a text is nested too deep.
        """

        def __init__(self, text: str) -> None:
            yaml.CSafeLoader.__init__(self, text)
            Composer.__init__(self)
else:
    _Loader = yaml.SafeLoader  # type: ignore[misc, assignment]


@dataclass(frozen=True)
class TableFormat:
    """What a recipe says about a file that doesn't say it itself, and which columns it needs.

    Rows of a table without any value are none, unless rows are told by their places.
    """

    encoding: str | None = None
    separator: str | None = None
    wanted: Collection[str] = ()
    by_place: bool = False


_UNSAID = TableFormat()


class NumberAsWritten(float):
    """A JSON number that isn't whole, with the digits that it has in its file."""

    text: str

    def __new__(cls, text: str) -> "NumberAsWritten":
        """`text` is the literal."""
        number = super().__new__(cls, text)
        number.text = text
        return number


def read_rows(path: Path, form: TableFormat = _UNSAID) -> Iterator[Rows]:
    """The rows of a file by its ending, some at a time; raises `RecipeError`."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        old = " Save the workbook as .xlsx." if path.suffix.lower() == ".xls" else ""
        raise RecipeError(f"{path.name!r}: expected one of {sorted(READERS)}, by its ending.{old}")
    rows = reader(path, form)
    while some := list(islice(rows, ROWS)):
        yield some


def read_text(path: Path, *, limit: int) -> str:
    """A whole file of UTF-8 (or UTF-16 with a mark) without its mark, and of at most `limit` bytes.

    Raises `RecipeError`.
    """
    if not path.is_file():
        raise RecipeError(f"The recipe names {path.name!r}, which {str(path.parent)!r} lacks.")
    if (size := path.stat().st_size) > limit:
        raise RecipeError(f"{path} has {size:,} bytes; expected at most {limit:,}.")
    with open_text(path, what="Save it as UTF-8") as file:
        return file.read()


def open_text(
    path: Path,
    encoding: str | None = None,
    newline: str | None = None,
    what: str = "Save it as UTF-8, or name its encoding under `queries` (encoding: cp1252, say)",
) -> IO[str]:
    """A file of text in the encoding that its mark shows, that is given, or UTF-8.

    Raises `RecipeError` for other bytes, with `what` to do: guessing would change text.
    """
    with path.open("rb") as file:
        start = file.read(4096)
    marked = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
    found = marked or encoding or _unmarked(start)
    try:
        with path.open(encoding=found, newline="") as text:
            while text.read(_BLOCK):
                pass
    except LookupError as error:
        raise RecipeError(f"{str(path)!r}: there is no encoding {found!r}.") from error
    except UnicodeError as error:
        if found != "utf-8":
            raise RecipeError(f"{path} can't be read as {found}: {error}.") from error
        with path.open("rb") as lines:
            line, content = next(
                (line, content)
                for line, content in enumerate(lines, 1)
                if content.decode(errors="replace").encode() != content
            )
        shown = content.decode("cp1252", "replace").strip()[:80]
        raise RecipeError(
            f"{path} is not UTF-8: line {line} holds other bytes. {what}; "
            f"as cp1252 the line reads {shown!r}."
        ) from error
    return path.open(encoding=found, newline=newline)


def _unmarked(start: bytes) -> str:
    """Text has no zero bytes; in UTF-16 most letters of Western languages come with one."""
    zeros = [start[place::2].count(0) for place in (0, 1)]
    if max(zeros) > len(start) // 4:
        return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    return "utf-8"


def read_yaml(path: Path, *, limit: int = _YAML_LIMIT) -> dict[str, Any]:
    """The keys and values of a YAML file of somebody else's; raises `RecipeError`."""
    return open_yaml(path, limit)[1]


def open_yaml(path: Path, limit: int = _YAML_LIMIT) -> tuple[yaml.Node, dict[str, Any]]:
    """The nodes of a YAML file, which know where they stand and how they are written, and its keys
    and values.

    Raises `RecipeError` for what no recipe needs, such as endless aliases.
    """
    text = read_text(path, limit=limit)
    try:
        try:
            root = yaml.compose(text, Loader=_Loader)
        except yaml.YAMLError:
            root = yaml.compose(text, Loader=yaml.SafeLoader)  # shows what it can't read
        if not isinstance(root, yaml.MappingNode):
            listed = isinstance(root, yaml.SequenceNode)
            found = "nothing" if root is None else "a list" if listed else "text"
            raise RecipeError(f"{path}: expected keys and values, as `name: mine`; found {found}.")
        if _size(path, root, {}, 0) > _VALUES:
            raise RecipeError(f"{path} comes to over {_VALUES:,} values with its aliases.")
        return root, yaml.SafeLoader("").construct_document(root)
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{path} is not YAML: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"{path} is nested more than {_DEPTH} levels deep.") from error


def _size(path: Path, node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """How many values a node comes to with its aliases written out."""
    if depth > _DEPTH:
        raise RecipeError(f"{path} is nested more than {_DEPTH} levels deep.")
    if id(node) not in known:
        if isinstance(node, yaml.MappingNode):
            _check_keys(path, node, (_TEXT, _MERGE, _INT) if depth > 1 else (_TEXT, _MERGE))
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        below = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(_size(path, one, known, depth + 1) for one in below)
    return known[id(node)]


def _check_keys(path: Path, node: yaml.MappingNode, allowed: Sequence[str]) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line, written = key.start_mark.line + 1, str(key.value)
        if key.tag not in allowed:
            raise RecipeError(
                f"Line {line} of {path}: YAML takes the key {written:.80} for something else than "
                f"text: put it in quotes, '{written:.80}'."
            )
        if written in seen and key.tag != _MERGE:
            raise RecipeError(
                f"Line {line} of {path}: the key {written!r} stands in line {seen[written]} "
                "already: keep one of them."
            )
        seen[written] = line


def _csv_rows(path: Path, form: TableFormat) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(_LONGEST)
    separator, skip = _separator(path, form)
    with open_text(path, form.encoding, newline="") as file:
        for _ in range(skip):
            file.readline()
        header, before = None, skip
        reader = csv.reader(file, delimiter=separator, strict=True)
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise RecipeError(
                    f"Line {before + 1} of {str(path)!r} can't be read: {error}. A quote that "
                    "opens a field must close it, and one within is written twice."
                ) from error
            if row is None:
                return
            line, before = before + 1, skip + reader.line_num
            if header is None:
                header = _header(path, row)
            elif row and len(row) != len(header):
                raise RecipeError(
                    f"Line {line} of {str(path)!r} has {len(row)} fields, and the header "
                    f"{len(header)}: put text that holds {separator!r} into double quotes, or "
                    "name another `separator` under `queries`."
                )
            elif any(row) or (row and form.by_place):
                yield dict(zip(header, row, strict=True))


def _header(path: Path, names: list[str]) -> list[str]:
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise RecipeError(f"{str(path)!r} has several columns of one name: {twice}. Rename them.")
    return names


def _separator(path: Path, form: TableFormat) -> tuple[str, int]:
    """What stands between fields, and how many lines come before the header."""
    with open_text(path, form.encoding, newline="") as file:
        sample = file.read(_SAMPLE)
    said = re.match(r"sep=(.)\r?\n", sample)  # as spreadsheets write it
    if form.separator or said:
        return form.separator or str(said and said[1]), 1 if said else 0
    if path.suffix.lower() == ".tsv":
        return "\t", 0
    headers = {one: next(csv.reader(sample.splitlines(True), delimiter=one)) for one in SEPARATORS}
    several = [one for one, names in headers.items() if len(names) > 1]
    fitting = [one for one in several if set(form.wanted) <= set(headers[one])]
    if len(fitting) > 1 or (len(several) > 1 and not fitting):
        raise RecipeError(
            f"{str(path)!r} may have its fields between {fitting or several}: name which, as "
            "`separator` under `queries`."
        )
    return (fitting or several or [","])[0], 0


def _text_rows(path: Path, form: TableFormat) -> Iterator[dict[str, Any]]:
    """A row a line; blank lines at the end are none."""
    with open_text(path, form.encoding) as file:
        blank = 0
        for line in file:
            text = line.removesuffix("\n")
            if not text.strip():
                blank += 1
                continue
            yield from [{"text": ""}] * blank
            blank = 0
            yield {"text": text}


def _json_line_rows(path: Path, form: TableFormat) -> Iterator[dict[str, Any]]:
    with open_text(path, form.encoding) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                found = _load_json(line)
                problem = f"found {line.strip()[:80]!r}"
            except (ValueError, RecursionError) as error:
                found, problem = None, str(error)
            if not isinstance(found, dict):
                raise RecipeError(
                    f"Line {number} of {str(path)!r} can't be read: expected a JSON object, "
                    f"{problem}. Mend the line, or name a file of another kind."
                )
            yield found


def _json_rows(path: Path, form: TableFormat) -> Iterator[dict[str, Any]]:
    """A list of objects, or an object a line."""
    with open_text(path, form.encoding) as file:
        text = file.read()
    if not text.lstrip().startswith("["):
        yield from _json_line_rows(path, form)
        return
    try:
        found = _load_json(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{str(path)!r} is not JSON: {error}.") from error
    for place, row in enumerate(found, 1):
        if not isinstance(row, dict):
            raise RecipeError(f"Row {place} of {str(path)!r}: expected an object, found {row!r}.")
        yield row


def _load_json(text: str) -> Any:
    """A JSON value whose numbers keep their digits; raises `ValueError` for `NaN` and the like."""
    return json.loads(text, parse_float=NumberAsWritten, parse_constant=no_constant)


def _parquet_rows(path: Path, form: TableFormat) -> Iterator[dict[str, Any]]:
    try:
        schema = open_parquet(path).schema_arrow
        wanted = [name for name in schema.names if name in form.wanted] or schema.names
        labels = class_names(_features(schema.metadata))
        for batch in read_batches(path, wanted):
            columns = {name: [None] * len(batch) for name in schema.names}
            columns |= {name: _values(batch.column(name)) for name in wanted}
            for row in zip(*columns.values(), strict=True):
                yield named_classes(dict(zip(columns, row, strict=True)), labels)
    except DatasetError as error:
        raise RecipeError(str(error)) from error


def _values(column: Any) -> list[Any]:
    values: list[Any] = column.to_pylist()
    return without_nulls(values) if _holds_messages(column.type) else values


def _holds_messages(kind: Any) -> bool:
    """Whether a column has messages, or calls of tools, whose keys are the same in every row."""
    import pyarrow as pa

    if not pa.types.is_list(kind) or not pa.types.is_struct(kind.value_type):
        return False
    names = {field.name for field in kind.value_type}
    return bool(names & {"role", "from", "arguments", "function"})


def without_nulls(value: Any) -> Any:
    """A value without the keys that a table fills in with null, where its rows have others."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def _features(metadata: Mapping[bytes, bytes] | None) -> Mapping[str, Any]:
    """What `datasets` has noted of its columns in a Parquet file."""
    try:
        found = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        return dict(found.get("info", {}).get("features") or {})
    except (ValueError, AttributeError, TypeError):
        return {}


def class_names(features: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """The names of the classes of columns that hold their numbers."""
    described = {
        name: feature if isinstance(feature, Mapping) else vars(feature)
        for name, feature in features.items()
        if isinstance(feature, Mapping) or hasattr(feature, "names")
    }
    return {name: one["names"] for name, one in described.items() if one.get("names")}


def named_classes(row: dict[str, Any], labels: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A row with the names of classes in the place of their numbers; -1 stands for none."""
    for name, names in labels.items():
        number = row.get(name)
        if isinstance(number, int):
            row[name] = names[number] if 0 <= number < len(names) else None
    return row


def _excel_rows(path: Path, form: TableFormat) -> Iterator[dict[str, Any]]:
    """The first sheet, whose first row names the columns."""
    try:
        from openpyxl import load_workbook
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"{str(path)!r} needs the package that reads workbooks: "
            "`pip install 'distill-datasets[excel]'`."
        ) from error
    try:
        with ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > max(_UNPACKED, _TIMES * path.stat().st_size):
            raise RecipeError(
                f"{str(path)!r} has {path.stat().st_size:,} bytes and unpacks to {size:,} bytes: "
                "it isn't read. If that is right, write it as JSON lines."
            )
        book = load_workbook(path, read_only=True, data_only=True)
    except (BadZipFile, KeyError, ValueError, OSError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{str(path)!r} is no workbook: {error}.") from error
    try:
        header: list[str] = []
        for row in book.worksheets[0].iter_rows():
            values = [_cell(path, cell) for cell in row]
            if not header:
                names = ["" if value is None else str(value) for value in values]
                header = _header(path, names) if any(names) else []
            elif form.by_place or any(value is not None for value in values):
                padded = [*values, *[None] * (len(header) - len(values))]
                yield {name: value for name, value in zip(header, padded, strict=False) if name}
    finally:
        book.close()


def _cell(path: Path, cell: Any) -> Any:
    """A cell's value; numbers as their format shows them, where that only adds zeros."""
    value: Any = cell.value
    if cell.data_type == "e":
        raise RecipeError(f"Cell {cell.coordinate} of {str(path)!r} holds the error {value}.")
    if isinstance(value, datetime) and value.time() == time():
        return value.date()
    if type(value) not in (int, float):
        return value
    if abs(value) >= 10**15:  # digits that a spreadsheet keeps
        raise RecipeError(
            f"Cell {cell.coordinate} of {str(path)!r} holds a number whose last digits the "
            "spreadsheet has rounded away: format the column as text and enter it again."
        )
    shown = re.fullmatch(r"(0+)(?:\.(0+))?", str(cell.number_format))
    if shown:
        places = len(shown[2] or "")
        width = len(shown[1]) + (places + 1 if places else 0)
        return f"{value:0{width}.{places}f}"
    return int(value) if float(value).is_integer() else value


READERS: Mapping[str, Callable[[Path, TableFormat], Iterator[dict[str, Any]]]] = {
    ".txt": _text_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".json": _json_rows,
    ".jsonl": _json_line_rows,
    ".parquet": _parquet_rows,
    ".xlsx": _excel_rows,
}


def as_text(value: Any, *, place: str, role: str) -> str | None:
    """A value as text: what is written, or JSON for what is no text; None where it is empty.

    `place` and `role` name the row and what it is for in the error, for bytes that are no text.
    """
    if value is None or value == "" or value != value:
        return None
    if isinstance(value, NumberAsWritten):
        return value.text
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{place}: expected text as {role}, found bytes.") from error
    if isinstance(value, bool | int | float | list | dict):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return whole_text(str(value)) or None  # dates, times and decimals are texts


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, or one message."""
    messages: Iterable[Any] = value if isinstance(value, list) else [value]
    keys = [set(one) for one in messages if isinstance(one, dict)]
    return bool(keys) and all(
        {"role", "content"} <= one or {"from", "value"} <= one for one in keys
    )

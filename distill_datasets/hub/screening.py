"""What must not leave this machine unseen: secrets and personal data in a folder to be pushed.

Every text file and every string in every Parquet file is read: rows, prompt, recipe, card. A
secret blocks until it is taken out, or allowed by its key; personal data may be allowed by its
kind as well (`personal.KINDS`).
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from distill_datasets.errors import ScreeningError
from distill_datasets.hub import credentials
from distill_datasets.hub import personal_data as personal
from distill_datasets.parquet import read_batches

if TYPE_CHECKING:
    import pyarrow as pa

_PAGE_SIGNS = 16_000_000
_PAGE_TEXTS = 200_000
_MOST_OF_A_KIND = 1_000
_MOST_SHOWN = 20
_SKIPPED_COLUMNS = ("id", "digest")  # digests of ours: they hold nothing that could be read


@dataclass(frozen=True)
class Finding:
    """One value that was found, in one place or several.

    `where` names the first place, `excerpt` shows no more than the start of the value, and `key`
    is what allows it: the same in every run.
    """

    kind: str
    where: str
    excerpt: str
    key: str
    places: int = 1

    @property
    def secret(self) -> bool:
        """Whether it opens something, rather than being about somebody."""
        return self.kind not in personal.KINDS


@dataclass(frozen=True, slots=True)
class _Text:
    """A cell of a row, or some lines of a file from `line` on."""

    text: str
    file: str
    row: str = ""
    column: str = ""
    line: int = 0

    def where(self, line: int) -> str:
        if self.column:
            return f"{self.file}, row {self.row}, column {self.column}"
        return f"{self.file}, line {self.line + line}"

    def where_of(self, sign: int) -> str:
        return self.where(self.text.count("\n", 0, sign))


def screen(folder: Path | str) -> list[Finding]:
    """Everything in a folder's files that looks like a secret or like personal data.

    Reads a few megabytes at a time. Secrets come first. Of one kind the first thousand values
    are told apart; those after them share one finding. Raises `ScreeningError` where the
    scanner can't be run.
    """
    found = _Found()
    for page in _pages(_texts(Path(folder))):
        found.add(page)
    return found.listed()


def require_clean(findings: Collection[Finding], allow: Collection[str] = ()) -> None:
    """Raise `ScreeningError` that lists what was found, unless all of it is allowed.

    `allow` holds keys of findings, and kinds of personal data.
    """
    kinds = set(allow) & set(personal.KINDS)
    left = [one for one in findings if one.kind not in kinds and one.key not in allow]
    if not left:
        return
    shown = [_line(finding) for finding in left[:_MOST_SHOWN]]
    if len(left) > _MOST_SHOWN:
        shown.append(f"and {len(left) - _MOST_SHOWN} more")
    by_kind = sorted({one.kind for one in left if not one.secret})
    hint = f", or all of a kind: {' '.join(f'--allow {kind}' for kind in by_kind)}"
    raise ScreeningError(
        "Nothing was sent, because this would have gone with it:\n  "
        + "\n  ".join(shown)
        + "\nTake it out, and revoke secrets that others may have seen. What is meant to be "
        f"read by others can be allowed: --allow KEY{hint if by_kind else ''}."
    )


def _line(finding: Finding) -> str:
    more = f" and {finding.places - 1:,} more places" if finding.places > 1 else ""
    what = f"secret ({finding.kind})" if finding.secret else finding.kind
    key = f"  [--allow {finding.key}]" if finding.key else ""
    return f"{what}: {finding.excerpt} in {finding.where}{more}{key}"


@dataclass
class _Found:
    """Findings by their keys; no more than a bounded number of them."""

    _findings: dict[str, Finding] = field(default_factory=dict)
    _distinct: Counter[str] = field(default_factory=Counter)
    _own: dict[str, str] = field(default_factory=credentials.own_keys)

    def add(self, page: Sequence[_Text]) -> None:
        """Look through some texts."""
        text = "\n".join(part.text for part in page)
        by_sign, by_line = _starts(page)
        for kind, line, value in credentials.scanned(text):
            place = bisect_right(by_line, line - 1) - 1
            self._note(kind, value, page[place].where(line - 1 - by_line[place]))
        own = (
            (f"the value of {name}", found.start(), value)
            for name, value in self._own.items()
            for found in re.finditer(re.escape(value), text)
        )
        for kind, sign, value in chain(credentials.matched(text), own):
            place = bisect_right(by_sign, sign) - 1
            self._note(kind, value, page[place].where_of(sign - by_sign[place]))
        for part in page:
            for kind, sign, value in personal.personal_data(part.text):
                self._note(kind, value, part.where_of(sign))

    def listed(self) -> list[Finding]:
        return sorted(self._findings.values(), key=lambda one: not one.secret)

    def _note(self, kind: str, value: str, where: str) -> None:
        key = sha256(value.encode()).hexdigest()[:12]
        if key not in self._findings and self._distinct[kind] >= _MOST_OF_A_KIND:
            # Those can be allowed by their kind only, and secrets not at all.
            key = kind if kind in personal.KINDS else ""
        known = self._findings.get(key)
        if known is None:
            self._distinct[kind] += 1
            self._findings[key] = Finding(kind, where, _masked(value), key)
        elif where != known.where:
            self._findings[key] = replace(known, places=known.places + 1)


def _masked(value: str) -> str:
    """At most four signs and at most a quarter of a value, and how long it is."""
    return f"{value[: min(4, len(value) // 4)]}… ({len(value)} characters)"


def _starts(page: Sequence[_Text]) -> tuple[list[int], list[int]]:
    """Where each text begins in the page: its first sign, and its first line."""
    signs, lines = [0], [0]
    for part in page[:-1]:
        signs.append(signs[-1] + len(part.text) + 1)
        lines.append(lines[-1] + part.text.count("\n") + 1)
    return signs, lines


def _pages(texts: Iterable[_Text]) -> Iterator[list[_Text]]:
    """Texts gathered to what is worth one look; of equal cells in a page only the first."""
    page: list[_Text] = []
    seen: set[str] = set()
    signs = 0
    for text in texts:
        if text.column and text.text in seen:
            continue
        seen.add(text.text)
        page.append(text)
        signs += len(text.text)
        if signs >= _PAGE_SIGNS or len(page) >= _PAGE_TEXTS:
            yield page
            page, seen, signs = [], set(), 0
    if page:
        yield page


def _texts(folder: Path) -> Iterator[_Text]:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        yield from _cells(path, name) if path.suffix == ".parquet" else _lines(path, name)


def _lines(path: Path, name: str) -> Iterator[_Text]:
    """A text file, some lines at a time; a file with a zero byte near its start isn't one."""
    with path.open("rb") as file:
        if b"\0" in file.read(8_192):
            return
        file.seek(0)
        first = 1
        while block := b"".join(file.readlines(1_000_000)):
            text = block.decode(encoding="utf-8", errors="replace")
            yield _Text(text, name, line=first)
            first += text.count("\n")


def _cells(path: Path, name: str) -> Iterator[_Text]:
    import pyarrow as pa

    first = 0
    for batch in read_batches(path):
        rows = pa.Table.from_batches([batch])
        numbers = list(range(first, first + len(rows)))
        ids = rows["id"].to_pylist() if "id" in rows.column_names else numbers
        seen: set[str] = set()
        for column in rows.column_names:
            if column in _SKIPPED_COLUMNS:
                continue
            for row, text in _strings(rows[column].combine_chunks(), ids):
                if text not in seen:
                    seen.add(text)
                    yield _Text(text, name, str(row), column)
        first += len(rows)


def _strings(values: "pa.Array", rows: Sequence[object]) -> Iterator[tuple[object, str]]:
    """Every string in a column, however nested, with its row."""
    import pyarrow.compute as pc
    from pyarrow import types

    if types.is_string(values.type) or types.is_large_string(values.type):
        yield from ((row, text) for row, text in zip(rows, values.to_pylist(), strict=True) if text)
    elif types.is_struct(values.type):
        for field_number in range(values.type.num_fields):
            yield from _strings(pc.struct_field(values, [field_number]), rows)
    elif types.is_list(values.type) or types.is_large_list(values.type):
        owners = pc.list_parent_indices(values).to_pylist()
        yield from _strings(pc.list_flatten(values), [rows[owner] for owner in owners])
    elif types.is_dictionary(values.type):
        yield from _strings(values.dictionary_decode(), rows)

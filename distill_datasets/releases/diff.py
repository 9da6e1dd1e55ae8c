"""What changed between two releases: rows, labels, lengths, recipe and prompt."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from distill_datasets.errors import DatasetError
from distill_datasets.hub.references import Pinned, find_release
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.releases.manifest import read_manifest
from distill_datasets.releases.release import load_release
from distill_datasets.releases.row_pairs import NEW, OLD, RowPairs

_LENGTHS = ("prompt_tokens", "response_tokens", "response_characters")
_PARTS = ("data", "rejected")
_MOST = 20  # movements that are listed one by one
_WIDEST = 40


@dataclass(frozen=True)
class Difference:
    """Of two releases; `data` is made of what JSON has."""

    data: Mapping[str, Any]

    @property
    def empty(self) -> bool:
        """Whether rows and recipe are the same."""
        digests = {self.data[side]["content_digest"] for side in (OLD, NEW)}
        return len(digests) == 1 and not self.data["recipe"]["keys"]

    def text(self) -> str:
        """For a terminal."""
        return "\n".join(_lines(self.data)) + "\n"


def diff(old: Path | str, new: Path | str, *, config: str | None = None) -> Difference:
    """Compare two releases: folders, or Hub datasets such as `me/name@v1.0.0`.

    `config` names one of several releases in one repository. A row is known by its id and
    sample. Reads both releases once, and holds no more than a few thousand rows at a time.
    Raises `DatasetError` for what is no release.
    """
    before, after = _find(old, config), _find(new, config)
    recipes = load_recipe(before.path), load_recipe(after.path)
    sides = {OLD: _facts(old, before), NEW: _facts(new, after)}
    with RowPairs(before.path, after.path) as pairs:
        data = {
            **sides,
            "rows": pairs.counts(),
            "changed_columns": pairs.changed_columns(),
            "moved": _movements(pairs.movements("part")),
            "labels": _movements(pairs.movements("answer")),
            "lengths": {name: _both(pairs, name) for name in _LENGTHS},
            "recipe": _recipes(*recipes),
        }
    return Difference(data)


def changed_keys(old: Recipe, new: Recipe) -> dict[str, dict[str, Any]]:
    """The keys of two recipes that differ, dotted, with both values."""
    before, after = (dict(_flat(recipe.model_dump(mode="json"))) for recipe in (old, new))
    return {
        key: {OLD: before.get(key), NEW: after.get(key)}
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    }


def _find(given: Path | str, config: str | None) -> Pinned:
    release = find_release(given, _PARTS, config)
    if release is None:
        asked = f" of the configuration {config!r}" if config else ""
        raise DatasetError(
            f"{str(given)!r} is no release{asked}: expected a folder with manifest.json, a run's "
            "folder with release/, or a Hub dataset like 'org/name@v1.0.0'."
        )
    return release


def _facts(given: Path | str, found: Pinned) -> dict[str, Any]:
    release, manifest = load_release(found.path), read_manifest(found.path)
    return {
        "reference": str(given),
        "commit": found.commit,
        "identity": manifest.get("identity"),
        "version": release.version,
        "content_digest": release.digest,
        "splits": dict(release.splits),
        "rejected": release.rejected,
    }


def _movements(found: Sequence[tuple[str | None, str | None, int]]) -> list[dict[str, Any]]:
    return [{"from": before, "to": after, "rows": rows} for before, after, rows in found]


def _both(pairs: RowPairs, name: str) -> dict[str, Any]:
    return {side: _summary(pairs.distribution(side, name)) for side in (OLD, NEW)}


def _summary(distribution: Sequence[tuple[int, int]]) -> dict[str, float] | None:
    rows = sum(count for _, count in distribution)
    if not rows:
        return None
    mean = sum(value * count for value, count in distribution) / rows
    return {
        "mean": round(mean, 2),
        "p50": _percentile(distribution, rows * 0.50),
        "p95": _percentile(distribution, rows * 0.95),
    }


def _percentile(distribution: Sequence[tuple[int, int]], rank: float) -> int:
    """The smallest value that at least `rank` rows don't exceed."""
    below = 0
    for value, count in distribution:
        below += count
        if below >= rank:
            return value
    return distribution[-1][0]


def _recipes(old: Recipe, new: Recipe) -> dict[str, Any]:
    prompts = old.prompt.splitlines(), new.prompt.splitlines()
    before, after = _files(old), _files(new)
    return {
        "keys": changed_keys(old, new),
        "files": sorted({name for name, _ in before.items() ^ after.items()}),
        "prompt": "\n".join(difflib.unified_diff(*prompts, fromfile=OLD, tofile=NEW, lineterm="")),
    }


def _files(recipe: Recipe) -> dict[str, str]:
    """Query files by their content's digest."""
    paths = {name: recipe.folder / name for name in recipe.attachments}
    return {name: sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _lines(data: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{side}  {_title(data[side])}" for side in (OLD, NEW))
    yield ""
    yield from _row_lines(data)
    yield from _table("lengths", _length_lines(data["lengths"]))
    recipe = data["recipe"]
    keys = [f"{key}: {v[OLD]!r} -> {v[NEW]!r}" for key, v in recipe["keys"].items()]
    yield from _table("recipe", [*keys, *(f"the file {name} changed" for name in recipe["files"])])
    yield from _table("prompt", recipe["prompt"].splitlines())


def _title(side: Mapping[str, Any]) -> str:
    splits = ", ".join(f"{rows:,} {split}" for split, rows in side["splits"].items())
    return f"{side['reference']}: {side['version']}, {splits}, {side['rejected']:,} rejected"


def _row_lines(data: Mapping[str, Any]) -> Iterator[str]:
    rows = data["rows"]
    yield "rows: " + ", ".join(f"{rows[what]:,} {what}" for what in ("added", "removed", "changed"))
    if rows["recounted"]:
        yield f"  {rows['recounted']:,} others differ in the teacher's token counts only"
    columns = [f"{name} in {count:,}" for name, count in data["changed_columns"].items()]
    yield from _table("columns", columns)
    yield from _table("moved", _movement_lines(data["moved"]))
    yield from _table("labels", _movement_lines(data["labels"]))


def _movement_lines(movements: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for moved in movements[:_MOST]:
        yield f"{moved['rows']:>8,}  {_label(moved['from'])} -> {_label(moved['to'])}"
    if rest := movements[_MOST:]:
        rows = sum(moved["rows"] for moved in rest)
        yield f"{rows:>8,}  in {len(rest):,} other ways"


def _label(answer: str | None) -> str:
    if answer is None:
        return "(no answer)"
    shown = " ".join(answer.split())
    return shown if len(shown) <= _WIDEST else shown[: _WIDEST - 1] + "…"


def _length_lines(lengths: Mapping[str, Any]) -> Iterator[str]:
    yield f"{'':<20}" + "".join(f"{what:>20}" for what in ("mean", "p50", "p95"))
    for name, both in lengths.items():
        if all(both.values()):
            pairs = (f"{both[OLD][what]:,} -> {both[NEW][what]:,}" for what in both[OLD])
            yield f"{name.replace('_', ' '):<20}" + "".join(f"{pair:>20}" for pair in pairs)


def _table(title: str, lines: Iterable[str]) -> Iterator[str]:
    rows = list(lines)
    if rows:
        yield f"{title}:"
        yield from (f"  {row}" for row in rows)

"""A recipe's `queries.jsonl`: rows by hand, and behind them those that a teacher wrote."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from distill_datasets.conversations import from_text, read_messages, to_text
from distill_datasets.errors import OutputError, RecipeError
from distill_datasets.files import builders_folder, replacing, write_file
from distill_datasets.recipes.loading import is_copy, load_recipe, samples_among
from distill_datasets.recipes.queries import load_queries, read_columns
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.recipes.sections import Queries
from distill_datasets.recipes.user_files import read_rows

ORIGIN = "synthesis"
AXES = ("topic", "style", "length", "language", "difficulty", "turns")
_OWN = (*AXES, "rules", "origin")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class QueryFile:
    """The rows of a recipe whose queries are lines of JSON in its own folder.

    Rows that `new` wrote for its own prompt, where the recipe has another, are not among them:
    there are so many `samples`.
    """

    recipe: Recipe
    rows: tuple[Row, ...]
    samples: int = 0

    @property
    def path(self) -> Path:
        """Where the queries are."""
        return self.recipe.folder / str(self.recipe.queries.file)

    @cached_property
    def columns(self) -> Mapping[str, str]:
        """What our columns are called: as the recipe says, and never as one of its own."""
        spec = self.recipe.queries
        by_hand = {name for row in self.rows if not self.is_written(row) for name in row}
        named = spec.columns(by_hand)
        taken = by_hand | {*named.values()}
        names = {own: f"{ORIGIN}_{own}" if own in taken else own for own in (*_OWN, "group")}
        names["query"] = str(named["query"])
        names["group"] = spec.group or names["group"]
        return names

    @staticmethod
    def is_written(row: Row) -> bool:
        """Whether a teacher wrote the row."""
        return ORIGIN in (row.get("origin"), row.get(f"{ORIGIN}_origin"))

    def query(self, row: Row) -> str:
        """The row's query."""
        found = row.get(self.columns["query"]) or ""
        if found and self.recipe.holds_conversations:
            return to_text(read_messages(found))
        return str(found)

    def rules(self, row: Row) -> tuple[int, ...] | None:
        """The rules that the row says it exercises; None where it doesn't say."""
        found = row.get(self.columns["rules"])
        if not isinstance(found, list) or any(type(number) is not int for number in found):
            return None
        return tuple(found)

    @property
    def queries_by_hand(self) -> list[str]:
        """The queries that no teacher wrote, in their order."""
        return [self.query(row) for row in self.rows if not self.is_written(row)]

    @property
    def without_samples(self) -> "QueryFile":
        """The file without the rows that came with its recipe's folder."""
        found = {*samples_among(self.queries_by_hand, self.recipe.prompt)}
        rows = tuple(row for row in self.rows if self.query(row) not in found)
        return QueryFile(self.recipe, rows, len(self.rows) - len(rows))

    @property
    def written(self) -> list[Row]:
        """The rows that a teacher wrote."""
        return [row for row in self.rows if self.is_written(row)]

    def append(self, rows: Sequence[Mapping[str, Any]]) -> Recipe:
        """Put rows behind those that are there, and name their columns in `recipe.yaml`.

        The lines that are there stay as they are. Nothing changes unless the whole can be read.
        """
        spec, chat = self.recipe.queries, self.recipe.holds_conversations
        # What only a person can fill is empty.
        empty = dict.fromkeys(name for name in (spec.reference, spec.forced_split) if name)
        lines = []
        for row in rows:
            query = from_text(row["query"]) if chat else row["query"]
            own = {self.columns[name]: row.get(name) for name in ("group", *_OWN)}
            lines.append(_line({self.columns["query"]: query, **empty, **own}))
        before = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        if before and not before.endswith("\n"):
            before += "\n"
        manifest = self.recipe.folder / "recipe.yaml"
        changes = {"group": self.columns["group"]}
        if self.columns["query"] != "query" and not chat:
            changes["query"] = self.columns["query"]
        old = manifest.read_text(encoding="utf-8")
        new = set_keys(old, "queries", changes)
        if lines:
            text = before + "".join(lines)
            self._check(text, changes)
            write_file(self.path, text)
        if new != old:
            # Behind the queries: a column that is named and not there would be an error.
            write_file(manifest, new)
        return load_recipe(self.recipe.folder)

    def _check(self, text: str, changes: Mapping[str, str]) -> None:
        draft = self.path.with_name(f".{self.path.stem}.draft.jsonl")
        try:
            write_file(draft, text)
            fields = {**self.recipe.queries.model_dump(), **changes, "file": draft.name}
            load_queries(self.recipe.replace(queries=Queries.model_validate(fields)))
        finally:
            draft.unlink(missing_ok=True)


def open_query_file(recipe: Recipe, out: str | Path | None) -> QueryFile:
    """The recipe's own file; or with `out` that of a copy of the recipe, made if need be.

    Raises `RecipeError` where the recipe is not a folder of the user's with lines of JSON.
    """
    home = recipe if out is None else _copy(recipe, Path(out))
    if problem := _unwritable(home):
        raise RecipeError(
            f"The queries of {home.name!r} can't be added to: {problem}. Name a folder for a copy "
            "of the recipe with its queries in queries.jsonl: --out FOLDER."
        )
    path = home.folder / str(home.queries.file)
    if not path.is_file():
        return QueryFile(home, ())
    file = QueryFile(home, tuple(row for rows in read_rows(path) for row in rows))
    if file.rows:
        load_queries(home)
    return file.without_samples


def _unwritable(recipe: Recipe) -> str | None:
    spec, folder = recipe.queries, recipe.folder.resolve()
    if not (folder / "recipe.yaml").is_file():
        return "the recipe lies in no folder"
    if builders_folder().resolve() in folder.parents:
        return "the recipe comes with the package"
    if is_copy(folder, "manifest.json", "generation.json"):
        return "the recipe is part of a release or a run"
    if not spec.file or not spec.file.endswith(".jsonl"):
        return f"they are in {spec.file or spec.hub or spec.path or spec.package!r}"
    by_place = [key for key in ("sidecar", "rows", "sha256") if getattr(spec, key) is not None]
    return f"the recipe fixes them by {', '.join(by_place)}" if by_place else None


def _copy(recipe: Recipe, out: Path) -> Recipe:
    """The recipe at `out`: its queries read from wherever they are, and written there."""
    if (out / "recipe.yaml").is_file():
        there = load_recipe(out)
        if (there.name, there.prompt) != (recipe.name, recipe.prompt):
            raise RecipeError(
                f"{str(out)!r} holds another recipe ({there.name!r}) or another prompt. Choose "
                f"another --out, or go on with that one: distill-datasets synthesize {out}."
            )
        return there
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{str(out)!r} is there and holds no recipe: choose another --out.")
    spec, chat = recipe.queries, recipe.holds_conversations
    names = {name: name for name in ("group", "reference") if getattr(spec, name)}
    if spec.forced_split:
        names["forced_split"] = "split"
    with replacing(out) as folder:
        if not spec.file or (recipe.folder / spec.file).is_file():
            columns: dict[str, Sequence[Any]] = {**read_columns(recipe)}
            if chat:
                columns["query"] = [from_text(str(query)) for query in columns["query"]]
            keys = ["messages" if chat else "query", *names.values()]
            found = zip(*(columns[name] for name in ("query", *names.values())), strict=True)
            text = "".join(_line(dict(zip(keys, row, strict=True))) for row in found)
            (folder / "queries.jsonl").write_text(text, encoding="utf-8")
        for name in set(recipe.attachments) - {spec.file, spec.sidecar}:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(recipe.folder / name, folder / name)
        column = {"messages": "messages"} if chat else {"query": "query"}
        queries = Queries.model_validate({"file": "queries.jsonl", **column, **names})
        recipe.replace(queries=queries, folder=folder).dump(folder)
    return load_recipe(out)


def _line(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False) + "\n"


def set_keys(text: str, section: str, changes: Mapping[str, str]) -> str:
    """The text of `recipe.yaml` with some keys of a section set; the same where they are so.

    Raises `RecipeError` for a text that can't be changed in place.
    """
    before = yaml.safe_load(text)
    wanted = {**before, section: {**before[section], **changes}}
    for key, value in changes.items():
        if before[section].get(key) != value:
            text = _set(text, section, key, value)
    try:
        changed = yaml.safe_load(text) == wanted
    except yaml.YAMLError:
        changed = False
    if not changed:
        lines = ", ".join(f"{key}: {value}" for key, value in changes.items())
        raise RecipeError(
            f"recipe.yaml can't be changed in place: write {lines} under {section!r}."
        )
    return text


def _set(text: str, section: str, key: str, value: str) -> str:
    node = _child(yaml.compose(text), section)
    written = yaml.safe_dump(value, allow_unicode=True).removesuffix("...\n").strip()
    if known := _child(node, key):
        begin, end = int(known.start_mark.index), int(known.end_mark.index)
        return text[:begin] + " " * (begin == end) + written + text[end:]
    assert isinstance(node, yaml.MappingNode)
    first = node.value[0][0].start_mark
    between = ", " if node.flow_style else "\n" + " " * first.column
    return f"{text[: first.index]}{key}: {written}{between}{text[first.index :]}"


def _child(node: Any, name: str) -> Any:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for key, value in pairs if key.value == name), None)

"""Finds recipes by name, folder or release, says in sentences what is wrong with one, and starts
new ones.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, get_args
from warnings import warn

import yaml
from pydantic import BaseModel, ValidationError

from distill_datasets.conversations import read_messages, to_text
from distill_datasets.errors import OutputError, RecipeError, nearest
from distill_datasets.files import TEMPLATES, builders_folder
from distill_datasets.hub.references import find_release, inside, split_config
from distill_datasets.recipes.keys import NAME
from distill_datasets.recipes.prompt import is_jinja
from distill_datasets.recipes.recipe import PROMPT_LIMIT, Recipe
from distill_datasets.recipes.user_files import (
    open_yaml,
    read_rows,
    read_text,
    read_yaml,
)

_BOOL = "tag:yaml.org,2002:bool"

# What YAML calls the kinds of values that a key takes.
_WANTED = {
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a mapping, key: value"),
    "string_type": "text",
}


def load_recipe(source: str | Path, *, config: str | None = None, trust: bool = False) -> Recipe:
    """A recipe by its name (of those that ship), its folder, or a release that carries it.

    `name:variant` is one of a recipe's variants, which is then part of its name. A release is a
    folder or a Hub dataset such as `me/name@v1.0.0`, of which only the recipe and the manifest are
    downloaded; `config` names one of several in one repository, as `me/name:config@v1.0.0` does.
    Raises `RecipeError` that names the wrong key and the closest valid one; and, without `trust`,
    for a release whose queries are neither in its own folder nor pinned: it would decide which of
    your files, or of the datasets that you may read, are sent to a teacher and published.
    """
    repository, own = split_config(source)
    variant = None
    if own is None or Path(repository).exists():  # otherwise a configuration on the Hub
        source, variant = _split_variant(source)
    folder = _find(source, config)
    recipe = _load(folder, variant)
    if not trust and is_copy(folder, "manifest.json"):
        _check_sources(recipe)
    return recipe


def load_released_recipe(release: Path) -> Recipe:
    """A release's recipe to be described, with a stand-in for a prompt that wasn't published."""
    folder = release / "recipe"
    return _load(folder, hidden=without_prompt(release))


def without_prompt(release: Path) -> bool:
    """Whether a folder holds a release that was published without its prompt."""
    path = release / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("prompt") is False
    except (OSError, ValueError, AttributeError):
        return False


def is_copy(folder: Path, *beside: str) -> bool:
    """Whether a recipe's folder is part of a release or of a run, of which it names a file."""
    place = folder.absolute()
    return place.name == "recipe" and any((place.parent / name).is_file() for name in beside)


def _load(folder: Path, variant: str | None = None, *, hidden: bool = False) -> Recipe:
    path = folder / "recipe.yaml"
    root, given = open_yaml(path)
    fields = _chosen(folder, given, variant)
    for reserved in ("prompt", "folder", "members"):
        if reserved in fields:
            raise RecipeError(f"{path}: {reserved!r} is not a key; the prompt is in prompt.md.")
    for section, key in (("answer", "json_schema"), ("sampling", "extra")):
        _check_words(path, _child(_child(root, section), key))
    copied = is_copy(folder, "manifest.json", "generation.json")
    members = _members(folder, fields.get("prompts"), copied=copied, hidden=hidden)
    prompt = "\n\n".join(f"# {handle}\n\n{one.prompt}" for handle, one in members.items())
    if not members:
        lacks = hidden and not (folder / "prompt.md").is_file()
        prompt = "(not published)" if lacks else _prompt(folder, copied=copied)
    if "template" not in fields and copied and is_jinja(prompt):
        # Version 0.1 took every prompt for a template, and didn't say so.
        fields["template"] = "jinja"
    try:
        recipe = Recipe(**fields, prompt=prompt, folder=folder, members=members)
    except ValidationError as error:
        raise RecipeError(_explain(error, folder, root)) from error
    if recipe.template is None and "{%" in prompt and is_jinja(prompt):
        warn(
            f"prompt.md in {str(folder)!r} is sent as it is written, '{{%' and all: write "
            "'template: jinja' into recipe.yaml to have it filled, or 'template: text'.",
            stacklevel=3,
        )
    return recipe


def _prompt(folder: Path, *, copied: bool) -> str:
    """The text of prompt.md. One's own may be a link to anywhere, a copy's only to its folder."""
    if (prompt := folder / "prompt.md").is_file():
        prompt = inside(folder, prompt.name) if copied else prompt
        return read_text(prompt, limit=PROMPT_LIMIT).strip()
    above = [*folder.absolute().parents]  # the recipe of one of several prompts lies deeper
    for release in filter(without_prompt, above[:1] + above[2:3]):
        raise RecipeError(
            f"The release {str(release)!r} was published without its prompt, so its recipe can't "
            f"be run. Ask its author for prompt.md, and put it into {str(folder)!r}; or train on "
            "the release, which needs no prompt."
        )
    raise RecipeError(f"Recipe {str(folder)!r} has no prompt.md; write the teacher's prompt.")


def variants_of(source: str | Path) -> list[str]:
    """The names of a recipe's variants; none where it has none."""
    folder = _find(source, None)
    return list(_variants(folder, read_yaml(folder / "recipe.yaml")))


def _split_variant(source: str | Path) -> tuple[str | Path, str | None]:
    """A recipe's name, and the variant behind the colon."""
    if isinstance(source, Path) or Path(source).exists():
        return source, None
    name, _, variant = source.rpartition(":")
    known = name and re.fullmatch(NAME, variant)
    return (name, variant) if known else (source, None)


def _variants(folder: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Each variant's keys; raises `RecipeError` for what is no mapping of such."""
    given = fields.get("variants") or {}
    where = f"{folder / 'recipe.yaml'}, variants"
    if isinstance(given, str):
        path = inside(folder, given)
        given, where = read_yaml(path), str(path)
    for name, changes in given.items() if isinstance(given, dict) else [("", None)]:
        if not isinstance(changes, dict) or not re.fullmatch(NAME, str(name)):
            raise RecipeError(
                f"{where}: expected names of letters, digits, '_', '.' and '-', each with the keys "
                f"in which it differs; found {given!r:.200}."
            )
    return dict(given)


def _chosen(folder: Path, fields: dict[str, Any], variant: str | None) -> dict[str, Any]:
    """A recipe's keys with those of a variant; sections are laid over each other key by key."""
    known = _variants(folder, fields)
    fields.pop("variants", None)
    if variant is None and known:
        raise RecipeError(
            f"The recipe {str(folder.name)!r} has variants: name one of {list(known)}, as "
            f"{folder.name}:{next(iter(known))}, or all of them with --variant all."
        )
    if variant is None:
        return fields
    if variant not in known:
        raise RecipeError(
            f"The recipe {folder.name!r} has no variant {variant!r}; found {list(known)}."
            + nearest(variant, list(known))
        )
    for key, value in known[variant].items():
        both = isinstance(value, dict) and isinstance(fields.get(key), dict)
        fields[key] = {**fields[key], **value} if both else value
    named = known[variant].get("name", f"{fields.get('name', folder.name)}-{variant}")
    return {**fields, "name": named, "variant": variant}


def _members(folder: Path, prompts: Any, *, copied: bool, hidden: bool) -> dict[str, Recipe]:
    """The recipes behind each handle: folders of this recipe's, or recipes that ship."""
    members = {}
    for handle, name in prompts.items() if isinstance(prompts, dict) else ():
        place, variant = _split_variant(str(name))
        home = inside(folder, str(place))
        if not (home / "recipe.yaml").is_file():
            home = builders_folder() / str(place)
        if not (home / "recipe.yaml").is_file() or Path(str(place)).is_absolute():
            raise RecipeError(
                f"{folder / 'recipe.yaml'}, prompts: {name!r} is neither a folder of this recipe's "
                f"nor one of those that ship, {[one.name for one in _shipped()]}."
            )
        if read_yaml(home / "recipe.yaml").get("prompts"):
            raise RecipeError(f"{folder / 'recipe.yaml'}, prompts: {name!r} has prompts itself.")
        if copied:
            inside(home, "prompt.md")
        members[str(handle)] = _load(home, variant, hidden=hidden)
    return members


def _check_sources(recipe: Recipe) -> None:
    for member in recipe.members.values():
        _check_sources(member)
    spec = recipe.queries
    unpinned = f"{spec.package}/{spec.member}" if spec.package and not spec.sha256 else None
    mixed = [part.path or part.hub for part in recipe.mix]
    read = ("queries", spec.path or spec.hub or unpinned), *(("mix", one) for one in mixed)
    for what, outside in read:
        if outside:
            raise RecipeError(
                f"The recipe {recipe.name!r} comes from a release, and its {what} would be read "
                f"from {outside!r}, with your rights, and sent to its teacher or published. If you "
                "want that, say so: --trust (in Python, load_recipe(..., trust=True))."
            )


def shipped_recipes() -> list[Recipe]:
    """Every recipe that comes with the package, by name; of those with variants, each variant."""
    found = []
    for folder in _shipped():
        names = [f":{name}" for name in variants_of(folder)] or [""]
        found += [load_recipe(f"{folder.name}{name}") for name in names]
    return found


def _shipped() -> list[Path]:
    return sorted(path.parent for path in builders_folder().glob("[!_]*/recipe.yaml"))


def _find(source: str | Path, config: str | None) -> Path:
    given = Path(source)
    candidates = (builders_folder() / str(source), given, given / "recipe")
    if isinstance(source, Path) or given.is_dir() or len(given.parts) > 1:
        candidates = (given, given / "recipe", given / "release" / "recipe")
    for folder in candidates if config is None else ():
        if (folder / "recipe.yaml").is_file():
            return folder
    release = find_release(source, (), config)
    if release and (release.path / "recipe" / "recipe.yaml").is_file():
        return release.path / "recipe"
    names = [folder.name for folder in _shipped()]
    found_in = f" as its configuration {config!r}" if config else ""
    raise RecipeError(
        f"No recipe {str(source)!r}: expected one of {names}, a folder with recipe.yaml and "
        f"prompt.md, or a release that carries one{found_in}.{nearest(str(source), names)}"
    )


def _check_words(path: Path, node: yaml.Node | None) -> None:
    """Where anything may stand, `no` is as likely a word as a truth value."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag == _BOOL and node.value.lower() not in ("true", "false"):
            raise RecipeError(
                f"Line {node.start_mark.line + 1} of {path}: YAML takes {node.value} for a truth "
                f"value: put it in quotes, '{node.value}', or write true or false."
            )
    elif isinstance(node, yaml.CollectionNode):
        for part in node.value:
            _check_words(path, part[1] if isinstance(part, tuple) else part)


def _child(node: yaml.Node | None, part: str | int) -> yaml.Node | None:
    """What stands at a key or a place of a node."""
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
        return node.value[part] if part < len(node.value) else None
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for key, value in pairs if key.value == part), None)


def _explain(error: ValidationError, folder: Path, root: yaml.Node) -> str:
    """Every problem on a line, with the closest valid key for one that is unknown."""
    lines = [f"Recipe {str(folder)!r} can't be used:"]
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"]) or "recipe"
        if problem["type"] == "extra_forbidden":
            valid = _keys_at(problem["loc"][:-1])
            hint = nearest(str(problem["loc"][-1]), valid)
            lines.append(f"  unknown key {where!r}.{hint} Valid keys: {', '.join(valid)}.")
        elif problem["type"] == "missing":
            lines.append(f"  the key {where!r} is missing.")
        else:
            said = problem["msg"].removeprefix("Value error, ").removesuffix(".")
            wanted = _WANTED.get(problem["type"])
            message = f"expected {wanted}" if wanted else said
            found = f" (found {problem['input']!r:.300})" if problem["loc"] else ""
            end = "" if message.endswith("?") and not found else "."
            lines.append(f"  {where}: {message}{found}{end}{_hint(problem, root)}")
    return "\n".join(lines)


def _hint(problem: Any, root: yaml.Node) -> str:
    """What to write in the place of what YAML or the recipe takes for something else."""
    node: yaml.Node | None = root
    for part in problem["loc"]:
        node = _child(node, part)
    if not isinstance(node, yaml.ScalarNode):
        return ""
    if problem["type"] == "string_type" and not node.style:
        return f" Text that YAML takes for something else stands in quotes: '{node.value:.80}'."
    if problem["type"] == "tuple_type":
        return f" Write a list: [{node.value:.80}]."
    return ""


def _keys_at(location: Sequence[str | int]) -> list[str]:
    """The keys of the section at a place, through annotations such as `Judge | None`."""
    model: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, str):
            kind = model.model_fields[part].annotation
            kinds = (one for one in (kind, *get_args(kind)) if isinstance(one, type))
            model = next(one for one in kinds if issubclass(one, BaseModel))
    fields = model.model_fields.items()
    return [field.alias or name for name, field in fields if not field.exclude]


def new_recipe(name: str, folder: Path | None = None, *, like: str = "labels") -> Path:
    """Write a recipe whose answers are `like` one of `TEMPLATES` into a new folder.

    Raises `RecipeError` for a name that no recipe may have and an unknown kind, `OutputError`
    where the folder exists or can't be written.
    """
    if like not in TEMPLATES:
        raise RecipeError(
            f"There is no kind {like!r} of recipes: expected one of {[*TEMPLATES]}."
            f"{nearest(like, [*TEMPLATES])}"
        )
    if not re.fullmatch(NAME, name):
        raise RecipeError(
            f"{name!r} can't name a recipe: use letters of English, digits, '.', '_' and '-', a "
            "letter or a digit first."
        )
    target = folder or Path(name)
    try:
        target.mkdir(parents=True)
        for source in sorted(_sample(like).iterdir()):
            text = source.read_text(encoding="utf-8")
            named = text.replace("name: NAME", yaml.safe_dump({"name": name}).strip(), 1)
            (target / source.name).write_text(named, encoding="utf-8")
    except FileExistsError as error:
        raise OutputError(f"{str(target)!r} is there already: choose another name.") from error
    except OSError as error:
        raise OutputError(f"Can't write {str(target)!r}: {error}.") from error
    load_recipe(target)
    return target


def samples_among(queries: Iterable[str], prompt: str) -> list[str]:
    """Those of the queries that `new` wrote for its own prompt, where the recipe has another."""
    own, others = set[str](), set[str]()
    for sample, texts in map(_sample_texts, TEMPLATES):
        (own if sample == prompt else others).update(texts)
    others -= own
    return [query for query in queries if query in others]


def _sample(kind: str) -> Path:
    return builders_folder() / "_template" / kind


@cache
def _sample_texts(kind: str) -> tuple[str, frozenset[str]]:
    """The prompt of a sample, and its queries."""
    folder = _sample(kind)
    rows = chain.from_iterable(read_rows(folder / "queries.jsonl"))
    queries = (
        row["query"] if "query" in row else to_text(read_messages(row["messages"])) for row in rows
    )
    return (folder / "prompt.md").read_text(encoding="utf-8").strip(), frozenset(queries)

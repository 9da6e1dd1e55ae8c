"""Cards of datasets and students: the templates in cards/, filled with facts, around what people
wrote into the card that was there.

A card is handled as its two halves: the metadata, and the text below it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from distill_datasets.conversations import shown
from distill_datasets.files import cards_folder
from distill_datasets.progress import amount_text
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.releases.manifest import PARTS, flat, side_config
from distill_datasets.schema import EARLIER
from distill_datasets.tables import interval_text

if TYPE_CHECKING:
    from jinja2 import Environment

Halves = tuple[Mapping[str, Any], str]

_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
_LISTS = ("tags", "language")
_RIGHTS = ("license", "license_name")  # what the recipe says about them holds
LAYOUT = ("configs", "dataset_info")
_SIDE_PARTS = PARTS[1:]
# ISO 639-1; the Hub also takes the three letters of ISO 639-3, which are taken on trust.
_LANGUAGES = (
    "aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da "
    "de dv dz ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy "
    "hz ia id ie ig ii ik io is it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg "
    "li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om or "
    "os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta "
    "te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu"
)
# Licence ids that the Hub knows and a text may have; it refuses a card with another id.
_HUB_LICENSE = re.compile(
    r"apache-2\.0|mit|isc|zlib|unlicense|wtfpl|bsd(-[23]-clause)?|mpl-2\.0|cc0-1\.0|pddl|"
    r"cc-by(-(sa|nc))?-[234]\.0|cc-by-2\.5|cc-by-nd-4\.0|cc-by-nc-(sa-)?4\.0|cc-by-nc-nd-[34]\.0|"
    r"odc-by|odbl|cdla-sharing-1\.0|cdla-permissive-[12]\.0|c-uda|[al]?gpl-3\.0|gpl-2\.0|"
    r"lgpl-2\.1|gfdl|eupl-1\.[12]|etalab-2\.0|afl-3\.0|artistic-2\.0|openrail|gemma|"
    r"llama(2|3|3\.[123]|4)"
)
_OTHERS = ("base", "teacher")
_METRICS = {"macro_f1": "f1"}  # ours whose kind has another name on the Hub
# What the card of a student says elsewhere, or only this machine understands.
_NOT_SHOWN = ("dataset.path", "dataset.revision", "dataset.files", "checkpoint.best")


def dataset_card(
    manifest: Mapping[str, Any],
    recipe: Recipe,
    *,
    example: Mapping[str, Any],
    layout: Mapping[str, Any],
    written: Sequence[tuple[Halves, Mapping[str, Any]]] = (),
) -> str:
    """The README of a release.

    `layout` is the `configs` and `dataset_info` of its metadata, `example` one row. Of each card
    `written` before, what people wrote is kept: the text outside the two marker comments, and the
    metadata that differs from what `card_metadata` gave for it, which stands beside it.
    """
    facts: dict[str, Any] = {
        **{"repo": None, "config": "default", "history": [], "panel": None, "examples": None},
        **{"prompt": True, "warnings": [], "from_ledger": [], "checks": {}, "mix": []},
        **manifest,
    }
    text = _fill("dataset.md", {**facts, **_seen(recipe), **_row(example, recipe)})
    begin, end = markers(facts["config"])
    metadata = {**card_metadata(manifest["splits"], recipe), **layout}
    card = metadata, f"{begin}\n{text.strip()}\n{end}"
    for existing, previous in written:
        card = merged(card, existing, config=facts["config"], previous=previous)
    return card_text(*card)


def _seen(recipe: Recipe) -> dict[str, Any]:
    """The recipe, its tools, and whether a student of its rows sees a query alone."""
    one_text = not (recipe.holds_conversations or recipe.tools)
    alone = not (recipe.members or recipe.student_prompt or recipe.student_tools)
    tools = [one["function"]["name"] for one in json.loads(recipe.tools_text or "[]")]
    return {"recipe": recipe, "one_text": one_text, "alone": alone, "tool_names": tools}


def _row(example: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """An example row; a conversation is text for readers, apart from the other columns."""
    if not (recipe.holds_conversations or recipe.tools) or not example:
        return {"example": example, "conversation": None}
    messages = [json.loads(one) if isinstance(one, str) else one for one in example["messages"]]
    aside = ("query", "messages", "tools", EARLIER, "response")
    others = {name: value for name, value in example.items() if name not in aside}
    return {"example": others, "conversation": shown(messages)}


def card_metadata(splits: Mapping[str, int], recipe: Recipe) -> dict[str, Any]:
    """What a release's card says to the Hub, its files aside."""
    return {
        "pretty_name": recipe.name,
        **_license(recipe),
        **_languages(recipe),
        "size_categories": [_size_category(sum(splits.values()))],
        "tags": ["synthetic", "prompt-distillation", "distill-datasets"],
    }


def model_card(
    report: Mapping[str, Any] | None,
    training: Mapping[str, Any],
    recipe: Recipe | None,
    *,
    published: Mapping[str, Any] | None = None,
) -> str:
    """The README of a trained student: what it was trained on, and how it compares.

    `report` is what `measure` writes, None where nothing was measured; `training` the training
    folder's configuration with its best `checkpoint`; `recipe` is None where the dataset has
    none. `published` says where the adapter and its base are, for a card that goes there.
    """
    name = f"{recipe.name} student" if recipe else "student"
    systems = report["systems"] if report else {}
    base = training.get("student") or systems["base"]["model"]
    hosted = re.fullmatch(r"tinker:([\w.-]+/[\w.-]+)", base)
    on_hub = published["base_model"] if published else hosted and hosted[1]
    hub_dataset = dataset_on_hub(training)
    metadata = {
        "model_name": name,
        **(_license(recipe) | _languages(recipe) if recipe else {}),
        **({"base_model": on_hub, "base_model_relation": "adapter"} if on_hub else {}),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        **({"datasets": [hub_dataset[0]]} if hub_dataset else {}),
        "tags": ["lora", "prompt-distillation", "distill-datasets"],
        **(_results(report, training) if report else {}),
    }
    facts = {
        "recipe": recipe,
        "report": report,
        "training": {
            key: value
            for key, value in flat(training)
            if value is not None and key not in _NOT_SHOWN
        },
        "dataset": {"rows": None, "revision": None, **(report or training)["dataset"]},
        "base": base,
        "teacher": systems["teacher"]["model"] if report else recipe and recipe.teacher_name,
        "published": published,
        "comparison": report_markdown(report).strip() if report else None,
    }
    begin, end = markers("default")
    return card_text(metadata, f"{begin}\n{_fill('model.md', facts).strip()}\n{end}")


def dataset_on_hub(training: Mapping[str, Any]) -> tuple[str, str] | None:
    """The id and the commit of the dataset that was trained on; None where it is a folder.

    A training on a Hub dataset records the commit as its revision, one on a folder never does.
    """
    dataset = training.get("dataset", {})
    name = str(dataset.get("path", "")).partition("@")[0]
    revision = str(dataset.get("revision", ""))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and re.fullmatch(r"[0-9a-f]{40}", revision):
        return name, revision
    return None


def report_markdown(report: Mapping[str, Any]) -> str:
    """The systems side by side, every metric with its 95 % interval."""
    return _fill("report.md", {"differences": {}, **report})


def _results(report: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    """The student's metrics; each carries its interval, and what base and teacher reached."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    systems, hub_dataset = report["systems"], dataset_on_hub(training)
    name = report["recipe"]
    results = []
    for kind in ("metrics", "checks"):
        for metric, value in systems["student"].get(kind, {}).items():
            numbers = _numbers(value)
            others = {role: systems.get(role, {}).get(kind, {}).get(metric) for role in _OTHERS}
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=hub_dataset[0] if hub_dataset else name,
                    dataset_name=name,
                    dataset_split=report["split"],
                    dataset_revision=hub_dataset[1]
                    if hub_dataset
                    else report["dataset"]["revision"],
                    metric_type=_METRICS.get(metric, metric),
                    metric_name=metric,
                    metric_value=numbers.pop("value"),
                    metric_args={
                        "rows": value.get("rows", report["n"]),
                        **numbers,
                        **{role: _numbers(other) for role, other in others.items() if other},
                    },
                )
            )
    return {"model-index": eval_results_to_model_index(f"{name} student", results)}


def _numbers(value: Mapping[str, float]) -> dict[str, Any]:
    """A metric's value, and its interval where there is one."""
    found: dict[str, Any] = {"value": round(float(value["value"]), 4)}
    if "low" in value:
        found["interval_95"] = [round(float(value[end]), 4) for end in ("low", "high")]
    return found


def _license(recipe: Recipe) -> dict[str, str]:
    if recipe.license is None:
        return {}
    known = recipe.license.lower()
    if _HUB_LICENSE.fullmatch(known):
        return {"license": known}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", known).strip("-")}


def _languages(recipe: Recipe) -> dict[str, list[str]]:
    found = [
        code
        for code in recipe.languages
        if code in _LANGUAGES.split() or re.fullmatch(r"[a-z]{3}", code)
    ]
    return {"language": found} if found else {}


def _fill(template: str, facts: Mapping[str, Any]) -> str:
    return _environment().get_template(template).render(facts)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(cards_folder()),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown, and what people wrote goes through one of these filters
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        fenced=_fenced,
        cell=_cell,
        code=_code,
        json=lambda value: json.dumps(value, ensure_ascii=False, indent=2),
        count="{:,}".format,
        tenths=lambda value: "" if value is None else f"{value:,.1f}",
        amount=amount_text,
        measured=_measured,
        side=side_config,
    )
    return environment


def _fenced(text: str, language: str = "") -> str:
    """A code block whose fence no line of the text can close."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    """How many backquotes stand together in a text."""
    return max(map(len, re.findall(r"`+", text)), default=0)


def _cell(value: object) -> str:
    """Text that stays in its table cell."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _code(value: object) -> str:
    """Inline code that holds any text."""
    text = _cell(value)
    if "`" not in text:
        return f"`{text}`"
    fence = "`" * (_longest_run(text) + 1)
    return f"{fence} {text} {fence}"


def _measured(value: Mapping[str, float] | None, interval: bool = True) -> str:
    """A number, with its interval where there is one; an empty cell where it was not measured."""
    if value is None:
        return ""
    return interval_text(value) if interval else f"{value['value']:.3f}"


def _size_category(rows: int) -> str:
    """The Hub's name for a dataset of so many rows."""
    place = len(str(rows)) - 4  # of the largest limit that is not above
    if place < 0 or place >= len(_SIZES) - 1:
        return f"n>{_SIZES[-1]}" if place > 0 else f"n<{_SIZES[0]}"
    return f"{_SIZES[place]}<n<{_SIZES[place + 1]}"


def markers(config: str) -> tuple[str, str]:
    """The comments around the text that is written anew for a configuration."""
    name = "" if config == "default" else f" {config}"
    begin, end = (f"<!-- distill-datasets:{edge}{name} -->" for edge in ("begin", "end"))
    return begin, end


def card_text(metadata: Mapping[str, Any], body: str) -> str:
    """A card from its halves."""
    from huggingface_hub import CardData

    head = CardData(**metadata).to_yaml(line_break="\n")
    return f"---\n{head}\n---\n\n{body}\n"


def read_card(card: str) -> Halves:
    """The halves of a card; a head that is no YAML counts as text."""
    from huggingface_hub import RepoCard
    from yaml import YAMLError

    text = card.removeprefix("\ufeff").replace("\r\n", "\n")
    if not text.startswith("---"):
        return {}, text
    try:
        found = RepoCard(text, ignore_metadata_errors=True)
    except (ValueError, TypeError, YAMLError):
        return {}, text
    return dict(found.data.to_dict()), found.text  # type: ignore[no-untyped-call]


def merged(
    card: Halves, existing: Halves, *, config: str, previous: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """The new `card` with what people wrote into the `existing` one.

    That is all text outside the markers, the metadata that differs from what was generated for
    it the last time (`previous`), and what is there for other configurations.
    """
    begin, end = markers(config)
    own_before, block, own_after = _around(card[1], begin, end)
    before, found, after = _around(existing[1], begin, end)
    if not found:
        before, after = _place(existing[1])
    parts = (before or own_before, f"{begin}{block}{end}", after or own_after)
    body = "\n\n".join(part for part in parts if part)
    return _kept_metadata(card[0], existing[0], previous), body


def _around(body: str, begin: str, end: str) -> tuple[str, str, str]:
    """The text before, between and after the markers; nothing between where they are not."""
    before, started, rest = body.partition(begin)
    # The last end: a prompt between the two may hold the same words.
    block, ended, after = rest.rpartition(end)
    if not (started and ended):
        return "", "", ""
    return before.strip(), block, after.strip()


def _place(body: str) -> tuple[str, str]:
    """What goes before and after a first block: behind other blocks, else on top."""
    blocks = list(re.finditer(r"<!-- distill-datasets:end( [\w.-]+)? -->", body))
    if not blocks:
        return "", body.strip()
    return body[: blocks[-1].end()].strip(), body[blocks[-1].end() :].strip()


def _kept_metadata(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], previous: Mapping[str, Any]
) -> dict[str, Any]:
    kept = {key: _kept_value(key, value, theirs, previous) for key, value in ours.items()}
    for key, value in theirs.items():
        # A key that was generated before and no longer is goes, unless somebody changed it.
        stale = key in previous and previous[key] == value
        if key not in kept and not stale and not (key in _RIGHTS and "license" in ours):
            kept[key] = value
    if len(_listed(kept.get("dataset_info"))) > len(_listed(ours.get("dataset_info"))):
        kept["size_categories"] = [_size_category(_rows(_listed(kept["dataset_info"])))]
    return kept


def _kept_value(key: str, ours: Any, theirs: Mapping[str, Any], previous: Mapping[str, Any]) -> Any:
    if key in LAYOUT:
        mine = _listed(ours)
        # Configurations of one release come and go together: data, rejected rows, raw answers.
        own = {name for one in mine for name in _together(one.get("config_name", "default"))}
        listed = _listed(theirs.get(key))
        others = [one for one in listed if one.get("config_name", "default") not in own]
        return [*({"config_name": "default", **one} for one in mine), *others] if others else ours
    if key not in theirs or key in _RIGHTS or theirs[key] == previous.get(key):
        return ours
    if key in _LISTS and isinstance(theirs[key], list):
        return [*ours, *(one for one in theirs[key] if one not in (*ours, *previous.get(key, ())))]
    return ours if key == "size_categories" else theirs[key]


def _together(name: str) -> tuple[str, ...]:
    for part in _SIDE_PARTS:
        if name == part:
            name = "default"
        name = name.removesuffix(f"-{part}")
    return (name, *(side_config(name, part) for part in _SIDE_PARTS))


def _listed(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [value]
    return [one for one in value or [] if isinstance(one, dict)]


def _rows(infos: list[dict[str, Any]]) -> int:
    side = tuple(f"-{part}" for part in _SIDE_PARTS)
    names = [str(info.get("config_name", "default")) for info in infos]
    return sum(
        split.get("num_examples", 0)
        for name, info in zip(names, infos, strict=True)
        if name not in _SIDE_PARTS and not name.endswith(side)
        for split in info.get("splits") or []
    )

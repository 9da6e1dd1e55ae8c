"""Cards of datasets and students: the templates in cards/, filled with facts."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distill_datasets import resources
from distill_datasets.conversations import shown
from distill_datasets.progress import amount_text
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.releases.card_merge import Halves, card_text, markers, merged, size_category
from distill_datasets.releases.manifest import side_config
from distill_datasets.schema import EARLIER
from distill_datasets.tables import interval_text

if TYPE_CHECKING:
    from jinja2 import Environment

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
        "size_categories": [size_category(sum(splits.values()))],
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
    metadata = {
        "model_name": name,
        **(_license(recipe) | _languages(recipe) if recipe else {}),
        **_model_metadata(report, training, on_hub),
    }
    facts = {
        "recipe": recipe,
        "report": report,
        "training": {key: value for key, value in _flat(training) if key not in _NOT_SHOWN},
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


def _model_metadata(
    report: Mapping[str, Any] | None, training: Mapping[str, Any], base: str | None
) -> dict[str, Any]:
    """The metadata of a student's card but for its name, licence and languages."""
    hub_dataset = dataset_on_hub(training)
    return {
        **({"base_model": base, "base_model_relation": "adapter"} if base else {}),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        **({"datasets": [hub_dataset[0]]} if hub_dataset else {}),
        "tags": ["lora", "prompt-distillation", "distill-datasets"],
        **(_results(report, training) if report else {}),
    }


def _results(report: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    """The student's metrics; each carries its interval, and what base and teacher reached."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    systems, hub_dataset = report["systems"], dataset_on_hub(training)
    name = report["recipe"]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=hub_dataset[0] if hub_dataset else name,
            dataset_name=name,
            dataset_split=report["split"],
            dataset_revision=hub_dataset[1] if hub_dataset else report["dataset"]["revision"],
            metric_type=_METRICS.get(metric, metric),
            metric_name=metric,
            metric_value=_rounded(value["value"]),
            metric_args={
                "rows": value.get("rows", report["n"]),
                **_interval(value),
                **_others(systems, metric, kind),
            },
        )
        for kind in ("metrics", "checks")
        for metric, value in systems["student"].get(kind, {}).items()
    ]
    return {"model-index": eval_results_to_model_index(f"{name} student", results)}


def _others(systems: Mapping[str, Any], metric: str, kind: str) -> dict[str, Any]:
    found = {
        role: systems[role].get(kind, {}).get(metric)
        for role in ("base", "teacher")
        if role in systems
    }
    return {
        role: {"value": _rounded(value["value"]), **_interval(value)}
        for role, value in found.items()
        if value
    }


def _interval(value: Mapping[str, float]) -> dict[str, list[float]]:
    if "low" not in value:
        return {}
    return {"interval_95": [_rounded(value["low"]), _rounded(value["high"])]}


def _rounded(value: float) -> float:
    return round(float(value), 4)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


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


def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(resources.cards()),
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
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _cell(value: object) -> str:
    """Text that stays in its table cell."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _code(value: object) -> str:
    """Inline code that holds any text."""
    text = _cell(value)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    if not longest:
        return f"`{text}`"
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}"


def _measured(value: Mapping[str, float] | None, interval: bool = True) -> str:
    """A number, with its interval where there is one; an empty cell where it was not measured."""
    if value is None:
        return ""
    return interval_text(value) if interval else f"{value['value']:.3f}"

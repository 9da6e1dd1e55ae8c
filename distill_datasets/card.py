"""Fills the templates in cards/; the only place where Jinja meets Markdown."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from distill_datasets import resources
from distill_datasets.recipe import Recipe

if TYPE_CHECKING:
    from jinja2 import Environment

_BEGIN = "<!-- distill-datasets:begin -->"
_END = "<!-- distill-datasets:end -->"

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
_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
    (10**10, "1B<n<10B"),
    (10**11, "10B<n<100B"),
    (10**12, "100B<n<1T"),
)


def dataset_card(
    manifest: Mapping[str, Any],
    recipe: Recipe,
    *,
    example: Mapping[str, Any],
    layout: Mapping[str, Any],
    written_before: str | None = None,
) -> str:
    """The README of a release.

    `layout` is the `configs` and `dataset_info` of its metadata, `example` one row. Of the card
    `written_before`, the text outside the two marker comments is kept.
    """
    rows = sum(manifest["splits"].values())
    metadata = {
        "pretty_name": recipe.name,
        **_license(recipe),
        **_languages(recipe),
        "size_categories": [next((name for most, name in _SIZES if rows < most), "n>1T")],
        "tags": ["synthetic", "prompt-distillation", "distill-datasets"],
        **layout,
    }
    text = _fill("dataset.md", {**manifest, "recipe": recipe, "example": example})
    return _card(metadata, text, written_before)


def model_card(report: Mapping[str, Any], training: Mapping[str, Any], recipe: Recipe) -> str:
    """The README of a trained student: what it was trained on, and how it compares.

    `report` is what `measure` writes, `training` the training folder's configuration with its
    `best` checkpoint.
    """
    base = report["systems"]["base"]["model"]
    hub_base = re.fullmatch(r"tinker:([\w.-]+/[\w.-]+)", base)
    # No `license`: a student inherits its base's, and nobody has told us that.
    metadata = {
        "model_name": f"{recipe.name} student",
        **({"base_model": hub_base[1]} if hub_base else {}),
        **_languages(recipe),
        "tags": ["prompt-distillation", "distill-datasets"],
    }
    facts = {
        "recipe": recipe,
        "training": dict(_flat(training)),
        "comparison": report_markdown(report).strip(),
    }
    text = _fill("model.md", {"notes": [], **report, **facts})
    return _card(metadata, text, None)


def report_markdown(report: Mapping[str, Any]) -> str:
    """The three systems side by side, every metric with its 95 % interval."""
    return _fill("report.md", {"differences": {}, **report})


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def _card(metadata: Mapping[str, Any], text: str, written_before: str | None) -> str:
    before, after = _human_text(written_before) if written_before else ("", "")
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=100)
    block = f"{_BEGIN}\n{text.strip()}\n{_END}"
    parts = [part for part in (before, block, after) if part]
    return f"---\n{head}---\n\n" + "\n\n".join(parts) + "\n"


def _human_text(card: str) -> tuple[str, str]:
    """What stands before and after the generated block; a card without one is all human."""
    body = re.sub(r"\A---\n.*?\n---\n", "", card, count=1, flags=re.DOTALL)
    before, begin, rest = body.partition(_BEGIN)
    # The last end: a prompt between the two may hold the same words.
    _, end, after = rest.rpartition(_END)
    if not (begin and end):
        return "", body.strip()
    return before.strip(), after.strip()


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
        tenths="{:,.1f}".format,
        measured=_measured,
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


def _measured(value: Mapping[str, float] | None) -> str:
    """A number with its interval; an empty cell where it was not measured."""
    if value is None:
        return ""
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"

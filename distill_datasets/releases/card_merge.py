"""A card that is written anew around what people wrote into it.

A card is handled as its two halves: the metadata, and the text below it.
"""

import re
from collections.abc import Mapping
from typing import Any

from distill_datasets.releases.manifest import PARTS, side_config

Halves = tuple[Mapping[str, Any], str]

# Rows below each limit, and the Hub's name for such a dataset.
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
_LISTS = ("tags", "language")
_RIGHTS = ("license", "license_name")  # what the recipe says about them holds
LAYOUT = ("configs", "dataset_info")
_SIDE_PARTS = PARTS[1:]


def size_category(rows: int) -> str:
    """The Hub's name for a dataset of so many rows."""
    return next((name for most, name in _SIZES if rows < most), "n>1T")


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
    body = _kept_text(card[1], existing[1], config)
    return _kept_metadata(card[0], existing[0], previous), body


def _kept_text(new: str, old: str, config: str) -> str:
    begin, end = markers(config)
    own_before, block, own_after = _around(new, begin, end)
    before, found, after = _around(old, begin, end)
    if not found:
        before, after = _place(old)
    parts = (before or own_before, f"{begin}{block}{end}", after or own_after)
    return "\n\n".join(part for part in parts if part)


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
        kept["size_categories"] = [size_category(_rows(_listed(kept["dataset_info"])))]
    return kept


def _kept_value(key: str, ours: Any, theirs: Mapping[str, Any], previous: Mapping[str, Any]) -> Any:
    if key in LAYOUT:
        return _kept_configs(ours, theirs.get(key))
    if key not in theirs or key in _RIGHTS or theirs[key] == previous.get(key):
        return ours
    if key in _LISTS and isinstance(theirs[key], list):
        return [*ours, *(one for one in theirs[key] if one not in (*ours, *previous.get(key, ())))]
    return ours if key == "size_categories" else theirs[key]


def _kept_configs(ours: Any, theirs: Any) -> Any:
    mine = _listed(ours)
    # Configurations of one release come and go together: data, rejected rows, raw answers.
    names = {name for one in mine for name in _together(one.get("config_name", "default"))}
    others = [one for one in _listed(theirs) if one.get("config_name", "default") not in names]
    return [*({"config_name": "default", **one} for one in mine), *others] if others else ours


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

"""What the test Hub says about the YAML of a card."""

from __future__ import annotations

import re
from typing import Any

import yaml

BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
LICENSE = re.compile(
    r"apache-2\.0|mit|isc|wtfpl|unlicense|bsd(-[23]-clause)?|mpl-2\.0|[al]?gpl(-[23]\.[01])?|pddl"
    r"|cc|cc0-1\.0|cc-by(-sa|-nd|-nc|-nc-sa|-nc-nd)?-[234]\.[05]|odc-by|odbl|cdla-permissive-2\.0"
    r"|openrail|llama[23](\.[123])?|llama4|gemma|unknown|other"
)


def metadata(text: str) -> dict[str, Any]:
    """The YAML of a card; nothing where it has none or it does not parse."""
    found = BLOCK.match(text)
    try:
        read = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return read if isinstance(read, dict) else {}


def complaints(text: str, kind: str) -> list[str]:
    """Why the Hub refuses a card; a small part of what the real one checks."""
    found = BLOCK.match(text)
    try:
        read = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"]
    if not isinstance(read, dict):
        return ["YAML Metadata Error: metadata must be a mapping"]
    errors = [
        f'"license" cannot be {license!r}; see the list of licenses'
        for license in as_list(read, "license")
        if not LICENSE.fullmatch(str(license))
    ]
    for key in ("language", "tags", "datasets", "base_model"):
        # YAML reads the language code `no` as false.
        errors += [f'"{key}" must be strings' for v in as_list(read, key) if not isinstance(v, str)]
    if kind == "datasets":
        return errors + dataset_complaints(read)
    return errors + model_complaints(read)


def dataset_complaints(read: dict[str, Any]) -> list[str]:
    errors = [
        f'"{key}" must be an array'
        for key in ("task_categories", "size_categories", "configs")
        if key in read and not isinstance(read[key], list)
    ]
    configs = [config for config in as_list(read, "configs") if isinstance(config, dict)]
    if not all(isinstance(config.get("config_name"), str) for config in configs):
        errors.append('"configs.config_name" is required')
    if sum(bool(config.get("default")) for config in configs) > 1:
        errors.append('"configs" can have at most one default config')
    return errors


def model_complaints(read: dict[str, Any]) -> list[str]:
    errors = []
    relation = read.get("base_model_relation", "adapter")
    if relation not in ("adapter", "merge", "quantized", "finetune"):
        errors.append(f'"base_model_relation" cannot be {relation!r}')
    for key in ("base_model", "datasets"):
        for value in as_list(read, key):
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(value)):
                errors.append(f'"{key}" with value "{value}" is not valid')
    for entry in as_list(read, "model-index"):
        errors += [error for result in entry.get("results", []) for error in lacks(result)]
    return errors


def lacks(result: dict[str, Any]) -> list[str]:
    """What is missing in one result of a model-index."""
    errors, dataset = [], result.get("dataset", {})
    if not ("type" in result.get("task", {}) and {"type", "name"} <= set(dataset)):
        errors.append('"model-index": a result needs task.type, dataset.type and dataset.name')
    if not all({"type", "value"} <= set(metric) for metric in result.get("metrics", [])):
        errors.append('"model-index": a metric needs type and value')
    return errors


def as_list(read: dict[str, Any], key: str) -> list[Any]:
    value = read.get(key)
    return [] if value is None else value if isinstance(value, list) else [value]

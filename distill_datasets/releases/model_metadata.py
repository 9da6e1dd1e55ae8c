"""What a student's card tells the Hub: its base, its dataset, its licence and its results."""

import re
from collections.abc import Mapping
from typing import Any

_METRICS = {"macro_f1": "f1"}  # ours whose kind has another name on the Hub


def model_metadata(
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
                "rows": report["n"],
                "interval_95": _interval(value),
                **_others(systems, metric),
            },
        )
        for metric, value in systems["student"]["metrics"].items()
    ]
    return {"model-index": eval_results_to_model_index(f"{name} student", results)}


def _others(systems: Mapping[str, Any], metric: str) -> dict[str, Any]:
    return {
        role: {
            "value": _rounded(systems[role]["metrics"][metric]["value"]),
            "interval_95": _interval(systems[role]["metrics"][metric]),
        }
        for role in ("base", "teacher")
        if metric in systems[role]["metrics"]
    }


def _interval(value: Mapping[str, float]) -> list[float]:
    return [_rounded(value["low"]), _rounded(value["high"])]


def _rounded(value: float) -> float:
    return round(float(value), 4)

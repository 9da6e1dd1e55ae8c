"""What is known of a finished training, and the card of its student."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_datasets.errors import ModelError, RecipeError
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.releases.cards import dataset_on_hub, model_card

_EXAMPLE_QUERY = "Hello, how are you?"
_MAX_TOKENS = 256


@dataclass(frozen=True)
class Trained:
    """What a training folder holds: its configuration, and the line of its best checkpoint."""

    folder: Path
    config: Mapping[str, Any]
    checkpoint: Mapping[str, Any]

    @property
    def student(self) -> str:
        """The reference of the model that was trained."""
        return str(self.config["student"])

    @property
    def last_loss(self) -> float | None:
        """The loss per response token of the last batch."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
        return round(losses[-1], 4) if losses else None


@dataclass(frozen=True)
class Base:
    """A student's base: its id on the Hub, and its folder; without an id that goes along."""

    hub: str | None
    folder: Path | None = None


def read_training(train: Path | str) -> Trained:
    """A training folder, or that of a run's folder; raises `ModelError` where none is finished."""
    from distill_datasets.models import connection

    for folder in (Path(train), Path(train) / "train"):
        if (folder / "checkpoints.jsonl").is_file():
            return Trained(folder, *connection.read_training(folder))
    raise ModelError(
        f"{str(train)!r} holds no finished training: expected a folder that `train` wrote, with "
        "checkpoints.jsonl in it. Run `train` first, or again to finish it."
    )


def recipe_of(trained: Trained) -> Recipe | None:
    """The recipe of the release that was trained on; None for any other dataset."""
    on_hub = dataset_on_hub(trained.config)
    place = "@".join(on_hub) if on_hub else Path(trained.config["dataset"]["path"]).expanduser()
    try:
        return load_recipe(place)
    except RecipeError:
        return None


def read_report(trained: Trained, report: Path | str | None) -> dict[str, Any] | None:
    """What was measured of this very checkpoint; naming a report of another one is an error."""
    path = Path(report) if report else trained.folder.parent / "report.json"
    if not path.is_file():
        if report:
            raise ModelError(f"There is no report {str(path)!r}: name what `measure` wrote.")
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    measured = found["systems"]["student"]["model"]
    if measured == trained.checkpoint["sampler"]:
        return found
    if report:
        raise ModelError(
            f"{str(path)!r} is about {measured}, not about this training's best checkpoint, "
            f"{trained.checkpoint['sampler']}. Measure it first."
        )
    return None


def student_card(trained: Trained, base: Base, report: Mapping[str, Any] | None, repo: str) -> str:
    """The model card; of folders on this machine it says no more than their names."""
    published = {
        "repo": repo,
        "base_model": base.hub,
        "dtype": '"auto"' if trained.student.startswith("tinker:") else "torch.float32",
        "query": _EXAMPLE_QUERY,
        "max_tokens": _MAX_TOKENS,
        "template": _template(trained, base),
        "loss": (trained.folder / "loss.png").is_file(),
        "tied": _ties_embeddings(base),
    }
    recipe = recipe_of(trained)
    training = _public_training(trained, base, recipe)
    shown = _public_report(report, training) if report else None
    return model_card(shown, training, recipe, published=published)


def _public_training(trained: Trained, base: Base, recipe: Recipe | None) -> dict[str, Any]:
    student = trained.student
    if student.startswith("embedded:"):
        student = base.hub or f"embedded:{Path(student.removeprefix('embedded:')).name}"
    dataset = dict(trained.config["dataset"])
    if not dataset_on_hub(trained.config):
        dataset["path"] = recipe.name if recipe else Path(dataset["path"]).name
    return {
        **trained.config,
        "student": student,
        "base_model": base.hub or student,
        "identity": None,  # begins with the reference, which may be a folder
        "dataset": dataset,
        "checkpoint": dict(trained.checkpoint),
        "training_loss": trained.last_loss,
    }


def _public_report(report: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    systems = {role: dict(system) for role, system in report["systems"].items()}
    systems["base"]["model"] = training["student"]
    # Several teachers are one text, of which each may name a folder.
    teachers = str(systems["teacher"]["model"]).split(" + ")
    systems["teacher"]["model"] = " + ".join(map(_public_model, teachers))
    dataset = {**report["dataset"], "path": training["dataset"]["path"]}
    if on_hub := dataset_on_hub(training):
        dataset |= {"path": on_hub[0], "revision": on_hub[1]}
    return {**report, "systems": systems, "dataset": dataset}


def _public_model(model: str) -> str:
    local = model.startswith("embedded:")
    return f"embedded:{Path(model.removeprefix('embedded:')).name}" if local else model


def _ties_embeddings(base: Base) -> bool:
    """Whether merging the adapter would change the base's input embeddings too."""
    file = base.folder / "config.json" if base.folder else None
    return bool(file and json.loads(file.read_text(encoding="utf-8")).get("tie_word_embeddings"))


def _template(trained: Trained, base: Base) -> dict[str, Any] | None:
    """How the tokenizer's own chat template has to be called to make the prompt of the training.

    None where it can't make it: then the renderer of the training is needed.
    """
    from tinker_cookbook.renderers import get_renderer
    from tinker_cookbook.tokenizer_utils import get_tokenizer

    import distill_datasets.models.renderers  # noqa: F401 (registers our renderer)

    tokenizer: Any = get_tokenizer(str(base.folder or base.hub))
    conversation: Any = [{"role": "user", "content": _EXAMPLE_QUERY}]
    renderer = get_renderer(trained.config["renderer"], tokenizer)
    wanted = renderer.build_generation_prompt(conversation).to_ints()
    possible: tuple[dict[str, Any], ...] = (
        {},
        {"enable_thinking": False},
        {"enable_thinking": True},
    )
    for arguments in possible if tokenizer.chat_template else ():
        made = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=False, **arguments
        )
        if list(made) == wanted:
            return arguments
    return None

"""A trained student as a PEFT adapter: a folder that loads anywhere, and its card."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distill_datasets.errors import (
    AccessError,
    DatasetError,
    ModelError,
    OutputError,
    RecipeError,
)
from distill_datasets.files import (
    pocket_folder,
    read_object,
    read_rows,
    replacing,
    report_file,
    rows_file,
)
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.releases.cards import dataset_on_hub, model_card
from distill_datasets.releases.check_files import CHECK, given_tools, write_check_files
from distill_datasets.schema import Message

INCLUDED = "base/"
Finish = Callable[[Path], Sequence[str]]
BASE_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors*", "tokenizer*.json"),
    *("tokenizer.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "LICENSE*"),
)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_EMBEDDINGS = frozenset({"lm_head", "embed_out", "output", "embed_tokens", "wte"})
_EXAMPLE_QUERY = "Hello, how are you?"
_MAX_TOKENS = 256
_TOOLS = "tools.json"  # those that the student is given; of several prompts, by their handles


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

    @property
    def dataset(self) -> str | Path:
        """What was trained on: a commit on the Hub, or a folder."""
        on_hub = dataset_on_hub(self.config)
        return "@".join(on_hub) if on_hub else Path(self.config["dataset"]["path"]).expanduser()

    @property
    def dataset_config(self) -> str | None:
        """The configuration that was trained on, where it was named."""
        config: str | None = self.config.get("settings", {}).get("config")
        return config

    @cached_property
    def recipe(self) -> Recipe | None:
        """The recipe of the release that was trained on; None for any other dataset."""
        try:
            return load_recipe(self.dataset, config=self.dataset_config, trust=True)
        except (RecipeError, DatasetError):
            return None


@dataclass(frozen=True)
class AdapterBase:
    """A student's base: its id on the Hub, and its folder; without an id that goes along."""

    hub: str | None
    folder: Path | None = None


def export_adapter(  # noqa: PLR0913 (what is written where, and what goes along)
    train: Path | str,
    out: Path | str,
    *,
    report: Path | str | None = None,
    repo: str = "me/student",
    base_model: str | None = None,
    check: bool = True,
    finish: Finish | None = None,
) -> Path:
    """Write a training's best checkpoint to a new folder, as PEFT's `from_pretrained` reads it.

    `report` is what `measure` wrote (default: the one in the run's folder, if it is about this
    checkpoint), `repo` where the card says that the adapter is. A base that is a folder of this
    machine needs `base_model`: its id on the Hub, or "base/" to put its weights into the same
    folder, as is always done with the pocket model's. Of a release its held-out rows go along, in
    `check/`, with tests over them for any server, unless `check` is False. `finish` is given the
    written folder, and returns what the card says of it. From Tinker this downloads the student's
    weights, and those of the base from the Hub. Raises `ModelError`, `AccessError` or
    `OutputError`.
    """
    trained = read_training(train)
    base = find_base(trained, base_model)
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{str(folder)!r} isn't empty: choose a new folder for the adapter.")
    found = read_report(trained, report)
    with tempfile.TemporaryDirectory(prefix="distill-adapter-") as scratch:
        rows = 0
        if check and trained.recipe is not None:
            said = _said(report_file(report or trained.folder.parent)) if found else {}
            rows = write_check_files(
                trained.dataset, Path(scratch), config=trained.dataset_config, said=said
            )
        weights = _weights_folder(trained, base, Path(scratch))
        with replacing(folder) as building:
            _write(building, weights, base, trained.folder / "loss.png")
            given = given_tools(trained.recipe) if trained.recipe else {}
            if tools := given.get("", given):
                text = json.dumps(tools, ensure_ascii=False, indent=1) + "\n"
                (building / _TOOLS).write_text(text, encoding="utf-8")
            lines = finish(building) if finish else ()
            card = student_card(
                trained, base, found, repo, folder=building, held_out=rows, said=lines
            )
            (building / "README.md").write_text(card, encoding="utf-8")
            if rows:
                shutil.copytree(Path(scratch) / CHECK, building / CHECK)
    return folder


def find_base(trained: Trained, base_model: str | None) -> AdapterBase:
    """The base of a student, of which `base_model` is as in `export_adapter`."""
    student = trained.student
    if student == "pocket":
        return AdapterBase(None, pocket_folder())
    if student.startswith("tinker:"):
        return AdapterBase(str(trained.config["base_model"]).partition(":")[0], None)
    name = student.removeprefix("embedded:")
    folder = Path(name).expanduser()
    if folder.suffix == ".gguf":
        from distill_datasets.models.references import find_model

        folder = find_model(name)
    if not (folder / "config.json").is_file():
        return AdapterBase(base_model or name, None)
    if base_model == INCLUDED:
        return AdapterBase(None, folder)
    if base_model is None:
        raise ModelError(
            f"The base of this student lies here, {name!r}, and others lack it: name its "
            f"id on the Hub (--base-model org/name), or say --base-model {INCLUDED} to put its "
            "weights into the adapter's repository, if their licence allows it."
        )
    return AdapterBase(base_model, folder)


def _weights_folder(trained: Trained, base: AdapterBase, scratch: Path) -> Path:
    """The folder that holds the best checkpoint in PEFT's format."""
    if not trained.student.startswith("tinker:"):
        # The embedded server's store: a folder for the run, then the kind and the name.
        run, kind, name = trained.checkpoint["sampler"].removeprefix("tinker://").split("/")
        folder: Path = trained.folder / "checkpoints" / run.replace(":", "_") / kind / name
        for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (folder / file).is_file():
                raise ModelError(
                    f"{str(folder)!r} lacks {file}: the weights of this training are gone. Train "
                    "again into another folder."
                )
        return folder
    from tinker_cookbook import weights
    from tinker_cookbook.exceptions import WeightsError

    state, made = trained.checkpoint["state"], scratch / "made"
    if not os.environ.get("TINKER_API_KEY"):
        raise AccessError(f"The weights of {state!r} are on Tinker: set TINKER_API_KEY.")
    try:
        # The training state: the cookbook can't fetch sampler weights with this SDK.
        raw = weights.download(tinker_path=state, output_dir=str(scratch / "raw"))
        weights.build_lora_adapter(
            base_model=str(base.hub), adapter_path=raw, output_path=str(made)
        )
    except (WeightsError, OSError) as error:
        raise ModelError(f"The adapter of {state!r} can't be fetched: {error}") from error
    return made


def _write(building: Path, weights: Path, base: AdapterBase, loss: Path) -> None:
    shutil.copyfile(weights / ADAPTER_WEIGHTS, building / ADAPTER_WEIGHTS)
    config = json.loads((weights / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base.hub or INCLUDED.rstrip("/")
    # A set, which another process writes in another order: sorted, the same file every time.
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (building / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
    if loss.is_file():
        shutil.copyfile(loss, building / loss.name)
    if base.hub is None and base.folder:
        (building / INCLUDED).mkdir()
        for file in sorted(file for pattern in BASE_FILES for file in base.folder.glob(pattern)):
            shutil.copyfile(file, building / INCLUDED / file.name)


def read_training(train: Path | str) -> Trained:
    """A training folder, or that of a run's folder; raises `ModelError` where none is finished."""
    from distill_datasets.models import references

    if (folder := references.find_training(train)) is not None:
        return Trained(folder, *references.read_training(folder))
    raise ModelError(
        f"{str(train)!r} holds no finished training: expected a folder that `train` wrote, with "
        "checkpoints.jsonl in it. Run `train` first, or again to finish it."
    )


def _said(report: Path) -> dict[str, Any]:
    """What the student said to each row when it was measured, by the rows' ids."""
    rows = read_rows(report) if rows_file(report).is_file() else ()
    return {row["id"]: row["systems"]["student"] for row in rows if "student" in row["systems"]}


def read_report(trained: Trained, report: Path | str | None) -> dict[str, Any] | None:
    """What was measured of this very checkpoint; naming a report of another one is an error."""
    path = report_file(report or trained.folder.parent)
    found = read_object(path)
    measured = found.get("systems", {}).get("student", {}).get("model")
    if measured == trained.checkpoint["sampler"]:
        return found
    if report and measured is None:
        raise ModelError(f"There is no report {str(path)!r}: name what `measure` wrote.")
    if report:
        raise ModelError(
            f"{str(path)!r} is about {measured}, not about this training's best checkpoint, "
            f"{trained.checkpoint['sampler']}. Measure it first."
        )
    return None


def student_card(  # noqa: PLR0913 (whose card it is, and what it says)
    trained: Trained,
    base: AdapterBase,
    report: Mapping[str, Any] | None,
    repo: str,
    *,
    folder: Path,
    held_out: int = 0,
    said: Sequence[str] = (),
) -> str:
    """The model card; of folders on this machine it says no more than their names.

    `folder` holds what it is about, an adapter or merged weights, and `held_out` rows in `check/`;
    `said` are lines of how that compares with the training's server.
    """
    recipe = trained.recipe
    prompt = recipe.student_prompt if recipe else None
    tools = recipe.student_tools if recipe else None
    if recipe and recipe.members:  # the example asks behind one of the handles
        prompt = next(iter(given_tools(recipe) or recipe.members))
        tools = recipe.members[prompt].student_tools
    system: list[Message] = [{"role": "system", "content": prompt}] if prompt else []
    conversation: list[Message] = [*system, {"role": "user", "content": _EXAMPLE_QUERY}]
    published = {
        "repo": repo,
        "base_model": base.hub,
        "dtype": '"auto"' if trained.student.startswith("tinker:") else "torch.float32",
        "conversation": json.dumps(conversation),
        "tools": _TOOLS if tools else None,
        "handle": json.dumps(prompt) if recipe and recipe.members else None,
        "max_tokens": _MAX_TOKENS,
        "template": _template(trained, base, conversation, tools),
        "loss": (trained.folder / "loss.png").is_file(),
        "merged": not (folder / ADAPTER_CONFIG).is_file(),
        "tied": tied_and_adapted(folder, base),
        "held_out": held_out,
        "parity": "\n".join(said),
    }
    training = _public_training(trained, base, recipe)
    shown = _public_report(report, training) if report else None
    return model_card(shown, training, recipe, published=published)


def _public_training(trained: Trained, base: AdapterBase, recipe: Recipe | None) -> dict[str, Any]:
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
    systems["teacher"]["model"] = " + ".join(
        f"embedded:{Path(one.removeprefix('embedded:')).name}"
        if one.startswith("embedded:")
        else one
        for one in str(systems["teacher"]["model"]).split(" + ")
    )
    dataset = {**report["dataset"], "path": training["dataset"]["path"]}
    if on_hub := dataset_on_hub(training):
        dataset |= {"path": on_hub[0], "revision": on_hub[1]}
    return {**report, "systems": systems, "dataset": dataset}


def tied_and_adapted(folder: Path, base: AdapterBase) -> bool:
    """Whether an adapter in a folder changes one of two embeddings that its base has as one matrix:
    merged as it is, it would change the other too.
    """
    config = read_object(folder / INCLUDED / "config.json")
    if not config and base.folder:
        config = read_object(base.folder / "config.json")
    return adapts_embeddings(folder) and bool(config.get("tie_word_embeddings"))


def adapts_embeddings(folder: Path) -> bool:
    """Whether the adapter in a folder changes an embedding."""
    config = read_object(folder / ADAPTER_CONFIG)
    return bool(_EMBEDDINGS & set(config.get("target_modules") or ()))


def _template(
    trained: Trained, base: AdapterBase, conversation: Sequence[Message], tools: str | None
) -> dict[str, Any] | None:
    """How the tokenizer's own chat template has to be called to make the prompt of the training.

    None where it can't make it: then the renderer of the training is needed.
    """
    from distill_datasets.models.renderers import load_tokenizer, open_renderer

    tokenizer = load_tokenizer(str(base.folder or base.hub))
    messages = [dict(one) for one in conversation]
    renderer = open_renderer(trained.config["renderer"], tokenizer)
    wanted = renderer.build_generation_prompt(messages, tools=tools).to_ints()
    return template_arguments(tokenizer, wanted, messages, tools)


def template_arguments(
    tokenizer: Any, wanted: Sequence[int], messages: Sequence[Any], tools: str | None
) -> dict[str, Any] | None:
    """What a tokenizer's own chat template takes to make these tokens of the messages; or None."""
    possible: tuple[dict[str, Any], ...] = (
        {},
        *({"enable_thinking": one} for one in (False, True)),
    )
    for arguments in possible if tokenizer.chat_template else ():
        if template_tokens(tokenizer, messages, tools, arguments) == list(wanted):
            return arguments
    return None


def template_tokens(
    tokenizer: Any, messages: Sequence[Any], tools: str | None, arguments: Mapping[str, Any]
) -> list[int]:
    """The prompt that a tokenizer's own chat template makes."""
    given = {"tools": json.loads(tools)} if tools else {}
    made = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, **given, **arguments
    )
    return list(made)

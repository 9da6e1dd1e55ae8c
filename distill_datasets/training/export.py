"""A trained student as a PEFT adapter: a folder that loads anywhere, and its place on the Hub."""

import json
import os
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distill_datasets import resources
from distill_datasets.errors import AccessError, ModelError, OutputError, RepositoryError
from distill_datasets.files import replacing
from distill_datasets.training.student_card import (
    Base,
    Trained,
    read_report,
    read_training,
    recipe_of,
    student_card,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

INCLUDED = "base/"
_BASE_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors*", "tokenizer*.json"),
    *("tokenizer.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "LICENSE*"),
)
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OWN_METADATA = ("base_model", "base_model_relation", "datasets", "model-index")
_SOMEBODY_WAS_FASTER = (409, 412)
_MOST_TRIES = 10


@dataclass(frozen=True)
class PushedStudent:
    """Where a student is on the Hub; `changed` is False where it was there already."""

    repo: str
    commit: str
    changed: bool


def export_adapter(
    train: Path | str,
    out: Path | str,
    *,
    report: Path | str | None = None,
    repo: str = "me/student",
    base_model: str | None = None,
) -> Path:
    """Write a training's best checkpoint to a new folder, as PEFT's `from_pretrained` reads it.

    `report` is what `measure` wrote (default: the one in the run's folder, if it is about this
    checkpoint), `repo` where the card says that the adapter is. A base that is a folder of this
    machine needs `base_model`: its id on the Hub, or "base/" to put its weights into the same
    folder, as is always done with the pocket model's. From Tinker this downloads the student's
    weights, and those of the base from the Hub. Raises `ModelError`, `AccessError` or
    `OutputError`.
    """
    trained = read_training(train)
    base = _find_base(trained, base_model)
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{str(folder)!r} isn't empty: choose a new folder for the adapter.")
    card = student_card(trained, base, read_report(trained, report), repo)
    with tempfile.TemporaryDirectory(prefix="distill-adapter-") as scratch:
        weights = _weights_folder(trained, base, Path(scratch))
        with replacing(folder) as building:
            _write(building, weights, base, trained.folder / "loss.png")
            (building / "README.md").write_text(card, encoding="utf-8")
    return folder


def push_student(
    train: Path | str,
    repo: str,
    *,
    report: Path | str | None = None,
    private: bool = True,
    base_model: str | None = None,
    allow: Collection[str] = (),
) -> PushedStudent:
    """Put a training's best checkpoint on the Hub as a PEFT adapter with its card, in one commit.

    Files of others stay, as does what people wrote into the card. Pushed again, it changes
    nothing. Before anything is sent the files are screened; `allow` takes what `require_clean`
    does, the other arguments are those of `export_adapter`. Raises `ScreeningError`,
    `RepositoryError` or `HubError` besides what that raises.
    """
    from distill_datasets.hub import client as hub
    from distill_datasets.hub.screening import require_clean, screen

    if not private:
        _require_license(read_training(train))
    hub.require_token()
    with tempfile.TemporaryDirectory(prefix="distill-adapter-") as scratch:
        folder = Path(scratch) / "student"
        export_adapter(train, folder, report=report, repo=repo, base_model=base_model)
        require_clean(screen(folder), allow)
        with hub.explained(repo):
            hub.ensure_repository(repo, kind="model", private=private)
            return push_folder(folder, repo)


def _require_license(trained: Trained) -> None:
    recipe = recipe_of(trained)
    if recipe is None or recipe.license is None:
        raise RepositoryError(
            "A public student needs the licence of its training data, and the recipe states none: "
            "add `license:` to recipe.yaml and publish the dataset again, or push it privately."
        )


def _find_base(trained: Trained, base_model: str | None) -> Base:
    student = trained.student
    if student == "pocket":
        return Base(None, resources.pocket())
    if student.startswith("tinker:"):
        return Base(str(trained.config["base_model"]).partition(":")[0], None)
    name = student.removeprefix("embedded:")
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        return Base(base_model or name, None)
    if base_model == INCLUDED:
        return Base(None, folder)
    if base_model is None:
        raise ModelError(
            f"The base of this student is a folder, {str(folder)!r}, which others lack: name its "
            f"id on the Hub (--base-model org/name), or say --base-model {INCLUDED} to put its "
            "weights into the adapter's repository, if their licence allows it."
        )
    return Base(base_model, folder)


def _weights_folder(trained: Trained, base: Base, scratch: Path) -> Path:
    """The folder that holds the best checkpoint in PEFT's format."""
    if trained.student.startswith("tinker:"):
        return _fetch_from_tinker(trained, base, scratch)
    # The embedded server's store: a folder for the run, then the kind and the name.
    run, kind, name = trained.checkpoint["sampler"].removeprefix("tinker://").split("/")
    folder: Path = trained.folder / "checkpoints" / run.replace(":", "_") / kind / name
    for file in (_CONFIG, _WEIGHTS):
        if not (folder / file).is_file():
            raise ModelError(
                f"{str(folder)!r} lacks {file}: the weights of this training are gone. Train "
                "again into another folder."
            )
    return folder


def _fetch_from_tinker(trained: Trained, base: Base, scratch: Path) -> Path:
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


def _write(building: Path, weights: Path, base: Base, loss: Path) -> None:
    shutil.copyfile(weights / _WEIGHTS, building / _WEIGHTS)
    config = json.loads((weights / _CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base.hub or INCLUDED.rstrip("/")
    # A set, which another process writes in another order: sorted, the same file every time.
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (building / _CONFIG).write_text(text, encoding="utf-8")
    if loss.is_file():
        shutil.copyfile(loss, building / loss.name)
    if base.hub is None and base.folder:
        (building / INCLUDED).mkdir()
        for file in sorted(file for pattern in _BASE_FILES for file in base.folder.glob(pattern)):
            shutil.copyfile(file, building / INCLUDED / file.name)


def push_folder(folder: Path, repo: str) -> PushedStudent:
    """Put an exported adapter into a model repository that is there, in one commit.

    It goes on the newest head; a lost answer is followed by a try that changes nothing.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    from distill_datasets.hub import client as hub

    api = HfApi()
    first, tries = "", 0
    while True:
        head = str(hub.patiently(api.model_info, repo).sha)
        first = first or head
        card = _kept_card(api, repo, head, (folder / "README.md").read_text(encoding="utf-8"))
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        operations = [
            CommitOperationAdd(
                path.relative_to(folder).as_posix(),
                card.encode() if path.name == "README.md" else str(path),
            )
            for path in files
        ]
        try:
            commit = api.create_commit(
                repo, operations, commit_message="Student's adapter", parent_commit=head
            )
            return PushedStudent(repo, commit.oid, commit.oid != first)
        except (HTTPError, RuntimeError) as error:
            tries += 1
            refused = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
            if refused in _SOMEBODY_WAS_FASTER and tries < _MOST_TRIES:
                continue
            if not hub.wait_after(error, tries - 1):
                raise


def _kept_card(api: "HfApi", repo: str, head: str, card: str) -> str:
    """The new card around what people wrote into the one that is there."""
    from huggingface_hub.errors import EntryNotFoundError

    from distill_datasets.hub import client as hub
    from distill_datasets.releases.card_merge import card_text, merged, read_card

    try:
        path = hub.patiently(api.hf_hub_download, repo, "README.md", revision=head)
    except EntryNotFoundError:
        return card
    existing = Path(path).read_text(encoding="utf-8")
    new, old = read_card(card), read_card(existing)
    # What a card of ours holds is written anew; the rest is somebody's, and so are further tags.
    ours = {key: value for key, value in old[0].items() if key in (*new[0], *_OWN_METADATA)}
    ours |= {key: new[0][key] for key in ("tags", "language") if key in new[0]}
    return card_text(*merged(new, old, config="default", previous=ours))

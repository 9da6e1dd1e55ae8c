"""A student leaves, as an adapter or merged: compared with its server, to a folder or a Hub."""

import json
import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import OutputError, RepositoryError
from distill_datasets.files import replacing
from distill_datasets.hub import client as hub
from distill_datasets.progress import interruptible
from distill_datasets.serving.parity import FILE, Certificate, certify, load_plain
from distill_datasets.tables import html_card, html_facts
from distill_datasets.training.adapter import (
    ADAPTER_CONFIG,
    BASE_FILES,
    INCLUDED,
    AdapterBase,
    Finish,
    Trained,
    adapts_embeddings,
    export_adapter,
    find_base,
    read_report,
    read_training,
    student_card,
    tied_and_adapted,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_OWN_METADATA = ("base_model", "base_model_relation", "datasets", "model-index")
_MOST_TRIES = 10
_UNNAMED = "local/base"


@dataclass(frozen=True)
class ExportSettings:
    """How a student leaves.

    `base_model` and `check` are as in `export_adapter`; with `merge` the adapter is added to its
    base, in the number format `dtype` (default: the base's). Unless `parity` is False, what was
    written is compared with the training's server, and with the server at the address `served_at`,
    where the student has the name `served_as`.
    """

    merge: bool = False
    dtype: str | None = None
    base_model: str | None = None
    check: bool = True
    parity: bool = True
    served_at: str | None = None
    served_as: str | None = None


@dataclass(frozen=True)
class ExportedStudent:
    """Where a student was written to, and how that compares; None where nobody asked."""

    folder: Path
    certificate: Certificate | None

    @property
    def says(self) -> list[str]:
        """What is in the folder, and what to do with it, a sentence a line."""
        adapter = self.folder / ADAPTER_CONFIG
        if not adapter.is_file():
            gguf = f"convert_hf_to_gguf.py {self.folder}"
            return [f"merged weights in {self.folder}: for a GGUF file, llama.cpp's {gguf}"]
        config = json.loads(adapter.read_text(encoding="utf-8"))
        adapted = f"rank {config['r']} on {', '.join(config['target_modules'])}"
        lines = [
            f"a PEFT adapter in {self.folder}: {adapted}",
            f"vLLM serves it with --enable-lora --max-lora-rank {config['r']} --lora-modules "
            f"student={self.folder}",
        ]
        if adapts_embeddings(self.folder):
            lines.append(
                "its output embedding is adapted too, which vLLM serves for some models only: "
                "export with --merge for the others"
            )
        return lines


@dataclass(frozen=True)
class PushedStudent:
    """Where a student is on the Hub; `changed` is False where it was there already."""

    repo: str
    commit: str
    changed: bool

    def _repr_html_(self) -> str:
        return html_card(f"Pushed the student to {self.repo}", html_facts(asdict(self)))


@interruptible
def export_student(
    train: Path | str,
    out: Path | str,
    settings: ExportSettings | None = None,
    *,
    report: Path | str | None = None,
    repo: str = "me/student",
) -> ExportedStudent:
    """Write a training's best checkpoint to a folder that needs neither this package nor a Hub.

    It is an adapter as `peft` and vLLM read it, or merged weights as `transformers`, vLLM and
    llama.cpp's converter to GGUF read them. A folder that was exported before is only compared
    again, where `served_at` says with what. Raises `ParityError` where it isn't the student that
    was trained, and writes nothing then; besides what `export_adapter` raises.

        exported = export_student("runs/qwen", "exported/qwen", ExportSettings(merge=True))
    """
    settings, folder = settings or ExportSettings(), Path(out)
    trained, found = read_training(train), list[Certificate]()

    def certified(building: Path) -> Sequence[str]:
        found.append(
            certify(trained, building, served_at=settings.served_at, served_as=settings.served_as)
        )
        found[0].require()
        found[0].write(building)
        return found[0].lines()

    if settings.served_at and (folder / FILE).is_file():
        certified(folder)
        return ExportedStudent(folder, found[0])

    def finish(building: Path) -> Sequence[str]:
        if (building / INCLUDED).is_dir() and tied_and_adapted(building, AdapterBase(None)):
            _untie(building / INCLUDED)
        return certified(building) if settings.parity else ()

    if settings.merge:
        _export_merged(trained, folder, settings, report=report, repo=repo, finish=finish)
    else:
        export_adapter(
            train,
            folder,
            report=report,
            repo=repo,
            base_model=settings.base_model,
            check=settings.check,
            finish=finish,
        )
    return ExportedStudent(folder, next(iter(found), None))


def _export_merged(  # noqa: PLR0913 (what is written where, and what goes along)
    trained: Trained,
    folder: Path,
    settings: ExportSettings,
    *,
    report: Path | str | None,
    repo: str,
    finish: Finish,
) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{str(folder)!r} isn't empty: choose a new folder for the student.")
    base = find_base(trained, settings.base_model or INCLUDED)
    named = base.hub or _UNNAMED  # not base/, which would copy its weights
    with tempfile.TemporaryDirectory(prefix="distill-merge-") as scratch:
        adapter = Path(scratch) / "adapter"
        export_adapter(
            trained.folder, adapter, report=report, base_model=named, check=settings.check
        )
        with replacing(folder) as building:
            _merge(adapter, base, building, settings.dtype)
            its_own = shutil.ignore_patterns("adapter_*", "README.md")
            shutil.copytree(adapter, building, ignore=its_own, dirs_exist_ok=True)
            held_out = building / "check" / "rows.jsonl"
            card = student_card(
                trained,
                base,
                read_report(trained, report),
                repo,
                folder=building,
                held_out=held_out.read_bytes().count(b"\n") if held_out.is_file() else 0,
                said=finish(building),
            )
            (building / "README.md").write_text(card, encoding="utf-8")


def _merge(adapter: Path, base: AdapterBase, out: Path, dtype: str | None) -> None:
    """Write the base with the adapter in it, and the base's tokenizer."""
    from peft import PeftModel

    from distill_datasets.models.renderers import load_tokenizer

    model = load_plain(str(base.folder or base.hub), dtype)
    if model.config.tie_word_embeddings and adapts_embeddings(adapter):
        _separate(model)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    merged.save_pretrained(str(out))
    if base.folder is None:
        load_tokenizer(str(base.hub)).save_pretrained(str(out))
        return
    for pattern in BASE_FILES:
        for file in base.folder.glob(pattern):
            if not (out / file.name).exists() and not file.name.startswith("model"):
                shutil.copyfile(file, out / file.name)


def _separate(model: Any) -> None:
    """Give a model of one embedding matrix two: so the output alone can be changed."""
    import torch

    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False


def _untie(base: Path) -> None:
    """The same base with two matrices, over which `peft` loads an adapter of one as it is."""
    model = load_plain(base, None)
    _separate(model)
    for file in base.glob("model*.safetensors*"):
        file.unlink()
    model.save_pretrained(str(base))


@interruptible
def push_student(  # noqa: PLR0913 (what is pushed, where to, and what goes along)
    train: Path | str,
    repo: str,
    *,
    report: Path | str | None = None,
    private: bool = True,
    base_model: str | None = None,
    allow: Collection[str] = (),
    check: bool = True,
    parity: bool = True,
) -> PushedStudent:
    """Put a training's best checkpoint on the Hub as a PEFT adapter with its card, in one commit.

    Files of others stay, as does what people wrote into the card. Pushed again, it changes
    nothing. Before anything is sent the files are screened, and unless `parity` is False compared
    with the training's server; `allow` takes what `require_clean` does, the other arguments are
    those of `export_adapter`. Raises `ParityError`, `ScreeningError`, `RepositoryError` or
    `HubError` besides what that raises.
    """
    from distill_datasets.hub.screening import require_clean, screen

    recipe = None if private else read_training(train).recipe
    if not private and (recipe is None or recipe.license is None):
        raise RepositoryError(
            "A public student needs the licence of its training data, and the recipe states none: "
            "add `license:` to recipe.yaml and publish the dataset again, or push it privately."
        )
    hub.require_token()
    with tempfile.TemporaryDirectory(prefix="distill-adapter-") as scratch:
        folder = Path(scratch) / "student"
        settings = ExportSettings(base_model=base_model, check=check, parity=parity)
        export_student(train, folder, settings, report=report, repo=repo)
        require_clean(screen(folder), allow)
        with hub.explained(repo):
            hub.ensure_repository(repo, kind="model", private=private)
            return push_folder(folder, repo)


def push_folder(folder: Path, repo: str) -> PushedStudent:
    """Put an exported adapter into a model repository that is there, in one commit.

    It goes on the newest head; a lost answer is followed by a try that changes nothing.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    api, first, tries = HfApi(), "", 0
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    while True:
        head = str(hub.patiently(api.model_info, repo).sha)
        first = first or head
        card = _kept_card(api, repo, head, (folder / "README.md").read_text(encoding="utf-8"))
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
            overtaken = hub.overtaken(error) and tries + 1 < _MOST_TRIES
            if not overtaken and not hub.wait_after(error, tries):
                raise
            tries += 1


def _kept_card(api: "HfApi", repo: str, head: str, card: str) -> str:
    """The new card around what people wrote into the one that is there."""
    from huggingface_hub.errors import EntryNotFoundError

    from distill_datasets.releases.cards import card_text, merged, read_card

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

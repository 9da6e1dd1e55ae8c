"""What leaves is what was trained: exports beside their server, and every sabotage is found."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from distill_datasets.cli.main import main
from distill_datasets.embedded import process
from distill_datasets.embedded.process import Server
from distill_datasets.errors import ModelError
from distill_datasets.models import references
from distill_datasets.serving.export import ExportSettings, export_student, push_student
from distill_datasets.serving.parity import Certificate, ParityError, certify
from distill_datasets.training.adapter import read_training
from distill_datasets.training.checkpoints import TrainingFolder
from distill_datasets.training.trainer import train
from tests.support.serving import KEY, serving
from tests.support.shared_server import shared
from tests.support.training_runs import QUICK, ROWS, write

LOCAL_SERVER = references._server  # another stands in its place while the tiny model is served


@pytest.fixture(scope="module")
def students(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two trainings of one base on other answers; their checkpoints lie in the shared store."""
    folder = tmp_path_factory.mktemp("students")
    swapped = [{**row, "response": row["query"][::-1]} for row in ROWS]
    trained, settings = [], replace(QUICK, save_every=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingFolder, "draw", lambda folder: None)
        for name, rows in (("one", ROWS), ("two", swapped)):
            dataset = write(folder / f"{name}-data", train=rows[:16], validation=rows[16:20])
            trained.append(train(dataset, student=model, out=folder / name, settings=settings).path)
            (folder / name / "checkpoints").symlink_to(shared().store)
    return trained[0], trained[1]


@pytest.fixture(scope="module")
def exported(students: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "adapter"
    return export_student(students[0], folder, ExportSettings(base_model="base/")).folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def compare(students: tuple[Path, Path], folder: Path, **options: Any) -> Certificate:
    return certify(read_training(students[0]), folder, **options)


def test_an_adapter_is_the_student_within_the_noise_and_its_card_says_so(exported: Path) -> None:
    found = json.loads((exported / "parity.json").read_text())
    assert found["passed"] and found["problems"] == found["notes"] == []
    assert found["exported"]["mean"] <= 1e-5 == found["limit"]["mean"]
    assert found["effect"]["mean"] > 0.1
    assert found["exported"]["largest"] <= found["limit"]["largest"]
    card = (exported / "README.md").read_text()
    assert "Whether it is what was trained" in card and "rows: the same student" in card


def test_the_server_of_a_certificate_is_its_own_and_ends_with_it(
    students: tuple[Path, Path], exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, started = process.launch, list[Server]()

    def noted(*given: Any, **options: Any) -> Server:
        started.append(launch(*given, **options))
        return started[-1]

    monkeypatch.setattr(process, "launch", noted)
    monkeypatch.setattr(references, "_server", LOCAL_SERVER)
    others: dict[Any, Any] = {
        (shared().model, (students[0] / "checkpoints").resolve(), None): shared().server
    }
    monkeypatch.setattr(references, "_SERVERS", others)
    assert compare(students, exported).passed
    assert [(one.dtype, one.alive) for one in started] == [("fp32", False)]
    assert list(others.values()) == [shared().server] and shared().server.alive


def test_peft_loads_the_adapter_without_a_warning_over_a_base_with_two_embeddings(
    exported: Path,
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(exported / "base")
    assert base.config.tie_word_embeddings is False, "the tiny model's own are tied"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(base, exported)


def test_merged_weights_are_the_student_in_any_number_format(
    students: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["export", str(students[0]), "--out", str(tmp_path / "merged"), "--merge"]
    assert main([*asked, "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "the same student" in said and "convert_hf_to_gguf.py" in said
    merged = tmp_path / "merged"
    assert not {"base", "adapter_config.json"} & {one.name for one in merged.iterdir()}
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    found = json.loads((merged / "parity.json").read_text())
    assert found["floor"]["mean"] > 1e-4 and found["passed"], "noise is measured, not assumed"
    assert "PeftModel" not in (merged / "README.md").read_text()


Students = tuple[Path, Path]


def checkpoint(train: Path) -> Path:
    """The folder of a training's best checkpoint."""
    run, kind, name = (
        read_training(train).checkpoint["sampler"].removeprefix("tinker://").split("/")
    )
    return shared().store / run.replace(":", "_") / kind / name


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def rename(folder: Path, _: Students) -> None:
    """Keys without the prefix that peft writes."""
    file = folder / "adapter_model.safetensors"
    tensors = {name.removeprefix("base_model.model."): one for name, one in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def exchange(folder: Path, students: Students) -> None:
    """The adapter of another training."""
    shutil.copyfile(
        checkpoint(students[1]) / "adapter_model.safetensors", folder / "adapter_model.safetensors"
    )


def step_back(folder: Path, students: Students) -> None:
    """The adapter of an earlier step of the same training."""
    own = checkpoint(students[0])
    *_, earlier = sorted(one for one in own.parent.iterdir() if one != own)
    shutil.copyfile(earlier / "adapter_model.safetensors", folder / "adapter_model.safetensors")


def ignore(folder: Path, _: Students) -> None:
    """An adapter that changes nothing."""
    configure(folder, lora_alpha=0)


def retell(folder: Path, _: Students) -> None:
    """A template with a system message of its own."""
    file = folder / "base" / "chat_template.jinja"
    file.write_text("<|im_start|>system\nYou are helpful.<|im_end|>\n" + file.read_text())


def rescale(folder: Path, _: Students) -> None:
    """A scale that another server might read otherwise."""
    configure(folder, use_rslora=True)


def nudge(folder: Path, _: Students) -> None:
    """A scale that is wrong by a hundredth."""
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    configure(folder, lora_alpha=alpha * 1.01)


def quantise(folder: Path, _: Students) -> None:
    """A base of eight bits a weight."""
    file = folder / "base" / "model.safetensors"
    steps = {name: abs(one).max() / 127 for name, one in load_file(file).items()}
    tensors = {
        name: (one / steps[name]).round() * steps[name] for name, one in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


ANOTHER = "is another model, or has another adapter"
SABOTAGE: dict[Callable[[Path, Students], None], str] = {
    rename: "tensors have names that nobody looks for",
    exchange: ANOTHER,
    step_back: ANOTHER,
    ignore: "answers as the base does: the adapter isn't applied",
    retell: "the chat template that was exported makes other tokens",
    rescale: ANOTHER,
    nudge: ANOTHER,
    quantise: ANOTHER,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spoil", SABOTAGE, ids=lambda one: one.__name__)
def test_each_sabotage_is_found(
    spoil: Callable[[Path, Students], None], students: tuple[Path, Path], folder: Path
) -> None:
    spoil(folder, students)
    found = compare(students, folder)
    assert not found.passed
    assert any(SABOTAGE[spoil] in one for one in found.problems), found.problems
    with pytest.raises(ParityError, match="NOT the same student"):
        found.require()


def test_an_adapter_with_the_wrong_names_is_also_one_that_is_not_applied(
    students: tuple[Path, Path], folder: Path
) -> None:
    rename(folder, students)
    assert any("isn't applied" in one for one in compare(students, folder).problems)


def test_what_is_not_the_student_is_neither_exported_nor_pushed(
    students: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill_datasets.training import adapter

    written = adapter._write

    def spoiled(building: Path, *given: Any) -> None:
        written(building, *given)
        ignore(building, students)

    monkeypatch.setattr(adapter, "_write", spoiled)
    with pytest.raises(ParityError, match="the adapter isn't applied"):
        export_student(students[0], tmp_path / "out", ExportSettings(base_model="base/"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    with pytest.raises(ParityError, match="the adapter isn't applied"):
        push_student(students[0], "me/student", base_model="base/")  # no Hub is there to be asked
    unseen = ExportSettings(base_model="base/", parity=False)
    assert not (
        export_student(students[0], tmp_path / "out", unseen).folder / "parity.json"
    ).exists()


@pytest.fixture(scope="module")
def served(students: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of OpenAI's protocol with the first student, on a copy of its store."""
    store = tmp_path_factory.mktemp("served") / "store"
    shutil.copytree(shared().store, store, ignore=shutil.ignore_patterns("*lock*"))
    path = read_training(students[0]).checkpoint["sampler"]
    with (
        pytest.MonkeyPatch.context() as patch,
        serving(shared().model, store=store, students={"student": path}) as address,
    ):
        patch.setenv("OPENAI_API_KEY", KEY)
        yield address.openai


def test_a_student_behind_an_address_is_told_from_its_base_and_from_another_prompt(
    served: str, students: tuple[Path, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    settings = ExportSettings(served_at=served, served_as="student")
    again = export_student(students[0], folder, settings).certificate
    assert again and again.passed and again.served and again.served.mean <= 1e-5
    assert json.loads((folder / "parity.json").read_text())["served_at"] == served
    base = compare(students, folder, served_at=served, served_as=shared().model.name)
    assert base.problems == (
        f"what {served} has answers as the base does: the adapter isn't applied",
    )
    with pytest.raises(ModelError, match="name the student among them with --served-as"):
        compare(students, folder, served_at=served)

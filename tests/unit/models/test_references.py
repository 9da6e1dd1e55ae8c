"""What a reference names."""

import json
from pathlib import Path

import pytest

from distill_datasets.errors import ModelError
from distill_datasets.models.references import (
    connect,
    default_student,
    find_training,
    open_sampler,
    read_training,
)

CONFIG = {"student": "pocket", "renderer": "qwen3_instruct"}


def line(name: str, *, best: bool = False) -> str:
    return json.dumps({"name": name, "sampler": f"tinker://{name}", "best": best})


@pytest.fixture
def training(tmp_path: Path) -> Path:
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "checkpoints.jsonl").write_text(f"{line('a', best=True)}\n{line('b')}\n")
    return folder


def test_a_training_is_found_by_its_folder_or_the_runs(training: Path) -> None:
    assert find_training(str(training.parent)) == find_training(training) == training
    assert find_training("pocket") is None


def test_a_training_names_its_best_checkpoint(training: Path) -> None:
    config, checkpoint = read_training(training)
    assert (config, checkpoint["name"]) == (CONFIG, "a")


def test_a_damaged_line_is_left_out(training: Path) -> None:
    whole = (training / "checkpoints.jsonl").read_text()
    damaged = f'{whole}{{"name"\n[]\n5\n{{"best": true}}\n{line("c", best=True)}\n{{"best": tr'
    (training / "checkpoints.jsonl").write_text(damaged)
    assert read_training(training)[1]["name"] == "c"


@pytest.mark.parametrize("text", ["", "\n", '{"best": tr', line("a")])
def test_a_training_without_a_finished_checkpoint_says_so(text: str, training: Path) -> None:
    (training / "checkpoints.jsonl").write_text(text)
    with pytest.raises(ModelError, match="no finished checkpoint: run `train` again"):
        read_training(training)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "{}", '{"student": "pocket"}'])
def test_a_damaged_configuration_is_named(text: str, training: Path) -> None:
    (training / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json' is not a training's, or damaged"):
        connect(training)
    (training / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json' is not a training's, or damaged"):
        open_sampler(training)


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("OpenAI:mock", r"Did you mean 'openai:'\?"),
        ("poket", r"Unknown model reference 'poket': expected .*Did you mean 'pocket'\?"),
        ("openai:m", "answers, and can't be trained"),
        ("embedded:nothing", "is no model: expected a folder with config.json"),
        ("embedded:/nothing", "is no model: expected a folder with config.json"),
        ("tinker://run/weights/final", "a training state"),
    ],
)
def test_what_names_nothing_says_what_would(reference: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        connect(reference)


def test_only_some_models_take_processes_or_streams() -> None:
    with pytest.raises(ModelError, match="Only Tinker's models take several processes"):
        open_sampler("openai:m", processes=2)
    with pytest.raises(ModelError, match="Only 'openai:' models are streamed"):
        open_sampler("pocket", stream=True)


@pytest.mark.parametrize("teacher", ["pocket", "tinker:Qwen/Qwen3-8B", "embedded:models/smol"])
def test_a_teacher_that_can_be_trained_is_the_student_where_none_is_named(teacher: str) -> None:
    assert default_student(teacher) == teacher


@pytest.mark.parametrize(
    "teacher", ["openai:gpt-5", "tinker://run/sampler_weights/x", "a + b", "runs/train", None]
)
def test_any_other_teachers_student_must_be_named(teacher: str | None) -> None:
    with pytest.raises(ModelError, match="Name the student with --student"):
        default_student(teacher)

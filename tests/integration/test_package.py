"""What is installed, and how it starts."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import distill_datasets
from tests.support import forks
from tests.support.forks import ROOT

HEAVY = {"torch", "transformers", "tinker", "tinker_cookbook", "evaluate", "peft", "matplotlib"}


def test_starting_up_imports_nothing_heavy() -> None:
    script = (
        "import sys, contextlib, io\n"
        "import distill_datasets\n"
        "from distill_datasets.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    try: main(['--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "distill_datasets" in loaded
    assert not loaded & HEAVY


def test_a_model_loads_without_torchs_compiler_which_is_there_when_it_is_wanted(
    tmp_path: Path,
) -> None:
    script = (
        "import sys, torch\n"
        "from distill_datasets.embedded.model import ModelCard, load_model\n"
        "from distill_datasets.files import pocket_folder\n"
        "from distill_datasets.models.renderers import load_tokenizer\n"
        "load_tokenizer(str(pocket_folder()))\n"
        "load_model(ModelCard.read(pocket_folder(), 'pocket', 'auto'))\n"
        "assert not {'sklearn', 'torch._dynamo'} & {*sys.modules}\n"
        "print(torch.compile(lambda number: number + 1, backend='eager')(torch.ones(1)).item())\n"
        "print(torch._dynamo.__file__)"
    )
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    run = forks.run(["-c", script], env=env, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    number, file = run.stdout.split()
    assert number == "2.0" and file.endswith("_dynamo/__init__.py")


def test_every_public_name_can_be_imported() -> None:
    for name in distill_datasets.__all__:
        assert getattr(distill_datasets, name).__module__.startswith("distill_datasets.")


def test_the_wheel_adds_one_top_level_name_and_ships_its_data(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        check=True,
        capture_output=True,
        cwd=ROOT,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"distill_datasets"}
    assert {
        "distill_datasets/py.typed",
        "distill_datasets/cards/dataset.md",
        "distill_datasets/builders/language_id/recipe.yaml",
        "distill_datasets/embedded/pocket/model.safetensors",
        "distill_datasets/embedded/pocket/tokenizer.json",
    } <= names
    script = (
        "from distill_datasets.recipes.loading import load_recipe; "
        "print(load_recipe('language_id').folder)"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
    )
    assert run.stdout.strip() == str(tmp_path / "site/distill_datasets/builders/language_id")

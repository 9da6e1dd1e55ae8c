"""What is installed, and how it starts."""

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

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

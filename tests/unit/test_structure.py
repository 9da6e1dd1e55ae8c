"""What keeps the project in shape: public names, import arrows, start-up, the wheel."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import distill_datasets
from tests.support.source import parse

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "distill_datasets"
HEAVY = {"torch", "transformers", "tinker", "tinker_cookbook", "evaluate", "peft", "matplotlib"}


# Every arrow between folders that the package has. What lies beside the folders is ground: anybody
# may import it, and it imports no folder.
ARROWS = {
    "cli": {
        "serving",
        "evaluation",
        "training",
        "synthesis",
        "releases",
        "generation",
        "recipes",
        "models",
    },
    "serving": {
        "evaluation",
        "training",
        "releases",
        "generation",
        "recipes",
        "models",
        "embedded",
        "hub",
    },
    "evaluation": {
        "training",
        "synthesis",
        "releases",
        "generation",
        "recipes",
        "models",
        "hub",
    },
    "training": {"releases", "generation", "recipes", "models", "hub"},
    "synthesis": {"generation", "recipes", "models"},
    "releases": {"generation", "recipes", "models", "hub"},
    "generation": {"recipes", "models", "hub"},
    "recipes": {"models", "hub"},
    "models": {"embedded"},
    "embedded": set(),
    "hub": set(),
    "ground": set(),
}


def folder_of(module: str) -> str:
    """The folder of a module of ours, by its dotted name."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else "ground"


def imported(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, those inside functions too, by their full names."""
    here = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*here.split(".")[: -node.level], *([base] if base else [])])
            names = [f"{base}.{one.name}" for one in node.names]
        else:
            continue
        yield from (name for name in names if name.startswith("distill_datasets."))


def test_the_public_names_are_those_that_can_be_imported() -> None:
    assert distill_datasets.__all__ == sorted(distill_datasets.__all__)
    for name in distill_datasets.__all__:
        assert getattr(distill_datasets, name).__module__.startswith("distill_datasets.")
    assert len(distill_datasets.__all__) <= 15


def test_folders_import_only_along_the_arrows() -> None:
    found: dict[str, set[str]] = {folder: set() for folder in ARROWS}
    # The front door names everybody, lazily; `python -m` is the command line's.
    for path in set(PACKAGE.rglob("*.py")) - {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}:
        here = folder_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        found[here] |= {folder_of(name) for name in imported(path)} - {here, "ground"}
    assert found == ARROWS


def test_a_folder_has_at_most_twenty_modules() -> None:
    for folder in PACKAGE.glob("*/__init__.py"):
        assert len(list(folder.parent.rglob("*.py"))) <= 20, folder.parent.name


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


def test_the_readme_stays_short_and_its_tree_names_every_folder() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 160
    begin = lines.index("distill_datasets/") + 1
    tree = lines[begin : lines.index("```", begin)]
    folders = {line.split()[0] for line in tree if line.startswith("  ")}
    assert {f"{folder}/" for folder in ARROWS if folder != "ground"} <= folders


def test_the_readme_runs_the_commands_that_the_makefile_has() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target}" in readme
        assert f"\n{target}:" in makefile

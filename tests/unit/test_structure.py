"""What keeps the project in shape: public names, import arrows, start-up, the wheel."""

import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import distill_datasets

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "distill_datasets"
PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
HEAVY = {"torch", "transformers", "tinker", "tinker_cookbook", "evaluate", "peft", "matplotlib"}


_IMPORT = re.compile(
    r"^\s*(?:from|import) distill_datasets(?:\.(\w+))?[\w.]*(?: import (\([^)]*\)|[^\n]*))?",
    re.MULTILINE,
)


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, wherever in it, without the package's name."""
    modules = {file.stem for file in PACKAGE.glob("*.py")} | set(PACKAGES)
    found = set()
    for module, names in _IMPORT.findall(path.read_text(encoding="utf-8")):
        found |= {module} if module else set(re.findall(r"\w+", names))
    return found & modules


def test_the_public_names_are_those_that_can_be_imported() -> None:
    assert distill_datasets.__all__ == sorted(distill_datasets.__all__)
    for name in distill_datasets.__all__:
        assert getattr(distill_datasets, name).__module__.startswith("distill_datasets.")
    assert len(distill_datasets.__all__) <= 15


def test_training_needs_only_a_dataset() -> None:
    build_half = {"recipe", "queries", "generation", "asking", "release", "card", "report"}
    train_half = [*PACKAGE.glob("train*.py"), PACKAGE / "student.py"]
    assert len(train_half) > 2
    for path in train_half:
        assert not imports(path) & build_half, path.name


def test_a_release_is_written_without_asking_anybody() -> None:
    assert not imports(PACKAGE / "release.py") & {"generation", "samplers", "connection"}


def test_only_a_model_reference_leads_to_the_embedded_server() -> None:
    users = {path.stem for path in PACKAGE.glob("*.py") if "embedded" in imports(path)}
    assert users == {"connection"}
    assert all("embedded" not in imports(path) for path in (PACKAGE / "samplers").glob("*.py"))


def test_the_embedded_server_knows_the_rest_only_by_the_wire() -> None:
    for path in (PACKAGE / "embedded").rglob("*.py"):
        assert imports(path) <= {"errors", "embedded", "resources"}, path


def test_arrows_go_one_way() -> None:
    arrows = {path.stem: imports(path) for path in PACKAGE.glob("*.py")}
    for package in PACKAGES:
        files = (PACKAGE / package).rglob("*.py")
        arrows[package] = set().union(*map(imports, files)) - {package}
    arrows.pop("__init__")

    def below(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        for used in sorted(arrows.get(module, set())):
            below(used, (*path, module))

    for module in arrows:
        below(module, ())


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
        "from distill_datasets.recipes.recipe import shipped_recipes as s; print(s()[0].folder)"
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


def test_the_readme_stays_short_and_its_tree_names_real_files() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    begin = lines.index("distill_datasets/") + 1
    tree = lines[begin : lines.index("```", begin)]
    named = {word for line in tree for word in line.split() if word.endswith((".py", "/"))}
    modules = {path.name for path in PACKAGE.glob("[!_]*.py")}
    assert modules | {f"{package}/" for package in PACKAGES} <= named


def test_the_readme_runs_the_commands_that_the_makefile_has() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target}" in readme
        assert f"\n{target}:" in makefile

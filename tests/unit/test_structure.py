"""What keeps the project in shape: public names, import arrows, the README."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import distill_datasets
from tests.support.source import parse

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "distill_datasets"
# What imports, wherever it stands: to parse the lines of these alone takes a tenth of the time.
IMPORTS = re.compile(r"^ *(?:from [\w.]+ import (?:\([^)]*\)|.+)|import .+)", re.MULTILINE)


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
    lines = "\n".join(map(dedent, IMPORTS.findall(path.read_text(encoding="utf-8"))))
    for node in parse(lines).body:
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


def test_the_public_names_are_defined_where_they_are_looked_for() -> None:
    assert distill_datasets.__all__ == sorted(distill_datasets._HOMES)
    for name, home in distill_datasets._HOMES.items():
        source = (PACKAGE / home.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        assert re.search(rf"^(?:class|def) {name}\b", source, re.MULTILINE), name
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


def test_a_folders_first_page_names_every_file_in_it() -> None:
    for page in (PACKAGE / "__init__.py", *PACKAGE.glob("*/__init__.py")):
        files = {path.name for path in page.parent.glob("*.py")} - {page.name, "__main__.py"}
        text = page.read_text(encoding="utf-8")
        assert {name for name in files if name not in text} == set(), page


def test_every_page_names_modules_and_names_that_are_there() -> None:
    own = [*ROOT.glob("docs/*.md"), *ROOT.glob("cards/*.md"), *PACKAGE.rglob("README.md")]
    for page in [ROOT / "README.md", *own]:
        text = page.read_text(encoding="utf-8")
        for home, names in re.findall(r"^from (distill_datasets.*) import ([\w, ]*\w)", text, re.M):
            if home == PACKAGE.name:
                assert {*names.split(", ")} <= {*distill_datasets.__all__}, page
                continue
            source = (ROOT / home.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
            for name in names.split(", "):
                assert re.search(rf"^(?:class|def) {name}\b", source, re.M), (page, home, name)
        for module in re.findall(r"\btests\.(?:benchmarks|pocket)\.\w+", text):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), (page, module)

"""What every test shares: an environment with no key, no network and no progress bars."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.panels import models  # noqa: F401 - a fixture

if TYPE_CHECKING:
    from distill_datasets.recipes.recipe import Recipe

# Sessions of servers that have ended would go on complaining until the last line is printed.
logging.getLogger("tinker.lib.internal_client_holder").setLevel(logging.CRITICAL)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TINKER_TELEMETRY"] = "0"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = "1"  # one worker a core is busy enough
# Thousands of small files are made, synchronised and deleted: in memory, where there is room.
_MEMORY = Path("/dev/shm")
if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 8 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What tests import stays: garbage is not looked for in it, now or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    tinker, openai = ("TINKER_API_KEY", "TINKER_BASE_URL"), ("OPENAI_API_KEY", "OPENAI_BASE_URL")
    for name in (*tinker, *openai, "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def edit(folder: Path, name: str, old: str, new: str) -> None:
    """Change one piece of a file that must have it."""
    path = folder / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def many(folder: Path, count: int) -> Recipe:
    """The recipe of `recipe_folder` with so many other queries, each a group of its own."""
    from distill_datasets.recipes.loading import load_recipe

    rows = (json.dumps({"query": f"thing {n}, colour red"}) for n in range(count))
    (folder / "queries.jsonl").write_text("\n".join(rows))
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace(", group: family, reference: colour", ""))
    return load_recipe(folder)


@pytest.fixture
def recipe_folder(tmp_path: Path) -> Path:
    """A recipe of six queries in three groups, answered by echoing."""
    folder = tmp_path / "colours"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(
        "name: colours\n"
        "description: Which colour is it?\n"
        "teacher: pocket\n"
        "queries: {file: queries.jsonl, group: family, reference: colour}\n"
        "answer: {pattern: 'colour (?P<answer>\\w+)', choices: [red, blue]}\n"
        "response: 'It is {{ answer }}.'\n"
        "license: apache-2.0\n"
        "languages: [en]\n"
    )
    (folder / "prompt.md").write_text("Name the colour of the thing. Say: colour NAME.\n")
    (folder / "queries.jsonl").write_text(
        '{"query": "a rose, colour red", "family": "plants", "colour": "red"}\n'
        '{"query": "a poppy, colour red", "family": "plants", "colour": "red"}\n'
        '{"query": "the sky, colour blue", "family": "nature", "colour": "blue"}\n'
        '{"query": "the sea, colour blue", "family": "nature", "colour": "blue"}\n'
        '{"query": "a car, colour green", "family": "things", "colour": null}\n'
        '{"query": "a thought", "family": "things", "colour": null}\n'
    )
    return folder

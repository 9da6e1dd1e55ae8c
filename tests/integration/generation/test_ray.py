"""On Ray only where it is installed: it is large, and starts more slowly than other tests run."""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from distill_datasets.errors import GenerationError, ModelError, SettingsError
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.run import generate, generate_on_ray
from distill_datasets.generation.shards import Share
from distill_datasets.models.sampler import Echo, Reply, Sampling
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.releases.release import publish
from distill_datasets.schema import Message
from tests.conftest import edit
from tests.support.conversations import Talker, talks, user


@dataclass
class Marked(Echo):
    """Leaves a file for every request; refuses everything while `broken` is there."""

    folder: str = ""

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        if (Path(self.folder) / "broken").exists() and messages[-1]["content"].endswith("7"):
            raise ModelError("gone")
        reply = await super().sample(messages, sampling)
        name = messages[-1]["content"].replace(" ", "_")
        path = Path(self.folder) / name
        path.write_text(f"{int(path.read_text()) + 1 if path.exists() else 1}")
        return reply


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100_000_000,
    )
    yield
    ray.shutdown()


@pytest.fixture
def recipe(recipe_folder: Path) -> Recipe:
    rows = ({"query": f"thing {n}", "family": f"family {n % 9}"} for n in range(40))
    (recipe_folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    edit(recipe_folder, "recipe.yaml", ", reference: colour", "")
    edit(recipe_folder, "recipe.yaml", "answer: {pattern", "#")
    return load_recipe(recipe_folder)


def test_without_ray_the_extra_is_named(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match=r"distill-datasets\[ray\]"):
        generate_on_ray(recipe, out=tmp_path / "run", parts=2, teacher=Echo())


def test_a_run_has_parts(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="at least one part"):
        generate_on_ray(recipe, out=tmp_path / "run", parts=0)


@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_parts_made_on_ray_publish_as_one_run_and_are_continued_one_by_one(
    recipe: Recipe, tmp_path: Path
) -> None:
    asked = tmp_path / "asked"
    asked.mkdir()
    (asked / "broken").touch()
    teacher = Marked(folder=str(asked))
    with pytest.raises(GenerationError, match="of 4 parts failed: part .*ModelError: gone"):
        generate_on_ray(recipe, out=tmp_path / "run", parts=4, teacher=teacher)
    (asked / "broken").unlink()
    made = generate_on_ray(recipe, out=tmp_path / "run", parts=4, teacher=teacher)
    assert (made.rows, made.errors) == (40, 0)
    assert {path.read_text() for path in asked.iterdir()} == {"1"}  # nothing was bought twice
    generate(recipe, teacher=Echo(), out=tmp_path / "whole")
    assert publish(made.path).digest == publish(tmp_path / "whole").digest

    # A part that is lost is made again, and the others are left as they are.
    kept = Share(2, 4).folder(made.path) / "answers/generation.json"
    before = kept.stat().st_mtime_ns
    shutil.rmtree(Share(1, 4).folder(made.path))
    again = generate_on_ray(recipe, out=tmp_path / "run", parts=4, teacher=teacher)
    assert again.rows == 40
    assert kept.stat().st_mtime_ns == before


@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_conversations_of_which_every_turn_is_answered_go_on_where_a_part_broke_off(
    tmp_path: Path,
) -> None:
    rows = [[user(f"Hello {n}"), user(f"Bye {n}")] for n in range(6)]
    recipe = load_recipe(talks(tmp_path / "recipe", rows, turns="all"))
    broken = generate_on_ray(recipe, out=tmp_path / "run", parts=2, teacher=Talker(most=3))
    assert broken.errors > 0
    made = generate_on_ray(recipe, out=tmp_path / "run", parts=2, teacher=Talker())
    assert (made.rows, made.errors) == (6, 0)
    bought = []
    for number in (1, 2):
        with Journal(Share(number, 2).folder(made.path) / "journal.sqlite") as journal:
            bought += [times for _, times in journal]
    assert bought == [1] * 12
    generate(recipe, teacher=Talker(), out=tmp_path / "whole")
    assert publish(made.path).digest == publish(tmp_path / "whole").digest

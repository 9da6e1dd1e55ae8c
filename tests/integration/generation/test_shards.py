import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from datasets import load_dataset
from pyarrow.parquet import read_table

from distill_datasets.errors import DatasetError, OutputError, RecipeError
from distill_datasets.generation.pricing import Meter, Prices
from distill_datasets.generation.run import generate
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.generation.shards import Share
from distill_datasets.models.sampler import Echo
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.queries import load_queries
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.recipes.sections import SplitShares
from distill_datasets.releases.release import Release, publish
from tests.conftest import edit


@pytest.fixture
def recipe(recipe_folder: Path) -> Recipe:
    """Forty rows in fourteen groups, some equal, some that come to nothing."""
    rows = [
        {
            "query": f"thing {n % 37}, colour {('red', 'blue', 'green')[n % 3]}",
            "family": f"family {n * 5 % 14}",
        }
        for n in range(40)
    ]
    (recipe_folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    edit(recipe_folder, "recipe.yaml", ", reference: colour", "")
    return load_recipe(recipe_folder)


def in_parts(recipe: Recipe, out: Path, numbers: Sequence[int], count: int = 3) -> None:
    for number in numbers:
        generate(recipe, teacher=Echo(), out=out, share=Share(number, count))


def rows_of(release: Release) -> dict[str, list[object]]:
    return {
        path.parent.name + "/" + path.name: read_table(path).to_pylist()
        for path in sorted(release.path.glob("*/*.parquet"))
        if path.parent.name != "ledger"
    }


@pytest.mark.parametrize(("count", "samples"), [(1, 1), (3, 3), (16, 1)])
def test_parts_publish_as_what_one_run_would_have_made(
    recipe: Recipe, tmp_path: Path, count: int, samples: int
) -> None:
    recipe = recipe.replace(sampling={"n": samples})
    generate(recipe, teacher=Echo(), out=tmp_path / "whole")
    in_parts(recipe, tmp_path / "parts", range(1, count + 1), count)
    whole, joined = publish(tmp_path / "whole"), publish(tmp_path / "parts")
    assert joined.digest == whole.digest
    assert rows_of(joined) == rows_of(whole)
    manifests = [json.loads((one.path / "manifest.json").read_text()) for one in (whole, joined)]
    for manifest in manifests:  # the raw answers come in the order of the parts
        digests = manifest["sha256"].items()
        manifest["sha256"] = {name: one for name, one in digests if "ledger/" not in name}
    assert manifests[0] == manifests[1]
    assert joined.path == tmp_path / "parts/release"


def test_a_release_of_parts_carries_every_answer_once(recipe: Recipe, tmp_path: Path) -> None:
    in_parts(recipe, tmp_path / "run", [1, 2, 3])
    release = publish(tmp_path / "run")
    ledger = load_dataset(str(release.path), "ledger", cache_dir=str(tmp_path / "cache"))["ledger"]
    different = len(set(load_queries(recipe)["query"]))
    assert len(ledger) == len(set(ledger["digest"])) == different
    teacher = Echo()
    generate(release.path, teacher=teacher, out=tmp_path / "again")
    assert teacher.calls == 0


def test_parts_from_several_machines_make_one_release(recipe: Recipe, tmp_path: Path) -> None:
    in_parts(recipe, tmp_path / "a", [2])
    in_parts(recipe, tmp_path / "b", [1, 3])
    generate(recipe, teacher=Echo(), out=tmp_path / "whole")
    with pytest.raises(OutputError, match="needs a place"):
        publish([tmp_path / "a", tmp_path / "b"])
    joined = publish([tmp_path / "a", tmp_path / "b"], out=tmp_path / "release")
    by_part = [
        Share(n, 3).folder(tmp_path / folder) for n, folder in ((1, "b"), (3, "b"), (2, "a"))
    ]
    assert publish(by_part, out=tmp_path / "release").version == joined.version
    assert joined.digest == publish(tmp_path / "whole").digest


def test_missing_parts_are_named(recipe: Recipe, tmp_path: Path) -> None:
    in_parts(recipe, tmp_path / "run", [2], 4)
    Share(3, 4).folder(tmp_path / "run").mkdir()  # begun, and killed
    with pytest.raises(DatasetError, match="3 of 4 parts are missing: 1/4, 3/4, 4/4"):
        publish(tmp_path / "run")


def test_a_part_that_was_begun_only_is_not_published(tmp_path: Path) -> None:
    Share(1, 2).folder(tmp_path).mkdir()
    with pytest.raises(DatasetError, match="None of the 1 parts"):
        publish(tmp_path)


def test_parts_of_different_wholes_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    in_parts(recipe, tmp_path / "run", [1], 2)
    in_parts(recipe, tmp_path / "run", [1], 3)
    with pytest.raises(DatasetError, match="expected parts of one whole"):
        publish(tmp_path / "run")


def test_a_part_given_twice_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    in_parts(recipe, tmp_path / "run", [1, 2], 2)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with pytest.raises(DatasetError, match="Share 1/2 is there twice"):
        publish([tmp_path / "run", tmp_path / "copy"], out=tmp_path / "release")


def test_a_whole_run_is_no_part(recipe: Recipe, tmp_path: Path) -> None:
    in_parts(recipe, tmp_path / "run", [1, 2], 2)
    generate(recipe, teacher=Echo(), out=tmp_path / "whole")
    with pytest.raises(DatasetError, match="is a whole run"):
        publish([tmp_path / "run", tmp_path / "whole"], out=tmp_path / "release")


@pytest.mark.parametrize(
    ("change", "key"),
    [({"sampling": {"temperature": 0.5}}, "recipe_digest"), ({"name": "other"}, "recipe_digest")],
)
def test_parts_of_different_recipes_are_refused(
    recipe: Recipe, tmp_path: Path, change: dict[str, object], key: str
) -> None:
    in_parts(recipe, tmp_path / "run", [1], 2)
    in_parts(recipe.replace(**change), tmp_path / "run", [2], 2)
    with pytest.raises(DatasetError, match=f"its '{key}' is"):
        publish(tmp_path / "run")


def test_parts_of_different_teachers_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    in_parts(recipe, tmp_path / "run", [1], 2)
    generate(recipe, teacher=Echo("so: {text}"), out=tmp_path / "run", share=Share(2, 2))
    with pytest.raises(DatasetError, match="its 'identity' is 'echo/so"):
        publish(tmp_path / "run")


def test_parts_of_different_queries_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    in_parts(recipe, tmp_path / "run", [1], 2)
    generate(
        recipe,
        teacher=Echo(),
        out=tmp_path / "run",
        share=Share(2, 2),
        settings=GenerateSettings(limit=20),
    )
    with pytest.raises(DatasetError, match="other queries or with another --limit"):
        publish(tmp_path / "run")


def test_answers_that_are_not_those_of_their_share_are_refused(
    recipe: Recipe, tmp_path: Path
) -> None:
    in_parts(recipe, tmp_path / "run", [1, 2], 2)
    first, second = (Share(n, 2).folder(tmp_path / "run") / "answers" for n in (1, 2))
    shutil.copy(first / "places.npy", second / "places.npy")
    with pytest.raises(DatasetError, match="but says that it answers"):
        publish(tmp_path / "run")


def test_a_part_is_continued_and_costs_nothing_twice(recipe: Recipe, tmp_path: Path) -> None:
    in_parts(recipe, tmp_path / "run", [1])
    teacher = Echo()
    generate(recipe, teacher=teacher, out=tmp_path / "run", share=Share(1, 3))
    assert teacher.calls == 0
    generate(recipe, teacher=teacher, out=tmp_path / "run", share=Share(2, 3))
    assert teacher.calls > 0


def test_every_group_is_in_one_share_and_no_share_knows_the_split() -> None:
    groups = [f"group {n}" for n in range(4_000)]
    shares = [Share(n, 4) for n in range(1, 5)]
    held = [[group for group in groups if share.holds(group)] for share in shares]
    assert sorted(sum(held, [])) == sorted(groups)
    for groups_of_share in held:
        assert 900 < len(groups_of_share) < 1_100
        trained = sum(SplitShares().of(group) == "train" for group in groups_of_share)
        assert 0.65 < trained / len(groups_of_share) < 0.75


def test_added_queries_move_no_group_to_another_share(recipe: Recipe) -> None:
    queries = load_queries(recipe)
    few = Share(2, 3).of(queries.select(range(20)))
    assert Share(2, 3).of(queries)["id"][: len(few)] == few["id"][:]


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0", "1", "a/b", "1/2/3", "-1/4"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="expected"):
        Share.parse(text)


def test_a_share_is_written_as_it_is_read() -> None:
    assert Share.parse("3/64") == Share(3, 64)
    assert str(Share(3, 64)) == "3/64"
    assert Share(3, 64).folder("out") == Path("out/part-00003-of-00064")


def test_what_the_parts_cost_adds_up_where_every_part_says_it(
    recipe: Recipe, tmp_path: Path
) -> None:
    price = {"echo": {"prompt": 1, "response": 2}}
    prices = [Prices(date=f"2026-11-{n:02}", currency="EUR", models=price) for n in (1, 2)]
    meters = [Meter(one) for one in prices]
    for number, meter in enumerate(meters, 1):
        share = Share(number, 2)
        generate(recipe, teacher=Echo(), out=tmp_path / "run", share=share, meter=meter)
    assert cost_of(publish(tmp_path / "run")) == {
        "amount": pytest.approx(sum(meter.spent for meter in meters)),
        "currency": "EUR",
        "priced_at": "2026-11-01, 2026-11-02",
    }
    in_parts(recipe, tmp_path / "run", [2], 2)  # without prices
    assert cost_of(publish(tmp_path / "run")) is None


def cost_of(release: Release) -> dict[str, object] | None:
    cost: dict[str, object] | None = json.loads((release.path / "manifest.json").read_text())[
        "cost"
    ]
    return cost


@pytest.mark.parametrize("file", ["share.json", "places.npy"])
def test_a_part_that_is_damaged_is_named(file: str, recipe: Recipe, tmp_path: Path) -> None:
    in_parts(recipe, tmp_path / "run", [1, 2], 2)
    (tmp_path / "run/part-00002-of-00002/answers" / file).write_bytes(b"")
    with pytest.raises(DatasetError, match="part-00002-of-00002/answers' is damaged"):
        publish(tmp_path / "run")

"""Whatever is read from the Hub is one commit: that of the revision, or an error."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow.parquet import write_table

from distill_datasets.generation.run import generate
from distill_datasets.hub.references import split_config
from distill_datasets.models.sampler import Echo
from distill_datasets.releases.release import publish
from tests.conftest import edit
from tests.support.hub_fixture import Hub

NAME = "me/things"
RECIPE = """
name: things
description: What is it?
teacher: pocket
queries: {{hub: {name}, revision: {revision}, split: {split}}}
"""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: data/train-*}]
- config_name: other
  data_files: [{split: train, path: other/train-*}]
---
"""


def parquet(**columns: list[Any]) -> bytes:
    file = io.BytesIO()
    write_table(pa.table(columns), file)
    return file.getvalue()


def put(hub: Hub, queries: list[str], *, tag: str = "") -> str:
    """Commit a dataset of queries, and tag it; its commit."""
    if ("datasets", NAME) not in hub.server.store.repositories:
        hub.create(NAME)
    rows = parquet(query=queries, response=[query.upper() for query in queries])
    commit = hub.change(NAME, {"data/train-00000-of-00001.parquet": rows})
    if tag:
        hub.repository(NAME).refs[f"refs/tags/{tag}"] = commit
    return commit


def said(hub: Hub, code: str, env: Mapping[str, str | None] | None = None) -> Any:
    """The JSON that a program prints last."""
    done = hub.run(f"import json\n{code}", env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def refused(hub: Hub, code: str, env: Mapping[str, str | None] | None = None) -> str:
    """The exception, as the last line of standard error says it."""
    done = hub.run(f"import json\n{code}", env)
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def queries_of(tmp_path: Path, *revisions: str, split: str = "train") -> str:
    """A program that prints the queries of recipes with these revisions, or why there are none."""
    for revision in revisions:
        (tmp_path / revision).mkdir(exist_ok=True)
        text = RECIPE.format(name=NAME, revision=revision, split=split)
        (tmp_path / revision / "recipe.yaml").write_text(text)
        (tmp_path / revision / "prompt.md").write_text("Say what it is.")
    folders = [str(tmp_path / revision) for revision in revisions]
    return f"""
from distill_datasets.errors import DistillError
from distill_datasets.recipes.queries import load_queries
from distill_datasets.recipes.loading import load_recipe

found = []
for folder in {folders}:
    try:
        found.append(load_queries(load_recipe(folder))["query"][:])
    except DistillError as error:
        found.append(repr(error))
print(json.dumps(found))
"""


def located(*references: str, config: str | None = None) -> str:
    """A program that prints what a training reads, and from where."""
    return f"""
from distill_datasets.training.data import locate

found = []
for reference in {references}:
    source = locate(reference, {config!r})
    rows = source.load()["train"]["query"][:]
    found.append([source.revision, source.files, rows])
print(json.dumps(found))
"""


def test_queries_come_from_the_revision_that_the_recipe_pins(hub: Hub, tmp_path: Path) -> None:
    commit = put(hub, ["a", "b"], tag="v1.0.0")
    put(hub, ["c"])
    found = said(hub, queries_of(tmp_path, "v1.0.0", commit, "main", "v9.9.9"))
    assert found[:3] == [["a", "b"], ["a", "b"], ["c"]]
    assert "RepositoryError" in found[3] and "has no revision 'v9.9.9'" in found[3]


def test_rows_of_a_mix_come_from_its_revision_and_those_of_no_use_are_counted(
    hub: Hub, tmp_path: Path
) -> None:
    put(hub, ["a", "", "b"], tag="v1.0.0")
    put(hub, ["c"])
    queries_of(tmp_path, "main")
    mix = f"mix: [{{name: chats, share: 0.5, hub: {NAME}, revision: v1.0.0}}]"
    edit(tmp_path / "main", "recipe.yaml", "split: train}", f"split: train}}\n{mix}")
    found = said(
        hub,
        f"""
import warnings
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.mix import draw_mix
from distill_datasets.recipes.queries import load_queries

recipe = load_recipe({str(tmp_path / "main")!r})
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    (rows,) = draw_mix(recipe, load_queries(recipe), 2)
said = [str(one.message) for one in warned]
print(json.dumps([sorted(rows["query"]), recipe.mix[0].described, said]))
""",
    )
    assert found[:2] == [["a", "b"], f"{NAME}@v1.0.0"]
    assert found[2] == [
        "The part 'chats' of the mix: 1 rows can't be used, such as row 2: its answer is empty."
    ]


def test_offline_a_pinned_revision_is_that_one_or_an_error(hub: Hub, tmp_path: Path) -> None:
    """`load_dataset` alone answers with whatever version it has seen last."""
    for query, version in (("a", "v1.0.0"), ("b", "v2.0.0"), ("c", "v3.0.0")):
        put(hub, [query], tag=version)
    said(hub, queries_of(tmp_path, "v1.0.0", "v2.0.0"))
    hub.forget()
    found = said(hub, queries_of(tmp_path, "v1.0.0", "v2.0.0", "v3.0.0"), OFFLINE)
    assert found[:2] == [["a"], ["b"]]
    assert "v3.0.0 is not on this machine" in found[2]
    assert hub.log() == []


def test_without_the_hub_a_pinned_revision_is_that_one_or_an_error(
    hub: Hub, tmp_path: Path
) -> None:
    put(hub, ["a"], tag="v1.0.0")
    put(hub, ["b"], tag="v2.0.0")
    said(hub, queries_of(tmp_path, "v1.0.0"))
    gone = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    found = said(hub, queries_of(tmp_path, "v1.0.0", "v2.0.0"), gone)
    assert found[0] == ["a"]
    assert "Can't reach http://127.0.0.1:9" in found[1]


def test_a_split_that_is_missing_says_so(hub: Hub, tmp_path: Path) -> None:
    put(hub, ["a"], tag="v1.0.0")
    [message] = said(hub, queries_of(tmp_path, "v1.0.0", split="absent"))
    assert "RecipeError" in message
    assert "me/things" in message and 'Unknown split "absent"' in message


def test_a_branch_is_read_anew_and_a_training_records_its_commit(hub: Hub) -> None:
    first = put(hub, ["a"])
    assert said(hub, located(NAME)) == [[first, first, ["a"]]]
    second = put(hub, ["b"])
    pinned = f"{NAME}@{first}"
    expected = [[second, second, ["b"]], [first, first, ["a"]]]
    assert said(hub, located(f"{NAME}@main", pinned)) == expected
    assert said(hub, located(pinned), OFFLINE) == expected[1:]


@pytest.mark.slow
def test_of_several_configurations_only_the_one_asked_for_is_downloaded(hub: Hub) -> None:
    put(hub, ["a"])
    more = {"README.md": CARD.encode(), "other/train-0.parquet": parquet(query=["o"])}
    commit = hub.change(NAME, {**more, "unrelated.bin": b"x"})
    hub.forget()
    assert said(hub, located(NAME)) == [[commit, commit, ["a"]]]
    assert not hub.log("other/train") and not hub.log("unrelated")
    assert said(hub, located(NAME, config="other")) == [[commit, commit, ["o"]]]
    assert not hub.log("unrelated")


def test_a_missing_dataset_says_so(hub: Hub) -> None:
    message = refused(hub, located("me/absent"))
    assert "There is no folder 'me/absent' here. There is no dataset 'me/absent'" in message


@pytest.fixture
def release(hub: Hub, tmp_path: Path, recipe_folder: Path) -> str:
    """A release on the Hub; its reference."""
    generate(recipe_folder, teacher=Echo(), out=tmp_path / "run")
    folder = publish(tmp_path / "run").path
    hub.create(NAME)
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    commit = hub.change(NAME, dict(files))
    hub.repository(NAME).refs["refs/tags/v1.0.0"] = commit
    return f"{NAME}@v1.0.0"


def test_a_recipe_is_loaded_from_a_release_without_its_rows(hub: Hub, release: str) -> None:
    code = (
        "from distill_datasets.recipes.loading import load_recipe\n"
        f"recipe = load_recipe({release!r})\n"
        "print(json.dumps([recipe.name, recipe.prompt]))"
    )
    assert said(hub, code) == ["colours", "Name the colour of the thing. Say: colour NAME."]
    assert not hub.log(".parquet") and not hub.log("README")
    assert said(hub, code, OFFLINE)[0] == "colours"


def test_running_a_release_from_the_hub_asks_the_teacher_nothing(
    hub: Hub, release: str, tmp_path: Path
) -> None:
    code = (
        "from distill_datasets.generation.run import generate\n"
        "from pathlib import Path\n"
        "from distill_datasets.generation.ledger import take_over\n"
        "from distill_datasets.releases.release import load_release, publish\n"
        "from distill_datasets.models.sampler import Echo\n"
        f"added, teacher = take_over({release!r}, Path('mine')), Echo()\n"
        f"generate({release!r}, teacher=teacher, out='mine')\n"
        "print(json.dumps([added, teacher.calls, publish('mine').digest]))"
    )
    digest = json.loads((tmp_path / "run/release/manifest.json").read_text())["content_digest"]
    assert said(hub, code) == [6, 0, digest]
    assert not hub.log("/data/")


def test_two_releases_on_the_hub_are_compared(hub: Hub, release: str, tmp_path: Path) -> None:
    code = (
        "from distill_datasets.releases.diff import diff\n"
        f"print(json.dumps(diff({str(tmp_path / 'run')!r}, {release!r}).data))"
    )
    found = said(hub, code)
    assert found["new"]["reference"] == release
    assert found["new"]["commit"] == hub.repository(NAME).refs["refs/tags/v1.0.0"]
    assert (found["rows"]["new"], found["rows"]["changed"], found["rows"]["added"]) == (6, 0, 0)
    assert not hub.log("/ledger/") and not hub.log("README")


def test_the_rows_to_measure_on_come_from_one_commit(hub: Hub, release: str) -> None:
    code = (
        "from distill_datasets.evaluation.systems import read_held_out\n"
        f"held_out = read_held_out({release!r}, split='train')\n"
        "print(json.dumps([held_out.reference, held_out.commit, len(held_out.rows)]))"
    )
    commit = hub.repository(NAME).refs["refs/tags/v1.0.0"]
    assert said(hub, code) == [release, commit, 6]


def test_a_dataset_that_is_no_release_has_no_recipe_and_no_difference(hub: Hub) -> None:
    put(hub, ["a"])
    load = f"from distill_datasets.recipes.loading import load_recipe\nload_recipe({NAME!r})"
    assert f"RecipeError: No recipe {NAME!r}: expected" in refused(hub, load)
    compare = f"from distill_datasets.releases.diff import diff\ndiff({NAME!r}, {NAME!r})"
    assert f"DatasetError: {NAME!r} is no release" in refused(hub, compare)


def test_a_release_among_others_in_one_repository_is_found_by_its_configuration(
    hub: Hub, release: str, tmp_path: Path, recipe_folder: Path
) -> None:
    edit(recipe_folder, "prompt.md", "Name", "Say")
    generate(recipe_folder, teacher=Echo(), out=tmp_path / "said")
    publish(tmp_path / "said")
    code = f"""
from distill_datasets.releases.diff import diff
from pathlib import Path
from distill_datasets.generation.ledger import take_over
from distill_datasets.releases.push import push_release
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.training.data import locate

push_release({str(tmp_path / "said" / "release")!r}, {NAME!r}, config="said", private=False)
source = locate({NAME!r}, "said")
print(json.dumps([
    load_recipe({NAME!r}).prompt[:4],
    load_recipe({NAME!r}, config="said").prompt[:4],
    take_over({f"{NAME}:said"!r}, Path("mine")),
    take_over({NAME!r}, Path("mine")),
    diff({NAME!r}, {NAME!r}, config="said").empty,
    len(source.load()["train"]),
    source.manifest["config"],
    locate({f"{NAME}:said"!r}).load()["train"].config_name,
]))
"""
    assert said(hub, code) == ["Name", "Say ", 6, 6, True, 4, "said", "said"]


def test_no_request_goes_elsewhere(hub: Hub, release: str) -> None:
    said(hub, located(release))
    assert not [seen for seen in hub.log() if seen.elsewhere or seen.leak]


@pytest.mark.parametrize(
    ("given", "split"),
    [
        ("me/all:short@v1.0.0", ("me/all@v1.0.0", "short")),
        ("me/all:short", ("me/all", "short")),
        ("me/all@v1.0.0", ("me/all@v1.0.0", None)),
        ("tinker:me/all", ("tinker:me/all", None)),
        (Path("me/all:short"), (Path("me/all:short"), None)),
    ],
)
def test_a_configuration_is_named_within_a_reference(given: Any, split: Any) -> None:
    assert split_config(given) == split

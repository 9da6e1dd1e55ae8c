"""Releases that somebody else made: they are data, and stay in their own folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow.parquet import read_table, write_table

from distill_datasets import parquet
from distill_datasets.errors import DatasetError, DistillError
from distill_datasets.hub.references import check_files, inside
from distill_datasets.parquet import open_parquet, read_batches
from distill_datasets.releases import contents
from distill_datasets.releases.contents import check_release
from distill_datasets.releases.diff import diff
from distill_datasets.releases.release import Release, publish
from tests.conftest import edit
from tests.integration.releases.test_release import answer, write_run
from tests.support.releases import release_of


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return release_of(tmp_path / "one", range(9))


def change(path: Path) -> None:
    """Other answers in a file that keeps its rows."""
    table = read_table(path)
    place = table.schema.get_field_index("response")
    other = pa.array(["forged"] * len(table), table.schema.field("response").type)
    write_table(table.set_column(place, table.schema.field("response"), other), path)


def test_a_release_as_it_was_published_is_as_its_manifest_says(release: Release) -> None:
    check_release(release.path)
    copy = release.path.with_name("copy")
    shutil.copytree(release.path, copy)
    check_release(copy)


def test_changed_rows_under_a_manifest_are_an_error_that_names_the_file(release: Release) -> None:
    path = next(release.path.glob("data/train-*"))
    check_release(release.path)
    change(path)
    with pytest.raises(
        DatasetError, match=r"data/train-00000-of-00001\.parquet' has other content"
    ):
        check_release(release.path)
    with pytest.raises(DatasetError, match="data/train-"):
        diff(release.path, release.path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("data/train-00001-of-00002.parquet", "was added"),
        ("data/test-00000-of-00001.parquet", "is missing"),
    ],
)
def test_a_file_more_or_less_is_an_error_that_names_it(
    name: str, says: str, release: Release
) -> None:
    path = release.path / name
    if path.is_file():
        path.unlink()
    else:
        shutil.copyfile(next(release.path.glob("data/train-*")), path)
    with pytest.raises(DatasetError, match=f"{name}' {says}"):
        check_release(release.path)


def test_a_manifest_with_digests_of_other_rows_is_an_error(release: Release) -> None:
    manifest = json.loads((release.path / "manifest.json").read_text())
    edit(release.path, "manifest.json", manifest["content_digest"], "0" * 64)
    with pytest.raises(DatasetError, match="do not have the digest 000"):
        check_release(release.path)


def test_rows_are_compared_where_a_manifest_has_no_digests_of_files(release: Release) -> None:
    """As those of version 0.1."""
    edit(release.path, "manifest.json", '"sha256"', '"other"')
    check_release(release.path)
    change(next(release.path.glob("data/train-*")))
    with pytest.raises(DatasetError, match="are not those that"):
        check_release(release.path)


def test_what_was_checked_is_not_read_again_until_it_changes(
    release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    survey = contents.survey_release

    def noted(path: Path) -> Any:
        read.append(path)
        return survey(path)

    monkeypatch.setattr(contents, "survey_release", noted)
    check_release(release.path)
    check_release(release.path)
    assert len(read) == 1
    path = next(release.path.glob("data/train-*"))
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    with pytest.raises(DatasetError, match="other content"):
        check_release(release.path)
    path.write_bytes(content)
    check_release(release.path)
    assert len(read) == 2


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.txt", "data/../../secret.txt"])
def test_no_name_leads_out_of_a_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "given" / "data").mkdir(parents=True)
    with pytest.raises(DatasetError, match="expected a file in that folder"):
        inside(tmp_path / "given", name)


@pytest.mark.parametrize("linked", ["data/train-00000-of-00001.parquet", "data"])
def test_no_link_leads_out_of_a_release(linked: str, release: Release, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (release.path / linked).rename(elsewhere)
    (release.path / linked).symlink_to(elsewhere)
    with pytest.raises(DatasetError, match="is a link to"):
        check_release(release.path)


def test_the_links_of_the_hubs_cache_are_its_own(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "datasets--me--it"
    shutil.copytree(release.path, repository / "snapshots" / "0")
    path = next((repository / "snapshots" / "0").glob("data/train-*"))
    (repository / "blobs").mkdir()
    path.rename(repository / "blobs" / "1")
    path.symlink_to(Path("../../../blobs/1"))
    check_files(repository / "snapshots" / "0", ["data"])
    path.unlink()
    path.symlink_to(tmp_path / "one" / "run" / "answers" / "generation.json")
    with pytest.raises(DatasetError, match="is a link to"):
        check_files(repository / "snapshots" / "0", ["data"])


@pytest.mark.parametrize("path", ["/etc/passwd", "../../secret.jsonl", "file:///etc/passwd"])
def test_a_card_that_names_files_elsewhere_is_refused(path: str, release: Release) -> None:
    edit(release.path, "README.md", "path: data/train-*", f"path: {path}")
    with pytest.raises(DatasetError, match="its card names it as data"):
        check_release(release.path)


def test_a_recipe_that_names_the_data_overwrites_nothing(tmp_path: Path, release: Release) -> None:
    """Whether the recipe is refused or its file is, no file outside `recipe/` is written."""
    train = next(release.path.glob("data/train-*"))
    before = train.read_bytes()
    clone = tmp_path / "clone"
    write_run(clone, map(answer, range(9)), release_recipe(release))
    recipe = clone / "answers" / "recipe"
    (recipe / "recipe.yaml").write_text(
        (recipe / "recipe.yaml").read_text().replace("queries.txt", f"../data/{train.name}")
    )
    (clone / "answers" / "data").mkdir()
    (clone / "answers" / "data" / train.name).write_bytes(b"forged")
    with pytest.raises(DistillError):
        publish(clone, out=release.path)
    assert train.read_bytes() == before
    assert not (clone / "release").exists()


def release_recipe(release: Release) -> Any:
    from distill_datasets.recipes.loading import load_recipe

    return load_recipe(release.path)


def test_a_small_file_that_declares_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    write_table(pa.table({"query": ["x" * 30_000_000]}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    with pytest.raises(DatasetError, match="unpacks to 30,000,0.. bytes: .*It is not read"):
        open_parquet(path)


def test_a_value_that_stands_in_many_rows_is_not_read_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 10_000_000)
    monkeypatch.setattr(parquet, "_MOST_READ", (30_000_000, 1_000))
    path = tmp_path / "bomb.parquet"
    text = pa.array(["x" * 1_000_000])
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 400, pa.int32()), text)
    write_table(pa.table({"query": repeated}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 10_000
    largest = 0
    with pytest.raises(DatasetError, match="bytes in memory: .*It is not read"):
        for batch in read_batches(path):
            largest = max(largest, batch.nbytes)
    assert largest < 11_000_000


def test_more_rows_than_a_file_can_hold_are_refused_by_its_footer(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_table(pa.table({"query": pa.nulls(20_000_000)}), path)
    with pytest.raises(DatasetError, match="20,000,000 rows"):
        open_parquet(path)


def test_ordinary_files_are_far_from_the_limits(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_table(pa.table({"query": ["the same words"] * 200_000}), path)
    assert sum(len(batch) for batch in read_batches(path)) == 200_000


def test_what_is_no_parquet_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_text("hello")
    with pytest.raises(DatasetError, match="can't be read as Parquet"):
        open_parquet(path)

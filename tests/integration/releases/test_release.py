import json
import os
import shutil
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, Value, load_dataset
from huggingface_hub import DatasetCard
from pyarrow.parquet import ParquetFile, read_table, write_table

from distill_datasets import parquet as shards
from distill_datasets.errors import DatasetError, OutputError, RecipeError, VersionError
from distill_datasets.files import one_writer
from distill_datasets.generation.run import generate
from distill_datasets.models.sampler import Echo
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.queries import load_queries
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.releases.contents import (
    Survey,
    answered_contents,
    check_release,
    survey_release,
)
from distill_datasets.releases.diff import diff, published_rows
from distill_datasets.releases.push import outgoing_text
from distill_datasets.releases.release import load_release, publish
from distill_datasets.schema import answer_features, rejected_features, release_features
from tests.conftest import edit
from tests.support import forks

PROMPT = "You sort greetings by language. Answer with one word, always, in `lower case`."
UNUSUAL = 'say "hi",\n\tor ```bye``` — 👩‍👩‍👧 שלום עולم \\ | {{ x }} \u2028 end'


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "queries.txt").write_text("hello\n", encoding="utf-8")
    return Recipe(
        name="greetings",
        description="Which language a greeting is in.",
        teacher="pocket",
        queries={"file": "queries.txt"},
        prompt=PROMPT,
        folder=folder,
    )


def answer(number: int, **changes: Any) -> dict[str, Any]:
    group = f"group {number // 3}"
    row = {
        "id": f"id{number}",
        "query": f"hello {number}",
        "group": group,
        "split": ("train", "validation", "test")[number // 3 % 3],
        "sample": 0,
        "teacher": "pocket",
        "raw": "en",
        "stop_reason": "stop",
        "teacher_prompt_tokens": 21,
        "teacher_cached_tokens": 20,
        "teacher_response_tokens": 2,
        "answer": "en",
        "response": "en",
    }
    if isinstance(error := changes.get("error"), str):
        changes["error"] = {"type": "failed", "status": 500, "message": error, "attempts": 3}
    return {name: {**row, **changes}.get(name) for name in answer_features()}


def write_run(run: Path, rows: Iterable[dict[str, Any]], recipe: Recipe, **changes: Any) -> Path:
    """What `generate` leaves, without asking anyone."""
    rows, folder = list(rows), run / "answers"
    shutil.rmtree(folder, ignore_errors=True)
    Dataset.from_list(rows, features=answer_features()).save_to_disk(str(folder))
    recipe.dump(folder / "recipe")
    generation = {
        "recipe": recipe.name,
        "recipe_digest": recipe.digest,
        "teacher": "pocket",
        "identity": "pocket/0123",
        "renderer": None,
        "sampling": recipe.sampling.model_dump(),
        "rows": len(rows),
        "errors": sum(row["error"] is not None for row in rows),
        "tokens": {"prompt": 210, "cached": 200, "response": 20},
        "created": "2026-11-21",
        "versions": {"datasets": "5.2.0"},
        **changes,
    }
    (folder / "generation.json").write_text(json.dumps(generation), encoding="utf-8")
    return run


LOCK = ".release.lock"


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in [folder, *folder.rglob("*")]
    }


def load_in_a_new_process(release: Path, cache: Path) -> dict[str, list[str]]:
    """The responses of each split, read offline."""
    program = (
        "import json, sys, datasets\n"
        "loaded = datasets.load_dataset(sys.argv[1])\n"
        "print(json.dumps({name: rows['response'][:] for name, rows in loaded.items()}))"
    )
    settings = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache)}
    arguments = ["-c", program, str(release)]
    done = forks.run(arguments, env={**os.environ, **settings}, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_datasets_reads_every_configuration_and_split(tmp_path: Path, recipe: Recipe) -> None:
    rows = [answer(number) for number in range(9)]
    rows.append(answer(9, split="edge"))
    rows.append(answer(10, response=None, answer=None, raw="?", rejection="unparsable"))
    release = publish(write_run(tmp_path / "run", rows, recipe))
    kept = load_dataset(str(release.path), cache_dir=str(tmp_path / "cache"))
    rejected = load_dataset(str(release.path), "rejected", cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in kept.items()} == release.splits
    assert release.splits == {"train": 3, "validation": 3, "test": 3, "edge": 1}
    assert kept["train"].features == release_features()
    assert rejected["rejected"].features == rejected_features()
    assert rejected["rejected"]["rejection"][:] == ["unparsable"]
    assert kept["train"][0]["messages"] == [
        {"role": "user", "content": "hello 0"},
        {"role": "assistant", "content": "en"},
    ]


def test_without_rejected_rows_there_is_no_such_configuration(
    tmp_path: Path, recipe: Recipe
) -> None:
    release = publish(write_run(tmp_path / "run", [answer(0)], recipe))
    data = DatasetCard.load(release.path / "README.md").data
    assert [config["config_name"] for config in data["configs"]] == ["default"]
    assert not (release.path / "rejected").exists()
    loaded = load_dataset(str(release.path), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"]


def test_the_prompt_is_in_no_column_of_no_row(tmp_path: Path, recipe: Recipe) -> None:
    rows = [answer(0), answer(1, response=None, rejection="empty"), answer(2, error="timeout")]
    release = publish(write_run(tmp_path / "run", rows, recipe))
    paths = list(release.path.glob("*/*.parquet"))
    text = json.dumps([read_table(path).to_pylist() for path in paths])
    assert len(paths) == 2
    assert "hello 0" in text
    assert json.dumps(PROMPT)[1:-1] not in text
    assert '"system"' not in text


def test_a_row_that_would_show_the_prompt_is_refused(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = {"role": "system", "content": PROMPT}
    monkeypatch.setattr(Recipe, "student_messages", staticmethod(lambda *query: [system]))
    with pytest.raises(DatasetError, match="holds the teacher's prompt"):
        publish(write_run(tmp_path / "run", [answer(0)], recipe))


def test_errors_are_rejected_rows_with_their_error(tmp_path: Path, recipe: Recipe) -> None:
    rows = [answer(0), answer(1, error="refused by the filter"), answer(2, rejection="empty")]
    release = publish(write_run(tmp_path / "run", rows, recipe))
    table = read_table(release.path / "rejected").to_pylist()
    assert release.rejected == 2
    refused = {"type": "failed", "status": 500, "message": "refused by the filter", "attempts": 3}
    assert [row["error"] for row in table] == [refused, None]
    manifest = json.loads((release.path / "manifest.json").read_text("utf-8"))
    assert (manifest["kept"], manifest["rejected"], manifest["errors"]) == (1, {"empty": 1}, 1)


def test_publishing_the_same_content_again_touches_no_file(tmp_path: Path, recipe: Recipe) -> None:
    run = write_run(tmp_path / "run", map(answer, range(9)), recipe)
    first = publish(run)
    before = snapshot(run)
    assert publish(run) == first
    assert publish(run, version="1.0.0") == first
    after = snapshot(run)
    assert {name for name in after if after[name] != before.get(name)} <= {".", LOCK}
    assert after.keys() == before.keys()


def test_other_content_under_the_same_version_is_refused_with_what_differs(
    tmp_path: Path, recipe: Recipe
) -> None:
    run = write_run(tmp_path / "run", map(answer, range(9)), recipe)
    before = snapshot(publish(run).path)
    changed = recipe.replace(prompt="Another.", sampling={"temperature": 0.5})
    rows = [answer(0, response="de"), *map(answer, range(2, 9)), answer(9), answer(10)]
    write_run(run, rows, changed)
    with pytest.raises(VersionError) as refused:
        publish(run, version="1.0.0")
    message = str(refused.value)
    assert "the prompt changed; 2 rows added; 1 row removed; 1 answer changed" in message
    assert "sampling.temperature" in message
    assert "version='2.0.0'" in message
    assert snapshot(run / "release") == before


def test_rows_in_another_order_are_other_content(tmp_path: Path, recipe: Recipe) -> None:
    run = write_run(tmp_path / "run", map(answer, range(3)), recipe)
    publish(run)
    write_run(run, map(answer, (0, 2, 1)), recipe)
    with pytest.raises(VersionError, match="another order"):
        publish(run, version="1.0.0")


def test_another_version_takes_the_place_and_a_new_process_sees_its_rows(
    tmp_path: Path, recipe: Recipe
) -> None:
    """`datasets` caches a folder by its card: equal sizes must not hide other rows."""
    run = write_run(tmp_path / "run", [answer(0), answer(3, rejection="empty")], recipe)
    release = publish(run).path
    loaded = load_dataset(str(release), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"]["response"][:] == ["en"]
    write_run(run, [answer(0, response="de")], recipe)
    assert publish(run, version="1.0.1").version == "1.0.1"
    assert not (release / "rejected").exists()
    assert load_in_a_new_process(release, tmp_path / "cache") == {"train": ["de"]}
    assert publish(run).version == "1.0.1"


def test_a_deleted_version_made_again_with_other_rows_is_not_read_from_the_cache(
    tmp_path: Path, recipe: Recipe
) -> None:
    run, found = tmp_path / "run", []
    for label in ("en", "de"):
        release = publish(write_run(run, [answer(0, response=label)], recipe))
        loaded = load_dataset(str(release.path), cache_dir=str(tmp_path / "cache"))
        found.append(loaded["train"]["response"][0])
        shutil.rmtree(release.path)
    assert found == ["en", "de"]


def test_what_a_crash_left_behind_is_replaced(tmp_path: Path, recipe: Recipe) -> None:
    run = write_run(tmp_path / "run", [answer(0)], recipe)
    (run / ".release.building" / "data").mkdir(parents=True)
    (run / ".release.building" / "data" / "half.parquet").write_text("half")
    publish(run)
    assert {path.name for path in run.iterdir()} == {"answers", "release", LOCK}
    assert not (run / "release" / "data" / "half.parquet").exists()


def test_a_release_set_aside_by_a_crash_is_put_back(tmp_path: Path, recipe: Recipe) -> None:
    run = write_run(tmp_path / "run", [answer(0)], recipe)
    first = publish(run)
    first.path.rename(run / ".release.old")
    write_run(run, [answer(1)], recipe)
    with pytest.raises(VersionError):
        publish(run, version="1.0.0")
    assert load_release(first.path) == first


def test_a_failure_while_writing_leaves_the_old_release_alone(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", [answer(0)], recipe)
    before = snapshot(publish(run).path)
    write_run(run, [answer(1)], recipe)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.Shards, "close", full)
    with pytest.raises(OutputError, match="No space left"):
        publish(run, version="1.1.0")
    assert snapshot(run / "release") == before
    assert {path.name for path in run.iterdir()} == {"answers", "release", LOCK}


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path, recipe: Recipe) -> None:
    run = write_run(tmp_path / "run", [answer(0)], recipe)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(OutputError, match="Can't write"):
        publish(run, out=tmp_path / "file" / "release")


def test_a_folder_with_something_else_in_it_is_not_replaced(tmp_path: Path, recipe: Recipe) -> None:
    run = write_run(tmp_path / "run", [answer(0)], recipe)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("chapter one")
    with pytest.raises(OutputError, match="something else"):
        publish(run, out=tmp_path / "home")
    assert (tmp_path / "home" / "thesis.txt").read_text() == "chapter one"


def test_every_group_is_in_one_split_only(tmp_path: Path, recipe: Recipe) -> None:
    def split_of(number: int) -> str:
        return recipe.split.of(f"group {number // 3}")

    rows = [answer(number, split=split_of(number)) for number in range(60)]
    release = publish(write_run(tmp_path / "run", rows, recipe))
    splits_of: dict[str, set[str]] = {}
    for part, table in published_rows(release.path):
        for group in table["group"].to_pylist():
            splits_of.setdefault(group, set()).add(part)
    assert len(splits_of) == 20
    assert all(len(splits) == 1 for splits in splits_of.values())
    assert sum(release.splits.values()) == 60


def test_equal_queries_and_several_samples_are_all_kept(tmp_path: Path, recipe: Recipe) -> None:
    rows = [
        answer(0, query="hi"),
        answer(0, query="hi", sample=1),
        answer(1, id="id0-2", query="hi"),
    ]
    release = publish(write_run(tmp_path / "run", rows, recipe))
    assert release.splits == {"train": 3}
    assert [row["sample"] for row in read_table(release.path / "data").to_pylist()] == [0, 1, 0]


def test_same_rows_are_in_train_and_test(tmp_path: Path, recipe: Recipe) -> None:
    both = recipe.replace(split={"same_rows": True})
    rows = [answer(number, split="train", reference="en") for number in range(4)]
    release = publish(write_run(tmp_path / "run", rows, both))
    tables = [read_table(release.path / "data" / f"{name}-00000-of-00001.parquet").to_pylist()
              for name in ("train", "test")]  # fmt: skip
    assert release.splits == {"train": 4, "test": 4}
    assert tables[0] == tables[1]
    manifest = json.loads((release.path / "manifest.json").read_text("utf-8"))
    assert manifest["kept"] == 4
    assert manifest["references"] == {"rows": 4, "agreeing": 4}
    assert "hold the same rows" in (release.path / "README.md").read_text("utf-8")


def test_unusual_text_survives(tmp_path: Path, recipe: Recipe) -> None:
    rows = [answer(0, query=UNUSUAL, response=UNUSUAL), answer(1, raw=UNUSUAL, rejection="empty")]
    release = publish(write_run(tmp_path / "run", rows, recipe))
    row = load_dataset(str(release.path), split="train", cache_dir=str(tmp_path / "cache"))[0]
    assert row["query"] == row["response"] == row["messages"][0]["content"] == UNUSUAL
    assert read_table(release.path / "rejected")["raw"].to_pylist() == [UNUSUAL]
    assert DatasetCard.load(release.path / "README.md").data["pretty_name"] == "greetings"


def test_the_digest_depends_on_neither_time_nor_machine_nor_files(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [answer(number) for number in range(30)]
    first = publish(write_run(tmp_path / "one", rows, recipe))
    monkeypatch.setattr("distill_datasets.generation.rows._ROWS_AT_ONCE", 7)
    monkeypatch.setattr(shards, "_ROW_GROUP_BYTES", 100)
    monkeypatch.setattr(shards, "_SHARD_BYTES", 400)
    later = {"created": "2031-01-01", "versions": {"datasets": "9.0"}, "identity": "elsewhere"}
    second = publish(write_run(tmp_path / "two", rows, recipe, **later))
    names = sorted(path.name for path in (second.path / "data").glob("train-*"))
    assert len(names) > 1
    assert names[0] == f"train-00000-of-{len(names):05d}.parquet"
    assert ParquetFile(second.path / "data" / names[0]).num_row_groups > 1
    assert second.digest == first.digest
    assert survey_release(second.path).digest(recipe.digest) == first.digest
    assert (
        load_dataset(str(second.path), split="train", cache_dir=str(tmp_path / "cache")).to_list()
        == read_table(first.path / "data" / "train-00000-of-00001.parquet").to_pylist()
    )


def test_what_a_server_had_in_its_cache_is_no_content(recipe: Recipe) -> None:
    digests = {
        Survey.of(
            answered_contents(
                Dataset.from_list(
                    [answer(0, teacher_cached_tokens=cached)], features=answer_features()
                ),
                recipe,
            )
        ).digest(recipe.digest)
        for cached in (0, 700)
    }
    assert len(digests) == 1


def test_how_often_a_row_was_asked_is_no_part_of_the_digest(recipe: Recipe) -> None:
    digests = set()
    for attempts in (1, 5):
        error = {"type": "server error", "status": 500, "message": "no", "attempts": attempts}
        rows = Dataset.from_list([answer(0, error=error)], features=answer_features())
        digests.add(Survey.of(answered_contents(rows, recipe)).digest(recipe.digest))
    assert len(digests) == 1


def test_answers_of_an_earlier_version_have_to_be_generated_again(recipe: Recipe) -> None:
    features = answer_features()
    features["error"] = Value("string")
    rows = Dataset.from_list([{**answer(0), "error": "TimeoutError: too slow"}], features=features)
    with pytest.raises(DatasetError, match="Run `generate` again"):
        list(answered_contents(rows, recipe))


CONTENT = [name for name in release_features() if name != "teacher_cached_tokens"]


@pytest.mark.parametrize("column", [*CONTENT, "split", "rejection", "error"])
def test_any_cell_changes_the_digest(column: str, recipe: Recipe) -> None:
    if column == "messages":
        column = "query"
    original = answer(0)[column]
    other = 99 if isinstance(original, int) else "other"
    digests = set()
    for row in (answer(0), answer(0, **{column: other})):
        rows = Dataset.from_list([row], features=answer_features())
        digests.add(Survey.of(answered_contents(rows, recipe)).digest(recipe.digest))
    assert len(digests) == 2


def test_the_recipe_changes_the_digest(recipe: Recipe) -> None:
    rows = Dataset.from_list([answer(0)], features=answer_features())
    found = Survey.of(answered_contents(rows, recipe))
    assert found.digest(recipe.digest) != found.digest(recipe.replace(prompt="Other.").digest)


def test_another_licence_renews_the_card_of_the_same_version_when_asked(
    tmp_path: Path, recipe: Recipe
) -> None:
    rows = [answer(0)]
    run = write_run(tmp_path / "run", rows, recipe)
    first = publish(run)
    readme = first.path / "README.md"
    readme.write_text(readme.read_text("utf-8") + "\nWritten by hand.\n", encoding="utf-8")
    run = write_run(run, rows, recipe.replace(license="CC0-1.0"))
    second = publish(run, version="1.0.0")
    assert (second.version, second.digest) == (first.version, first.digest)
    assert DatasetCard.load(readme).data.license == "cc0-1.0"
    assert readme.read_text("utf-8").endswith("\n\nWritten by hand.\n")


@pytest.mark.parametrize(
    ("changes", "rows", "version", "why"),
    [
        ({"license": "mit"}, range(3), "1.0.1", "recipe keys changed: license"),
        ({}, range(4), "1.1.0", "1 row added"),
        ({"sampling": {"top_p": 0.5}}, range(3), "1.1.0", "recipe keys changed: sampling.top_p"),
        ({"prompt": "Another."}, range(3), "2.0.0", "the prompt changed"),
        ({"response": "{{ text }}"}, range(2), "2.0.0", "the response format changed (response)"),
    ],
)
def test_the_next_version_says_how_much_changed_and_why(
    changes: dict[str, Any],
    rows: range,
    version: str,
    why: str,
    tmp_path: Path,
    recipe: Recipe,
) -> None:
    run = write_run(tmp_path / "run", map(answer, range(3)), recipe)
    assert publish(run).why == "the first release"
    release = publish(write_run(run, map(answer, rows), recipe.replace(**changes)))
    assert (release.version, why in release.why) == (version, True)
    card = (release.path / "README.md").read_text("utf-8")
    assert f"Since version 1.0.0: {release.why}." in card
    assert "| 1.0.0 | 2026-11-21 | the first release |" in card
    assert publish(run) == release


def test_publish_and_diff_agree_that_token_counts_change_no_row(
    tmp_path: Path, recipe: Recipe
) -> None:
    old = publish(write_run(tmp_path / "run", map(answer, range(4)), recipe))
    shutil.copytree(old.path, tmp_path / "old")
    counted = [answer(n, teacher_prompt_tokens=22) for n in range(3)]
    new = publish(write_run(tmp_path / "run", [*counted, answer(3)], recipe))
    rows = diff(tmp_path / "old", new.path).data["rows"]
    assert (rows["changed"], rows["recounted"]) == (0, 3)
    assert (new.version, new.why) == ("1.0.1", "the teacher's token counts changed in 3 rows")
    other = [answer(0, response="fr", answer="fr", teacher_prompt_tokens=23), *counted[1:]]
    third = publish(write_run(tmp_path / "run", [*other, answer(3)], recipe))
    assert (third.version, third.why) == ("1.1.0", "1 answer changed")


def test_fingerprints_of_version_0_1_are_made_anew_from_the_rows(
    tmp_path: Path, recipe: Recipe
) -> None:
    """Theirs counted a row as changed whose token counts were."""
    old = publish(write_run(tmp_path / "run", map(answer, range(3)), recipe))
    path = old.path / "fingerprints.parquet"
    table = read_table(path).rename_columns(["key", "row", "answer", "counts"])
    write_table(table.drop_columns(["counts"]), path)
    new = publish(write_run(tmp_path / "run", map(answer, range(4)), recipe))
    assert new.why == "1 row added"


def test_the_release_carries_its_recipe(tmp_path: Path, recipe: Recipe) -> None:
    release = publish(write_run(tmp_path / "run", [answer(0)], recipe))
    carried = load_recipe(release.path)
    manifest = json.loads((release.path / "manifest.json").read_text("utf-8"))
    assert carried.prompt == PROMPT
    assert carried.digest == recipe.digest == manifest["recipe_digest"]


@pytest.mark.parametrize("version", ["1.0", "v1.0.0", "1.0.0-rc1", "01.0.0", "1.0.0\n", ""])
def test_a_version_is_three_numbers(version: str, tmp_path: Path, recipe: Recipe) -> None:
    run = write_run(tmp_path / "run", [answer(0)], recipe)
    with pytest.raises(DatasetError, match="three numbers"):
        publish(run, version=version)


def test_answers_of_another_recipe_are_refused(tmp_path: Path, recipe: Recipe) -> None:
    run = write_run(tmp_path / "run", [answer(0)], recipe, recipe_digest="0" * 64)
    with pytest.raises(DatasetError, match="not the recipe of these answers"):
        publish(run)


def test_nothing_to_publish_says_why(tmp_path: Path, recipe: Recipe) -> None:
    rows = [answer(0, rejection="empty"), answer(1, error="timeout")]
    run = write_run(tmp_path / "run", rows, recipe)
    with pytest.raises(DatasetError, match=r"none of its 2 rows.*'empty': 1.*'failed': 1"):
        publish(run)


@pytest.mark.parametrize("split", ["rejected", "all", "a-b", "../x", ""])
def test_a_split_that_datasets_cannot_name_is_refused(
    split: str, tmp_path: Path, recipe: Recipe
) -> None:
    run = write_run(tmp_path / "run", [answer(0, split=split)], recipe)
    with pytest.raises(DatasetError, match="can't name a split"):
        publish(run)


@pytest.mark.parametrize("column", ["response", "split", "id"])
def test_a_kept_row_without_a_needed_value_is_refused(
    column: str, tmp_path: Path, recipe: Recipe
) -> None:
    run = write_run(tmp_path / "run", [answer(0, **{column: None})], recipe)
    with pytest.raises(DatasetError, match=f"no '{column}'"):
        publish(run)


def test_a_folder_without_answers_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="has no answers"):
        publish(tmp_path / "misspelt")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_release_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is not a release"):
        load_release(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DatasetError, match="not a manifest"):
        load_release(tmp_path)


def test_rows_are_written_as_they_come_and_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_ROW_GROUP_BYTES", 100)
    schema = pa.schema({"text": pa.string()})
    split = shards.Shards(tmp_path, "train", schema)
    for _ in range(5):
        split.add(pa.table({"text": ["x" * 200]}, schema=schema))
        assert not split._waiting
    assert split.close() == 5


def test_of_the_queries_a_release_carries_only_the_columns_that_its_recipe_uses(
    tmp_path: Path, recipe_folder: Path
) -> None:
    path = recipe_folder / "queries.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"customer": f"Ann {number}", "ticket": number}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate(recipe_folder, teacher=Echo(), out=tmp_path / "run")
    release = publish(tmp_path / "run")
    carried = load_recipe(release.path)
    lines = (release.path / "recipe" / str(carried.queries.file)).read_text().splitlines()
    assert [{*json.loads(line)} for line in lines] == [{"query", "family", "colour"}] * 6
    assert not any(b"Ann" in path.read_bytes() for path in release.path.rglob("*.*"))
    original = load_queries(load_recipe(recipe_folder))
    assert load_queries(carried).to_list() == original.to_list()
    manifest = json.loads((release.path / "manifest.json").read_text("utf-8"))
    assert carried.digest == manifest["recipe_digest"]
    teacher = Echo()
    generate(release.path, teacher=teacher, out=tmp_path / "again")
    again = publish(tmp_path / "again")
    assert (teacher.calls, again.digest) == (0, release.digest)


def test_the_columns_of_a_table_and_its_sidecar_become_one_file(
    tmp_path: Path, recipe_folder: Path
) -> None:
    (recipe_folder / "queries.csv").write_text("text,secret\nhello,1\ngood day,2\nbye,3\n")
    (recipe_folder / "side.csv").write_text("kind,more\na,x\nb,y\nc,z\n")
    edit(
        recipe_folder,
        "recipe.yaml",
        "{file: queries.jsonl, group: family, reference: colour}",
        "{file: queries.csv, sidecar: side.csv, query: text, group: kind, rows: [1, 3]}",
    )
    recipe = load_recipe(recipe_folder)
    rows = [answer(number, query=text) for number, text in enumerate(("hello", "bye"))]
    carried = load_recipe(publish(write_run(tmp_path / "run", rows, recipe)).path)
    assert load_queries(carried).to_list() == load_queries(recipe).to_list()
    assert carried.attachments == ("queries.jsonl",)
    assert "secret" not in (carried.folder / "queries.jsonl").read_text()


def test_a_release_without_its_prompt_says_so_and_gives_its_digest(
    tmp_path: Path, recipe: Recipe
) -> None:
    run = write_run(tmp_path / "run", map(answer, range(3)), recipe)
    release = publish(run, prompt=False)
    for path in release.path.rglob("*"):
        assert path.is_dir() or PROMPT.encode() not in path.read_bytes()
    manifest = json.loads((release.path / "manifest.json").read_text("utf-8"))
    card = (release.path / "README.md").read_text("utf-8")
    assert manifest["prompt"] is False
    assert manifest["prompt_sha256"] == sha256(PROMPT.encode()).hexdigest()
    assert f"It is not published; its SHA-256 is `{manifest['prompt_sha256']}`." in card
    assert "distill-datasets generate" not in card
    for place in (release.path, release.path / "recipe"):
        with pytest.raises(RecipeError, match="published without its prompt.*Ask its author"):
            load_recipe(place)
    check_release(release.path)
    assert publish(run, prompt=False) == release
    with_it = publish(run)
    assert (with_it.version, with_it.digest) == ("1.0.1", release.digest)
    assert load_recipe(with_it.path).prompt == PROMPT


def test_a_release_of_several_prompts_can_be_published_without_them_and_pushed(
    tmp_path: Path,
) -> None:
    about = "teacher: pocket\ndescription: d\nlanguages: [en]\n"
    for name, more in (
        ("two", "prompts: {'[a]': a, '[b]': b}\n"),
        *((f"two/{one}", "queries: {file: queries.txt}\n") for one in "ab"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(f"name: {name[-1]}\n{about}{more}")
    for one in "ab":
        (tmp_path / "two" / one / "prompt.md").write_text(f"A secret of {one}")
        (tmp_path / "two" / one / "queries.txt").write_text("".join(f"{n}\n" for n in range(9)))
    generate(tmp_path / "two", teacher=Echo(), out=tmp_path / "run")
    release = publish(tmp_path / "run", prompt=False)
    assert all(b"secret" not in path.read_bytes() for path in release.path.rglob("*.*"))
    assert "no prompt" in outgoing_text(release.path, "me/two")
    with pytest.raises(RecipeError, match="published without its prompt.*Ask its author"):
        load_recipe(release.path)


def test_one_process_publishes_to_a_folder_at_a_time(tmp_path: Path, recipe: Recipe) -> None:
    run = write_run(tmp_path / "run", map(answer, range(3)), recipe)
    with (
        one_writer(run / "release", "release", beside=True),
        pytest.raises(OutputError, match="Another process is at work"),
    ):
        publish(run)
    assert publish(run).version == "1.0.0"


def test_what_a_push_would_send_is_told_with_its_columns_and_who_sees_it(
    tmp_path: Path, recipe: Recipe
) -> None:
    run = write_run(tmp_path / "run", map(answer, range(9)), recipe.replace(license="mit"))
    release = publish(run)
    (release.path / ".env").write_text("not sent")
    text = outgoing_text(release.path, "me/greetings", private=False)
    assert "me/greetings (public: everybody sees it) gets 7 files" in text
    assert "with the teacher's prompt" in text
    (line,) = (line for line in text.splitlines() if line.startswith("data/train-"))
    assert "3" in line.split() and "id, query, response, messages, answer" in line
    assert "recipe/queries.txt" in text and ".env" not in text
    hidden = outgoing_text(publish(run, prompt=False).path, "me/greetings", config="en")
    assert "private: its owners see it" in hidden and "no prompt" in hidden
    assert "en/data/train-" in hidden and "prompt.md" not in hidden


@pytest.mark.parametrize("name", ["generation.json", "state.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]"])
def test_a_damaged_folder_of_answers_is_named_with_what_to_do(
    name: str, content: bytes | None, tmp_path: Path, recipe: Recipe
) -> None:
    run = write_run(tmp_path / "run", map(answer, range(3)), recipe)
    path = run / "answers" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match="`generate`"):
        publish(run)
    assert not (run / "release").exists()

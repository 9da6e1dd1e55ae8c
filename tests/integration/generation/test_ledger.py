import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from pyarrow.parquet import read_table

from distill_datasets.errors import DatasetError
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.ledger import reuse_text, take_over
from distill_datasets.generation.run import Generated, generate
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.models.sampler import Echo, Reply, Sampling
from distill_datasets.releases.release import Release, publish
from distill_datasets.schema import Message
from tests.conftest import edit


def release_of(recipe: Path | str, run: Path, **choices: bool) -> Release:
    generate(recipe, teacher=Echo(), out=run)
    return publish(run, **choices)


def ledger_of(release: Release) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = read_table(release.path / "ledger").to_pylist()
    return rows


def asked(recipe: Path | str, run: Path) -> int:
    """The requests that a run needs once it has the ledger of its recipe's release."""
    take_over(recipe, run)
    teacher = Echo()
    generate(recipe, teacher=teacher, out=run)
    return teacher.calls


def test_a_release_carries_every_raw_answer_the_useless_ones_too(
    tmp_path: Path, recipe_folder: Path
) -> None:
    release = release_of(recipe_folder, tmp_path / "run")
    texts = [Reply.from_json(row["reply"]).samples[0].text for row in ledger_of(release)]
    assert release.rejected == 2
    assert texts[0] == "a rose, colour red"
    assert texts[-1] == "a thought"
    assert len(texts) == 6


def test_the_ledger_is_a_configuration_that_datasets_reads(
    tmp_path: Path, recipe_folder: Path
) -> None:
    release = release_of(recipe_folder, tmp_path / "run")
    rows = load_dataset(str(release.path), "ledger", cache_dir=str(tmp_path / "cache"))["ledger"]
    assert rows.column_names == ["digest", "model", "reply"]
    assert len(set(rows["digest"])) == 6
    assert set(rows["model"]) == {Echo().identity}
    kept = load_dataset(str(release.path), cache_dir=str(tmp_path / "cache"))
    assert "ledger" not in kept


def test_the_teachers_prompt_is_not_in_the_ledger(tmp_path: Path, recipe_folder: Path) -> None:
    release = release_of(recipe_folder, tmp_path / "run")
    assert "Name the colour" not in json.dumps(ledger_of(release))


def test_a_query_asked_twice_and_samples_of_one_request_are_in_the_ledger_once(
    tmp_path: Path, recipe_folder: Path
) -> None:
    edit(recipe_folder, "queries.jsonl", "a poppy", "a rose")
    edit(recipe_folder, "recipe.yaml", "license:", "sampling: {n: 3}\nlicense:")
    rows = ledger_of(release_of(recipe_folder, tmp_path / "run"))
    assert len(rows) == 5
    assert {len(Reply.from_json(row["reply"]).samples) for row in rows} == {3}


def test_running_a_release_asks_the_teacher_nothing_and_makes_the_same_release(
    tmp_path: Path, recipe_folder: Path
) -> None:
    first = release_of(recipe_folder, tmp_path / "run")
    assert asked(str(first.path), tmp_path / "mine") == 0
    second = publish(tmp_path / "mine")
    assert second.digest == first.digest
    assert ledger_of(second) == ledger_of(first)


def test_after_a_change_of_queries_only_the_difference_is_asked(
    tmp_path: Path, recipe_folder: Path
) -> None:
    release = release_of(recipe_folder, tmp_path / "run").path
    edit(release / "recipe", "queries.jsonl", "a poppy", "a tulip")
    assert asked(release, tmp_path / "mine") == 1


def test_after_a_change_of_the_prompt_everything_is_asked(
    tmp_path: Path, recipe_folder: Path
) -> None:
    release = release_of(recipe_folder, tmp_path / "run").path
    edit(release / "recipe", "prompt.md", "Name", "Say")
    assert asked(release, tmp_path / "mine") == 6


def test_restored_answers_do_not_count_as_bought(tmp_path: Path, recipe_folder: Path) -> None:
    release = release_of(recipe_folder, tmp_path / "run")
    assert take_over(release.path, tmp_path / "mine") == 6
    assert take_over(release.path, tmp_path / "mine") == 0
    with Journal(tmp_path / "mine" / "journal.sqlite") as journal:
        assert {times for _, times in journal} == {0}


def test_an_answer_of_ones_own_stays(tmp_path: Path, recipe_folder: Path) -> None:
    release = release_of(recipe_folder, tmp_path / "run")
    key, own = ledger_of(release)[0]["digest"], Reply((), usage=next(iter(replies(release))).usage)
    with Journal(tmp_path / "mine" / "journal.sqlite") as journal:
        journal.put(key, "m", own)
    assert take_over(release.path, tmp_path / "mine") == 5
    with Journal(tmp_path / "mine" / "journal.sqlite") as journal:
        assert journal.get(key) == own
        assert dict(journal)[key] == 1


def replies(release: Release) -> list[Reply]:
    return [Reply.from_json(row["reply"]) for row in ledger_of(release)]


def test_the_ledger_can_be_left_out_and_put_back(tmp_path: Path, recipe_folder: Path) -> None:
    without = release_of(recipe_folder, tmp_path / "run", ledger=False)
    assert not (without.path / "ledger").exists()
    assert "ledger" not in (without.path / "README.md").read_text(encoding="utf-8")
    assert take_over(without.path, tmp_path / "mine") == 0
    assert not (tmp_path / "mine").exists()
    with_it = publish(tmp_path / "run")
    assert len(ledger_of(with_it)) == 6
    assert with_it.digest == without.digest


def test_when_answers_were_bought_changes_no_byte_of_a_release(
    tmp_path: Path, recipe_folder: Path
) -> None:
    first = release_of(recipe_folder, tmp_path / "run")
    second = release_of(recipe_folder, tmp_path / "later")
    for path in first.path.rglob("*.parquet"):
        twin = second.path / path.relative_to(first.path)
        assert path.read_bytes() == twin.read_bytes()
    assert first.digest == second.digest


def test_a_run_without_its_journal_is_published_without_a_ledger(
    tmp_path: Path, recipe_folder: Path
) -> None:
    generate(recipe_folder, teacher=Echo(), out=tmp_path / "run")
    (tmp_path / "run" / "journal.sqlite").unlink()
    release = publish(tmp_path / "run")
    assert not (release.path / "ledger").exists()
    assert publish(tmp_path / "run") == release
    assert not (tmp_path / "run" / "journal.sqlite").exists()


def test_answers_that_the_journal_has_and_the_release_does_not_stay_at_home(
    tmp_path: Path, recipe_folder: Path
) -> None:
    generate(recipe_folder, teacher=Echo(), out=tmp_path / "run")
    generate(
        recipe_folder, teacher=Echo(), out=tmp_path / "run", settings=GenerateSettings(limit=2)
    )
    assert len(ledger_of(publish(tmp_path / "run"))) == 2


def test_a_recipe_that_is_no_release_has_nothing_to_replay(
    tmp_path: Path, recipe_folder: Path
) -> None:
    assert take_over("language_id", tmp_path / "mine") == 0
    assert take_over(recipe_folder, tmp_path / "mine") == 0


@pytest.mark.parametrize("damage", [b"PAR1 not really", None])
def test_a_ledger_that_cannot_be_read_says_what_to_do(
    tmp_path: Path, recipe_folder: Path, damage: bytes | None
) -> None:
    release = release_of(recipe_folder, tmp_path / "run")
    (path,) = (release.path / "ledger").iterdir()
    other = next((release.path / "data").iterdir()).read_bytes()
    path.write_bytes(damage or other)
    with pytest.raises(DatasetError, match="Run without the ledger"):
        take_over(release.path, tmp_path / "mine")


class Liar(Echo):
    """Echoes, but says green where the rose is."""

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        if "rose" in messages[-1]["content"]:
            messages = [{"role": "user", "content": "colour green"}]
        return await super().sample(messages, sampling)


@pytest.fixture
def release(recipe_folder: Path, tmp_path: Path) -> Path:
    """A release of six answers."""
    generate(recipe_folder, teacher=Echo(), out=tmp_path / "theirs")
    return publish(tmp_path / "theirs").path


def summary(made: Generated) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made.path / "answers/generation.json").read_text())
    return found


def test_answers_out_of_a_ledger_are_counted_apart_from_those_bought(
    release: Path, tmp_path: Path
) -> None:
    teacher = Echo()
    made = generate(str(release), teacher=teacher, out=tmp_path / "mine")
    assert teacher.calls == 0
    expected = {"source": str(release), "revision": "1.0.0", "answers": 6, "bought": 0}
    assert made.from_ledger == summary(made)["from_ledger"] == expected
    assert reuse_text(expected) == f"6 answers from {release}@1.0.0, 0 bought"
    assert generate(str(release), teacher=teacher, out=tmp_path / "mine").from_ledger == expected


def test_a_run_that_bought_its_answers_speaks_of_no_ledger(
    recipe_folder: Path, tmp_path: Path
) -> None:
    made = generate(recipe_folder, teacher=Echo(), out=tmp_path / "run")
    assert made.from_ledger is None
    assert "from_ledger" not in summary(made)


def test_a_ledgers_answers_are_counted_apart_also_for_another_recipe_in_the_folder(
    release: Path, recipe_folder: Path, tmp_path: Path
) -> None:
    generate(str(release), teacher=Echo(), out=tmp_path / "run")
    more = (recipe_folder / "queries.jsonl").read_text() + '{"query": "a leaf, colour red"}\n'
    (recipe_folder / "queries.jsonl").write_text(more)
    made = generate(recipe_folder, teacher=Echo(), out=tmp_path / "run")
    assert made.from_ledger is not None
    assert (made.from_ledger["answers"], made.from_ledger["bought"]) == (6, 1)


def test_without_the_ledger_everything_is_bought_also_where_a_journal_has_it(
    release: Path, tmp_path: Path
) -> None:
    generate(str(release), teacher=Echo(), out=tmp_path / "run")
    teacher = Liar()
    made = generate(
        str(release), teacher=teacher, out=tmp_path / "run", settings=GenerateSettings(ledger=False)
    )
    assert teacher.calls == 6
    assert made.from_ledger is None
    assert made.rows["raw"][0] == "colour green"
    with Journal(tmp_path / "run/journal.sqlite") as journal:
        assert {times for _, times in journal} == {1}


def test_some_of_a_ledgers_answers_can_be_asked_for_again(release: Path, tmp_path: Path) -> None:
    teacher = Liar()
    settings = GenerateSettings(verify_ledger=100)
    made = generate(str(release), teacher=teacher, out=tmp_path / "mine", settings=settings)
    assert made.from_ledger is not None
    assert made.from_ledger["verified"] == {"asked": 6, "agree": 5}
    assert reuse_text(made.from_ledger).endswith("0 bought; of 6 asked again 5 agree")
    assert teacher.calls == 6
    assert made.rows["answer"][0] == "red"  # the ledger's


def test_no_more_are_asked_again_than_wanted(release: Path, tmp_path: Path) -> None:
    teacher, settings = Echo(), GenerateSettings(verify_ledger=2)
    made = generate(str(release), teacher=teacher, out=tmp_path / "mine", settings=settings)
    assert made.from_ledger is not None
    assert made.from_ledger["verified"] == {"asked": 2, "agree": 2}
    assert teacher.calls == 2


def test_a_release_and_its_card_say_whose_answers_they_are(release: Path, tmp_path: Path) -> None:
    generate(str(release), teacher=Echo(), out=tmp_path / "mine")
    made = publish(tmp_path / "mine").path
    (taken,) = json.loads((made / "manifest.json").read_text())["from_ledger"]
    assert (taken["source"], taken["answers"], taken["bought"]) == (release.name, 6, 0)
    assert (
        "6 of the answers here were not asked for in this run" in (made / "README.md").read_text()
    )

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.generation.cache import Journal
from distill_datasets.generation.reuse import reuse_text
from distill_datasets.generation.run import Generated, generate
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.models.sampler import Echo, Reply, Sampling
from distill_datasets.releases.release import publish
from distill_datasets.schema import Message


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
    assert (taken["source"], taken["answers"], taken["bought"]) == (str(release), 6, 0)
    assert (
        "6 of the answers here were not asked for in this run" in (made / "README.md").read_text()
    )

import gc
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_from_disk

from distill_datasets.generation.rows import ROWS_FILE, Tally, _collect_rarely, finish, stream
from distill_datasets.generation.run import generate
from distill_datasets.models.sampler import Reply, Sample, Sampling, Usage
from distill_datasets.schema import Message, answer_features
from tests.conftest import edit

FAILURE = {"type": "time-out", "status": None, "message": "too slow", "attempts": 8}


def rows() -> Dataset:
    some: list[dict[str, Any]] = [
        {"id": "a", "sample": 0, "answer": "red", "teacher_response_tokens": 3},
        {"id": "a", "sample": 1, "rejection": "empty", "teacher_response_tokens": 1},
        {"id": "b", "sample": 0, "rejection": "truncated", "teacher_response_tokens": 9},
        {"id": "c", "sample": 0, "error": FAILURE},
    ]
    for row in some[:3]:
        row |= {"teacher_prompt_tokens": 20, "teacher_cached_tokens": 10}
    full = [{name: row.get(name) for name in answer_features()} for row in some]
    return Dataset.from_list(full, features=answer_features())


def test_rows_are_counted_by_what_became_of_them_and_tokens_by_what_was_paid() -> None:
    tally = Tally.of(rows())
    assert (tally.rows, tally.kept, tally.errors) == (4, 1, 1)
    assert tally.rejected == {"empty": 1, "truncated": 1}
    assert tally.tokens == {"prompt": 40, "cached": 20, "response": 13}  # one prompt for a query


def test_nothing_is_counted_as_nothing() -> None:
    tally = Tally.of(rows().select(range(0)))
    assert (tally.rows, tally.kept) == (0, 0)
    assert tally.tokens == {"prompt": 0, "cached": 0, "response": 0}


def test_a_finished_folder_holds_the_rows(tmp_path: Path) -> None:
    path = str(tmp_path / ROWS_FILE)
    written = rows().map(lambda row: row, cache_file_name=path, new_fingerprint="named")
    finish(written, tmp_path)
    found = load_from_disk(tmp_path)
    assert found.to_dict() == rows().to_dict()
    assert found.features == answer_features()
    assert found["error"][:] == [None, None, None, FAILURE]
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        ROWS_FILE,
        "dataset_info.json",
        "state.json",
    ]


def test_rows_are_read_a_few_at_a_time_and_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill_datasets.generation.rows._ROWS_AT_ONCE", 3)
    rows().save_to_disk(tmp_path)
    saved = load_from_disk(tmp_path)
    for some, order in ((rows(), "aabc"), (saved, "aabc"), (saved.select([3, 0, 2, 1]), "caba")):
        pieces = list(stream(some))
        assert max(map(len, pieces)) == 3
        assert [name for piece in pieces for name in piece["id"].to_pylist()] == list(order)


@dataclass
class Odd:
    """Answers with more tokens than there are, and with half of a pair."""

    model: str = "odd"
    identity: str = "odd"

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        return Reply((Sample("colour red", "stop", 10**30),), Usage(10**30, 0))


def test_counts_that_nobody_can_have_counted_are_unknown_in_rows_now_and_later(
    recipe_folder: Path, tmp_path: Path
) -> None:
    edit(recipe_folder, "prompt.md", "Name the colour", "Say the colour")
    for _ in range(2):
        made = generate(recipe_folder, teacher=Odd(), out=tmp_path / "run")
        assert made.errors == 0 and len(made.rows) == 6
        for name in ("teacher_prompt_tokens", "teacher_response_tokens"):
            assert made.rows[name][:] == [None] * 6
        shutil.rmtree(tmp_path / "run/answers")


def test_what_was_set_for_the_garbage_collector_is_set_again() -> None:
    before = gc.get_threshold()
    with pytest.raises(KeyError), _collect_rarely():
        assert gc.get_threshold()[0] > before[0]
        raise KeyError
    assert gc.get_threshold() == before

import asyncio
import sqlite3
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from distill_datasets.errors import OutputError
from distill_datasets.generation.cache import Journal
from distill_datasets.models.sampler import Reply, Sample, Sampling, Usage, digest, request_digest
from distill_datasets.schema import Message

REPLY = Reply((Sample('réponse "x"\n', "stop", 3),), Usage(7, 2))


def test_an_answer_comes_back_as_it_was_put(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        assert journal.get("a") is None
        journal.put("a", "m", REPLY)
        assert journal.get("a") == REPLY


def test_a_second_purchase_keeps_the_first_answer_and_is_counted(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        journal.put("a", "m", REPLY)
        journal.put("a", "m", Reply((), Usage(0, 0)))
        assert journal.get("a") == REPLY
        assert list(journal) == [("a", 2)]


_BUYING = """
import sys
from pathlib import Path
from distill_datasets.generation.cache import Journal
from distill_datasets.models.sampler import Reply, Sample, Usage

name = sys.argv[2]
with Journal(Path(sys.argv[1])) as journal:
    for row in range(300):
        for digest in (f"{name}{row}", f"both {row}"):
            if journal.get(digest) is None:
                journal.put(digest, name, Reply((Sample(digest, "stop", 1),), Usage(1, 0)))
        journal.reject(f"no {row}", name, type="bad request", status=400, message=name)
        assert journal.get(f"{name}{row}").samples[0].text == f"{name}{row}"
"""


def test_two_processes_buy_into_one_journal_and_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    buyers = [subprocess.Popen([sys.executable, "-c", _BUYING, str(path), name]) for name in "ab"]
    assert [buyer.wait() for buyer in buyers] == [0, 0]
    with Journal(path) as journal:
        assert len(journal) == 900
        for digest, times in journal:
            found = journal.get(digest)
            assert found is not None and found.samples[0].text == digest
            assert times in (1, 2)
        assert all(journal.rejection(f"no {row}") for row in range(300))


def test_answers_that_come_together_are_all_on_disk_before_anyone_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"

    async def keep(journal: Journal, digest: str) -> int:
        await journal.put_together(digest, "m", REPLY)
        with Journal(path) as other:
            return sum(other.get(one) == REPLY for one in "abc")

    async def work(journal: Journal) -> list[int]:
        return await asyncio.gather(*(keep(journal, digest) for digest in "abca"))

    with Journal(path) as journal:
        assert asyncio.run(work(journal)) == [3] * 4
        assert dict(journal) == {"a": 2, "b": 1, "c": 1}


def test_answers_that_cannot_be_kept_are_an_error_for_everyone_who_waits(tmp_path: Path) -> None:
    async def work(journal: Journal) -> list[object]:
        both = (journal.put_together(digest, "m", REPLY) for digest in "ab")
        return await asyncio.gather(*both, return_exceptions=True)

    with Journal(tmp_path / "journal.sqlite") as journal:
        journal._database.execute("DROP TABLE answers")
        assert [type(found) for found in asyncio.run(work(journal))] == [OutputError] * 2


def test_a_journal_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose a folder that is writable"):
        Journal(tmp_path / "file" / "journal.sqlite")


def test_an_answer_paid_for_elsewhere_is_kept_as_bought_zero_times(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        journal.put("a", "m", REPLY)
        entries = [("a", "m", Reply((), Usage(0, 0)).to_json()), ("b", "m", REPLY.to_json())]
        assert journal.add(entries) == 1
        assert journal.get("a") == journal.get("b") == REPLY
        assert list(journal) == [("a", 1), ("b", 0)]
        assert journal.entry("b") == entries[1]
        assert journal.entry("c") is None
        journal.put("b", "m", REPLY)
        assert list(journal) == [("a", 1), ("b", 1)]


def test_a_rejection_is_remembered_with_its_reason(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        assert journal.rejection("a") is None
        journal.reject("a", "m", type="context length", status=400, message="too long")
        journal.reject("a", "m", type="other", status=None, message="a later one changes nothing")
    with Journal(tmp_path / "journal.sqlite") as journal:
        known = journal.rejection("a")
        assert known is not None
        assert (str(known), known.type, known.status) == ("too long", "context length", 400)
        assert len(journal) == 0 and journal.get("a") is None


def test_a_journal_of_an_earlier_version_gets_room_for_rejections(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    with sqlite3.connect(path) as database:
        database.execute(
            "CREATE TABLE answers (digest TEXT NOT NULL PRIMARY KEY, model TEXT NOT NULL, "
            "reply TEXT NOT NULL, bought_at REAL NOT NULL, times_bought INTEGER NOT NULL)"
        )
        database.execute("INSERT INTO answers VALUES ('a', 'm', ?, 0.0, 1)", (REPLY.to_json(),))
    database.close()
    with Journal(path) as journal:
        journal.reject("b", "m", type="bad request", status=400, message="no")
        assert journal.get("a") == REPLY and journal.rejection("b") is not None


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.0, stop=("\n", "é"), seed=3),
        Sampling(json_schema='{"a": 1}', extra='{"x": "ü"}', top_logprobs=0),
    ],
)
def test_a_request_is_kept_under_the_digest_of_all_it_says(sampling: Sampling) -> None:
    unset = {name for name in ("top_logprobs", "json_schema", "extra")} - {
        name for name, value in asdict(sampling).items() if value is not None
    }
    said = {name: value for name, value in asdict(sampling).items() if name not in unset}
    messages: list[Message] = [
        {"role": "system", "content": 'Say "é",\n\tthen \u2028 😀 \x01.'},
        {"content": "", "role": "user"},
    ]
    whole = digest({"model": "a/“b”", "messages": messages, "sampling": said})
    assert request_digest("a/“b”", messages, sampling) == whole

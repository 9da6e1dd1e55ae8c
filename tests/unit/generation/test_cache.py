import asyncio
import os
import shutil
import sqlite3
import threading
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest

from distill_datasets.errors import OutputError, RejectedError
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


def test_answers_that_come_together_are_all_on_disk_before_anyone_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"

    async def keep(journal: Journal, digest: str) -> int:
        await journal.store(digest, "m", REPLY)
        with Journal(path) as other:
            return sum(other.get(one) == REPLY for one in "abc")

    async def work(journal: Journal) -> list[int]:
        return await asyncio.gather(*(keep(journal, digest) for digest in "abca"))

    with Journal(path) as journal:
        assert asyncio.run(work(journal)) == [3] * 4
        assert dict(journal) == {"a": 2, "b": 1, "c": 1}


def test_answers_that_cannot_be_kept_are_an_error_for_everyone_who_waits(tmp_path: Path) -> None:
    async def work(journal: Journal) -> list[object]:
        both = (journal.store(digest, "m", REPLY) for digest in "ab")
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
        journal.reject("a", "m", RejectedError("too long", type="context length", status=400))
        journal.reject("a", "m", RejectedError("a later one changes nothing", type="other"))
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
        journal.reject("b", "m", RejectedError("no", type="bad request", status=400))
        assert journal.get("a") == REPLY and journal.rejection("b") is not None


def test_a_journal_says_its_format_and_a_later_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    with Journal(path) as journal:
        journal.put("a", "m", REPLY)
        assert journal._database.execute("PRAGMA user_version").fetchone() == (1,)
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 2")
    with pytest.raises(OutputError, match="later version .*format 2, this one knows 1"):
        Journal(path)


def test_an_answer_is_on_disk_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, order = tmp_path / "journal.sqlite", list[str]()
    log, sync = Path(f"{path}-wal"), os.fsync

    def synced(file: int) -> None:
        sync(file)
        if os.path.samestat(os.fstat(file), log.stat()):
            order.append("synced")

    async def store(journal: Journal, digest: str) -> None:
        await journal.store(digest, "m", REPLY)
        order.append("stored")

    async def work(journal: Journal) -> None:
        await asyncio.gather(*(store(journal, str(row)) for row in range(50)))

    monkeypatch.setattr(os, "fsync", synced)
    with Journal(path) as journal:
        asyncio.run(work(journal))
        assert order == ["synced", *["stored"] * 50]  # once for all
        journal.put("another", "m", REPLY)
        assert order[-1] == "synced"


def test_an_answer_that_comes_while_the_disk_is_waited_for_outlives_a_killed_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal.sqlite"
    begun, ended, sync = threading.Event(), threading.Event(), os.fsync

    def slow(file: int) -> None:
        begun.set()
        ended.wait(30)
        sync(file)

    async def work(journal: Journal) -> list[str]:
        first = asyncio.create_task(journal.store("a", "m", REPLY))
        await asyncio.to_thread(begun.wait, 30)
        second = asyncio.create_task(journal.store("b", "m", REPLY))
        for _ in range(3):  # turns of the event loop
            await asyncio.sleep(0)
        with closing(sqlite3.connect(path)) as other:  # what another process finds
            found = [digest for (digest,) in other.execute("SELECT digest FROM answers")]
        assert not (first.done() or second.done()), "neither counts before the disk has it"
        ended.set()
        await asyncio.gather(first, second)
        return found

    with Journal(path) as journal:
        monkeypatch.setattr(os, "fsync", slow)
        assert sorted(asyncio.run(work(journal))) == ["a", "b"]


def test_a_disk_that_fails_is_an_error_for_everyone_who_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: int) -> None:
        raise OSError(5, "Input/output error")

    async def work(journal: Journal) -> list[object]:
        both = (journal.store(digest, "m", REPLY) for digest in "ab")
        return await asyncio.gather(*both, return_exceptions=True)

    with Journal(tmp_path / "journal.sqlite") as journal:
        monkeypatch.setattr(os, "fsync", fail)
        assert [type(found) for found in asyncio.run(work(journal))] == [OutputError] * 2


def test_an_answer_whose_waiter_is_cancelled_is_kept_and_holds_nobody_up(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"

    async def cancelled(journal: Journal) -> None:
        waiting = asyncio.create_task(journal.store("a", "m", REPLY))
        await asyncio.sleep(0)  # it waits, and what stores is about to begin
        waiting.cancel()
        for one in asyncio.all_tasks() - {asyncio.current_task()}:
            one.cancel()

    with Journal(path) as journal:
        asyncio.run(cancelled(journal))
    with Journal(path) as journal:
        assert dict(journal) == {"a": 1}
        asyncio.run(cancelled(journal))
        asyncio.run(asyncio.wait_for(journal.store("b", "m", REPLY), 10))
        assert dict(journal) == {"a": 2, "b": 1}


def test_a_copy_of_the_files_holds_all_that_was_stored_when_it_was_made(tmp_path: Path) -> None:
    """What a power loss leaves: the files as they were at any moment."""
    path = tmp_path / "run" / "journal.sqlite"

    async def store(journal: Journal, number: int) -> None:
        await journal.store(str(number), "m", REPLY)
        acknowledged.append(number)
        if number % 9 == 0:
            copy = tmp_path / f"copy {number}"
            shutil.copytree(path.parent, copy)
            copies.append((copy, set(acknowledged)))

    async def work(journal: Journal) -> None:
        for first in range(0, 60, 6):
            await asyncio.gather(*(store(journal, first + one) for one in range(6)))

    acknowledged: list[int] = []
    copies: list[tuple[Path, set[int]]] = []
    with Journal(path) as journal:
        asyncio.run(work(journal))
    assert len(copies) == 7
    for copy, stored in copies:
        with Journal(copy / path.name) as journal:
            assert stored <= {int(digest) for digest, _ in journal}


def test_an_answer_that_cannot_be_read_is_forgotten_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "journal.sqlite"
    with Journal(path) as journal:
        for digest in "abc":
            journal.put(digest, "m", REPLY)
        for digest, text in (("a", "{torn"), ("b", '{"samples": 3}')):
            journal._database.execute(
                "UPDATE answers SET reply = ? WHERE digest = ?", (text, digest)
            )
    with Journal(path) as journal:
        assert [reply for *_, reply, _ in journal.bought()] == ['{"samples": 3}', REPLY.to_json()]
        assert journal.entry("a") is None and journal.first_tokens() == []
        assert [journal.get(digest) for digest in "abc"] == [None, None, REPLY]
        journal.put("a", "m", REPLY)
        assert journal.get("a") == REPLY
    assert capsys.readouterr().err.count("can't be read: such rows are asked again") == 1


@pytest.mark.parametrize("torn", ["its end", "a page", "many pages"])
def test_of_a_damaged_journal_all_that_can_be_read_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], torn: str
) -> None:
    path = tmp_path / "journal.sqlite"
    with Journal(path) as journal:
        journal.put_all("m", [(f"digest {row}", REPLY) for row in range(2000)])
        journal.reject("no", "m", RejectedError("no", type="bad request", status=400))
    content = bytearray(path.read_bytes())
    page, pages = 4096, len(content) // 4096
    if torn == "its end":
        content = content[: len(content) * 3 // 4]
    for place in {"a page": [pages // 2], "many pages": range(9, pages, 9)}.get(torn, []):
        content[place * page : (place + 1) * page] = b"\xff" * page
    path.write_bytes(content)
    with Journal(path) as journal:
        kept = len(journal)
        assert 600 < kept < 2000
        assert all(journal.get(digest) == REPLY for digest, _ in journal)
        journal.put("new", "m", REPLY)
    with Journal(path) as journal:
        assert len(journal) == kept + 1
    said = capsys.readouterr().err
    assert said.count("was damaged") == 1 and f"{kept:,} answers were saved" in said
    assert (tmp_path / "journal.sqlite.damaged").read_bytes().startswith(content)


def test_a_file_that_is_no_journal_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"my diary " * 1000)
    with pytest.raises(OutputError, match="nobody can read"):
        Journal(path)
    assert path.read_bytes() == b"my diary " * 1000


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.0, stop=("\n", "é"), seed=3),
        Sampling(json_schema='{"a": 1}', extra='{"x": "ü"}', top_logprobs=0),
    ],
)
def test_a_request_is_kept_under_the_digest_of_all_it_says(sampling: Sampling) -> None:
    unset = {name for name in ("top_logprobs", "json_schema", "extra", "tools")} - {
        name for name, value in asdict(sampling).items() if value is not None
    }
    said = {name: value for name, value in asdict(sampling).items() if name not in unset}
    messages: list[Message] = [
        {"role": "system", "content": 'Say "é",\n\tthen \u2028 😀 \x01.'},
        {"content": "", "role": "user"},
    ]
    whole = digest({"model": "a/“b”", "messages": messages, "sampling": said})
    assert request_digest("a/“b”", messages, sampling) == whole

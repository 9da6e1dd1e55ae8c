import subprocess
import sys
from pathlib import Path

import pytest

from distill_datasets.errors import OutputError
from distill_datasets.journal import Journal
from distill_datasets.sampler import Reply, Sample, Usage

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


def test_two_processes_write_one_journal(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from distill_datasets.journal import Journal\n"
        "from distill_datasets.sampler import Reply, Usage\n"
        "with Journal(Path(sys.argv[1])) as journal:\n"
        "    for row in range(300): journal.put(f'{sys.argv[2]}{row}', 'm', Reply((), Usage(1, 0)))"
    )
    path = tmp_path / "journal.sqlite"
    writers = [subprocess.Popen([sys.executable, "-c", script, str(path), name]) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    with Journal(path) as journal:
        assert len(journal) == 600


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

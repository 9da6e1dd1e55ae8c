import sys
from pathlib import Path

from distill_datasets.generation.cache import Journal
from tests.support.forks import Process

_BUYING = """
import sys
from pathlib import Path
from distill_datasets.errors import RejectedError
from distill_datasets.generation.cache import Journal
from distill_datasets.models.sampler import Reply, Sample, Usage

name = sys.argv[2]
with Journal(Path(sys.argv[1])) as journal:
    for row in range(300):
        for digest in (f"{name}{row}", f"both {row}"):
            if journal.get(digest) is None:
                journal.put(digest, name, Reply((Sample(digest, "stop", 1),), Usage(1, 0)))
        journal.reject(f"no {row}", name, RejectedError(name, type="bad request", status=400))
        assert journal.get(f"{name}{row}").samples[0].text == f"{name}{row}"
"""


def test_two_processes_buy_into_one_journal_and_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    buyers = [Process([sys.executable, "-c", _BUYING, str(path), name]) for name in "ab"]
    assert [buyer.wait() for buyer in buyers] == [0, 0]
    with Journal(path) as journal:
        assert len(journal) == 900
        for digest, times in journal:
            found = journal.get(digest)
            assert found is not None and found.samples[0].text == digest
            assert times in (1, 2)
        assert all(journal.rejection(f"no {row}") for row in range(300))

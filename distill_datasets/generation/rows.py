"""Queries to answered rows: `datasets.map` over an async function, a row's failure a value."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import Buyer
from distill_datasets.generation.garbage import collect_rarely
from distill_datasets.generation.pricing import Meter
from distill_datasets.generation.rate_limit import Limits
from distill_datasets.generation.row_map import RowMap
from distill_datasets.generation.teachers import Answerer
from distill_datasets.models.sampler import digest
from distill_datasets.progress import Progress

if TYPE_CHECKING:
    from datasets import Dataset

_VERSION = 2  # goes into every fingerprint: raise it when rows come out differently


def ask(  # noqa: PLR0913 (what, of whom, how fast, for how much, and where it goes)
    queries: "Dataset",
    teachers: Answerer,
    *,
    journal: Journal,
    title: str,
    limits: Limits | None = None,
    meter: Meter | None = None,
    file: Path | None = None,
) -> "Dataset":
    """Answer rows of `id`, `query`, `group`, `reference`, `split`, in their order.

    One row a sample, with `schema.answer_features()`, in memory or in an Arrow `file`. Safe inside
    a running event loop: the sampling runs on a loop of its own in another thread. Ctrl-C waits
    for the requests in flight, so that what was paid is kept. Raises what no row would escape,
    such as `AccessError` and `BudgetReached`, and `GenerationError` where the first rows all fail
    alike.
    """
    with collect_rarely(), Progress(title, len(queries), meter=meter) as progress:
        buyer = Buyer(journal, progress, limits=limits, meter=meter)
        rows = RowMap(teachers.answer, teachers.model, buyer, progress)
        fingerprint = digest([_VERSION, queries._fingerprint, *teachers.parts])[:32]
        with ThreadPoolExecutor(1) as thread:
            mapped = thread.submit(rows.map, queries, fingerprint, file)
            try:
                answered = mapped.result()
            except BaseException:
                rows.stop()
                raise
    if rows.fatal is not None:
        raise rows.fatal
    return answered

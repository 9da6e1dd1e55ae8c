"""Queries to answered rows: `datasets.map` over an async function, a row's failure a value."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import Buyer, Meter
from distill_datasets.generation.garbage import collect_rarely
from distill_datasets.generation.rate_limit import Limits
from distill_datasets.generation.row_map import RowMap
from distill_datasets.models.sampler import Reply, Sample, Sampler, Sampling, digest
from distill_datasets.progress import Progress
from distill_datasets.recipes.parsing import Parsed, Reader
from distill_datasets.schema import Message

if TYPE_CHECKING:
    from datasets import Dataset

_VERSION = 2  # goes into every fingerprint: raise it when rows come out differently


class Answering(Protocol):
    """How one query becomes rows: whom to ask, and how to read what they say."""

    @property
    def parts(self) -> Sequence[Any]:
        """JSON values that name everything the rows depend on but the queries."""
        ...

    @property
    def model(self) -> str:
        """Whom a row names that nobody answered."""
        ...

    @property
    def identity(self) -> str:
        """That with everything that decides the answers, stable across processes."""
        ...

    async def answer(
        self, query: str, buyer: Buyer, reference: str | None = None
    ) -> list[dict[str, Any]]:
        """The columns of every row of a query that asking decides; raises what `buy` raises.

        `reference` is the answer known beforehand, for those who check answers against it.
        """
        ...


@dataclass(frozen=True)
class Asking:
    """One teacher: with which messages, and how to read and rewrite the text."""

    sampler: Sampler
    sampling: Sampling
    messages: Callable[[str], list[Message]]
    reader: Reader
    write: Callable[[str, str], str]

    @property
    def parts(self) -> Sequence[Any]:
        """The sampler, how it samples, and how its text is read."""
        return [self.sampler.identity, asdict(self.sampling), *self.reader.parts]

    @property
    def model(self) -> str:
        """The sampler's."""
        return self.sampler.model

    @property
    def identity(self) -> str:
        """The sampler's."""
        return self.sampler.identity

    async def answer(
        self, query: str, buyer: Buyer, reference: str | None = None
    ) -> list[dict[str, Any]]:
        """A row a sample."""
        reply = await buyer.buy(self.sampler, self.messages(query), self.sampling)
        return [self.row(sample, reply, index) for index, sample in enumerate(reply.samples)]

    def row(self, sample: Sample, reply: Reply, index: int) -> dict[str, Any]:
        """The columns that one sample decides."""
        parsed: Parsed = self.reader.read(sample.text, sample.stop_reason)
        written = None
        if parsed.answer is not None:
            written = self.write(sample.text, parsed.answer)
        return {
            "teacher": self.sampler.model,
            "sample": index,
            "raw": sample.text,
            "stop_reason": sample.stop_reason,
            "teacher_prompt_tokens": reply.usage.prompt_tokens,
            "teacher_cached_tokens": reply.usage.cached_tokens,
            "teacher_response_tokens": sample.tokens,
            "answer": parsed.answer,
            "response": written,
            "rejection": parsed.rejection,
        }


def ask(  # noqa: PLR0913 (what, of whom, how fast, for how much, and where it goes)
    queries: "Dataset",
    asking: Answering,
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
        rows = RowMap(asking.answer, asking.model, buyer, progress)
        fingerprint = digest([_VERSION, queries._fingerprint, *asking.parts])[:32]
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

"""A provider's batches: what one is, and what is asked of whoever offers them."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from distill_datasets.errors import DistillError
from distill_datasets.models.sampler import Reply, Sampling
from distill_datasets.schema import Message


@dataclass(frozen=True)
class BatchJob:
    """A batch that is planned, sent or being worked on.

    `key` is ours, and travels with it; `file` and `name` are the provider's, None before it gave
    them. `sent` says that the provider was asked to start it, whether or not it answered.
    """

    key: str
    identity: str
    sampling: Sampling
    requests: int
    file: str | None = None
    sent: bool = False
    name: str | None = None


@dataclass(frozen=True)
class BatchState:
    """How far a batch is at the provider.

    `files` hold what it answered, whole once it is `over`; `problem` is why it failed, and
    `too_much` says that it did because too much was waiting already.
    """

    status: str
    over: bool
    done: int
    files: tuple[str, ...]
    problem: str
    too_much: bool


class BatchProvider(Protocol):
    """Takes many requests in one file, and answers them within a day."""

    most_requests: int
    most_bytes: int

    def line(self, digest: str, messages: Sequence[Message], sampling: Sampling) -> bytes:
        """One request of a batch's file."""
        ...

    async def upload(self, path: Path) -> str:
        """Send a file of requests; the provider's name for it."""
        ...

    async def create(self, file: str, key: str) -> str:
        """Have a file worked on, which costs; the provider's name for the batch."""
        ...

    async def find(self, key: str) -> str | None:
        """The provider's name for a batch of ours, if it ever heard of it."""
        ...

    async def look(self, name: str) -> BatchState:
        """How far a batch is."""
        ...

    def lines(self, file: str) -> AsyncIterator[bytes]:
        """What a batch answered, a request a line, in no order.

        Raises `RejectedError` where the provider has deleted it.
        """
        ...

    def read(self, line: bytes, sampling: Sampling) -> tuple[str, Reply | DistillError]:
        """A request's digest and what became of it."""
        ...


def new_key() -> str:
    """Names a batch, before the provider has a name for it."""
    return uuid4().hex

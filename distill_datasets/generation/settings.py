"""How answers are asked for: how fast, how many, and by which way."""

from dataclasses import dataclass
from typing import Any

from distill_datasets.generation.rate_limit import Limits
from distill_datasets.settings import check, setting


@dataclass(frozen=True)
class GenerateSettings:
    """What `generate` takes beside the recipe; none of it changes an answer.

    `GenerateSettings(concurrency=64, requests_per_minute=500)` asks a small endpoint. With
    `processes`, a Tinker teacher's requests are made by so many, since a client keeps one core
    busy. With `stream`, every answer that is bought is journaled with the time to its first
    token. With `batch`, answers come out of the provider's batches, where it has them.
    """

    concurrency: int = setting(
        256, "most requests in flight to each teacher", group="speed", at_least=1
    )
    requests_per_minute: float | None = setting(
        None, "most requests a minute", group="speed", flag="rpm", above=0, unset="no limit"
    )
    tokens_per_minute: float | None = setting(
        None, "most tokens a minute", group="speed", flag="tpm", above=0, unset="no limit"
    )
    timeout: float | None = setting(
        None,
        "seconds to wait for one answer",
        group="speed",
        above=0,
        unset="ten times what nearly all answers take, and at least 60",
    )
    processes: int = setting(
        1, "processes that make a Tinker teacher's requests", group="speed", at_least=1
    )
    limit: int | None = setting(None, "ask only the first N queries", at_least=1, unset="all")
    for_evidence: bool = setting(
        False, "of the test split ask only as many queries as the recipe's margin needs"
    )
    ledger: bool = setting(
        True, "buy every answer again, also where a release's ledger has it; publish without one"
    )
    verify_ledger: int = setting(
        0, "answers out of a release's ledger to ask for again, to say how many agree", at_least=0
    )
    ask_again: bool = setting(
        False, "ask again what the endpoint rejected for good in an earlier run"
    )
    trust: bool = setting(
        False, "read the queries that somebody else's recipe names outside its own folder"
    )
    stop_after_rejected: int = setting(
        50, "end the run when its first N rows are all rejected; 0 never ends it", at_least=0
    )
    stream: bool = setting(
        False,
        "stream answers, and journal the time to the first token",
        group="streams and batches",
    )
    batch: bool = setting(
        False, "buy in the provider's batches, at half price", group="streams and batches"
    )
    poll: float = setting(
        60.0,
        "with --batch, seconds between two looks at the batches",
        group="streams and batches",
        at_least=0,
    )
    wait: bool = setting(
        True, "with --batch, don't stay until the batches end", group="streams and batches"
    )

    def __post_init__(self) -> None:
        """Raises `SettingsError` for a value out of its range."""
        check(self)

    @property
    def opening(self) -> dict[str, Any]:
        """How `open_sampler` opens the teachers."""
        return {"stream": self.stream, "processes": self.processes, "timeout": self.timeout}

    @property
    def limits(self) -> Limits:
        """How fast each teacher may be asked."""
        return Limits(self.concurrency, self.requests_per_minute, self.tokens_per_minute)

"""Which of several answers to one query is kept, by majority, verifier or judge."""

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, TypeVar

from distill_datasets.errors import FATAL
from distill_datasets.generation.judging import Judging
from distill_datasets.generation.rows import Asking
from distill_datasets.models.sampler import Reply, Sample, Sampler, Sampling, request_digest
from distill_datasets.recipes.prompt import holds
from distill_datasets.schema import Message

NONE_PARSED = "no sample parsed"
NO_MAJORITY = "no majority"
REFUSED = "verifier refused"
NO_SCORE = "judge gave no score"

T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    """One sample of one teacher; `answer` is None where it didn't parse."""

    asking: Asking
    weight: Fraction
    sample: Sample
    reply: Reply
    answer: str | None


@dataclass(frozen=True)
class Case:
    """A query with everything that was answered, in the teachers' order."""

    query: str
    prompt: str
    reference: str | None
    candidates: Sequence[Candidate]

    @property
    def parsed(self) -> list[Candidate]:
        """Those that can be used."""
        return [candidate for candidate in self.candidates if candidate.answer is not None]

    def fields(self, candidate: Candidate) -> dict[str, str | None]:
        """What a verifier's expression and a judge's template are over."""
        return {
            "query": self.query,
            "text": candidate.sample.text,
            "answer": candidate.answer,
            "reference": self.reference,
        }


@dataclass(frozen=True)
class Verdict:
    """Who is kept, or why nobody is."""

    chosen: Candidate | None = None
    rejection: str | None = None
    agreement: float | None = None
    score: float | None = None


class Buys(Protocol):
    """Whoever answers requests, such as a `Buyer`."""

    async def buy(self, sampler: Sampler, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """One reply."""
        ...


class Receipts:
    """What one row costs: every different request that is asked for it, counted once."""

    def __init__(self, buyer: Buys) -> None:
        self._buyer = buyer
        self._replies: dict[str, Reply | None] = {}

    async def buy(self, sampler: Sampler, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """As `Buyer.buy`."""
        key = request_digest(sampler.identity, messages, sampling)
        self._replies.setdefault(key, None)
        reply = await self._buyer.buy(sampler, messages, sampling)
        self._replies[key] = reply
        return reply

    @property
    def requests(self) -> list[str]:
        """Digests, in the order in which they were asked."""
        return list(self._replies)

    def tokens(self) -> dict[str, int]:
        """The token columns of the row."""
        replies = [reply for reply in self._replies.values() if reply is not None]
        return {
            "teacher_prompt_tokens": sum(reply.usage.prompt_tokens for reply in replies),
            "teacher_cached_tokens": sum(reply.usage.cached_tokens for reply in replies),
            "teacher_response_tokens": sum(
                sample.tokens for reply in replies for sample in reply.samples
            ),
        }


class Choosing(Protocol):
    """A way to choose among candidates."""

    @property
    def parts(self) -> Sequence[Any]:
        """JSON values that name everything a choice depends on but the candidates."""
        ...

    async def choose(self, case: Case, receipts: Receipts) -> Verdict:
        """Decide; what it asks for goes through `receipts`."""
        ...


@dataclass(frozen=True)
class Majority:
    """The answer with most votes; a tie, or a share of all samples below `least`, is none.

    Each sample votes with its teacher's weight; one that didn't parse votes for nobody. Kept is
    the first sample that gave the answer, of the heaviest teacher that did.
    """

    least: Fraction = Fraction(0)

    @property
    def parts(self) -> Sequence[Any]:
        """The least share."""
        return ["majority", str(self.least)]

    async def choose(self, case: Case, receipts: Receipts) -> Verdict:
        """Count; asks nobody."""
        votes: dict[str, Fraction] = {}
        for candidate in case.candidates:
            if candidate.answer is not None:
                before = votes.get(candidate.answer, Fraction(0))
                votes[candidate.answer] = before + candidate.weight
        if not votes:
            return Verdict(rejection=NONE_PARSED)
        most = max(votes.values())
        share = most / sum(candidate.weight for candidate in case.candidates)
        winners = [answer for answer, weight in votes.items() if weight == most]
        if len(winners) > 1 or share < self.least:
            return Verdict(rejection=NO_MAJORITY, agreement=float(share))
        said = [candidate for candidate in case.candidates if candidate.answer == winners[0]]
        # Of equals `max` takes the first.
        chosen = max(said, key=lambda candidate: candidate.weight)
        return Verdict(chosen, agreement=float(share))


@dataclass(frozen=True)
class Best:
    """Of the samples that parse and that the verifier holds for, the judge's highest score.

    Without a judge, and of equal scores, the first. The judge is asked once for each different
    text.
    """

    verifier: str | None = None
    judging: Judging | None = None

    @property
    def parts(self) -> Sequence[Any]:
        """The verifier, and the judge."""
        return ["best", self.verifier, list(self.judging.parts) if self.judging else None]

    async def choose(self, case: Case, receipts: Receipts) -> Verdict:
        """Sift, then ask the judge."""
        if not case.parsed:
            return Verdict(rejection=NONE_PARSED)
        accepted = [
            candidate
            for candidate in case.parsed
            if self.verifier is None or holds(self.verifier, **case.fields(candidate))
        ]
        if not accepted:
            return Verdict(rejection=REFUSED)
        if self.judging is None:
            return Verdict(accepted[0])
        scores = await self._scores(self.judging, case, accepted, receipts)
        if not scores:
            return Verdict(rejection=NO_SCORE)
        text = max(scores, key=scores.__getitem__)
        chosen = next(candidate for candidate in accepted if candidate.sample.text == text)
        return Verdict(chosen, score=scores[text])

    @staticmethod
    async def _scores(
        judging: Judging, case: Case, accepted: Sequence[Candidate], receipts: Receipts
    ) -> dict[str, float]:
        """By text, in the candidates' order; texts without a score are absent."""
        texts = {candidate.sample.text: candidate for candidate in accepted}
        asked = [
            judging.messages(**case.fields(candidate), prompt=case.prompt)
            for candidate in texts.values()
        ]
        replies = await all_of(
            receipts.buy(judging.sampler, messages, judging.sampling) for messages in asked
        )
        scores = {
            text: judging.score(reply.samples[0])
            for text, reply in zip(texts, replies, strict=True)
        }
        return {text: score for text, score in scores.items() if score is not None}


async def all_of(requests: Iterable[Awaitable[T]]) -> list[T]:
    """Every result; raises only when all have ended, since what is in flight is paid for.

    Of several failures the first is raised, or one that ends the run.
    """
    found = await asyncio.gather(*requests, return_exceptions=True)
    failures = [result for result in found if isinstance(result, BaseException)]
    if failures:
        raise min(failures, key=lambda failure: not isinstance(failure, FATAL))
    return [result for result in found if not isinstance(result, BaseException)]

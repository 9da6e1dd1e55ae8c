"""Which of several answers to one query is kept, by majority, verifier or judge."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Protocol

from distill_datasets.generation.client import all_of
from distill_datasets.models.sampler import Reply, Sample, Sampler, Sampling, request_digest, total
from distill_datasets.recipes.checks import FAILED
from distill_datasets.recipes.parsing import find_all
from distill_datasets.recipes.prompt import holds, render
from distill_datasets.schema import Message

NONE_PARSED = "no sample parsed"
NO_MAJORITY = "no majority"
REFUSED = "verifier refused"
NO_SCORE = "judge gave no score"


class Client(Protocol):
    """Whoever answers requests, such as a `CachedClient`."""

    async def sample(
        self, sampler: Sampler, messages: Sequence[Message], sampling: Sampling
    ) -> Reply:
        """One reply."""
        ...


@dataclass(frozen=True)
class TeacherSample:
    """One sample of one teacher: its columns if it is kept, and how much its vote counts.

    The weight is exact: of 0.1 + 0.2 binary fractions make more than 0.3.
    """

    row: Mapping[str, Any]
    weight: Fraction

    @property
    def text(self) -> str:
        """As the teacher said it."""
        return str(self.row["raw"])

    @property
    def answer(self) -> str | None:
        """As it was read; None where it didn't parse."""
        answer: str | None = self.row["answer"]
        return answer


@dataclass(frozen=True)
class Case:
    """A query with everything that was answered, in the teachers' order."""

    query: str
    prompt: str
    reference: str | None
    samples: Sequence[TeacherSample]

    @property
    def parsed(self) -> list[TeacherSample]:
        """Those that can be used."""
        return [one for one in self.samples if one.answer is not None]

    @property
    def unusable(self) -> str:
        """Why none of the samples can be used."""
        reasons = [str(one.row["rejection"]) for one in self.samples]
        return next((reason for reason in reasons if reason.startswith(FAILED)), NONE_PARSED)

    def fields(self, one: TeacherSample) -> dict[str, str | None]:
        """What a verifier's expression and a judge's template are over."""
        return {
            "query": self.query,
            "text": one.text,
            "answer": one.answer,
            "reference": self.reference,
        }


@dataclass(frozen=True)
class Verdict:
    """Which sample is kept, or why none is."""

    chosen: TeacherSample | None = None
    rejection: str | None = None
    agreement: float | None = None
    score: float | None = None


class RowRequests:
    """Counts what one row costs: every different request that is made for it, once."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._replies: dict[str, Reply | None] = {}

    async def sample(
        self, sampler: Sampler, messages: Sequence[Message], sampling: Sampling
    ) -> Reply:
        """As the client does."""
        key = request_digest(sampler.identity, messages, sampling)
        self._replies.setdefault(key, None)
        reply = await self._client.sample(sampler, messages, sampling)
        self._replies[key] = reply
        return reply

    @property
    def requests(self) -> list[str]:
        """Digests, in the order in which they were made."""
        return list(self._replies)

    def tokens(self) -> dict[str, int | None]:
        """The token columns of the row; None where a server doesn't count."""
        replies = [reply for reply in self._replies.values() if reply is not None]
        return {
            "teacher_prompt_tokens": total(reply.usage.prompt_tokens for reply in replies),
            "teacher_cached_tokens": sum(reply.usage.cached_tokens for reply in replies),
            "teacher_response_tokens": total(reply.response_tokens for reply in replies),
        }


@dataclass(frozen=True)
class Majority:
    """Keeps the answer with most votes; a tie, or a share of all samples below `least`, is none.

    Each sample votes with its teacher's weight; one that didn't parse votes for nobody. Kept is
    the first sample that gave the answer, of the heaviest teacher that did.
    """

    least: Fraction = Fraction(0)

    @property
    def parts(self) -> Sequence[Any]:
        """JSON values that name everything a choice depends on but the samples."""
        return ["majority", str(self.least)]

    async def choose(self, case: Case, requests: RowRequests) -> Verdict:
        """Count; asks nobody."""
        votes: dict[str, Fraction] = {}
        for one in case.parsed:
            votes[str(one.answer)] = votes.get(str(one.answer), Fraction(0)) + one.weight
        if not votes:
            return Verdict(rejection=case.unusable)
        most = max(votes.values())
        share = most / sum(one.weight for one in case.samples)
        winners = [answer for answer, weight in votes.items() if weight == most]
        if len(winners) > 1 or share < self.least:
            return Verdict(rejection=NO_MAJORITY, agreement=float(share))
        # Of equals `max` takes the first.
        chosen = max(
            (one for one in case.samples if one.answer == winners[0]), key=lambda one: one.weight
        )
        return Verdict(chosen, agreement=float(share))


@dataclass(frozen=True)
class ScoringModel:
    """A judge: whom to ask for a score, with which template, and how to read what it says.

    The score is the last match of `pattern`'s group `score`; what is outside of `scale` is none.
    """

    sampler: Sampler
    sampling: Sampling
    prompt: str
    pattern: str
    scale: tuple[float, float]

    @property
    def parts(self) -> Sequence[Any]:
        """JSON values that name everything a score depends on."""
        sampling = asdict(self.sampling)
        return [self.sampler.identity, sampling, self.prompt, self.pattern, list(self.scale)]

    def messages(self, **fields: str | None) -> list[Message]:
        """What the judge sees for one answer."""
        return [{"role": "user", "content": render(self.prompt, **fields)}]

    def score(self, said: Sample) -> float | None:
        """The score in what the judge said; what was cut off holds none."""
        try:
            found = [match["score"] for match in find_all(self.pattern, said.text)]
        except TimeoutError:
            return None
        if said.stop_reason == "length" or not found:
            return None
        try:
            score = float(found[-1])
        except (TypeError, ValueError):
            return None
        low, high = self.scale
        return score if low <= score <= high else None


@dataclass(frozen=True)
class Best:
    """Keeps, of the samples that parse and that the verifier holds for, the judge's favourite.

    Without a judge, and of equal scores, the first. The judge is asked once for each different
    text.
    """

    verifier: str | None = None
    judge: ScoringModel | None = None

    @property
    def parts(self) -> Sequence[Any]:
        """JSON values that name everything a choice depends on but the samples."""
        return ["best", self.verifier, list(self.judge.parts) if self.judge else None]

    async def choose(self, case: Case, requests: RowRequests) -> Verdict:
        """Sift, then ask the judge; what it is asked goes through `requests`."""
        if not case.parsed:
            return Verdict(rejection=case.unusable)
        accepted = [
            one
            for one in case.parsed
            if self.verifier is None or holds(self.verifier, **case.fields(one))
        ]
        if not accepted:
            return Verdict(rejection=REFUSED)
        if self.judge is None:
            return Verdict(accepted[0])
        scores = await self._scores(self.judge, case, accepted, requests)
        if not scores:
            return Verdict(rejection=NO_SCORE)
        text = max(scores, key=scores.__getitem__)
        chosen = next(one for one in accepted if one.text == text)
        return Verdict(chosen, score=scores[text])

    @staticmethod
    async def _scores(
        judge: ScoringModel, case: Case, accepted: Sequence[TeacherSample], requests: RowRequests
    ) -> dict[str, float]:
        """By text, in the samples' order; texts without a score are absent."""
        texts = {one.text: one for one in accepted}
        asked = [judge.messages(**case.fields(one), prompt=case.prompt) for one in texts.values()]
        replies = await all_of(
            requests.sample(judge.sampler, messages, judge.sampling) for messages in asked
        )
        scores = {
            text: judge.score(reply.samples[0]) for text, reply in zip(texts, replies, strict=True)
        }
        return {text: score for text, score in scores.items() if score is not None}

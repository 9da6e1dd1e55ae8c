"""Who answers a recipe's queries: one teacher, one of several, or all and one answer is kept.

Where every turn of a conversation is answered, what is asked depends on what was answered.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from distill_datasets.conversations import readable, split_calls
from distill_datasets.generation.client import all_of
from distill_datasets.models.sampler import (
    Reply,
    Sample,
    Sampler,
    Sampling,
    digest,
    request_digest,
    total,
)
from distill_datasets.recipes.checks import FAILED
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.parsing import Reading, find_all
from distill_datasets.recipes.prompt import holds, render
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.recipes.sections import OWN_TEACHER, AskedModel, SamplingSection, Teacher
from distill_datasets.schema import EARLIER, Message

NONE_PARSED = "no sample parsed"
NO_MAJORITY = "no majority"
REFUSED = "verifier refused"
NO_SCORE = "judge gave no score"
CALLS = "calls a tool before the last turn"  # and nobody knows what the tool returns


class Client(Protocol):
    """Whoever answers requests, such as a `CachedClient`."""

    async def sample(
        self, sampler: Sampler, messages: Sequence[Message], sampling: Sampling
    ) -> Reply:
        """One reply."""
        ...


class Request(NamedTuple):
    """What is asked in one turn, under its digest."""

    key: str
    messages: list[Message]
    sampling: Sampling


def known_requests(
    recipe: Recipe,
    asked: tuple[str, Sampling],
    query: str,
    find: Callable[[str], Reply | None],
) -> Iterator[Request]:
    """What a query asks of a model, named by its identity and how it samples, in their order.

    Without 'turns: all' that is one request. With it every turn follows the answer before it, which
    `find` has by its request's digest, and the last one here is the first that isn't answered.
    """
    (identity, sampling), earlier = asked, list[str]()
    turns = recipe.turns_of(query)
    for number in range(1, turns + 1):
        request = recipe.messages(query, earlier), recipe.fitted(query, sampling)
        key = request_digest(identity, *request)
        yield Request(key, *request)
        reply = find(key) if number < turns else None
        if reply is None:
            return
        (said,) = reply.samples
        response = recipe.read(query, None, said.text, said.stop_reason).response
        if response is None or why_over(response, sampling):
            return
        earlier.append(response)


def why_over(response: str, sampling: Sampling) -> str | None:
    """Why no further turn can follow a response; None where one can."""
    return CALLS if sampling.tools and split_calls(response)[1] else None


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
        self._replies[key] = reply = await self._client.sample(sampler, messages, sampling)
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
class PromptedModel:
    """A model with its prompt: the messages it gets, how it samples, how its text is read.

    `read` is given a query, its reference if there is one, a text and why it ended, and
    `reading_parts` are JSON values that name everything else that its result depends on. `fitted`
    is given a query and the sampling, of which a query's prompt may change the tools and the form.
    `weight` is its share of the queries or of the votes, where it is one of several teachers, and
    `key` names it to the queries. Where every turn of a conversation is answered, `turns` counts
    those of a query, and `messages` is also given the responses to the turns before. Its rows have
    `columns` beyond those of every other, and say which request they come from if `says_request`.
    """

    sampler: Sampler
    sampling: Sampling
    messages: Callable[..., list[Message]]
    read: Callable[[str, str | None, str, str], Reading]
    reading_parts: Sequence[Any]
    fitted: Callable[[str, Sampling], Sampling]
    weight: float = 1.0
    key: str = ""
    turns: Callable[[str], int] | None = None
    columns: tuple[str, ...] = ()
    says_request: bool = False

    @property
    def parts(self) -> Sequence[Any]:
        """JSON values that name everything its rows depend on but the queries."""
        turns = ["turns"] if self.turns else []
        return [self.sampler.identity, asdict(self.sampling), *self.reading_parts, *turns]

    @property
    def model(self) -> str:
        """The sampler's."""
        return self.sampler.model

    @property
    def identity(self) -> str:
        """The sampler's."""
        return self.sampler.identity

    def request_key(self, query: str) -> str:
        """The digest under which the journal has its reply to a query."""
        return request_digest(self.sampler.identity, *self.request(query))

    def request(self, query: str, *earlier: Sequence[str]) -> tuple[list[Message], Sampling]:
        """What is asked for a query, and how; after `earlier` responses, if there are any."""
        return self.messages(query, *earlier), self.fitted(query, self.sampling)

    def asked(self, query: str) -> "Sequence[PromptedModel]":
        """Itself."""
        return [self]

    async def answer(
        self, query: str, client: Client, reference: str | None = None
    ) -> list[dict[str, Any]]:
        """A row a sample; raises what the client raises."""
        if self.turns:
            return [await self._answer_turns(self.turns(query), query, client, reference)]
        reply = await client.sample(self.sampler, *self.request(query))
        first, *others = (
            self.row(query, reference, sample, reply, index)
            for index, sample in enumerate(reply.samples)
        )
        if self.says_request:
            first["requests"] = [self.request_key(query)]
        return [first, *others]

    async def _answer_turns(
        self, turns: int, query: str, client: Client, reference: str | None
    ) -> dict[str, Any]:
        """One row: the response to the last turn, after those to the turns before it.

        Of a turn that is rejected, or that calls a tool, no other follows.
        """
        requests, earlier = RowRequests(client), list[str]()
        for number in range(1, turns + 1):
            last = number == turns
            messages, sampling = self.request(query, earlier)
            reply = await requests.sample(self.sampler, messages, sampling)
            row = self.row(query, reference if last else None, reply.samples[0], reply, 0)
            problem = row["rejection"] or (None if last else why_over(row["response"], sampling))
            if problem:
                row |= {"rejection": f"turn {number}: {problem}", "answer": None, "response": None}
            if problem or last:
                break
            earlier.append(row["response"])
        return {**row, **requests.tokens(), EARLIER: earlier, "requests": requests.requests}

    def row(
        self, query: str, reference: str | None, sample: Sample, reply: Reply, index: int
    ) -> dict[str, Any]:
        """The columns that one sample decides."""
        reading = self.read(query, reference, sample.text, sample.stop_reason)
        return {
            "teacher": self.sampler.model,
            "sample": index,
            "raw": sample.text,
            "stop_reason": sample.stop_reason,
            "teacher_prompt_tokens": reply.usage.prompt_tokens,
            "teacher_cached_tokens": reply.usage.cached_tokens,
            "teacher_response_tokens": sample.tokens,
            **reading._asdict(),
        }


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
            score = float(found[-1])
        except (TimeoutError, IndexError, TypeError, ValueError):
            return None
        low, high = self.scale
        return score if low <= score <= high and said.stop_reason != "length" else None


@dataclass(frozen=True)
class Teachers:
    """Whoever answers a recipe's queries, which names them as they name themselves.

    Without a `choice` a query goes to one of the `members`, whatever other queries there are.
    With one, all are asked every query, at once, and one answer is kept: that of the `majority`, or
    the `best` of those that parse and that the recipe's verifier holds for, by the `judge`. When
    one of them fails the row fails, since the others alone might choose otherwise: what they said
    is kept, and the next run asks only for what is missing. Such a row's token columns count
    everything that was asked for it, the judge's requests too.
    """

    recipe: Recipe
    members: tuple[PromptedModel, ...]
    judge: ScoringModel | None = None

    @property
    def choice(self) -> str | None:
        """How one of several answers is chosen."""
        return None if self.recipe.choose == "route" else self.recipe.choose

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that their rows have beyond those of every other."""
        return self.recipe.answer_columns

    @property
    def several(self) -> bool:
        """Whether rows must say which requests they come from."""
        return bool(self.recipe.teachers) or self.choice is not None

    @property
    def parts(self) -> Sequence[Any]:
        """JSON values that name everything the rows depend on but the queries."""
        if not self.several:
            return self.members[0].parts
        parts: list[Any] = [[*one.parts, one.weight, one.key] for one in self.members]
        if self.choice == "majority":
            parts.append(["majority", str(self._agreement)])
        elif self.choice == "best":
            judging = list(self.judge.parts) if self.judge else None
            parts.append(["best", self.recipe.verifier, judging])
        return parts

    @property
    def model(self) -> str:
        """Whom a row names that nobody answered: all models in one text."""
        return " + ".join(one.model for one in self.members)

    @property
    def identity(self) -> str:
        """All identities in one text, stable across processes."""
        return " + ".join(one.identity for one in self.members)

    @property
    def models(self) -> list[str]:
        """Every model that is asked, by its reference: the teachers, and the judge."""
        return _models_of(self.recipe)

    @property
    def facts(self) -> dict[str, Any]:
        """What `generation.json` says of them."""
        facts = {
            "teacher": self.model,
            "identity": self.identity,
            "renderer": None if self.recipe.teachers else _renderer(self.members[0].sampler),
            "sampling": _sampling_facts(self.recipe.sampling_parameters),
        }
        if not self.several:
            return facts
        teachers = [
            {"model": one.model, "weight": one.weight, **_asked_facts(one)} for one in self.members
        ]
        judge = _asked_facts(self.judge) if self.judge else None
        panel = {"choose": self.recipe.choose, "teachers": teachers, "judge": judge}
        return {**facts, "panel": panel}

    def asked(self, query: str) -> Sequence[PromptedModel]:
        """Every teacher that a query goes to, before anybody judges.

        One of several is drawn by weighted rendezvous hashing: a teacher more, or another weight,
        moves no query between the others.
        """
        if self.choice or len(self.members) == 1:
            return self.members
        return [max(self.members, key=lambda one: _pull(one, query))]

    async def answer(
        self, query: str, client: Client, reference: str | None = None
    ) -> list[dict[str, Any]]:
        """The columns of every row of a query that asking decides; raises what the client raises.

        `reference` is the answer known beforehand, for those who check answers against it.
        """
        if self.choice:
            return [await self._chosen(query, client, reference)]
        (teacher,) = self.asked(query)
        return await teacher.answer(query, client, reference)

    async def _chosen(self, query: str, client: Client, reference: str | None) -> dict[str, Any]:
        """Ask everybody; the row that is kept, or one that says why none is."""
        requests = RowRequests(client)
        replies = await all_of(
            requests.sample(one.sampler, *one.request(query)) for one in self.members
        )
        votes = [
            # Exact: of 0.1 + 0.2 binary fractions make more than 0.3.
            (one.row(query, reference, sample, reply, 0), Fraction(str(one.weight)))
            for one, reply in zip(self.members, replies, strict=True)
            for sample in reply.samples
        ]
        parsed = [(row, weight) for row, weight in votes if row["answer"] is not None]
        if not parsed:
            reasons = [str(row["rejection"]) for row, _ in votes]
            failed = next((one for one in reasons if one.startswith(FAILED)), NONE_PARSED)
            chosen: dict[str, Any] = {"rejection": failed}
        elif self.choice == "majority":
            chosen = self._most_voted(parsed, sum(weight for _, weight in votes))
        else:
            chosen = await self._best([row for row, _ in parsed], query, reference, requests)
        said = "\n\n".join(f"{row['teacher']}:\n{row['raw']}" for row, _ in votes)
        return {
            **{"teacher": self.model, "sample": 0, "raw": said, "agreement": None, "score": None},
            **chosen,
            **requests.tokens(),
            "candidates": len(votes),
            "requests": requests.requests,
        }

    @property
    def _agreement(self) -> Fraction:
        """The least share of the votes that a majority has."""
        return Fraction(str(self.recipe.agreement or 0))

    def _most_voted(
        self, parsed: Sequence[tuple[dict[str, Any], Fraction]], whole: Fraction | int
    ) -> dict[str, Any]:
        """The first row with the answer of most votes, of the heaviest teacher that gave it.

        A tie is no majority. What didn't parse counts in the `whole`, and votes for nobody.
        """
        votes: dict[str, Fraction] = {}
        for row, weight in parsed:
            votes[row["answer"]] = votes.get(row["answer"], Fraction(0)) + weight
        most = max(votes.values())
        winners = [answer for answer, weight in votes.items() if weight == most]
        share = most / whole
        if len(winners) > 1 or share < self._agreement:
            return {"rejection": NO_MAJORITY, "agreement": float(share)}
        # Of equals `max` takes the first.
        row, _ = max(
            (one for one in parsed if one[0]["answer"] == winners[0]), key=lambda one: one[1]
        )
        return {**row, "agreement": float(share)}

    async def _best(
        self,
        parsed: Sequence[dict[str, Any]],
        query: str,
        reference: str | None,
        requests: RowRequests,
    ) -> dict[str, Any]:
        """The judge's favourite among the rows that the verifier holds for.

        Without a judge, and of equal scores, the first. The judge is asked once for each text.
        """
        shown = {"query": readable(query), "reference": reference}
        fields = [{**shown, "text": row["raw"], "answer": row["answer"]} for row in parsed]
        verifier, judge = self.recipe.verifier, self.judge
        accepted = [
            (row, seen)
            for row, seen in zip(parsed, fields, strict=True)
            if verifier is None or holds(verifier, **seen)
        ]
        if not accepted:
            return {"rejection": REFUSED}
        if judge is None:
            return accepted[0][0]
        prompt = self.members[0].messages(query)[0]["content"]
        by_text = {row["raw"]: seen for row, seen in accepted}
        replies = await all_of(
            requests.sample(judge.sampler, judge.messages(**seen, prompt=prompt), judge.sampling)
            for seen in by_text.values()
        )
        scores = {
            text: score
            for text, reply in zip(by_text, replies, strict=True)
            if (score := judge.score(reply.samples[0])) is not None
        }
        if not scores:
            return {"rejection": NO_SCORE}
        text = max(scores, key=scores.__getitem__)
        row = next(row for row, _ in accepted if row["raw"] == text)
        return {**row, "score": scores[text]}


Answerer = PromptedModel | Teachers  # answers queries with rows


def open_teachers(
    recipe: Recipe | str | Path,
    teacher: Sampler | str | None = None,
    *,
    trust: bool = False,
    **opening: Any,
) -> Teachers:
    """Open every model that a recipe asks, or one `teacher` in the place of its teachers.

    `trust` goes to `load_recipe` and `opening` to `open_sampler`; raises what they raise. Asks
    nobody.
    """
    from distill_datasets.models.references import open_sampler

    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, trust=trust)
    if teacher is not None:
        recipe = recipe.with_teacher(teacher if isinstance(teacher, str) else teacher.model)
    given = None if isinstance(teacher, str) else teacher
    # Of several, all must be there before one is paid.
    opening["lazily"] = len(set(_models_of(recipe))) == 1
    opened: dict[tuple[str, str | None], Sampler] = {}

    def opened_sampler(asked: AskedModel) -> Sampler:
        key = (asked.model, asked.renderer)
        if key not in opened:
            opened[key] = open_sampler(asked.model, renderer=asked.renderer, **opening)
        return opened[key]

    samplers = [given or opened_sampler(one) for one in recipe.all_teachers]
    named = [
        one.model_copy(update={"model": sampler.model})
        for one, sampler in zip(recipe.all_teachers, samplers, strict=True)
    ]
    opened |= {(one.model, one.renderer): it for one, it in zip(named, samplers, strict=True)}
    if recipe.teachers:
        recipe = recipe.replace(teachers=tuple(named))
    else:
        recipe = recipe.replace(teacher=named[0].model)
    if recipe.judge and recipe.judge.model == OWN_TEACHER:
        own = recipe.judge.model_copy(update={"model": named[0].model})
        recipe = recipe.replace(judge=own)
    judge = None
    if recipe.judge:
        sampling = recipe.judge.sampling_over(SamplingSection()).parameters()
        rest = recipe.judge_prompt, recipe.judge.pattern, recipe.judge.scale
        judge = ScoringModel(opened_sampler(recipe.judge), sampling, *rest)
    members = [_member(recipe, *one) for one in zip(named, samplers, strict=True)]
    return Teachers(recipe, tuple(members), judge)


def _models_of(recipe: Recipe) -> list[str]:
    judges = [recipe.judge.model] if recipe.judge and recipe.judge.model != OWN_TEACHER else []
    return [teacher.model for teacher in recipe.all_teachers] + judges


def _member(recipe: Recipe, teacher: Teacher, sampler: Sampler) -> PromptedModel:
    own = teacher.model_dump(mode="json", exclude={"weight"})
    return PromptedModel(
        sampler,
        recipe.sampling_of(teacher),
        recipe.messages,
        recipe.read,
        recipe.reading_parts,
        recipe.fitted,
        teacher.weight,
        digest([recipe.name, own]),
        recipe.turns_of if recipe.turns == "all" else None,
        recipe.answer_columns,
        says_request=bool(recipe.teachers),
    )


def _pull(teacher: PromptedModel, query: str) -> float:
    place = int(sha256(f"{teacher.key}\n{query}".encode()).hexdigest()[:13], 16)
    return -teacher.weight / math.log((place + 0.5) / 16**13)


def _asked_facts(asked: PromptedModel | ScoringModel) -> Mapping[str, Any]:
    return {
        "model": asked.sampler.model,
        "identity": asked.sampler.identity,
        "renderer": _renderer(asked.sampler),
        "sampling": _sampling_facts(asked.sampling),
    }


def _sampling_facts(sampling: Sampling) -> dict[str, Any]:
    """All but the tools, which are a file of the recipe's."""
    facts = asdict(sampling)
    del facts["tools"]
    return facts


def _renderer(sampler: Sampler) -> str | None:
    return getattr(getattr(sampler, "connection", None), "renderer_name", None)

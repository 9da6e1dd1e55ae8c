"""Asks a teacher about its prompt: topics, rules, queries, and which rules a query exercises."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from distill_datasets.conversations import from_text, response_text, shown, to_text, user_message
from distill_datasets.errors import FATAL, GenerationError
from distill_datasets.files import builders_folder
from distill_datasets.generation.client import CachedClient, outcome
from distill_datasets.models.sampler import Sampler, Sampling
from distill_datasets.recipes.prompt import render_ours
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.schema import Message
from distill_datasets.tables import shortened

T = TypeVar("T")

TOPICS = 40
_SHOWN = 300  # characters of what a teacher said, in an error
_FENCE = re.compile(r"^[ \t]*```[\w-]*[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_NUMBERED = re.compile(r"[ \t]*(\d{1,3})[.):][ \t]+(\S.*?)[ \t]*")
_HALF = re.compile("[\ud800-\udfff]")  # half of a character, which no file can hold
_OPENING = re.compile(r"[\[{]")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class ReplyForm(Generic[T]):
    """What a text should hold: in words, and as a function that gives None for anything else."""

    words: str
    read: Callable[[str], T | None]


@dataclass(frozen=True, slots=True)
class ParsedReply(Generic[T]):
    """What a question brought: the value, or else what the teacher said, or what went wrong."""

    value: T | None
    said: str = ""
    error: str | None = None


@dataclass(frozen=True)
class QueryRequest:
    """Asks for queries of some attributes, or for a rule; `again` counts requests of one kind."""

    attributes: Mapping[str, str]
    examples: Sequence[str] = ()
    rule: str | None = None
    again: int = 1


def open_teacher(recipe: Recipe, teacher: Sampler | str | None) -> tuple[Recipe, Sampler]:
    """Who is asked: a sampler as it is, the model of a reference, or the recipe's first teacher.

    The recipe that comes with it has the referenced model for its teacher.
    """
    from distill_datasets.models.references import open_sampler

    if isinstance(teacher, str):
        recipe = recipe.with_teacher(teacher)
    elif teacher is not None:
        return recipe, teacher
    first = recipe.all_teachers[0]
    return recipe, open_sampler(first.model, renderer=first.renderer)


class Interview:
    """One teacher, one prompt; every reply is in the journal.

    A reply that can't be read is followed by one request to give it again in the right form.
    """

    def __init__(self, client: CachedClient, sampler: Sampler, recipe: Recipe) -> None:
        """Lists and judgements are sampled as the recipe's answers, queries as it says."""
        given = recipe.synthesis
        self.sampler, self._client = sampler, client
        common = recipe.sampling_of(recipe.all_teachers[0])
        self._listing = replace(
            common,
            n=1,
            max_tokens=given.max_tokens,
            stop=(),
            top_logprobs=None,
            json_schema=None,
            tools=None,
        )
        self._writing = replace(self._listing, temperature=given.temperature)
        self.count = given.per_request
        self._chat = recipe.holds_conversations
        mark = "{{ query }}" if recipe.asks_in_one_message else None
        prompt = recipe.prompt
        if recipe.tools_text:
            prompt += f"\n\nThe model may call these tools:\n\n{recipe.tools_text}"
        self._shared = {"prompt": _json(prompt), "placeholder": mark}

    async def topics(self) -> list[str]:
        """What inputs are about, as the teacher sees it."""
        return await self._list("topics", "topics", count=TOPICS)

    async def rules(self) -> list[str]:
        """What the prompt demands, in its order; there may be no rules."""
        return await self._list("rules", "the prompt's rules", empty=True)

    async def _list(self, key: str, what: str, *, empty: bool = False, **fields: Any) -> list[str]:
        reply = await self._ask(self._request(key, **fields), self._listing, texts())
        found = None if reply.value is None else [text for text in reply.value if text]
        if found is None or not (found or empty):
            raise GenerationError(
                f"The teacher was asked for {what}: {explained(reply)}. What is written into the "
                f"recipe as synthesis.{key} is not asked for."
            )
        return list(dict.fromkeys(found))

    def request(self, question: QueryRequest) -> str:
        """What the teacher is told for one question; examples are as it shall write queries."""
        examples: Sequence[Any] = question.examples
        if self._chat:
            examples = [[response_text(one) for one in from_text(query)] for query in examples]
        return self._request(
            "queries",
            count=self.count,
            attributes=list(question.attributes.items()),
            rule=None if question.rule is None else _json(question.rule),
            examples=_json(examples) if examples else None,
            again=question.again,
            chat=self._chat,
        )

    async def queries(self, question: QueryRequest) -> ParsedReply[list[str]]:
        """The queries that a question brings."""
        form = conversations() if self._chat else texts()
        return await self._ask(self.request(question), self._writing, form)

    async def exercised(
        self, rules: Sequence[str], queries: Sequence[str]
    ) -> ParsedReply[list[tuple[int, ...] | None]]:
        """The numbers of the rules that each query exercises; None for what is no query."""
        texts = [shown(from_text(query)) for query in queries] if self._chat else queries
        text = self._request("coverage", rules=_numbered(rules), queries=_numbered(texts))
        return await self._ask(text, self._listing, numbers(len(queries), len(rules)))

    def _request(self, template: str, **fields: Any) -> str:
        path = builders_folder() / "_synthesis" / f"{template}.md"
        return render_ours(path.read_text(encoding="utf-8").strip(), **self._shared, **fields)

    async def _ask(self, text: str, sampling: Sampling, form: ReplyForm[T]) -> ParsedReply[T]:
        messages = [user_message(text)]
        reply, problem = await self._read(messages, sampling, form)
        if reply.value is not None or reply.error is not None or not reply.said:
            return reply
        told = self._request("again", problem=problem, form=form.words)
        messages.append({"role": "assistant", "content": reply.said})
        messages.append(user_message(told))
        again, _ = await self._read(messages, sampling, form)
        return again if again.error is None else reply

    async def _read(
        self, messages: Sequence[Message], sampling: Sampling, form: ReplyForm[T]
    ) -> tuple[ParsedReply[T], str]:
        """What a reply holds, and what is wrong with one that can't be read."""
        try:
            async with self._client.places:
                reply = await outcome(self._client.sample(self.sampler, messages, sampling))
            if isinstance(reply, InterruptedError):
                raise reply
        except (*FATAL, InterruptedError):
            self._client.stop()
            raise
        if isinstance(reply, Exception):
            return ParsedReply(None, error=f"{type(reply).__name__}: {reply}"), ""
        sample = reply.samples[0]
        if sample.stop_reason == "length":
            return ParsedReply(None, sample.text), "it was cut off, and must be shorter"
        return ParsedReply(form.read(sample.text), sample.text), f"it is not {form.words}"


def explained(reply: ParsedReply[Any]) -> str:
    """What came in the place of a list, and what to do about it."""
    if reply.error is not None:
        return f"the request failed: {reply.error}. Mend the cause and run again"
    return (
        f"expected a JSON list of strings, it said {shortened(reply.said, _SHOWN)!r}. Take a "
        "larger teacher (--teacher): a model as small as the pocket model can't do this. Where the "
        "reply was cut off, raise synthesis.max_tokens in the recipe"
    )


def _numbered(texts: Sequence[str]) -> str:
    return json.dumps(dict(enumerate(texts, 1)), ensure_ascii=False, indent=1)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def texts() -> ReplyForm[list[str]]:
    """A JSON list of strings, bare, fenced or in an object of its own; or numbered lines.

    An item may also be an object with one string in it.
    """

    def read(text: str) -> list[str] | None:
        found = _only(text, _strings)
        return _lines(text) if found is None else found

    return ReplyForm("a JSON list of strings", read)


def conversations() -> ReplyForm[list[str]]:
    """A JSON list of lists of strings, said by turns; the last of each is the user's.

    One that ends otherwise is an empty text, which is no query.
    """

    def fitting(value: Any) -> list[str] | None:
        value = _unwrapped(value)
        if not isinstance(value, list):
            return None
        found = [_strings([one] if isinstance(one, str) else one) for one in value]
        turns = [one for one in found if one is not None]
        return [*map(_conversation, turns)] if turns and len(turns) == len(found) else None

    return ReplyForm("a JSON list of lists of strings", lambda text: _only(text, fitting))


def _conversation(turns: Sequence[str]) -> str:
    if len(turns) % 2 == 0 or not all(turns):
        return ""
    roles = ("user", "assistant")
    return to_text([{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)])


def numbers(rows: int, highest: int) -> ReplyForm[list[tuple[int, ...] | None]]:
    """A JSON object that has, for each of 1 to `rows`, a list of numbers from 1 to `highest`.

    None stands for a null.
    """

    def fitting(value: Any) -> list[tuple[int, ...] | None] | None:
        if not isinstance(value, dict) or set(value) != {str(row) for row in range(1, rows + 1)}:
            return None
        found = [value[str(row)] for row in range(1, rows + 1)]
        if not all(one is None or _are_numbers(one, highest) for one in found):
            return None
        return [None if one is None else tuple(sorted(set(one))) for one in found]

    words = f"a JSON object with the keys 1 to {rows} and lists of numbers from 1 to {highest}"
    return ReplyForm(words, lambda text: _only(text, fitting))


def _only(text: str, fitting: Callable[[Any], T | None]) -> T | None:
    """The one value in a text that fits; two that differ would leave the choice to chance."""
    for part in (text, *reversed(_FENCE.findall(text))):
        try:
            value = json.loads(part)
        except ValueError:
            continue
        if (whole := fitting(value)) is not None:
            return whole
    found = [fit for value in _values(text) if (fit := fitting(value)) is not None]
    return found[0] if found and all(fit == found[0] for fit in found) else None


def _values(text: str) -> Iterator[Any]:
    """Every outermost JSON list and object in a text."""
    place = 0
    while match := _OPENING.search(text, place):
        try:
            value, place = _DECODER.raw_decode(text, match.start())
            yield value
        except (ValueError, RecursionError):
            place = match.end()


def _unwrapped(value: Any) -> Any:
    """What an object with one key holds; anything else as it is."""
    return next(iter(value.values())) if isinstance(value, dict) and len(value) == 1 else value


def _strings(value: Any) -> list[str] | None:
    value = _unwrapped(value)
    items: list[Any] = [_unwrapped(item) for item in value] if isinstance(value, list) else [None]
    if not all(isinstance(item, str) and not _HALF.search(item) for item in items):
        return None
    return [item.strip() for item in items]


def _lines(text: str) -> list[str] | None:
    """Lines numbered from 1 without a gap; what stands between them makes them ambiguous."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    matches = [_NUMBERED.fullmatch(line) for line in lines]
    first = next((place for place, match in enumerate(matches) if match), len(lines))
    numbered = [match for match in matches[first:] if match]
    right = [str(place) for place in range(1, len(numbered) + 1)]
    if first > 1 or not numbered or len(numbered) < len(lines) - first:
        return None
    return [match[2] for match in numbered] if [m[1] for m in numbered] == right else None


def _are_numbers(value: Any, highest: int) -> bool:
    return isinstance(value, list) and all(
        type(number) is int and 1 <= number <= highest for number in value
    )

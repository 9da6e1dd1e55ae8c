"""Asks a teacher about its prompt: topics, rules, queries, and which rules a query exercises."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from distill_datasets import resources
from distill_datasets.errors import (
    AccessError,
    BudgetReached,
    GenerationError,
    ModelError,
    OutputError,
    ServiceError,
)
from distill_datasets.generation.client import Buyer
from distill_datasets.models.sampler import Sampler, Sampling
from distill_datasets.recipes.prompt import render
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.schema import Message
from distill_datasets.synthesis.replies import Form, numbers, texts

T = TypeVar("T")

TOPICS = 40
_FATAL = (AccessError, BudgetReached, InterruptedError, ModelError, OutputError, ServiceError)
_SHOWN = 300  # characters of what a teacher said, in an error


@dataclass(frozen=True, slots=True)
class Heard(Generic[T]):
    """What a question brought: the value, or else what the teacher said, or what went wrong."""

    value: T | None
    said: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Question:
    """Queries to be written: of which attributes, for which rule, the how manieth time."""

    attributes: Mapping[str, str]
    examples: Sequence[str] = ()
    rule: str | None = None
    again: int = 1


class Interview:
    """One teacher, one prompt; every reply is in the journal.

    A reply that can't be read is followed by one request to give it again in the right form.
    """

    def __init__(self, buyer: Buyer, sampler: Sampler, recipe: Recipe) -> None:
        """Lists and judgements are sampled as the recipe's answers, queries as it says."""
        given = recipe.synthesis
        self.sampler, self._buyer = sampler, buyer
        common = recipe.sampling_of(recipe.all_teachers[0])
        self._listing = replace(
            common, n=1, max_tokens=given.max_tokens, stop=(), top_logprobs=None, json_schema=None
        )
        self._writing = replace(self._listing, temperature=given.temperature)
        self.count = given.per_request
        mark = "{{ query }}" if recipe.asks_in_one_message else None
        self._shared = {"prompt": _json(recipe.prompt), "placeholder": mark}

    async def topics(self) -> list[str]:
        """What inputs are about, as the teacher sees it."""
        heard = await self._ask(self._request("topics", count=TOPICS), self._listing, texts())
        return _needed(heard, "topics", "synthesis.topics")

    async def rules(self) -> list[str]:
        """What the prompt demands, in its order."""
        heard = await self._ask(self._request("rules"), self._listing, texts())
        return _needed(heard, "the prompt's rules", "synthesis.rules", empty=True)

    def request(self, question: Question) -> str:
        """What the teacher is told for one question."""
        return self._request(
            "queries",
            count=self.count,
            attributes=list(question.attributes.items()),
            rule=None if question.rule is None else _json(question.rule),
            examples=_json(list(question.examples)) if question.examples else None,
            again=question.again,
        )

    async def queries(self, question: Question) -> Heard[list[str]]:
        """The queries that a question brings."""
        return await self._ask(self.request(question), self._writing, texts())

    async def exercised(
        self, rules: Sequence[str], queries: Sequence[str]
    ) -> Heard[list[tuple[int, ...] | None]]:
        """The numbers of the rules that each query exercises; None for what is no query."""
        text = self._request("coverage", rules=_numbered(rules), queries=_numbered(queries))
        return await self._ask(text, self._listing, numbers(len(queries), len(rules)))

    def _request(self, template: str, **fields: Any) -> str:
        return render(_template(template), **self._shared, **fields)

    async def _ask(self, text: str, sampling: Sampling, form: Form[T]) -> Heard[T]:
        messages: list[Message] = [{"role": "user", "content": text}]
        heard, problem = await self._read(messages, sampling, form)
        if heard.value is not None or heard.error is not None or not heard.said:
            return heard
        told = render(_template("again"), problem=problem, form=form.words)
        messages.append({"role": "assistant", "content": heard.said})
        messages.append({"role": "user", "content": told})
        again, _ = await self._read(messages, sampling, form)
        return again if again.error is None else heard

    async def _read(
        self, messages: Sequence[Message], sampling: Sampling, form: Form[T]
    ) -> tuple[Heard[T], str]:
        """What a reply holds, and what is wrong with one that can't be read."""
        try:
            async with self._buyer.turns:
                reply = await self._buyer.buy(self.sampler, messages, sampling)
        except _FATAL:
            self._buyer.stop()
            raise
        except Exception as error:
            # A request's failure is a value: raised, it would throw away those beside it.
            return Heard(None, error=f"{type(error).__name__}: {error}"), ""
        sample = reply.samples[0]
        if sample.stop_reason == "length":
            return Heard(None, sample.text), "it was cut off, and must be shorter"
        return Heard(form.read(sample.text), sample.text), f"it is not {form.words}"


def explained(heard: Heard[Any]) -> str:
    """What came in the place of a list, and what to do about it."""
    if heard.error is not None:
        return f"the request failed: {heard.error}. Mend the cause and run again"
    shown = heard.said if len(heard.said) <= _SHOWN else heard.said[:_SHOWN] + "…"
    return (
        f"expected a JSON list of strings, it said {shown!r}. Take a larger teacher (--teacher): "
        "a model as small as the pocket model can't do this. Where the reply was cut off, raise "
        "synthesis.max_tokens in the recipe"
    )


def _needed(heard: Heard[list[str]], what: str, key: str, *, empty: bool = False) -> list[str]:
    found = None if heard.value is None else [text for text in heard.value if text]
    if found is None or not (found or empty):
        raise GenerationError(
            f"The teacher was asked for {what}: {explained(heard)}. What is written into the "
            f"recipe as {key} is not asked for."
        )
    return list(dict.fromkeys(found))


def _template(name: str) -> str:
    path = resources.builders() / "_synthesis" / f"{name}.md"
    return path.read_text(encoding="utf-8").strip()


def _numbered(texts: Sequence[str]) -> str:
    return json.dumps(dict(enumerate(texts, 1)), ensure_ascii=False, indent=1)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

"""Conversations of which every turn is answered: what is asked depends on what was answered."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from distill_datasets.conversations import split_calls
from distill_datasets.models.sampler import Reply, Sampling, request_digest
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.schema import Message

CALLS = "calls a tool before the last turn"  # and nobody knows what the tool returns


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

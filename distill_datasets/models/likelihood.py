"""How likely a model finds answers that somebody else gave."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill_datasets.progress import Progress

if TYPE_CHECKING:
    from distill_datasets.models.connection import Connection

_IN_FLIGHT = 256


@dataclass(frozen=True)
class Likelihood:
    """An answer's negative log-likelihood in nats, summed over its tokens, and how many those are.

    The token that ends the answer counts.
    """

    nats: float
    tokens: int


def likelihoods(
    connection: "Connection", conversations: Sequence[Sequence[Mapping[str, Any]]], *, title: str
) -> list[Likelihood]:
    """Of the last message of each conversation, after all before it.

    Costs a request a conversation, whose prompt is read and from which nothing is sampled. Raises
    `ModelError`, `AccessError` or `ServiceError`.
    """
    from distill_datasets.models.scoring import Scorer
    from distill_datasets.training.objectives.soft_rows import split_conversation

    scorer = Scorer(connection)
    found: list[Likelihood] = []
    with Progress(title, len(conversations)) as progress:
        for first in range(0, len(conversations), _IN_FLIGHT):
            part = conversations[first : first + _IN_FLIGHT]
            spans = [split_conversation(connection, conversation) for conversation in part]
            pending = [scorer.read(context, answer) for context, answer in spans]
            for (context, answer), request in zip(spans, pending, strict=True):
                nats = -float(request.result().logprobs.sum())
                found.append(Likelihood(nats, len(answer)))
                progress.advance(1, tokens=len(context) + len(answer))
    return found

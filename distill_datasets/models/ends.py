"""Where an answer ends: one rule for what is learned, sampled and judged.

A chat format ends a message with tokens of its own. A teacher with stop texts is cut instead, and
what it finds likely in the end's place is a stop text. Its student shall end there by the format's
own tokens: they are a hard label, whatever the teacher thinks of them, and where it thinks of being
cut, it means the end. How likely a model finds an end that the teacher didn't make is not judged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from distill_datasets.errors import DatasetError
from distill_datasets.models.scoring import Ranking, SoftLabels, end_length

if TYPE_CHECKING:
    from distill_datasets.models.connection import Connection

_MOST_WAYS = 64  # tokens that a teacher is asked about for one
_MOST_STOPS = 256  # tokens at which a server is told to stop; others are cut here


@dataclass(frozen=True)
class CutEnds:
    """The ends of answers whose teacher is cut at stop texts, in its student's tokens.

    An answer ends with `length` tokens, and sampling at the `stops`. `table` holds for every token
    what the student says for it: for one with which the teacher is cut that is the first token of
    the message's end, or of the words before the cut.
    """

    table: NDArray[np.int32]
    length: int
    texts: Sequence[str]
    stops: Sequence[int] | Sequence[str]
    decode: Callable[[Sequence[int]], str]

    @classmethod
    def of(
        cls, connection: "Connection", texts: Sequence[str], responses: Sequence[Sequence[int]]
    ) -> "CutEnds":
        """`responses` are some that the student learns, with their ends.

        Spaces or signs that begin a stop text, and are in no response, stand for the whole of it.
        """
        tokenizer, stops = connection.tokenizer, connection.renderer.get_stop_sequences()
        length = end_length(responses[0], stops, tokenizer.decode)
        if not length:
            raise DatasetError(
                f"The chat format of {connection.reference!r} doesn't end an answer: expected one "
                f"of {list(stops)[:3]} behind {tokenizer.decode(responses[0])[-80:]!r}. Name "
                "another renderer, or train with 'sft'."
            )
        end = responses[0][len(responses[0]) - length]
        used = {token for one in responses for token in one[: len(one) - length]}
        words = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        table = np.arange(len(words), dtype=np.int32)
        for token, word in enumerate(words):
            cut = min((place for text in texts if (place := word.find(text)) >= 0), default=-1)
            begins = word and token not in used and not any(map(str.isalnum, word))
            if (begins and any(text.startswith(word) for text in texts)) or (
                cut >= 0 and not word[:cut].strip()
            ):
                table[token] = end
            elif cut > 0:
                table[token] = tokenizer.encode(word[:cut], add_special_tokens=False)[0]
        told = np.flatnonzero((table == end) & (np.arange(len(table)) != end))[:_MOST_STOPS]
        as_tokens = all(isinstance(stop, int) for stop in stops)
        return cls(
            table,
            length,
            texts,
            [*stops, *(told.tolist() if as_tokens else texts)],
            tokenizer.decode,
        )

    def meant(self, ids: NDArray[np.integer]) -> NDArray[np.int32]:
        """What the student says for tokens; a model may have more than its tokenizer."""
        last = len(self.table) - 1
        return np.where(ids > last, ids, self.table[np.minimum(ids, last)]).astype(np.int32)

    def ways(self, token: int) -> list[int]:
        """The tokens with which a teacher says a token, some of those where it is cut included."""
        return np.flatnonzero(self.table == token)[:_MOST_WAYS].tolist() or [token]

    def cut(self, tokens: Sequence[int]) -> int | None:
        """How many of a sampled answer's tokens there are up to its cut, that included; None where
        it isn't cut.
        """
        places = np.flatnonzero(self.meant(np.asarray(tokens)) != tokens)
        most = int(places[0]) + 1 if len(places) else len(tokens)
        whole = most
        while any(text in self.decode(tokens[:most]) for text in self.texts):
            whole, most = most, most - 1
        return whole if len(places) or most < whole else None

    def hard(self, labels: SoftLabels, response: Sequence[int]) -> SoftLabels:
        """The labels of a response whose end is a hard label, as is all of it that the teacher said
        in other tokens.
        """
        own = np.asarray(response, np.int32)
        most = min(len(own) - self.length, len(labels.tokens))
        other = np.flatnonzero(labels.tokens[:most] != own[:most])
        soft = int(other[0]) if len(other) else most
        ids = np.repeat(own[:, None], labels.ids.shape[1], axis=1)
        logprobs = np.full(ids.shape, -np.inf, np.float16)
        logprobs[:, 0] = 0
        ids[:soft], logprobs[:soft] = self.meant(labels.ids[:soft]), labels.logprobs[:soft]
        return replace(labels, tokens=own, ids=ids, logprobs=logprobs)

    def judged(
        self,
        ids: NDArray[np.integer],
        student: NDArray[np.floating],
        teacher: NDArray[np.floating],
        ranking: Ranking,
    ) -> NDArray[np.float64]:
        """The teacher's log-probabilities of the student's tokens `ids` (N, K), by their meaning.

        What it gives to all tokens of one meaning, its own likeliest (`ranking`) among them, is
        shared among those of `ids` as the student shares it: they are as good as one token.
        """
        ours, asked = (np.where(np.isfinite(student), np.exp(one), 0) for one in (student, teacher))
        known = (ranking.ids[:, :, None] == ids[:, None, :]).any(axis=2)
        likely = np.where(known, 0, np.exp(np.asarray(ranking.logprobs, np.float64)))
        own, others = self.meant(ids)[:, :, None], self.meant(ranking.ids)[:, None, :]
        same = own == own.transpose(0, 2, 1)
        taught = (same * asked[:, None, :]).sum(2) + ((own == others) * likely[:, None, :]).sum(2)
        share = ours / np.maximum((same * ours[:, None, :]).sum(2), np.finfo(np.float64).tiny)
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(taught * share), np.float64)

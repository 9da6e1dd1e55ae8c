"""Log-probabilities that a model gives to a text that it did not sample, and where an answer ends.

A chat format ends a message with tokens of its own. A teacher with stop texts is cut instead, and
what it finds likely in the end's place is a stop text. Its student shall end there by the format's
own tokens: they are a hard label, whatever the teacher thinks of them, and where it thinks of being
cut, it means the end. How likely a model finds an end that the teacher didn't make is not judged.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from distill_datasets.errors import DatasetError, ModelError
from distill_datasets.progress import Progress

if TYPE_CHECKING:
    from distill_datasets.models.tinker import Connection

T = TypeVar("T")
U = TypeVar("U")
_AT_ONCE = 256  # conversations whose likelihoods are asked for together
_NO_TOKEN = -9e4  # the SDK writes -99999 where there are fewer than k
_LONGEST_END = 16  # tokens that end a message
_MOST_WAYS = 64  # tokens that a teacher is asked about for one
_MOST_STOPS = 256  # tokens at which a server is told to stop; others are cut here
_MISSING = -1  # what stands where no log-probability is asked for


@dataclass(frozen=True)
class Ranking:
    """The likeliest tokens at each place, (N, K), and their natural log-probabilities."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]

    @classmethod
    def read(cls, top: Any, places: int) -> "Ranking":
        """The last so many places of what the SDK gives."""
        likely = top.logprobs[-places:]
        return cls(top.token_ids[-places:], np.where(likely < _NO_TOKEN, -np.inf, likely))


@dataclass(frozen=True)
class SoftLabels:
    """A teacher's distribution at each of the N places of a response, the stop token's included.

    `tokens` (N) is the response itself, `ids` and `logprobs` (N, K) the likeliest tokens in its
    places; a place with fewer ends with logarithms of minus infinity. Log-probabilities are kept
    as float16, which moves a distribution by less than its entropy / 2048. `kept` is how much of
    the teacher's probability the K tokens had, the mean over the places.
    """

    tokens: NDArray[np.int32]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float16]
    kept: float

    @classmethod
    def of(
        cls,
        tokens: Sequence[int] | NDArray[np.int32],
        ids: NDArray[np.integer],
        logprobs: NDArray[np.floating],
    ) -> "SoftLabels":
        """From arrays of any precision."""
        return cls(
            np.asarray(tokens, np.int32),
            np.asarray(ids, np.int32),
            np.asarray(logprobs, np.float16),
            float(np.exp(np.asarray(logprobs, np.float64)).sum(axis=1).mean()),
        )


@dataclass(frozen=True)
class Scored:
    """Natural log-probabilities of a response's tokens, and of the likeliest in their places."""

    logprobs: NDArray[np.float64]
    ranking: Ranking | None = None


class Pending(Generic[T]):
    """A request on its way; `result` waits for it, and raises what the server refused."""

    def __init__(self, connection: "Connection", request: Any, read: Callable[[Any], T]) -> None:
        """`request` is the SDK's future, `read` what to make of its response."""
        self._connection, self._request, self._read = connection, request, read

    def result(self) -> T:
        """Raises `ModelError`, `AccessError` or `ServiceError`."""
        from distill_datasets.models import tinker as sdk

        with _explained(self._connection.reference):
            return self._read(sdk.wait(self._request, self._connection.ended))

    def then(self, make: Callable[[T], U]) -> "Pending[U]":
        """The same request, with something made of its result."""
        return Pending(self._connection, self._request, lambda reply: make(self._read(reply)))


class Scorer:
    """Scores with a connection's model; all requests may be in flight at once.

    A request costs the prompt's tokens, of which a server reads those that it has seen just
    before from its cache.
    """

    def __init__(self, connection: "Connection") -> None:
        """Open a sampling session; raises `ModelError` where the server refuses the model."""
        self.connection = connection
        with _explained(connection.reference):
            self._client = connection.open_session().result()

    def read(self, context: Sequence[int], response: Sequence[int], k: int = 0) -> Pending[Scored]:
        """How likely a response is after its context, token by token, and the `k` likeliest."""
        request = self._ask(
            [*context, *response],
            include_prompt_logprobs=True,
            topk_prompt_logprobs=k,
            prompt_logprobs_last_n=len(response),
        )
        return Pending(self.connection, request, lambda reply: self._scored(reply, response, k))

    def following(
        self, context: Sequence[int], path: Sequence[int], wanted: Sequence[Sequence[int]]
    ) -> Pending[list[dict[int, float]]]:
        """The log-probabilities of the tokens that are `wanted` at each place of a path, and
        after its end: one place more than the path has tokens.
        """
        ids = np.full((len(wanted), max(map(len, wanted))), _MISSING, np.int64)
        for row, tokens in enumerate(wanted):
            ids[row, : len(tokens)] = tokens

        def named(found: tuple[NDArray[np.float64], Any]) -> list[dict[int, float]]:
            rows = zip(wanted, found[0].tolist(), strict=True)
            return [dict(zip(tokens, row, strict=False)) for tokens, row in rows]

        # The server scores tokens of the prompt, so a place needs a token there, whichever.
        return self.chosen(context, [*path, wanted[-1][0]], ids).then(named)

    def chosen(
        self, context: Sequence[int], response: Sequence[int], ids: NDArray[np.integer], k: int = 0
    ) -> Pending[tuple[NDArray[np.float64], Ranking | None]]:
        """The log-probabilities (N, K) of the tokens `ids` (N, K) at the response's N places, and
        the `k` likeliest there.
        """
        import tinker

        prompt = [*context, *response]
        targets = np.full((len(prompt) - 1, ids.shape[1]), _MISSING, np.int64)
        targets[-len(ids) :] = ids

        def read(reply: Any) -> tuple[NDArray[np.float64], Ranking | None]:
            if reply.target_prompt_logprobs is None:
                raise ModelError(
                    f"{self.connection.reference!r} gives no log-probabilities of chosen tokens: "
                    "train soft labels with labels='scored' and on-policy with top_k=0, or with "
                    "another teacher."
                )
            found = np.asarray(reply.target_prompt_logprobs.to_numpy(), np.float64)
            ranking = self._scored(reply, response, k).ranking if k else None
            return found.reshape(targets.shape)[-len(ids) :], ranking

        likeliest = {"topk_prompt_logprobs": k, "prompt_logprobs_last_n": len(response)}
        more = {"include_prompt_logprobs": True, **likeliest} if k else {}
        chosen = tinker.TensorData.from_numpy(targets)
        request = self._ask(prompt, target_prompt_logprobs=chosen, **more)
        return Pending(self.connection, request, read)

    def _ask(self, prompt: Sequence[int], **wanted: Any) -> Any:
        import tinker

        with _explained(self.connection.reference):
            return self._client.sample(
                prompt=tinker.ModelInput.from_ints(list(prompt)),
                num_samples=1,
                # The one token that it samples is thrown away.
                sampling_params=tinker.SamplingParams(max_tokens=1),
                **wanted,
            )

    def _scored(self, reply: Any, response: Sequence[int], k: int) -> Scored:
        top = reply.topk_prompt_logprobs_np
        if reply.prompt_logprobs_np is None or (k and (top is None or not top.token_ids.shape[-1])):
            raise ModelError(
                f"{self.connection.reference!r} gives no {'top-k ' if k else ''}log-probabilities "
                "of a prompt: train with the objective 'sft', or with another teacher."
            )
        logprobs = np.asarray(reply.prompt_logprobs_np, np.float64)[-len(response) :]
        return Scored(logprobs, Ranking.read(top, len(response)) if k else None)


def split_conversation(
    connection: "Connection", conversation: Sequence[Mapping[str, Any]], tools: str | None = None
) -> tuple[list[int], list[int]]:
    """The tokens before its last message, and that message's own."""
    messages: list[Any] = [dict(message) for message in conversation]
    rendered, weights = connection.renderer.build_supervised_example(messages, tools=tools)
    tokens = [int(token) for token in rendered.to_ints()]
    start, end = response_span(weights.tolist())
    return tokens[:start], tokens[start:end]


def response_span(weights: Sequence[float]) -> tuple[int, int]:
    """Where the learned tokens (weight above 0) of a rendered conversation begin and end."""
    learned = np.flatnonzero(np.asarray(weights))
    start, end = int(learned[0]), int(learned[-1]) + 1
    if len(learned) != end - start:
        raise DatasetError(
            "A response is not one run of tokens in the student's chat format: soft labels can't "
            "be placed. Train with the objective 'sft'."
        )
    return start, end


@dataclass(frozen=True)
class Likelihood:
    """An answer's negative log-likelihood in nats, summed over its tokens, and how many those are.

    The token that ends the answer counts, unless the answer's end isn't judged.
    """

    nats: float
    tokens: int


class Judged(NamedTuple):
    """A conversation whose last message is judged, its tools as JSON text, and whether its end is.

    The end isn't where something else than the model ended the message: a limit, or a stop text.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: str | None = None
    ended: bool = True


def likelihoods(
    connection: "Connection",
    conversations: Sequence[Judged],
    *,
    title: str,
    spend: Callable[[Sequence[int]], None] | None = None,
) -> list[Likelihood]:
    """Of the last message of each conversation, after all before it and its tools.

    Costs a request a conversation, whose prompt is read and from which nothing is sampled;
    `spend` gets the tokens of some of them before those are sent. Raises `ModelError`,
    `AccessError` or `ServiceError`, and what `spend` raises.
    """
    scorer = Scorer(connection)
    found: list[Likelihood] = []
    with Progress(title, len(conversations)) as progress:
        for first in range(0, len(conversations), _AT_ONCE):
            part = conversations[first : first + _AT_ONCE]
            spans = [_judged_span(connection, one) for one in part]
            if spend:
                spend([len(context) + len(answer) for context, answer in spans])
            pending = [scorer.read(context, answer) for context, answer in spans]
            for (context, answer), request in zip(spans, pending, strict=True):
                nats = -float(request.result().logprobs.sum())
                found.append(Likelihood(nats, len(answer)))
                progress.advance(1, tokens=len(context) + len(answer))
    return found


def _judged_span(connection: "Connection", judged: Judged) -> tuple[list[int], list[int]]:
    """The tokens before what is judged, and its own: at least one."""
    before, said = split_conversation(connection, judged.messages, judged.tools)
    if judged.ended:
        return before, said
    end = end_length(said, connection.renderer.get_stop_sequences(), connection.tokenizer.decode)
    return before, said[: max(1, len(said) - end)]


def end_length(
    tokens: Sequence[int],
    stops: Sequence[int] | Sequence[str],
    decode: Callable[[Sequence[int]], str],
) -> int:
    """How many of the last tokens are the end of a message, by a chat format's stop sequences."""
    texts = [stop for stop in stops if isinstance(stop, str)]
    for length in range(1, min(len(tokens), _LONGEST_END) + 1):
        tail = tokens[-length:]
        if tail[0] in stops or (texts and any(text in decode(tail) for text in texts)):
            return length
    return 0


def tokenizer_digest(tokenizer: Any) -> str:
    """Names a vocabulary: two tokenizers of one digest give every id the same text."""
    content = sha256()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        content.update(f"{number}\t{token}\n".encode())
    return content.hexdigest()


def require_same_tokenizer(teacher: "Connection", student: "Connection") -> None:
    """Token by token a teacher can only teach a student with the very same tokens."""
    if teacher.tokenizer_source == student.tokenizer_source:
        return
    theirs, ours = tokenizer_digest(teacher.tokenizer), tokenizer_digest(student.tokenizer)
    if theirs != ours:
        raise DatasetError(
            f"The teacher {teacher.reference!r} and the student {student.reference!r} have other "
            f"tokenizers: expected one vocabulary, found {theirs[:12]} with "
            f"{len(teacher.tokenizer)} tokens and {ours[:12]} with {len(student.tokenizer)}. Name "
            "a teacher of the student's family, or train with the objective 'sft'; a recipe with "
            "`choices` can also be taught by another family, with labels='choices'."
        )


def _explained(reference: str) -> AbstractContextManager[None]:
    from distill_datasets.models import tinker as sdk

    kept = "What was stored is kept: run it again."
    return sdk.all_explained(reference, refused="refused to score", kept=kept)


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
        cls, connection: "Connection", texts: Sequence[str], responses: Iterable[Sequence[int]]
    ) -> "CutEnds":
        """`responses` are those that the student learns, with their ends, in any order.

        Spaces or signs that begin a stop text, and are in no response, stand for the whole of it.
        """
        tokenizer, stops = connection.tokenizer, connection.renderer.get_stop_sequences()
        others = iter(responses)
        first = next(others)
        length = end_length(first, stops, tokenizer.decode)
        if not length:
            raise DatasetError(
                f"The chat format of {connection.reference!r} doesn't end an answer: expected one "
                f"of {list(stops)[:3]} behind {tokenizer.decode(first)[-80:]!r}. Name "
                "another renderer, or train with 'sft'."
            )
        end = first[len(first) - length]
        used = {token for one in chain([first], others) for token in one[: len(one) - length]}
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

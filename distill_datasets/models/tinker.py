"""Tinker, and every server that speaks its protocol: ours on this machine among them."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import tinker

from distill_datasets.errors import ModelError, RejectedError, RetryableError, ServiceError
from distill_datasets.models import tinker_sdk as sdk
from distill_datasets.models.connection import Connection
from distill_datasets.models.prompts import Prompts
from distill_datasets.models.sampler import Logprobs, Reply, Sample, Sampling, Usage
from distill_datasets.schema import Message


class TinkerSampler:
    """Samples from a connection; one request asks for `Sampling.n` samples."""

    def __init__(self, connection: Connection, client: tinker.SamplingClient | None = None) -> None:
        """Open a sampling session, or use one that is open; raises `ModelError` where the server
        refuses the model.
        """
        self.connection = connection
        path = connection.model_path
        with sdk.explained(connection.reference):
            self.client = (
                client
                or connection.service.create_sampling_client(
                    model_path=path, base_model=None if path else connection.base_model
                ).result()
            )

    @property
    def model(self) -> str:
        """The reference, as written."""
        return self.connection.reference

    @property
    def identity(self) -> str:
        """Reference, weights, checkpoint and renderer."""
        return self.connection.identity

    @cached_property
    def _prompts(self) -> Prompts:
        return Prompts(self.connection.renderer)

    @cached_property
    def _stop(self) -> Any:
        return self.connection.renderer.get_stop_sequences()

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Answer once. `Sampling.stop` cuts the text here: its tokens are sampled, and paid."""
        if sampling.extra is not None:
            raise ModelError(
                f"{self.model!r} takes no further settings: expected a recipe without "
                f"`sampling.extra`, found {sampling.extra}."
            )
        tokens = self._prompts.tokens(messages)
        with sdk.explained(self.model), classified():
            request = self.client.sample(
                _model_input(tokens),
                sampling.n,
                self._parameters(sampling),
                topk_sample_logprobs=sampling.top_logprobs or 0,
            )
            response = await answered(request.future(), self.connection)
        samples = tuple(self._read(sequence, sampling) for sequence in response.sequences)
        return Reply(samples, Usage(len(tokens), response.prompt_cache_hit_tokens))

    def _parameters(self, sampling: Sampling) -> tinker.SamplingParams:
        return tinker.SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            stop=self._stop,
        )

    def _read(self, sequence: Any, sampling: Sampling) -> Sample:
        from tinker_cookbook.renderers import get_text_content

        message, _ = self.connection.renderer.parse_response(sequence.tokens)
        text = get_text_content(message)
        ends = [place for stop in sampling.stop if (place := text.find(stop)) >= 0]
        cut_off = not ends and sequence.stop_reason == "length"
        return Sample(
            text[: min(ends)] if ends else text,
            "length" if cut_off else "stop",
            len(sequence.tokens),
            reasoning=_reasoning(message),
            logprobs=None if sampling.top_logprobs is None else _logprobs(sequence),
        )


def _model_input(tokens: list[int]) -> tinker.ModelInput:
    """Not validated: a thousand numbers that are known to be numbers."""
    chunk = tinker.EncodedTextChunk.model_construct(tokens=tokens, type="encoded_text")
    return tinker.ModelInput.model_construct(chunks=[chunk])


def _reasoning(message: Any) -> str | None:
    """What a thinking model said before its answer."""
    content = message["content"]
    if isinstance(content, str):
        return None
    return "".join(part["thinking"] for part in content if part["type"] == "thinking") or None


def _logprobs(sequence: Any) -> Logprobs:
    top = [row or [] for row in sequence.topk_logprobs or ()]
    return Logprobs(
        tuple(sequence.tokens),
        tuple(sequence.logprobs or ()),
        tuple(tuple(token for token, _ in row) for row in top),
        tuple(tuple(value for _, value in row) for row in top),
    )


async def answered(request: Any, connection: Connection) -> Any:
    """The result of a `concurrent.futures.Future`.

    The SDK tries a dead address again for minutes; a server of this machine that has ended is
    noticed within seconds, and raised as `ServiceError`.
    """
    loop = asyncio.get_running_loop()
    waiting = asyncio.wrap_future(request)
    timer: asyncio.TimerHandle | None = None
    gone: ServiceError | None = None

    def glance() -> None:
        nonlocal timer, gone
        if (gone := connection.ended()) is None:
            timer = loop.call_later(sdk.GLANCE, glance)
        else:
            waiting.cancel()

    if connection.server is not None:
        timer = loop.call_later(sdk.GLANCE, glance)
    try:
        return await waiting
    except asyncio.CancelledError:
        if gone is not None:
            raise gone from None
        raise
    finally:
        if timer is not None:
            timer.cancel()


@contextmanager
def classified() -> Iterator[None]:
    """Tells requests that may succeed later from those that never will."""
    try:
        yield
    except tinker.RequestFailedError as error:
        if error.category == tinker.types.RequestErrorCategory.User:
            raise RejectedError(error.message, type=_kind(error.message)) from error
        raise RetryableError(error.message, type="server error") from error
    except (tinker.BadRequestError, tinker.UnprocessableEntityError) as error:
        raise RejectedError(str(error), type=_kind(str(error)), status=error.status_code) from error
    except (tinker.RateLimitError, tinker.ConflictError, tinker.InternalServerError) as error:
        limited = isinstance(error, tinker.RateLimitError)
        kind = "rate limit" if limited else "server error"
        later = RetryableError(str(error), type=kind, status=error.status_code)
        with suppress(ValueError):
            later.retry_after = float(error.response.headers.get("retry-after", ""))
        raise later from error
    except (tinker.APITimeoutError, TimeoutError) as error:
        raise RetryableError(str(error) or "no answer in time", type="time-out") from error
    except tinker.APIConnectionError as error:
        raise RetryableError(str(error), type="connection") from error


def _kind(message: str) -> str:
    return "context length" if "context" in message.lower() else "bad request"

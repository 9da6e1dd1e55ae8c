"""Tinker, and every server that speaks its protocol: ours on this machine among them."""

import asyncio
from collections.abc import Sequence
from typing import Any

import tinker

from distill_datasets.connection import Connection, ended, explained
from distill_datasets.sampler import Message, Reply, Sample, Sampling, Usage

_GLANCE = 2.0  # seconds between looks at whether a local server still runs


class TinkerSampler:
    """Samples from a connection; one request asks for `Sampling.n` samples."""

    def __init__(self, connection: Connection) -> None:
        """Open a sampling session; raises `ModelError` where the server refuses the model."""
        self.connection = connection
        path = connection.model_path
        with explained(connection.reference):
            self._client = connection.service.create_sampling_client(
                model_path=path, base_model=None if path else connection.base_model
            ).result()

    @property
    def model(self) -> str:
        """The reference, as written."""
        return self.connection.reference

    @property
    def identity(self) -> str:
        """Reference, weights, checkpoint and renderer."""
        return self.connection.identity

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Answer once. `Sampling.stop` cuts the text here: its tokens are sampled, and paid."""
        renderer = self.connection.renderer
        prompt = renderer.build_generation_prompt([dict(message) for message in messages])  # type: ignore[misc]
        parameters = tinker.SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            stop=renderer.get_stop_sequences(),
        )
        with explained(self.model):
            response = await self._answered(
                self._client.sample(
                    prompt=prompt, num_samples=sampling.n, sampling_params=parameters
                )
            )
        samples = tuple(self._read(sequence, sampling.stop) for sequence in response.sequences)
        return Reply(samples, Usage(prompt.length, response.prompt_cache_hit_tokens))

    async def _answered(self, request: tinker.APIFuture[Any]) -> Any:
        if self.connection.server is None:
            return await request
        waiting = asyncio.ensure_future(request.result_async())
        while not waiting.done():
            await asyncio.wait({waiting}, timeout=_GLANCE)
            if not waiting.done() and (error := ended(self.connection)):
                waiting.cancel()
                raise error
        return waiting.result()

    def _read(self, sequence: Any, stops: tuple[str, ...]) -> Sample:
        from tinker_cookbook.renderers import get_text_content

        message, _ = self.connection.renderer.parse_response(sequence.tokens)
        text = get_text_content(message)
        ends = [place for stop in stops if (place := text.find(stop)) >= 0]
        cut_off = not ends and sequence.stop_reason == "length"
        return Sample(
            text[: min(ends)] if ends else text,
            "length" if cut_off else "stop",
            len(sequence.tokens),
        )

"""Tinker, and every server that speaks its protocol: ours on this machine among them."""

from collections.abc import Sequence
from typing import Any

import tinker

from distill_datasets.connection import Connection, connect, explained
from distill_datasets.sampler import Message, Reply, Sample, Sampling, Usage

__all__ = ["Connection", "TinkerSampler", "connect"]


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
            response = await self._client.sample(
                prompt=prompt, num_samples=sampling.n, sampling_params=parameters
            )
        samples = tuple(self._read(sequence, sampling.stop) for sequence in response.sequences)
        return Reply(samples, Usage(prompt.length, response.prompt_cache_hit_tokens))

    def _read(self, sequence: Any, stops: tuple[str, ...]) -> Sample:
        from tinker_cookbook.renderers import get_text_content

        message, _ = self.connection.renderer.parse_response(sequence.tokens)
        text = get_text_content(message)
        ends = [place for stop in stops if (place := text.find(stop)) >= 0]
        reason = "stop" if ends else sequence.stop_reason
        return Sample(text[: min(ends)] if ends else text, reason, len(sequence.tokens))

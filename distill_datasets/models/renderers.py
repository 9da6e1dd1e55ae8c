"""A cookbook renderer for any model that brings its own chat template."""

from typing import Any

import tinker
import torch
from tinker_cookbook.renderers import (
    Message,
    ParseTermination,
    RenderContext,
    Renderer,
    TrainOnWhat,
    ensure_text,
    register_renderer,
)
from tinker_cookbook.renderers.base import RenderedMessage

NAME = "distill_datasets/chat_template"


class ChatTemplateRenderer(Renderer):
    """Renders with the tokenizer's own template; only a last assistant message can be trained."""

    def get_stop_sequences(self) -> list[int]:  # noqa: D102 (the base class documents it)
        return [int(self.tokenizer.eos_token_id)]

    def build_generation_prompt(  # noqa: D102
        self, messages: list[Message], role: str = "assistant", prefill: str | None = None
    ) -> tinker.ModelInput:
        tokens = self._tokens(messages, add_generation_prompt=True)
        if prefill:
            tokens += self.tokenizer.encode(prefill, add_special_tokens=False)
        return tinker.ModelInput.from_ints(tokens)

    def build_supervised_example(  # noqa: D102
        self,
        messages: list[Message],
        train_on_what: TrainOnWhat = TrainOnWhat.LAST_ASSISTANT_MESSAGE,
    ) -> tuple[tinker.ModelInput, torch.Tensor]:
        if train_on_what is not TrainOnWhat.LAST_ASSISTANT_MESSAGE:
            raise ValueError(
                f"The renderer {NAME} trains the last assistant message only, not {train_on_what}."
            )
        asked = self._tokens(messages[:-1], add_generation_prompt=True)
        text = ensure_text(messages[-1]["content"])
        answered = self.tokenizer.encode(text, add_special_tokens=False)
        answered.append(int(self.tokenizer.eos_token_id))
        weights = torch.tensor([0.0] * len(asked) + [1.0] * len(answered))
        return tinker.ModelInput.from_ints(asked + answered), weights

    def parse_response(self, response: list[int]) -> tuple[Message, ParseTermination]:  # noqa: D102
        ended = bool(response) and response[-1] == self.tokenizer.eos_token_id
        text = self.tokenizer.decode(response[:-1] if ended else response)
        message = Message(role="assistant", content=str(text))
        return message, ParseTermination.EOS if ended else ParseTermination.MALFORMED

    def render_message(self, message: Message, ctx: RenderContext) -> RenderedMessage:
        """Templates render whole conversations, not single messages."""
        raise NotImplementedError(f"The renderer {NAME} renders whole conversations only.")

    def _tokens(self, messages: list[Message], *, add_generation_prompt: bool) -> list[int]:
        turns: list[Any] = list(messages)
        rendered: Any = self.tokenizer.apply_chat_template(
            turns, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=False
        )
        return list(rendered)


register_renderer(NAME, lambda tokenizer, _: ChatTemplateRenderer(tokenizer))

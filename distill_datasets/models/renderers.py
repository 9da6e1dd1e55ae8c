"""Renders chats to tokens: by the Tinker Cookbook, or by a model's own chat template.

With each of them a text stays text: a control token of the chat format that is written in a
message is encoded as the characters that it is made of.
"""

import copy
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, cast

import tinker
import torch
from jinja2 import TemplateError
from tinker_cookbook.exceptions import TinkerCookbookError
from tinker_cookbook.renderers import (
    Message,
    ParseTermination,
    RenderContext,
    Renderer,
    TrainOnWhat,
    ensure_text,
    get_renderer,
    register_renderer,
)
from tinker_cookbook.renderers.base import RenderedMessage

from distill_datasets.errors import DatasetError, ModelError
from distill_datasets.models.sampler import split_thoughts

CHAT_TEMPLATE = "distill_datasets/chat_template"
_PROBE = "distill_datasets_probe"
_THOUGHTS = ("<think>", "</think>")  # a message may hold thoughts, which these are around
_NO_SYSTEM = (
    "This model's chat template has no system role ({reason}), so the prompt can't be said in one: "
    "put prompt and query into one message, with {{{{ query }}}} in prompt.md, or name a renderer "
    "that has one (`renderer:` or --renderer)."
)


def open_renderer(name: str, tokenizer: Any) -> Renderer:
    """A renderer of the cookbook, or the chat template's, that takes messages as text.

    Raises `ModelError` for an unknown name, and for a tokenizer that the renderer can't use.
    """
    encoder = TextTokenizer(tokenizer)
    try:
        renderer = get_renderer(name, cast(Any, encoder))
    except (TinkerCookbookError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"Unknown renderer {name!r}: {error}") from error
    return cast(Renderer, _TextRenderer(renderer, encoder))


class TextTokenizer:
    """A tokenizer that encodes control tokens in protected texts as characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        marks = [str(token) for token in added.values() if getattr(token, "special", False)]
        found = sorted({*marks} - {*_THOUGHTS}, key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, found))) if found else None
        # Nobody can write this into a query: it is another one in each process.
        self._mark = f"\ufdd0{secrets.token_hex(8)}\ufdd1"

    def protect(self, text: str) -> str:
        """A text in which `encode` recognises control tokens as written by somebody."""
        if self._controls is None:
            return text
        return self._controls.sub(lambda found: f"{self._mark}{found[0]}{self._mark}", text)

    def encode(self, text: str, **options: Any) -> list[int]:
        """Token ids; `options` are those of transformers."""
        first, *rest = text.split(self._mark)
        tokens = list(self._tokenizer.encode(first, **options)) if first or not rest else []
        options["add_special_tokens"] = False
        for place, piece in enumerate(rest):
            if place % 2 == 0:  # between two marks
                tokens += self._tokenizer.encode(piece, **options | {"split_special_tokens": True})
            elif piece:
                tokens += self._tokenizer.encode(piece, **options)
        return tokens

    @property
    def backend_tokenizer(self) -> Any:
        """What renderers of the cookbook from 0.6.1 on copy, to encode content as characters."""
        return _ContentTokenizer(self._tokenizer.backend_tokenizer, self._mark)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # while it is unpickled there is no tokenizer yet
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)


class _ContentTokenizer:
    """A backend tokenizer whose user has every control token split; marks add nothing to that."""

    encode_special_tokens = False

    def __init__(self, backend: Any, mark: str) -> None:
        self._backend, self._mark = backend, mark

    def __deepcopy__(self, memo: dict[int, Any]) -> "_ContentTokenizer":
        return _ContentTokenizer(copy.deepcopy(self._backend, memo), self._mark)

    def encode(self, text: str, **options: Any) -> Any:
        if self.encode_special_tokens and not self._backend.encode_special_tokens:
            self._backend.encode_special_tokens = True
        return self._backend.encode(text.replace(self._mark, ""), **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._backend, name)


class _TextRenderer:
    """A renderer whose messages are protected on their way in."""

    def __init__(self, renderer: Renderer, encoder: TextTokenizer) -> None:
        self._renderer, self._encoder = renderer, encoder

    def build_generation_prompt(self, messages: Sequence[Any], *given: Any, **named: Any) -> Any:
        return self._renderer.build_generation_prompt(self._protected(messages), *given, **named)

    def build_supervised_example(self, messages: Sequence[Any], *given: Any, **named: Any) -> Any:
        return self._renderer.build_supervised_example(self._protected(messages), *given, **named)

    def _protected(self, messages: Sequence[Any]) -> list[Any]:
        return [{**message, "content": self._text(message["content"])} for message in messages]

    def _text(self, content: Any) -> Any:
        if isinstance(content, str):
            return self._encoder.protect(content)
        return [
            {
                key: self._encoder.protect(value) if key in ("text", "thinking") else value
                for key, value in part.items()
            }
            for part in content
        ]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._renderer, name)


class ChatTemplateRenderer(Renderer):
    """Renders with the tokenizer's own template; only a last assistant message can be trained.

    A response ends as the template ends it, which may be another token than the tokenizer's end
    of text.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Raises `ModelError` for a tokenizer without a chat template or an end."""
        super().__init__(tokenizer)
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "This model's tokenizer has no chat template: name a renderer (`renderer:` or "
                "--renderer), for example 'role_colon', or use a model that was made for chats."
            )
        self._has_system: bool | None = None
        self._end = self._find_end()

    def get_stop_sequences(self) -> list[int]:  # noqa: D102 (the base class documents it)
        end_of_text = self.tokenizer.eos_token_id
        return list(dict.fromkeys([self._end, self._end if end_of_text is None else end_of_text]))

    def build_generation_prompt(  # noqa: D102
        self, messages: list[Message], role: str = "assistant", prefill: str | None = None
    ) -> tinker.ModelInput:
        tokens = self._tokens(messages)
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
                f"The renderer {CHAT_TEMPLATE} trains the last assistant message only, not "
                f"{train_on_what}."
            )
        asked = self._tokens(messages[:-1])
        text = ensure_text(messages[-1]["content"])
        answered = [*self.tokenizer.encode(text, add_special_tokens=False), self._end]
        weights = torch.tensor([0.0] * len(asked) + [1.0] * len(answered))
        return tinker.ModelInput.from_ints(asked + answered), weights

    def parse_response(self, response: list[int]) -> tuple[Message, ParseTermination]:  # noqa: D102
        ended = bool(response) and response[-1] in self.get_stop_sequences()
        said = str(self.tokenizer.decode(response[:-1] if ended else response))
        thoughts, text = split_thoughts(said)
        content: Any = text
        if thoughts:
            content = [{"type": "thinking", "thinking": thoughts}, {"type": "text", "text": text}]
        message = Message(role="assistant", content=content)
        return message, ParseTermination.EOS if ended else ParseTermination.MALFORMED

    def render_message(self, message: Message, ctx: RenderContext) -> RenderedMessage:
        """Templates render whole conversations, not single messages."""
        raise NotImplementedError(f"The renderer {CHAT_TEMPLATE} renders whole conversations only.")

    def _tokens(self, messages: Sequence[Any]) -> list[int]:
        """The prompt for the next message."""
        if any(message["role"] == "system" for message in messages):
            self._require_system()
        try:
            text = self._rendered(messages)
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise DatasetError(
                f"This model's chat template refuses a conversation of {roles}: {error}. Bring "
                "the messages into the order that it expects, or name another renderer."
            ) from error
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _rendered(self, messages: Sequence[Any], *, ask: bool = True) -> str:
        given: Any = list(messages)
        return str(
            self.tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=ask)
        )

    def _require_system(self) -> None:
        """Raises `ModelError` where the template refuses a system message, or leaves it out."""
        if self._has_system:
            return
        probe = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "a"}]
        try:
            self._has_system = _PROBE in self._rendered(probe)
        except TemplateError as error:
            raise ModelError(_NO_SYSTEM.format(reason=error)) from error
        if not self._has_system:
            raise ModelError(_NO_SYSTEM.format(reason="it leaves such a message out"))

    def _find_end(self) -> int:
        """The control token with which the template ends an answer, else the end of text."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        after = ""
        with suppress(TemplateError):  # as one raises that only asks
            after = self._rendered(probe, ask=False).rpartition(_PROBE)[2]
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        tokens = self.tokenizer.encode(after, add_special_tokens=False) if after else []
        end = next((token for token in tokens if token in added), self.tokenizer.eos_token_id)
        if end is None:
            raise ModelError(
                "This model's tokenizer names no token that ends an answer, and its chat template "
                "writes none: set `eos_token` in tokenizer_config.json, or name a renderer."
            )
        return int(end)


register_renderer(CHAT_TEMPLATE, lambda tokenizer, _: ChatTemplateRenderer(tokenizer))

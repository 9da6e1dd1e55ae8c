"""Renders chats by a tokenizer's own chat template, as a renderer of the Tinker Cookbook."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import tinker
import torch
from jinja2 import TemplateError
from tinker_cookbook.renderers import (
    Message,
    ParseTermination,
    RenderContext,
    Renderer,
    ToolCall,
    ToolSpec,
    TrainOnWhat,
    UnparsedToolCall,
    ensure_text,
    register_renderer,
)
from tinker_cookbook.renderers.base import RenderedMessage

from distill_datasets.conversations import Call, read_calls, split_calls, tool_calls, write_calls
from distill_datasets.errors import DatasetError, ModelError
from distill_datasets.models.sampler import split_thoughts

CHAT_TEMPLATE = "distill_datasets/chat_template"
_PROBE = "distill_datasets_probe"
_TOOLS = "tool_declare"  # the role under which tools travel, as in the cookbook's own renderers
_NO_SYSTEM = (
    "This model's chat template has no system role ({reason}), so the prompt can't be said in one: "
    "put prompt and query into one message, with {{{{ query }}}} in prompt.md, or name a renderer "
    "that has one (`renderer:` or --renderer)."
)


class ChatTemplateRenderer(Renderer):
    """Renders with the tokenizer's own template; messages of the assistant can be trained.

    A response ends as the template ends it, which may be another token than the tokenizer's end
    of text. A template has tools where it writes them, takes their answers, and writes calls
    exactly as `write_calls` does, so that what is learned is what is read.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Raises `ModelError` for a tokenizer without a chat template or an end."""
        super().__init__(tokenizer)
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "This model's tokenizer has no chat template: name a renderer (`renderer:` or "
                "--renderer), for example 'role_colon', or use a model that was made for chats."
            )
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
            raise ModelError(
                f"The renderer {CHAT_TEMPLATE!r} learns the last message of a conversation: "
                f"expected {TrainOnWhat.LAST_ASSISTANT_MESSAGE.value!r}; found "
                f"{train_on_what.value!r}. `DistilledDatasetBuilder(turns='all')` learns every "
                "message of the assistant."
            )
        asked = self._tokens(messages[:-1])
        text = spoken_text(messages[-1])
        answered = [*self.tokenizer.encode(text, add_special_tokens=False), self._end]
        weights = torch.tensor([0.0] * len(asked) + [1.0] * len(answered))
        return tinker.ModelInput.from_ints(asked + answered), weights

    def parse_response(self, response: list[int]) -> tuple[Message, ParseTermination]:  # noqa: D102
        ended = bool(response) and response[-1] in self.get_stop_sequences()
        said = str(self.tokenizer.decode(response[:-1] if ended else response))
        thoughts, text = split_thoughts(said)
        message = Message(role="assistant", content=text)
        try:
            content, calls = split_calls(text)
            if calls:
                message = _calling(content, calls)
        except ValueError as error:
            message["unparsed_tool_calls"] = [UnparsedToolCall(raw_text=text, error=str(error))]
        if thoughts:
            parts: Any = [{"type": "thinking", "thinking": thoughts}]
            message["content"] = [*parts, {"type": "text", "text": ensure_text(message["content"])}]
        return message, ParseTermination.EOS if ended else ParseTermination.MALFORMED

    def create_conversation_prefix_with_tools(  # noqa: D102
        self, tools: list[ToolSpec], system_prompt: str = ""
    ) -> list[Message]:
        if not self._has_tools:
            raise NotImplementedError(f"This model's chat template has no tools: {CHAT_TEMPLATE}.")
        declared = Message(role=_TOOLS, content=json.dumps(tools, ensure_ascii=False))
        system = [Message(role="system", content=system_prompt)] if system_prompt else []
        return [declared, *system]

    def render_message(self, message: Message, ctx: RenderContext) -> RenderedMessage:
        """Templates render whole conversations, not single messages."""
        raise NotImplementedError(f"The renderer {CHAT_TEMPLATE} renders whole conversations only.")

    def _tokens(self, messages: Sequence[Any]) -> list[int]:
        """The prompt for the next message."""
        if self._no_system and any(message["role"] == "system" for message in messages):
            raise ModelError(_NO_SYSTEM.format(reason=self._no_system))
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
        named: dict[str, Any] = {"tokenize": False, "add_generation_prompt": ask}
        if declared := [one for one in messages if one["role"] == _TOOLS]:
            tools = json.loads(ensure_text(declared[0]["content"]))
            named["tools"] = [{"type": "function", "function": tool} for tool in tools]
        given: Any = [self._plain(one) for one in messages if one["role"] != _TOOLS]
        return str(self.tokenizer.apply_chat_template(given, **named))

    def _plain(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """A message as templates take it: the arguments of a call are an object, not its text."""
        if not message.get("tool_calls"):
            return message
        calls = [call.model_dump() for call in message["tool_calls"]]
        for call in calls:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        return {**message, "tool_calls": calls}

    @cached_property
    def _no_system(self) -> str | None:
        """Why the template has no system message; None where it has one."""
        probe = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "a"}]
        try:
            told = _PROBE in self._rendered(probe)
        except TemplateError as error:
            return str(error) or type(error).__name__
        return None if told else "it leaves such a message out"

    @property
    def has_system(self) -> bool:
        """Whether the template takes a system message."""
        return self._no_system is None

    @cached_property
    def _has_tools(self) -> bool:
        """Whether all that a conversation with tools holds comes out as it is read."""
        one = Call(_PROBE, {"city": "Zürich", "days": [1, 2.5, True, None], "text": '"<é>"\n'})
        other = Call("other", {})
        city = {"type": "string", "description": "its parameter"}
        parameters = {"type": "object", "properties": {"city": city}, "required": ["city"]}
        tool = {"name": _PROBE, "description": "what it does", "parameters": parameters}
        declared = {"role": _TOOLS, "content": json.dumps([tool])}
        answers = [{"role": "tool", "content": f"{_PROBE} {n}", "name": _PROBE} for n in (1, 2)]
        asked: list[Any] = [{"role": "user", "content": "a"}]
        try:
            told = self._rendered([declared, *asked])
            words = self._called("b", [one], asked)
            calls = self._called("", [one, other], asked)
            answered = self._rendered([*asked, _calling("", [one, other]), *answers])
        except (TemplateError, TypeError, ValueError):
            return False
        written = write_calls("", [one, other])
        return (
            all(text in told for text in (_PROBE, "what it does", "its parameter"))
            and words
            and calls
            and written in answered
            and all(answer["content"] in answered for answer in answers)
        )

    def _called(self, content: str, calls: Sequence[Call], asked: Sequence[Any]) -> bool:
        """Whether a message with calls is written as it is learned, right after what asks for it.

        Templates may put empty thoughts before the last message.
        """
        text = self._rendered([*asked, _calling(content, calls)], ask=False)
        before, written, after = text.rpartition(write_calls(content, calls))
        end = str(self.tokenizer.decode([self._end]))
        begins = (self._rendered(asked), "</think>\n\n")
        return bool(written) and after.startswith(end) and before.endswith(begins)

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


def _calling(content: str, calls: Sequence[Call]) -> Message:
    made = [ToolCall.model_validate(one) for one in tool_calls(calls)]
    return Message(role="assistant", content=content, tool_calls=made)


def spoken_text(message: Mapping[str, Any]) -> str:
    """A message's words, and behind them its calls as `write_calls` writes them."""
    words, made = ensure_text(message["content"]), message.get("tool_calls")
    return write_calls(words, read_calls([one.model_dump() for one in made])) if made else words


register_renderer(CHAT_TEMPLATE, lambda tokenizer, _: ChatTemplateRenderer(tokenizer))

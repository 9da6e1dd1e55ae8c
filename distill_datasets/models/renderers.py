"""Renders chats to tokens: by the Tinker Cookbook, or by a model's own chat template.

With each of them a text stays text: a control token of the chat format that is written in a
message, an argument of a call, or a description of a tool is encoded as the characters that it is
made of.
"""

import copy
import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, product
from os.path import commonprefix
from pathlib import Path
from typing import Any, cast

import tinker
import torch
from tinker_cookbook import tokenizer_utils
from tinker_cookbook.exceptions import TinkerCookbookError
from tinker_cookbook.renderers import (
    Renderer,
    ToolCall,
    ensure_text,
    get_renderer,
    get_text_content,
)

from distill_datasets.conversations import (
    Call,
    fitted_calls,
    linked,
    plain_value,
    read_calls,
    split_calls,
    tool_calls,
    write_calls,
)
from distill_datasets.errors import DatasetError, ModelError
from distill_datasets.models.chat_template import CHAT_TEMPLATE as CHAT_TEMPLATE
from distill_datasets.models.chat_template import spoken_text
from distill_datasets.models.sampler import split_thoughts
from distill_datasets.schema import Message

_WORDS = """\
# Tools

These functions can be called. Each line has one, as JSON:
<tools>
{tools}
</tools>

A call is a block of this form, after whatever else is said; several calls are several blocks:
<tool_call>
{{"name": "a function's name", "arguments": {{"a parameter's name": "its value"}}}}
</tool_call>
What a call returns follows in <tool_response></tool_response>."""
# The text of an argument in the formats of Qwen, Nemotron and GLM.
_ARGUMENT = re.compile(
    r"<parameter=[^>\n]+>\s*(.*?)\s*</parameter>|<arg_value>(.*?)</arg_value>", re.DOTALL
)
# DeepSeek V3's calls, with names that the cookbook's reader passes over, such as `a.b`.
_NAMED = re.compile(r"<｜tool▁call▁begin｜>(.+?)<｜tool▁sep｜>(.*?)<｜tool▁call▁end｜>", re.DOTALL)
_THOUGHTS = ("<think>", "</think>")  # a message may hold thoughts, which these are around


def load_tokenizer(source: str) -> Any:
    """A tokenizer by folder or name, loaded without running code that comes with it.

    Raises whatever the libraries do where that can't be done.
    """
    from transformers import AutoTokenizer

    name = source.partition(":")[0]
    if not Path(source).is_dir():
        if tokenizer_utils.is_tokenizer_registered(source) or "/Inkling" in name:
            return tokenizer_utils.get_tokenizer(source)
        if name.startswith("meta-llama/Llama-3"):
            # The same tokenizer, which needs no licence to be accepted.
            name = "thinkingmachineslabinc/meta-llama-3-instruct-tokenizer"
    where = source if Path(source).is_dir() else name
    return AutoTokenizer.from_pretrained(where, trust_remote_code=False)


def open_renderer(name: str, tokenizer: Any) -> "TextRenderer":
    """A renderer of the cookbook, or the chat template's, that takes messages in OpenAI's form.

    Raises `ModelError` for an unknown name, and for a tokenizer that the renderer can't use.
    """
    encoder = TextTokenizer(tokenizer)
    try:
        renderer = get_renderer(name, cast(Any, encoder))
    except (TinkerCookbookError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"Unknown renderer {name!r}: {error}") from error
    return TextRenderer(renderer, encoder)


class TextTokenizer:
    """A tokenizer that encodes control tokens in protected texts as characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        marks = [str(token) for token in added.values() if getattr(token, "special", False)]
        found = sorted({*marks} - {*_THOUGHTS}, key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, found))) if found else None
        # Nobody can write this into a query: it is another one in each process. JSON has it as
        # it is, since formats write calls and tools so.
        self._mark = f"x{secrets.token_hex(16)}x"

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


class TextRenderer:
    """A renderer whose messages are OpenAI's, with calls and tools, and protected on their way in.

    Tools are told in the format's own way where it has one, else in words; see `_in_words`.
    """

    def __init__(self, renderer: Renderer, encoder: TextTokenizer) -> None:
        """Use `open_renderer`."""
        self._renderer, self._encoder = renderer, encoder

    def build_generation_prompt(
        self, messages: Sequence[Mapping[str, Any]], *, tools: str | None = None
    ) -> tinker.ModelInput:
        """The tokens that ask for the next message; `tools` is JSON text of a list."""
        return self._renderer.build_generation_prompt(self.conversation(messages, tools))

    def build_supervised_example(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: str | None = None,
    ) -> tuple[tinker.ModelInput, torch.Tensor]:
        """Tokens, and how much each is learned: those of the last message alone.

        It always ends with what stops it, as a message of calls alone doesn't in the cookbook's
        format for DeepSeek V3.
        """
        rendered, weights = self._renderer.build_supervised_example(
            self.conversation(messages, tools)
        )
        tokens, stops = rendered.to_ints(), self._renderer.get_stop_sequences()
        ends = [stop for stop in stops if isinstance(stop, int)]
        if not ends or tokens[-1] in ends:
            return rendered, weights
        ended = tinker.ModelInput.from_ints([*tokens, ends[0]])
        return ended, torch.cat([weights, torch.ones(1)])

    def conversation(self, messages: Sequence[Mapping[str, Any]], tools: str | None) -> list[Any]:
        """Messages in the cookbook's form, with what tells a model of its tools."""
        ids, number = dict[str, str](), count()
        given = [self._message(message, ids, number) for message in linked(cast(Any, messages))]
        listed = (tool["function"] for tool in json.loads(tools or "[]"))
        catalogue = self._protected([{**tool, **_UNSAID, **tool} for tool in listed])
        if not catalogue and not any(
            message["role"] == "tool" or "tool_calls" in message for message in given
        ):
            return given
        if not self._has_tools:
            has_system = getattr(self._renderer, "has_system", True)
            return _in_words(given, catalogue, has_system=has_system)
        if not catalogue:
            return given
        leads = given[0]["role"] == "system"
        prompt = ensure_text(given[0]["content"]) if leads else ""
        try:
            before = self._renderer.create_conversation_prefix_with_tools(catalogue, prompt)
        except ValueError as error:
            raise ModelError(
                f"This model's chat format can't tell of the recipe's tools: {error}. Give each "
                "part of a tool's parameters a `type`, or name another renderer."
            ) from error
        return [*before, *given[leads:]]

    def read_response(
        self, tokens: Sequence[int], *, tools: str | None = None
    ) -> tuple[str, str | None]:
        """A sampled message's text, calls as `write_calls` has them, and the thoughts before it.

        Calls that can't be read are kept as they were said, and `split_calls` raises for them.
        """
        try:
            message, _ = self._renderer.parse_response(list(tokens))
        except TinkerCookbookError:
            said = self._said(tokens)
            return said if tools is None else write_calls("", [json.dumps(said)]), None
        text, content = get_text_content(message), message["content"]
        parts = [] if isinstance(content, str) else content
        reasoning = "".join(part["thinking"] for part in parts if part["type"] == "thinking")
        made, unread = message.get("tool_calls"), message.get("unparsed_tool_calls")
        if made or unread or _NAMED.search(text):
            text = _called(text, made or [], unread or [], self._said(tokens), tools)
        return text, reasoning or None

    def _said(self, tokens: Sequence[int]) -> str:
        """A response as it came, without thoughts before it and the token that ended it."""
        ended = tokens[-1:] and tokens[-1] in self._renderer.get_stop_sequences()
        text = str(self._renderer.tokenizer.decode(list(tokens[:-1] if ended else tokens)))
        return split_thoughts(text)[1]

    @cached_property
    def _has_tools(self) -> bool:
        """Whether the chat format has a way of its own to tell of tools and calls."""
        probe: Any = {"name": "a", "description": "", "parameters": {}}
        try:
            self._renderer.create_conversation_prefix_with_tools([probe])
        except NotImplementedError:
            return False
        return True

    def _message(
        self, message: Mapping[str, Any], ids: dict[str, str], number: Iterator[int]
    ) -> dict[str, Any]:
        """A message in the cookbook's form, in which a call's id says its tool and number.

        Kimi's format has a tool's name nowhere else, and no other format shows an id.
        """
        found = {key: value for key, value in message.items() if value is not None}
        if id := found.get("tool_call_id"):
            found["tool_call_id"] = self._encoder.protect(ids.get(id, id))
        if name := found.get("name"):
            found["name"] = self._encoder.protect(name)
        found["content"] = self._content(message["content"])
        if not (given := found.pop("tool_calls", None)):
            return found
        calls = read_calls(given)
        protected = tool_calls(Call(*self._protected([*call])) for call in calls)
        for call, made, one in zip(calls, protected, given, strict=True):
            id = f"functions.{call.name}:{next(number)}"
            ids[str(one.get("id"))], made["id"] = id, self._encoder.protect(id)
        found["tool_calls"] = [ToolCall.model_validate(made) for made in protected]
        return found

    def _content(self, content: Any) -> Any:
        if isinstance(content, str):
            return self._encoder.protect(content)
        return [
            {
                key: self._encoder.protect(value) if key in ("text", "thinking") else value
                for key, value in part.items()
            }
            for part in content
        ]

    def _protected(self, value: Any) -> Any:
        """A JSON value whose texts, names too, are protected."""
        if isinstance(value, str):
            return self._encoder.protect(value)
        if isinstance(value, Mapping):
            return {self._protected(key): self._protected(one) for key, one in value.items()}
        return [self._protected(one) for one in value] if isinstance(value, list) else value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._renderer, name)


def _called(
    text: str, made: Sequence[ToolCall], unread: Sequence[Any], said: str, tools: str | None
) -> str:
    """A response's words and calls, of which the renderer read some and left others `unread`."""
    if len(named := _NAMED.findall(said)) > len(made) + len(unread):
        _, words = split_thoughts(said.partition("<｜tool▁calls▁begin｜>")[0])
        return write_calls(words, map(_named_call, named))
    try:
        found = split_calls(said)[1]
    except ValueError:
        if unread:
            return said
        found = []
    try:
        calls = read_calls([one.model_dump() for one in made])
    except ValueError:
        return write_calls(text, [json.dumps(said)])
    if found and (unread or found == calls):
        return said
    if unread:
        return write_calls(text, [json.dumps(said)])
    words = "" if text.strip() == said.strip() else text  # Harmony's, of calls alone
    return write_calls(words, _typed_calls(calls, said, tools))


def _named_call(named: tuple[str, str]) -> Call | str:
    """A call of a name and arguments in JSON; its text where that can't be read."""
    name, arguments = named
    try:
        return read_calls([{"name": name.strip(), "arguments": arguments}])[0]
    except ValueError:
        return json.dumps(named, ensure_ascii=False)


def _typed_calls(calls: Sequence[Call], said: str, tools: str | None) -> Sequence[Call]:
    """Calls with the values that their arguments' texts write, in formats of texts alone."""
    texts = [found[1] or found[2] or "" for found in _ARGUMENT.finditer(said)]
    if len(texts) != sum(len(call.arguments) for call in calls):
        return calls
    rest = iter(texts)
    read = [
        Call(one.name, {name: plain_value(next(rest)) for name in one.arguments}) for one in calls
    ]
    return fitted_calls(read, tools) if tools else read


_UNSAID = {"description": "", "parameters": {"type": "object", "properties": {}}}


def _in_words(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, has_system: bool
) -> list[Any]:
    """Messages for chat formats that have no way of their own to tell of tools and calls.

    The catalogue is a part of the system message, or of the user's first where there is no such
    role; a call is a block of text in the assistant's message, as `write_calls` writes it; and
    what tools answered is a message of the user, one for all answers to one message. It is the
    same text for a prompt and for training.
    """
    found: list[Any] = []
    answers = False
    for message in messages:
        if message["role"] == "tool":
            answer = f"<tool_response>\n{ensure_text(message['content'])}\n</tool_response>"
            before = found.pop()["content"] + "\n" if answers else ""
            found.append({"role": "user", "content": before + answer})
        else:
            plain = {key: value for key, value in message.items() if key != "tool_calls"}
            found.append({**plain, "content": spoken_text(message)} if plain != message else plain)
        answers = message["role"] == "tool"
    return _told(found, tools, "system" if has_system else "user") if tools else found


def _told(messages: list[Any], tools: Sequence[Mapping[str, Any]], role: str) -> list[Any]:
    """Messages of which the first of a role tells of the tools."""
    words = _WORDS.format(tools="\n".join(json.dumps(one, ensure_ascii=False) for one in tools))
    place = next((n for n, message in enumerate(messages) if message["role"] == role), None)
    if role == "system" and place != 0:
        return [{"role": role, "content": words}, *messages]
    if place is None:
        raise DatasetError(
            f"Tools can't be told of in a conversation of {[one['role'] for one in messages]}: "
            "this model's chat template has no system role, so expected a message of the user."
        )
    said = ensure_text(messages[place]["content"])
    told = f"{said}\n\n{words}" if role == "system" else f"{words}\n\n{said}"
    return [*messages[:place], {**messages[place], "content": told}, *messages[place + 1 :]]


# Rows that are rendered both ways before what was learned is trusted.
_VERIFIED = 8
# Shapes of conversations that are remembered; a recipe has one.
_MOST_SHAPES = 16
# Below this many characters a common beginning costs more to look for than to tokenize.
_WORTHWHILE = 64


@dataclass
class _Surroundings:
    """The tokens around the last message's text, which differs from row to row."""

    head: list[int]
    tail: list[int]
    verified: int = 0
    last: str | None = None
    fixed: str = ""
    fixed_tokens: Sequence[int] = ()


class Prompts:
    """Renders conversations as a cookbook renderer does, token for token.

    Most rows of a recipe differ in the last message alone, and there behind a long common text.
    The rest is taken from earlier rows, but only where tokens can't reach across: at chunks that
    the renderer encodes apart, at control tokens, and at line starts of tokenizers that always
    split there. The first rows are rendered both ways; one difference ends it.
    """

    def __init__(self, renderer: Any) -> None:
        """`renderer` is one that `open_renderer` opens."""
        self._renderer = renderer
        self._known: dict[tuple[Any, ...], _Surroundings | None] = {}
        self._encoder = getattr(renderer.tokenizer, "backend_tokenizer", None)
        added = getattr(renderer.tokenizer, "added_tokens_decoder", {}).items()
        # Those that are cut out of a text before anything else, without the blanks around them.
        self._controls = frozenset(id for id, one in added if not (one.lstrip or one.rstrip))
        self._by_lines = self._encoder is not None and _splits_at_lines(self._encoder)

    def tokens(self, messages: Sequence[Message], tools: str | None = None) -> list[int]:
        """The prompt that asks for the next message."""
        *before, last = messages
        content = last["content"]
        key = (tools, *map(_shape, before), *_shape({**last, "content": ""}))
        around = self._known.get(key)
        # Renderers may strip blanks; control tokens in a text may mean something to them.
        own = None if around is None or _blank_at_an_end(content) else self._text(around, content)
        if around is not None and own is not None and around.verified >= _VERIFIED:
            return [*around.head, *own, *around.tail]
        prompt = self._renderer.build_generation_prompt(messages, tools=tools)
        rendered = [list(chunk.tokens) for chunk in prompt.chunks]
        whole = [token for chunk in rendered for token in chunk]
        if key not in self._known and len(self._known) < _MOST_SHAPES:
            self._known[key] = self._learn(rendered, content)
        elif around is not None and own is not None:
            around.verified += 1
            if whole != [*around.head, *own, *around.tail]:
                self._known[key] = None
        return whole

    def _learn(self, chunks: Sequence[list[int]], content: str) -> _Surroundings | None:
        """What stands around the text in a rendered conversation; None where that can't be told."""
        if self._encoder is None or _blank_at_an_end(content):
            return None
        own = self._encode(content)
        for index, chunk in reversed(list(enumerate(chunks))):
            for start in range(len(chunk) - len(own), -1, -1):
                end = start + len(own)
                if chunk[start:end] == own and self._stands_apart(chunk, start, end):
                    head = [token for one in chunks[:index] for token in one] + chunk[:start]
                    tail = chunk[end:] + [token for one in chunks[index + 1 :] for token in one]
                    return _Surroundings(head, tail)
        return None

    def _stands_apart(self, chunk: Sequence[int], start: int, end: int) -> bool:
        """Whether no text between these two places can merge with what is around it."""
        before: str = self._renderer.tokenizer.decode(chunk[start - 1 : start]) if start else ""
        ends_line = self._by_lines and before.endswith("\n")
        begins = start == 0 or chunk[start - 1] in self._controls or ends_line
        return begins and (end == len(chunk) or chunk[end] in self._controls)

    def _text(self, around: _Surroundings, content: str) -> list[int] | None:
        """The tokens of the last message; None if it has control tokens."""
        if not around.fixed or not content.startswith(around.fixed):
            self._fix(around, content)
        fixed = around.fixed if content.startswith(around.fixed) else ""
        rest = self._encode(content[len(fixed) :])
        if not self._controls.isdisjoint(rest):
            return None
        return [*around.fixed_tokens, *rest] if fixed else rest

    def _fix(self, around: _Surroundings, content: str) -> None:
        """Keep the lines that this row begins with like the one before."""
        shared = "" if around.last is None else commonprefix([around.last, content])
        around.last = content
        # The last line that does not begin with a blank: tokens may reach across others.
        starts = re.finditer(r"\n(?=\S)", shared) if self._by_lines else ()
        place = max((found.end() for found in starts), default=0)
        if place >= _WORTHWHILE:
            tokens = self._encode(shared[:place])
            if self._controls.isdisjoint(tokens):
                around.fixed, around.fixed_tokens = shared[:place], tokens

    def _encode(self, text: str) -> list[int]:
        # Past the wrapper of transformers, which takes five times as long for a short text.
        assert self._encoder is not None
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids


def _shape(message: Message) -> tuple[Any, ...]:
    """All of a message, as a key: calls have their own, and answers of tools name theirs."""
    rest = {name: value for name, value in message.items() if name not in ("role", "content")}
    return message["role"], message["content"], json.dumps(rest) if rest else ""


def _blank_at_an_end(content: str) -> bool:
    return not content or content[0].isspace() or content[-1].isspace()


def _splits_at_lines(encoder: Any) -> bool:
    """Whether a new line always begins a new token, whatever characters stand around it.

    Pre-tokenizers tell apart letters, digits, marks and blanks: one of each kind stands for all.
    """
    before, after = (
        ("a", "1", ".", " ", "\n", "é", "的", "'"),
        ("b", "2", ",", "'", "ß", "中", "🙂"),
    )
    if encoder.pre_tokenizer is None:
        return False
    for left, right in product(before, after):
        first, second = f"x{left}\n", f"{right}y"
        pieces = encoder.pre_tokenizer.pre_tokenize_str(first + second)
        whole, *parts = (
            encoder.encode(text, add_special_tokens=False).ids
            for text in (first + second, first, second)
        )
        if len(first) not in {start for _, (start, _) in pieces} or whole != sum(parts, []):
            return False
    return True

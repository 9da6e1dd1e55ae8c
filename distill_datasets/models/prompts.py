"""Messages as tokens; what prompts have in common is tokenized once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from os.path import commonprefix
from typing import Any

from distill_datasets.schema import Message

# Rows that are rendered both ways before a frame is trusted.
_VERIFIED = 8
# Shapes of conversations that are remembered; a recipe has one.
_MOST_FRAMES = 16
# Below this many characters a common beginning costs more to look for than to tokenize.
_WORTHWHILE = 64


@dataclass
class _Frame:
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
        """`renderer` is one of the cookbook's."""
        self._renderer = renderer
        self._frames: dict[tuple[Any, ...], _Frame | None] = {}
        self._encoder = getattr(renderer.tokenizer, "backend_tokenizer", None)
        self._controls = frozenset(_control_ids(renderer.tokenizer))
        self._by_lines = self._encoder is not None and _splits_at_lines(self._encoder)

    def tokens(self, messages: Sequence[Message]) -> list[int]:
        """The prompt that asks for the next message."""
        *before, last = messages
        content = last["content"]
        key = (last["role"], *((one["role"], one["content"]) for one in before))
        frame = self._frames.get(key)
        # Renderers may strip blanks; control tokens in a text may mean something to them.
        own = None if frame is None or _blank_at_an_end(content) else self._text(frame, content)
        if frame is not None and own is not None and frame.verified >= _VERIFIED:
            return [*frame.head, *own, *frame.tail]
        rendered = self._render(messages)
        whole = [token for chunk in rendered for token in chunk]
        if key not in self._frames and len(self._frames) < _MOST_FRAMES:
            self._frames[key] = self._learn(rendered, content)
        elif frame is not None and own is not None:
            self._verify(key, frame, whole == [*frame.head, *own, *frame.tail])
        return whole

    def _verify(self, key: tuple[Any, ...], frame: _Frame, equal: bool) -> None:
        frame.verified += 1
        if not equal:
            self._frames[key] = None

    def _render(self, messages: Sequence[Message]) -> list[list[int]]:
        prompt = self._renderer.build_generation_prompt([dict(message) for message in messages])
        return [list(chunk.tokens) for chunk in prompt.chunks]

    def _learn(self, chunks: Sequence[list[int]], content: str) -> _Frame | None:
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
                    return _Frame(head, tail)
        return None

    def _stands_apart(self, chunk: Sequence[int], start: int, end: int) -> bool:
        """Whether no text between these two places can merge with what is around it."""
        begins = start == 0 or chunk[start - 1] in self._controls or self._ends_line(chunk[:start])
        return begins and (end == len(chunk) or chunk[end] in self._controls)

    def _ends_line(self, tokens: Sequence[int]) -> bool:
        text: str = self._renderer.tokenizer.decode(tokens[-1:])
        return self._by_lines and text.endswith("\n")

    def _text(self, frame: _Frame, content: str) -> list[int] | None:
        """The tokens of the last message; None if it has control tokens."""
        if not frame.fixed or not content.startswith(frame.fixed):
            self._fix(frame, content)
        if frame.fixed and content.startswith(frame.fixed):
            rest = self._encode(content[len(frame.fixed) :])
            own = [*frame.fixed_tokens, *rest]
        else:
            own = rest = self._encode(content)
        return own if self._controls.isdisjoint(rest) else None

    def _fix(self, frame: _Frame, content: str) -> None:
        """Keep the lines that this row begins with like the one before."""
        shared = "" if frame.last is None else commonprefix([frame.last, content])
        frame.last = content
        place = _last_line_start(shared) if self._by_lines else 0
        if place >= _WORTHWHILE:
            tokens = self._encode(shared[:place])
            if self._controls.isdisjoint(tokens):
                frame.fixed, frame.fixed_tokens = shared[:place], tokens

    def _encode(self, text: str) -> list[int]:
        # Past the wrapper of transformers, which takes five times as long for a short text.
        assert self._encoder is not None
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids


def _blank_at_an_end(content: str) -> bool:
    return not content or content[0].isspace() or content[-1].isspace()


def _last_line_start(text: str) -> int:
    """Where the last line that does not begin with a blank begins; 0 if there is none."""
    place = len(text)
    while (place := text.rfind("\n", 0, place)) >= 0:
        if place + 1 < len(text) and not text[place + 1].isspace():
            return place + 1
    return 0


def _control_ids(tokenizer: Any) -> list[int]:
    """Tokens that are cut out of a text before anything else, without the blanks around them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return [id for id, token in added.items() if not (token.lstrip or token.rstrip)]


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

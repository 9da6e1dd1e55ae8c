"""Streams of answers: the words that are sent are those of the whole, each token decoded once."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from distill_datasets.models.renderers import load_tokenizer
from distill_datasets.serving.answers import ChatFormat, ChatReader, Choice, TextReader
from distill_datasets.serving.protocol import read_chat, read_text
from tests.support.tiny_model import make_tiny_model

TEXT = read_text({"model": "m", "prompt": "p", "stop": ["END"]})
CHAT = read_chat({"model": "m", "messages": [{"role": "user", "content": "p"}], "stop": ["END"]})
TEXTS = (
    "Der Himmel ist blau. <b>Le ciel</b> est bleu, 77 < 78.",
    "日本語のテキスト、🙂🙂 e\u0301 und नमस्ते दुनिया",
    "  <think>It may be so.\n</think>\n\nEl cielo </think> <thinking>es azul.",
    "one <tool_call>\n{} two <function=x> <|im three\n\n\n four ",
    "before the END nothing is behind",
)


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        self.decoded += len(tokens)
        return str(self.tokenizer.decode(tokens, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.fixture(scope="module")
def format(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    model = make_tiny_model(tmp_path_factory.mktemp("answers") / "tiny")
    return ChatFormat(Counting(load_tokenizer(str(model))), "distill_datasets/chat_template")


def readers(format: ChatFormat) -> list[Any]:
    return [TextReader(format, TEXT), ChatReader(format, CHAT, None, False)]


def drawn(text: str, tokenizer: Any, generator: random.Random) -> list[int]:
    """A text in tokens, some cut as no tokenizer would, with the token that ends it."""
    size = generator.choice([3, len(text)])
    pieces = [text[n : n + size] for n in range(0, len(text), size)]
    tokens = [token for piece in pieces for token in tokenizer.encode(piece)]
    return [*tokens, tokenizer.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_sent_is_the_whole_however_characters_and_marks_are_cut(
    format: ChatFormat, text: str
) -> None:
    generator = random.Random(text)
    for reader in readers(format) * 6:
        tokens = drawn(text, format.tokenizer, generator)
        choice, sent, place = Choice(reader), "", 0
        while place < len(tokens):
            size = generator.choice([1, 1, 2, 5])
            choice.add([(token, -0.5) for token in tokens[place : place + size]])
            place += size
            sent += choice.news()
        whole = reader.read(tokens).content
        rest = choice.rest(whole, reader.plain(tokens))
        assert sent == choice.sent and rest is not None and sent + rest == whole
        assert len(rest) < 12, "all but the end is sent on the way"


@pytest.mark.parametrize("text", ["plain words ", "日本語🙂 ", "<b>bold</b> <|x <tool_call "])
def test_a_long_answer_decodes_each_token_a_few_times(format: ChatFormat, text: str) -> None:
    tokens = (format.tokenizer.encode(text) * 2_000)[:2_000]
    for reader in readers(format):
        choice, format.tokenizer.decoded = Choice(reader), 0
        for token in tokens:
            choice.add([(token, -0.5)])
            choice.news()
        assert format.tokenizer.decoded < 30 * len(tokens)

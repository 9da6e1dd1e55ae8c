"""Trains the byte-level BPE tokenizer, with the chat template of Qwen3's instruct models."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from .corpus import Corpus
from .formats import FORMATS
from .labels import LABELS
from .prompts import GENERIC, Size, draw_prompt

VOCABULARY = 4096
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
# Not special, as in Qwen3: decoding keeps them, so that a reader can strip the reasoning.
THINKING_TOKENS = ("<think>", "</think>")
# Qwen's own expression and normaliser: loaders that rebuild a Qwen tokenizer change no token.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Few drawn prompts: the more of them the vocabulary has seen, the fewer tokens a prompt costs,
# and the smaller the saving that distilling the prompt can show.
DRAWN_PROMPTS = 200
CHARACTERS_PER_LABEL, CHARACTERS_PER_OTHER = 120_000, 25_000


def train_tokenizer(corpus: Corpus, *, seed: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of `VOCABULARY` entries on the corpus, some prompts and all answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - len(CONTROL_TOKENS) - len(THINKING_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus, random.Random(seed)), trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in THINKING_TOKENS])
    wrapped: Any = PreTrainedTokenizerFast
    finished: PreTrainedTokenizerFast = wrapped(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    return finished


def _texts(corpus: Corpus, rng: random.Random) -> Iterator[str]:
    for language in corpus.languages():
        budget = CHARACTERS_PER_LABEL if language in LABELS else CHARACTERS_PER_OTHER
        texts = list(corpus.texts(language))
        rng.shuffle(texts)
        # Own sentences twice: they read like the queries, software messages do not.
        for text in [*corpus.own.get(language, []), *texts]:
            budget -= len(text)
            if budget < 0:
                break
            yield text
    for size in rng.choices(list(Size), [0.35, 0.4, 0.25], k=DRAWN_PROMPTS):
        yield draw_prompt(rng, size=size).text
    for _ in range(40):
        yield from GENERIC
        for format in FORMATS:
            for label in LABELS:
                yield format.answer(label)

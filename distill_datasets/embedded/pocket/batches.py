"""Assembles training batches in which many queries share one prompt."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .network import Tokens
from .prompts import Frame, Size, draw_frame, draw_generic, draw_prompt, system_frame
from .queries import Query, QuerySource
from .tokenizer import TURN_END

ANSWER_WEIGHT, CONTINUATION_WEIGHT = 1.0, 0.3
# Predicting the query itself teaches the network the languages; labels alone are few bits.
QUERY_WEIGHT = 0.25
# Only a part of the query's tokens is scored, because scoring 4,096 words costs a lot.
QUERY_SHARE = 0.15
# Queries are batched by length, which keeps the padding small: tokens of the longest, and rows.
ROWS_BY_LENGTH = {16: 32, 24: 28, 32: 24, 40: 20, 56: 16, 80: 12, 112: 9, 160: 7, 240: 5}
LONG_QUERIES = 0.04
# Prompts per batch, and by how much to scale its rows: a long prompt should serve many.
PROMPTS = {Size.BRIEF: 8, Size.MEDIUM: 5, Size.LONG: 3}
CONVERSATIONS = {Size.BRIEF: 2, Size.MEDIUM: 1, Size.LONG: 0}
ROW_SCALE = {Size.BRIEF: 0.8, Size.MEDIUM: 1.0, Size.LONG: 1.4}


@dataclass(frozen=True)
class Row:
    """Token ids of a query with what surrounds it, and of the answer."""

    context: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Group:
    """Rows that share a prefix, and how much their tokens count in the loss."""

    kind: str
    prefix: list[int]
    rows: list[Row]
    answer_weight: float
    context_weight: float


@dataclass(frozen=True)
class Batch:
    """Tensors of one training step; `group_N` numbers the group of each suffix."""

    tokens: Tokens
    weight_NS: Tensor
    kinds: list[str]


class BatchSource:
    """Draws training batches."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, queries: QuerySource, *, seed: int
    ) -> None:
        """Use the fast backend of the tokenizer, which knows nothing of torch."""
        self.backend = tokenizer.backend_tokenizer
        self.vocabulary = len(tokenizer)
        self.queries = queries
        self.rng = random.Random(seed)
        self.waiting: dict[int, list[Query]] = {length: [] for length in ROWS_BY_LENGTH}

    def draw(self, sizes: dict[Size, float], *, copying: float) -> Batch:
        """Draw a batch: one size of prompt, by weight, and queries of about one length.

        `copying` is the chance that a group is an exercise in copying instead.
        """
        rng = self.rng
        size = rng.choices(list(sizes), list(sizes.values()))[0]
        length, queries = self._alike(size)
        rows = len(queries) // PROMPTS[size]
        groups = []
        for index in range(PROMPTS[size]):
            # Groups without prompt would be padded to the prompt's length: not beside long ones.
            if index < CONVERSATIONS[size]:
                groups.append(self._conversation(rows, length))
            elif size is not Size.LONG and rng.random() < copying:
                groups.append(self._copies(rows))
            else:
                own = queries[index * rows : (index + 1) * rows]
                groups.append(self._labels(own, length, size))
        return collate(groups, rng)

    def _alike(self, size: Size) -> tuple[int, list[Query]]:
        """Return a length, and queries of about that length for a batch."""
        while True:
            query = self.queries.draw(long=self.rng.random() < LONG_QUERIES)
            tokens = len(self.encode([query.text])[0])
            length = next((limit for limit in ROWS_BY_LENGTH if tokens <= limit), 240)
            self.waiting[length].append(query)
            needed = int(ROWS_BY_LENGTH[length] * ROW_SCALE[size]) * PROMPTS[size]
            if len(self.waiting[length]) >= needed:
                queries = self.waiting[length][:needed]
                del self.waiting[length][:needed]
                self.rng.shuffle(queries)
                return length, queries

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _labels(self, queries: list[Query], length: int, size: Size) -> Group:
        """Draw a prompt and label some queries as it asks."""
        prompt = draw_prompt(self.rng, size=size)
        frame = draw_frame(prompt.text, self.rng)
        answers = [prompt.format.answer(query.label) for query in queries]
        rows = self._rows(frame, [query.text for query in queries], answers, length)
        prefix = self.encode([frame.prefix])[0]
        return Group(prompt.format.name, prefix, rows, ANSWER_WEIGHT, QUERY_WEIGHT)

    def _conversation(self, rows: int, length: int) -> Group:
        """Continue texts without a prompt, or with one that asks for nothing in particular."""
        generic = draw_generic(self.rng, self.queries.draw().text)
        frame = system_frame(generic if self.rng.random() < 0.6 else "")
        exchanges = [self.queries.exchange() for _ in range(rows)]
        users = [exchange.user for exchange in exchanges]
        replies = [exchange.reply for exchange in exchanges]
        prefix = self.encode([frame.prefix])[0]
        framed = self._rows(frame, users, replies, length)
        return Group("conversation", prefix, framed, CONTINUATION_WEIGHT, QUERY_WEIGHT)

    def _copies(self, rows: int) -> Group:
        """Repeat runs of tokens: the skill from which obeying an output format grows."""
        rng = self.rng
        copies = []
        for _ in range(rows):
            length = rng.randint(4, 12)
            run = [rng.randrange(self.vocabulary - 5) for _ in range(length)]
            if rng.random() < 0.5:
                run = (self.encode([self.queries.draw().text])[0] * length)[:length]
            gap = [rng.randrange(self.vocabulary - 5) for _ in range(rng.randint(0, 12))]
            copies.append(Row(run + gap + run[:2], run[2:] + run + run))
        return Group("copy", [], copies, ANSWER_WEIGHT, 0.0)

    def _rows(self, frame: Frame, texts: list[str], answers: list[str], length: int) -> list[Row]:
        """Encode framed texts and answers; texts and answers are cut at about `length` tokens."""
        around = len(self.encode([frame.around("")])[0])
        contexts = self._contexts(frame, texts, length + around + 2)
        replies = self.encode([answer + TURN_END for answer in answers])
        room = max(12, length // 2)
        return [
            Row(context, reply[:room]) for context, reply in zip(contexts, replies, strict=True)
        ]

    def _contexts(self, frame: Frame, texts: list[str], room: int) -> list[list[int]]:
        """Encode the framed texts, each shortened until it fits."""
        contexts = self.encode([frame.around(text) for text in texts])
        for index, text in enumerate(texts):
            while text and (excess := len(contexts[index]) - room) > 0:
                text = text[: len(text) - max(1, excess)].rstrip()
                contexts[index] = self.encode([frame.around(text)])[0]
        return contexts


def collate(groups: list[Group], rng: random.Random) -> Batch:
    """Pad groups into one batch; sizes are rounded up so that few shapes occur.

    Every new shape makes oneDNN compile and keep another primitive.
    """
    rows = [row for group in groups for row in group.rows]
    longest_prefix = max(len(group.prefix) for group in groups)
    prefix = torch.zeros(len(groups), _rounded(longest_prefix, 64), dtype=torch.long)
    longest_suffix = max(len(row.context) + len(row.answer) for row in rows)
    suffix = torch.zeros(len(rows), _rounded(longest_suffix, 8), dtype=torch.long)
    weight = torch.zeros(suffix.shape)
    number = 0
    for index, group in enumerate(groups):
        prefix[index, : len(group.prefix)] = torch.tensor(group.prefix, dtype=torch.long)
        for row in group.rows:
            start, end = len(row.context), len(row.context) + len(row.answer)
            suffix[number, :end] = torch.tensor(row.context + row.answer)
            scored = torch.tensor([rng.random() < QUERY_SHARE for _ in range(1, start)])
            weight[number, 1:start] = group.context_weight * scored
            weight[number, start:end] = group.answer_weight
            number += 1
    lengths = torch.tensor([len(group.prefix) for group in groups])
    return Batch(Tokens(prefix, lengths, suffix), weight, [group.kind for group in groups])


def _rounded(size: int, step: int) -> int:
    return max(step, -(-size // step) * step)

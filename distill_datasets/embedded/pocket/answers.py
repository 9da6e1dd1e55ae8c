"""Greedy answers of the exported model, read through transformers as a user would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
)

from .prompts import Frame
from .tokenizer import TURN_END

ROWS = 64


@dataclass(frozen=True)
class Pocket:
    """A model folder, loaded."""

    # Any: transformers declares these classes untyped, or wider than what a folder holds.
    model: Any
    tokenizer: Any

    def encode(self, text: str) -> list[int]:
        """Return token ids, control tokens included."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def load_pocket(folder: Path) -> Pocket:
    """Load a model folder in float32, the fastest type on most CPUs."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Pocket(model.eval(), AutoTokenizer.from_pretrained(folder))


@torch.inference_mode()
def answer(pocket: Pocket, frame: Frame, queries: list[str], *, max_tokens: int = 12) -> list[str]:
    """Return the greedy answer to each query, `<|im_end|>` included if the model wrote it.

    Queries of equal length run together, so nothing is padded.
    """
    prefix = pocket.model(torch.tensor([pocket.encode(frame.prefix)]), use_cache=True)
    rows = [pocket.encode(frame.around(query)) for query in queries]
    replies = [""] * len(rows)
    for places in _equal_lengths(rows):
        cache = _expanded(prefix.past_key_values, len(places))
        ids = torch.tensor([rows[place] for place in places])
        for place, reply in zip(places, _decode(pocket, ids, cache, max_tokens), strict=True):
            replies[place] = reply
    return replies


def _equal_lengths(rows: list[list[int]]) -> Iterator[list[int]]:
    """Yield the places of rows that have the same length, a few at a time."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    for _, places in groupby(order, key=lambda place: len(rows[place])):
        alike = list(places)
        for start in range(0, len(alike), ROWS):
            yield alike[start : start + ROWS]


def _expanded(prefix: Any, rows: int) -> DynamicCache:
    cache = DynamicCache()
    for number, layer in enumerate(prefix.layers):
        keys, values = (part.expand(rows, -1, -1, -1) for part in (layer.keys, layer.values))
        cache.update(keys, values, number)
    return cache


def _decode(pocket: Pocket, ids: Tensor, cache: DynamicCache, max_tokens: int) -> list[str]:
    end = pocket.tokenizer.convert_tokens_to_ids(TURN_END)
    chosen: list[Tensor] = []
    for _ in range(max_tokens):
        output = pocket.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids = output.logits[:, -1].argmax(-1, keepdim=True)
        chosen.append(ids)
        if torch.cat(chosen, 1).eq(end).any(1).all():
            break
    texts: list[str] = pocket.tokenizer.batch_decode(torch.cat(chosen, 1).tolist())
    return [
        text[: text.find(TURN_END) + len(TURN_END)] if TURN_END in text else text for text in texts
    ]

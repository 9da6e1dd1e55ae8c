"""Distils the long prompt into LoRA students of the pocket model, with two controls."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .answers import Pocket, answer
from .prompts import system_frame
from .tokenizer import TURN_END

RANK, ALPHA = 16, 32
LEARNING_RATE = 3e-3
BATCH = 32
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Labelled:
    """A query and the label that its teacher gave it."""

    query: str
    label: str


class LowRank(nn.Module):
    """A frozen projection plus a trainable one of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        """Start as the frozen projection alone."""
        super().__init__()
        self.base = base
        down = torch.randn(RANK, base.in_features) / math.sqrt(base.in_features)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """Project."""
        low = functional.linear(functional.linear(x, self.down), self.up)
        result: Tensor = self.base(x) + low * (ALPHA / RANK)
        return result


def train_student(pocket: Pocket, rows: list[Labelled], *, steps: int, seed: int) -> Pocket:
    """Train a copy of the model to answer a query without prompt by the bare label."""
    torch.manual_seed(seed)
    model = copy.deepcopy(pocket.model).requires_grad_(False)
    trained = _add_low_rank(model)
    student = Pocket(model, pocket.tokenizer)
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    order = _shuffled_forever(rows, steps * BATCH, seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = (
            LEARNING_RATE * min(1, (step + 1) / 5) * (1 - step / steps)
        )
        _loss(student, order[step * BATCH : (step + 1) * BATCH]).backward()  # type: ignore[no-untyped-call]  # torch
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return student


def bare_labels(student: Pocket, queries: list[str]) -> list[str]:
    """Return what a student answers without a prompt, the end of turn cut off."""
    replies = answer(student, system_frame(""), queries, max_tokens=4)
    return [reply.removesuffix(TURN_END) for reply in replies]


def shuffled_labels(rows: list[Labelled], *, seed: int) -> list[Labelled]:
    """Return the queries with each other's labels: what remains is format and frequency."""
    labels = [row.label for row in rows]
    random.Random(seed).shuffle(labels)
    return [Labelled(row.query, label) for row, label in zip(rows, labels, strict=True)]


def untrained(pocket: Pocket, *, seed: int) -> Pocket:
    """Return the same architecture with random weights."""
    torch.manual_seed(seed)
    model = type(pocket.model)(pocket.model.config).float().eval()
    return Pocket(model, pocket.tokenizer)


def _add_low_rank(model: nn.Module) -> list[nn.Parameter]:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in PROJECTIONS and isinstance(child, nn.Linear):
                setattr(module, name, LowRank(child))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _shuffled_forever(rows: list[Labelled], count: int, seed: int) -> list[Labelled]:
    rng = random.Random(seed)
    order: list[Labelled] = []
    while len(order) < count:
        order += rng.sample(rows, len(rows))
    return order[:count]


def _loss(student: Pocket, rows: list[Labelled]) -> Tensor:
    """Return the mean loss of the answer's tokens."""
    frame = system_frame("")
    contexts = [student.encode(frame.prefix + frame.around(row.query)) for row in rows]
    replies = [student.encode(row.label + TURN_END) for row in rows]
    longest = max(len(c) + len(r) for c, r in zip(contexts, replies, strict=True))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    scored = torch.zeros(len(rows), longest, dtype=torch.bool)
    for place, (context, reply) in enumerate(zip(contexts, replies, strict=True)):
        end = len(context) + len(reply)
        ids[place, :end] = torch.tensor(context + reply)
        scored[place, len(context) : end] = True
    # Padding is on the right, where a causal model never looks from the scored positions.
    logits = student.model(ids).logits[:, :-1][scored[:, 1:]]
    return functional.cross_entropy(logits, ids[:, 1:][scored[:, 1:]])

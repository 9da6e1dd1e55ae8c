"""Trains the network for a budget of processor time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from .batches import QUERY_WEIGHT, Batch, BatchSource
from .network import Network
from .optimizer import Muon
from .prompts import Size

LEARNING_RATE = 4e-3
WARM_UP_STEPS = 40
STABLE_SHARE = 0.5
FINAL_RATE = 0.02
# Languages are learned under brief prompts, at a third of the cost; long prompts come later.
FIRST_SIZES = {Size.BRIEF: 0.75, Size.MEDIUM: 0.15, Size.LONG: 0.1}
LATER_SIZES = {Size.BRIEF: 0.2, Size.MEDIUM: 0.4, Size.LONG: 0.4}
BRIEF_SHARE = 0.25
# Copying is exercised densely at first and then only kept alive.
COPY_SHARES = ((0.25, 0.25), (0.5, 0.1), (1.0, 0.04))
REPORT_EVERY = 50


@dataclass
class Progress:
    """Counts of a training run, and a running mean of the loss by kind of group."""

    steps: int = 0
    cpu_seconds: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)

    def note(self, kind: str, loss: float) -> None:
        """Fold the loss of one group into the running mean of its kind."""
        self.losses[kind] = 0.97 * self.losses.get(kind, loss) + 0.03 * loss

    def line(self) -> str:
        """Return one line of progress for people."""
        losses = "  ".join(f"{kind} {loss:.3f}" for kind, loss in sorted(self.losses.items()))
        return f"step {self.steps}  {self.cpu_seconds / 60:.1f} CPU min  {losses}"


def learning_rate(share: float, step: int) -> float:
    """Return the rate at a share of the budget: warm-up, a plateau, then a line downwards."""
    decay = max(FINAL_RATE, (1 - share) / (1 - STABLE_SHARE)) if share > STABLE_SHARE else 1.0
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * decay


def train(
    network: Network,
    source: BatchSource,
    *,
    cpu_seconds: float,
    report: Callable[[str], None],
) -> Progress:
    """Train until the process has used `cpu_seconds` more."""
    matrices, others = _parameters(network)
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    progress = Progress()
    start = time.process_time()
    while (share := progress.cpu_seconds / cpu_seconds) < 1:
        rate = learning_rate(share, progress.steps)
        copying = next(copy for end, copy in COPY_SHARES if share < end)
        batch = source.draw(FIRST_SIZES if share < BRIEF_SHARE else LATER_SIZES, copying=copying)
        losses = _backward(network, batch)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        muon.step(rate)
        adam.zero_grad(set_to_none=True)
        for kind, loss in zip(batch.kinds, losses, strict=True):
            progress.note(kind, loss)
        progress.steps += 1
        progress.cpu_seconds = time.process_time() - start
        if progress.steps % REPORT_EVERY == 0:
            report(progress.line())
    return progress


def _parameters(network: Network) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the hidden matrices, which Muon updates, and everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        hidden = parameter.dim() == 2 and "embed" not in name
        (matrices if hidden else others).append(parameter)
    return matrices, others


def _backward(network: Network, batch: Batch) -> list[float]:
    """Run one batch forward and backward; return the answer loss of each group."""
    weight = batch.weight_NS[:, 1:]
    chosen = weight > 0
    # The count of scored tokens is rounded up for the reason given at `collate`.
    places = chosen.flatten().nonzero()[:, 0]
    count = len(places)
    places = functional.pad(places, (0, -count % 256))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = network(batch.tokens)[:, :-1]
        logits = network.logits(hidden.reshape(-1, hidden.shape[-1])[places])
    targets = batch.tokens.suffix_NS[:, 1:].flatten()[places]
    losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    weights = weight.flatten()[places].clone()
    weights[count:] = 0
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves backward() untyped
    return _answer_losses(batch, losses.detach()[:count], chosen)


def _answer_losses(batch: Batch, losses: Tensor, chosen: Tensor) -> list[float]:
    dense = torch.zeros(chosen.shape)
    dense[chosen] = losses
    answers = (batch.weight_NS[:, 1:] > QUERY_WEIGHT).float()
    groups = len(batch.kinds)
    sums = (dense * answers).view(groups, -1).sum(1)
    result: list[float] = (sums / answers.view(groups, -1).sum(1).clamp(min=1)).tolist()
    return result

"""Muon for the hidden matrices of a tiny network, batched over matrices of equal shape."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ_STEPS = 5
# Quintic coefficients of the reference Muon implementation (Keller Jordan, 2024).
LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return matrices with nearly the same singular vectors and singular values near one."""
    result: Tensor = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = result @ result.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=CUBIC, alpha=QUINTIC)
        result = torch.baddbmm(result, polynomial, result, beta=LINEAR)
    return result


class Muon:
    """Momentum orthogonalised by Newton-Schulz iterations.

    Matrices of one shape (or its transpose) are stacked, because on a CPU the
    launch of 28 small products costs more than the products themselves.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, momentum: float = 0.95, decay: float = 0.02
    ) -> None:
        """Group `parameters`, which must all be matrices, by shape."""
        self.momentum = momentum
        self.decay = decay
        self.groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in parameters:
            short, long = sorted(parameter.shape)
            self.groups.setdefault((short, long), []).append(parameter)
        self.buffers = {
            shape: torch.zeros(len(members), *shape) for shape, members in self.groups.items()
        }

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every matrix from its gradient, and drop the gradient."""
        for shape, members in self.groups.items():
            gradients = torch.stack([_lying(member.grad, shape) for member in members])
            buffer = self.buffers[shape]
            buffer.lerp_(gradients, 1 - self.momentum)
            updates = orthogonalise(gradients.lerp(buffer, self.momentum))
            # 0.2 * sqrt(longer side) gives the update the RMS of a typical AdamW step.
            scale = learning_rate * 0.2 * shape[1] ** 0.5
            for member, update in zip(members, updates, strict=True):
                member.mul_(1 - learning_rate * self.decay)
                member.sub_(update if tuple(member.shape) == shape else update.T, alpha=scale)
                member.grad = None


def _lying(gradient: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """Return the gradient with its shorter side first."""
    if gradient is None:
        raise ValueError("expected a gradient on every hidden matrix, found None: call backward()")
    return gradient if tuple(gradient.shape) == shape else gradient.T

"""What training minimises: minus the sum of an objective over all targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

# From the logprobs of the targets, the loss's inputs and its settings to an objective per target.
Objective = Callable[[Tensor, Sequence[Tensor], Mapping[str, float]], Tensor]


def cross_entropy(logprobs: Tensor, inputs: Sequence[Tensor], _: Mapping[str, float]) -> Tensor:
    """The logprob, weighted."""
    (weights,) = inputs
    return logprobs * weights


def importance_sampling(
    logprobs: Tensor, inputs: Sequence[Tensor], _: Mapping[str, float]
) -> Tensor:
    """The advantage, times how much likelier the token is than where it was sampled."""
    advantages, sampled = inputs
    return (logprobs - sampled).exp() * advantages


def ppo(logprobs: Tensor, inputs: Sequence[Tensor], config: Mapping[str, float]) -> Tensor:
    """Importance sampling that gains nothing by leaving the clipping range."""
    advantages, sampled = inputs
    ratio = (logprobs - sampled).exp()
    return (ratio * advantages).minimum(_clip(ratio, config) * advantages)


def cispo(logprobs: Tensor, inputs: Sequence[Tensor], config: Mapping[str, float]) -> Tensor:
    """The logprob, weighted by the advantage and the clipped ratio, which is held constant."""
    advantages, sampled = inputs
    ratio = (logprobs - sampled).exp().detach()
    return _clip(ratio, config) * logprobs * advantages


def _clip(ratio: Tensor, config: Mapping[str, float]) -> Tensor:
    return ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])


OBJECTIVES: Mapping[str, Objective] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
}

"""Soft labels as arithmetic: mixed with hard labels, and placed after a prompt."""

import numpy as np
import pytest
import torch

from distill_datasets.models.scoring import SoftLabels
from distill_datasets.training.objectives import (
    after_prompt,
    normalised,
    reverse_kl,
    reverse_targets,
    soft_targets,
)

HALF_QUARTERS = np.log([[0.5, 0.25, 0.25]])


def test_the_probabilities_are_the_teachers() -> None:
    assert normalised(HALF_QUARTERS).tolist() == [pytest.approx([0.5, 0.25, 0.25])]


def test_what_the_top_k_leave_out_is_shared_among_them_and_told() -> None:
    logprobs = np.log([[0.6, 0.2], [0.5, 0.5]])
    labels = SoftLabels.of([4, 5], np.array([[4, 7], [5, 8]]), logprobs)
    assert labels.kept == pytest.approx((0.8 + 1.0) / 2)
    assert normalised(labels.logprobs)[0].tolist() == pytest.approx([0.75, 0.25], abs=1e-3)


def test_the_hard_labels_get_their_share_and_every_place_adds_up_to_1() -> None:
    """The response says 9, which the teacher likes second: 0.2 + 0.8 * 0.25 of 9."""
    labels = SoftLabels.of([9], np.array([[3, 9, 4]]), HALF_QUARTERS)
    targets = soft_targets(labels, alpha=0.2)
    assert targets.tokens.tolist() == [[9, 3, 9, 4]]
    assert targets.weights.tolist() == [pytest.approx([0.4, 0.4, 0.0, 0.2], abs=1e-3)]


def test_without_hard_labels_a_response_the_teacher_would_not_say_weighs_nothing() -> None:
    labels = SoftLabels.of([1], np.array([[3, 9, 4]]), HALF_QUARTERS)
    targets = soft_targets(labels, alpha=0.0)
    assert targets.tokens.tolist() == [[1, 3, 9, 4]]
    assert targets.weights.tolist() == [pytest.approx([0, 0.5, 0.25, 0.25], abs=1e-3)]


def test_a_place_with_fewer_tokens_than_k_learns_no_made_up_ones() -> None:
    labels = SoftLabels.of([6], np.array([[6, 0]]), np.array([[0.0, -np.inf]]))
    targets = soft_targets(labels, alpha=0.0)
    assert targets.tokens.tolist() == [[6, 6, 6]]
    assert targets.weights.tolist() == [[1, 0, 0]]


def test_the_first_token_of_a_response_is_learned_where_the_prompt_ends() -> None:
    """Four tokens of prompt, two of response: inputs 0..4 predict tokens 1..5."""
    labels = SoftLabels.of([8, 2], np.array([[8], [2]]), np.zeros((2, 1)))
    targets = after_prompt(soft_targets(labels, alpha=1.0), 4, 3)
    assert targets.tokens[:, 0].tolist() == [0, 0, 0, 8, 2]
    assert targets.weights.tolist() == [[0, 0, 0]] * 3 + [[1, 0, 0]] * 2


def test_a_one_token_response_to_a_one_token_prompt_is_learned() -> None:
    labels = SoftLabels.of([8], np.array([[8]]), np.zeros((1, 1)))
    assert after_prompt(soft_targets(labels, alpha=0.0), 1, 2).weights.sum() == 1


def test_float16_moves_a_distribution_by_less_than_its_entropy_over_2048() -> None:
    """Half a unit in the last place is at most 2**-11 of a logarithm."""
    random = np.random.default_rng(0)
    for sharpness in (0.1, 1.0, 5.0, 20.0):
        logits = random.normal(size=(200, 20)) * sharpness
        exact = normalised(logits)
        logprobs = np.log(np.maximum(exact, 1e-30))
        labels = SoftLabels.of(np.zeros(200), np.tile(np.arange(20), (200, 1)), logprobs)
        moved = np.abs(normalised(labels.logprobs) - exact).sum(axis=1) / 2
        entropy = -(exact * logprobs).sum(axis=1)
        assert np.all(moved <= entropy / 2048 + 1e-9)
        assert moved.max() > 0


@pytest.mark.parametrize("mass", [0.3, 0.7, 0.99, 1 - 1e-9])
def test_reverse_targets_have_the_gradient_of_the_divergence_with_the_rest_as_one_token(
    mass: float,
) -> None:
    """Over a vocabulary of 200, of whose tokens the 8 likeliest have that much of the student."""
    made = torch.Generator().manual_seed(0)
    tops = torch.randn(5, 8, generator=made, dtype=torch.float64).softmax(1) * mass
    others = torch.rand(5, 192, generator=made, dtype=torch.float64) + 0.1
    others *= (1 - mass) / others.sum(1, keepdim=True)
    logits = torch.cat([tops, others], 1).log().requires_grad_()
    teacher = torch.randn(5, 200, generator=made, dtype=torch.float64).mul(2).log_softmax(1)
    student = logits.log_softmax(1)
    grouped = [
        torch.cat([p[:, :8], p[:, 8:].sum(1, True)], 1) for p in (student.exp(), teacher.exp())
    ]
    divergence = (grouped[0] * (grouped[0].log() - grouped[1].log())).sum(1)
    (wanted,) = torch.autograd.grad(divergence.sum(), logits, retain_graph=True)
    likely = [one[:, :8].detach().float().numpy() for one in (student, teacher)]
    found = reverse_targets([5] * 5, np.tile(np.arange(8), (5, 1)), *likely)
    assert found.tokens[:, 0].tolist() == [5] * 5 and not found.weights[:, 0].any()
    learned = student.gather(1, torch.from_numpy(found.tokens))
    (gradient,) = torch.autograd.grad(-(learned * torch.from_numpy(found.weights)).sum(), logits)
    assert torch.cosine_similarity(gradient.ravel(), wanted.ravel(), dim=0) > 0.9999
    assert gradient.norm() == pytest.approx(float(wanted.norm()), rel=1e-3)
    assert reverse_kl(*likely) == pytest.approx(divergence.detach().numpy(), rel=1e-3)


def test_the_reverse_kl_of_a_part_of_the_vocabulary_is_never_negative() -> None:
    """A teacher that likes each of the likeliest tokens better has less for the others."""
    student, teacher = np.log([[0.5, 0.2], [0.9, 0.1], [1.0, 1e-9]]), np.log([[0.6, 0.39]] * 3)
    apart = reverse_kl(student, teacher)
    wanted = 0.5 * np.log(0.5 / 0.6) + 0.2 * np.log(0.2 / 0.39) + 0.3 * np.log(0.3 / 0.01)
    assert apart[0] == pytest.approx(wanted) and (apart > 0).all()
    assert reverse_kl(student, student).tolist() == pytest.approx([0.0] * 3, abs=1e-5)


def test_a_place_with_fewer_likely_tokens_has_its_own_again_and_stays_finite() -> None:
    student = np.array([[np.log(0.5), np.log(0.25), -np.inf]])
    teacher = np.array([[-np.inf, np.log(0.7), 0.0]])
    found = reverse_targets([7], np.array([[1, 2, 0]]), student, teacher)
    assert found.tokens.tolist() == [[7, 1, 2, 7]]
    assert np.isfinite(found.weights).all()
    assert found.weights[0, 1] < 0 < found.weights[0, 2]
    assert (found.weights[0, 0], found.weights[0, 3]) == (0, 0)


def test_a_token_that_means_another_hands_on_what_the_teacher_gives_it() -> None:
    """Tokens 0 and 1 are one to the teacher, who likes them; the student shall say 0 for both.

    The gradient is that of the divergence over {0, 1}, 2, 3 and the rest, and of how likely 0 is
    of the two, as often as the teacher says either.
    """
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.1, 0.1, 0.1]], dtype=torch.float64))
    logits.requires_grad_()
    student = logits.log_softmax(1)
    p = student.exp()[0]
    ours = torch.stack([p[0] + p[1], p[2], p[3], p[4] + p[5]])
    theirs = torch.tensor([0.8, 0.1, 0.05, 0.05], dtype=torch.float64)
    divergence = (ours * (ours / theirs).log()).sum() - 0.8 * (p[0] / (p[0] + p[1])).log()
    (wanted,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    shared = np.log([[0.8 * 0.1 / 0.5, 0.8 * 0.4 / 0.5, 0.1, 0.05]])
    likely = student[:, :4].detach().numpy()
    ids, meant = np.array([[0, 1, 2, 3]]), np.array([[0, 0, 2, 3]])
    found = reverse_targets([1], ids, likely, shared, meant)
    assert reverse_kl(likely, shared) > 0
    learned = student.gather(1, torch.from_numpy(found.tokens))
    (gradient,) = torch.autograd.grad(-(learned * torch.from_numpy(found.weights)).sum(), logits)
    assert gradient.numpy() == pytest.approx(wanted.numpy(), abs=1e-6)

"""Rollouts as batches: what each token of an answer is worth."""

from dataclasses import replace

import numpy as np
import pytest

from distill_datasets.models.scoring import Ranking
from distill_datasets.training.objectives.on_policy import (
    Rollout,
    divergence,
    forward_batch,
    reverse_batch,
    sampled_batch,
)


def rollout(tokens: list[int], student: list[float], teacher: list[float]) -> Rollout:
    ranking = Ranking(np.array([[7, 8]] * len(tokens)), np.log([[0.75, 0.25]] * len(tokens)))
    own, theirs = np.array(student), np.array(teacher)
    return Rollout([1, 2, 3], tokens, own, theirs, ended=True, ranking=ranking)


def test_a_tokens_advantage_is_how_much_likelier_the_teacher_finds_it() -> None:
    """Two answers, of two tokens and of one: per token, each weighs a third."""
    answers = [rollout([7, 2], [-1.0, -2.0], [-4.0, -0.5]), rollout([2], [-1.5], [-1.5])]
    batch = sampled_batch(answers, "token")
    assert batch.loss == "importance_sampling"
    first, second = (datum.loss_fn_inputs for datum in batch.datums)
    assert batch.datums[0].model_input.to_ints() == [1, 2, 3, 7]
    assert first["target_tokens"].tolist() == [2, 3, 7, 2]
    assert first["logprobs"].tolist() == [0, 0, -1, -2]
    assert first["advantages"].tolist() == pytest.approx([0, 0, -1, 0.5])
    assert second["target_tokens"].tolist() == [2, 3, 2]
    assert second["advantages"].tolist() == [0, 0, 0]
    assert divergence(answers) == pytest.approx((3 - 1.5 + 0) / 3)


def test_per_example_a_short_answer_weighs_as_much_as_a_long_one() -> None:
    answers = [rollout([7, 2], [0.0, 0.0], [-1.0, -1.0]), rollout([2], [0.0], [-1.0])]
    batch = sampled_batch(answers, "example")
    sums = [sum(datum.loss_fn_inputs["advantages"].tolist()) for datum in batch.datums]
    assert sums == pytest.approx([-0.5, -0.5])


def test_the_reverse_kl_moves_probability_to_what_the_teacher_finds_likelier() -> None:
    """The student says 7, 8 or another by 0.75, 0.2, 0.05; the teacher by 0.25, 0.7, 0.05."""
    answer = rollout([7, 2], [-1.0, -2.0], [-4.0, -0.5])
    ranking = Ranking(np.array([[7, 8]] * 2), np.log([[0.75, 0.2]] * 2))
    answer = replace(answer, ranking=ranking, judged=np.log([[0.25, 0.7]] * 2))
    batch = reverse_batch([answer], "token")
    assert batch.loss == "cross_entropy"
    fields = batch.datums[0].loss_fn_inputs
    weights, targets = fields["weights"].to_numpy(), fields["target_tokens"].to_numpy()
    assert targets[2:].tolist() == [[7, 7, 8], [2, 7, 8]]
    # p (a - a of the rest, which is 0), of two tokens each.
    less, more = 0.75 * np.log(0.25 / 0.75) / 2, 0.2 * np.log(0.7 / 0.2) / 2
    assert weights[2:] == pytest.approx(np.array([[0, less, more]] * 2))
    assert not weights[:2].any()
    assert divergence([answer]) == pytest.approx(-2 * (less + more))


def test_the_forward_kl_teaches_the_teachers_likeliest_at_each_place_reached() -> None:
    batch = forward_batch([rollout([7, 2], [-1.0, -2.0], [-4.0, -0.5])], "token")
    weights = batch.datums[0].loss_fn_inputs["weights"].to_numpy()
    targets = batch.datums[0].loss_fn_inputs["target_tokens"].to_numpy()
    assert batch.loss == "cross_entropy"
    assert targets[2:].tolist() == [[7, 7, 8], [2, 7, 8]]
    assert weights[2].tolist() == pytest.approx([0.375, 0, 0.125], abs=1e-3)
    assert weights[3].tolist() == pytest.approx([0, 0.375, 0.125], abs=1e-3)
    assert not weights[:2].any()

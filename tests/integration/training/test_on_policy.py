"""On-policy distillation, with a tiny random model as its own teacher on the real server."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill_datasets.models.connection import connect
from distill_datasets.models.scoring import Ranking, Scorer
from distill_datasets.training.objective_settings import ObjectiveSettings
from distill_datasets.training.objectives.on_policy import (
    OnPolicyProducer,
    Rollout,
    divergence,
    forward_batch,
    reverse_batch,
    sampled_batch,
)
from distill_datasets.training.objectives.producers import Lesson
from distill_datasets.training.schedule import Step
from distill_datasets.training.student import Adapted, Student
from distill_datasets.training.trainer import TrainSettings, train
from tests.support.soft_releases import PROMPT, SMALL, lesson, release
from tests.support.training_runs import metrics

STEP = Step(1, 0, [0, 3], 1e-2)


@pytest.fixture(scope="module")
def tiny_release(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release(tmp_path_factory.mktemp("release"), model)


def settings(**objective: Any) -> TrainSettings:
    chosen = ObjectiveSettings(**{"name": "on_policy", "max_tokens": 3, "top_k": 4, **objective})
    return replace(SMALL, epochs=2, objective=chosen)


def rollouts(lesson: Lesson) -> list[Rollout]:
    """What a new producer learns in the first step."""
    producer = OnPolicyProducer(lesson)
    try:
        return producer._roll(STEP, lesson.student.snapshot())
    finally:
        producer.close()


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


def test_the_reverse_kl_moves_probability_among_what_the_student_would_say() -> None:
    """The student finds 7 and 8 likely; the teacher prefers 8, by two nats, and doesn't know 2."""
    answer = rollout([7, 2], [-1.0, -2.0], [-4.0, -0.5])
    judged = np.log([[0.75, 0.25]] * 2) + np.array([0.0, 2.0])
    batch = reverse_batch([replace(answer, judged=judged)], "token")
    assert batch.loss == "cross_entropy"
    fields = batch.datums[0].loss_fn_inputs
    weights, targets = fields["weights"].to_numpy(), fields["target_tokens"].to_numpy()
    assert targets[2:].tolist() == [[7, 7, 8], [2, 7, 8]]
    # p (a - mean of a): 0.75 (0 - 0.5) and 0.25 (2 - 0.5), of two tokens each.
    assert weights[2:] == pytest.approx(np.array([[0, -0.1875, 0.1875]] * 2))
    assert not weights[:2].any()
    assert divergence([replace(answer, judged=judged)]) == pytest.approx(-0.5)


def test_the_forward_kl_teaches_the_teachers_likeliest_at_each_place_reached() -> None:
    batch = forward_batch([rollout([7, 2], [-1.0, -2.0], [-4.0, -0.5])], "token")
    weights = batch.datums[0].loss_fn_inputs["weights"].to_numpy()
    targets = batch.datums[0].loss_fn_inputs["target_tokens"].to_numpy()
    assert batch.loss == "cross_entropy"
    assert targets[2:].tolist() == [[7, 7, 8], [2, 7, 8]]
    assert weights[2].tolist() == pytest.approx([0.375, 0, 0.125], abs=1e-3)
    assert weights[3].tolist() == pytest.approx([0, 0.375, 0.125], abs=1e-3)
    assert not weights[:2].any()


def test_the_teacher_scores_the_students_own_tokens_under_the_prompt(
    tiny_release: Path, model: str, tmp_path: Path
) -> None:
    """Student and teacher are one model here: new LoRA weights change nothing."""
    connection = connect(model)
    scorer, renderer = Scorer(connection), connection.renderer
    found = rollouts(lesson(tiny_release, model, tmp_path, settings()))
    for one, query in zip(found, ("the weather 0", "el cielo 3"), strict=True):
        asked: Any = [{"role": "user", "content": query}]
        contexts = [asked, [{"role": "system", "content": PROMPT}, *asked]]
        prompts = [list(renderer.build_generation_prompt(each).to_ints()) for each in contexts]
        alone, prompted = (scorer.read(each, one.tokens).result().logprobs for each in prompts)
        assert one.prompt == prompts[0] and 1 <= len(one.tokens) <= 3
        assert one.student.tolist() == pytest.approx(alone.tolist(), abs=1e-4)
        assert one.teacher.tolist() == pytest.approx(prompted.tolist(), abs=1e-4)
        assert abs(alone - prompted).max() > 0.01
        likely = scorer.read(prompts[0], one.tokens, 4).result().ranking
        assert one.ranking is not None and likely is not None
        assert one.ranking.ids.tolist() == likely.ids.tolist()
        assert one.ranking.logprobs == pytest.approx(likely.logprobs, abs=1e-4)
        judged = scorer.chosen(prompts[1], one.tokens, likely.ids).result()
        assert one.judged == pytest.approx(judged, abs=1e-4)


def test_the_same_weights_step_and_seed_sample_the_same(
    tiny_release: Path, model: str, tmp_path: Path
) -> None:
    def sampled(seed: int) -> list[list[int]]:
        chosen = replace(settings(samples=2), seed=seed)
        seeded = lesson(tiny_release, model, tmp_path, chosen)
        return [list(one.tokens) for one in rollouts(seeded)]

    first = sampled(0)
    assert len(first) == 4  # two answers to each of two queries
    assert first == sampled(0) != sampled(1)


def test_answers_of_one_token_are_learned_too(
    tiny_release: Path, model: str, tmp_path: Path
) -> None:
    training = train(
        tiny_release, student=model, out=tmp_path / "out", settings=settings(max_tokens=1)
    )
    assert set(metrics(training, "sampled_tokens").values()) == {1.0}
    assert all(norm > 0 for norm in metrics(training, "gradient_norm").values())


@pytest.mark.parametrize(
    ("kl", "stale", "top_k"), [("reverse", 0, 4), ("forward", 1, 4), ("reverse", 1, 0)]
)
def test_a_training_samples_scores_and_learns_each_step(
    kl: Any, stale: int, top_k: int, tiny_release: Path, model: str, tmp_path: Path
) -> None:
    chosen = settings(kl=kl, stale=stale, top_k=top_k)
    training = train(tiny_release, student=model, out=tmp_path / "out", settings=chosen)
    assert training.steps == 4
    for name in ("reverse_kl", "sampled_tokens", "ended"):
        assert list(metrics(training, name)) == [1, 2, 3, 4]
    if kl == "reverse":
        assert metrics(training) == metrics(training, "reverse_kl")
    assert not (tmp_path / "out" / "journal.sqlite").exists()


@pytest.mark.parametrize(
    ("stale", "order"),
    [(0, ["snapshot", "learn"] * 2), (1, ["snapshot"] * 2 + ["learn"] * 2)],
)
def test_without_staleness_a_step_is_sampled_with_the_weights_it_changes(
    stale: int, order: list[str], tiny_release: Path, model: str, tmp_path: Path
) -> None:
    """With it, the second step is sampled before the first is learned."""
    events: list[str] = []

    class Watched(Student):
        def snapshot(self) -> Any:
            events.append("snapshot")
            return super().snapshot()

        def learn(self, *what: Any) -> Any:
            events.append("learn")
            return super().learn(*what)

    taught = lesson(tiny_release, model, tmp_path, settings(stale=stale))
    student = Watched.create(connect(model), Adapted(rank=4))
    steps = [STEP, replace(STEP, number=2)]
    with closing(OnPolicyProducer(replace(taught, student=student))) as producer:
        producer.prepare(steps[0])
        for step, coming in zip(steps, [steps[1], None], strict=True):
            if coming:
                producer.prepare(coming)
            producer.submit(step).result()
    assert events == order


def test_a_killed_training_goes_on_to_the_very_same_steps(
    tiny_release: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save lies between the second and the third step; the fourth is never learned."""
    chosen = replace(settings(), save_every=2)
    whole = train(tiny_release, student=model, out=tmp_path / "whole", settings=chosen)
    submit = OnPolicyProducer.submit

    def killed(producer: OnPolicyProducer, step: Step) -> Any:
        if step.number == 4:
            raise RuntimeError("killed")
        return submit(producer, step)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(OnPolicyProducer, "submit", killed)
        train(tiny_release, student=model, out=tmp_path / "out", settings=chosen)
    again = train(tiny_release, student=model, out=tmp_path / "out", settings=chosen)
    assert metrics(again) == pytest.approx(metrics(whole), abs=1e-5)

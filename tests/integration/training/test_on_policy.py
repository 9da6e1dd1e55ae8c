"""On-policy distillation, with a tiny random model as its own teacher on the real server; and
rollouts as batches: what each token of an answer is worth.
"""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinker import LoraConfig

from distill_datasets.models.references import connect
from distill_datasets.models.scoring import Ranking, Scorer
from distill_datasets.training.objectives import TrainingTask
from distill_datasets.training.on_policy import (
    OnPolicyObjective,
    Rollout,
    divergence,
    forward_batch,
    reverse_batch,
    sampled_batch,
)
from distill_datasets.training.schedule import Step
from distill_datasets.training.settings import ObjectiveSettings
from distill_datasets.training.student import Student
from distill_datasets.training.trainer import TrainSettings, train
from tests.support.server_log import read_log
from tests.support.shared_server import shared
from tests.support.soft_releases import PROMPT, SMALL, release, training_task
from tests.support.training_runs import metrics

pytestmark = pytest.mark.usefixtures("undrawn")
STEP = Step(1, 0, [0, 3], 1e-2)


@pytest.fixture(scope="module")
def tiny_release(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release(tmp_path_factory.mktemp("release"), model)


def settings(**objective: Any) -> TrainSettings:
    fields = {"name": "on_policy", "max_tokens": 3, "top_k": 4, "warm_start": 0, **objective}
    chosen = ObjectiveSettings(**fields)
    return replace(SMALL, epochs=2, objective=chosen)


def rollouts(task: TrainingTask) -> list[Rollout]:
    """What a new objective learns in the first step."""
    objective = OnPolicyObjective(task)
    try:
        return objective._roll(STEP, task.student.snapshot())
    finally:
        objective.close()


def test_the_teacher_scores_the_students_own_tokens_under_the_prompt(
    tiny_release: Path, model: str, tmp_path: Path
) -> None:
    """Student and teacher are one model here: new LoRA weights change nothing."""
    connection = connect(model)
    scorer, renderer = Scorer(connection), connection.renderer
    found = rollouts(training_task(tiny_release, model, tmp_path, settings()))
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
        judged, _ = scorer.chosen(prompts[1], one.tokens, likely.ids).result()
        assert one.judged == pytest.approx(judged, abs=1e-4)


def test_the_same_weights_step_and_seed_sample_the_same(
    tiny_release: Path, model: str, tmp_path: Path
) -> None:
    def sampled(seed: int) -> list[list[int]]:
        chosen = replace(settings(), seed=seed)
        seeded = training_task(tiny_release, model, tmp_path, chosen)
        return [list(one.tokens) for one in rollouts(seeded)]

    first = sampled(0)
    assert len(first) == 2
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
    ages = [float(stale and step > 1) for step in range(1, 5)]
    assert list(metrics(training, "staleness").values()) == ages
    assert not (tmp_path / "out" / "journal.sqlite").exists()


def test_an_answer_is_as_long_as_the_contexts_let_it_be(
    tiny_release: Path, model: str, tmp_path: Path
) -> None:
    """512 tokens, of which the teacher's prompt takes more than the student's."""
    task = training_task(tiny_release, model, tmp_path, settings(max_tokens=500))
    asked: Any = [{"role": "system", "content": PROMPT}, {"role": "user", "content": "el cielo 3"}]
    prompt = connect(model).renderer.build_generation_prompt(asked).to_ints()
    longest = 512 - len(prompt) - 1
    assert all(len(one.tokens) == longest or one.ended for one in rollouts(task))


def test_a_new_student_learns_the_responses_first(
    tiny_release: Path, model: str, tmp_path: Path
) -> None:
    """One that was trained before has no need to."""
    chosen = settings(warm_start=None)
    warm = replace(chosen, epochs=3)
    training = train(tiny_release, student=model, out=tmp_path / "new", settings=warm)
    hard = replace(warm, objective=ObjectiveSettings())
    sft = train(tiny_release, student=model, out=tmp_path / "sft", settings=hard)
    losses = metrics(training)
    assert [losses[step] for step in (1, 2)] == [metrics(sft)[step] for step in (1, 2)]
    assert list(metrics(training, "reverse_kl")) == [3, 4, 5, 6]
    again = train(
        tiny_release, student=model, out=tmp_path / "again", settings=chosen, start=tmp_path / "new"
    )
    assert list(metrics(again, "reverse_kl")) == [1, 2, 3, 4]


def test_a_student_is_cut_where_its_teacher_is_and_learns_to_end_there(
    tiny_release: Path, model: str, tmp_path: Path
) -> None:
    """The stop text is what the student of `tiny_release` says first."""
    connection = connect(model)
    every = settings(top_k=200)
    free = rollouts(training_task(tiny_release, model, tmp_path, every))[0]
    (stop,) = connection.tokenizer.batch_decode([free.tokens[:1]])
    cut = release(tmp_path / "cut", model, sampling={"stop": [stop]})
    with closing(
        OnPolicyObjective(training_task(cut, model, tmp_path / "task", every))
    ) as objective:
        sampled = objective._roll(STEP, objective._task.student.snapshot())
        one = objective._current(sampled, 0)[0]
    assert one.tokens == free.tokens[:1] and one.ended
    assert one.ranking is not None and one.meant is not None and one.judged is not None
    meant, ids = one.meant[0], one.ranking.ids[0]
    assert {*meant[meant != ids]} == {connection.tokenizer.eos_token_id}
    assert one.tokens[0] in ids[meant != ids]
    fields = reverse_batch([one], "token").datums[0].loss_fn_inputs
    targets, weights = (fields[name].to_numpy()[-1] for name in ("target_tokens", "weights"))
    assert targets[201:][meant != ids].tolist() == meant[meant != ids].tolist()
    assert weights[201:].sum() == pytest.approx(np.exp(one.judged[0][meant != ids]).sum(), rel=1e-4)


def test_old_samples_are_learned_by_the_weights_of_now(
    tiny_release: Path, model: str, tmp_path: Path
) -> None:
    task = training_task(tiny_release, model, tmp_path, settings())
    with closing(OnPolicyObjective(task)) as objective:
        sampled = objective._roll(STEP, task.student.snapshot())
        same = objective._current(sampled, 1)
        objective.submit(STEP).result()
        moved = objective._current(sampled, 1)
    for before, still, after in zip(sampled, same, moved, strict=True):
        assert before.ranking is not None and still.ranking is not None
        assert after.ranking is not None
        assert still.ranking.logprobs == pytest.approx(before.ranking.logprobs, abs=1e-4)
        assert abs(after.ranking.logprobs - before.ranking.logprobs).max() > 1e-2


def test_what_the_first_step_waits_for_is_said(
    tiny_release: Path, model: str, tmp_path: Path
) -> None:
    said: list[str] = []
    task = replace(training_task(tiny_release, model, tmp_path, settings()), say=said.append)
    with closing(OnPolicyObjective(task)) as objective:
        objective.prepare(STEP)
        objective.submit(STEP).result()
        objective.submit(replace(STEP, number=2)).result()
    assert said[0] == "step 1 waits for the weights that sample it"
    assert "step 1 waits for the student's answers to 2 of 2 queries" in said
    assert said[-1] == "step 1 waits for the teacher on 1 of 2 answers"


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

    task = training_task(tiny_release, model, tmp_path, settings(stale=stale))
    student = Watched.create(connect(model), LoraConfig(rank=4, seed=0))
    steps = [STEP, replace(STEP, number=2)]
    with closing(OnPolicyObjective(replace(task, student=student))) as objective:
        objective.prepare(steps[0])
        for step, coming in zip(steps, [steps[1], None], strict=True):
            if coming:
                objective.prepare(coming)
            objective.submit(step).result()
    assert events == order


@pytest.mark.parametrize(("stale", "forwards"), [(0, 0), (1, 3)])
def test_the_student_reads_its_samples_again_only_where_its_weights_have_moved(
    stale: int, forwards: int, model: str, tmp_path: Path
) -> None:
    """Of four steps, the first is always sampled with the weights that it changes."""
    made = release(tmp_path, model, validation=0)
    trained = train(made, student=model, out=tmp_path / "out", settings=settings(stale=stale))
    run = trained.final.state.removeprefix("tinker://").partition("/")[0]
    done = [line["did"] for line in read_log(shared().store) if line["run"] == run]
    assert done.count("forward") == forwards and done.count("optim_step") == 4


def test_a_killed_training_goes_on_to_the_very_same_steps(
    tiny_release: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save lies between the second and the third step; the fourth is never learned."""
    chosen = replace(settings(), save_every=2)
    whole = train(tiny_release, student=model, out=tmp_path / "whole", settings=chosen)
    submit = OnPolicyObjective.submit

    def killed(objective: OnPolicyObjective, step: Step) -> Any:
        if step.number == 4:
            raise RuntimeError("killed")
        return submit(objective, step)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(OnPolicyObjective, "submit", killed)
        train(tiny_release, student=model, out=tmp_path / "out", settings=chosen)
    again = train(tiny_release, student=model, out=tmp_path / "out", settings=chosen)
    for exactly in ("sampled_tokens", "ended"):
        assert metrics(again, exactly) == metrics(whole, exactly)
    # A busy server puts other requests into a batch, which moves the last bits of a float32; a
    # single other token would move a loss by a hundredth at least.
    assert metrics(again) == pytest.approx(metrics(whole), abs=2e-4)


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

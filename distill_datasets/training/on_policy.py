"""On-policy distillation: the student answers without the prompt, the teacher judges with it.

Every sampled token counts, the stop token too, however short the answer; later places are not
credited to earlier tokens. With the reverse KL the student learns, at each place that it reached,
the gradient of the divergence over its own likeliest tokens and all others as one; or, over the
sampled token alone, a one-sample estimate by policy gradients, with importance sampling for the
steps learned since, which takes less of a server and gives no gradient where answers don't vary.
With the forward KL the teacher's likeliest tokens at these places are targets.

Where the teacher is cut at stop texts, so is the student, which learns to end there.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import tinker
from numpy.typing import NDArray

from distill_datasets.errors import ModelError
from distill_datasets.models.sampler import digest
from distill_datasets.models.scoring import (
    Pending,
    Ranking,
    Scorer,
    SoftLabels,
    require_same_tokenizer,
)
from distill_datasets.training.objectives import (
    LEAST,
    Objective,
    ReleasedRow,
    SoftExample,
    SupervisedObjective,
    TrainingTask,
    chosen_rows,
    read_teacher,
    released_rows,
    reverse_kl,
    reverse_targets,
    soft_batch,
    soft_targets,
)
from distill_datasets.training.schedule import Step
from distill_datasets.training.student import (
    Learned,
    Normalization,
    Submitted,
    TrainingBatch,
    datum,
    shares,
)

_CUT_AMONG = 20  # likeliest tokens of a teacher, to know how likely it is cut


@dataclass(frozen=True)
class Rollout:
    """One sampled answer: the student's log-probabilities of its tokens, and the teacher's.

    `ranking` holds the likeliest tokens in their places: the teacher's for the forward KL, the
    student's for the reverse KL; `judged` the teacher's log-probabilities of the latter.
    Where the teacher is cut at stop texts, `top` is its own likeliest, and `meant` what the student
    is to say for its.
    """

    prompt: Sequence[int]
    tokens: Sequence[int]
    student: NDArray[np.float64]
    teacher: NDArray[np.float64]
    ended: bool
    ranking: Ranking | None = None
    judged: NDArray[np.float64] | None = None
    top: Ranking | None = None
    meant: NDArray[np.integer] | None = None


class OnPolicyObjective(Objective):
    """Samples a step's queries with the current student, or that of a step before, and scores them.

    A request's seed follows from the settings' seed, the step and the row, so that equal weights
    sample equally. Nothing is kept: a run that goes on from a checkpoint samples its steps again.
    """

    def __init__(self, task: TrainingTask) -> None:
        """Open the teacher; raises `DatasetError` where the release has no prompt for it."""
        released = read_teacher(task)
        self._task, self._objective = task, task.settings.objective
        _, rows = chosen_rows(task)
        released.require_own_words(rows)
        teacher = released.connect()
        require_same_tokenizer(teacher, task.student.connection)
        self._scorer = Scorer(teacher)
        self._hard, self._cuts = SupervisedObjective(task), released.cut_ends()
        ends = task.student.connection.renderer.get_stop_sequences()
        self._stop = self._cuts.stops if self._cuts else ends
        self._likeliest = self._objective.top_k if self._objective.kl == "reverse" else 0
        self._longest = self._objective.max_tokens or released.recipe.sampling.max_tokens
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._started: dict[int, tuple[int, Future[list[Rollout]]]] = {}
        self._submitted: int | None = None
        self._sampled = False  # until then nothing else shows that work goes on
        self._context = lru_cache(maxsize=4096)(
            lambda query: released.prompt_tokens(teacher, query)
        )

    def prepare(self, step: Step) -> None:
        """Sample a coming step in the background, with the current weights."""
        if self._submitted is None:
            self._submitted = step.number - 1
        if self._objective.stale and step.number > self._task.warm_steps:
            self._start(step)

    def submit(self, step: Step) -> Submitted[Learned]:
        """Learn the step's answers; waits for those that are still being sampled."""
        if step.number > self._task.warm_steps and step.number not in self._started:
            self._submitted = step.number - 1
            self._start(step)
        self._submitted = step.number
        if step.number <= self._task.warm_steps:
            return self._hard.submit(step)
        age, sampled = self._started.pop(step.number)
        rollouts, normalization = sampled.result(), self._task.settings.normalization
        self._sampled = True
        if self._objective.kl == "forward":
            batch = forward_batch(rollouts, normalization)
        elif self._objective.policy_gradient:
            batch = sampled_batch(rollouts, normalization)
        else:
            batch = reverse_batch(self._current(rollouts, age), normalization)

        def read(outputs: Sequence[Mapping[str, Any]]) -> Learned:
            learned = batch.read(outputs)
            return replace(learned, extra={**learned.extra, "staleness": age})

        return self._task.student.learn(replace(batch, read=read), self._task.update(step))

    def close(self) -> None:
        """Wait for nothing; requests that are on their way are dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _start(self, step: Step) -> None:
        """Begin to sample a step with the weights after the last step that was submitted."""
        assert self._submitted is not None
        self._say(step, "the weights that sample it")
        client = self._task.student.snapshot()
        rolling = self._thread.submit(self._roll, step, client)
        self._started[step.number] = (step.number - 1 - self._submitted, rolling)

    def _roll(self, step: Step, client: tinker.SamplingClient) -> list[Rollout]:
        rows = released_rows(self._task, step.places)
        sampling = [self._sample(step, row, client) for row in rows]
        judging = []
        for done, (row, pending) in enumerate(zip(rows, sampling, strict=True)):
            self._say(step, f"the student's answers to {len(rows) - done} of {len(rows)} queries")
            judging += [self._judge(row, sequence) for sequence in pending.result()]
        rollouts = []
        for done, judged in enumerate(judging):
            self._say(step, f"the teacher on {len(judging) - done} of {len(judging)} answers")
            rollouts.append(judged())
        return rollouts

    def _say(self, step: Step, what: str) -> None:
        if not self._sampled:
            self._task.say(f"step {step.number} waits for {what}")

    def _sample(self, step: Step, row: ReleasedRow, client: tinker.SamplingClient) -> Pending[Any]:
        """Ask for answers that student and teacher can both read."""
        student, named = self._task.student.connection, (step.number, row.id, row.sample)
        read = ((student, row.prompt), (self._scorer.connection, self._context(row.query)))
        left = [one.max_context - len(prompt) - 1 for one, prompt in read if one.max_context]
        request = client.sample(
            prompt=tinker.ModelInput.from_ints(list(row.prompt)),
            num_samples=1,
            topk_sample_logprobs=self._likeliest,
            sampling_params=tinker.SamplingParams(
                max_tokens=max(1, min([self._longest, *left])),
                temperature=1.0,
                seed=int(digest([self._task.settings.seed, *named])[:8], 16) >> 1,
                stop=self._stop,
            ),
        )
        return Pending(student, request, lambda reply: reply.sequences)

    def _judge(self, row: ReleasedRow, sequence: Any) -> Callable[[], Rollout]:
        """Ask the teacher about one answer; what is returned waits for it."""
        cut = self._cuts.cut(sequence.tokens) if self._cuts else None
        tokens, own = sequence.tokens[:cut], np.asarray(sequence.logprobs, np.float64)[:cut]
        ended = cut is not None or sequence.stop_reason == "stop"
        rollout = Rollout(row.prompt, tokens, own, own, ended)
        if self._likeliest:
            return self._judge_likeliest(row, rollout, self._ranking(sequence, len(tokens)))
        k = self._objective.top_k or (_CUT_AMONG if self._cuts else 0)
        pending = self._scorer.read(self._context(row.query), tokens, k)

        def judged() -> Rollout:
            found = pending.result()
            theirs, ranking = found.logprobs, found.ranking
            if self._cuts and ranking:
                said = np.asarray(tokens)[:, None]
                theirs = self._cuts.judged(said, own[:, None], theirs[:, None], ranking)[:, 0]
                ranking = Ranking(self._cuts.meant(ranking.ids), ranking.logprobs)
            return replace(rollout, teacher=np.maximum(theirs, LEAST), ranking=ranking)

        return judged

    def _judge_likeliest(
        self, row: ReleasedRow, rollout: Rollout, ranking: Ranking
    ) -> Callable[[], Rollout]:
        """Ask the teacher about the student's likeliest tokens too."""
        said = np.asarray(rollout.tokens)[:, None]
        ids = np.concatenate([said, ranking.ids], axis=1)
        k = self._objective.top_k if self._cuts else 0
        pending = self._scorer.chosen(self._context(row.query), rollout.tokens, ids, k)
        meant = self._cuts.meant(ranking.ids) if self._cuts else None

        def judged() -> Rollout:
            found, top = pending.result()
            teacher, judged = found[:, 0], found[:, 1:]
            return replace(
                rollout, teacher=teacher, ranking=ranking, judged=judged, top=top, meant=meant
            )

        return judged

    def _current(self, rollouts: Sequence[Rollout], age: int) -> list[Rollout]:
        """With the student's probabilities by the weights that learn now, `age` steps after those
        that sampled.

        Older ones lack a step: their weights of the targets don't add up to 0, and pull on by as
        much as the step before has moved, which grows from step to step.
        """
        found: Sequence[NDArray[np.float64] | None] = [None] * len(rollouts)
        if age:
            batch = reverse_batch(rollouts, "token").datums
            found = self._task.student.logprobs([batch]).result()
        current = []
        for one, logprobs in zip(rollouts, found, strict=True):
            assert one.ranking is not None and one.judged is not None
            ids, student, judged = one.ranking.ids, one.ranking.logprobs, one.judged
            if logprobs is not None:
                now = logprobs[-len(one.tokens) :, 1 : 1 + ids.shape[1]]
                student = np.where(np.isfinite(student), now, -np.inf).astype(np.float32)
            if self._cuts and one.top is not None:
                judged = self._cuts.judged(ids, student, judged, one.top)
            current.append(replace(one, ranking=Ranking(ids, student), judged=judged))
        return current

    def _ranking(self, sequence: Any, places: int) -> Ranking:
        """The student's likeliest tokens; places with fewer have the sampled token again."""
        top = sequence.topk_logprobs_np
        if top is None or not top.token_ids.shape[-1]:
            raise ModelError(
                f"{self._task.student.connection.reference!r} gives no top-k log-probabilities "
                "of what it samples: train with top_k=0 or kl='forward'."
            )
        every = Ranking.read(top, len(sequence.tokens))
        found = Ranking(every.ids[:places], every.logprobs[:places])
        said = np.asarray(sequence.tokens[:places])[:, None]
        return replace(found, ids=np.where(np.isfinite(found.logprobs), found.ids, said))


def reverse_batch(rollouts: Sequence[Rollout], normalization: Normalization) -> TrainingBatch:
    """The gradient of the reverse KL over the student's likeliest tokens at each place."""
    examples, targets = [], []
    for rollout in rollouts:
        assert rollout.ranking is not None and rollout.judged is not None
        examples.append(SoftExample(rollout.prompt, _labels(rollout)))
        targets.append(
            reverse_targets(
                rollout.tokens,
                rollout.ranking.ids,
                rollout.ranking.logprobs,
                rollout.judged,
                rollout.meant,
            )
        )
    datums = soft_batch(examples, targets, normalization).datums
    return TrainingBatch(datums, lambda _: _learned(rollouts, divergence(rollouts)))


def sampled_batch(rollouts: Sequence[Rollout], normalization: Normalization) -> TrainingBatch:
    """Policy gradients: each token's advantage is by how much the teacher finds it likelier."""
    sizes, datums = shares([len(one.tokens) for one in rollouts], normalization), []
    for one, size in zip(rollouts, sizes, strict=True):
        # The first sampled token is predicted by the prompt's last.
        before, tokens = np.zeros(len(one.prompt) - 1), [*one.prompt, *one.tokens]
        made = datum(
            tokens,
            target_tokens=np.asarray(tokens[1:]),
            logprobs=np.concatenate([before, one.student]),
            advantages=np.concatenate([before, (one.teacher - one.student) / size]),
        )
        datums.append(made)
    return TrainingBatch(
        datums, lambda _: _learned(rollouts, divergence(rollouts)), "importance_sampling"
    )


def forward_batch(rollouts: Sequence[Rollout], normalization: Normalization) -> TrainingBatch:
    """The teacher's likeliest tokens at each place that the student reached, as soft labels."""
    examples = [SoftExample(rollout.prompt, _labels(rollout)) for rollout in rollouts]
    targets = [soft_targets(one.labels, alpha=0.0) for one in examples]
    soft = soft_batch(examples, targets, normalization)

    def read(outputs: Sequence[Mapping[str, Any]]) -> Learned:
        learned = soft.read(outputs)
        return _learned(rollouts, learned.loss, learned.extra)

    return TrainingBatch(soft.datums, read)


def divergence(rollouts: Sequence[Rollout]) -> float:
    """Nats per sampled token by which the student leaves the teacher: over its likeliest tokens,
    or an estimate by the sampled ones.
    """
    apart = 0.0
    for one in rollouts:
        if one.ranking is not None and one.judged is not None:
            apart += float(reverse_kl(one.ranking.logprobs, one.judged).sum())
        else:
            apart += float((one.student - one.teacher).sum())
    return apart / sum(len(one.tokens) for one in rollouts)


def _labels(rollout: Rollout) -> SoftLabels:
    assert rollout.ranking is not None
    return SoftLabels.of(rollout.tokens, rollout.ranking.ids, rollout.ranking.logprobs)


def _learned(
    rollouts: Sequence[Rollout], loss: float, extra: Mapping[str, float] | None = None
) -> Learned:
    count = sum(len(rollout.tokens) for rollout in rollouts)
    return Learned(
        loss=loss,
        response_tokens=count,
        tokens=count + sum(len(rollout.prompt) for rollout in rollouts),
        extra={
            **(extra or {}),
            "reverse_kl": divergence(rollouts),
            "sampled_tokens": count / len(rollouts),
            "ended": sum(rollout.ended for rollout in rollouts) / len(rollouts),
        },
    )

"""How much of the prompt is in the weights: one number from likelihoods, with no judge.

(NLL_base - NLL_student) / (NLL_base - NLL_teacher), per response token, over the teacher's own
answers: 0 is the base without the prompt, 1 the teacher with it. Nothing is clipped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from distill_datasets.conversations import assistant_message
from distill_datasets.errors import DatasetError
from distill_datasets.models.scoring import Judged, Likelihood, likelihoods
from distill_datasets.statistics import Bootstrap, Floats, resamples

if TYPE_CHECKING:
    from distill_datasets.generation.pricing import Meter
    from distill_datasets.models.connection import Connection
    from distill_datasets.recipes.recipe import Recipe
    from distill_datasets.schema import Message

    Meters = Mapping[str, Meter | None]  # by the names of systems; None for one without a price

_RESAMPLES = 2_000
LEAST_ROWS = 20  # answers of the teacher that a score takes
_HARDLY = 0.05  # nats a token between base and teacher, to report
_LEAST = 1e-4  # nats a token between base and teacher: servers round log-probabilities


@dataclass(frozen=True)
class ReferenceLikelihoods:
    """The two ends of the score, on the same rows in the same order.

    `base` and `teacher` are negative log-likelihoods in nats, each summed over a row's answer:
    the base without the prompt, the teacher with it. `tokens` are those of the answer as the
    student says it, `groups` are resampled together.
    """

    groups: Sequence[str]
    tokens: Sequence[int]
    base: Sequence[float]
    teacher: Sequence[float]


@dataclass(frozen=True)
class TeacherAnswer:
    """One answer of the teacher, as two conversations that end with it.

    `taught` is the prompt, the query and what the teacher said; `learned` what the student sees of
    the query, and is to say. Each has its tools, as JSON text. Its end counts as something said
    where the teacher `ended` it, and nothing else did.
    """

    group: str
    taught: "Sequence[Message]"
    learned: "Sequence[Message]"
    taught_tools: str | None = None
    learned_tools: str | None = None
    ended: bool = True

    @classmethod
    def to(
        cls,
        recipe: "Recipe",
        row: "Mapping[str, Any]",
        said: str,
        response: str,
        *,
        stop_reason: str = "stop",
    ) -> Self:
        """What was said to a row's query, and what the student is to say.

        What a stop text cut off may have gone on, whatever the model would have said.
        """
        ended = stop_reason == "stop" and not recipe.stop_texts
        query = row["query"]
        part = recipe.part(query)[0]
        calls = part.tools is not None
        asked, seen = recipe.messages(query), recipe.student_messages(query)
        taught = [*asked, assistant_message(said, calls=calls, after=asked)]
        learned = [*seen, assistant_message(response, calls=calls, after=seen)]
        return cls(row["group"], taught, learned, part.tools_text, part.student_tools, ended)


def reference_likelihoods(
    answers: Sequence[TeacherAnswer],
    *,
    base: "Connection",
    teacher: "Connection",
    meters: "Meters | None" = None,
) -> ReferenceLikelihoods:
    """Ask both how likely they find the teacher's answers; costs two requests an answer.

    Where a recipe rewrites what the teacher says, the teacher is asked about its own words: it
    gives the answer at least that likelihood. `meters` count what "base" and "teacher" are asked;
    raises `BudgetReached` before the first request that one has no room for.
    """
    without = _likelihoods("base", base, _learned(answers), meters)
    asked = [Judged(one.taught, one.taught_tools, one.ended) for one in answers]
    taught = _likelihoods("teacher", teacher, asked, meters)
    return ReferenceLikelihoods(
        groups=[one.group for one in answers],
        tokens=[one.tokens for one in without],
        base=[one.nats for one in without],
        teacher=[one.nats for one in taught],
    )


def _likelihoods(
    system: str, model: "Connection", asked: Sequence[Judged], meters: "Meters | None"
) -> list[Likelihood]:
    meter = (meters or {}).get(system)
    spend = partial(meter.read, model.identity) if meter else None
    return likelihoods(model, asked, title=f"{system}'s likelihood", spend=spend)


def _learned(answers: Sequence[TeacherAnswer]) -> list[Judged]:
    return [Judged(one.learned, one.learned_tools, one.ended) for one in answers]


def measure_internalisation(
    answers: Sequence[TeacherAnswer],
    connections: "Mapping[str, Connection]",
    meters: "Meters | None" = None,
) -> dict[str, Any]:
    """The score of `connections` "student" between "base" and "teacher", with its interval.

    Besides, every system's nats a response token; costs three requests an answer, which `meters`
    count by the systems' names. Where a score would say nothing, `why` stands in its place.
    """
    base, teacher = connections["base"], connections["teacher"]
    ends = reference_likelihoods(answers, base=base, teacher=teacher, meters=meters)
    found = _likelihoods("student", connections["student"], _learned(answers), meters)
    student = [one.nats for one in found]
    systems = {"base": ends.base, "teacher": ends.teacher, "student": student}
    nats = {name: per_token(nats, ends) for name, nats in systems.items()}
    return {"rows": len(answers), "nats_per_token": nats, **_scored(student, ends)}


def _scored(student: Sequence[float], ends: ReferenceLikelihoods) -> dict[str, Any]:
    """The score and its interval, or why there is none."""
    if len(ends.tokens) < LEAST_ROWS:
        return {"why": f"it takes {LEAST_ROWS} answers of the teacher; found {len(ends.tokens)}."}
    base, teacher = per_token(ends.base, ends), per_token(ends.teacher, ends)
    if base - teacher < _HARDLY:
        return {
            "why": f"the prompt makes the teacher's answers hardly likelier: {base:.3f} nats a "
            f"token without it, {teacher:.3f} with it; expected {_HARDLY} between them."
        }
    return internalisation(student, ends).interval()


def internalisation(student: Sequence[float], ends: ReferenceLikelihoods) -> Bootstrap:
    """The score of a student's negative log-likelihoods, with its bootstrap over groups.

    Raises `DatasetError` for no answers, and where the prompt makes them no likelier than the
    base finds them: there is nothing to internalise.
    """
    nats = np.array([ends.base, student, ends.teacher], dtype=np.float64)
    tokens = np.asarray(ends.tokens, dtype=np.float64)
    if not tokens.sum() > 0:
        raise DatasetError("There are no answers to compute the internalisation score on.")
    base, _, teacher = nats.sum(axis=1) / tokens.sum()
    if not base - teacher > _LEAST:
        raise DatasetError(
            "The internalisation score is not defined: expected answers that the prompt makes "
            f"likelier; found {base:.4f} nats a token without it, and {teacher:.4f} with it."
        )
    draws = [_score(weights, nats) for weights in resamples(ends.groups, _RESAMPLES)]
    whole = np.ones((1, len(tokens)))
    return Bootstrap(float(_score(whole, nats)[0]), np.concatenate(draws))


def per_token(nats: Sequence[float], ends: ReferenceLikelihoods) -> float:
    """A system's mean negative log-likelihood, in nats a response token."""
    return float(np.sum(nats) / np.sum(ends.tokens))


def _score(weights: Floats, nats: Floats) -> Floats:
    base, student, teacher = (weights @ nats.T).T
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((base - student) / (base - teacher))

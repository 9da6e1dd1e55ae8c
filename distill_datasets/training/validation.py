"""What is measured on the validation rows while training, to choose the best checkpoint by.

The loss, accuracy, and internalisation, whose two ends (how likely base and teacher find the
teacher's answers) are measured once; and what the student answers to a few of the queries.

Internalisation is how much of the prompt is in the weights: one number from likelihoods, with no
judge. (NLL_base - NLL_student) / (NLL_base - NLL_teacher), per response token, over the teacher's
own answers: 0 is the base without the prompt, 1 the teacher with it. Nothing is clipped.
"""

import asyncio
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from distill_datasets.conversations import (
    PYTHON_WORDS,
    Call,
    Conversation,
    assistant_message,
    calls_text,
    plain_value,
    read_calls,
    response_text,
    split_calls,
)
from distill_datasets.errors import (
    DatasetError,
    DistillError,
    HubError,
    ModelError,
    RecipeError,
    ServiceError,
    SettingsError,
)
from distill_datasets.files import read_object, write_file
from distill_datasets.generation.ledger import LEDGER
from distill_datasets.models.sampler import Sample, Sampling, digest
from distill_datasets.models.scoring import Judged, Likelihood, likelihoods, split_conversation
from distill_datasets.progress import amount_text
from distill_datasets.schema import Message
from distill_datasets.statistics import Bootstrap, Floats, resamples
from distill_datasets.tables import one_line
from distill_datasets.training import tell
from distill_datasets.training.data import Example, Rendered, cache_folder, sample_places
from distill_datasets.training.schedule import ValidationPlan
from distill_datasets.training.settings import VALIDATION_LOSS

if TYPE_CHECKING:
    from distill_datasets.generation.pricing import Meter
    from distill_datasets.models.tinker import Connection
    from distill_datasets.recipes.recipe import Recipe
    from distill_datasets.training.objectives import TrainingTask
    from distill_datasets.training.student import Saved, Student, Submitted

    Meters = Mapping[str, Meter | None]  # by the names of systems; None for one without a price

_SLACK = 8  # tokens that an answer may be longer than the longest response, to be seen as other
_AT_ONCE = 256  # requests
_LONGEST_ANSWER = 512  # tokens that are sampled to see how an answer goes on
_ROWS_READ = 1_000  # training rows whose responses tell labels from free text
_FEW_ENDS = 4  # responses that end, before answers that don't are counted
_REPEATS = 3  # times that the end of a text stands in a row where it is a loop
_SHORTEST_LOOP = 8  # characters
_SHOWN, _LINE = 2, 60  # answers that are printed, and characters of each and of its query
_FILE = "bounds.json"  # in the training's folder, so that a rerun asks nobody
_VERSION = 2  # of what is cached: raise it when the likelihoods come out differently
T = TypeVar("T")
_COLUMNS = ("query", "sample", "response", "group")
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
    seen = [Judged(one.learned, one.learned_tools, one.ended) for one in answers]
    without = _likelihoods("base", base, seen, meters)
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
    seen = [Judged(one.learned, one.learned_tools, one.ended) for one in answers]
    student = [one.nats for one in _likelihoods("student", connections["student"], seen, meters)]
    systems = {"base": ends.base, "teacher": ends.teacher, "student": student}
    nats = {name: per_token(nats, ends) for name, nats in systems.items()}
    found = {"rows": len(answers), "nats_per_token": nats}
    if len(answers) < LEAST_ROWS:
        why = f"it takes {LEAST_ROWS} answers of the teacher; found {len(answers)}."
        return found | {"why": why}
    if nats["base"] - nats["teacher"] < _HARDLY:
        return found | {
            "why": f"the prompt makes the teacher's answers hardly likelier: {nats['base']:.3f} "
            f"nats a token without it, {nats['teacher']:.3f} with it; expected {_HARDLY} between "
            "them."
        }
    return found | internalisation(student, ends).interval()


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

    def score(weights: Floats) -> Floats:
        base, student, teacher = (weights @ nats.T).T
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray((base - student) / (base - teacher))

    draws = [score(weights) for weights in resamples(ends.groups, _RESAMPLES)]
    return Bootstrap(float(score(np.ones((1, len(tokens))))[0]), np.concatenate(draws))


def per_token(nats: Sequence[float], ends: ReferenceLikelihoods) -> float:
    """A system's mean negative log-likelihood, in nats a response token."""
    return float(np.sum(nats) / np.sum(ends.tokens))


class PendingScores(Protocol):
    """Numbers that are being computed, by name; one that ends in "loss" is better when lower."""

    def result(self) -> Mapping[str, float]:
        """Wait for them."""
        ...


class Validator(Protocol):
    """Measures the student as the steps submitted so far leave it."""

    def submit(self, student: "Student", save: "Submitted[Saved] | None") -> PendingScores:
        """Begin; `save` is of the same weights, for what must sample from them, and None for the
        student before its first step. A `Future` is not waited for before the next steps.
        """
        ...


class LossValidator:
    """The loss per response token, in nats."""

    def __init__(
        self, rows: Rendered, batch_size: int, ends: ReferenceLikelihoods | None = None
    ) -> None:
        """Measured in batches of that many rows; with `ends`, also as internalisation."""
        self._batches = list(rows.batches(batch_size))
        self._bytes = sum(one.bytes for batch in self._batches for one in batch)
        self._ends = ends

    def submit(self, student: "Student", save: "Submitted[Saved] | None") -> PendingScores:
        """Queued behind the steps."""
        from distill_datasets.training.student import Submitted, datums, response_logprobs

        pending = student.logprobs([datums(batch, "token") for batch in self._batches])
        rows = [one for batch in self._batches for one in batch]
        return Submitted(lambda: self._scores(response_logprobs(rows, pending.result())))

    def _scores(self, said: Sequence[NDArray[np.float64]]) -> Mapping[str, float]:
        from distill_datasets.training.student import bits_per_byte

        tokens = sum(map(len, said))
        loss = -sum(float(one.sum()) for one in said) / tokens
        bits = bits_per_byte(loss, tokens, self._bytes)
        found = {VALIDATION_LOSS: loss} | ({"validation_bits_per_byte": bits} if bits else {})
        if self._ends is None:
            return found
        # Of as many tokens as were judged: an end that isn't the teacher's is a response's last.
        judged = zip(said, self._ends.tokens, strict=True)
        nats = [-float(one[:count].sum()) for one, count in judged]
        interval = internalisation(nats, self._ends).interval()
        names = {"value": "", "low": "_low", "high": "_high"}
        return found | {f"internalisation{names[name]}": one for name, one in interval.items()}


class _SamplingValidator(ABC):
    """Samples an answer to each of the conversations `_asked`, in place of its last message."""

    _asked: Sequence[tuple[Conversation, Sampling]]

    def submit(
        self, student: "Student", save: "Submitted[Saved] | None"
    ) -> "Future[Mapping[str, float]]":
        """Samples beside the training that goes on; without a `save`, the untrained student."""
        # A thread of its own, which nobody has to end.
        pool = ThreadPoolExecutor(1, thread_name_prefix="answers")
        try:
            return pool.submit(self._score, student, save)
        finally:
            pool.shutdown(wait=False)

    @abstractmethod
    def _score(self, student: "Student", save: "Submitted[Saved] | None") -> Mapping[str, float]:
        """What the answers show."""

    def _answers(self, student: "Student", save: "Submitted[Saved] | None") -> list[Sample]:
        path = save.result().sampler if save else student.connection.model_path
        if save and path is None:
            raise ValueError("expected a save for sampling; found a state only")
        sampler = student.sampler(path)

        async def answers() -> list[Sample]:
            gate = asyncio.Semaphore(_AT_ONCE)

            async def answer(conversation: Conversation, sampling: Sampling) -> Sample:
                options = replace(sampling, tools=conversation.tools)
                async with gate:
                    return (await sampler.sample(conversation.messages[:-1], options)).samples[0]

            return await asyncio.gather(*(answer(*one) for one in self._asked))

        return asyncio.run(answers())


class AccuracyValidator(_SamplingValidator):
    """The share of rows whose greedy answer is the row's response, to the letter.

    Of several turns that is the last one; calls of tools are equal in any order.
    """

    def __init__(self, rows: Rendered) -> None:
        """Asks for no more tokens than the longest response needs."""
        places = range(len(rows))
        longest = max(int((one.targets > 0).sum()) for one in rows.examples(places))
        sampling = Sampling(temperature=0.0, max_tokens=longest + _SLACK)
        self._asked = [(one, sampling) for one in rows.conversations(places)]

    def _score(self, student: "Student", save: "Submitted[Saved] | None") -> Mapping[str, float]:
        said = self._answers(student, save)
        found = [
            is_response(answer.text, one.messages[-1], typed=one.tools is not None)
            for answer, (one, _) in zip(said, self._asked, strict=True)
        ]
        return {"accuracy": sum(found) / len(found)}


class AnswerValidator(_SamplingValidator):
    """Answers a few of the validation queries, so that a collapse of the answers is seen.

    Samples as the release's teacher was sampled, else greedily, up to somewhat more tokens than
    the longest of these responses has. Lines on standard error show some of it; where the server
    can't sample, one says so, and there are no numbers.
    """

    def __init__(self, task: "TrainingTask", rows: Rendered, count: int) -> None:
        """Chooses so many rows, always the same ones of equal splits."""
        connection = task.student.connection
        places = sample_places(len(rows), count)
        conversations = rows.conversations(places)
        responses = [response_text(one.messages[-1]) for one in conversations]
        tokens = [
            len(connection.tokenizer.encode(text, add_special_tokens=False)) + 1
            for text in responses
        ]
        longest = min(_LONGEST_ANSWER, max(tokens) + max(2 * _SLACK, max(tokens) // 2))
        read = rows.rows[[rows.kept[place] for place in places]]["longest"]
        context = connection.max_context or max(read) + longest
        sampling = _sampling(task)
        self._asked: list[tuple[Conversation, Sampling]] = []
        self._teacher: list[Sample] = []
        for one, text, own, whole in zip(conversations, responses, tokens, read, strict=True):
            limit = max(1, min(longest, context - whole + own))
            self._asked.append((one, replace(sampling, max_tokens=limit)))
            self._teacher.append(Sample(text, "stop" if own <= limit else "length", own))
        self._once = _said_once(task.rows, rows, places)

    def _score(self, student: "Student", save: "Submitted[Saved] | None") -> Mapping[str, float]:
        import tinker

        try:
            said = self._answers(student, save)
        except (DistillError, tinker.TinkerError) as error:
            tell(f"the student's answers can't be sampled: {error}")
            return {}
        scores = compare_answers(said, self._teacher, self._once)
        found = {name: f"{value:.0f}" for name, value in scores.items()}
        lines = [
            f"{found['answers_distinct']} of {found['answers']} answers differ (the teacher's: "
            f"{found['teacher_distinct']}), {scores['answers_ended']:.0%} end (the teacher's: "
            f"{scores['teacher_ended']:.0%}), {found['answers_tokens']} tokens (the teacher's: "
            f"{found['teacher_tokens']})"
        ]
        for (one, _), answer in zip(self._asked[:_SHOWN], said[:_SHOWN], strict=True):
            query, text = (_plain(part) for part in (one.messages[-2]["content"], answer.text))
            lines.append(f"  {query!r} -> {text!r}")
        name = save.result().name if save else "untrained"
        tell(*(f"{name}: {line}" for line in lines))
        return scores


def _plain(text: str) -> str:
    return one_line("".join(one if one.isprintable() else " " for one in text), _LINE)


def _sampling(task: "TrainingTask") -> Sampling:
    """As the release's teacher was sampled, as far as its manifest says; else greedily."""
    told = task.source.manifest.get("sampling")
    told = told if isinstance(told, Mapping) else {}
    numbers = {name: told.get(name) for name in ("temperature", "top_p", "top_k")}
    known: dict[str, Any] = {n: one for n, one in numbers.items() if isinstance(one, int | float)}
    stop = told.get("stop")
    if isinstance(stop, list) and all(isinstance(one, str) and one for one in stop):
        known["stop"] = tuple(stop)
    return replace(Sampling(temperature=0.0, seed=task.settings.seed), **known)


def _said_once(train: Rendered, rows: Rendered, places: Sequence[int]) -> float:
    """The share of the responses at these places that no other row has: none of a few labels."""

    def response(example: Example) -> tuple[int, ...]:
        pairs = zip(example.tokens, example.weights, strict=True)
        return tuple(token for token, weight in pairs if weight)

    others = train.examples(range(min(len(train), _ROWS_READ)))
    counts = Counter(map(response, [*others, *rows.examples(range(len(rows)))]))
    once = [counts[response(one)] == 1 for one in rows.examples(places)]
    return sum(once) / len(once)


def compare_answers(
    student: Sequence[Sample], teacher: Sequence[Sample], once: float
) -> dict[str, float]:
    """Answers of a student beside the teacher's to the same queries, as numbers.

    `answers_distinct` counts different ones; `_ended`, `_empty`, `_looping` and `_unending` are
    shares, the last two of the queries whose answer the teacher ended; `_tokens` is a mean.
    `once` is the share of the teacher's that no other row has.
    """
    pairs = list(zip(student, teacher, strict=True))
    ending = [s for s, t in pairs if t.stop_reason == "stop" and not is_loop(t.text)]
    running = [one for one in ending if one.stop_reason != "stop"]
    speaking = [s for s, t in pairs if t.text.strip()]
    empty = [one for one in speaking if not one.text.strip() and not one.reasoning]
    few = len(ending) < _FEW_ENDS
    said = {"answers": student, "teacher": teacher}
    found: dict[str, float] = {"answers": len(student)}
    for name, samples in said.items():
        found[f"{name}_distinct"] = len({one.text.strip() for one in samples})
        ended = sum(one.stop_reason == "stop" for one in samples)
        found[f"{name}_ended"] = ended / len(samples)
        found[f"{name}_tokens"] = sum(one.tokens or 0 for one in samples) / len(samples)
    commonest = Counter(one.text.strip() for one in teacher).most_common(1)[0][1]
    return found | {
        "answers_empty": len(empty) / len(speaking) if speaking else 0.0,
        "answers_unending": 0.0 if few else len(running) / len(ending),
        "answers_looping": 0.0 if few else sum(is_loop(s.text) for s in running) / len(ending),
        "teacher_commonest": commonest / len(teacher),
        "teacher_once": once,
    }


def is_loop(text: str) -> bool:
    """Whether at least half of a text is one piece of it again and again, to the end."""
    size = len(text)
    for period in range(1, size // _REPEATS + 1):
        place = size - 1
        while place >= period and text[place] == text[place - period]:
            place -= 1
        # What repeats begins a period before the first place that equals the one before it.
        if size - 1 - place + period >= max(size / 2, _REPEATS * period, _SHORTEST_LOOP):
            return True
    return False


def is_response(text: str, response: Message, *, typed: bool) -> bool:
    """Whether a text is a response: its words, and its calls in any order.

    Where the tools' schemas weren't there, calls aren't `typed`: 5 may be "5" in the chat format.
    """
    wanted = response.get("tool_calls")
    if not wanted:
        return text.strip() == response["content"].strip()
    try:
        words, calls = split_calls(text)
    except ValueError:
        return False
    found = read_calls(wanted)
    if not typed:
        calls, found = list(map(_untyped, calls)), list(map(_untyped, found))
    return (words, calls_text(calls)) == (response["content"].strip(), calls_text(found))


def _untyped(call: Call) -> Call:
    """A call whose texts are read as the JSON, or Python's words, that they may be."""
    values = {
        name: PYTHON_WORDS.get(one, plain_value(one)) if isinstance(one, str) else one
        for name, one in call.arguments.items()
    }
    return Call(call.name, values)


def open_validators(
    task: "TrainingTask", rows: Rendered | None, plan: ValidationPlan | None
) -> list[Validator]:
    """Everything that is measured on the validation rows, nothing without any: the loss, and then
    what samples answers. Says what that costs, as a share of the training.

    Raises `SettingsError` where the best checkpoint is to be chosen by what can't be measured.
    """
    if rows is None or plan is None:
        return []
    settings = task.settings
    ends = validation_likelihoods(task, rows) if settings.internalisation else None
    if ends is None and settings.select == "internalisation":
        raise SettingsError("select can't be internalisation here: there is no such score.")
    found: list[Validator] = [LossValidator(rows, settings.batch_size, ends)]
    if settings.select == "accuracy":
        found.append(AccuracyValidator(rows))
    answered = f", {plan.answered} queries are answered" if plan.answered else ""
    tell(
        f"after every {plan.every} steps {plan.rows} validation rows are measured"
        f"{answered}: in all about {plan.share:.0%} of the training's tokens"
    )
    if plan.answered:
        found.append(AnswerValidator(task, rows, plan.answered))
    return found


def validation_likelihoods(task: "TrainingTask", rows: Rendered) -> ReferenceLikelihoods | None:
    """How likely base and teacher find the teacher's answers to the validation rows.

    Its own words come from the release's ledger. None where there is no score: there are few rows,
    the dataset is no release or lacks what its teacher said, its teacher can't score, or the
    prompt changes nothing; a line on standard error says why.
    Costs two requests a row, which a line says before, and nothing in a folder where they were
    made, or where another training on this machine has asked the same models about the same
    answers.
    """
    from distill_datasets.training.objectives import read_teacher

    file = task.folder / _FILE
    if (known := _known(file)) and len(known.tokens) == len(rows):
        return known
    try:
        if len(rows) < LEAST_ROWS:
            raise DatasetError(
                f"it takes {LEAST_ROWS} validation rows, and {len(rows)} are measured."
            )
        released = read_teacher(task, (LEDGER,))
        if missing := sorted({*_COLUMNS} - {*rows.plain.column_names}):
            raise DatasetError(f"{released.where!r} lacks a release's columns {missing}.")
        kept = rows.plain.select_columns(list(_COLUMNS)).select(rows.kept)
        answers = [
            TeacherAnswer.to(released.recipe, row, text, row["response"])
            for row, text in zip(kept, released.texts(kept), strict=True)
        ]
        ends = _cached(task, answers, released.connect())
        internalisation(ends.base, ends)  # no score is defined between equal ends
    except (DatasetError, RecipeError, ModelError, ServiceError, HubError) as error:
        tell(f"no internalisation score: {error}")
        return None
    _write(file, ends)
    return ends


def _cached(
    task: "TrainingTask", answers: Sequence[TeacherAnswer], teacher: "Connection"
) -> ReferenceLikelihoods:
    base = task.student.connection
    asked = [_VERSION, base.identity, teacher.identity, *map(asdict, answers)]
    cached = cache_folder() / f"bounds-{digest(asked)[:32]}.json"
    if known := _known(cached):
        return known
    tell(_price(task, answers, teacher))
    ends = reference_likelihoods(answers, base=base, teacher=teacher)
    _write(cached, ends)
    return ends


def _price(task: "TrainingTask", answers: Sequence[TeacherAnswer], teacher: "Connection") -> str:
    """What the likelihoods will ask, as the first answer says, and the release of its teacher."""
    count, first = len(answers), answers[0]
    asked = (teacher, first.taught, first.taught_tools)
    seen = (task.student.connection, first.learned, first.learned_tools)
    tokens = count * sum(len(part) for one in (asked, seen) for part in split_conversation(*one))
    said = (
        f"the internalisation score asks base and teacher once about {count} answers: "
        f"{2 * count} requests, about {tokens:,} tokens"
    )
    cost, paid = task.source.manifest.get("cost"), task.source.manifest.get("ledger")
    if isinstance(cost, Mapping) and isinstance(paid, int) and paid > 0:
        amount, currency = cost.get("amount"), cost.get("currency")
        if isinstance(amount, int | float) and isinstance(currency, str):
            part = f"{amount_text(count * amount / paid)} {currency}"
            said += f"; the teacher's cost about {part}, at the price of the release's answers"
    return said


def _known(file: Path) -> ReferenceLikelihoods | None:
    """What was measured before; None where nothing was, or where the file is damaged."""
    try:
        return ReferenceLikelihoods(**(read_object(file) or {}))
    except TypeError:
        return None


def _write(file: Path, ends: ReferenceLikelihoods) -> None:
    write_file(file, json.dumps(asdict(ends)) + "\n")

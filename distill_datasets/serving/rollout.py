"""A rollout: how much of the traffic a student gets, and the evidence that moves it between stages.

Evidence is looked at after every answer, so its intervals are confidence sequences, which hold
however often one looks. A stage begins without evidence.

A run's folder `rollout` holds it:

state.json     the stage and its evidence, written all at once
moves.jsonl    a line a change of stage, with the evidence that it stands on
texts.jsonl    with `keep_texts`, queries on which student and teacher disagree; nothing else
               keeps what anybody said
"""

import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from math import log, pi, sqrt
from pathlib import Path
from typing import Any

from distill_datasets.conversations import to_text
from distill_datasets.errors import DatasetError, OutputError, SettingsError
from distill_datasets.evaluation.gate import ODD_PATTERNS, GateRules
from distill_datasets.evaluation.metrics import chrf
from distill_datasets.files import (
    read_report,
    read_rows,
    report_file,
    rows_file,
    writable_folder,
    write_file,
)
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.schema import Message
from distill_datasets.serving.protocol import Exchange
from distill_datasets.serving.settings import RolloutSettings
from distill_datasets.statistics import LEVEL, confidence_sequence, excludes, rows_to_tell

OFF = "off"
FAILED, UNANSWERED = "failed", "unanswered"
_LAST, _MOST_LABELS = 500, 100  # answers
_MOST_FAILED = 0.05  # requests to the student
_LEAST_APART = 0.005  # of disagreement before drift and with it
_DRIFT = log(10_000)  # so many answers lie between two false alarms, on average at least (Lorden)
STATE, MOVES, TEXTS = "state.json", "moves.jsonl", "texts.jsonl"
_SAVE_SECONDS = 5.0
_MOST_TEXTS = 100_000_000  # bytes of texts.jsonl


@dataclass(frozen=True)
class Stage:
    """The share of the traffic that a student gets, and of that what its teacher answers too."""

    name: str
    share: float
    shadow: float

    def __post_init__(self) -> None:
        """Raises `SettingsError` for what is no share."""
        if not (0 <= self.share <= 1 and 0 <= self.shadow <= 1):
            raise SettingsError(f"The shares of a stage lie from 0 to 1; found {self}.")


STAGES = (
    Stage(OFF, 0.0, 0.0),
    Stage("alpha", 0.01, 1.0),
    Stage("beta", 0.1, 0.5),
    Stage("rollout", 0.5, 0.1),
    Stage("production", 1.0, 0.02),
)


@dataclass(frozen=True)
class StageRules:
    """What a student keeps to: the least agreement with its teacher, and shares of odd answers.

    `expected` is the agreement on held-out rows: drift is told from it.
    """

    expected: float
    least: float
    limits: Mapping[str, float]

    @classmethod
    def of(cls, expected: float, answered: float, rules: GateRules) -> "StageRules":
        """A gate's rules for live traffic; `answered` is the share of held-out rows with an answer.

        Raises `SettingsError` where the gate has no rule on quality.
        """
        if rules.quality_drop is None:
            raise SettingsError("A rollout needs the rule quality_drop: set it in the gate's file.")
        limits = {name: getattr(rules, name) for name in ODD_PATTERNS}
        if rules.answered_drop is not None:
            limits[UNANSWERED] = min(1.0, 1 - answered + rules.answered_drop)
        limits = {name: limit for name, limit in limits.items() if limit is not None}
        least = max(0.0, expected - rules.quality_drop)
        return cls(expected, least, {**limits, FAILED: _MOST_FAILED})

    def promised(self, worse: float) -> tuple[int | None, int | None]:
        """About how many shadowed answers promote a student as good as on held-out rows, and how
        many roll back one that agrees in the share `worse` only.
        """
        return rows_to_tell(self.expected, self.least), rows_to_tell(worse, self.least)


@dataclass
class Evidence:
    """What was counted in a stage: answers, odd ones by their rules, and agreement of shadowed."""

    requests: int = 0
    answers: int = 0
    odd: dict[str, int] = field(default_factory=dict)
    shadowed: int = 0
    agreement: float = 0.0
    drift: float = 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Between which agreements the true one lies."""
        return confidence_sequence(self.agreement, self.shadowed, LEVEL)

    def count_answer(self, said: Mapping[str, Any], answered: bool) -> None:
        """Take one of the student's answers into account, as a gate would."""
        self.answers += 1
        hits = [name for name, odd in ODD_PATTERNS.items() if odd(said)]
        self._count(*hits, *([] if answered else [UNANSWERED]))

    def count_failed(self) -> None:
        """Take a request into account that the student did not answer."""
        self._count(FAILED)

    def _count(self, *odd: str) -> None:
        self.requests += 1
        for name in odd:
            self.odd[name] = self.odd.get(name, 0) + 1

    def count_shadowed(self, score: float, rules: StageRules) -> None:
        """Take an answer's agreement, from 0 to 1, into account; drift by a CUSUM of it (Page)."""
        self.shadowed += 1
        self.agreement += score
        before = min(max(1 - rules.expected, _LEAST_APART), 1 - _LEAST_APART)
        after = min(max(1 - rules.least, before + _LEAST_APART), 1 - _LEAST_APART / 2)
        apart, alike = log(after / before), log((1 - after) / (1 - before))
        self.drift = max(0.0, self.drift + (1 - score) * apart + score * alike)


class Usual:
    """How a student's last answers differ from those on held-out rows: by labels, and by length."""

    def __init__(self, answers: Sequence[str | None], lengths: Sequence[int]) -> None:
        """`answers` of a closed set, and the characters of each text, on held-out rows."""
        shares = Counter(answers)
        few = len(shares) <= _MOST_LABELS
        self._shares = {one: n / len(answers) for one, n in shares.items()} if few else {}
        self._length = sum(lengths) / len(lengths) if lengths else 0.0
        self._last: deque[tuple[str | None, int]] = deque(maxlen=_LAST)

    def add(self, answer: str | None, length: int) -> None:
        """Take an answer into account; nothing of it is written anywhere."""
        self._last.append((answer, length))

    @property
    def labels(self) -> tuple[float, float] | None:
        """The total variation between the labels' shares now and then, and about what chance alone
        makes of it; None for texts, and before any answer.
        """
        if not (self._shares and self._last):
            return None
        n, now = len(self._last), Counter(answer for answer, _ in self._last)
        names = {*now, *self._shares}
        apart = sum(abs(now[one] / n - self._shares.get(one, 0.0)) for one in names) / 2
        spread = sum(sqrt(share * (1 - share) / n) for share in self._shares.values())
        return apart, sqrt(2 / pi) * spread / 2

    @property
    def length_ratio(self) -> float | None:
        """How long answers are now, by how long they were; None before any."""
        if not (self._last and self._length):
            return None
        return sum(length for _, length in self._last) / len(self._last) / self._length


@dataclass(frozen=True)
class Move:
    """A change of stage: where to, why, and the evidence that it stands on."""

    to: str
    why: str
    evidence: Mapping[str, Any]


def decide(
    stage: str, stages: Sequence[Stage], evidence: Evidence, rules: StageRules
) -> Move | None:
    """What the evidence of a stage says: off, the next stage, or None, which is to stay."""
    if stage == OFF:
        return None
    to, why = OFF, _broken(evidence, rules)
    names = [one.name for one in stages]
    coming = names[names.index(stage) + 1 :]
    if why is None and coming and _above(evidence.agreement, evidence.shadowed, rules.least):
        low, _ = evidence.interval
        to, why = coming[0], f"agreement is at least {low:.3f}, and {rules.least:.3f} is enough"
    if why is None:
        return None
    return Move(to, why, {**asdict(evidence), "interval": evidence.interval})


def _broken(evidence: Evidence, rules: StageRules) -> str | None:
    """Which rule the student breaks, in words."""
    if _above(evidence.shadowed - evidence.agreement, evidence.shadowed, 1 - rules.least):
        _, high = evidence.interval
        return f"agreement is at most {high:.3f}, and {rules.least:.3f} is the least"
    if evidence.drift > _DRIFT:
        mean = evidence.agreement / evidence.shadowed
        return f"agreement fell: it is {mean:.3f} in this stage, and lower in its last answers"
    for name, limit in rules.limits.items():
        of = evidence.requests if name == FAILED else evidence.answers
        count = min(evidence.odd.get(name, 0), of)
        if _above(count, of, limit):
            low, _ = confidence_sequence(count, of)
            return f"{name.replace('_', ' ')}: at least {low:.3f} of {of:,}, at most {limit:g}"
    return None


def _above(total: float, n: int, limit: float) -> bool:
    """Whether numbers show that their mean lies above a limit."""
    return n > 0 and total > limit * n and excludes(total, n, limit, LEVEL)


def by_name(name: str, stages: Sequence[Stage]) -> Stage:
    """A stage; raises `SettingsError` that says which there are."""
    known = {one.name: one for one in stages}
    if name not in known:
        raise SettingsError(f"There is no stage {name!r}: expected {', '.join(known)}.")
    return known[name]


@dataclass(frozen=True)
class Judgement:
    """Reads what student and teacher say as the recipe does, and scores how alike it is.

    Free text is as alike as its chrF; any other answer is the same or it isn't. `usual` is what the
    student said on held-out rows.
    """

    recipe: Recipe
    free_text: bool
    usual: Usual = field(default_factory=lambda: Usual([], []))

    def answer(self, messages: Sequence[Message], said: Exchange, *, student: bool) -> str | None:
        """The answer in a text; None where there is none."""
        part, _ = self.recipe.part(to_text(messages))
        reader = part.student_reader if student else part.teacher_reader
        return reader.read(said.text, said.stop_reason).answer

    def score(self, messages: Sequence[Message], student: Exchange, teacher: Exchange) -> float:
        """From 0 to 1."""
        if self.free_text:
            return chrf(student.text, teacher.text)
        mine = self.answer(messages, student, student=True)
        return float(mine is not None and mine == self.answer(messages, teacher, student=False))


def read_run(run: Path) -> tuple[Recipe, Mapping[str, Any]]:
    """The recipe in a run's release, and its report; raises `DatasetError` without either."""
    release = run / "release"
    if not (release / "recipe" / "prompt.md").is_file():
        raise DatasetError(
            f"{str(run)!r} has no release with a prompt: expected the folder that `run` wrote."
        )
    return load_recipe(release / "recipe", trust=True), read_report(run)


class RolloutState:
    """Decides who answers, counts what comes of it, and moves between stages."""

    def __init__(
        self,
        run: Path,
        judgement: Judgement,
        rules: StageRules,
        stages: Sequence[Stage] = (),
        *,
        automatic: bool = True,
        keep_texts: bool = False,
    ) -> None:
        """Goes on where the folder's state says, through its stages unless others are given; else
        at the first stage with any traffic.
        """
        self.folder = writable_folder(run / "rollout")
        self.judgement, self.rules = judgement, rules
        self.automatic, self.keep_texts = automatic, keep_texts
        known = _read_state(self.folder / STATE)
        self.stages = tuple(stages or known.get("stages") or STAGES)
        self.stage = by_name(known.get("stage", self.stages[1].name), self.stages)
        self.evidence: Evidence = known.get("evidence", Evidence())
        self.spent, self._saved = float(known.get("spent", 0.0)), 0.0

    @classmethod
    def of(cls, run: Path, settings: RolloutSettings) -> "RolloutState":
        """That of a run, by what its report says of held-out rows, as far as that was kept."""
        recipe, report = read_run(run)
        free_text, student = bool(report.get("free_text")), report["systems"]["student"]
        metrics, measured = student.get("metrics", {}), student.get("metrics", {}).get("agreement")
        if free_text:
            measured = report.get("texts", {}).get("student", {}).get("teacher", {}).get("chrf")
        if not measured:
            raise DatasetError("The report says nothing of the student's agreement: measure again.")
        answered = float(metrics.get("answered", {}).get("value", 1.0))
        gate = GateRules.load(settings.rules) if settings.rules else GateRules()
        rules = StageRules.of(float(measured["value"]), answered, gate)
        file, said = report_file(run), []
        if rows_file(file).is_file():
            said = [one for row in read_rows(file) if (one := row["systems"].get("student"))]
        usual = Usual([one["answer"] for one in said], [len(one["text"] or "") for one in said])
        stages = parse_stages(settings.stages) if settings.stages else ()
        kept = {"automatic": not settings.manual, "keep_texts": settings.keep_texts}
        return cls(run, Judgement(recipe, free_text, usual), rules, stages, **kept)

    def takes(self, key: str) -> bool:
        """Whether the student answers who has this key: the same at every time of a stage, and
        still so where the share rises.
        """
        return fraction(f"traffic {key}") < self.stage.share

    def shadows(self, key: str) -> bool:
        """Whether the teacher answers beside the student."""
        return fraction(f"shadow {key}") < self.stage.shadow

    def count_answer(self, messages: Sequence[Message], said: Exchange) -> None:
        """Take what the student said into account."""
        answer = self.judgement.answer(messages, said, student=True)
        self.judgement.usual.add(answer, len(said.text))
        text = {"text": said.text, "stop_reason": said.stop_reason}
        self.evidence.count_answer(text, answer is not None)
        self._look()

    def count_failed(self) -> None:
        """Take a request into account that the student did not answer."""
        self.evidence.count_failed()
        self._look()

    def count_shadowed(
        self, messages: Sequence[Message], student: Exchange, teacher: Exchange
    ) -> float:
        """Take an answer and its teacher's into account; how alike they are."""
        score = self.judgement.score(messages, student, teacher)
        self.evidence.count_shadowed(score, self.rules)
        if score < 1 and not self.judgement.free_text:
            self.keep_query(messages, "disagreement")
        self._look()
        return score

    def keep_query(self, messages: Sequence[Message], why: str) -> None:
        """Keep a query for the dataset's next version, where texts may be kept."""
        file = self.folder / TEXTS
        if self.keep_texts and not (file.is_file() and file.stat().st_size > _MOST_TEXTS):
            _append_line(file, {"messages": list(messages), "why": why})

    def _look(self) -> None:
        move = decide(self.stage.name, self.stages, self.evidence, self.rules)
        # By hand, only what is broken moves by itself: back.
        if move is not None and (self.automatic or move.to == OFF):
            self.move(move)
        elif time.monotonic() - self._saved > _SAVE_SECONDS:
            self.save()

    def move(self, move: Move) -> None:
        """Change the stage; the line that says why is on disk before the state is."""
        target = by_name(move.to, self.stages)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"at": at, "from": self.stage.name, **asdict(move)}
        _append_line(self.folder / MOVES, line)
        self.stage, self.evidence = target, Evidence()
        self.save()
        print(f"rollout: {line['from']} -> {move.to}: {move.why}", file=sys.stderr)

    def save(self) -> None:
        """Write the state."""
        self._saved = time.monotonic()
        state = {
            "stage": self.stage.name,
            "stages": [asdict(one) for one in self.stages],
            "evidence": asdict(self.evidence),
            "spent": self.spent,
        }
        write_file(self.folder / STATE, json.dumps(state, indent=2) + "\n")


def _read_state(file: Path) -> dict[str, Any]:
    """Empty before the first; raises `OutputError` for a damaged one."""
    if not file.is_file():
        return {}
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        evidence = Evidence(**state["evidence"])
        stages = [Stage(**one) for one in state.get("stages", ())]
        return {**state, "evidence": evidence, "stages": stages}
    except (ValueError, TypeError, KeyError) as error:
        raise OutputError(
            f"{str(file)!r} is damaged ({error!r}): delete it, and name the stage with --to."
        ) from error


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON; one that a crash cut is left out."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _append_line(file: Path, content: Mapping[str, Any]) -> None:
    """Add a line of JSON, on disk when this returns; one that a crash cut before it ends there."""
    with file.open("ab+") as lines:
        if lines.tell():
            lines.seek(-1, os.SEEK_END)
            cut = lines.read(1) != b"\n"
            lines.write(b"\n" if cut else b"")
        lines.write(json.dumps(content, ensure_ascii=False).encode() + b"\n")
        lines.flush()
        os.fsync(lines.fileno())


def harvest(run: Path, out: Path) -> int:
    """Write kept queries as a queries file of the recipe, each once; how many there are.

    Raises `DatasetError` where none was kept, `ScreeningError` where one holds a secret or
    personal data.
    """
    from distill_datasets.hub.screening import require_clean, screen

    folder, recipe = run / "rollout", read_run(run)[0]
    kept = folder / TEXTS
    if not kept.is_file():
        raise DatasetError(
            f"No queries were kept in {str(folder)!r}: start the rollout with --keep-texts."
        )
    rows: dict[str, dict[str, Any]] = {}
    for messages in (line["messages"] for line in read_lines(kept)):
        single = not recipe.holds_conversations and len(messages) == 1
        row = {"query": messages[0]["content"]} if single else {"messages": messages}
        rows[to_text(messages)] = row
    if out.exists():
        raise OutputError(f"{str(out)!r} is there already: name another file.")
    harvested = writable_folder(folder / "harvest")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
    write_file(harvested / "queries.jsonl", text)
    require_clean(screen(harvested))
    write_file(out, text)
    return len(rows)


def parse_stages(texts: Sequence[str]) -> tuple[Stage, ...]:
    """Stages as `name=share:shadow`, such as `alpha=0.01:1`; raises `SettingsError`."""
    found = [STAGES[0]]
    for text in texts:
        name, _, shares = text.partition("=")
        share, _, shadow = shares.partition(":")
        try:
            found.append(Stage(name, float(share), float(shadow or 1)))
        except ValueError as error:
            raise SettingsError(
                f"Expected a stage as name=share:shadow, such as alpha=0.01:1; found {text!r} "
                f"({error})."
            ) from error
    rising = sorted(found, key=lambda one: one.share)
    if len({one.name for one in found}) < len(found) or rising != found:
        raise SettingsError(f"Stages have names of their own and rising shares; found {texts}.")
    return tuple(found)


def fraction(text: str) -> float:
    """A number from 0 to 1 that follows from a text alone, evenly spread."""
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()) / 2**64

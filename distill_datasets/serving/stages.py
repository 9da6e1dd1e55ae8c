"""How much of the traffic a student gets: stages, and the evidence that moves between them.

Evidence is looked at after every answer, so its intervals are confidence sequences, which hold
however often one looks. A stage begins without evidence.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import log, pi, sqrt
from typing import Any

from distill_datasets.errors import SettingsError
from distill_datasets.evaluation.gate import ODD_PATTERNS, GateRules
from distill_datasets.statistics import LEVEL, confidence_sequence, excludes, rows_to_tell

OFF = "off"
FAILED, UNANSWERED = "failed", "unanswered"
_LAST, _MOST_LABELS = 500, 100  # answers
_MOST_FAILED = 0.05  # requests to the student
_LEAST_APART = 0.005  # of disagreement before drift and with it
_DRIFT = log(10_000)  # so many answers lie between two false alarms, on average at least (Lorden)


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
        limits = {
            name: limit for name in ODD_PATTERNS if (limit := getattr(rules, name)) is not None
        }
        if rules.answered_drop is not None:
            limits[UNANSWERED] = min(1.0, 1 - answered + rules.answered_drop)
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

    def count_odd(self, said: Mapping[str, Any], answered: bool) -> None:
        """Take one of the student's answers into account, as a gate would."""
        self.answers += 1
        hits = [name for name, odd in ODD_PATTERNS.items() if odd(said)]
        for name in [*hits, *([] if answered else [UNANSWERED])]:
            self.odd[name] = self.odd.get(name, 0) + 1

    def count_failed(self) -> None:
        """Take a request into account that the student did not answer."""
        self.odd[FAILED] = self.odd.get(FAILED, 0) + 1

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
    for stage in stages:
        if stage.name == name:
            return stage
    raise SettingsError(
        f"There is no stage {name!r}: expected {', '.join(s.name for s in stages)}."
    )

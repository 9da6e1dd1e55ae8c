"""Whether a student may be deployed: rules over its report, for a model's continuous integration.

A rule fails where the evidence says so: where the whole interval of a number lies beyond its limit.
What a rule names and nobody measured fails too.
"""

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill_datasets.errors import GateError, SettingsError, nearest
from distill_datasets.evaluation.metrics import mean_of, ratio_of
from distill_datasets.files import (
    gate_file,
    read_report,
    read_rows,
    read_yaml,
    report_file,
    rows_file,
    write_file,
)
from distill_datasets.statistics import (
    Proportion,
    independent_difference,
    mean_difference,
    ratio_of_intervals,
    wilson,
)
from distill_datasets.tables import aligned, ends_text, html_card, html_table, interval_text

if TYPE_CHECKING:
    from pandas import DataFrame

PASSED, FAILED, UNSURE, MISSING = "passed", "FAILED", "unsure", "NOT MEASURED"
_LOWER_IS_BETTER = ("ece", "brier")
_ALWAYS = ("answered", "agreement")
_LARGEST = 2_000_000_000  # bytes of rows.jsonl
_TAIL = 1200  # characters in which a loop shows
_LONGEST_UNIT = 400
_SHORT_UNIT = 30  # characters, which must come five times and not three
_LEAST_LOOP = 30  # characters
_BROKEN = {"Cc", "Cs", "Co", "Cn"}  # control, half of a pair, private and unassigned characters

_Share = Annotated[float, Field(ge=0, le=1)] | None
_Limit = Annotated[float, Field(ge=0)] | None


class GateRules(BaseModel):
    """The limits; `cards/gate.yaml` says what each means. None is a rule that isn't looked at."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strict: bool = False
    metric: str | None = None
    quality_drop: _Share = 0.05
    check_drop: _Share = 0.05
    checks: Mapping[str, Annotated[float, Field(ge=0, le=1)]] = {}
    answered_drop: _Share = 0.05
    commonest_rise: _Share = 0.2
    empty: _Share = 0.01
    cut_off: _Share = 0.05
    loops: _Share = 0.01
    non_printing: _Share = 0.0
    response_ratio: _Limit = 2.0
    latency_ratio: _Limit = 1.5
    latency_p95_ms: _Limit = None
    judge_wins: _Share = 0.1
    judge_drop: _Share = 0.05
    residue: Literal["measured", "all"] | tuple[str, ...] = "measured"

    @classmethod
    def load(cls, path: Path | str) -> "GateRules":
        """Read a YAML file; raises `SettingsError` that names what is wrong in it."""
        fields = read_yaml(path, SettingsError, what="rules")
        if not isinstance(fields, Mapping):
            raise SettingsError(f"The rules {str(path)!r} hold no keys: {_expected()}")
        try:
            return cls(**{str(key): value for key, value in fields.items()})
        except ValidationError as error:
            raise SettingsError(_explained(error, path)) from error


@dataclass(frozen=True)
class GateFinding:
    """What was looked at, what came of it, and why in a sentence."""

    rule: str
    outcome: str
    said: str

    @property
    def bad(self) -> bool:
        """Whether the student fails by it."""
        return self.outcome in (FAILED, MISSING)


@dataclass(frozen=True)
class GateResult:
    """All that was looked at; `passed` where nothing of it fails."""

    run: str
    findings: Sequence[GateFinding]

    @property
    def passed(self) -> bool:
        """Whether no rule fails."""
        return not any(one.bad for one in self.findings)

    def text(self) -> str:
        """A line a rule."""
        return aligned([[one.outcome, one.rule, one.said] for one in self.findings])

    def to_pandas(self) -> "DataFrame":
        """A row a rule."""
        from pandas import DataFrame

        return DataFrame([vars(one) for one in self.findings])

    def _repr_html_(self) -> str:
        said = "passes" if self.passed else "does not pass"
        cells = [[one.outcome, one.rule, one.said] for one in self.findings]
        table = html_table(cells, ["outcome", "rule", "what was found"])
        return html_card(f"The student of {self.run} {said}", table)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        rules = [vars(one) for one in self.findings]
        return {"run": self.run, "passed": self.passed, "rules": rules}

    def keep(self) -> Path:
        """Write what was found beside the report, for its page; the file's path."""
        file = report_file(self.run)
        found = {"report": read_report(file).get("digest"), **self.to_json()}
        text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
        write_file(gate_file(file), text)
        return gate_file(file)

    def require(self) -> None:
        """Raise `GateError` with the reasons where a rule fails."""
        if self.passed:
            return
        reasons = [f"{one.rule}: {one.said}" for one in self.findings if one.bad]
        raise GateError(
            f"The student of {self.run!r} doesn't pass: {len(reasons)} of {len(self.findings)} "
            "rules fail.\n  " + "\n  ".join(reasons)
        )


def gate(
    run: Path | str,
    *,
    against: Path | str | None = None,
    rules: GateRules | Path | str | None = None,
) -> GateResult:
    """Look at a run's report by the rules, beside its teacher or `against` another run's student.

    Raises `DatasetError` where there is no report, and `SettingsError` for rules that can't be
    read. A rule that fails is a finding: see `GateResult.require`.

        gate("runs/support", against="runs/support-1").require()
    """
    known = GateRules.load(rules) if isinstance(rules, (str, Path)) else rules or GateRules()
    look = _Look(known, _Measured.read(run), _Measured.read(against) if against else None)
    return GateResult(str(run), [*look.findings()])


@dataclass(frozen=True)
class _Measured:
    """A run's report, and its rows by their ids; none where they aren't there, or are too many."""

    name: str
    report: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, run: Path | str) -> "_Measured":
        report, file = read_report(run), report_file(run)
        rows = rows_file(file)
        known = rows.is_file() and rows.stat().st_size <= _LARGEST
        found = {str(row["id"]): row for row in read_rows(file)} if known else {}
        return cls(str(run), report, found)

    @cached_property
    def groups(self) -> dict[str, str]:
        """Which rows are related, by their ids."""
        return {id_: str(row.get("group") or id_) for id_, row in self.rows.items()}

    def said(self, system: str) -> dict[str, Mapping[str, Any]]:
        """What a system said, by the rows' ids."""
        return {
            id_: row["systems"][system]
            for id_, row in self.rows.items()
            if system in row["systems"]
        }

    def metric(self, system: str, name: str) -> Mapping[str, float] | None:
        """A system's metric, with its interval where it has one."""
        if found := self.report["systems"][system].get("metrics", {}).get(name):
            return dict(found)
        texts = self.report.get("texts", {}).get(system, {})
        for target in ("teacher", "reference"):  # what texts are compared with
            if found := texts.get(target, {}).get(name):
                return dict(found)
        verdict = self.report.get("verdict") or {}
        value = verdict.get(system) if verdict.get("metric") == name else None
        return None if value is None else {"value": value}


@dataclass(frozen=True)
class _Look:
    """One student's numbers beside the other's, by the rules."""

    rules: GateRules
    mine: _Measured
    against: _Measured | None

    @cached_property
    def other(self) -> tuple[_Measured, str, str]:
        """Where the other was measured, as which system, and how it is called."""
        if self.against:
            return self.against, "student", f"the student of {self.against.name}"
        return self.mine, "teacher", "the teacher"

    def findings(self) -> Iterator[GateFinding]:
        """Every rule that is not None."""
        rules = self.rules
        if rules.quality_drop is not None:
            yield self._quality(rules.quality_drop)
        if rules.answered_drop is not None and self._measures("answered"):
            yield self._drop("answered", "answered", rules.answered_drop)
        if rules.check_drop is not None:
            yield from self._checks_beside_the_other(rules.check_drop)
        yield from (self._check(name, least) for name, least in rules.checks.items())
        yield from self._patterns()
        if rules.commonest_rise is not None:
            yield self._commonest(rules.commonest_rise)
        yield from self._ratios()
        yield from self._judge()
        yield from self._residue()

    def _measures(self, metric: str) -> bool:
        return self.mine.metric("student", metric) is not None

    @property
    def _metric(self) -> str | None:
        """The quality: what the rules name, or the verdict, or the report's first metric."""
        verdict = self.mine.report.get("verdict") or {}
        if decisive := self.rules.metric or verdict.get("metric"):
            return str(decisive)
        names = list(self.mine.report["systems"]["student"].get("metrics", {}))
        found = [name for name in names if name not in _ALWAYS] or [
            n for n in names if n == "agreement"
        ]
        return found[0] if found else None

    def _quality(self, most: float) -> GateFinding:
        name = self._metric
        if name is None or not self._measures(name):
            known = list(self.mine.report["systems"]["student"].get("metrics", {}))
            hint = nearest(name or "", known)
            said = f"the report has no metric {name!r}, only {known}.{hint}"
            return GateFinding("quality", MISSING, said)
        return self._drop("quality", name, most, relative=True)

    def _values(self, name: str) -> Callable[[str, Mapping[str, Any]], float | None]:
        """A row's share of a metric, where that is a share of rows."""

        def value(id_: str, answer: Mapping[str, Any]) -> float | None:
            if name == "answered":
                return float(answer["answer"] is not None)
            if name == "checks":  # the share of those that say something of the row
                passed = [one for one in answer["checks"].values() if one is not None]
                return sum(passed) / len(passed) if passed else None
            if name != "accuracy":
                return None
            reference = self.mine.rows[id_].get("reference")
            return None if reference is None else float(answer["answer"] == reference)

        return value

    def _drop(self, rule: str, name: str, most: float, *, relative: bool = False) -> GateFinding:
        """A metric, which may lie so far below the other's."""
        measured, system, called = self.other
        mine, theirs = self.mine.metric("student", name), measured.metric(system, name)
        if name == "agreement" and not self.against:
            theirs = {"value": 1.0}
        if mine is None or theirs is None:
            return GateFinding(rule, MISSING, f"{called} was measured without {name}")
        found = self._apart("differences", name, mine, theirs, self._values(name))
        limit = most * abs(theirs["value"]) if relative else most
        said = f"{name} {_beside(mine, theirs, found, called)}, at most {limit:.3f} may be lost" + (
            f" ({100 * most:g} %)" if relative else ""
        )
        lost = name not in _LOWER_IS_BETTER
        return self._judged(rule, found, limit, said, lost=lost, doubt=True)

    def _apart(
        self,
        key: str,
        name: str,
        mine: Mapping[str, float],
        theirs: Mapping[str, float],
        value: Callable[[str, Mapping[str, Any]], float | None],
    ) -> Mapping[str, float]:
        """Student minus the other: as the report has it, or row by row where both have the same."""
        if not self.against:
            known = self.mine.report.get(key, {}).get("student-teacher", {}).get(name)
            verdict = self.mine.report.get("verdict") or {}
            if known is None and verdict.get("metric") == name and key == "differences":
                known = verdict.get("difference")
            if known is not None:
                return dict(known)
            if name == "agreement":
                return {end: mine[end] - 1.0 for end in ("value", "low", "high") if end in mine}
        measured, system, _ = self.other
        said = self.mine.said("student"), measured.said(system)
        return _paired(*said, self.mine.groups, value) or independent_difference(mine, theirs)

    def _checks_beside_the_other(self, most: float) -> Iterator[GateFinding]:
        measured, system, called = self.other
        others = measured.report["systems"][system].get("checks") or {}
        for name, mine in (self.mine.report["systems"]["student"].get("checks") or {}).items():
            rule, theirs = f"check {name}", others.get(name)
            if theirs is None:
                yield GateFinding(rule, MISSING, f"{called} was measured without it")
                continue
            found = self._apart("check_differences", name, mine, theirs, _passes(name))
            said = f"{_beside(mine, theirs, found, called)}, at most {most:g} may be lost"
            yield self._judged(rule, found, most, said, lost=True, doubt=True)

    def _check(self, name: str, least: float) -> GateFinding:
        known = self.mine.report["systems"]["student"].get("checks") or {}
        rule = f"check {name}, at least"
        if name not in known:
            hint = nearest(name, list(known))
            return GateFinding(rule, MISSING, f"the report has no such check.{hint}")
        found = known[name]
        said = f"{interval_text(found)} of the rows, expected {least:g}"
        return self._judged(rule, found, -least, said, lost=True)

    def _patterns(self) -> Iterator[GateFinding]:
        """What no good answer looks like, by the share of rows."""
        said = self.mine.said("student")
        answers, groups = list(said.values()), [self.mine.groups[id_] for id_ in said]
        for rule, odd in ODD_PATTERNS.items():
            limit = getattr(self.rules, rule)
            if limit is None:
                continue
            if not answers:
                why = "there are no rows beside the report (rows.jsonl): measure the run again"
                yield GateFinding(rule, MISSING, why)
                continue
            hits = [odd(answer) for answer in answers]
            share = Proportion(list(map(float, hits)), groups).interval()
            counted = f"{sum(hits):,} of {len(hits):,} answers{_example(answers, hits)}"
            text = f"{interval_text(share)}, at most {limit:g}: {counted}"
            yield self._judged(rule, share, limit, text)

    def _commonest(self, most: float) -> GateFinding:
        measured, system, called = self.other
        one, other = (
            found.report["systems"][name].get("answers")
            for found, name in ((self.mine, "student"), (measured, system))
        )
        if not one or not other:
            return GateFinding("commonest answer", MISSING, "the report doesn't count answers")
        shares = []
        for counted, n in ((one, self.mine.report["n"]), (other, measured.report["n"])):
            low, high = wilson(counted["commonest_share"], n)
            shares.append({"value": counted["commonest_share"], "low": low, "high": high})
        found = independent_difference(*shares)
        said = (
            f"{str(one['commonest'])[:60]!r} is {shares[0]['value']:.3f} of the answers, the "
            f"commonest of {called} {shares[1]['value']:.3f}: {found['value']:+.3f}"
            f"{ends_text(found)}, at most {most:+g}"
        )
        return self._judged("commonest answer", found, most, said)

    def _ratios(self) -> Iterator[GateFinding]:
        """Mean response tokens and median latency, as multiples of the other's."""
        measured, system, called = self.other
        mine, theirs = self.mine.report["systems"]["student"], measured.report["systems"][system]
        pairs = (
            ("response tokens", self.rules.response_ratio, "tokens", "response_mean"),
            ("latency", self.rules.latency_ratio, "latency_ms", "p50"),
        )
        for rule, most, key, name in pairs:
            if most is None:
                continue
            one, other = (_number(found.get(key) or {}, name) for found in (mine, theirs))
            if one is None or not other or not other["value"]:
                said = f"the report lacks {key}.{name}: measure it, or set the rule to null"
                yield GateFinding(rule, MISSING, said)
                continue
            ratio = ratio_of_intervals(one, other) if key == "latency_ms" else self._longer()
            ratio = ratio or {"value": one["value"] / other["value"]}
            said = (
                f"{one['value']:.1f}, {ratio['value']:.2f}{ends_text(ratio, digits=2)} times the "
                f"{other['value']:.1f} of {called}, at most {most:g}"
            )
            yield self._judged(rule, ratio, most, said, doubt=True)
        if (limit := self.rules.latency_p95_ms) is not None:
            late = (mine.get("latency_ms") or {}).get("p95")
            if late is None:
                yield GateFinding("latency p95", MISSING, "the report has no latency_ms.p95")
            else:
                said = f"{late:.1f} ms, at most {limit:g}"
                yield self._judged("latency p95", {"value": late}, limit, said)

    def _longer(self) -> dict[str, float] | None:
        """How many times the other's response tokens the student's are, where rows say so."""
        measured, system, _ = self.other
        mine, theirs = (
            {id_: one["tokens"] for id_, one in said.items() if one.get("tokens") is not None}
            for said in (self.mine.said("student"), measured.said(system))
        )
        if not mine or not any(theirs.values()):
            return None
        if mine.keys() == theirs.keys():
            groups = [self.mine.groups[id_] for id_ in mine]
            return ratio_of([*mine.values()], [theirs[id_] for id_ in mine], groups).interval()
        means = [
            mean_of(np.array([*one.values()], float), [run.groups[id_] for id_ in one])
            for run, one in ((self.mine, mine), (measured, theirs))
        ]
        return ratio_of_intervals(*(one.interval() for one in means))

    def _judge(self) -> Iterator[GateFinding]:
        """What a judge said, where one was asked: who is better, and by how much scores differ."""
        wins, drop = self.rules.judge_wins, self.rules.judge_drop
        judge = self.mine.report.get("judge")
        if not judge or (wins is None and drop is None):
            return
        other = (self.against.report.get("judge") or {}) if self.against else None
        if other is not None and other.get("identity") != judge["identity"]:
            said = f"{self.other[2]} was not judged by {judge['model']}: set judge_* to null"
            yield GateFinding("judge", MISSING, said)
            return
        if wins is not None and other is None and (found := judge["preference"].get("difference")):
            said = (
                f"share of wins, student minus teacher: {interval_text(found, '+')}, at most "
                f"{wins:g} may be lost"
            )
            yield self._judged("judge wins", found, wins, said, lost=True, doubt=True)
        if drop is None:
            return
        for criterion, found in self._scored(judge, other):
            low, high = judge["scales"][criterion]
            most = drop * (high - low)
            said = (
                f"{criterion}: {interval_text(found, '+', digits=2)} against {self.other[2]}, at "
                f"most {most:.2f} may be lost ({100 * drop:g} % of the scale)"
            )
            rule = f"judge {criterion}"
            yield self._judged(rule, found, most, said, lost=True, doubt=True)

    def _scored(
        self, judge: Mapping[str, Any], other: Mapping[str, Any] | None
    ) -> Iterator[tuple[str, Mapping[str, float]]]:
        """By criterion how far the student's mean score is from the other's."""
        if other is None:
            yield from judge["differences"].get("student-teacher", {}).items()
            return
        theirs = other["scores"].get("student", {})
        for criterion, mine in judge["scores"].get("student", {}).items():
            if criterion in theirs:
                yield criterion, independent_difference(mine, theirs[criterion])

    def _residue(self) -> Iterator[GateFinding]:
        named = self.rules.residue
        known = _residue_tests(self.mine.report)
        if not known and named == "all":
            yield GateFinding("residue", MISSING, "the report has no tests of what is left")
        wanted = [*known] if isinstance(named, str) else named
        for name in wanted:
            rule = f"residue {name}"
            if name not in known:
                hint = nearest(name, list(known))
                yield GateFinding(rule, MISSING, f"the report has no such test of residue.{hint}")
            else:
                passed, said = known[name]
                yield GateFinding(rule, PASSED if passed else FAILED, said)

    def _judged(
        self,
        rule: str,
        found: Mapping[str, float],
        limit: float,
        said: str,
        *,
        lost: bool = False,
        doubt: bool = False,
    ) -> GateFinding:
        """A number that may not lie above its limit, or that may not be `lost` beyond it.

        Where its interval reaches beyond the limit all the same, a `doubt` is said.
        """
        sign = -1.0 if lost else 1.0
        value = sign * found["value"]
        least, most = sorted(sign * found.get(end, found["value"]) for end in ("low", "high"))
        if not value > limit + 1e-12:
            unsure = "; more can't be ruled out by these rows" if doubt and most > limit else ""
            return GateFinding(rule, PASSED, said + unsure)
        if self.rules.strict or least > limit:
            return GateFinding(rule, FAILED, said)
        return GateFinding(rule, UNSURE, f"{said}; these rows can't tell")


def _beside(
    mine: Mapping[str, float], theirs: Mapping[str, float], found: Mapping[str, float], called: str
) -> str:
    return (
        f"{mine['value']:.3f} against {theirs['value']:.3f} of {called}: "
        f"{found['value']:+.3f}{ends_text(found)}"
    )


def _passes(check: str) -> Callable[[str, Mapping[str, Any]], float | None]:
    """Whether a row passes a check."""

    def value(_: str, answer: Mapping[str, Any]) -> float | None:
        passed = (answer.get("checks") or {}).get(check)
        return None if passed is None else float(passed)

    return value


def _number(found: Mapping[str, Any], name: str) -> dict[str, float] | None:
    """A number with its interval, where it has one."""
    if found.get(name) is None:
        return None
    ends = {end: found[f"{name}_{end}"] for end in ("low", "high") if f"{name}_{end}" in found}
    return {"value": found[name], **ends}


def _residue_tests(report: Mapping[str, Any]) -> dict[str, tuple[bool, str]]:
    """By name whether each test of residue passed, and what it found."""
    found = report.get("residue") or {}
    tests = found.get("tests", found)
    return {
        name: (bool(one["passed"]), str(one.get("said") or ""))
        for name, one in tests.items()
        if isinstance(one, Mapping) and one.get("passed") is not None
    }


def _paired(
    mine: Mapping[str, Mapping[str, Any]],
    theirs: Mapping[str, Mapping[str, Any]],
    groups: Mapping[str, str],
    value: Callable[[str, Mapping[str, Any]], float | None],
) -> dict[str, float] | None:
    """The difference on the rows that both have; None where they have others."""
    if not mine or set(mine) != set(theirs):
        return None
    pairs = {id_: (value(id_, mine[id_]), value(id_, theirs[id_])) for id_ in mine}
    rows = [id_ for id_, pair in pairs.items() if None not in pair]
    if not rows:
        return None
    names = [groups[id_] for id_ in rows]
    one, other = ([float(pairs[id_][k] or 0) for id_ in rows] for k in (0, 1))
    if {*one, *other} <= {0.0, 1.0}:
        return (Proportion(one, names) - Proportion(other, names)).interval()
    return mean_difference(one, other, names)


def _example(answers: Sequence[Mapping[str, Any]], hits: Sequence[bool]) -> str:
    """The first that was hit, which says more than a share."""
    found = next((one["text"] for one, hit in zip(answers, hits, strict=True) if hit), None)
    return f", such as {found[-60:]!r}" if found else ""


def _expected() -> str:
    return f"expected some of {', '.join(GateRules.model_fields)}; see `gate --template`."


def _explained(error: ValidationError, path: Path | str) -> str:
    lines = [f"The rules {str(path)!r} can't be used:"]
    for problem in error.errors():
        where = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            hint = nearest(where, list(GateRules.model_fields))
            lines.append(f"  unknown key {where!r}.{hint} {_expected()}")
        else:
            lines.append(f"  {where}: {problem['msg']} (found {problem['input']!r}).")
    return "\n".join(lines)


def ends_in_a_loop(text: str) -> bool:
    """Whether a text ends with one piece again and again.

    >>> ends_in_a_loop("The answer is: " * 8), ends_in_a_loop("one, two, three, four")
    (True, False)
    """
    tail = text.rstrip()[-_TAIL:]
    for unit in range(1, min(_LONGEST_UNIT, len(tail) // 3) + 1):
        length = max(unit * (5 if unit <= _SHORT_UNIT else 3), _LEAST_LOOP)
        if length > len(tail) or tail[-1] != tail[-1 - unit]:
            continue
        piece = tail[-length:]
        if piece[unit:] == piece[:-unit] and any(sign.isalnum() for sign in piece[-unit:]):
            return True
    return False


def is_broken(text: str) -> bool:
    """Whether a text has control characters or such as no tokenizer should have made.

    >>> is_broken("a\\x00b"), is_broken("a\\tb\\n")
    (True, False)
    """
    return any(
        sign == "\ufffd" or (sign not in "\t\n\r" and unicodedata.category(sign) in _BROKEN)
        for sign in text
        if not sign.isprintable() or sign == "\ufffd"
    )


# What no good answer looks like, by the rule that says how many may.
ODD_PATTERNS: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "empty": lambda answer: not str(answer["text"] or "").strip(),
    "cut_off": lambda answer: answer.get("stop_reason") == "length",
    "loops": lambda answer: ends_in_a_loop(str(answer["text"] or "")),
    "non_printing": lambda answer: is_broken(str(answer["text"] or "")),
}

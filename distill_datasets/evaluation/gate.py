"""Whether a student may be deployed: rules over its report, for a model's continuous integration.

A rule fails where the evidence says so: where the whole interval of a number lies beyond its limit.
What a rule names and nobody measured fails too.
"""

import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill_datasets.errors import GateError, SettingsError, nearest
from distill_datasets.evaluation.metrics import CALIBRATIONS, mean_of, ratio_of
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
        fields, known = read_yaml(path, SettingsError, what="rules"), list(cls.model_fields)
        expected = f"expected some of {', '.join(known)}; see `gate --template`."
        if not isinstance(fields, Mapping):
            raise SettingsError(f"The rules {str(path)!r} hold no keys: {expected}")
        try:
            return cls(**{str(key): value for key, value in fields.items()})
        except ValidationError as error:
            lines = [f"The rules {str(path)!r} can't be used:"]
            for problem in error.errors():
                where = ".".join(map(str, problem["loc"]))
                if problem["type"] == "extra_forbidden":
                    lines.append(f"  unknown key {where!r}.{nearest(where, known)} {expected}")
                else:
                    lines.append(f"  {where}: {problem['msg']} (found {problem['input']!r}).")
            raise SettingsError("\n".join(lines)) from error


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
        report = report_file(self.run)
        found = {"report": read_report(report).get("digest"), **self.to_json()}
        file = gate_file(report)
        write_file(file, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        return file

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
    mine = _Side.read(run, "student", f"the student of {run}")
    if against:
        other = _Side.read(against, "student", f"the student of {against}")
    else:
        other = replace(mine, system="teacher", called="the teacher")
    return GateResult(str(run), [*_Look(known, mine, other).findings()])


@dataclass(frozen=True)
class _Side:
    """A system of a report, how it is `called`, and the rows by their ids.

    There are no rows where they aren't beside the report, or are too many.
    """

    system: str
    called: str
    report: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, run: Path | str, system: str, called: str) -> "_Side":
        report, file = read_report(run), report_file(run)
        rows = rows_file(file)
        known = rows.is_file() and rows.stat().st_size <= _LARGEST
        found = {str(row["id"]): row for row in read_rows(file)} if known else {}
        return cls(system, called, report, found)

    @property
    def numbers(self) -> Mapping[str, Any]:
        """What the report says of the system."""
        found: Mapping[str, Any] = self.report["systems"][self.system]
        return found

    @property
    def verdict(self) -> Mapping[str, Any]:
        """That of the report, if it has one."""
        return self.report.get("verdict") or {}

    @cached_property
    def said(self) -> dict[str, Mapping[str, Any]]:
        """What the system said, by the rows' ids."""
        rows = ((id_, row["systems"].get(self.system)) for id_, row in self.rows.items())
        return {id_: said for id_, said in rows if said}

    def groups(self, ids: Iterable[str]) -> list[str]:
        """Which of the rows are related."""
        return [str(self.rows[id_].get("group") or id_) for id_ in ids]

    def metric(self, name: str) -> Mapping[str, float] | None:
        """A metric, with its interval where it has one."""
        texts = self.report.get("texts", {}).get(self.system, {})
        # Texts are compared with the teacher's, or with references.
        for found in (self.numbers.get("metrics"), texts.get("teacher"), texts.get("reference")):
            if found and name in found:
                return dict(found[name])
        value = self.verdict.get(self.system) if self.verdict.get("metric") == name else None
        return None if value is None else {"value": value}


@dataclass(frozen=True)
class _Look:
    """One student's numbers beside the other's, its teacher's or another student's."""

    rules: GateRules
    mine: _Side
    other: _Side

    @property
    def beside_teacher(self) -> bool:
        """Whether both are in one report, which compares them."""
        return self.other.system == "teacher"

    def findings(self) -> Iterator[GateFinding]:
        """Every rule that is not None."""
        rules = self.rules
        if rules.quality_drop is not None:
            yield self._quality(rules.quality_drop)
        if rules.answered_drop is not None and self.mine.metric("answered"):
            yield self._drop("answered", "answered", rules.answered_drop)
        checks = self.mine.numbers.get("checks") or {}
        if rules.check_drop is not None:
            yield from (self._check_beside(name, rules.check_drop) for name in checks)
        yield from (self._check(name, least) for name, least in rules.checks.items())
        yield from self._patterns()
        if rules.commonest_rise is not None:
            yield self._commonest(rules.commonest_rise)
        yield from self._ratios()
        yield from self._judge()
        yield from self._residue()

    def _quality(self, most: float) -> GateFinding:
        """What the rules name, or the verdict, or the report's first metric."""
        known = list(self.mine.numbers.get("metrics", {}))
        named = self.rules.metric or self.mine.verdict.get("metric")
        others = [name for name in known if name != "answered"]
        name = named or min(others, key="agreement".__eq__, default=None)
        if name is None or self.mine.metric(name) is None:
            hint = nearest(name or "", known)
            said = f"the report has no metric {name!r}, only {known}.{hint}"
            return GateFinding("quality", MISSING, said)
        return self._drop("quality", name, most, relative=True)

    def _drop(self, rule: str, name: str, most: float, *, relative: bool = False) -> GateFinding:
        mine, theirs = self.mine.metric(name), self.other.metric(name)
        if name == "agreement" and self.beside_teacher:
            theirs = {"value": 1.0}
        if mine is None or theirs is None:
            return GateFinding(rule, MISSING, f"{self.other.called} was measured without {name}")
        found = self._apart("differences", name, mine, theirs)
        limit = most * abs(theirs["value"]) if relative else most
        said = f"{name} {self._beside(mine, theirs, found)}, at most {limit:.3f} may be lost"
        said += f" ({100 * most:g} %)" if relative else ""
        return self._judged(rule, found, limit, said, lost=name not in CALIBRATIONS, doubt=True)

    def _check_beside(self, name: str, most: float) -> GateFinding:
        theirs, rule = (self.other.numbers.get("checks") or {}).get(name), f"check {name}"
        if theirs is None:
            return GateFinding(rule, MISSING, f"{self.other.called} was measured without it")
        mine = self.mine.numbers["checks"][name]
        found = self._apart("check_differences", name, mine, theirs)
        said = f"{self._beside(mine, theirs, found)}, at most {most:g} may be lost"
        return self._judged(rule, found, most, said, lost=True, doubt=True)

    def _apart(
        self, key: str, name: str, mine: Mapping[str, float], theirs: Mapping[str, float]
    ) -> Mapping[str, float]:
        """Student minus the other: as the report has it, or row by row where both have the same."""
        if self.beside_teacher:
            known = self.mine.report.get(key, {}).get("student-teacher", {}).get(name)
            if known is None and key == "differences" and self.mine.verdict.get("metric") == name:
                known = self.mine.verdict.get("difference")
            if known is not None:
                return dict(known)
            if name == "agreement":
                return {end: mine[end] - 1.0 for end in ("value", "low", "high") if end in mine}
        return self._paired(key, name) or independent_difference(mine, theirs)

    def _paired(self, key: str, name: str) -> dict[str, float] | None:
        """The difference on the rows that both have; None where they have others."""
        if not self.mine.said or self.mine.said.keys() != self.other.said.keys():
            return None
        rows = {
            id_: (self._value(key, name, id_, said), self._value(key, name, id_, beside))
            for id_, said in self.mine.said.items()
            for beside in [self.other.said[id_]]
        }
        both = {id_: pair for id_, pair in rows.items() if None not in pair}
        if not both:
            return None
        groups = self.mine.groups(both)
        one, other = ([float(pair[k] or 0) for pair in both.values()] for k in (0, 1))
        if {*one, *other} <= {0.0, 1.0}:
            return (Proportion(one, groups) - Proportion(other, groups)).interval()
        return mean_difference(one, other, groups)

    def _value(self, key: str, name: str, id_: str, said: Mapping[str, Any]) -> float | None:
        """A row's share of a metric or a check, where that is a share of rows."""
        if key == "check_differences" or name == "checks":
            wanted = said.get("checks") or {}
            wanted = wanted if name == "checks" else {name: wanted.get(name)}
            passed = [one for one in wanted.values() if one is not None]
            return sum(passed) / len(passed) if passed else None
        reference = self.mine.rows[id_].get("reference")
        if name == "accuracy" and reference is not None:
            return float(said["answer"] == reference)
        return float(said["answer"] is not None) if name == "answered" else None

    def _beside(
        self, mine: Mapping[str, float], theirs: Mapping[str, float], found: Mapping[str, float]
    ) -> str:
        return (
            f"{mine['value']:.3f} against {theirs['value']:.3f} of {self.other.called}: "
            f"{found['value']:+.3f}{ends_text(found)}"
        )

    def _check(self, name: str, least: float) -> GateFinding:
        known, rule = self.mine.numbers.get("checks") or {}, f"check {name}, at least"
        if name not in known:
            hint = nearest(name, list(known))
            return GateFinding(rule, MISSING, f"the report has no such check.{hint}")
        said = f"{interval_text(known[name])} of the rows, expected {least:g}"
        return self._judged(rule, known[name], -least, said, lost=True)

    def _patterns(self) -> Iterator[GateFinding]:
        """What no good answer looks like, by the share of rows."""
        answers, groups = list(self.mine.said.values()), self.mine.groups(self.mine.said)
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
            shown = next((one["text"] for one in compress(answers, hits)), None)
            example = f", such as {shown[-60:]!r}" if shown else ""
            counted = f"{sum(hits):,} of {len(hits):,} answers{example}"
            text = f"{interval_text(share)}, at most {limit:g}: {counted}"
            yield self._judged(rule, share, limit, text)

    def _commonest(self, most: float) -> GateFinding:
        rule, sides = "commonest answer", (self.mine, self.other)
        if not all(side.numbers.get("answers") for side in sides):
            return GateFinding(rule, MISSING, "the report doesn't count answers")
        shares = []
        for side in sides:
            share = side.numbers["answers"]["commonest_share"]
            low, high = wilson(share, side.report["n"])
            shares.append({"value": share, "low": low, "high": high})
        found = independent_difference(*shares)
        said = (
            f"{str(self.mine.numbers['answers']['commonest'])[:60]!r} is {shares[0]['value']:.3f} "
            f"of the answers, the commonest of {self.other.called} {shares[1]['value']:.3f}: "
            f"{found['value']:+.3f}{ends_text(found)}, at most {most:+g}"
        )
        return self._judged(rule, found, most, said)

    def _ratios(self) -> Iterator[GateFinding]:
        """Mean response tokens and median latency, as multiples of the other's."""
        pairs = (
            ("response tokens", self.rules.response_ratio, "tokens", "response_mean"),
            ("latency", self.rules.latency_ratio, "latency_ms", "p50"),
        )
        for rule, most, key, name in pairs:
            if most is None:
                continue
            one, other = (
                _number(side.numbers.get(key) or {}, name) for side in (self.mine, self.other)
            )
            if one is None or not other or not other["value"]:
                said = f"the report lacks {key}.{name}: measure it, or set the rule to null"
                yield GateFinding(rule, MISSING, said)
                continue
            ratio = ratio_of_intervals(one, other) if key == "latency_ms" else self._longer()
            ratio = ratio or {"value": one["value"] / other["value"]}
            said = (
                f"{one['value']:.1f}, {ratio['value']:.2f}{ends_text(ratio, digits=2)} times the "
                f"{other['value']:.1f} of {self.other.called}, at most {most:g}"
            )
            yield self._judged(rule, ratio, most, said, doubt=True)
        if (limit := self.rules.latency_p95_ms) is not None:
            late = _number(self.mine.numbers.get("latency_ms") or {}, "p95")
            if late is None:
                yield GateFinding("latency p95", MISSING, "the report has no latency_ms.p95")
            else:
                said = f"{late['value']:.1f} ms, at most {limit:g}"
                yield self._judged("latency p95", late, limit, said)

    def _longer(self) -> dict[str, float] | None:
        """How many times the other's response tokens the student's are, where rows say so."""
        sides = (self.mine, self.other)
        mine, theirs = (
            {id_: one["tokens"] for id_, one in side.said.items() if one.get("tokens") is not None}
            for side in sides
        )
        if not mine or not any(theirs.values()):
            return None
        if mine.keys() == theirs.keys():
            other = [theirs[id_] for id_ in mine]
            return ratio_of([*mine.values()], other, self.mine.groups(mine)).interval()
        means = [
            mean_of(np.array([*counts.values()], float), side.groups(counts))
            for side, counts in zip(sides, (mine, theirs), strict=True)
        ]
        return ratio_of_intervals(*(one.interval() for one in means))

    def _judge(self) -> Iterator[GateFinding]:
        """What a judge said, where one was asked: who is better, and by how much scores differ."""
        wins, drop = self.rules.judge_wins, self.rules.judge_drop
        judge, other = (side.report.get("judge") or {} for side in (self.mine, self.other))
        if not judge or (wins is None and drop is None):
            return
        if other.get("identity") != judge["identity"]:
            said = f"{self.other.called} was not judged by {judge['model']}: set judge_* to null"
            yield GateFinding("judge", MISSING, said)
            return
        found = judge["preference"].get("difference") if self.beside_teacher else None
        if wins is not None and found:
            said = (
                f"share of wins, student minus teacher: {interval_text(found, '+')}, at most "
                f"{wins:g} may be lost"
            )
            yield self._judged("judge wins", found, wins, said, lost=True, doubt=True)
        if drop is None:
            return
        if self.beside_teacher:
            apart = judge["differences"].get("student-teacher", {})
        else:
            mine, theirs = (one["scores"].get("student", {}) for one in (judge, other))
            both = [name for name in mine if name in theirs]
            apart = {name: independent_difference(mine[name], theirs[name]) for name in both}
        for criterion, found in apart.items():
            low, high = judge["scales"][criterion]
            most = drop * (high - low)
            said = (
                f"{criterion}: {interval_text(found, '+', digits=2)} against {self.other.called}, "
                f"at most {most:.2f} may be lost ({100 * drop:g} % of the scale)"
            )
            rule = f"judge {criterion}"
            yield self._judged(rule, found, most, said, lost=True, doubt=True)

    def _residue(self) -> Iterator[GateFinding]:
        """The tests of what the training left behind: those that are named, or that told."""
        named = self.rules.residue
        tests = self.mine.report.get("residue") or {}
        known = {name: one for name, one in tests.items() if one.get("passed") is not None}
        if not known and named == "all":
            yield GateFinding("residue", MISSING, "the report has no tests of what is left")
        for name in known if isinstance(named, str) else named:
            rule = f"residue {name}"
            if name in known:
                outcome = PASSED if known[name]["passed"] else FAILED
                yield GateFinding(rule, outcome, str(known[name].get("said") or ""))
            else:
                hint = nearest(name, list(known))
                yield GateFinding(rule, MISSING, f"the report has no such test of residue.{hint}")

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


def _number(found: Mapping[str, Any], name: str) -> dict[str, float] | None:
    if found.get(name) is None:
        return None
    ends = {end: found[f"{name}_{end}"] for end in ("low", "high") if f"{name}_{end}" in found}
    return {"value": found[name], **ends}


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

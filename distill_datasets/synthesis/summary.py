"""What a synthesis brought: coverage of the rules, balance of the attributes, what was dropped."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill_datasets.errors import OutputError, RecipeError
from distill_datasets.synthesis.rounds import NEAR_DUPLICATE, OFF_TOPIC, Rounds

_SUMMARY, _DROPPED = "synthesis.json", Path("synthesis") / "dropped.jsonl"


@dataclass(frozen=True)
class Synthesized:
    """What `synthesize` left: the recipe's folder, and what became of the teacher's queries.

    `kept` are in the file now, `new` of them by this call, which `dropped` others, by reason.
    `stopped` says why there are fewer than were wanted. `summary` is what `synthesis.json` holds.
    """

    path: Path
    kept: int
    new: int
    dropped: Mapping[str, int]
    uncovered_rules: tuple[str, ...]
    stopped: str | None
    summary: Mapping[str, Any]

    @property
    def duplicates(self) -> int:
        """How many repeated an earlier one, nearly or wholly."""
        return self.dropped.get(NEAR_DUPLICATE, 0)

    @property
    def off_topic(self) -> int:
        """How many were nothing that the prompt is for."""
        return self.dropped.get(OFF_TOPIC, 0)

    def sentence(self) -> str:
        """What became of the teacher's queries, in one line."""
        counts = {**self.dropped, "unreadable": self.summary["unreadable"]}
        counts["failed requests"] = self.summary["failed"]
        lost = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
        short = (
            f"; stopped short of {self.summary['wanted']}: {self.stopped}" if self.stopped else ""
        )
        return (
            f"{self.kept} queries by the teacher, {self.new} of them new, behind "
            f"{self.summary['by_hand']} by hand" + (f"; dropped: {lost}" if lost else "") + short
        )

    def table(self) -> str:
        """How many queries exercise each rule and have each attribute, as text."""
        rules = self.summary["rules"]
        lines = ["queries  rule"] if rules else []
        lines += [f"{row['queries']:>7}  {row['number']}. {row['rule']}" for row in rules]
        for name, counts in self.summary["balance"].items():
            least, most = min(counts.values()), max(counts.values())
            lines.append(f"{name}: {len(counts)} values, {least} to {most} queries each")
        return "\n".join(lines)


def read_summary(folder: Path) -> dict[str, Any]:
    """What an earlier call said; empty where there was none."""
    path = folder / _SUMMARY
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} can't be read: {error}. Remove it and run again.") from error
    return found


def save_summary(folder: Path, facts: Mapping[str, Any], rounds: Rounds) -> Synthesized:
    """Write `synthesis.json`, and to `synthesis/dropped.jsonl` what was dropped."""
    coverage = rounds.coverage
    summary = {
        **facts,
        "dropped": _save_dropped(folder, rounds),
        "unreadable": rounds.unreadable,
        "failed": rounds.failed,
        "unjudged": coverage.unjudged,
        "stopped": rounds.stopped,
        "rules": coverage.table(),
        "uncovered": coverage.uncovered,
    }
    _write(folder / _SUMMARY, json.dumps(summary, ensure_ascii=False, indent=2) + "\n")
    return Synthesized(
        path=folder,
        kept=facts["kept"],
        new=facts["new"],
        dropped=Counter(row.reason for row in rounds.dropped),
        uncovered_rules=tuple(coverage.rules[number - 1] for number in coverage.uncovered),
        stopped=rounds.stopped,
        summary=summary,
    )


def _save_dropped(folder: Path, rounds: Rounds) -> dict[str, int]:
    """All that was ever dropped, counted by reason."""
    path = folder / _DROPPED
    before = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    now = [json.dumps(asdict(row), ensure_ascii=False) for row in rounds.dropped]
    lines = [line for line in dict.fromkeys([*before, *now]) if line]
    if now:
        _write(path, "".join(f"{line}\n" for line in lines))
    return dict(Counter(json.loads(line)["reason"] for line in lines))


def _write(path: Path, text: str) -> None:
    building = path.with_name(f".{path.name}.building")
    try:
        building.write_text(text, encoding="utf-8")
        building.replace(path)
    except OSError as error:
        raise OutputError(
            f"Can't write {str(path)!r}: {error}. The queries are written; free some space and "
            "run again: nothing is asked twice."
        ) from error

"""A rollout's state: its stage, the evidence in it, what was spent, and who is answered by whom.

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

from distill_datasets.conversations import to_text
from distill_datasets.errors import DatasetError, OutputError, SettingsError
from distill_datasets.evaluation.gate import GateRules
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
from distill_datasets.serving.stages import (
    OFF,
    STAGES,
    Evidence,
    Move,
    Stage,
    StageRules,
    Usual,
    by_name,
    decide,
)

STATE, MOVES, TEXTS = "state.json", "moves.jsonl", "texts.jsonl"
_SAVE_SECONDS = 5.0
_MOST_TEXTS = 100_000_000  # bytes of texts.jsonl


@dataclass(frozen=True)
class Exchange:
    """What one model answered to a conversation."""

    text: str
    stop_reason: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    response_tokens: int = 0


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


def rules_of(report: Mapping[str, Any], rules: GateRules) -> StageRules:
    """What held-out rows and a gate's rules ask of a student in front of traffic."""
    student = report["systems"]["student"].get("metrics", {})
    answered = float(student.get("answered", {}).get("value", 1.0))
    measured = student.get("agreement")
    if report.get("free_text"):
        measured = report.get("texts", {}).get("student", {}).get("teacher", {}).get("chrf")
    if not measured:
        raise DatasetError("The report says nothing of the student's agreement: measure again.")
    return StageRules.of(float(measured["value"]), answered, rules)


def usual_of(run: Path) -> Usual:
    """What the student said on the held-out rows of a run's report, as far as it was kept."""
    report = report_file(run)
    said = []
    if rows_file(report).is_file():
        said = [row["systems"].get("student") for row in read_rows(report)]
    known = [one for one in said if one]
    return Usual([one["answer"] for one in known], [len(one["text"] or "") for one in known])


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
        known = read_state(self.folder)
        kept = [Stage(**one) for one in known.get("stages", ())]
        self.stages = tuple(stages or kept or STAGES)
        self.stage = by_name(known.get("stage", self.stages[1].name), self.stages)
        self.evidence = Evidence(**known.get("evidence", {}))
        self.spent, self.moves = float(known.get("spent", 0.0)), int(known.get("moves", 0))
        self._saved = 0.0

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
        self.evidence.requests += 1
        answer = self.judgement.answer(messages, said, student=True)
        self.judgement.usual.add(answer, len(said.text))
        text = {"text": said.text, "stop_reason": said.stop_reason}
        self.evidence.count_odd(text, answer is not None)
        self._look()

    def count_failed(self) -> None:
        """Take a request into account that the student did not answer."""
        self.evidence.requests += 1
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

    def spend(self, amount: float) -> None:
        """Count what shadowing cost."""
        self.spent += amount

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
        self.moves += 1
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
            "moves": self.moves,
        }
        write_file(self.folder / STATE, json.dumps(state, indent=2) + "\n")


def read_state(folder: Path) -> dict[str, Any]:
    """A rollout's state; empty before the first. Raises `OutputError` for a damaged one."""
    file = folder / STATE
    if not file.is_file():
        return {}
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        Evidence(**state["evidence"])
        [Stage(**one) for one in state.get("stages", ())]
        return dict(state)
    except (ValueError, TypeError, KeyError) as error:
        raise OutputError(
            f"{str(file)!r} is damaged ({error!r}): delete it, and name the stage with --to."
        ) from error


def read_moves(folder: Path) -> list[dict[str, Any]]:
    """Every change of stage, oldest first."""
    return _read_lines(folder / MOVES)


def _read_lines(file: Path) -> list[dict[str, Any]]:
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
    for found in _read_lines(kept):
        text = to_text(found["messages"])
        single = not recipe.holds_conversations and len(found["messages"]) == 1
        asked = {"query": found["messages"][0]["content"]} if single else found
        rows[text] = {key: value for key, value in asked.items() if key != "why"}
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
    names = [one.name for one in found]
    if len(set(names)) < len(names) or [one.share for one in found] != sorted(
        one.share for one in found
    ):
        raise SettingsError(f"Stages have names of their own and rising shares; found {texts}.")
    return tuple(found)


def fraction(text: str) -> float:
    """A number from 0 to 1 that follows from a text alone, evenly spread."""
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()) / 2**64

"""Systems on the same held-out rows: a report and the student's model card."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import (
    BudgetReached,
    ModelError,
    PriceError,
)
from distill_datasets.evaluation import report_text
from distill_datasets.evaluation.comparison import Comparison, Texts, metric_names
from distill_datasets.evaluation.judge import AnswerJudge, open_judge
from distill_datasets.evaluation.latency import (
    UNCACHED,
    latency_note,
    measure_latency,
    percentiles,
    timed_requests,
)
from distill_datasets.evaluation.metrics import Metrics
from distill_datasets.evaluation.money import SpendingRecord, money
from distill_datasets.evaluation.page import summary_html, write_page
from distill_datasets.evaluation.residue import TESTS, measure_residue, shipped
from distill_datasets.evaluation.settings import MeasureSettings
from distill_datasets.evaluation.systems import (
    PROMPTED,
    HeldOut,
    TrainedStudent,
    ask_all,
    connections_of,
    explained,
    find_training,
    greedy,
    members_of,
    open_meter,
    open_systems,
    read_held_out,
)
from distill_datasets.evaluation.verdict import alerts_of, judge_rows
from distill_datasets.files import (
    one_writer,
    read_object,
    read_report,
    read_rows,
    report_file,
    rows_file,
    split_report,
    write_file,
)
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient
from distill_datasets.generation.pricing import Meter, Prices
from distill_datasets.generation.rate_limit import Limits
from distill_datasets.generation.teachers import Answerer
from distill_datasets.models.sampler import Sampler, digest
from distill_datasets.progress import interruptible
from distill_datasets.recipes.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame


_SCORED = ("base", "teacher", "student")  # for their likelihoods
_SHARE, _LEAST_SECONDS = 5, 10.0  # of the time that the answers took: so long is timed, or so many
_NO_LIKELIHOOD = (
    "Internalisation and perplexity are not known: they take base, teacher and student that all "
    "say how likely they find a given text, and usable answers of the teacher."
)
_VERSION = 4  # goes into every report's digest: raise it when reports come out differently


@dataclass(frozen=True)
class Report:
    """What `measure` found: `data` as it stands in the file `path`.

    `Report.read("runs/demo")` reads what was found before, by this version or an earlier one.
    `paid` is what this call of `measure` spent, where there are prices.
    """

    path: Path
    data: Mapping[str, Any]
    paid: float = 0.0

    @classmethod
    def read(cls, path: str | Path) -> "Report":
        """The report of a run's folder, or a report's file; raises `DatasetError` for any other."""
        return cls(report_file(path), read_report(path))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row with all that every system said to it, as it said it.

        Raises `DatasetError` where their file isn't there, as beside a report of version 0.1.
        """
        return read_rows(self.path)

    def to_pandas(self) -> "DataFrame":
        """Every row, with a column for each thing that a system said or passed."""
        from pandas import json_normalize

        return json_normalize(list(self.rows()))

    def _repr_html_(self) -> str:
        return summary_html(self.data, self.path.with_suffix(".html"))

    def table(self) -> str:
        """The systems, what sets the student apart and, where there are few, the rows."""
        return report_text.table(self.data)


@interruptible
def measure(  # noqa: PLR0913 (a release, four models, and the settings)
    dataset: str | Path,
    *,
    student: Sampler | str | Path,
    out: str | Path,
    teacher: Sampler | str | None = None,
    base: Sampler | str | None = None,
    judge: Sampler | str | None = None,
    settings: MeasureSettings | None = None,
) -> Report:
    """Ask systems every query of a release's split, and compare the student with the others.

    `student` is a training folder (or a run's folder with `train/`) or a model reference; the
    teacher is the release's, and the base what the student was trained from, unless given. A
    `judge` scores and compares what they say.
    Writes `out/report.json`, `report.md`, `report.html`, `rows.jsonl` and `model_card.md`; for a
    split other than test `report-<split>.json` and so on. Answers are at temperature 0 and kept in
    `out/journal.sqlite`: another call asks only for timings, and for nothing where its report
    exists. Lines on standard error say what is asked and what it costs, beforehand. Timing comes
    last, when the report is there without it. Raises `DatasetError`, `RecipeError`,
    `SettingsError`, `ModelError`, `PriceError` or `OutputError` before anything is asked, and
    `GenerationError` when a row failed: no report leaves rows out.

        report = measure("runs/demo/release", student="runs/demo/train", out="runs/demo")
        print(report.table())
    """
    settings = settings or MeasureSettings()
    held_out = read_held_out(dataset, split=settings.split, limit=settings.limit)
    references = held_out.rows["reference"]
    names, always = metric_names(held_out.recipe, references)
    metrics = Metrics.load(names, settings.metrics, references, always=always)
    training = find_training(student)
    systems = open_systems(
        held_out,
        student=student,
        training=training,
        teacher=teacher,
        base=base,
        names=settings.systems,
    )
    judging = open_judge(judge, held_out, settings)
    writer = _open_writer(settings.paraphraser, systems["teacher"])
    others = {"judge": judging and judging.sampler, "paraphraser": writer}
    meter = open_meter(settings, {**systems, **{name: one for name, one in others.items() if one}})
    path = split_report(Path(out), settings.split)
    with one_writer(path.parent, "report"):
        return _Measuring(
            path, held_out, systems, settings, metrics, training, judging, writer, meter
        ).report()


def _open_writer(named: str | None, teacher: Answerer) -> Sampler | None:
    from distill_datasets.models.references import open_sampler

    if named != "teacher":
        return open_sampler(named) if named else None
    return members_of(teacher)[0].sampler


@dataclass
class _Measuring:
    """All that a report is made of, and the `data` that is written as it grows."""

    path: Path
    held_out: HeldOut
    systems: Mapping[str, Answerer]
    settings: MeasureSettings
    metrics: Metrics
    training: TrainedStudent | None
    judge: AnswerJudge | None
    paraphraser: Sampler | None
    meter: Meter | None

    def __post_init__(self) -> None:
        """Reads what is known already."""
        self.known: Mapping[str, Any] = read_object(self.path)
        self.data = dict(self.known)

    def report(self) -> Report:
        """The report that is there, or a new one: written before the timing and after it."""
        known = self.known
        whole = not known.get("unpaid") and (known.get("timed") or not self.settings.latency)
        whole = whole and ("judge" in known or not self.judge) and rows_file(self.path).is_file()
        if not whole or known.get("digest") != self.key:
            self._measure()
        elif self._tests_left:
            self._add(self._residue)
        elif self.settings.prices:  # what those say of it costs no request
            self._write()
        return Report(self.path, self.data, self.meter.spent if self.meter else 0.0)

    def _measure(self) -> None:
        began = monotonic()
        with self._clients() as clients:
            answers = ask_all(self.held_out, self.systems, clients, self._then())
        seconds = monotonic() - began
        texts = Texts(Comparison(answers, self.metrics, self.held_out.recipe))
        self.data = self._compared(texts)
        lines = (json.dumps(row, ensure_ascii=False) for row in texts.comparison.lines())
        write_file(rows_file(self.path), "".join(f"{line}\n" for line in lines))
        self._write()
        if self.judge:
            self._add(partial(self._judged, self.judge, texts))
        if self.settings.residue:
            self._add(self._residue)
        if self.settings.latency:
            self._add(partial(self._times, seconds))

    def _add(self, find: Callable[[], dict[str, Any]]) -> None:
        """Write the report with what is found, and what was spent even where nothing is."""
        try:
            self.data |= find()
        finally:
            self.data["spent"] = self._spent()
            self._write()

    def _write(self) -> None:
        """The report's file comes last: where it stands, the others do."""
        from distill_datasets.releases import cards

        data, path = self.data, self.path
        data |= self._money()
        data["summary"] = report_text.summary(data)
        write_file(path.with_suffix(".md"), report_text.markdown(data))
        if self.training and self.held_out.split == "test":
            facts = {**self.training.config, "checkpoint": self.training.checkpoint}
            card = cards.model_card(data, facts, self.held_out.recipe)
            write_file(path.with_name("model_card.md"), card)
        write_page(path, self.training.folder if self.training else None, data=data)
        write_file(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    @contextmanager
    def _clients(self) -> Iterator[Callable[[], CachedClient]]:
        """Makes clients of the journal beside a report: each asks on one event loop.

        There is no report without all answers, so what was rejected before is asked again.
        """
        with Journal(self.path.with_name("journal.sqlite")) as journal:
            yield lambda: CachedClient(
                journal,
                limits=Limits(self.settings.concurrency),
                meter=self.meter,
                ask_rejected_again=True,
            )

    def _then(self) -> str:
        parts, rows = list[str](), len(self.held_out.rows)
        scored = connections_of(self.systems, _SCORED)
        if self.settings.internalisation and len(scored) == len(_SCORED):
            parts.append(f"at most {3 * rows:,} requests ask how likely the answers are")
        if self.judge:
            requests = self.judge.most_requests(self.systems, rows)
            parts.append(f"at most {requests:,} requests go to the judge")
        if self.settings.latency:
            timed = timed_requests(self.held_out, self.systems)
            requests = sum(map(len, timed.values()))
            parts.append(f"at most {requests:,} requests time some of them")
        return f"then {', and '.join(parts)}." if parts else ""

    def _compared(self, texts: Texts) -> dict[str, Any]:
        comparison, checks = texts.comparison, self.held_out.recipe.all_checks
        systems = {name: self._system(name, comparison) for name in self.systems}
        long, short = (systems[name]["tokens"]["prompt_mean"] for name in ("teacher", "student"))
        verdict = judge_rows(texts, free_text=self.held_out.free_text)
        against = self.training.warnings if self.training else ()
        warned = [f"Its training warns: {one}." for one in against]
        internalisation = self._internalisation(comparison.answers["teacher"])
        sampling = greedy(self.held_out.recipe)
        data = {
            "alerts": [*warned, *alerts_of(texts, verdict)],
            "verdict": verdict,
            **self._measured_rows(),
            "systems": systems,
            "differences": comparison.differences(),
            "texts": texts.section(),
            "text_differences": texts.differences(),
            "checks": {
                name: {"demands": one.demand, "covers": one.covers} for name, one in checks.items()
            },
            "check_differences": comparison.check_differences(),
            **internalisation,
            "prompt_tokens_saved": {"per_query": long - short, "ratio": long / short}
            if long and short
            else None,
            "latency_ratio": None,
            "spent": self._spent(),
            "labels": comparison.labels(),
            "subgroups": comparison.subgroups,
            "rows": comparison.rows(),
            "sampling": {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens},
            "timed": False,
            "asked": self.asked,
            "digest": self.key,
        }
        if not checks:
            del data["checks"], data["check_differences"]
        about = explained(self.systems, self.held_out)
        return {**data, "notes": [*comparison.notes(), *about, *internalisation["notes"]]}

    def _measured_rows(self) -> dict[str, Any]:
        """Which rows of which dataset: a folder here, or a commit on the Hub."""
        held_out, manifest = self.held_out, self.held_out.manifest
        pushed = {"path": held_out.reference, "commit": held_out.commit}
        return {
            "recipe": held_out.recipe.name,
            "dataset": {
                **(pushed if held_out.commit else {"path": str(held_out.path)}),
                "version": manifest["version"],
                "revision": manifest["content_digest"],
                "rows": sum(manifest["splits"].values()),
            },
            "split": held_out.split,
            "n": len(held_out.rows),
            "groups": len(set(held_out.rows["group"])),
            "free_text": held_out.free_text,
        }

    def _system(self, name: str, comparison: Comparison) -> dict[str, Any]:
        system, checks = self.systems[name], self.held_out.recipe.all_checks
        trained = self.training if name.startswith("student") else None
        return {
            "model": trained.checkpoint["sampler"] if trained else system.model,
            "identity": system.identity,
            "prompt": name in PROMPTED,
            "metrics": comparison.metrics_of(name),
            **({"checks": comparison.checks_of(name)} if checks else {}),
            "answers": comparison.variety(name),
            "tokens": comparison.tokens(name),
        }

    def _internalisation(self, rows: "Dataset") -> dict[str, Any]:
        """The key `internalisation`, as it is known, or asked for; notes where it is None."""
        found, said, unpaid = None, "Internalisation was not asked for.", {}
        if self.settings.internalisation:
            said = _NO_LIKELIHOOD
            try:
                same = self.known.get("asked") == self.asked
                found = same and self.known.get("internalisation") or self._likelihoods(rows)
            except BudgetReached as error:
                said, unpaid = f"Internalisation is not computed: {error}", {"unpaid": True}
            except ModelError as error:
                said += f" {str(error).partition(': ')[0]}."
        return {"internalisation": found, "notes": [] if found else [said], **unpaid}

    def _likelihoods(self, rows: "Dataset") -> dict[str, Any] | None:
        """The score over the teacher's usable answers; None where a system can't score text."""
        from distill_datasets.training.validation import TeacherAnswer, measure_internalisation

        connections = connections_of(self.systems, _SCORED)
        recipe = self.held_out.recipe
        answers = [
            TeacherAnswer.to(
                recipe,
                row,
                row["raw"],
                part.write_response(row["raw"], row["answer"]),
                stop_reason=row["stop_reason"],
            )
            for row in rows
            if row["answer"] is not None
            for part, _ in [recipe.part(row["query"])]
        ]
        if not answers or len(connections) < len(_SCORED):
            return None
        meters = dict.fromkeys(connections, self.meter)
        return measure_internalisation(answers, connections, meters)

    def _judged(self, judge: AnswerJudge, texts: Texts) -> dict[str, Any]:
        models = {name: one.model for name, one in self.systems.items()}
        with self._clients() as clients:
            return {"judge": judge.judge(judge.rows(texts), models, clients())}

    def _residue(self) -> dict[str, Any]:
        tests, writer = self._tests_left, self.paraphraser
        if not tests:
            return {name: self.known[name] for name in ("residue", "residue_of")}
        rows = list(read_rows(self.path))
        with self._clients() as clients:
            found = measure_residue(self.held_out, self.systems, rows, clients, writer, tests)
        return {
            "residue": {**self.known.get("residue", {}), **found},
            "residue_of": {"key": self._tests_key, "paraphraser": writer and writer.identity},
        }

    @property
    def _tests_left(self) -> Sequence[str]:
        """The tests that are not known: all of other models or rows; that of another paraphraser.

        A test that told nothing is none of them: the same models on the same rows tell no more.
        """
        of, writer = self.known.get("residue_of") or {}, self.paraphraser
        if not self.settings.residue:
            return ()
        if of.get("key") != self._tests_key:
            return [*TESTS]
        return ["paraphrase"] if writer and writer.identity != of["paraphraser"] else ()

    def _times(self, seconds: float) -> dict[str, Any]:
        """The keys of a report that timing decides; the answers took so many seconds."""
        timed, data = timed_requests(self.held_out, self.systems, self.meter), self.data
        try:
            times = measure_latency(timed, seconds=max(_LEAST_SECONDS, seconds / _SHARE))
        except BudgetReached as error:
            return {"notes": [*data["notes"], f"Not timed: {error}"]}
        latency = {name: percentiles(found) for name, found in times.items()}
        systems = {
            name: {**one, **({"latency_ms": latency[name]} if name in latency else {})}
            for name, one in data["systems"].items()
        }
        systems["teacher"]["latency_uncached_ms"] = latency[UNCACHED]
        each = latency["student"]["p50"]
        return {
            "systems": systems,
            "latency_ratio": {
                "teacher": latency["teacher"]["p50"] / each,
                "teacher_uncached": latency[UNCACHED]["p50"] / each,
            },
            "notes": [*data["notes"], latency_note(times)],
            "timed": True,
        }

    def _money(self) -> dict[str, Any]:
        """What the student saves by the price file; a note where that lacks a price."""
        if self.settings.prices is None:
            return {}
        prices = Prices.load(self.settings.prices)
        trainings = [self.training.folder] if self.training else []
        spending = SpendingRecord(self.held_out.manifest, trainings)
        try:
            return {"money": money(self.data, prices, spending=spending)}
        except PriceError as error:
            why = f"No comparison of costs: {error}"
            return {"notes": [*(note for note in self.data["notes"] if note != why), why]}

    def _spent(self) -> dict[str, Any] | None:
        """What was paid for the same rows and models, now and for the report that is known."""
        known, meter = self.known, self.meter
        same = known.get("asked") == self.asked or known.get("digest") == self.key
        before = (known.get("spent") if same else None) or {}
        if meter is None:
            return before or None
        earlier = before["amount"] if before.get("currency") == meter.currency else 0.0
        return {
            "amount": earlier + meter.spent,
            "currency": meter.currency,
            "priced_at": meter.priced_at,
        }

    @cached_property
    def asked(self) -> str:
        """The digest of the rows and of those whose likelihoods are compared on them."""
        systems = {name: self.systems[name].identity for name in _SCORED if name in self.systems}
        checkpoint = self.training.checkpoint if self.training else None
        rows = list(self.held_out.rows["id"])
        return digest([self.held_out.manifest["content_digest"], rows, systems, checkpoint])

    @cached_property
    def _tests_key(self) -> str:
        """The digest of all that tests of residue depend on but the paraphraser."""
        return digest([self.asked, _measured_by(self.held_out.recipe), shipped()])

    @cached_property
    def key(self) -> str:
        """The digest of everything that a report depends on but time."""
        return digest(
            {
                "version": _VERSION,
                "revision": self.held_out.manifest["content_digest"],
                "metrics": self.metrics.key,
                **_measured_by(self.held_out.recipe),
                "split": self.held_out.split,
                "rows": list(self.held_out.rows["id"]),
                "systems": {name: system.identity for name, system in self.systems.items()},
                "checkpoint": self.training.checkpoint if self.training else None,
                "internalisation": self.settings.internalisation,
                **({"judge": self.judge.key} if self.judge else {}),
            }
        )


def _measured_by(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of measuring alone, which changes no row."""
    confidences = [part.answer.confidence for part in recipe.parts if part.answer.confidence]
    checks = [[name, one.model_dump(mode="json")] for name, one in recipe.all_checks.items()]
    return {
        "margin": recipe.margin,
        **({"confidences": confidences} if confidences else {}),
        **({"checks": checks} if checks else {}),
    }

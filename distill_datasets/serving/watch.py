"""Whether what a release or a student stands on is still there: its models, weights and prices."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from distill_datasets.errors import (
    AccessError,
    DatasetError,
    DistillError,
    GateError,
    ModelError,
    RequestError,
    ServiceError,
)
from distill_datasets.files import as_object, read_report, report_file
from distill_datasets.generation.client import run_in_thread
from distill_datasets.generation.pricing import Prices
from distill_datasets.hub.references import find_release
from distill_datasets.models.openai import OpenAISampler
from distill_datasets.models.references import connect, find_training, open_sampler, read_training
from distill_datasets.models.sampler import Sampling
from distill_datasets.models.tinker import explained
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.sections import OWN_TEACHER
from distill_datasets.releases.manifest import read_manifest
from distill_datasets.tables import aligned, html_card, html_table, one_line

_HEAD = ("what", "name", "state", "says")
State = Literal["holds", "ends", "changed", "gone", "unknown"]
# What lists of models call the day on which one is switched off; some nest it by its use.
_ENDS = ("shutdown_date", "deprecation_date", "retirement_date", "expiration_date", "deprecation")
_USES = ("inference", "fine_tune")
_PRICES_AGE = 90  # days after which prices are to be looked up again
_CHEAPER, _DEARER = 0.95, 1.05  # between which a sum of money is the same
_PAID = ("openai:", "tinker:")

_WIDEST = 160  # characters of what is said of one
_PROBE = Sampling(temperature=0.0, max_tokens=1)


@dataclass(frozen=True)
class Inspected:
    """One thing that was looked at: `role` is what it is to the release or student.

    `until` is the day on which it ends, where its server says so.
    """

    role: str
    name: str
    state: State
    says: str
    until: date | None = None


@dataclass(frozen=True)
class Inspection:
    """Everything that a release or a student stands on; `rebuild` is the command that renews it."""

    target: str
    inspected: tuple[Inspected, ...]
    rebuild: str | None

    @property
    def failing(self) -> list[Inspected]:
        """What ended, ends soon, changed, or could not be looked at."""
        return [one for one in self.inspected if one.state != "holds"]

    def text(self) -> str:
        """A line for each that was looked at."""
        return aligned([_HEAD, *self._rows()])

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        inspected = [
            asdict(one) | {"until": one.until.isoformat() if one.until else None}
            for one in self.inspected
        ]
        return {"target": self.target, "inspected": inspected, "rebuild": self.rebuild}

    def require(self) -> None:
        """Raise `GateError`, which names what fails and what to do, unless all holds."""
        if self.failing:
            said = "; ".join(f"{one.role} {one.name}: {one.state}" for one in self.failing)
            todo = f" To renew it: {self.rebuild}" if self.rebuild else ""
            raise GateError(f"{self.target!r} does not stand as it did ({said}).{todo}")

    def _repr_html_(self) -> str:
        title = f"{self.target}: {'fails' if self.failing else 'holds'}"
        return html_card(title, html_table(self._rows(), _HEAD), self.rebuild or "")

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (one.role, one.name, one.state, one_line(one.says, _WIDEST)) for one in self.inspected
        ]


@dataclass(frozen=True)
class _Subject:
    """A model that is to be looked for; `identity` is what it was, where that was written down."""

    role: str
    reference: str
    identity: str | None = None


def check(
    target: str | Path,
    *,
    days: int = 30,
    prices: Prices | None = None,
    today: date | None = None,
) -> Inspection:
    """Look whether all that a release, a training or a run stands on will be there in `days` days.

    Each model is looked for on its server, at no cost but a trained student's: that answers one
    token. With `prices`, every model must have one, and the release must not cost otherwise today.
    Raises `DatasetError` where the target is none of the three.

        check("runs/support", days=60).require()
    """
    now = today or datetime.now(UTC).date()
    training, known = find_training(target), find_release(str(target), ())
    config = {} if training is None else read_training(training)[0]
    trained_on = str(config.get("dataset", {}).get("path", ""))
    if known is None and trained_on:
        known = find_release(trained_on, ())
    if training is None and known is None:
        raise DatasetError(
            f"{str(target)!r} is no release, training or run: expected a folder that `publish`, "
            "`train` or `run` wrote, or a Hub dataset as name@revision."
        )
    release = None if known is None else known.path
    subjects = list[_Subject]()
    if training is not None:
        subjects += [_Subject("base", config["student"], config.get("identity"))]
        subjects += [_Subject("student", str(training))]
    subjects += _of_release(release) if release else ()
    if (file := report_file(target)).name == "report.json" and file.is_file():
        judge = (read_report(target).get("judge") or {}).get("model")
        subjects += [_Subject("judge", judge)] if judge else []
    subjects = list({(one.role, one.reference): one for one in subjects}.values())
    found = [_look(one, now + timedelta(days=days)) for one in subjects]
    if prices is not None:
        found += _priced(prices, {one.reference for one in subjects}, release, now)
    return Inspection(str(target), tuple(found), _rebuild(found, training, config, release))


def _of_release(release: Path) -> Iterator[_Subject]:
    manifest = read_manifest(release)
    if not (release / "recipe").is_dir():
        yield from (_Subject("teacher", one) for one in str(manifest["teacher"]).split(" + "))
        return
    recipe = load_recipe(release)
    for teacher in recipe.all_teachers:
        single = len(recipe.all_teachers) == 1
        yield _Subject("teacher", teacher.model, manifest.get("identity") if single else None)
    for part in recipe.parts:
        if part.judge and part.judge.model != OWN_TEACHER:
            yield _Subject("judge", part.judge.model)


def _look(subject: _Subject, horizon: date) -> Inspected:
    """What became of one model."""
    role, reference, written = subject.role, subject.reference, subject.identity
    said, until = "is there", None
    try:
        if role == "student":
            said, until = _answers(reference)
        elif reference.startswith("openai:"):
            until = _listed(reference)
        elif weights := connect(reference).weights:
            own = f"{reference}/{weights}"
            if written and not f"{written}/".startswith(f"{own}/"):
                said = f"its weights are others: they were {written}, and are {own}"
                return Inspected(role, reference, "changed", said)
    except (AccessError, ServiceError) as error:
        return Inspected(role, reference, "unknown", str(error))
    except (ModelError, RequestError) as error:
        return Inspected(role, reference, "gone", str(error))
    if until is not None and until <= horizon:
        return Inspected(role, reference, "ends", f"is switched off on {until}", until)
    return Inspected(role, reference, "holds", said, until)


def _answers(training: str) -> tuple[str, date | None]:
    """Sample one token of a trained student, and look when its server deletes it."""
    sampler = open_sampler(training)
    run_in_thread(lambda: sampler.sample([{"role": "user", "content": "Hello"}], _PROBE))
    connection = connect(training)
    path = connection.model_path or ""
    if connection.server is not None:
        return "answers", None  # a store on this machine deletes nothing by itself
    try:
        with explained(path):
            run = path.removeprefix("tinker://").split("/")[0]
            saved = connection.rest.list_checkpoints(run).result().checkpoints
    except DistillError:
        return "answers; its server doesn't say until when", None
    until = next((one.expires_at for one in saved if one.tinker_path == path), None)
    return "answers", until.date() if until else None


def _listed(reference: str) -> date | None:
    """Find a model on its OpenAI-compatible server; the day on which it is switched off, if said.

    Raises `ModelError` where the server doesn't know it, `ServiceError` where it has no list.
    """
    name = reference.removeprefix("openai:")
    sampler = OpenAISampler(name)
    sampler.reach()
    status, text = sampler.endpoint.look(f"models/{quote(name, safe='')}", reference)
    found = as_object(text) if status == 200 else {}
    if found.get("id") != name:
        # Some servers have a list, and no address for each of its models.
        status, text = sampler.endpoint.look("models", reference)
        listed = as_object(text).get("data") if status == 200 else None
        if not isinstance(listed, list):
            raise ServiceError(f"{sampler.endpoint} has no list of models that names {name!r}")
        own = [one for one in listed if isinstance(one, Mapping) and one.get("id") == name]
        if not own:
            raise ModelError(f"{sampler.endpoint} has {len(listed)} models, and none of that name")
        found = dict(own[0])
    return _day(next((found[key] for key in _ENDS if found.get(key)), None))


def _day(said: Any) -> date | None:
    """A day as servers write it: ISO 8601, seconds since 1970, or one of these by its use."""
    if isinstance(said, Mapping):
        return _day(next((said[use] for use in _USES if said.get(use)), None))
    try:
        if isinstance(said, int | float):
            return datetime.fromtimestamp(said, UTC).date()
        return datetime.fromisoformat(said).date() if isinstance(said, str) else None
    except (ValueError, OverflowError, OSError):
        return None


def _priced(
    prices: Prices, models: set[str], release: Path | None, now: date
) -> Iterator[Inspected]:
    """Whether prices are new, name each model, and make of a release what they made of it."""
    age = (now - prices.date).days
    name = f"of {prices.date}"
    if age > _PRICES_AGE:
        yield Inspected("prices", name, "unknown", f"were looked up {age} days ago: look again")
    for model in sorted(one for one in models if one.startswith(_PAID)):
        try:
            prices.of(model)
        except DistillError as error:
            yield Inspected("price", model, "unknown", str(error))
    manifest = read_manifest(release) if release else {}
    cost, tokens = manifest.get("cost"), manifest.get("tokens")
    if cost and tokens and cost["amount"] and cost["currency"] == prices.currency:
        yield from _costs(prices, str(manifest["teacher"]), tokens, cost)


def _costs(
    prices: Prices, teacher: str, tokens: Mapping[str, int], cost: Mapping[str, Any]
) -> Iterator[Inspected]:
    try:
        price = prices.of(teacher)
    except DistillError:
        return  # named already, or of several teachers, whose shares are not known
    now = price.of(tokens["prompt"], tokens.get("cached", 0), tokens["response"])
    ratio = now / cost["amount"]
    said = f"its answers cost {cost['amount']:.4g} {prices.currency}, and cost {now:.4g} now"
    state: State = "holds" if _CHEAPER <= ratio <= _DEARER else "changed"
    yield Inspected("price", teacher, state, said)


def _rebuild(
    found: list[Inspected], training: Path | None, config: Mapping[str, Any], release: Path | None
) -> str | None:
    """The one command that renews what fails, None where nothing does."""
    failing = {one.role for one in found if one.state in ("ends", "changed", "gone")}
    if "teacher" in failing and release is not None:
        return f"distill-datasets generate {release} --teacher MODEL --out {release}-next"
    if failing & {"base", "student"} and training is not None:
        base = "MODEL" if "base" in failing else config["student"]
        dataset = release or config.get("dataset", {}).get("path", "DATASET")
        return f"distill-datasets train {dataset} --student {base} --out {training}-next"
    return None

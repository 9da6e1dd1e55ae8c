"""What the student saves: its tokens, the teacher's and the user's prices, line by line."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from distill_datasets.drawing import Mark, curves, short
from distill_datasets.errors import PriceError
from distill_datasets.files import read_object, read_report, report_file
from distill_datasets.generation.pricing import HOURS_A_MONTH, Price, Prices
from distill_datasets.tables import aligned, html_card, html_preformatted, html_table

if TYPE_CHECKING:
    from pandas import DataFrame

VOLUMES = (10_000, 100_000, 1_000_000)
TEACHER, CACHED, STUDENT = "teacher", "teacher, cached", "student"
_DAYS = 365 / 12  # of a month
_MONTHS = 12
_LONG = 365  # days to break even that are worth a remark


@dataclass(frozen=True)
class SpendingRecord:
    """Where what was spent is written down.

    `generation` is a run's generation.json or a release's manifest, `trainings` are training
    folders, `other` is what nothing here knows of.
    """

    generation: Mapping[str, Any] | None = None
    trainings: Sequence[Path] = ()
    other: float = 0.0

    @property
    def student(self) -> str | None:
        """The model that the last training started from, by its reference."""
        for folder in reversed(self.trainings):
            config = read_object(folder / "config.json") or {}
            if isinstance(config.get("student"), str):
                return str(config["student"])
        return None


def money(
    report: Mapping[str, Any],
    prices: Prices,
    *,
    spending: SpendingRecord | None = None,
    volumes: Sequence[int] = VOLUMES,
    cached_share: float | None = None,
) -> dict[str, Any]:
    """What a query costs by teacher and student, what was spent, and when that is back.

    `volumes` are queries a month. `cached_share` is the share of the teacher's prompt tokens that
    its server reads from a cache; without it, what the report or the generation measured, or else
    all that the student's prompt lacks. The price file names the teacher and the model that the
    student was trained from, or has prices under `teacher` and `student`. Raises `PriceError`
    where a price or a count of tokens is missing.

        money(report.data, Prices.load("prices.yaml"), volumes=[50_000])["advice"]
    """
    paid = spending or SpendingRecord()
    teacher = _price(prices, "teacher", report["systems"]["teacher"]["model"])
    names = _student_models(report, paid)
    student = _price(prices, "student", *names)
    costs = _Costs(report, teacher, student, *_cached(report, paid.generation, cached_share))
    spent = dict(_spent(report, prices, paid, costs))
    total = sum(one["amount"] or 0.0 for one in spent.values())
    found = {
        "currency": prices.currency,
        "priced_at": prices.date.isoformat(),
        "per_query": costs.per_query,
        "hosting_per_month": {TEACHER: teacher.hosting, STUDENT: student.hosting},
        "cached_share": costs.share,
        "spent": {"total": total, "parts": spent},
        "savings": {name: costs.saving(name, total) for name in (TEACHER, CACHED)},
        "volumes": [costs.month(queries, total) for queries in volumes],
        "latency_ms": _latencies(report),
    }
    return {
        **found,
        "advice": _advice(found),
        "arithmetic": [*costs.arithmetic(prices.currency), *_sums(found)],
        "notes": [*_notes(found, teacher, costs)],
    }


class RunCosts(dict[str, Any]):
    """What `money_of_run` found; a notebook shows its advice, its volumes and their curves."""

    def to_pandas(self) -> "DataFrame":
        """A row a volume."""
        from pandas import json_normalize

        return json_normalize(self["volumes"])

    def _repr_html_(self) -> str:
        head, *cells = volume_cells(self)
        lines = html_preformatted("\n".join([*self["arithmetic"], *self["notes"]]))
        return html_card(self["advice"], html_table(cells, head), cost_curves(self), lines)


def money_of_run(run: Path | str, prices: Prices, **options: Any) -> RunCosts:
    """`money` of a run's folder: its report, what it generated, and what it trained."""
    folder, report = report_file(run).parent, read_report(run)
    other = options.pop("other", 0.0)
    manifest = Path(report["dataset"]["path"]) / "manifest.json"
    places = (folder / "answers" / "generation.json", folder / "release" / "manifest.json")
    known = next((one for one in (*places, manifest) if one.is_file()), None)
    generation = read_object(known) if known else None
    spending = SpendingRecord(generation, _trainings(folder), other)
    return RunCosts(money(report, prices, spending=spending, **options))


def priced_models(run: Path | str) -> list[str]:
    """The models of a run that a price file names: its teacher, and what its student began as."""
    report, trainings = read_report(run), _trainings(report_file(run).parent)
    *_, student = _student_models(report, SpendingRecord(trainings=trainings))
    return list(dict.fromkeys([report["systems"]["teacher"]["model"], student]))


def _student_models(report: Mapping[str, Any], paid: SpendingRecord) -> list[str]:
    """The student's reference, and that of the model it was trained from, where that is known."""
    own, base = (
        report["systems"]["student"]["model"],
        report["systems"].get("base", {}).get("model"),
    )
    return [own, *([known] if (known := paid.student or base) else [])]


def _trainings(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("train*/metrics.jsonl"))


def money_text(found: Mapping[str, Any]) -> str:
    """The advice, the volumes as a table, and the arithmetic, for terminals and report.md."""
    head = f"{found['advice']} (in {found['currency']}, prices of {found['priced_at']})"
    table = aligned(volume_cells(found))
    return "\n\n".join([head, table, "\n".join([*found["arithmetic"], *found["notes"]])])


def cost_curves(money: Mapping[str, Any]) -> Markup:
    """Total cost over queries where nobody pays for hosting, and a month's cost otherwise."""
    costs, hosting, spent = money["per_query"], money["hosting_per_month"], money["spent"]["total"]
    monthly = any(hosting.values())
    turn = {
        name: one["pays_from" if monthly else "break_even_queries"]
        for name, one in money["savings"].items()
    }
    turns = {name: one for name, one in turn.items() if one}
    ends = [*turns.values(), *(month["queries"] for month in money["volumes"])]
    low, high = max(1, min(ends) / 10), max(ends) * 10
    queries = [low * (high / low) ** (step / 60) for step in range(61)]

    def cost(name: str, number: float) -> float:
        fixed = hosting.get(name, 0.0) if monthly else spent if name == STUDENT else 0.0
        return float(fixed + costs[name] * number)

    lines = {name: [(one, cost(name, one)) for one in queries] for name in costs}
    marks = [
        Mark(one, cost(STUDENT, one), f"{short(one)}: break-even, {name}")
        for name, one in turns.items()
        if name != CACHED or costs[name] != costs[TEACHER]
    ]
    return curves(
        {name: line for name, line in lines.items() if line[-1][1] > 0},
        x="queries a month" if monthly else "queries",
        y=f"{'cost of a month' if monthly else 'cost in all'} in {money['currency']}",
        log=(True, True),
        marks=marks,
    )


def _price(prices: Prices, role: str, *models: str) -> Price:
    if role in prices.models:
        return prices.models[role]
    for model in models[:-1]:
        if model in prices.models:
            return prices.models[model]
    try:
        return prices.of(models[-1])
    except PriceError as error:
        raise PriceError(
            f"{error} Prices under the name {role!r} are the {role}'s too; a model that you host "
            "has `hosting_per_hour` or `hosting_per_month`, beside `prompt: 0` and `response: 0`."
        ) from error


@dataclass(frozen=True)
class _Costs:
    """What a query and a month cost; `share` of the teacher's prompt is read from a cache."""

    report: Mapping[str, Any]
    teacher: Price
    student: Price
    share: float
    source: str

    def tokens(self, system: str) -> tuple[float, float]:
        """Mean tokens of a query: of its prompt and of its response."""
        counted = self.report["systems"][system]["tokens"]
        prompt, response = counted["prompt_mean"], counted["response_mean"]
        if prompt is None or response is None:
            raise PriceError(
                f"The server of the {system} doesn't count tokens, so nobody can say what a query "
                "costs. Measure with a server that counts (`usage`)."
            )
        return prompt, response

    @property
    def per_query(self) -> dict[str, float]:
        """What a query costs by each way to answer it, hosting aside."""
        prompt, response = self.tokens("teacher")
        own = self.tokens("student")
        return {
            TEACHER: self.teacher.of(prompt, 0, response),
            CACHED: self.teacher.of(prompt, prompt * self.share, response),
            STUDENT: self.student.of(own[0], 0, own[1]),
        }

    def saving(self, other: str, spent: float) -> dict[str, float | None]:
        """What a query saves, hosting aside, and the queries after which what was spent is back.

        `pays_from` is the number of queries a month that pays for hosting.
        """
        costs = self.per_query
        saved = costs[other] - costs[STUDENT]
        hosting = self.student.hosting - self.teacher.hosting
        ends = hosting <= 0 < saved
        return {
            "per_query": saved,
            "percent": 100 * saved / costs[other] if costs[other] else None,
            "break_even_queries": math.ceil(round(spent / saved, 6)) if ends else None,
            "pays_from": math.ceil(round(hosting / saved, 6)) if saved > 0 < hosting else None,
        }

    def month(self, queries: int, spent: float) -> dict[str, Any]:
        """A month of so many queries, hosting included, and when what was spent is back."""
        costs = {
            name: queries * each + (self.student if name == STUDENT else self.teacher).hosting
            for name, each in self.per_query.items()
        }
        return {
            "queries": queries,
            "cost": costs,
            "cheapest": min((TEACHER, CACHED, STUDENT), key=lambda name: costs[name]),
            "against": {
                name: _against(costs[name], costs[STUDENT], queries, spent)
                for name in (TEACHER, CACHED)
            },
        }

    def arithmetic(self, currency: str) -> Iterator[str]:
        """How each cost of a query comes about."""
        ways = [(TEACHER, "teacher", self.teacher, 0.0), (STUDENT, "student", self.student, 0.0)]
        if self.teacher.cached is not None:
            ways.append((CACHED, "teacher", self.teacher, self.share))
        for name, system, of, share in ways:
            prompt, response = self.tokens(system)
            read = prompt * share
            cached = f"{_n(read, 2)} cached x {_n(of.cached or 0)} + " if name == CACHED else ""
            yield (
                f"{name}: ({_n(prompt - read, 2)} prompt x {_n(of.prompt)} + {cached}"
                f"{_n(response, 2)} response x {_n(of.response)}) / 1M = "
                f"{_money(self.per_query[name])} {currency} a query"
            )
        for name, of in ((TEACHER, self.teacher), (STUDENT, self.student)):
            if of.hosting_per_hour is not None:
                each = f"{_n(of.hosting_per_hour)} x {HOURS_A_MONTH} hours = "
                yield f"hosting of the {name}: {each}{_n(of.hosting)} {currency} a month"
            elif of.hosting:
                yield f"hosting of the {name}: {_n(of.hosting)} {currency} a month"


def _against(other: float, own: float, queries: int, spent: float) -> dict[str, float | None]:
    """What a month saves, when what was spent is back, and what a year returns of it."""
    saved = other - own
    days = spent / saved * _DAYS if saved > 0 else None
    return {
        "saving": saved,
        "percent": 100 * saved / other if other else None,
        "break_even_days": days,
        "break_even_queries": None if days is None else math.ceil(round(days / _DAYS * queries, 6)),
        "first_year_return": (_MONTHS * saved - spent) / spent if spent else None,
    }


def _cached(
    report: Mapping[str, Any], generation: Mapping[str, Any] | None, given: float | None
) -> tuple[float, str]:
    """The share of the teacher's prompt tokens that come from a cache, and who says so."""
    if given is not None:
        return given, "as given"
    tokens = report["systems"]["teacher"]["tokens"]
    prompt, cached = tokens["prompt_mean"], tokens.get("cached_mean")
    if prompt and cached is not None:
        return cached / prompt, "as measured"
    counted = (generation or {}).get("tokens") or {}
    if counted.get("prompt") and counted.get("cached") is not None:
        return counted["cached"] / counted["prompt"], "as measured while generating"
    own = report["systems"]["student"]["tokens"]["prompt_mean"] or 0
    share = max(0.0, 1 - own / prompt) if prompt else 0.0
    return share, "nobody measured it: all that the student's prompt lacks"


def _spent(
    report: Mapping[str, Any], prices: Prices, paid: SpendingRecord, costs: _Costs
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each stage cost, with how that is known; an amount of None is one that nobody knows."""
    yield "generation", _generated(paid.generation, prices, costs.teacher)
    for folder in paid.trainings:
        yield f"training ({folder.name})", _trained(folder, prices)
    yield "measuring", _measured(report, prices, costs)
    if paid.other:
        yield "other", {"amount": paid.other, "said": "as given"}


def _measured(report: Mapping[str, Any], prices: Prices, costs: _Costs) -> dict[str, Any]:
    counted = report.get("spent")
    if counted and counted["currency"] == prices.currency:
        return {"amount": counted["amount"], "said": "as counted while measuring"}
    systems, rows = report["systems"], report["n"]
    each = [
        _asked(system, costs.teacher if name.startswith(TEACHER) else costs.student)
        for name, system in systems.items()
    ]
    said = f"at most: {rows:,} rows to {len(systems)} systems, those answered before too"
    return {"amount": rows * sum(each), "said": said}


def _asked(system: Mapping[str, Any], price: Price) -> float:
    """What a query of a system costs, as far as its tokens are counted."""
    tokens = system["tokens"]
    return price.of(tokens["prompt_mean"] or 0, 0, tokens["response_mean"] or 0)


def _generated(
    generation: Mapping[str, Any] | None, prices: Prices, teacher: Price
) -> dict[str, Any]:
    cost = (generation or {}).get("cost")
    if cost and cost["currency"] == prices.currency:
        day = f", prices of {cost['priced_at']}" if cost.get("priced_at") else ""
        return {"amount": cost["amount"], "said": f"as counted{day}"}
    tokens = (generation or {}).get("tokens") or {}
    if not tokens.get("prompt"):
        return {"amount": None, "said": "no count of its tokens is here"}
    counts = [tokens[name] for name in ("prompt", "cached", "response")]
    said = "{:,} prompt tokens, {:,} of them cached, {:,} of responses".format(*counts)
    return {"amount": teacher.of(*counts), "said": said}


def _trained(folder: Path, prices: Prices) -> dict[str, Any]:
    lines = [*_lines(folder / "metrics.jsonl")]
    student = (read_object(folder / "config.json") or {}).get("student", "")
    tokens = sum(line.get("tokens", 0) for line in lines)
    if spent := [line["spent"] for line in lines if "spent" in line]:
        return {"amount": spent[-1], "said": "as counted while training"}
    price = prices.models.get(student) or prices.models.get("student")
    if price is None or price.train is None:
        said = f"{tokens:,} tokens, and no price for training {student!r} (`train`)"
        return {"amount": None, "said": said}
    amount = tokens * price.train / 1e6
    return {"amount": amount, "said": f"{tokens:,} tokens x {_n(price.train)} / 1M"}


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """The lines of a training's metrics; a killed process may have left one that is broken."""
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, Mapping):
            yield found


def _latencies(report: Mapping[str, Any]) -> dict[str, float]:
    """Median latencies, where they were measured."""
    systems = report["systems"]
    found = {
        TEACHER: systems["teacher"].get("latency_uncached_ms"),
        CACHED: systems["teacher"].get("latency_ms"),
        STUDENT: systems["student"].get("latency_ms"),
    }
    return {name: timed["p50"] for name, timed in found.items() if timed}


def _sums(found: Mapping[str, Any]) -> Iterator[str]:
    """What was spent, what a query saves, and when the one makes up for the other."""
    spent, currency = found["spent"], found["currency"]
    for name, part in spent["parts"].items():
        amount = "unknown" if part["amount"] is None else _money(part["amount"])
        yield f"spent on {name}: {amount} ({part['said']})"
    known = [_money(part["amount"]) for part in spent["parts"].values() if part["amount"]]
    yield f"spent: {' + '.join(known) or '0'} = {_money(spent['total'])} {currency}"
    costs = found["per_query"]
    for name, saving in found["savings"].items():
        if name == CACHED and costs[CACHED] == costs[TEACHER]:
            continue
        share = "" if saving["percent"] is None else f" a query, {saving['percent']:.1f} %"
        yield (
            f"saved against the {name}: {_money(costs[name])} - {_money(costs[STUDENT])} = "
            f"{_money(saving['per_query'])}{share}; {_money(1e6 * saving['per_query'])} a million "
            "queries"
        )
        if saving["break_even_queries"] is not None:
            yield (
                f"break-even against the {name}: {_money(spent['total'])} / "
                f"{_money(saving['per_query'])} = {saving['break_even_queries']:,} queries"
            )
        elif saving["pays_from"] is not None:
            yield f"hosting pays against the {name} from {saving['pays_from']:,} queries a month on"


def _advice(found: Mapping[str, Any]) -> str:
    cheapest = [month["cheapest"] for month in found["volumes"]]
    costs = found["per_query"]
    if not cheapest:
        return f"The student costs {_money(costs[STUDENT])} a query, the teacher " + (
            f"{_money(costs[TEACHER])}, {_money(costs[CACHED])} with its prompt cached."
        )
    if set(cheapest) == {STUDENT}:
        return "The student is the cheapest at every volume." + _pay_back(found)
    instead = "Cache the prompt instead" if CACHED in cheapest else "Keep the prompt"
    if STUDENT not in cheapest:
        return f"{instead}: the student is dearer at every volume."
    dear = [month["queries"] for month in found["volumes"] if month["cheapest"] != STUDENT]
    return (
        f"{instead} at {', '.join(f'{one:,}' for one in dear)} queries a month; the student is "
        + ("the cheapest at the other volumes." + _pay_back(found))
    )


def _pay_back(found: Mapping[str, Any]) -> str:
    """A remark where the student takes long to be worth what it cost."""
    won = [month for month in found["volumes"] if month["cheapest"] == STUDENT]
    rival = CACHED if found["per_query"][CACHED] < found["per_query"][TEACHER] else TEACHER
    late = [m for m in won if (m["against"][rival]["break_even_days"] or 0) > _LONG]
    if not late:
        return ""
    slow = late[-1]
    days = slow["against"][rival]["break_even_days"]
    cure = "caching the prompt" if rival == CACHED else "keeping the prompt"
    return (
        f" But at {slow['queries']:,} queries a month it takes {days:,.0f} days to be back what "
        f"was spent, against {cure}."
    )


def _notes(found: Mapping[str, Any], teacher: Price, costs: _Costs) -> Iterator[str]:
    if teacher.cached is None:
        yield (
            "The price file names no price for the teacher's cached tokens (`cached`): where its "
            "provider has one, caching the prompt may be the cheapest."
        )
    else:
        yield f"Cached: {100 * costs.share:.1f} % of the teacher's prompt tokens, {costs.source}."
    unknown = [name for name, part in found["spent"]["parts"].items() if part["amount"] is None]
    if unknown:
        yield f"Left out, since nobody says what it cost: {', '.join(unknown)}."
    if times := found["latency_ms"]:
        said = ", ".join(f"{name} {value:.1f}" for name, value in times.items())
        yield f"Median latency in ms: {said}."


def volume_cells(found: Mapping[str, Any]) -> Iterator[list[str]]:
    """A month of each volume beside each way to keep the prompt, below a line of headings."""
    both = found["per_query"][CACHED] != found["per_query"][TEACHER]
    yield ["queries a month", "against", "costs", STUDENT, "saved", "back in days", "first year"]
    for month in found["volumes"]:
        for name in (TEACHER, CACHED) if both else (TEACHER,):
            against, costs = month["against"][name], month["cost"]
            share = "" if against["percent"] is None else f" ({against['percent']:.1f} %)"
            days, returned = against["break_even_days"], against["first_year_return"]
            yield [
                f"{month['queries']:,}",
                name,
                f"{costs[name]:,.2f}",
                f"{costs[STUDENT]:,.2f}",
                f"{against['saving']:,.2f}{share}",
                _days_text(days),
                "-" if returned is None else f"{100 * returned:+,.0f} %",
            ]


def _days_text(days: float | None) -> str:
    if days is None:
        return "never"
    return f"{days:,.1f}" if days >= 1 or not days else f"{days:.2g}"


def _n(number: float, digits: int = 6) -> str:
    """A price or a count without needless digits."""
    return f"{number:,.{digits}f}".rstrip("0").rstrip(".")


def _money(number: float) -> str:
    """An amount: in cents where it is large, with four figures where it is small."""
    if number == 0 or abs(number) >= 1:
        return f"{number:,.2f}"
    text = f"{number:.{3 - math.floor(math.log10(abs(number)))}f}".rstrip("0")
    return f"{number:.2f}" if len(text.partition(".")[2]) < 2 else text

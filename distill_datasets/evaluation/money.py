"""What the student saves: its tokens, the teacher's and the user's prices, line by line."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from distill_datasets.drawing import Mark, curves, short
from distill_datasets.errors import PriceError
from distill_datasets.files import as_object, read_object, read_report, report_file
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

    @classmethod
    def of_run(
        cls, run: Path | str, report: Mapping[str, Any], other: float = 0.0
    ) -> "SpendingRecord":
        """That of a run's folder, beside whose report it is."""
        folder = report_file(run).parent
        places = (
            folder / "answers" / "generation.json",
            folder / "release" / "manifest.json",
            Path(report["dataset"]["path"]) / "manifest.json",
        )
        known = next((one for one in places if one.is_file()), None)
        trainings = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
        return cls(read_object(known) if known else None, trainings, other)

    @property
    def student(self) -> str | None:
        """The model that the last training started from, by its reference."""
        for folder in reversed(self.trainings):
            config = read_object(folder / "config.json")
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
    student = _price(prices, "student", *_student_models(report, paid))
    share, source = _cached(report, paid.generation, cached_share)
    long, short = (_tokens(report, name) for name in ("teacher", "student"))
    ways = {
        TEACHER: _Way(teacher, *long),
        CACHED: _Way(teacher, *long, share),
        STUDENT: _Way(student, *short),
    }
    parts = {
        "generation": _generated(paid.generation, prices, teacher),
        **{f"training ({folder.name})": _trained(folder, prices) for folder in paid.trainings},
        "measuring": _measured(report, prices, teacher, student),
        **({"other": {"amount": paid.other, "said": "as given"}} if paid.other else {}),
    }
    total = sum(one["amount"] or 0.0 for one in parts.values())
    found: dict[str, Any] = {
        "currency": prices.currency,
        "priced_at": prices.date.isoformat(),
        "per_query": {name: way.each for name, way in ways.items()},
        "hosting_per_month": {TEACHER: teacher.hosting, STUDENT: student.hosting},
        "cached_share": share,
        "spent": {"total": total, "parts": parts},
        "savings": {name: _saving(ways[name], ways[STUDENT], total) for name in (TEACHER, CACHED)},
        "volumes": [_month(ways, queries, total) for queries in volumes],
        "latency_ms": _latencies(report),
    }
    found["advice"] = _advice(found)
    found["arithmetic"] = [*_arithmetic(ways, prices.currency), *_sums(found)]
    found["notes"] = [*_notes(found, teacher, source)]
    return found


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
    report, other = read_report(run), options.pop("other", 0.0)
    spending = SpendingRecord.of_run(run, report, other)
    return RunCosts(money(report, prices, spending=spending, **options))


def priced_models(run: Path | str) -> list[str]:
    """The models of a run that a price file names: its teacher, and what its student began as."""
    report = read_report(run)
    *_, student = _student_models(report, SpendingRecord.of_run(run, report))
    return list(dict.fromkeys([report["systems"]["teacher"]["model"], student]))


def _student_models(report: Mapping[str, Any], paid: SpendingRecord) -> list[str]:
    """The student's reference, and that of the model it was trained from, where that is known."""
    systems = report["systems"]
    base = paid.student or systems.get("base", {}).get("model")
    return [systems["student"]["model"], *([base] if base else [])]


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
    for name in (role, *models[:-1]):
        if name in prices.models:
            return prices.models[name]
    try:
        return prices.of(models[-1])
    except PriceError as error:
        raise PriceError(
            f"{error} Prices under the name {role!r} are the {role}'s too; a model that you host "
            "has `hosting_per_hour` or `hosting_per_month`, beside `prompt: 0` and `response: 0`."
        ) from error


@dataclass(frozen=True)
class _Way:
    """A way to answer a query: mean tokens, their price, the share of the prompt that is cached."""

    price: Price
    prompt: float
    response: float
    cached: float = 0.0

    @property
    def each(self) -> float:
        """What a query costs, hosting aside."""
        return self.price.of(self.prompt, self.prompt * self.cached, self.response)


def _tokens(report: Mapping[str, Any], system: str) -> tuple[float, float]:
    counted = report["systems"][system]["tokens"]
    prompt, response = counted["prompt_mean"], counted["response_mean"]
    if prompt is None or response is None:
        raise PriceError(
            f"The server of the {system} doesn't count tokens, so nobody can say what a query "
            "costs. Measure with a server that counts (`usage`)."
        )
    return prompt, response


def _saving(other: _Way, own: _Way, spent: float) -> dict[str, float | None]:
    """What a query saves, hosting aside, and the queries after which what was spent is back.

    `pays_from` is the number of queries a month that pays for hosting.
    """
    saved = other.each - own.each
    hosting = own.price.hosting - other.price.hosting
    return {
        "per_query": saved,
        "percent": 100 * saved / other.each if other.each else None,
        "break_even_queries": _whole(spent / saved) if hosting <= 0 < saved else None,
        "pays_from": _whole(hosting / saved) if saved > 0 < hosting else None,
    }


def _whole(queries: float) -> int:
    return math.ceil(round(queries, 6))


def _month(ways: Mapping[str, _Way], queries: int, spent: float) -> dict[str, Any]:
    """A month of so many queries, hosting included, when what was spent is back, and what a year
    returns of it.
    """
    costs = {name: queries * way.each + way.price.hosting for name, way in ways.items()}
    against = {}
    for name in (TEACHER, CACHED):
        saved = costs[name] - costs[STUDENT]
        days = spent / saved * _DAYS if saved > 0 else None
        against[name] = {
            "saving": saved,
            "percent": 100 * saved / costs[name] if costs[name] else None,
            "break_even_days": days,
            "break_even_queries": None if days is None else _whole(days / _DAYS * queries),
            "first_year_return": (_MONTHS * saved - spent) / spent if spent else None,
        }
    cheapest = min(costs, key=costs.__getitem__)
    return {"queries": queries, "cost": costs, "cheapest": cheapest, "against": against}


def _arithmetic(ways: Mapping[str, _Way], currency: str) -> Iterator[str]:
    for name in (TEACHER, STUDENT, CACHED):
        way, price = ways[name], ways[name].price
        if name == CACHED and price.cached is None:
            continue
        read = way.prompt * way.cached
        cached = f"{_n(read, 2)} cached x {_n(price.cached or 0)} + " if name == CACHED else ""
        yield (
            f"{name}: ({_n(way.prompt - read, 2)} prompt x {_n(price.prompt)} + {cached}"
            f"{_n(way.response, 2)} response x {_n(price.response)}) / 1M = "
            f"{_money(way.each)} {currency} a query"
        )
    for name in (TEACHER, STUDENT):
        price = ways[name].price
        if price.hosting_per_hour is not None:
            each = f"{_n(price.hosting_per_hour)} x {HOURS_A_MONTH} hours = "
            yield f"hosting of the {name}: {each}{_n(price.hosting)} {currency} a month"
        elif price.hosting:
            yield f"hosting of the {name}: {_n(price.hosting)} {currency} a month"


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


def _generated(
    generation: Mapping[str, Any] | None, prices: Prices, teacher: Price
) -> dict[str, Any]:
    """What the answers cost, with how that is known; an amount of None is one that nobody knows."""
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
    """What a training cost, by its metrics; a killed process may have left a broken line."""
    file = folder / "metrics.jsonl"
    text = file.read_text("utf-8", "replace") if file.is_file() else ""
    lines = [as_object(line) for line in text.splitlines()]
    if spent := [line["spent"] for line in lines if "spent" in line]:
        return {"amount": spent[-1], "said": "as counted while training"}
    student = read_object(folder / "config.json").get("student", "")
    tokens = sum(line.get("tokens", 0) for line in lines)
    price = prices.models.get(student) or prices.models.get("student")
    if price is None or price.train is None:
        said = f"{tokens:,} tokens, and no price for training {student!r} (`train`)"
        return {"amount": None, "said": said}
    amount = tokens * price.train / 1e6
    return {"amount": amount, "said": f"{tokens:,} tokens x {_n(price.train)} / 1M"}


def _measured(
    report: Mapping[str, Any], prices: Prices, teacher: Price, student: Price
) -> dict[str, Any]:
    """What measuring cost, as far as the systems' tokens are counted."""
    counted = report.get("spent")
    if counted and counted["currency"] == prices.currency:
        return {"amount": counted["amount"], "said": "as counted while measuring"}
    systems, rows, each = report["systems"], report["n"], 0.0
    for name, system in systems.items():
        price = teacher if name.startswith(TEACHER) else student
        tokens = system["tokens"]
        each += price.of(tokens["prompt_mean"] or 0, 0, tokens["response_mean"] or 0)
    said = f"at most: {rows:,} rows to {len(systems)} systems, those answered before too"
    return {"amount": rows * each, "said": said}


def _latencies(report: Mapping[str, Any]) -> dict[str, float]:
    teacher, student = (report["systems"][name] for name in ("teacher", "student"))
    found = {
        TEACHER: teacher.get("latency_uncached_ms"),
        CACHED: teacher.get("latency_ms"),
        STUDENT: student.get("latency_ms"),
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
    costs, months = found["per_query"], found["volumes"]
    if not months:
        return (
            f"The student costs {_money(costs[STUDENT])} a query, the teacher "
            f"{_money(costs[TEACHER])}, {_money(costs[CACHED])} with its prompt cached."
        )
    dear = [month for month in months if month["cheapest"] != STUDENT]
    if not dear:
        return "The student is the cheapest at every volume." + _pay_back(found)
    cached = any(month["cheapest"] == CACHED for month in dear)
    instead = "Cache the prompt instead" if cached else "Keep the prompt"
    if len(dear) == len(months):
        return f"{instead}: the student is dearer at every volume."
    where = ", ".join(f"{month['queries']:,}" for month in dear)
    return (
        f"{instead} at {where} queries a month; the student is the cheapest at the other volumes."
        + _pay_back(found)
    )


def _pay_back(found: Mapping[str, Any]) -> str:
    """A remark where the student takes long to be worth what it cost."""
    rival = CACHED if found["per_query"][CACHED] < found["per_query"][TEACHER] else TEACHER
    late = [
        (month["queries"], days)
        for month in found["volumes"]
        if month["cheapest"] == STUDENT
        and (days := month["against"][rival]["break_even_days"] or 0) > _LONG
    ]
    if not late:
        return ""
    queries, days = late[-1]
    cure = "caching the prompt" if rival == CACHED else "keeping the prompt"
    return (
        f" But at {queries:,} queries a month it takes {days:,.0f} days to be back what was spent, "
        f"against {cure}."
    )


def _notes(found: Mapping[str, Any], teacher: Price, source: str) -> Iterator[str]:
    if teacher.cached is None:
        yield (
            "The price file names no price for the teacher's cached tokens (`cached`): where its "
            "provider has one, caching the prompt may be the cheapest."
        )
    else:
        share = 100 * found["cached_share"]
        yield f"Cached: {share:.1f} % of the teacher's prompt tokens, {source}."
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
    return f"{number:,.{digits}f}".rstrip("0").rstrip(".")


def _money(number: float) -> str:
    """An amount: in cents where it is large, with four figures where it is small."""
    if number == 0 or abs(number) >= 1:
        return f"{number:,.2f}"
    text = f"{number:.{3 - math.floor(math.log10(abs(number)))}f}".rstrip("0")
    return f"{number:.2f}" if len(text.partition(".")[2]) < 2 else text

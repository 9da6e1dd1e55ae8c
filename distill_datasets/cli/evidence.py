"""The verbs that look: at a report, at a dataset's rows, at the rules of a prompt."""

import argparse
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

from distill_datasets.cli.dataset import SPEED, add_money, confirm
from distill_datasets.cli.flags import add_settings, count, quantity, read_settings, share
from distill_datasets.files import cards_folder
from distill_datasets.generation.settings import GenerateSettings


def add_cost(parser: argparse.ArgumentParser) -> None:
    """A run, the user's prices, and how much is asked."""
    parser.add_argument("run", type=Path, nargs="?", help="a run's folder, or its report.json")
    parser.add_argument("--prices", type=Path, help="a file with a date and prices of models")
    parser.add_argument(
        "--queries-per-month",
        type=quantity,
        nargs="+",
        metavar="N",
        help="how many queries a month are asked (default: 10k 100k 1m)",
    )
    parser.add_argument(
        "--cached-share",
        type=share,
        metavar="X",
        help="the share of the teacher's prompt tokens that its server reads from a cache "
        "(default: as measured)",
    )
    parser.add_argument(
        "--spent", type=float, default=0.0, metavar="X", help="what else was spent (default: 0)"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    made = parser.add_argument_group("to start a price file")
    made.add_argument("--template", action="store_true", help="print a price file to fill in")
    made.add_argument(
        "--import",
        dest="listed",
        type=Path,
        metavar="PATH",
        help="print a price file out of a list of prices: CSV, or LiteLLM's model_prices JSON",
    )
    made.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help="with --import, a model to take, as openai:gpt-5-mini or openai:mine=its-name-there; "
        "may be given several times (default: those of the run)",
    )
    made.add_argument(
        "--date",
        type=_day,
        metavar="DAY",
        help="with --import, the day of the prices (default: on which the list was written)",
    )


def cost(options: argparse.Namespace) -> None:
    """Say what a student saves, and when what was spent is back."""
    from distill_datasets.errors import SettingsError
    from distill_datasets.evaluation.money import VOLUMES, money_of_run, money_text
    from distill_datasets.generation.pricing import Prices

    if options.template:
        sys.stdout.write((cards_folder() / "prices.yaml").read_text(encoding="utf-8"))
        return
    if options.listed:
        sys.stdout.write(_import(options))
        return
    if options.run is None or options.prices is None:
        raise SettingsError(
            "cost needs a run and --prices, a file that `distill-datasets cost --template` starts."
        )
    found = money_of_run(
        options.run,
        Prices.load(options.prices),
        volumes=options.queries_per_month or VOLUMES,
        cached_share=options.cached_share,
        other=options.spent,
    )
    _print(found, money_text(found), options)


def _import(options: argparse.Namespace) -> str:
    from distill_datasets.errors import SettingsError
    from distill_datasets.evaluation.money import priced_models
    from distill_datasets.generation.pricing import import_prices

    named = options.model or (priced_models(options.run) if options.run else [])
    if not named:
        raise SettingsError("--import needs a run, or each model that it shall take as --model.")
    models = {}
    for one in named:
        reference, _, name = one.partition("=")
        models[reference] = name or reference.removeprefix("openai:").removeprefix("tinker:")
    return import_prices(options.listed, models, date=options.date).text()


def add_gate(parser: argparse.ArgumentParser) -> None:
    """A run, what it is held against, and the rules."""
    parser.add_argument("run", type=Path, nargs="?", help="a run's folder, or its report.json")
    parser.add_argument(
        "--against", type=Path, metavar="RUN", help="another run, whose student is the other"
    )
    parser.add_argument(
        "--rules", type=Path, help="a YAML file of limits (default: those of --template)"
    )
    parser.add_argument(
        "--strict", action="store_true", help="take numbers as they stand, whatever their intervals"
    )
    parser.add_argument("--json", action="store_true", help="print what was looked at as JSON")
    parser.add_argument("--template", action="store_true", help="print the rules to edit")


def gate(options: argparse.Namespace) -> None:
    """Say what was looked at, and fail where a rule does."""
    from distill_datasets.errors import SettingsError
    from distill_datasets.evaluation.gate import GateRules
    from distill_datasets.evaluation.gate import gate as look

    if options.template:
        sys.stdout.write((cards_folder() / "gate.yaml").read_text(encoding="utf-8"))
        return
    if options.run is None:
        raise SettingsError("gate needs a run's folder, with the report that `measure` wrote.")
    rules = GateRules.load(options.rules) if options.rules else GateRules()
    if options.strict:
        rules = rules.model_copy(update={"strict": True})
    found = look(options.run, against=options.against, rules=rules)
    found.keep()
    _print(found.to_json(), found.text(), options)
    found.require()
    if not options.json:
        print(f"The student passes: none of {len(found.findings)} rules fails.")


def add_page(parser: argparse.ArgumentParser) -> None:
    """Which report, of which training, and at whose prices."""
    parser.add_argument("run", type=Path, help="a run's folder, or the report.json of a split")
    parser.add_argument(
        "--training",
        type=Path,
        metavar="PATH",
        help="the folder of the student's training (default: that in RUN)",
    )
    parser.add_argument(
        "--prices", type=Path, help="a file with a date and prices, for a section on cost"
    )


def page(options: argparse.Namespace) -> None:
    """Write a report's page anew, and say where it is."""
    from distill_datasets.evaluation.money import money_of_run
    from distill_datasets.evaluation.page import write_page
    from distill_datasets.files import read_report
    from distill_datasets.generation.pricing import Prices

    data = read_report(options.run)
    if options.prices:
        data["money"] = money_of_run(options.run, Prices.load(options.prices))
    print(write_page(options.run, options.training, data=data))


def add_check(parser: argparse.ArgumentParser) -> None:
    """What is looked at, how far ahead, and at whose prices."""
    parser.add_argument(
        "target",
        help="the folder of a release, a training or a run, or a Hub dataset name@revision",
    )
    parser.add_argument(
        "--days",
        type=count,
        default=30,
        metavar="N",
        help="fail so many days before a model is switched off (default: 30)",
    )
    parser.add_argument(
        "--prices", type=Path, help="a file with a date and prices, to see whether they still hold"
    )
    parser.add_argument("--json", action="store_true", help="print what was looked at as JSON")


def check(options: argparse.Namespace) -> None:
    """Say what a release or a student stands on, and fail where some of it is gone."""
    from distill_datasets.generation.pricing import Prices
    from distill_datasets.serving.watch import check as look

    prices = Prices.load(options.prices) if options.prices else None
    found = look(options.target, days=options.days, prices=prices)
    _print(found.to_json(), found.text(), options)
    found.require()


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Which rows, and how many of them are looked at closely."""
    parser.add_argument(
        "dataset", help="a folder, a file, a release, or a Hub dataset as name@revision"
    )
    parser.add_argument("--config", metavar="NAME", help="the configuration, where there are more")
    parser.add_argument("--split", metavar="NAME", help="one split (default: all)")
    closely = parser.add_mutually_exclusive_group()
    closely.add_argument(
        "--sample",
        type=count,
        default=50,
        metavar="N",
        help="rows whose languages and style are looked at (default: 50)",
    )
    closely.add_argument("--all", action="store_true", help="look at those of all rows")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def profile(options: argparse.Namespace) -> None:
    """Say what the rows of a dataset are like."""
    from distill_datasets.evaluation.profile import profile as look

    sample = None if options.all else options.sample
    found = look(options.dataset, config=options.config, split=options.split, sample=sample)
    _print(found.data, found.text(), options)


def add_coverage(parser: argparse.ArgumentParser) -> None:
    """Which prompt, on how many queries, and for how much."""
    parser.add_argument("recipe", help="a shipped recipe's name, a folder, or a release")
    parser.add_argument(
        "--sample", type=count, default=20, metavar="N", help="how many queries (default: 20)"
    )
    parser.add_argument(
        "--teacher", metavar="MODEL", help="a model reference (default: the recipe's)"
    )
    parser.add_argument(
        "--out", type=Path, help="where answers are kept (default: runs/NAME/coverage)"
    )
    parser.add_argument("--yes", action="store_true", help="don't ask before something is spent")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    add_settings(parser, GenerateSettings, only=SPEED)
    add_money(parser)


def coverage(options: argparse.Namespace) -> None:
    """Say which rules of a prompt no query exercises."""
    from distill_datasets.generation.pricing import open_meter
    from distill_datasets.recipes.loading import load_recipe
    from distill_datasets.synthesis.coverage import prompt_coverage

    recipe = load_recipe(options.recipe)
    out = options.out or Path("runs") / recipe.name / "coverage"
    found = prompt_coverage(
        recipe,
        out=out,
        sample=options.sample,
        teacher=options.teacher,
        limits=read_settings(options, GenerateSettings).limits,
        meter=open_meter(options.prices, budget=options.budget, journal=out / "journal.sqlite"),
        before=lambda said: _confirm(said, sure=options.yes),
    )
    _print(found.data, f"{found.text()}\n({found.path})", options)


def _print(data: Any, text: str, options: argparse.Namespace) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) if options.json else text)


def _confirm(said: str, *, sure: bool) -> None:
    """Say what it takes, and ask a person before it is spent."""
    print(said, file=sys.stderr)
    confirm("Go on?", sure=sure)


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a day like 2026-11-01; found {text!r}"
        ) from None

"""The verbs that make a dataset, with their flags, from `new` to `publish`, `show` and `diff`."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.cli.flags import add_settings, count, flags_of, read_settings
from distill_datasets.errors import (
    GenerationError,
    OutputError,
    RecipeError,
    SettingsError,
    nearest,
)
from distill_datasets.files import TEMPLATES
from distill_datasets.generation.settings import GenerateSettings

# What a run in parts on Ray takes of the settings, and what it doesn't take of the other flags.
_ON_RAY = ("concurrency", "trust")
_NOT_ON_RAY = ("prices", "budget", "shard")
SPEED = ("concurrency", "requests_per_minute", "tokens_per_minute")
_BYTES = 4  # of a prompt, in a token, where no tokenizer is at hand
_SHOWN = 90  # characters of a description in the list of recipes

if TYPE_CHECKING:
    from distill_datasets.generation.pricing import Meter
    from distill_datasets.generation.run import Generated
    from distill_datasets.generation.shards import Share
    from distill_datasets.recipes.recipe import Recipe
    from distill_datasets.releases.release import Release


def for_each_variant(work: Callable[[argparse.Namespace], None]) -> Callable[..., None]:
    """A verb that takes --variant: all of them go into folders of their own."""

    def work_on_each(options: argparse.Namespace) -> None:
        from distill_datasets.recipes.loading import variants_of

        every = options.variant == "all"
        names = variants_of(options.recipe) if every else [options.variant]
        if not names:
            raise SettingsError(f"The recipe {options.recipe!r} has no variants: omit --variant.")
        for name in names:
            named = f"{options.recipe}:{name}" if name else options.recipe
            if every:
                print(named)
            out = options.out / name if every else options.out
            own = {"recipe": _with_canaries(named, options), "out": out}
            work(argparse.Namespace(**{**vars(options), **own}))

    return work_on_each


def _with_canaries(recipe: str, options: argparse.Namespace) -> "Recipe | str":
    """A copy of the recipe whose prompt holds planted sentences, where those are asked for."""
    from distill_datasets.recipes.loading import load_recipe
    from distill_datasets.recipes.prompt import MOST_CANARIES

    if not options.canaries:
        return recipe
    if options.canaries > MOST_CANARIES:
        raise RecipeError(
            f"--canaries: expected at most {MOST_CANARIES} sentences; found {options.canaries}."
        )
    found = load_recipe(recipe, trust=bool(options.trust))
    if found.members:
        raise RecipeError(
            f"{found.name!r} has several prompts, and canaries stand in one: plant them in one of "
            f"its recipes, {sorted(one.name for one in found.members.values())}."
        )
    return found.replace(canaries=options.canaries)


def generate(options: argparse.Namespace) -> None:
    """Ask the teachers, or only say what that would take."""
    from distill_datasets.generation.dry_run import dry_run
    from distill_datasets.generation.run import generate_on_ray
    from distill_datasets.generation.shards import Share

    _require_fitting(options)
    share = Share.parse(options.shard) if options.shard else None
    how: dict[str, Any] = {
        "out": options.out,
        "teacher": options.teacher,
        "settings": read_settings(options, GenerateSettings),
    }
    if options.dry_run:
        how |= {"prices": options.prices, "sample": options.sample or 0, "share": share}
        print(dry_run(options.recipe, **how).text())
    elif options.ray:
        made = generate_on_ray(options.recipe, parts=options.ray, **how)
        counts = f"{made.rows} rows in {options.ray} parts, {made.errors} failed"
        print(f"answers: {counts} ({made.path})")
    else:
        report_answers(ask_teachers(options, share))


def _require_fitting(options: argparse.Namespace) -> None:
    """Refuse flags that would have no effect beside the others."""
    if options.sample and not options.dry_run:
        raise SettingsError(
            "--sample asks rows for the forecast of a --dry-run: add that, or ask for the first "
            "rows with --limit."
        )
    if options.batch and options.stream:
        raise SettingsError("A batch has no first token to time: leave out --batch or --stream.")
    if options.wait is False and not options.batch:
        raise SettingsError("--no-wait is about batches: add --batch, or leave it out.")
    if options.ray is None or options.dry_run:
        return
    flags = {name: f"--{name}" for name in _NOT_ON_RAY} | flags_of(GenerateSettings, skip=_ON_RAY)
    if found := [flag for name, flag in flags.items() if getattr(options, name) is not None]:
        raise SettingsError(
            f"--ray doesn't go with {', '.join(found)}: expected only --teacher and --concurrency "
            "beside it. Leave those out, or start the parts yourself with --shard."
        )


def ask_teachers(options: argparse.Namespace, share: "Share | None" = None) -> "Generated":
    """`generation.generate` as the options say."""
    from distill_datasets.generation.run import generate as ask

    return ask(
        options.recipe,
        out=options.out,
        teacher=options.teacher,
        settings=read_settings(options, GenerateSettings),
        meter=_meter(options, share.folder(options.out) if share else options.out),
        share=share,
    )


def report_answers(made: "Generated") -> None:
    """Say what became of the rows; raises `GenerationError` where some are missing."""
    rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(made.rejected.items()))
    print(f"answers: {made.kept} kept" + (f", rejected: {rejected}" if rejected else ""))
    if made.from_ledger:
        from distill_datasets.generation.ledger import reuse_text

        print(reuse_text(made.from_ledger))
    if first := made.first_token:
        late = f"95 % within {first['p95']:.2f} s"
        print(f"first token: {first['median']:.2f} s (median of {first['answers']:,}), {late}")
    if made.errors:
        from distill_datasets.schema import failure_text

        failed = next(error for error in made.rows["error"] if error)
        raise GenerationError(
            f"{made.errors} of {len(made.rows)} rows failed, the first with: "
            f"{failure_text(failed).removesuffix('.')}. Run the same command again: it asks only "
            "for those that may yet succeed; --ask-again asks those too that were rejected for "
            "good."
        )
    if made.rejected and not made.kept:
        from distill_datasets.generation.rows import explain_rejections
        from distill_datasets.recipes.loading import load_recipe

        recipe = load_recipe(made.path / "answers")
        rows = made.rows.select_columns(["query", "raw", "rejection"]).to_list()
        raise GenerationError(f"No row can be used. {explain_rejections(rows, recipe)}")


def _meter(options: argparse.Namespace, folder: Path) -> "Meter | None":
    from distill_datasets.generation.pricing import open_meter

    journal = folder / "journal.sqlite"
    return open_meter(options.prices, budget=options.budget, journal=journal)


def synthesize(options: argparse.Namespace) -> None:
    """Let the teacher write queries."""
    from distill_datasets.synthesis.run import synthesize as write

    folder = options.out or Path(options.recipe)
    made = write(
        options.recipe,
        n=options.n,
        out=options.out,
        teacher=options.teacher,
        seed=options.seed,
        limits=read_settings(options, GenerateSettings).limits,
        meter=_meter(options, folder / "synthesis"),
    )
    print(f"{made.sentence()} ({made.path})\n{made.table()}")
    for rule in made.uncovered_rules:
        print(f"no query exercises: {rule}")


def publish(options: argparse.Namespace) -> None:
    """Make a release of a run, and push it where a repository is named."""
    for run in options.run:
        if (run / "checkpoints.jsonl").is_file():
            raise SettingsError(
                f"{str(run)!r} is a training, not a run: push its student with "
                f"`distill-datasets push {run} me/student`."
            )
    if library := _variants_in(options.run):
        for run in library:
            print(f"{run.name}:")
            publish(argparse.Namespace(**{**vars(options), "run": [run]}))
        return
    runs = options.run[0] if len(options.run) == 1 else options.run
    release = make_release(
        runs,
        out=options.out,
        version=options.version,
        ledger=options.ledger,
        prompt=options.prompt,
    )
    if options.push_to_hub is None:
        return
    from distill_datasets.releases.manifest import read_manifest
    from distill_datasets.releases.push import outgoing_text

    variant = read_manifest(release.path)["recipe_fields"].get("variant")
    config = options.config or variant or "default"
    seen = {"config": config, "private": options.private}
    print(outgoing_text(release.path, options.push_to_hub, **seen))
    confirm_push(str(release.path), options.push_to_hub, options)
    pushed = release.push_to_hub(
        options.push_to_hub,
        config=config,
        version=options.version,
        private=options.private,
        create_pr=options.create_pr,
        allow=options.allow,
    )
    name = pushed.repo if config == "default" else f"{pushed.repo}:{config}"
    place = pushed.pull_request or f"{name}@{pushed.tag} ({pushed.commit})"
    done = "pushed" if pushed.changed else "nothing to push: the Hub has"
    print(f"{done} {pushed.version}: {place}\n  {pushed.why}")


def _variants_in(runs: Sequence[Path]) -> list[Path]:
    """The runs in a folder that `generate --variant all` made; none for any other folder."""
    from distill_datasets.recipes.loading import load_recipe

    if len(runs) != 1 or (runs[0] / "answers").exists():
        return []
    found = [path.parents[2] for path in sorted(runs[0].glob("*/answers/recipe/recipe.yaml"))]
    return [run for run in found if load_recipe(run / "answers").variant == run.name]


def make_release(run: Any, **how: Any) -> "Release":
    """`release.publish`, and a line about it."""
    from distill_datasets.releases.release import publish as write

    release = write(run, **how)
    splits = ", ".join(f"{rows} {split}" for split, rows in release.splits.items())
    print(f"release {release.version}: {splits}; {release.rejected} rejected ({release.path})")
    for warning in release.warnings:
        print(f"publish: warning: {warning}", file=sys.stderr)
    return release


def confirm_push(what: str, repo: str, options: argparse.Namespace) -> None:
    """Ask a person before anything leaves the machine."""
    seen = "privately" if options.private else "for everybody"
    confirm(f"Push {what} to {repo}, {seen}?", sure=options.yes)


def confirm(question: str, *, sure: bool) -> None:
    """Raises `KeyboardInterrupt` unless a person says yes; a script has decided already."""
    if sure or not sys.stdin.isatty():
        return
    if input(f"{question} [y/N] ").strip().lower() != "y":
        raise KeyboardInterrupt


def diff(options: argparse.Namespace) -> None:
    """Say what changed between two releases."""
    from distill_datasets.releases.diff import diff as compare

    found = compare(options.old, options.new, config=options.config)
    print(json.dumps(found.data, indent=2, ensure_ascii=False) if options.json else found.text())


def show(options: argparse.Namespace) -> None:
    """Print rows of a run or a release."""
    from distill_datasets.releases.show import Which, print_rows
    from distill_datasets.releases.show import show as read

    which: Which = "rejected" if options.rejected else "errors" if options.errors else "all"
    rows = read(options.source, which=which, query=options.query, limit=options.n)
    if options.json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
    elif rows:
        print_rows(rows)
    else:
        print("no such row", file=sys.stderr)


def add_generate(parser: argparse.ArgumentParser) -> None:
    """What decides what is asked, of whom, how fast, and for how much."""
    parser.add_argument(
        "recipe",
        help="a shipped recipe's name, a folder, a release, or a Hub dataset as name@revision",
    )
    parser.add_argument(
        "--teacher", metavar="MODEL", help="a model reference (default: the recipe's)"
    )
    parser.add_argument(
        "--variant", metavar="NAME", help="a variant of the recipe; all: each in OUT/NAME"
    )
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument(
        "--canaries",
        type=count,
        metavar="N",
        help="plant N sentences with secrets in a copy of the prompt, which `measure --residue` "
        "looks for in the student: for a training of its own",
    )
    add_money(parser)


def add_money(parser: argparse.ArgumentParser) -> None:
    """What it costs, and how much it may."""
    money = parser.add_argument_group("money")
    money.add_argument(
        "--prices", type=Path, help="a file with a date and prices of models (default: none)"
    )
    money.add_argument(
        "--budget",
        type=float,
        help="the most to spend, in the prices' currency (default: no limit)",
    )


def add_generation_only(parser: argparse.ArgumentParser) -> None:
    """Other ways to generate than asking for everything, here and now."""
    add_settings(parser, GenerateSettings)
    ways = parser.add_argument_group("parts and trials")
    ways.add_argument(
        "--dry-run", action="store_true", help="only say what it would take, and ask nobody"
    )
    ways.add_argument(
        "--sample",
        type=count,
        metavar="N",
        help="with --dry-run, ask N rows for real (default: none)",
    )
    ways.add_argument(
        "--shard", metavar="I/N", help="ask one of N parts alone, as 3/64; publish joins them"
    )
    ways.add_argument("--ray", type=count, metavar="N", help="ask in N parts on a Ray cluster")


def add_synthesize(parser: argparse.ArgumentParser) -> None:
    """How many queries, and where they go."""
    parser.add_argument("recipe", help="a recipe's folder, or a shipped one's name with --out")
    parser.add_argument(
        "--n", type=int, required=True, help="queries to write; 0 only measures the coverage"
    )
    parser.add_argument(
        "--out", type=Path, help="a copy of the recipe (default: the recipe itself)"
    )
    parser.add_argument(
        "--teacher", metavar="MODEL", help="a model reference (default: the recipe's)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the attributes that the queries are asked with (default: 0)",
    )
    add_settings(parser, GenerateSettings, only=SPEED)
    add_money(parser)


def add_publish(parser: argparse.ArgumentParser) -> None:
    """The flags of `publish`."""
    parser.add_argument(
        "run", type=Path, nargs="+", help="a run's folder, or the folders of its parts"
    )
    parser.add_argument("--out", type=Path, help="the release folder (default: RUN/release)")
    add_version(parser)
    parser.add_argument(
        "--no-ledger", dest="ledger", action="store_false", help="leave the raw answers out"
    )
    parser.add_argument(
        "--no-prompt",
        dest="prompt",
        action="store_false",
        help="leave the prompt's text out: nobody can make the release again from itself",
    )
    hub = parser.add_argument_group("the Hub")
    hub.add_argument(
        "--push-to-hub", metavar="REPO", help="push the release to a repository, like me/support"
    )
    hub.add_argument(
        "--config",
        help="the configuration's name in the repository (default: the variant's, else default)",
    )
    hub.add_argument("--create-pr", action="store_true", help="push as a pull request")
    add_push_flags(hub)


def add_version(parser: argparse.ArgumentParser) -> None:
    """The version of what is published."""
    parser.add_argument(
        "--version",
        metavar="X.Y.Z",
        help="the release's version (default: the next, by what changed)",
    )


def add_push_flags(parser: Any) -> None:
    """The flags that everything pushed to the Hub has."""
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument(
        "--private",
        dest="private",
        action="store_true",
        default=True,
        help="make a new repository private (the default)",
    )
    seen.add_argument(
        "--public", dest="private", action="store_false", help="make a new repository public"
    )
    parser.add_argument("--yes", action="store_true", help="don't ask before something is sent")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="KEY",
        help="let a finding of the scan for secrets pass, by its key in the message; repeatable",
    )


def add_diff(parser: argparse.ArgumentParser) -> None:
    """Which two releases."""
    parser.add_argument("old", help="a release: a folder, or a Hub dataset as name@revision")
    parser.add_argument("new", help="the release to compare with it, named in the same way")
    parser.add_argument("--config", help="the configuration, where a repository has several")
    parser.add_argument("--json", action="store_true", help="print it for programs")


def add_show(parser: argparse.ArgumentParser) -> None:
    """The flags of `show`."""
    parser.add_argument(
        "source", help="a run's folder, a release, or a Hub dataset as name@revision"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--rejected", action="store_true", help="only rows that can't be used")
    kind.add_argument("--errors", action="store_true", help="only rows that failed")
    parser.add_argument("--query", metavar="TEXT", help="only rows whose query contains this")
    parser.add_argument(
        "-n", type=count, default=20, metavar="N", help="how many rows (default: 20)"
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each row")


def add_tools(parser: argparse.ArgumentParser) -> None:
    """The flags of `tools`."""
    parser.add_argument("action", choices=("import",), help="import: write tools.json of a file")
    parser.add_argument(
        "source", type=Path, help="an OpenAPI document, or what an MCP server's tools/list answers"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("tools.json"), help="the file (default: tools.json)"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="only the tools of these names (default: all)"
    )


def import_tools(options: argparse.Namespace) -> None:
    """Write a recipe's tools.json of tools that are described in another form."""
    from distill_datasets.files import write_file
    from distill_datasets.recipes.tools import import_tools as read

    tools = read(options.source)
    names = [tool["function"]["name"] for tool in tools]
    for name in options.only or ():
        if name not in names:
            raise RecipeError(f"There is no tool {name!r}; found {names}.{nearest(name, names)}")
    kept = [one for one in tools if not options.only or one["function"]["name"] in options.only]
    if options.out.exists():
        raise OutputError(f"{str(options.out)!r} is there already: name another with --out.")
    text = json.dumps(kept, indent=2, ensure_ascii=False) + "\n"
    write_file(options.out, text)
    print(
        f"{len(kept)} tools, {len(text):,} characters ({options.out}): name the file in recipe.yaml"
    )
    print(f"  tools: {options.out.name}")


def list_recipes(options: argparse.Namespace) -> None:
    """Name the recipes that ship, what each is about, and what it takes."""
    from itertools import groupby
    from textwrap import shorten

    from distill_datasets.recipes.loading import shipped_recipes
    from distill_datasets.recipes.queries import read_columns
    from distill_datasets.tables import aligned

    rows = [["recipe", "queries", "prompt", "what it shows"]]
    for name, found in groupby(shipped_recipes(), key=lambda one: one.folder.name):
        first, *others = found
        queries = read_columns(first)["query"]
        prompt = len(first.prompt_text(str(queries[0])).encode()) // _BYTES
        rows.append(
            [
                name,
                f"{len(queries):,}",
                f"{prompt:,}",
                shorten(first.description, _SHOWN, placeholder=" …"),
            ]
        )
        variants = [str(one.variant) for one in (first, *others) if one.variant]
        rows += [["", "", "", f"{name}:{variant}"] for variant in variants]
    print(aligned(rows))
    print(
        "\nA run asks the teacher once for each query. `prompt` is what that costs beside the "
        "query, in tokens of four\nbytes; --dry-run says it in the model's own tokens, and money."
    )


def add_new(parser: argparse.ArgumentParser) -> None:
    """The flags of `new`."""
    parser.add_argument("name", help="the recipe's name")
    parser.add_argument(
        "--like",
        choices=TEMPLATES,
        help="what an answer is: "
        f"{'; '.join(f'{kind}, {what}' for kind, what in TEMPLATES.items())} "
        "(default: asks on a terminal, else labels)",
    )
    parser.add_argument("--folder", type=Path, help="the folder to make (default: ./NAME)")


def new(options: argparse.Namespace) -> None:
    """Make a recipe's folder that runs as it is."""
    from distill_datasets.recipes.loading import new_recipe

    like = options.like or (_ask_kind() if sys.stdin.isatty() else "labels")
    folder = new_recipe(options.name, options.folder, like=like)
    files = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(f"made {folder}/ ({files}): all of it is a sample. Put your own in its place, then")
    print(f"  distill-datasets run {folder} --out runs/{folder.name}")


def _ask_kind() -> str:
    print("What is an answer of yours like?")
    for number, (kind, what) in enumerate(TEMPLATES.items(), 1):
        print(f"  {number}  {kind:<8}{what}")
    said = input("Number or name [labels]: ").strip().lower() or "labels"
    kinds = dict(enumerate(TEMPLATES, 1))
    kind = kinds.get(int(said), said) if said.isdecimal() else said
    if kind not in TEMPLATES:
        raise RecipeError(f"Expected one of {[*TEMPLATES]} or its number, found {said!r}.")
    return kind

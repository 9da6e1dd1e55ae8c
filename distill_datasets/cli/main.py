"""The command line: its verbs, its help, and errors as one sentence with an exit code."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets import __version__
from distill_datasets.cli import dataset, evidence, student
from distill_datasets.cli.flags import METAVARS, add_settings, read_settings
from distill_datasets.errors import DistillError
from distill_datasets.generation.settings import GenerateSettings

if TYPE_CHECKING:
    from distill_datasets.recipes.recipe import Recipe

# `run` publishes what it generates, so it stays until everything is answered.
_NOT_IN_RUN = ("stream", "batch", "poll", "wait")
_EPILOG = """\
model references:
  pocket                               the small model that ships with this package
  embedded:<folder, .gguf or Hub id>   any causal LM with a chat template, on this machine
  openai:<model>                       OpenAI-compatible (OPENAI_API_KEY, OPENAI_BASE_URL)
  tinker:<base model>                  a base model on Tinker (TINKER_API_KEY, TINKER_BASE_URL)
  tinker://<run>/sampler_weights/<n>   a trained checkpoint on Tinker
  a training folder                    its best checkpoint

exit codes:
  0    done
  1    a service, the Hub or rows failed, or the budget is spent: what was paid for is kept;
       or a student fails its gate, or something that it needs is gone
  2    the input is wrong: the message says what was expected, what was found, and what to do
  75   a provider's batches take their time: run the same command again later
  130  interrupted: run the same command to continue
  141  whoever read the output is gone

examples:
  distill-datasets run language_id --teacher pocket --student pocket --out runs/demo
  distill-datasets help train
"""


@dataclass(frozen=True)
class _Verb:
    """A verb's meaning, its work, the functions that add its flags, and two examples."""

    meaning: str
    work: Callable[[argparse.Namespace], None]
    flags: tuple[Callable[[argparse.ArgumentParser], None], ...]
    examples: tuple[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit codes are those that `--help` lists."""
    from distill_datasets.progress import use

    parser = build_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        verb = next(one for one in arguments or sys.argv[1:] if one in (*_VERBS, "help"))
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}; `distill-datasets help {verb}` lists "
            f"what {verb} takes"
        )
    _quieten_libraries()
    use(getattr(options, "progress", "line"))
    try:
        options.work(options)
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        print(
            "interrupted: nothing that was paid for is lost; run the same command to continue.",
            *getattr(interrupt, "__notes__", ()),
            sep="\n",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        # The reader of a pipe left; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All verbs with their flags; a verb's function is in the namespace as `work`."""
    parser = argparse.ArgumentParser(
        prog="distill-datasets",
        description="Turn a long prompt into a dataset, and the dataset into a model without it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"distill-datasets {__version__}")
    added = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, verb in _VERBS.items():
        taking = added.add_parser(
            name,
            help=verb.meaning,
            description=f"{verb.meaning[0].upper()}{verb.meaning[1:]}.",
            epilog="examples:\n" + "\n".join(f"  distill-datasets {one}" for one in verb.examples),
            formatter_class=_HelpFormatter,
        )
        for add in verb.flags:
            add(taking)
        taking.set_defaults(work=verb.work)
    asked = added.add_parser("help", help="show the flags of a verb")
    asked.add_argument("topic", nargs="?", metavar="VERB", choices=list(_VERBS), help="any verb")
    asked.set_defaults(work=lambda options: _help(parser, options.topic))
    return parser


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Says what a verb can't do without, and of what kind a flag's value is."""

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], *more: Any, **how: Any
    ) -> None:
        """The arguments and the required flags; the others are listed below."""
        words = [self._prog]
        for one in sorted(actions, key=lambda one: bool(one.option_strings)):
            if not one.option_strings:
                words.append(self._format_args(one, one.dest))
            elif one.required:
                kind = self._format_args(one, self._get_default_metavar_for_optional(one))
                words.append(f"{one.option_strings[0]} {kind}")
        super().add_usage(" ".join([*words, "[flags]"]), (), *more, **how)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        """The kind, where argparse would repeat the flag's name."""
        return next((shown for kind, shown in METAVARS.items() if action.type is kind), "NAME")


def _help(parser: argparse.ArgumentParser, verb: str | None) -> None:
    parser.parse_args([verb, "--help"] if verb else ["--help"])


def _quieten_libraries() -> None:
    """Libraries' own progress bars and start-up notes would break our one line."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    # A warning of ours is a sentence for the user; where it was raised says nothing to them.
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    # Its only message repeats, among internals, what our error says.
    logging.getLogger("tinker.lib.retry_handler").setLevel(logging.CRITICAL)
    # Its messages repeat what our errors say.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    # It warns of every row that is longer than a model's context: those are left out and counted.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)


def _add_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--progress",
        choices=("line", "json"),
        default="line",
        help="how progress is shown: a line for people, or a line of JSON a second on standard "
        "error (default: line)",
    )


def _run(options: argparse.Namespace) -> None:
    from distill_datasets.files import writable_folder
    from distill_datasets.training.trainer import require_settings

    recipe, splits = _require_runnable(options)
    out = writable_folder(options.out)
    folders = student.training_folders(out)
    # The student's server keeps its checkpoints with the run, and answers for the teacher too.
    store, settings = folders[-1] / "checkpoints", student.settings_of(options)
    require_settings(options.student, settings, splits=splits, turns=recipe.turns, store=store)
    dataset.report_answers(dataset.ask_teachers(options))
    dataset.make_release(out, version=options.version, ledger=options.ledger is not False)
    options.dataset = out / "release"
    trained = _train_in_run(options, [*folders, out / f"train-{len(folders) + 1}"])
    measured = {"run": out, "dataset": None, "student": trained, "out": None, "split": None}
    asked = {"internalisation": options.internalisation}
    student.measure(argparse.Namespace(**measured, **asked))
    _list_files(out, trained)


def _require_runnable(options: argparse.Namespace) -> "tuple[Recipe, set[str]]":
    """Find out before anything is paid for what would stop the run later.

    Returns the recipe and the release's splits.
    """
    from distill_datasets.evaluation.metrics import Metrics
    from distill_datasets.generation.run import select_queries
    from distill_datasets.models.references import default_student
    from distill_datasets.recipes.loading import load_recipe
    from distill_datasets.recipes.queries import require_splits
    from distill_datasets.releases.manifest import check_version

    given = options.recipe
    asked = load_recipe(given, trust=bool(options.trust)) if isinstance(given, str) else given
    options.student = options.student or default_student(options.teacher or asked.teacher)
    student.settings_of(options)
    if options.version is not None:
        check_version(options.version)
    Metrics.load(asked.metrics, (), ())
    queries = select_queries(asked, read_settings(options, GenerateSettings))
    require_splits(asked, queries, ("train", "test"))
    return asked, set(queries.unique("split"))


def _train_in_run(options: argparse.Namespace, folders: Sequence[Path]) -> Path:
    """Train in the first folder that is new or holds this training; the last one is new."""
    from distill_datasets.errors import OtherTrainingError
    from distill_datasets.models.references import disconnect

    for folder, following in zip(folders, folders[1:], strict=False):
        options.out = folder
        try:
            student.train(options)
            return folder
        except OtherTrainingError:
            disconnect(folder / "checkpoints")
            if not following.exists():
                print(f"{folder} holds a training of other data: training anew in {following}")
    options.out = folders[-1]
    student.train(options)
    return folders[-1]


def _list_files(out: Path, trained: Path) -> None:
    print(f"\nwrote to {out}/:")
    made = ("journal.sqlite", "answers/", "release/", f"{trained.name}/", "report.json")
    for name in (*made, "report.md", "report.html", "rows.jsonl", "model_card.md"):
        if (out / name).exists():
            print(f"  {out / name}")


_VERBS = {
    "run": _Verb(
        "generate, publish, train and measure, in one go",
        dataset.for_each_variant(_run),
        (
            dataset.add_generate,
            partial(add_settings, settings=GenerateSettings, skip=_NOT_IN_RUN),
            student.add_settings,
            dataset.add_version,
            _add_progress,
        ),
        (
            "run language_id --teacher pocket --student pocket --out runs/demo",
            "run support --teacher openai:gpt-5 --student tinker:Qwen/Qwen3-8B --out runs/support",
        ),
    ),
    "generate": _Verb(
        "ask the teachers every query, once",
        dataset.for_each_variant(dataset.generate),
        (dataset.add_generate, dataset.add_generation_only, _add_progress),
        (
            "generate support --out runs/support --prices prices.yaml --budget 5.00",
            "generate support --out runs/support --dry-run --sample 5",
        ),
    ),
    "synthesize": _Verb(
        "let the teacher write queries for a prompt",
        dataset.synthesize,
        (dataset.add_synthesize, _add_progress),
        ("synthesize support --n 2000", "synthesize language_id --n 100 --out mine"),
    ),
    "coverage": _Verb(
        "leave out each rule of a prompt in turn, and say which no query exercises",
        evidence.coverage,
        (evidence.add_coverage, _add_progress),
        (
            "coverage support --sample 40 --prices prices.yaml --budget 2.00",
            "coverage language_id --teacher pocket --sample 5 --out runs/coverage",
        ),
    ),
    "publish": _Verb(
        "make a release of a run, and push it to the Hub",
        dataset.publish,
        (dataset.add_publish,),
        ("publish runs/support", "publish runs/support --push-to-hub me/support"),
    ),
    "train": _Verb(
        "train a student on a release or any dataset",
        student.train,
        (student.add_train, _add_progress),
        (
            "train runs/support/release --student tinker:Qwen/Qwen3-8B --out runs/qwen",
            "train me/support@v1.1.0 --from runs/qwen --only-new --out runs/qwen-2",
        ),
    ),
    "sweep": _Verb(
        "train once for every combination of settings",
        student.sweep,
        (student.add_sweep, _add_progress),
        (
            "sweep runs/support/release --rank 8 16 32 --out runs/sweep",
            "sweep me/support@v1.0.0 --learning-rate 1e-4 5e-4 --seed 0 1 --out runs/sweep",
        ),
    ),
    "measure": _Verb(
        "compare base, teacher and student on held-out rows",
        student.measure,
        (student.add_measure, _add_progress),
        (
            "measure runs/support",
            "measure --dataset me/support@v1.0.0 --student runs/qwen --out runs/report",
        ),
    ),
    "cost": _Verb(
        "say what a student saves, what was spent, and when that is back",
        evidence.cost,
        (evidence.add_cost,),
        (
            "cost runs/support --prices prices.yaml --queries-per-month 10k 100k 1m",
            "cost runs/support --import model_prices.json > prices.yaml",
        ),
    ),
    "gate": _Verb(
        "let a student pass or not, by rules over its report",
        evidence.gate,
        (evidence.add_gate,),
        (
            "gate runs/support --rules gate.yaml",
            "gate runs/support-2 --against runs/support --strict",
        ),
    ),
    "page": _Verb(
        "write report.html, one page that says whether the student may replace the prompt",
        evidence.page,
        (evidence.add_page,),
        ("page runs/support", "page runs/support/report-edge.json --training runs/qwen"),
    ),
    "profile": _Verb(
        "say what the rows of a dataset are like",
        evidence.profile,
        (evidence.add_profile,),
        ("profile runs/support/release", "profile me/support@v1.0.0 --all --json"),
    ),
    "check": _Verb(
        "see whether the models, weights and prices that a release or student needs still hold",
        evidence.check,
        (evidence.add_check,),
        ("check runs/support --days 60 --prices prices.yaml", "check me/support@v1.0.0"),
    ),
    "export": _Verb(
        "write a trained student to a folder, as an adapter or merged, and compare it",
        student.export,
        (student.add_export,),
        ("export runs/qwen --out qwen", "export runs/qwen --out qwen-merged --merge"),
    ),
    "push": _Verb(
        "push a trained student to the Hub, with its card",
        student.push,
        (student.add_push,),
        ("push runs/qwen me/student", "push runs/qwen me/student --public --yes"),
    ),
    "show": _Verb(
        "show rows: query, the teacher's words, answer, reason, tokens",
        dataset.show,
        (dataset.add_show,),
        ("show runs/support --rejected", "show me/support@v1.0.0 --query refund --json"),
    ),
    "diff": _Verb(
        "say what changed between two releases",
        dataset.diff,
        (dataset.add_diff,),
        (
            "diff runs/support/release runs/support-2/release",
            "diff me/support@v1.0.0 me/support@v1.1.0 --json",
        ),
    ),
    "recipes": _Verb(
        "list the recipes that ship",
        dataset.list_recipes,
        (),
        ("recipes", "run language_id --out runs/demo"),
    ),
    "new": _Verb(
        "start a recipe's folder that runs as it is",
        dataset.new,
        (dataset.add_new,),
        ("new support", "new agent --like tools --folder recipes/agent"),
    ),
    "tools": _Verb(
        "write a recipe's tools.json of an OpenAPI document or an MCP server's list",
        dataset.import_tools,
        (dataset.add_tools,),
        (
            "tools import openapi.yaml --out support/tools.json",
            "tools import listed.json --only find_order refund",
        ),
    ),
    "calibrate": _Verb(
        "choose when the student answers alone, with a guarantee, and say what that saves",
        student.calibrate,
        (student.add_calibrate, _add_progress),
        (
            "calibrate runs/support --epsilon 0.01 0.02 0.05 --prices prices.yaml",
            "calibrate runs/demo --score mean",
        ),
    ),
    "serve": _Verb(
        "serve a local model and its students over OpenAI's protocol, and over Tinker's",
        student.serve,
        (student.add_serve,),
        (
            "serve pocket --student runs/demo",
            "serve embedded:models/smol --student mine=runs/support/train --port 9000",
        ),
    ),
    "rollout": _Verb(
        "answer for teacher and student, and move traffic from one to the other by evidence",
        student.rollout,
        (student.add_rollout,),
        ("rollout runs/support --prices prices.yaml --budget 5", "rollout runs/support --to off"),
    ),
}


if __name__ == "__main__":
    sys.exit(main())

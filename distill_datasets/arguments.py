"""What may stand on the command line."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from distill_datasets import dataset_arguments, student_arguments

Verb = Callable[[argparse.Namespace], None]

_EPILOG = """\
model references:
  pocket                               the small model that ships with this package
  embedded:<folder or Hub id>          any causal LM with a chat template, on this machine
  openai:<model>                       OpenAI-compatible (OPENAI_API_KEY, OPENAI_BASE_URL)
  tinker:<base model>                  a base model on Tinker (TINKER_API_KEY, TINKER_BASE_URL)
  tinker://<run>/sampler_weights/<n>   a trained checkpoint on Tinker
"""


def build_parser(verbs: Mapping[str, Verb]) -> argparse.ArgumentParser:
    """All arguments; each verb's function is in the namespace as `verb`."""
    parser = argparse.ArgumentParser(
        prog="distill-datasets",
        description="Turn a long prompt into a dataset, and the dataset into a model without it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, (meaning, adders) in _ARGUMENTS.items():
        verb = added.add_parser(name, help=meaning)
        for add in adders:
            add(verb)
        verb.set_defaults(verb=verbs[name])
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", help="the release's version, x.y.z")


def _add_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--progress",
        choices=("line", "json"),
        default="line",
        help="how long work is shown: for people, or a line of JSON a second on standard error",
    )


def _add_new(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="the recipe's name")
    parser.add_argument("--folder", type=Path, help="where (default: ./NAME)")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="pocket", help="pocket, or embedded:<folder>")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--store", type=Path, help="the folder of the checkpoints")


_Adder = Callable[[argparse.ArgumentParser], None]
_ARGUMENTS: Mapping[str, tuple[str, tuple[_Adder, ...]]] = {
    "run": (
        "generate, publish, train and measure, in one go",
        (dataset_arguments.add_generate, student_arguments.add_settings, _add_run, _add_progress),
    ),
    "generate": (
        "ask the teachers every query, once",
        (dataset_arguments.add_generate, dataset_arguments.add_generation_only, _add_progress),
    ),
    "synthesize": (
        "let the teacher write queries for a prompt",
        (dataset_arguments.add_synthesize, _add_progress),
    ),
    "publish": (
        "make a release of a run, and push it, or a student",
        (dataset_arguments.add_publish,),
    ),
    "train": (
        "train a student on a release or any dataset",
        (student_arguments.add_train, _add_progress),
    ),
    "sweep": (
        "train once for every combination of settings",
        (student_arguments.add_sweep, _add_progress),
    ),
    "measure": (
        "compare base, teacher and student on held-out rows",
        (student_arguments.add_measure, _add_progress),
    ),
    "diff": ("what changed between two releases", (dataset_arguments.add_diff,)),
    "recipes": ("list the recipes that ship", ()),
    "new": ("start a recipe's folder that runs as it is", (_add_new,)),
    "serve": ("serve a local model over Tinker's protocol", (_add_serve,)),
}

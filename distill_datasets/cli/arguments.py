"""What may stand on the command line."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from distill_datasets.cli import dataset_arguments, student_arguments

Verb = Callable[[argparse.Namespace], None]

_EPILOG = """\
model references:
  pocket                               the small model that ships with this package
  embedded:<folder or Hub id>          any causal LM with a chat template, on this machine
  openai:<model>                       OpenAI-compatible (OPENAI_API_KEY, OPENAI_BASE_URL)
  tinker:<base model>                  a base model on Tinker (TINKER_API_KEY, TINKER_BASE_URL)
  tinker://<run>/sampler_weights/<n>   a trained checkpoint on Tinker
"""


_KINDS = {int: "N", float: "X", Path: "PATH"}
_Adder = Callable[[argparse.ArgumentParser], None]


class _Help(argparse.RawDescriptionHelpFormatter):
    """Says of what kind a flag's value is, where argparse would repeat the flag's name."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return next((shown for kind, shown in _KINDS.items() if action.type is kind), "NAME")


@dataclass(frozen=True)
class _Verb:
    """What a verb does, what it takes, and a usage line where all flags would fill a page."""

    meaning: str
    adders: tuple[_Adder, ...] = ()
    usage: str | None = None


def build_parser(verbs: Mapping[str, Verb]) -> argparse.ArgumentParser:
    """All arguments; each verb's function is in the namespace as `verb`."""
    parser = argparse.ArgumentParser(
        prog="distill-datasets",
        description="Turn a long prompt into a dataset, and the dataset into a model without it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, verb in _ARGUMENTS.items():
        usage = f"distill-datasets {name} {verb.usage}" if verb.usage else None
        taking = added.add_parser(
            name, help=verb.meaning, description=verb.meaning, usage=usage, formatter_class=_Help
        )
        for add in verb.adders:
            add(taking)
        taking.set_defaults(verb=verbs[name])
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", metavar="X.Y.Z", help="the release's version")


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


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535; found {text!r}")
    return int(text)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="pocket",
        metavar="MODEL",
        help="pocket (the default), or embedded:<folder>",
    )
    parser.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1)")
    parser.add_argument("--port", type=_port, default=8000, metavar="N", help="(default: 8000)")
    parser.add_argument("--store", type=Path, help="the folder of the checkpoints")


_ARGUMENTS: Mapping[str, _Verb] = {
    "run": _Verb(
        "generate, publish, train and measure, in one go",
        (dataset_arguments.add_generate, student_arguments.add_settings, _add_run, _add_progress),
        usage="recipe --out PATH [flags]",
    ),
    "generate": _Verb(
        "ask the teachers every query, once",
        (dataset_arguments.add_generate, dataset_arguments.add_generation_only, _add_progress),
        usage="recipe --out PATH [flags]",
    ),
    "synthesize": _Verb(
        "let the teacher write queries for a prompt",
        (dataset_arguments.add_synthesize, _add_progress),
        usage="recipe --n N [flags]",
    ),
    "publish": _Verb(
        "make a release of a run, and push it, or a student",
        (dataset_arguments.add_publish,),
        usage="run [run ...] [flags]",
    ),
    "train": _Verb(
        "train a student on a release or any dataset",
        (student_arguments.add_train, _add_progress),
        usage="dataset --out PATH [flags]",
    ),
    "sweep": _Verb(
        "train once for every combination of settings",
        (student_arguments.add_sweep, _add_progress),
        usage="dataset --out PATH [flags]",
    ),
    "measure": _Verb(
        "compare base, teacher and student on held-out rows",
        (student_arguments.add_measure, _add_progress),
        usage="[run] [flags]",
    ),
    "diff": _Verb("what changed between two releases", (dataset_arguments.add_diff,)),
    "recipes": _Verb("list the recipes that ship"),
    "new": _Verb("start a recipe's folder that runs as it is", (_add_new,)),
    "serve": _Verb("serve a local model over Tinker's protocol", (_add_serve,)),
}

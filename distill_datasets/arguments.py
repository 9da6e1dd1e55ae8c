"""What may stand on the command line."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

Verb = Callable[[argparse.Namespace], None]

_EPILOG = """\
model references:
  pocket                               the small model that ships with this package
  embedded:<folder or Hub id>          any causal LM with a chat template, on this machine
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

    run = added.add_parser("run", help="generate, publish, train and measure, in one go")
    _add_generate(run)
    _add_train(run)
    run.add_argument("--version", help="the release's version, x.y.z")
    run.set_defaults(verb=verbs["run"])

    generate = added.add_parser("generate", help="ask the teacher every query, once")
    _add_generate(generate)
    generate.set_defaults(verb=verbs["generate"])

    publish = added.add_parser("publish", help="make a release of a run, and push it, or a student")
    _add_publish(publish)
    publish.set_defaults(verb=verbs["publish"])

    train = added.add_parser("train", help="train a student on a release or any dataset")
    train.add_argument("dataset", help="a folder, or a Hub dataset as name@revision")
    train.add_argument("--out", type=Path, required=True, help="the folder of the training")
    _add_train(train)
    train.set_defaults(verb=verbs["train"])

    measure = added.add_parser("measure", help="compare base, teacher and student on held-out rows")
    _add_measure(measure)
    measure.set_defaults(verb=verbs["measure"])

    diff = added.add_parser("diff", help="what changed between two releases")
    _add_diff(diff)
    diff.set_defaults(verb=verbs["diff"])

    recipes = added.add_parser("recipes", help="list the recipes that ship")
    recipes.set_defaults(verb=verbs["recipes"])

    new = added.add_parser("new", help="start a recipe's folder that runs as it is")
    new.add_argument("name", help="the recipe's name")
    new.add_argument("--folder", type=Path, help="where (default: ./NAME)")
    new.set_defaults(verb=verbs["new"])

    serve = added.add_parser("serve", help="serve a local model over Tinker's protocol")
    serve.add_argument("--model", default="pocket", help="pocket, or embedded:<folder>")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--store", type=Path, help="the folder of the checkpoints")
    serve.set_defaults(verb=verbs["serve"])
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        help="a shipped recipe's name, a folder, a release, or a Hub dataset as name@revision",
    )
    parser.add_argument("--teacher", help="a model reference (default: the recipe's)")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--concurrency", type=int, default=256, help="requests in flight")
    parser.add_argument("--limit", type=int, help="only the first queries")
    parser.add_argument(
        "--no-ledger",
        dest="ledger",
        action="store_false",
        help="buy every answer again, or publish without the raw answers",
    )


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--student", default="pocket", help="a model reference (default: pocket)")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--rank", type=int, help="of the LoRA adapter")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--max-steps", type=int)


def _add_publish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run's folder, or a training's folder to push")
    parser.add_argument("--out", type=Path, help="the release folder (default: RUN/release)")
    parser.add_argument("--version", help="x.y.z (default: the next, by what changed)")
    parser.add_argument(
        "--no-ledger", dest="ledger", action="store_false", help="leave the raw answers out"
    )
    hub = parser.add_argument_group("the Hub")
    hub.add_argument("--push-to-hub", metavar="REPO", help="a repository, like me/language-id")
    hub.add_argument("--config", default="default", help="its name among others in the repository")
    seen = hub.add_mutually_exclusive_group()
    seen.add_argument("--private", dest="private", action="store_true", default=True)
    seen.add_argument("--public", dest="private", action="store_false")
    hub.add_argument("--create-pr", action="store_true", help="as a pull request")
    hub.add_argument("--yes", action="store_true", help="don't ask before something is sent")
    hub.add_argument(
        "--allow", action="append", default=[], metavar="KEY", help="let a finding of the scan pass"
    )
    hub.add_argument("--base-model", help="a student's base on the Hub, or base/ to include it")


def _add_measure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run's folder (or use the options)")
    parser.add_argument(
        "--dataset", help="the release, or a Hub dataset as name@revision (default: RUN/release)"
    )
    parser.add_argument("--student", help="a training folder (default: RUN/train) or a reference")
    parser.add_argument("--out", type=Path, help="where the report goes (default: RUN)")
    parser.add_argument("--split", help="the held-out split (default: test, and any other)")


def _add_diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", help="a release: a folder, or a Hub dataset as name@revision")
    parser.add_argument("new", help="another")
    parser.add_argument("--config", help="the configuration, where a repository has several")
    parser.add_argument("--json", action="store_true", help="print it for programs")

"""What the command line says of itself."""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill_datasets import __version__, errors
from distill_datasets.cli.main import build_parser, main

ROOT = Path(__file__).parents[3]
PARSER = build_parser()


def verbs() -> dict[str, argparse.ArgumentParser]:
    (choices,) = (one.choices for one in PARSER._actions if one.dest == "==SUPPRESS==")
    return {name: parser for name, parser in dict(choices or ()).items() if name != "help"}


VERBS = verbs()


def flags(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    yield from (one for one in parser._actions if one.dest != "help" and one.help != "==SUPPRESS==")


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_ends_with_two_examples_that_it_understands(verb: str) -> None:
    head, *examples = str(VERBS[verb].epilog).splitlines()
    assert head == "examples:" and len(examples) == 2
    assert verb in " ".join(examples)
    for example in examples:
        program, *words = shlex.split(example.split(">")[0])
        assert program == "distill-datasets"
        PARSER.parse_args(words)


def test_the_commands_of_every_page_are_understood() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("builders/*/README.md")]
    blocks = [
        block.replace("\\\n", " ")
        for page in pages
        for block in re.findall(
            r"^```\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL
        )
    ]
    commands = re.findall(r"^distill-datasets ([^#>\n]*)", "\n".join(blocks), re.MULTILINE)
    assert len(commands) > 30
    for command in commands:
        PARSER.parse_args(shlex.split(command))


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_says_what_it_does_and_its_default(verb: str) -> None:
    for one in flags(VERBS[verb]):
        text = str(one.help)
        assert len(text.split()) >= 2, (one.dest, text)
        if one.option_strings and one.default not in (None, True, False, []):
            assert re.search(rf"\(default: .*{re.escape(str(one.default))}", text), (one.dest, text)


@pytest.mark.parametrize("arguments", [["help", "train"], ["train", "--help"]])
def test_a_verb_is_explained_both_ways(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    assert "usage: distill-datasets train dataset --out PATH" in capsys.readouterr().out


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"distill-datasets {__version__}\n"


def test_every_exit_code_is_explained() -> None:
    raised = [one for one in vars(errors).values() if isinstance(one, type)]
    codes = {one.exit_code for one in raised if issubclass(one, errors.DistillError)}
    explained = re.findall(r"^  (\d+) ", str(PARSER.epilog), re.MULTILINE)
    assert {*map(str, codes)} | {"0", "130", "141"} == {*explained}


def test_an_unknown_flag_names_the_help_of_its_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["show", "runs/support", "--rows", "2"])
    assert "--rows 2; `distill-datasets help show`" in capsys.readouterr().err

"""The verbs against a small OpenAI-compatible server that echoes, and a tiny local student."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill_datasets import progress
from distill_datasets.cli.main import main
from tests.integration.evaluation.test_report import make_run
from tests.support.openai_server import OpenAIServer
from tests.support.training_runs import ROWS, write

PRICES = """\
date: 2026-11-01
currency: USD
models:
  openai:echo-large: {prompt: 1000, response: 1000}
  tinker:base: {prompt: 1, response: 1}
"""


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """`--progress json` holds for the process, which is this one."""
    yield
    progress.use("line")


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    file = tmp_path / "prices.yaml"
    file.write_text(PRICES)
    return file


def generate(recipe: Path, out: Path, *flags: str | Path) -> int:
    given = ["generate", recipe, "--teacher", "openai:echo-large", "--out", out, *flags]
    return main([str(one) for one in given])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The error of a command that must exit with 2, also where argparse ends it."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    found = capsys.readouterr().err
    assert code == 2 and "Traceback" not in found
    return found


def test_a_streamed_run_says_when_first_tokens_came(
    named_server: OpenAIServer,
    recipe_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in range(2):  # the second finds a finished run
        assert generate(recipe_folder, tmp_path / "run", "--stream") == 0
        said = capsys.readouterr().out
        assert re.search(r"first token: \d\.\d\d s \(median of 6\), 95 % within", said)
    assert len(named_server.bodies) == 6


def test_a_dry_run_asks_nobody_and_writes_nothing(
    named_server: OpenAIServer,
    recipe_folder: Path,
    prices: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert generate(recipe_folder, tmp_path / "run", "--dry-run", "--prices", prices) == 0
    said = capsys.readouterr().out
    assert "6 queries, 6 requests" in said and "USD" in said
    assert not named_server.asked and not (tmp_path / "run").exists()


def test_parts_publish_to_the_release_of_a_whole_run(
    named_server: OpenAIServer, recipe_folder: Path, tmp_path: Path
) -> None:
    parts = tmp_path / "parts"
    assert generate(recipe_folder, tmp_path / "whole") == 0
    assert [generate(recipe_folder, parts, "--shard", f"{one}/2") for one in (1, 2)] == [0, 0]
    folders = [str(folder) for folder in sorted(parts.iterdir())]
    assert main(["publish", str(tmp_path / "whole")]) == 0
    assert main(["publish", *folders, "--out", str(tmp_path / "joined")]) == 0
    digests = [
        json.loads((folder / "manifest.json").read_text())["content_digest"]
        for folder in (tmp_path / "whole/release", tmp_path / "joined")
    ]
    assert digests[0] == digests[1]


def test_a_budget_ends_with_1_and_a_higher_one_goes_on(
    named_server: OpenAIServer,
    recipe_folder: Path,
    prices: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def bought(budget: str) -> int:
        flags = ("--prices", prices, "--budget", budget, "--concurrency", "1")
        return generate(recipe_folder, tmp_path / "run", *flags)

    assert bought("0.04") == 1
    assert "run again with a higher budget" in capsys.readouterr().err
    assert 0 < len(named_server.asked) < 6
    assert bought("10") == 0
    assert set(named_server.asked.values()) == {1} and len(named_server.asked) == 6


def test_progress_for_programs_is_json_lines(
    named_server: OpenAIServer,
    recipe_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert generate(recipe_folder, tmp_path / "run", "--progress", "json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [lines[0]["state"], lines[-1]["state"]] == ["started", "finished"]
    assert (lines[-1]["title"], lines[-1]["done"], lines[-1]["total"]) == ("generate", 6, 6)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--limit", "0"], "limit must be at least 1; found 0."),
        (["--concurrency", "0"], "concurrency must be at least 1; found 0."),
        (["--rpm", "-1"], "requests_per_minute must be above 0; found -1.0."),
        (["--poll", "nan"], "poll must be a number; found nan."),
        (["--sample", "2"], "--sample asks rows for the forecast of a --dry-run"),
        (["--no-wait"], "add --batch"),
        (["--batch", "--stream"], "leave out --batch or --stream"),
        (["--ray", "2", "--limit", "3", "--no-ledger"], "doesn't go with --limit, --no-ledger"),
        (["--shard", "5/4"], "expected one from 1/4 to 4/4"),
    ],
)
def test_flags_that_can_not_be_followed_are_refused_before_anything_is_asked(
    flags: list[str],
    expected: str,
    named_server: OpenAIServer,
    recipe_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["generate", recipe_folder, "--teacher", "openai:echo-large", *flags]
    assert expected in refusal(capsys, *arguments, "--out", tmp_path / "run")
    assert not named_server.asked


def test_a_run_checks_its_training_settings_before_it_asks_anybody(
    recipe_folder: Path, prices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", recipe_folder, "--out", tmp_path / "run"]
    assert "rank must be at least 1" in refusal(capsys, *run, "--rank", "0")
    unpriced = refusal(capsys, *run, "--student", "tinker:base", "--prices", prices)
    assert "doesn't say what training 'tinker:base' costs" in unpriced
    assert not (tmp_path / "run").exists()


def test_a_sweep_shows_a_table_with_the_best_marked(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write(tmp_path / "dataset", train=ROWS[:9], validation=ROWS[29:])
    sweep = ["sweep", dataset, "--out", tmp_path / "out", "--student", model]
    assert "for example --rank 8 16 32; found none" in refusal(capsys, *sweep)
    flags = ["--rank", "2", "4", "--max-steps", "1", "--no-internalisation"]
    assert main([str(one) for one in (*sweep, *flags)]) == 0
    head, *rows, best = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["rank", "loss"]
    assert [row.split()[0] for row in rows] == ["2", "4"]
    (marked,) = [row.split()[0] for row in rows if row.endswith("best")]
    assert best.startswith(f"best: {tmp_path / 'out'}/rank-{marked};")


def test_measure_says_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(capsys, "measure", "--dataset", "some/release")
    assert "needs a run's folder, or all of --dataset, --student and --out; found 1" in error
    assert "found 1 of the three" in refusal(capsys, "measure", "some/release@v1.0.0")


def test_measure_takes_a_runs_release_for_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = make_run(tmp_path) / "release"
    assert "'nonsense'" in refusal(capsys, "measure", release, "--student", "nonsense")


@pytest.mark.parametrize("flag", ["--base", "--teacher", "--metric"])
def test_measure_takes_each_system_and_metrics_by_name(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = make_run(tmp_path) / "release"
    named = ["measure", "--dataset", release, "--student", "pocket", "--out", tmp_path / "out"]
    others = [word for other in {"--base", "--teacher"} - {flag} for word in (other, "pocket")]
    assert "'nonsense'" in refusal(capsys, *named, *others, flag, "nonsense")
    assert not (tmp_path / "out" / "journal.sqlite").exists()


@pytest.mark.parametrize("verb", ["run", "generate", "train", "sweep", "publish", "measure"])
def test_help_names_kinds_of_values_and_not_our_variables(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert "OBJECTIVE_" not in said and "LEARNING_RATE" not in said and "OUT" not in said.split()

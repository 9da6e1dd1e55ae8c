import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest

from distill_datasets.generation.run import generate
from distill_datasets.models.sampler import Echo
from tests.conftest import edit
from tests.support.hub_fixture import Hub


@pytest.fixture
def answered(recipe_folder: Path, tmp_path: Path) -> Path:
    """A run with answers, and no release yet."""
    generate(recipe_folder, teacher=Echo(), out=tmp_path / "run")
    return tmp_path / "run"


def verb(hub: Hub, arguments: Sequence[str], **environment: str | None) -> tuple[int, str]:
    done = hub.run(["-m", "distill_datasets", *arguments], environment)
    assert "Traceback" not in done.stderr
    assert hub.token not in done.stdout + done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_is_published_extended_and_compared(
    hub: Hub, answered: Path, recipe_folder: Path
) -> None:
    code, said = verb(hub, ["publish", str(answered), "--push-to-hub", "me/colours"])
    assert (code, "me/colours@v1.0.0" in said) == (0, True)
    code, said = verb(hub, ["publish", str(answered), "--push-to-hub", "me/colours"])
    assert (code, "nothing to push" in said) == (0, True)

    edit(recipe_folder, "queries.jsonl", "a thought", "lava, colour red")
    generate(recipe_folder, teacher=Echo(), out=answered)
    code, said = verb(hub, ["publish", str(answered), "--push-to-hub", "me/colours"])
    assert (code, "me/colours@v1.1.0" in said) == (0, True)
    code, said = verb(hub, ["diff", "me/colours@v1.0.0", "me/colours@v1.1.0"])
    assert (code, "1 added" in said) == (0, True)


def test_without_a_token_nothing_is_sent_and_the_exit_code_is_2(hub: Hub, answered: Path) -> None:
    arguments = ["publish", str(answered), "--push-to-hub", "me/colours"]
    code, said = verb(hub, arguments, HF_TOKEN=None)
    assert (code, "hf auth login" in said) == (2, True)
    assert not hub.log(method="POST")


@pytest.mark.slow
def test_a_hub_that_is_gone_is_exit_code_1(hub: Hub, answered: Path) -> None:
    hub.fault(".*", times=10**9, drop="before")
    code, said = verb(hub, ["diff", "me/colours@v1.0.0", "me/colours@v1.1.0"])
    assert (code, "run the same again" in said) == (1, True)


def test_a_secret_in_the_prompt_stops_the_push(
    hub: Hub, recipe_folder: Path, tmp_path: Path
) -> None:
    key = "ghp_" + "x8Kq2LmZ7RtY4WvB9NsD3FhJ6PcA1GeU5TiO"
    edit(recipe_folder, "prompt.md", "Name the", f"Use the token {key}. Name the")
    generate(recipe_folder, teacher=Echo(), out=tmp_path / "run")
    code, said = verb(hub, ["publish", str(tmp_path / "run"), "--push-to-hub", "me/colours"])
    assert code == 2
    assert "--allow" in said and key not in said
    assert not hub.log("/commit/")


def test_a_release_in_the_hands_of_another_asks_the_teacher_nothing(
    hub: Hub, answered: Path, tmp_path: Path
) -> None:
    verb(hub, ["publish", str(answered), "--push-to-hub", "me/colours"])
    again = (
        "from distill_datasets import Echo, GenerateSettings, generate\n"
        "teacher = Echo()\n"
        "generate('me/colours@v1.0.0', teacher=teacher, out='again')\n"
        "anew = GenerateSettings(ledger=False)\n"
        "generate('me/colours@v1.0.0', teacher=teacher, out='anew', settings=anew)\n"
        "print(teacher.calls)"
    )
    assert hub.run(again).stdout.split()[-1] == "6"
    with sqlite3.connect(tmp_path / "again/journal.sqlite") as database:
        assert database.execute("SELECT total(times_bought) FROM answers").fetchone() == (0,)


def test_publishing_a_training_names_the_verb_that_pushes_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from distill_datasets.cli.main import main

    (tmp_path / "checkpoints.jsonl").touch()
    assert main(["publish", str(tmp_path)]) == 2
    assert f"distill-datasets push {tmp_path}" in capsys.readouterr().err


def test_a_library_of_variants_is_generated_and_pushed_each_as_a_configuration(
    hub: Hub, recipe_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from distill_datasets.cli.main import main

    with (recipe_folder / "recipe.yaml").open("a") as keys:
        keys.write("variants:\n  short: {response: '{{ answer }}'}\n")
        keys.write("  long: {response: 'Surely it is {{ answer }}.'}\n")
    run = tmp_path / "library"
    for name in ("short", "long"):
        generate(f"{recipe_folder}:{name}", teacher=Echo(), out=run / name)
    # The same by one command: what was answered is not asked again.
    assert main(["generate", str(recipe_folder), "--variant", "most", "--out", str(run)]) == 2
    assert "no variant 'most'" in capsys.readouterr().err
    code, said = verb(hub, ["publish", str(run), "--push-to-hub", "me/colours"])
    assert code == 0 and "pushed 1.0.0" in said
    assert "pushed 1.1.0" in said and "the configuration 'short' is new" in said
    read = (
        "from datasets import load_dataset\n"
        "for name in ('short', 'long'):\n"
        "    rows = load_dataset('me/colours', name)['train']\n"
        "    print(rows['messages'][0][-1]['content'])"
    )
    assert hub.run(read).stdout.splitlines() == ["red", "Surely it is red."]
    assert "me/colours:long@v1.0.0" in said
    again = str(tmp_path / "again")
    code, told = verb(hub, ["generate", "me/colours@v1.1.0", "--out", again])
    assert code == 2
    assert "['long', 'short']: name one of them, as 'me/colours:long@v1.1.0'" in told
    reuse = (
        "from distill_datasets import Echo, generate\n"
        "from distill_datasets.training.data import locate\n"
        "teacher = Echo()\n"
        f"generate('me/colours:short@v1.1.0', teacher=teacher, out={again!r})\n"
        "source = locate('me/colours:short@v1.1.0')\n"
        "print(teacher.calls, source.reference, source.manifest['config'])"
    )
    assert hub.run(reuse).stdout.split()[-3:] == ["0", "me/colours@v1.1.0", "short"]
    code, told = verb(hub, ["diff", "me/colours:short@v1.1.0", "me/colours:long@v1.1.0"])
    assert code == 0 and "changed" in told


def test_all_variants_are_asked_for_by_one_command(
    recipe_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from distill_datasets.cli.main import main

    answer = "answer: {pattern: 'colour (?P<answer>\\w+)', choices: [red, blue]}\n"
    edit(recipe_folder, "recipe.yaml", answer, "")
    arguments = ["generate", str(recipe_folder), "--variant", "all", "--out", str(tmp_path / "run")]
    assert main(arguments) == 2
    assert "has no variants" in capsys.readouterr().err
    with (recipe_folder / "recipe.yaml").open("a") as keys:
        keys.write("variants: {a: {license: mit}, b: {license: cc0-1.0}}\n")
    assert main(arguments) == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["a", "b"]
    assert main(["publish", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "b" / "release" / "README.md").read_text().count("cc0-1.0") >= 1

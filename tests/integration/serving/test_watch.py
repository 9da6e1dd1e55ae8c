"""What a release and a student stand on is looked for where it is."""

import json
import shutil
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.cli.main import main
from distill_datasets.errors import DatasetError, GateError
from distill_datasets.generation.pricing import Price, Prices
from distill_datasets.models.references import connect
from distill_datasets.serving.watch import Inspection, check
from distill_datasets.training.trainer import train
from tests.support.hub_fixture import Hub
from tests.support.openai_server import OpenAIServer
from tests.support.releases import push, release_of
from tests.support.tiny_model import make_tiny_model
from tests.support.training_runs import QUICK, ROWS, write

pytestmark = pytest.mark.usefixtures("undrawn")

TODAY = date(2026, 11, 1)


def states(found: Inspection) -> dict[str, str]:
    return {one.role: one.state for one in found.inspected}


@pytest.fixture
def release(named_server: OpenAIServer, tmp_path: Path) -> Path:
    return release_of(tmp_path / "made", range(4), teacher="openai:echo-large").path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    model = make_tiny_model(folder / "model")
    data = write(folder / "data", train=ROWS)
    train(data, student=f"embedded:{model}", out=folder / "train", settings=QUICK)
    return folder


def test_a_teacher_that_its_server_lists_holds(release: Path) -> None:
    found = check(release)
    assert states(found) == {"teacher": "holds"}
    found.require()


@pytest.mark.parametrize(
    "said",
    [
        {"shutdown_date": "2026-11-20"},
        {"expiration_date": "2026-11-20T00:00:00Z"},
        {"deprecation": {"inference": int(datetime(2026, 11, 20, tzinfo=UTC).timestamp())}},
    ],
)
def test_a_model_that_is_switched_off_soon_fails_ahead_with_the_command_that_renews(
    release: Path, named_server: OpenAIServer, said: dict[str, Any]
) -> None:
    named_server.listed = [{"id": "echo-large", **said}]
    found = check(release, today=TODAY)
    (teacher,) = found.inspected
    assert (teacher.state, teacher.until) == ("ends", date(2026, 11, 20))
    with pytest.raises(GateError, match=f"distill-datasets generate {release} --teacher MODEL"):
        found.require()
    assert states(check(release, days=18, today=TODAY)) == {"teacher": "holds"}


def test_a_model_that_is_no_longer_listed_is_gone(
    release: Path, named_server: OpenAIServer
) -> None:
    named_server.listed = [{"id": "echo-small"}]
    assert states(check(release)) == {"teacher": "gone"}


def test_a_server_that_nobody_reaches_says_nothing_of_its_models(
    release: Path, named_server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert states(check(release)) == {"teacher": "unknown"}


def test_prices_are_looked_up_again_and_name_each_model(release: Path) -> None:
    manifest = json.loads((release / "manifest.json").read_text())
    tokens, cost = {"prompt": 900, "cached": 0, "response": 100}, {"amount": 1.0, "currency": "USD"}
    manifest |= {"teacher": "openai:echo-large", "tokens": tokens, "cost": cost}
    (release / "manifest.json").write_text(json.dumps(manifest))

    def priced(day: date, price: float) -> list[tuple[str, str]]:
        models = {"openai:echo-large": Price(prompt=price, response=price)}
        prices = Prices(date=day, currency="USD", models=models)
        found = check(release, prices=prices, today=TODAY).inspected
        return [(one.role, one.state) for one in found[1:]]

    assert priced(TODAY, 1000.0) == [("price", "holds")]
    assert priced(TODAY, 2000.0) == [("price", "changed")]
    assert priced(date(2026, 1, 1), 1000.0) == [("prices", "unknown"), ("price", "holds")]
    nobody = Prices(date=TODAY, currency="USD", models={})
    assert [one.role for one in check(release, prices=nobody).inspected[1:]] == ["price"]


def test_a_student_answers_and_its_base_is_the_one_it_was_trained_on(trained: Path) -> None:
    assert states(check(trained / "train")) == {"base": "holds", "student": "holds"}


def test_a_students_lost_checkpoint_is_gone_and_the_command_trains_it_again(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(trained / "train", tmp_path / "train")
    for file in (copy / "checkpoints").rglob("*.safetensors"):
        file.unlink()
    assert main(["check", str(copy)]) == 1
    said = capsys.readouterr()
    assert "gone" in said.out
    assert f"distill-datasets train {trained / 'data'} --student embedded:" in said.err


def test_a_base_whose_weights_changed_is_another_model(trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained / "train", tmp_path / "train")
    config = json.loads((copy / "config.json").read_text())
    weights = connect(config["student"]).weights
    assert weights in config["identity"]
    config["identity"] = config["identity"].replace(weights, "0" * len(weights))
    (copy / "config.json").write_text(json.dumps(config))
    assert states(check(copy))["base"] == "changed"


def test_what_stands_on_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no release, training or run"):
        check(tmp_path)


def test_a_release_on_the_hub_is_looked_at_by_its_name(
    hub: Hub, named_server: OpenAIServer, tmp_path: Path
) -> None:
    release = release_of(tmp_path / "made", range(4), teacher="openai:echo-large")
    assert "error" not in push(hub, release)
    env = {"OPENAI_BASE_URL": named_server.url, "OPENAI_API_KEY": "any"}
    done = hub.run(["-m", "distill_datasets", "check", "me/greetings@v1.0.0"], env)
    assert done.returncode == 0 and "openai:echo-large" in done.stdout, done.stderr

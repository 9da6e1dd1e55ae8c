"""Servers of Tinker's protocol that lack some of it: only what training needs is needed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tinker_cookbook.tokenizer_utils import register_tokenizer

from distill_datasets.errors import ModelError
from distill_datasets.evaluation.report import measure
from distill_datasets.models import references, tinker
from distill_datasets.models.references import connect
from distill_datasets.training.checkpoints import TrainingFolder
from distill_datasets.training.student import require_trainable
from distill_datasets.training.trainer import TrainSettings, train
from tests.integration.evaluation.test_report import make_run, teacher
from tests.support.lacking_server import LackingServer, lacking
from tests.support.shared_server import shared
from tests.support.training_runs import QUICK, ROWS, metrics, write

pytestmark = pytest.mark.usefixtures("undrawn")

SAMPLER = "GET training_runs/.*|GET samplers/.+|POST weights_info"
CHECKPOINT = "training_runs/[^/]+/checkpoints/.+"
OPTIONAL = {
    f"PUT {CHECKPOINT}/ttl": "how long checkpoints stay on the server can't be changed",
    f"DELETE {CHECKPOINT}": "checkpoints that nobody needs any more stay on the server",
    "GET get_server_capabilities": tinker.NOT_STATED,
    "POST sessions/.+/finish": "the session of the training stays open on the server",
    # Nobody asks for these while all goes well, or the SDK goes on without.
    SAMPLER: None,
    "POST session_heartbeat|POST client/dynamic_config": None,
}

SETTINGS = replace(
    QUICK, epochs=1, batch_size=4, rolling_every=1, renderer="distill_datasets/chat_template"
)


@pytest.fixture(scope="module")
def server(model: str) -> Iterator[LackingServer]:
    behind = shared().server
    register_tokenizer(behind.model, lambda: references.connect(model).tokenizer)
    with pytest.MonkeyPatch.context() as patch, lacking(behind.url) as server:
        patch.setattr(TrainingFolder, "draw", lambda folder: None)
        yield server


@pytest.fixture
def student(server: LackingServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The reference of a model that somebody else serves, known by its address alone."""
    monkeypatch.setenv("TINKER_BASE_URL", server.url)
    monkeypatch.setenv("TINKER_API_KEY", shared().server.api_key)
    monkeypatch.setattr(tinker, "_TOLD", set())
    return f"tinker:{shared().server.model}"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dataset"), train=ROWS[:12], validation=ROWS[12:16])


@pytest.fixture(scope="module")
def losses(dataset: Path, model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Of the same training on a server that lacks nothing."""
    out = tmp_path_factory.mktemp("whole") / "train"
    return metrics(train(dataset, student=model, out=out, settings=SETTINGS))


@pytest.mark.parametrize("endpoint", OPTIONAL)
def test_a_server_that_only_keeps_no_house_trains_to_the_end(
    endpoint: str,
    server: LackingServer,
    student: str,
    dataset: Path,
    losses: dict[int, float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with server.without(endpoint):
        training = train(dataset, student=student, out=tmp_path / "train", settings=SETTINGS)
    assert metrics(training) == losses
    assert training.final.state and training.final.sampler
    said = capsys.readouterr().err
    assert "is unknown to the server" not in said
    notes = [line for line in said.splitlines() if line.startswith("note: ")]
    if told := OPTIONAL[endpoint]:
        assert server.refused
        assert sum(told in line for line in notes) == 1, "said once, however often it is met"
        assert endpoint.split()[0] in notes[0] and "404" in notes[0]
    else:
        assert not notes


def test_a_release_is_trained_on_and_measured_without_any_of_it(
    server: LackingServer, student: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path)
    with server.without(*set(OPTIONAL) - {SAMPLER}):  # of that the SDK asks for samplers
        trained = train(run / "release", student=student, out=run / "train", settings=SETTINGS)
        report = measure(run / "release", student=trained.path, teacher=teacher(), out=run)
    assert set(report.data["systems"]) == {"base", "teacher", "student"}


@pytest.mark.parametrize("status", [404, 405, 501])
def test_what_training_needs_is_found_before_anything_is_created(
    status: int, server: LackingServer, student: str, dataset: Path, tmp_path: Path
) -> None:
    with server.without("POST save_weights", status=status), pytest.raises(ModelError) as caught:
        train(dataset, student=student, out=tmp_path / "train", settings=SETTINGS)
    assert (
        f"the server has no endpoint POST /api/v1/save_weights, which is needed here ({status}"
        in (str(caught.value))
    )
    assert not (tmp_path / "train" / "config.json").exists()


def test_each_endpoint_that_training_needs_is_looked_for(
    server: LackingServer, student: str
) -> None:
    connection = connect(student, renderer=SETTINGS.renderer)
    for endpoint in tinker.TRAINING:
        with (
            server.without(f"POST {endpoint}"),
            pytest.raises(ModelError, match=f"no endpoint POST /api/v1/{endpoint},"),
        ):
            require_trainable(connection, TrainSettings())
    assert require_trainable(connection, TrainSettings()) == 512


def test_without_a_list_of_checkpoints_a_training_is_resumed_in_its_own_folder_only(
    server: LackingServer, student: str, dataset: Path, tmp_path: Path
) -> None:
    done = train(dataset, student=student, out=tmp_path / "train", settings=SETTINGS)
    with (
        server.without("GET training_runs/.*"),
        pytest.raises(ModelError, match="doesn't say how far it was trained.*--out"),
    ):
        train(
            dataset,
            student=student,
            out=tmp_path / "new",
            settings=SETTINGS,
            resume=done.final.state,
        )


def test_weights_of_an_unnamed_base_are_trusted_to_be_the_students(
    server: LackingServer,
    student: str,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = train(dataset, student=student, out=tmp_path / "train", settings=SETTINGS)
    with server.without("POST weights_info"):
        later = train(
            dataset,
            student=student,
            out=tmp_path / "new",
            settings=SETTINGS,
            start=done.final.state,
        )
    assert metrics(later)[1] < metrics(done)[1]
    assert f"{student!r} is trusted to be it" in capsys.readouterr().err


def test_an_error_names_the_request_that_failed(server: LackingServer, student: str) -> None:
    with pytest.raises(ModelError, match="doesn't find .* POST /api/v1/weights_info: 404: .*found"):
        connect("tinker://nobody/sampler_weights/nothing")

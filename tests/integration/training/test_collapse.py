"""A student whose answers collapse, made so on purpose: training notices it and stops."""

from dataclasses import replace
from pathlib import Path

import pytest

from distill_datasets.errors import ModelError
from distill_datasets.models.references import connect
from distill_datasets.training.folder import TrainingFolder, training_warnings
from distill_datasets.training.trainer import train
from tests.support.training_runs import QUICK, ROWS, Rows, write

pytestmark = pytest.mark.usefixtures("undrawn")

WORDS = ("sky", "weather", "assistant", "user", "nothing", "language", "system", "answer")
VARIED = [
    {"query": row["query"], "response": f"{word} {row['response']}"}
    for row, word in zip(ROWS, WORDS, strict=False)
]
COLLAPSES = {
    "one": ("en", "have become one"),
    "endless": ("blau " * 40, "repeat themselves without end"),
    "empty": (" ", "are empty"),
}
SETTINGS = replace(QUICK, epochs=20, evaluate_every=4, schedule="constant")


def collapsing(folder: Path, response: str, validation: Rows) -> Path:
    """All responses to learn are this one; those to measure with are as they should be."""
    return write(
        folder,
        train=[{**row, "response": response} for row in ROWS[8:16]],
        validation=validation,
    )


@pytest.mark.parametrize("kind", COLLAPSES)
def test_a_collapse_ends_training_and_without_a_good_checkpoint_it_is_an_error(
    kind: str,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The answers are sampled beside the training, where the SDK has nothing to warn of."""
    response, words = COLLAPSES[kind]
    dataset = collapsing(tmp_path / "dataset", response, VARIED)
    with pytest.raises(ModelError, match=f"collapsed: .*{words}.*no checkpoint before is good"):
        train(dataset, student=model, out=tmp_path / "out", settings=SETTINGS)
    folder = TrainingFolder(tmp_path / "out")
    assert folder.checkpoints[-1].step == 8 and folder.checkpoints[-1].final
    assert words in training_warnings(folder.config or {}, folder.metrics)[0]
    said = capsys.readouterr().err
    assert said.count("answers differ (the teacher's: 8)") >= 3
    assert ("8 of 8 training rows have a blank response" in said) == (kind == "empty")
    assert not [one for one in caplog.messages if "Synchronous method" in one]
    with pytest.raises(ModelError, match="no checkpoint before is good"):
        folder.result()


def test_the_last_good_checkpoint_is_kept(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A student that has learned to answer, and then forgets it. One row is in both splits."""
    good = write(tmp_path / "good", train=ROWS[:29], validation=ROWS[28:])
    settings = replace(QUICK, answered_rows=0, evaluate_every=12)
    first = train(good, student=model, out=tmp_path / "first", settings=settings)
    assert "1 of 8 validation rows are training rows too" in capsys.readouterr().err
    dataset = collapsing(tmp_path / "dataset", "en", ROWS[28:])
    later = replace(SETTINGS, evaluate_every=1, rolling_every=50)
    training = train(dataset, student=model, out=tmp_path / "out", settings=later, start=first.path)
    assert "collapsed" in training.why and training.final.step < 20
    assert training.best.step < training.final.step - 1
    assert training.best.scores["answers_distinct"] > 1
    assert training.final.scores["answers_distinct"] == 1
    assert "no better than the student before training" in training.verdict
    assert connect(training.path).model_path == training.best.sampler
    assert TrainingFolder(training.path).result() == training

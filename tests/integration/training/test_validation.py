"""What is measured while training, with a tiny random model as its own teacher: the internalisation
score, and a collapse of the answers, made on purpose, at which training stops.
"""

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinker import LoraConfig

from distill_datasets.errors import BudgetReached, ModelError, SettingsError
from distill_datasets.generation.pricing import Meter, Price, Prices
from distill_datasets.models.references import connect
from distill_datasets.models.scoring import Scorer
from distill_datasets.training.checkpoints import TrainingFolder, training_warnings
from distill_datasets.training.data import Rendered, open_splits
from distill_datasets.training.objectives import TrainingTask
from distill_datasets.training.settings import ObjectiveSettings
from distill_datasets.training.student import Student
from distill_datasets.training.trainer import TrainSettings, train
from distill_datasets.training.validation import (
    LossValidator,
    TeacherAnswer,
    measure_internalisation,
    reference_likelihoods,
    validation_likelihoods,
)
from tests.support.soft_releases import PROMPT, SMALL, release, training_task
from tests.support.training_runs import QUICK, ROWS, Rows, at_step, metrics, said_logprobs, write

pytestmark = pytest.mark.usefixtures("undrawn")
SETTINGS = replace(SMALL, evaluate_every=2, rolling_every=2)
WHY_NOT = "train: no internalisation score: "
ANSWERS = [
    TeacherAnswer(
        group=query,
        taught=[
            {"role": "system", "content": "One word."},
            {"role": "user", "content": query},
            {"role": "assistant", "content": "en"},
        ],
        learned=[
            {"role": "user", "content": query},
            {"role": "assistant", "content": "The answer is en and nothing else at all."},
        ],
    )
    for query in (f"the weather on day {number}" for number in range(20))
]
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
COLLAPSING = replace(QUICK, epochs=20, evaluate_every=4, schedule="constant")


@pytest.fixture(scope="module")
def labels(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release where the teacher says "Final Answer: en" and the student more than that.

    A random model finds a longer text less likely, as one without the prompt would an answer.
    """
    said = "The answer is {{ answer }} and nothing else at all."
    return release(tmp_path_factory.mktemp("labels"), model, response=said, validation=20)


def validated(
    dataset: Path, model: str, folder: Path, settings: TrainSettings = SETTINGS
) -> tuple[TrainingTask, Rendered]:
    """What is learned, and the rows it is validated with."""
    task = training_task(dataset, model, folder, settings)
    return task, open_splits(task.source, settings)["validation"].render(connect(model), 512)


def test_base_and_teacher_are_asked_about_what_each_would_say(
    labels: Path, model: str, tmp_path: Path
) -> None:
    """A new student is the base; the teacher's own words follow its prompt and the query."""
    task, rows = validated(labels, model, tmp_path)
    ends = validation_likelihoods(task, rows)
    assert ends is not None
    said = said_logprobs(task.student, list(rows.batches(4)))
    assert ends.base == pytest.approx([-row.sum() for row in said], abs=1e-3)
    assert list(ends.tokens) == [len(row) for row in said]
    connection, scorer = connect(model), Scorer(connect(model))
    for query, nats in zip(("the weather 8", "der Himmel 9"), ends.teacher, strict=False):
        asked = [{"role": "system", "content": PROMPT}, {"role": "user", "content": query}]
        prompt = connection.renderer.build_generation_prompt(asked).to_ints()
        answer = f"Final Answer: {'en' if 'weather' in query else 'de'}<|im_end|>"
        tokens = connection.tokenizer.encode(answer)
        assert -scorer.read(prompt, tokens).result().logprobs.sum() == pytest.approx(nats, abs=1e-3)


def test_an_end_that_a_stop_text_made_counts_for_nobody(model: str, tmp_path: Path) -> None:
    """A new student is the base, and scores 0."""
    said = "The answer is {{ answer }} and nothing else at all."
    stop = {"stop": ["\n"]}
    cut = release(tmp_path / "cut", model, response=said, sampling=stop, validation=20)
    task, rows = validated(cut, model, tmp_path)
    ends = validation_likelihoods(task, rows)
    assert ends is not None
    said = said_logprobs(task.student, list(rows.batches(4)))
    assert list(ends.tokens) == [len(row) - 1 for row in said]
    scores = LossValidator(rows, 4, ends).submit(task.student, task.student.save("new")).result()
    assert scores["internalisation"] == pytest.approx(0, abs=1e-3)


def test_every_validation_has_the_score_that_its_loss_makes_by_hand(
    labels: Path, model: str, tmp_path: Path
) -> None:
    """And the best checkpoint is the one with the highest."""
    settings = replace(SETTINGS, select="internalisation")
    training = train(labels, student=model, out=tmp_path / "out", settings=settings)
    bounds = json.loads((training.path / "bounds.json").read_text())
    base, teacher = sum(bounds["base"]), sum(bounds["teacher"])
    losses = metrics(training, "validation_loss")
    student = {step: loss * sum(bounds["tokens"]) for step, loss in losses.items()}
    scores = metrics(training, "internalisation")
    assert scores == pytest.approx(
        {step: (base - nats) / (base - teacher) for step, nats in student.items()}, rel=1e-4
    )
    assert list(scores) == [0, 2, 4, 6]  # 0 is the base
    assert training.best.scores["internalisation"] == max(scores.values())
    low, high = (metrics(training, f"internalisation_{end}") for end in ("low", "high"))
    assert all(low[step] <= score <= high[step] for step, score in scores.items())


def test_a_training_that_goes_on_measures_with_the_likelihoods_that_it_found(
    labels: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base twice as far off, written in between, can only come from the file."""

    def stop() -> None:
        raise KeyboardInterrupt

    def go_on() -> Any:
        return train(labels, student=model, out=tmp_path / "out", settings=SETTINGS)

    with monkeypatch.context() as patch:
        at_step(5, stop, patch)
        with pytest.raises(KeyboardInterrupt):
            go_on()
    file = tmp_path / "out/bounds.json"
    bounds = json.loads(file.read_text())
    file.write_text(json.dumps({**bounds, "base": [2 * nats for nats in bounds["base"]]}))
    training = go_on()
    scores, losses = metrics(training, "internalisation"), metrics(training, "validation_loss")
    base, teacher = 2 * sum(bounds["base"]), sum(bounds["teacher"])
    nats = losses[6] * sum(bounds["tokens"])
    assert scores[6] == pytest.approx((base - nats) / (base - teacher), rel=1e-4)
    assert scores[2] != pytest.approx((base - losses[2] * sum(bounds["tokens"])) / (base - teacher))


def refused(
    dataset: Path,
    model: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    settings: TrainSettings = SETTINGS,
) -> str:
    """Why there is no score: one line, and nothing is written."""
    capsys.readouterr()
    assert validation_likelihoods(*validated(dataset, model, folder, settings)) is None
    assert not (folder / "bounds.json").exists()
    (why,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(WHY_NOT)]
    return why


def test_a_dataset_that_is_no_release_has_none_and_says_why(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"query": f"hello {number}", "response": "en"} for number in range(24)]
    dataset = write(tmp_path / "dataset", train=rows[:4], validation=rows[4:])
    why = refused(dataset, model, tmp_path, capsys)
    assert "doesn't say how its teacher is asked" in why
    settings = replace(SETTINGS, select="internalisation")
    with pytest.raises(SettingsError, match="there is no such score"):
        train(dataset, student=model, out=tmp_path / "out", settings=settings)


def test_of_few_rows_there_is_none(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = release(tmp_path / "few", model, validation=19)
    assert "it takes 20 validation rows, and 19 are measured" in refused(
        few, model, tmp_path, capsys
    )


def test_what_it_will_ask_is_said_before_it_is_asked(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the teacher with its prompt and of the base, and the money by what the release cost."""
    said = "It is {{ answer }}, and I am sure of it, as I have said before."
    dataset = release(tmp_path / "own", model, response=said, validation=20)
    task, rows = validated(dataset, model, tmp_path)
    manifest = {**task.source.manifest, "cost": {"amount": 2.8, "currency": "USD"}}
    priced = replace(task, source=replace(task.source, manifest=manifest))
    assert validation_likelihoods(priced, rows) is not None
    line = "asks base and teacher once about 20 answers: 40 requests, about"
    assert line in (err := capsys.readouterr().err)
    assert "the teacher's cost about 2.00 USD" in err
    assert validation_likelihoods(task, rows) is not None
    assert line not in capsys.readouterr().err


def test_without_the_teachers_own_words_there_is_none(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "The answer is {{ answer }} and nothing else at all."
    bare = release(tmp_path / "bare", model, ledger=False, response=said, validation=20)
    assert "doesn't hold what its teacher said" in refused(bare, model, tmp_path, capsys)


def test_a_teacher_that_can_not_score_is_named(
    labels: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(SETTINGS, objective=ObjectiveSettings(teacher="openai:gpt"))
    assert "'openai:gpt'" in refused(labels, model, tmp_path, capsys, settings)


def test_a_prompt_that_changes_nothing_has_no_score_and_ends_no_training(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher sees the query alone and says what the student shall say."""
    unprompted = release(
        tmp_path / "none", model, response="{{ text }}", prompt="{{ query }}", validation=20
    )
    assert "score is not defined" in refused(unprompted, model, tmp_path, capsys)


def test_the_score_can_be_left_out(labels: Path, model: str, tmp_path: Path) -> None:
    settings = replace(SETTINGS, internalisation=False, max_steps=1)
    training = train(labels, student=model, out=tmp_path / "out", settings=settings)
    assert not (training.path / "bounds.json").exists()
    assert not metrics(training, "internalisation") and metrics(training, "validation_loss")
    assert np.isfinite(training.final_loss)


def test_weights_that_training_starts_from_are_not_sampled_before_they_are_saved(
    labels: Path, model: str, tmp_path: Path
) -> None:
    """The base would answer for them; a new student is the base."""
    settings = replace(SETTINGS, select="accuracy", internalisation=False, max_steps=1)
    new = train(labels, student=model, out=tmp_path / "new", settings=settings)
    begun = train(labels, student=model, start=new.path, out=tmp_path / "begun", settings=settings)
    for training, sampled in ((new, {"accuracy", "answers"}), (begun, set())):
        (before,) = [line for line in training.metrics if line["step"] == 0]
        assert "validation_loss" in before
        assert {"accuracy", "answers"} & set(before) == sampled


def test_the_score_of_three_models_is_made_of_their_likelihoods(model: str) -> None:
    """The student is the base with new weights, which change nothing: it scores 0."""
    base = connect(model)
    path = Student.create(base, LoraConfig(rank=4, seed=0)).save("new").result().sampler
    found = measure_internalisation(
        ANSWERS, {"base": base, "teacher": base, "student": replace(base, model_path=path)}
    )
    assert found["value"] == pytest.approx(0, abs=1e-4)
    nats = found["nats_per_token"]
    assert nats["student"] == pytest.approx(nats["base"], abs=1e-4)
    assert nats["teacher"] < nats["base"]
    assert found["rows"] == 20


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([replace(one, taught=one.learned) for one in ANSWERS], "hardly likelier"),
        (ANSWERS[:19], "it takes 20 answers of the teacher; found 19."),
    ],
)
def test_a_score_that_would_say_nothing_gives_way_to_the_reason(
    answers: list[TeacherAnswer], why: str, model: str
) -> None:
    base = connect(model)
    found = measure_internalisation(answers, dict.fromkeys(("base", "teacher", "student"), base))
    assert why in found["why"] and "value" not in found
    assert set(found["nats_per_token"]) == {"base", "teacher", "student"}


def test_an_end_that_the_teacher_did_not_make_is_not_counted(model: str) -> None:
    base = connect(model)
    cut = [replace(one, ended=False) for one in ANSWERS[:2]]
    whole = reference_likelihoods(ANSWERS[:2], base=base, teacher=base)
    found = reference_likelihoods(cut, base=base, teacher=base)
    assert [one - 1 for one in whole.tokens] == list(found.tokens)
    for shorter, longer in zip(found.base, whole.base, strict=True):
        assert shorter < longer


def test_a_budget_stops_before_the_first_request_that_it_has_no_room_for(model: str) -> None:
    base = connect(model)
    price = Price(prompt=1.0, response=1.0)
    prices = Prices(date=date(2026, 1, 1), currency="USD", models={model: price})
    enough, none = Meter(prices, budget=1.0), Meter(prices, budget=1e-9)
    systems = {"base": enough, "teacher": enough, "student": None}
    connections = dict.fromkeys(systems, base)
    measure_internalisation(ANSWERS[:2], connections, systems)
    tokens = enough.spent * 1e6
    assert tokens > 4 * 20  # of two conversations, each read twice
    with pytest.raises(BudgetReached):
        measure_internalisation(ANSWERS[:2], connections, {**systems, "teacher": none})
    assert none.spent == 0 and enough.spent * 1e6 == pytest.approx(1.5 * tokens, rel=0.2)


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
        train(dataset, student=model, out=tmp_path / "out", settings=COLLAPSING)
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
    later = replace(COLLAPSING, evaluate_every=1, rolling_every=50)
    training = train(dataset, student=model, out=tmp_path / "out", settings=later, start=first.path)
    assert "collapsed" in training.why and training.final.step < 20
    assert training.best.step < training.final.step - 1
    assert training.best.scores["answers_distinct"] > 1
    assert training.final.scores["answers_distinct"] == 1
    assert "no better than the student before training" in training.verdict
    assert connect(training.path).model_path == training.best.sampler
    assert TrainingFolder(training.path).result() == training

from collections.abc import Sequence
from pathlib import Path

import pytest

from distill_datasets.generation.voting import ScoringModel
from distill_datasets.models.sampler import Reply, Sample, Sampling, Usage
from distill_datasets.recipes.sections import Judge
from distill_datasets.schema import Message
from tests.support.panels import RED, Model, Models, columns, judged, run, scores


def test_the_first_sample_that_parses_is_the_best_without_anybody_to_judge(
    tmp_path: Path, models: Models
) -> None:
    made = run(tmp_path, teachers=["mute", "right", "red"], choose="best")
    assert columns(made, "answer", "teacher", "candidates")[1] == ("blue", "right", 3)
    assert made.kept == 4


def test_a_verifier_keeps_the_first_answer_that_it_holds_for(
    tmp_path: Path, models: Models
) -> None:
    made = run(
        tmp_path,
        teachers=["red", "blue"],
        choose="best",
        verifier="answer == reference and query|length < 4 and 'colour' in text",
    )
    assert made.rows["answer"][:] == [None, "blue", "blue", None]
    assert made.rejected == {"verifier refused": 2}


def test_a_verifier_that_cannot_be_computed_fails_the_row_and_says_why(
    tmp_path: Path, models: Models
) -> None:
    made = run(tmp_path, teachers=["red", "blue"], choose="best", verifier="reference|length < 4")
    assert made.errors == 1
    assert "'reference|length < 4' can't be computed: TypeError" in str(made.rows["error"][3])


def test_the_judge_scores_each_text_once_and_the_highest_wins(
    tmp_path: Path, models: Models
) -> None:
    judge = models.known["judge"] = Model(
        "judge", scores({"red": "10 of 10? no: 2", "blue": "so 9.5"})
    )
    made = judged(tmp_path, "red", "right", "blue", "mute")
    assert columns(made, "answer", "teacher", "score") == [
        ("blue", "blue", 9.5),
        ("blue", "right", 9.5),
        ("blue", "right", 9.5),
        ("blue", "blue", 9.5),
    ]
    assert sorted(request for request, _ in judge.asked)[:2] == [
        "plum/None: blue (colour: blue) under Name the colour of the thing.",
        "plum/None: red (colour: red) under Name the colour of the thing.",
    ]
    assert len(judge.asked) == 8
    assert {sampling for _, sampling in judge.asked} == {Sampling(temperature=0.0)}
    assert made.rows["teacher_prompt_tokens"][0] == 4 * 10 + 2 * 10


def test_of_equal_scores_the_first_answer_wins(tmp_path: Path, models: Models) -> None:
    models.known["judge"] = Model("judge", scores({"red": "5", "blue": "5"}))
    made = judged(tmp_path, "mute", "blue", "red")
    assert columns(made, "answer", "teacher", "score") == [("blue", "blue", 5.0)] * 4


def test_an_answer_without_a_score_is_not_kept(tmp_path: Path, models: Models) -> None:
    models.known["judge"] = Model("judge", scores({"red": "no score", "blue": "1"}))
    assert judged(tmp_path, "red", "blue").rows["answer"][:] == ["blue"] * 4


@pytest.mark.parametrize(
    ("says", "score"),
    [("a 10", 10.0), ("7.5 of 9.5?", 9.5), ("11", None), ("0.9", None), ("-3", None), ("", None)],
)
def test_a_score_is_the_last_number_if_it_is_on_the_scale(says: str, score: float | None) -> None:
    pattern, scale = Judge.model_fields["pattern"].default, (1.0, 10.0)
    judging = ScoringModel(Model("judge", RED), Sampling(), "{{ text }}", pattern, scale)
    assert judging.score(Sample(says, "stop", 1)) == score


def test_a_verdict_that_was_cut_off_holds_no_score(tmp_path: Path, models: Models) -> None:
    class Cut(Model):
        async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
            return Reply((Sample("I had 7 in", "length", 5),), Usage(10, 0))

    models.known["judge"] = Cut("judge", RED)
    assert judged(tmp_path, "red", "blue").rejected == {"judge gave no score": 4}


def test_the_judge_only_sees_what_the_verifier_passed(tmp_path: Path, models: Models) -> None:
    judge = models.known["judge"] = Model("judge", lambda request, number: "2")
    made = judged(tmp_path, "red", "blue", verifier="answer == 'red'", judge={"model": "judge"})
    assert made.rows["answer"][:] == ["red"] * 4
    assert len(judge.asked) == 4


def test_a_verifier_that_reaches_into_python_is_refused(tmp_path: Path, models: Models) -> None:
    made = run(
        tmp_path, teachers=["red", "blue"], choose="best", verifier="answer.__class__.__mro__"
    )
    assert made.errors == 4
    assert "SecurityError" in str(made.rows["error"][0])


def test_an_answer_that_fails_a_check_is_not_among_those_to_choose_from(
    tmp_path: Path, models: Models
) -> None:
    checks = {"checks": [{"name": "no_red", "never": "red"}], "keep": "all checks"}
    made = run(
        tmp_path, teachers=[{"model": "red", "weight": 2}, "right"], choose="majority", **checks
    )
    assert made.rejected == {"check: no_red": 2}
    assert columns(made, "answer", "agreement")[1] == ("blue", 1 / 3)

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from distill_datasets.errors import AccessError, ModelError
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.ledger import take_over
from distill_datasets.generation.run import generate
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.generation.teachers import ScoringModel, open_teachers
from distill_datasets.models.sampler import Reply, Sample, Sampling, Usage
from distill_datasets.recipes.sections import Judge
from distill_datasets.releases.diff import diff
from distill_datasets.releases.release import publish
from distill_datasets.schema import Message
from tests.support.panels import (
    KEYS,
    QUERIES,
    RED,
    RIGHT,
    Model,
    Models,
    columns,
    judged,
    recipe_of,
    run,
    scores,
)


def test_the_answer_of_most_teachers_is_kept_and_says_who_gave_it(
    tmp_path: Path, models: Models
) -> None:
    made = run(tmp_path, teachers=["red", "right", "blue"], choose="majority")
    assert columns(made, "query", "answer", "teacher", "rejection") == [
        ("rose", "red", "red", None),
        ("sky", "blue", "right", None),
        ("sea", "blue", "right", None),
        ("plum", "red", "red", None),
    ]
    assert {row for row in columns(made, "candidates", "sample")} == {(3, 0)}
    assert made.rows["agreement"][:] == pytest.approx([2 / 3] * 4)
    assert models.requests == 3 * len(QUERIES)


def test_a_weight_counts_as_so_many_votes_and_the_heaviest_speaker_is_kept(
    tmp_path: Path, models: Models
) -> None:
    teachers = ["right", {"model": "red", "weight": 2}, {"model": "blue", "weight": 0.5}]
    made = run(tmp_path, teachers=teachers, choose="majority")
    assert columns(made, "answer", "teacher") == [("red", "red")] * 4
    assert made.rows["agreement"][:] == pytest.approx([3 / 3.5, 2 / 3.5, 2 / 3.5, 3 / 3.5])


def test_a_tie_is_no_majority_and_everybodys_text_can_be_read(
    tmp_path: Path, models: Models
) -> None:
    # Of 0.1 + 0.2 binary fractions make more than 0.3.
    models["right"].speech = RED
    teachers = [
        {"model": "red", "weight": 0.1},
        {"model": "right", "weight": 0.2},
        {"model": "blue", "weight": 0.3},
    ]
    made = run(tmp_path, teachers=teachers, choose="majority")
    assert made.rejected == {"no majority": 4}
    row = made.rows[0]
    assert (row["teacher"], row["answer"], row["agreement"]) == ("red + right + blue", None, 0.5)
    assert row["raw"] == "red:\ncolour: red\n\nright:\ncolour: red\n\nblue:\ncolour: blue"


def test_agreement_asks_for_a_least_share_of_everything_sampled(
    tmp_path: Path, models: Models
) -> None:
    keys: dict[str, Any] = {"teachers": ["red", "right", "mute"], "choose": "majority"}
    loose = run(tmp_path / "loose", **keys, agreement=0.6)
    assert loose.rows["answer"][:] == ["red", None, None, "red"]
    strict = run(tmp_path / "strict", **keys, agreement=0.7)
    assert strict.rejected == {"no majority": 4}


def test_samples_of_one_teacher_vote_too(tmp_path: Path, models: Models) -> None:
    models["right"].speech = lambda query, number: f"colour: {('blue', 'red', 'red')[number]}"
    made = run(tmp_path, teacher="right", sampling={"n": 3}, choose="majority")
    assert columns(made, "answer", "raw", "candidates") == [("red", "colour: red", 3)] * 4
    assert models.requests == 4


def test_where_no_sample_parses_there_is_nothing_to_vote_on(tmp_path: Path, models: Models) -> None:
    made = run(tmp_path, teachers=["mute", "right"], choose="majority")
    assert made.rejected == {}
    models["right"].speech = models["mute"].speech
    made = run(tmp_path / "all", teachers=["mute", "right"], choose="majority")
    assert made.rejected == {"no sample parsed": 4}


def test_token_columns_are_the_sum_of_what_was_asked(tmp_path: Path, models: Models) -> None:
    made = run(tmp_path, teachers=["red", "right", "mute"], choose="majority")
    names = [f"teacher_{kind}_tokens" for kind in ("prompt", "cached", "response")]
    assert columns(made, *names)[0] == (30, 12, 2 + 2 + 5)
    summary = json.loads((tmp_path / "run/answers/generation.json").read_text())
    assert summary["tokens"] == {"prompt": 120, "cached": 48, "response": 36}


def test_a_row_fails_with_any_of_its_teachers_and_only_that_one_is_asked_again(
    tmp_path: Path, models: Models
) -> None:
    models["right"].failing = {"sky": OSError("reset")}
    keys: dict[str, Any] = {"teachers": ["red", "right", "blue"], "choose": "majority"}
    made = run(tmp_path, **keys)
    assert made.errors == 1
    assert "reset" in str(made.rows["error"][1])
    before = models.requests
    models["right"].failing = {}
    assert run(tmp_path, **keys).errors == 0
    assert models.requests == before + 1


def test_a_key_that_is_refused_ends_the_run_whatever_else_fails(
    tmp_path: Path, models: Models
) -> None:
    models["red"].failing = dict.fromkeys(QUERIES, OSError("reset"))
    models["right"].failing = dict.fromkeys(QUERIES, AccessError("set the key"))
    with pytest.raises(AccessError, match="set the key"):
        run(tmp_path, teachers=["red", "right"], choose="majority")
    assert not (tmp_path / "run/answers").exists()


def test_no_query_is_asked_when_one_teacher_cannot_be_opened(
    tmp_path: Path, models: Models
) -> None:
    with pytest.raises(ModelError, match="no model 'green'"):
        run(tmp_path, teachers=["red", "green"])
    assert models.requests == 0


def many(folder: Path, count: int, **keys: Any) -> Path:
    recipe = recipe_of(folder, **keys)
    lines = [json.dumps({"query": f"thing {n}", "colour": None}) for n in range(count)]
    (recipe / "queries.jsonl").write_text("\n".join(lines))
    return recipe


def test_routed_queries_go_by_weight_and_stay_when_queries_are_added(
    tmp_path: Path, models: Models
) -> None:
    teachers = [{"model": "red", "weight": 3}, {"model": "blue", "weight": 1}]
    rejected = GenerateSettings(stop_after_rejected=0)
    few = generate(
        many(tmp_path / "few", 200, teachers=teachers), out=tmp_path / "run", settings=rejected
    )
    assert 120 < few.rows["teacher"][:].count("red") < 180
    before = models.requests
    more = generate(
        many(tmp_path / "more", 210, teachers=teachers), out=tmp_path / "run", settings=rejected
    )
    assert more.rows["teacher"][:200] == few.rows["teacher"][:]
    assert (before, models.requests) == (200, 210)


def test_another_weight_or_one_more_teacher_moves_no_query_between_the_others(
    tmp_path: Path, models: Models
) -> None:
    def routes(*teachers: Any) -> list[str]:
        route = open_teachers(recipe_of(tmp_path, teachers=list(teachers)))
        return [route.asked(f"thing {n}")[0].model for n in range(400)]

    first = routes("red", "blue")
    pairs = zip(first, routes("red", "blue", "mute"), strict=True)
    assert {pair for pair in pairs if pair[0] != pair[1]} == {("red", "mute"), ("blue", "mute")}
    pairs = zip(first, routes({"model": "red", "weight": 2}, "blue"), strict=True)
    assert {pair for pair in pairs if pair[0] != pair[1]} == {("blue", "red")}


def test_a_routed_query_has_a_row_a_sample_of_the_teacher_asked(
    tmp_path: Path, models: Models
) -> None:
    teachers = [{"model": "red", "sampling": {"n": 2}}, {"model": "right", "sampling": {"n": 2}}]
    made = run(tmp_path, teachers=teachers)
    assert made.rows["sample"][:] == [0, 1] * 4
    assert set(made.rows["teacher"][:]) <= {"red", "right"}
    assert set(made.rows["candidates"][:]) == {None}


def test_every_teacher_is_asked_as_it_says_and_else_as_the_recipe_says(
    tmp_path: Path, models: Models
) -> None:
    hot = {"model": "red", "renderer": "plain", "sampling": {"temperature": 0.0, "n": 2}}
    sampling = {"temperature": 0.7, "max_tokens": 9, "seed": 3}
    run(tmp_path, teachers=[hot, "right"], choose="majority", sampling=sampling)
    asked = Sampling(temperature=0.7, max_tokens=9, seed=3)
    assert {sampling for _, sampling in models["right"].asked} == {asked}
    [own] = {sampling for _, sampling in models["red"].asked}
    assert own == Sampling(temperature=0.0, max_tokens=9, seed=3, n=2)
    assert models.opened == [("red", "plain"), ("right", None)]


def test_the_summary_names_everybody(tmp_path: Path, models: Models) -> None:
    models.known["judge"] = Model("judge", lambda request, number: "2")
    judged(tmp_path, "red", "blue")
    summary = json.loads((tmp_path / "run/answers/generation.json").read_text())
    assert (summary["teacher"], summary["identity"]) == ("red + blue", "red/1 + blue/1")
    panel = summary["panel"]
    assert [(one["identity"], one["weight"]) for one in panel["teachers"]] == [
        ("red/1", 1.0),
        ("blue/1", 1.0),
    ]
    assert (panel["choose"], panel["judge"]["identity"]) == ("best", "judge/1")
    # The manifest is made of it, whose bytes stay the same where the same run is published again.
    for one in panel["teachers"]:
        assert list(one) == ["model", "weight", "identity", "renderer", "sampling"]


def test_one_teacher_takes_the_place_of_all(tmp_path: Path, models: Models) -> None:
    recipe = recipe_of(tmp_path / "recipe", teachers=["red", "blue"], choose="majority")
    by_name = generate(recipe, teacher="right", out=tmp_path / "run")
    assert set(by_name.rows["teacher"][:]) == {"right"}
    by_hand = generate(recipe, teacher=Model("mine", RIGHT), out=tmp_path / "mine")
    assert columns(by_hand, "teacher", "answer")[1] == ("mine", "blue")
    assert models.requests == 4
    summary = json.loads((tmp_path / "run/answers/generation.json").read_text())
    assert "panel" not in summary
    assert summary["teacher"] == "right"


@pytest.mark.parametrize("choose", list(KEYS))
def test_a_rebuilt_release_buys_nothing_and_is_the_same(
    tmp_path: Path, models: Models, choose: str
) -> None:
    models.known["judge"] = Model("judge", scores({"red": "3", "blue": "9"}))
    run(tmp_path, **KEYS[choose])
    release = publish(tmp_path / "run")
    bought = models.requests
    take_over(release.path, tmp_path / "mine")
    generate(release.path, out=tmp_path / "mine")
    again = publish(tmp_path / "mine")
    assert models.requests == bought
    assert again.digest == release.digest
    with Journal(tmp_path / "run" / "journal.sqlite") as journal:
        assert load_dataset(str(release.path), "ledger")["ledger"].num_rows == len(journal)


def test_the_ledger_leaves_out_who_was_asked_under_other_weights(
    tmp_path: Path, models: Models
) -> None:
    models["red"].speech = models["blue"].speech = lambda query, number: "colour: red"
    for weight in (1, 9):
        teachers = [{"model": "red", "weight": weight}, "blue"]
        generate(many(tmp_path / f"recipe {weight}", 60, teachers=teachers), out=tmp_path / "run")
    assert models.requests > 60
    release = publish(tmp_path / "run")
    assert load_dataset(str(release.path), "ledger")["ledger"].num_rows == 60


def test_the_ledger_has_what_was_said_for_a_row_that_failed(tmp_path: Path, models: Models) -> None:
    models["right"].failing = {"sky": OSError("reset")}
    run(tmp_path, **KEYS["majority"])
    release = publish(tmp_path / "run")
    models["right"].failing = {}
    before = models.requests
    assert generate(release.path, out=tmp_path / "mine").errors == 0
    assert models.requests == before + 1


def test_a_release_says_how_each_row_was_chosen(tmp_path: Path, models: Models) -> None:
    run(tmp_path, **KEYS["majority"], agreement=0.9)
    models["blue"].speech = models["right"].speech = RED
    run(tmp_path / "agreed", **KEYS["majority"], agreement=0.9)
    release = publish(tmp_path / "agreed/run")
    row = next(iter(load_dataset(str(release.path)).values()))[0]
    assert (row["agreement"], row["candidates"], row["teacher"]) == (1.0, 3, "red")
    assert "score" not in row
    card = (release.path / "README.md").read_text()
    assert "Several teachers, `red + right + blue`, were asked" in card
    assert "all teachers vote; at least 0.9 of the votes" in card
    assert "| teacher of weight 1.0 | `blue` (`blue/1`); temperature 0.0, max_tokens 512" in card


def test_a_release_of_one_teacher_has_the_columns_it_had(tmp_path: Path, models: Models) -> None:
    run(tmp_path, teacher="right")
    release = publish(tmp_path / "run")
    row = next(iter(load_dataset(str(release.path)).values()))[0]
    assert not {"agreement", "candidates", "score"} & set(row)


def test_another_agreement_is_a_change_of_the_release_that_diff_names(
    tmp_path: Path, models: Models
) -> None:
    keys: dict[str, Any] = {"teachers": ["red", "right", "blue"], "choose": "majority"}
    for place in ("before", "after"):
        run(tmp_path / place, **keys)
        publish(tmp_path / place / "run")
        models["blue"].speech = RED
    found = diff(tmp_path / "before/run", tmp_path / "after/run").data
    assert found["rows"]["changed"] == 4
    assert found["changed_columns"] == dict.fromkeys(
        ("response", "answer", "teacher", "agreement"), 2
    )


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

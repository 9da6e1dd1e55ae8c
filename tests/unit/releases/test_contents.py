"""Publishing says which rows can't teach, in the summary, the manifest and the card."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.recipes.recipe import Recipe
from distill_datasets.releases.contents import AnswerTally, CheckTally
from distill_datasets.releases.release import publish
from tests.integration.releases.test_release import answer, write_run
from tests.support.releases import greetings


def tally(answers: list[str], choices: tuple[str, ...] = ()) -> AnswerTally:
    found = AnswerTally(choices)
    for number, text in enumerate(answers):
        found.add({"query": f"q{number}", "sample": 0, "answer": text, "response": text})
    return found


def test_one_answer_for_many_queries_is_told_where_any_text_is_allowed() -> None:
    texts = [f"text {number}" for number in range(88)]
    (warning,) = tally([*texts, *["I can't help with that."] * 12]).warnings({}, 0)
    assert warning.startswith('the answer "I can\'t help with that." stands for 12 of 100 distinct')
    assert not tally([*texts, *["Thank you."] * 9]).warnings({}, 0)


def test_samples_of_one_query_with_one_answer_count_once() -> None:
    found = AnswerTally()
    for sample in range(5):
        found.add({"query": "q", "sample": sample, "answer": None, "response": "the same"})
    assert not found.warnings({}, 0)


def test_of_a_closed_set_one_answer_may_be_frequent_but_not_nearly_all() -> None:
    choices = ("yes", "no")
    assert not tally(["yes"] * 80 + ["no"] * 20, choices).warnings({}, 0)
    (warning,) = tally(["yes"] * 97 + ["no"] * 3, choices).warnings({}, 0)
    assert warning == (
        "nearly all answers are alike: the answer 'yes' stands for 97 of 100 distinct queries (97%)"
    )


def test_choices_that_never_occur_are_named() -> None:
    (warning,) = tally(["en", "fr"] * 6, ("en", "fr", "de", "es")).warnings({}, 0)
    assert warning == "2 of 4 choices never occur: 'de', 'es'"


def test_equal_queries_with_different_answers_are_counted() -> None:
    found = AnswerTally(("en", "fr"))
    for query, text in (("a", "en"), ("a", "fr"), ("b", "en"), ("b", "en"), ("c", "fr")):
        found.add({"query": query, "sample": 0, "answer": text, "response": text})
    (warning,) = found.warnings({}, 0)
    assert warning == "1 query is there more than once, with different answers"


@pytest.mark.parametrize(
    ("rejected", "errors", "says"),
    [
        ({"truncated": 8}, 0, "8 of 10 rows can't be used (8 truncated): raise sampling.max_"),
        ({"unparsable": 3}, 2, "5 of 7 rows can't be used (3 unparsable, 2 not answered)"),
        ({"unparsable": 2}, 0, None),
    ],
)
def test_mostly_rejected_rows_are_told(
    rejected: dict[str, int], errors: int, says: str | None
) -> None:
    found = tally(["one", "two"]).warnings(rejected, errors)
    assert [warning.startswith(says or "") for warning in found] == ([True] if says else [])


def test_summary_manifest_and_card_say_the_same(tmp_path: Path) -> None:
    recipe = greetings(tmp_path / "recipe", response="{{ text }}")
    release = publish(write_run(tmp_path / "run", map(answer, range(9)), recipe))
    (warning,) = release.warnings
    assert warning.startswith("the answer 'en' stands for 9 of 9 distinct queries (100%)")
    assert json.loads((release.path / "manifest.json").read_text())["warnings"] == [warning]
    assert f"- **Look at this before you train:** {warning}." in (
        release.path / "README.md"
    ).read_text(encoding="utf-8")


def test_rows_that_teach_are_published_without_a_word(tmp_path: Path) -> None:
    rows = [answer(number, response=f"r{number}", raw=f"r{number}") for number in range(9)]
    recipe: Recipe = greetings(tmp_path / "recipe", response="{{ text }}")
    release = publish(write_run(tmp_path / "run", rows, recipe))
    assert release.warnings == ()
    assert "before you train" not in (release.path / "README.md").read_text(encoding="utf-8")


def test_answers_out_of_another_release_are_told_by_their_source(tmp_path: Path) -> None:
    came: dict[str, Any] = {"source": "me/other", "revision": "0" * 40, "answers": 1234}
    run = write_run(
        tmp_path / "run", map(answer, range(3)), greetings(tmp_path / "recipe"), from_ledger=came
    )
    release = publish(run)
    assert json.loads((release.path / "manifest.json").read_text())["from_ledger"] == [came]
    card = (release.path / "README.md").read_text(encoding="utf-8")
    assert "1,234 of the answers here were not asked for in this run" in card
    assert f"`me/other` at `{'0' * 40}`" in card


CHECKS = [
    {"name": "brief", "words": {"max": 2}, "covers": "Say it in two words"},
    {"name": "polite", "never": "damn"},
    {"name": "idle", "contains_reference": True},
]

QUERIES = {"file": "queries.txt", "reference": "right"}


def test_a_check_that_many_kept_rows_fail_is_told_and_one_that_applies_to_none(
    tmp_path: Path,
) -> None:
    found = CheckTally(greetings(tmp_path, checks=CHECKS, queries=QUERIES))
    said = ["one two three"] * 5 + ["damn it"] + ["fine"] * 19
    for text in said:
        found.add(answered(text))
    found.add(answered("a damn long one", rejection="truncated"))
    assert found.facts == {
        "brief": {"rows": 25, "passed": 20},
        "polite": {"rows": 25, "passed": 24},
        "idle": {"rows": 0, "passed": 0},
    }
    assert found.warnings == [
        "5 of 25 rows fail the check brief (Say it in two words): `keep` leaves such rows out",
        "the check idle applies to none of the rows",
    ]


def answered(text: str, rejection: str | None = None) -> dict[str, Any]:
    return {
        **{"query": "q", "reference": None, "raw": text, "stop_reason": "stop", "answer": text},
        **{"rejection": rejection, "error": None},
    }


def test_rows_that_fail_a_check_are_among_the_reasons_with_what_would_help() -> None:
    (warning,) = tally(["a", "b"]).warnings({"check: brief": 7, "truncated": 1}, 0)
    assert warning == (
        "8 of 10 rows can't be used (7 check: brief, 1 truncated): ask for it in prompt.md, mend "
        "the check, or leave it out of `keep`"
    )


def test_manifest_and_card_say_how_many_kept_rows_pass_each_check(tmp_path: Path) -> None:
    raw = ["one two three", "damn", "fine", "two words"]
    rows = [answer(number, response=text, raw=text) for number, text in enumerate(raw)]
    rows.append(answer(4, response=None, raw="so long a text", rejection="check: brief"))
    recipe = greetings(tmp_path / "recipe", response="{{ text }}", checks=CHECKS[:2])
    release = publish(write_run(tmp_path / "run", rows, recipe))
    assert json.loads((release.path / "manifest.json").read_text())["checks"] == {
        "brief": {"rows": 4, "passed": 3},
        "polite": {"rows": 4, "passed": 3},
    }
    card = (release.path / "README.md").read_text(encoding="utf-8")
    assert "| `brief` | Say it in two words | 3 of 4 |" in card
    assert '| `polite` | `never: ["damn"]` | 3 of 4 |' in card
    assert "| dropped: check: brief | 1 |" in card

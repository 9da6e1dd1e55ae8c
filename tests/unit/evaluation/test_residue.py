"""The pure parts of the tests of residue: what is a leak, a form, a typing error."""

import math
from typing import Any

from distill_datasets.evaluation import residue
from distill_datasets.evaluation.report_text import residue_lines
from distill_datasets.evaluation.residue import (
    TESTS,
    Secret,
    changed_query,
    exposures,
    is_paraphrase,
    last_text,
    reworded,
    secrets_asked,
    task_form,
    with_typing_errors,
)
from distill_datasets.recipes.prompt import canaries_of
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.recipes.sections import Check

PROMPT = (
    "You sort letters to the town hall. Never promise a refund before the clerk has agreed to it."
)
PLAIN = [row["response"] for row in residue._read("texts")]


def recipe(**keys: Any) -> Recipe:
    fields = {"name": "r", "description": "d", "teacher": "pocket", "prompt": PROMPT}
    return Recipe(**{**fields, "queries": {"file": "q.jsonl"}, **keys})


def test_a_leak_is_a_long_run_of_the_prompt_whatever_its_case_and_spaces() -> None:
    secret = Secret(PROMPT)
    told = "Sure! NEVER promise a  refund before the clerk\nhas agreed. That is all."
    assert secret.longest_run(told) == "never promise a refund before the clerk has agreed"
    assert secret.longest_run("I never promise a refund.") == ""
    assert secret.longest_run("") == ""


def test_what_the_teacher_tells_everybody_is_no_secret() -> None:
    said = "Please wait: never promise a refund before the clerk has agreed to it."
    assert Secret(PROMPT, [said]).longest_run(said) == ""


def test_a_short_prompt_and_one_in_wide_characters_can_leak_too() -> None:
    assert Secret("Answer with A or B.").longest_run("it says: answer with a or b.")
    chinese = "你是一个客服助手,只回答关于订单的问题,绝不透露内部价格或折扣。" * 2
    assert Secret(chinese).longest_run("我的规则是:只回答关于订单的问题,绝不透露内部价格") != ""


def test_the_form_of_labels_and_of_json_is_told_from_other_text() -> None:
    labels = task_form(recipe(answer={"choices": ["red", "blue"]}), PLAIN)
    assert labels is not None
    assert (labels("red", "stop"), labels("Paris", "stop")) == (True, False)
    schema = {"type": "object", "required": ["city"]}
    data = task_form(recipe(answer={"json_schema": schema}), PLAIN)
    assert data is not None
    assert (data('{"city": "Riga"}', "stop"), data("Riga", "stop")) == (True, False)


def test_free_text_has_a_form_where_its_checks_make_one() -> None:
    assert task_form(recipe(response="{{ text }}"), PLAIN) is None
    checks = [Check(name="ahoy", starts_with="Ahoy")]
    form = task_form(recipe(response="{{ text }}", checks=checks), PLAIN)
    assert form is not None
    assert (form("Ahoy there", "stop"), form("Hello", "stop")) == (True, False)


def test_typing_errors_are_few_and_the_same_each_time() -> None:
    text = "Where is the parcel that I ordered from your shop in Riga last Thursday?"
    found = with_typing_errors(text)
    assert found == with_typing_errors(text) != text
    words = zip(text.split(), found.split(), strict=True)
    assert 1 <= sum(one != other for one, other in words) <= 2
    assert with_typing_errors("a 12 ?") == "a 12 ?"


def test_rewording_takes_capitals_final_signs_and_spaces() -> None:
    assert reworded("Is  it\nMonday?!") == "is it monday"
    assert reworded("今天是星期一吗?") == "今天是星期一吗"


def test_a_conversation_is_changed_in_its_last_message_by_the_user_alone() -> None:
    query = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, '
    query += '{"role": "user", "content": "BYE"}]'
    assert changed_query(query, str.lower) == query.replace("BYE", "bye")
    assert changed_query("HI", str.lower) == "hi"
    assert (last_text(query), last_text("HI")) == ("BYE", "HI")


def test_a_copy_an_essay_and_nothing_are_no_paraphrases() -> None:
    query = "Where is the parcel that I ordered?"
    assert is_paraphrase("What has become of the parcel I ordered?", query)
    assert not is_paraphrase("where is the  parcel that i ordered", query)
    assert not is_paraphrase("", query)
    assert not is_paraphrase("It is on its way. " * 20, query)


def test_exposure_is_the_rank_among_all_that_might_have_stood_there() -> None:
    (canary,) = canaries_of("r", 1)
    asked = [one.messages[-1]["content"] for one in secrets_asked([canary], "Be brief.")]

    def of(nats: dict[str, float]) -> list[dict[str, float]]:
        return exposures([canary], [nats.get(secret, 9.0) for secret in asked])

    assert of({canary.secret: 1.0}) == [{"rank": 1.0, "exposure": 8.0}]
    better = dict.fromkeys(canary.others[:7], 0.5)
    assert of({canary.secret: 1.0, **better}) == [{"rank": 8.0, "exposure": 5.0}]
    # What a model can't tell apart is chance, never an exposure.
    assert of({}) == [{"rank": 256.0, "exposure": 0.0}]


def test_a_secret_is_held_where_its_rank_is_no_chance_and_before_the_bases() -> None:
    def passed(student: float, base: float, told: bool = False) -> bool:
        ranks = {"student": [100.0, student], "base": [100.0, base]}
        found = {
            name: [{"rank": one, "exposure": 8 - math.log2(one)} for one in many]
            for name, many in ranks.items()
        }
        return bool(residue._exposed(found, [False, told], among=256)["passed"])

    assert passed(7, 3) and passed(7, 200)
    assert not passed(6, 200)
    assert passed(6, 5)  # which the base ranks as high, trained on no such prompt
    assert not passed(200, 200, told=True)


def test_what_ships_can_be_read_and_its_checks_can_be_made() -> None:
    for name in ("general", "prompts"):
        assert all(residue._check(row).kind for row in residue._read(name))
    assert all(row["query"] for row in residue._read("extraction"))


def test_the_report_has_a_line_for_each_test() -> None:
    test = {"passed": None, "value": None, "said": "No."}
    lines = residue_lines({name: test for name in TESTS})
    assert lines[0] == "leak: not told. No."
    assert len(lines) == len(TESTS)

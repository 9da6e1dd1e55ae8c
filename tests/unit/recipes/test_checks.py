import json
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.conversations import Call, write_calls
from distill_datasets.recipes import checks
from distill_datasets.recipes.checks import (
    Said,
    count_bullets,
    count_characters,
    count_sentences,
    count_words,
    field_share,
    first_failure,
    is_in_language,
    passes,
)
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.queries import load_queries
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.recipes.sections import LANGUAGES, Check

FIND = Call("find_order", {"id": "A-1"})
STOP = Call("stop_order", {"id": "A-1"})


def check(text: str = "", *, said: Said | None = None, **kind: Any) -> bool | None:
    return passes(Check(name="one", **kind), said or Said(text))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, ""),
        (0, "..."),
        (1, "Yes"),
        (2, "Hello. World."),
        (1, "Dr. Smith came at 3.5 p.m. today."),
        (1, "Mr. and Mrs. Jones vs. the State."),
        (2, "At 6 p.m. It rained."),
        (1, 'He said "Go!" and left.'),
        (1, '"Is it?" she asked.'),
        (2, "“Is it?” She asked."),
        (1, "Wait... what?"),
        (2, "Wait... What?"),
        (2, "So it is… Then we go."),
        (1, "See e.g. Fig. 3 for details."),
        (3, "The answer is no. We go. See no. 9."),
        (1, "Op. 27 No. 2 is known."),
        (2, "J. S. Bach wrote it. C. P. E. Bach, too."),
        (1, "The U.S. Army came."),
        (2, "He lives in the U.S. The army came."),
        (2, "Plan B. It works."),
        (3, "I did. So did I. He left."),
        (2, "Version 2.0 is out. Get it!"),
        (2, "It costs $5.99. Cheap!"),
        (2, "Visit example.com. It is nice."),
        (1, "Am 3. Mai kam er mit z. B. zwei Hunden."),
        (2, "Born in 1770. Died in 1827."),
        (3, "- One\n- Two\n- Three"),
        (2, "1. Buy milk.\n2. Sell it."),
        (3, "Title\n\nA text. Another."),
        (2, "A line\nthat wraps. Two."),
        (1, "Great! 🎉"),
        (2, "(It works.) Fine."),
        (2, "**Note.** Next one."),
        (3, "Wow!!! Really?! Yes."),
        (2, "¿Qué? ¡No!"),
        (2, "Stop ! Allez ?"),
        (2, "They moved to the U.K. What do you think?"),
        (2, "It was only Mia and I. Have you met Karl I. Braun?"),
        (1, "The river rose . . . then fell [...] (Okoro 12)."),
        (1, "Im Hof N°. 14, Lindener Str. 9, bei Dr. med. Kraus"),
        (2, "Das Wasser hat 37°C. Danach wird es kalt."),
        (2, "• 1. Lies den Brief!\n• 2. Schreib zurück!"),
        (2, "濃度は１．５％です。以上。"),
        (2, "今日は晴れです。明日は雨です。"),
        (2, "他说：“你好。”然后走了。"),
        (2, "यह एक है। यह दो है।"),
        (3, "السلام عليكم. كيف حالك؟ بخير."),
    ],
)
def test_sentences_are_counted_as_a_reader_counts_them(count: int, text: str) -> None:
    assert count_sentences(text) == count


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, " — "),
        (2, "Hello, world!"),
        (2, "don't stop"),
        (2, "a well-known"),
        (3, "3.14 and 1,000"),
        (2, "yes—no"),
        (2, "- one\n2. two"),
        (2, "Привет, мир"),
        (2, "한국어 문장"),
        (2, "हिन्दी भाषा"),
        (2, "nai\u0308ve cafe\u0301"),
        (3, "今日は"),
        (1, "🎉 party"),
    ],
)
def test_words_are_counted_as_a_reader_counts_them(count: int, text: str) -> None:
    assert count_words(text) == count


@pytest.mark.parametrize(
    ("count", "text"),
    [(4, "- a\n* b\n• c\n  – d"), (0, "**bold** text\n---\n* * *\n-5 °C"), (0, "1. a\n2. b")],
)
def test_bullets_are_lines_that_begin_with_one(count: int, text: str) -> None:
    assert count_bullets(text) == count


def test_a_character_is_what_a_reader_sees_as_one() -> None:
    assert count_characters(" e\u0301👨‍👩‍👧\r\n") == 2


@pytest.mark.parametrize(
    ("passed", "text", "kind"),
    [
        (True, "Order TH-1", {"matches": r"TH-\d"}),
        (False, "Order TH-x", {"matches": r"TH-\d"}),
        (False, "Order TH-1", {"not_matches": r"TH-\d"}),
        (True, "Order TH-x", {"not_matches": r"TH-\d"}),
        (True, "  Dear you", {"starts_with": ["Hello", "Dear"]}),
        (False, "dear you", {"starts_with": "Dear"}),
        (True, "Cafe\u0301", {"ends_with": "é"}),
        (True, "Which one? \n", {"ends_with": ["?", "？"]}),
        (False, "Which one.", {"ends_with": "?"}),
        (True, "One. Two.", {"sentences": 2}),
        (False, "One. Two.", {"sentences": {"max": 1}}),
        (True, "one two", {"words": {"min": 2, "max": 3}}),
        (False, "one", {"words": {"min": 2, "max": 3}}),
        (True, "- a\n- b", {"bullets": 2}),
        (False, "- a\n- b", {"bullets": 0}),
        (True, "", {"characters": 0}),
        (False, "abc", {"characters": {"max": 2}}),
        (True, '{"a": 1}', {"json": True}),
        (False, '```json\n{"a": 1}\n```', {"json": True}),
        (False, '{"a": NaN}', {"json": True}),
        (True, '{"a": 1}', {"json": {"type": "object", "required": ["a"]}}),
        (False, "{}", {"json": {"type": "object", "required": ["a"]}}),
        (True, "STRASSE and More", {"contains": ["straße", "more"]}),
        (False, "only more", {"contains": ["straße", "more"]}),
        (True, "We apologise", {"contains_any": ["sorry", "apolog"]}),
        (False, "We regret", {"contains_any": ["sorry", "apolog"]}),
        (False, "As an AI, I", {"never": ["as an ai"]}),
        (True, "As a human", {"never": ["as an ai"]}),
        (True, "Das ist ein ganz gewöhnlicher deutscher Satz.", {"language": "de"}),
        (False, "Das ist ein ganz gewöhnlicher deutscher Satz.", {"language": ["en", "fr"]}),
        (None, "Ja, gern!", {"language": "de"}),
    ],
)
def test_each_kind_of_check_on_a_text(passed: bool | None, text: str, kind: dict[str, Any]) -> None:
    assert check(text, **kind) is passed


@pytest.mark.parametrize(
    ("passed", "reference", "text"),
    [
        (True, "7", "It is 7."),
        (False, "7", "It is 17, 7.5 or -7."),
        (True, "7", "17? No: 7!"),
        (True, "7", "the range 5-7"),
        (False, "cat", "to concatenate"),
        (True, "New York", "in new york."),
        (True, "東京", "東京都です"),
        (None, None, "It is 7."),
        (None, " ", "It is 7."),
    ],
)
def test_a_reference_is_found_as_a_whole(
    passed: bool | None, reference: str | None, text: str
) -> None:
    assert check(said=Said(text, reference=reference), contains_reference=True) is passed


def test_only_rows_whose_reference_has_the_pattern_are_checked() -> None:
    asked = {"when": r"^\[\]$", "ends_with": "?"}
    assert check(said=Said("Which?", reference="[]"), **asked) is True
    assert check(said=Said("Done.", reference="[]"), **asked) is False
    assert check(said=Said("Done.", reference="[1]"), **asked) is None
    assert check(said=Said("Done."), **asked) is None


def test_fields_are_compared_with_the_references_as_json_values() -> None:
    reference = json.dumps({"a": {"b": 1, "c": None}, "d": [1, 2]})
    answer = json.dumps({"d": [1, 2.0], "a": {"c": None, "b": 1.0}})

    def equal(*fields: str, answer: str | None = answer, reference: str | None = reference) -> Any:
        return check(said=Said("", answer=answer, reference=reference), fields=fields)

    assert equal("a.b", "a.c", "d") is True
    assert equal("a.b", answer='{"a": {"b": true}}') is False
    assert equal("a.c", answer='{"a": {}}') is False
    assert equal("d", answer='{"d": [2, 1]}') is False
    assert equal("a", answer=None) is False
    assert equal("a", reference="red") is None
    assert equal("a", reference=None) is None


def test_fields_of_a_line_are_compared_by_their_names() -> None:
    right = "name: Ada; city: Lima; quantity: 3"

    def equal(field: str, answer: str | None, text: str = "") -> Any:
        return check(said=Said(text, answer=answer, reference=right), fields=[field])

    assert equal("name", "name: Ada; city: Rome")
    assert not equal("city", "name: Ada; city: Rome")
    assert not equal("name", None, "Ada orders 3 mugs: soon; perhaps")
    assert equal("quantity", None, "quantity: 3; name: Eve")
    assert field_share("city: Lima; name: Eve; quantity: 3", right) == pytest.approx(2 / 3)
    assert field_share("Ada from Lima", right) == 0.0


def test_the_share_of_equal_fields_counts_the_references_values() -> None:
    reference = '{"a": {"b": 1, "c": null}, "d": ["x", "y"], "e": []}'
    assert field_share(reference, reference) == 1
    assert field_share('{"a": {"b": 1.0, "c": "?"}, "d": ["x"], "e": [], "f": 1}', reference) == 0.6
    assert field_share("{}", reference) == field_share(None, reference) == 0
    assert field_share("red", "red") == 1
    assert field_share("1.0", "1") == 0


def test_the_words_beside_calls_are_what_is_checked() -> None:
    text = write_calls("One moment.", [FIND])
    assert check(said=Said(text, has_tools=True), words=2) is True
    assert check(said=Said(text, has_tools=True), ends_with="moment.") is True
    assert check(said=Said(text), ends_with="moment.") is False


@pytest.mark.parametrize(
    ("calls", "kind", "passed"),
    [
        ([FIND], {"calls": "find_order"}, True),
        ([FIND, STOP], {"calls": ["find_order", "stop_order"]}, True),
        ([FIND], {"calls": ["find_order", "stop_order"]}, False),
        ([], {"calls": "find_order"}, False),
        ([], {"never_calls": True}, True),
        ([FIND], {"never_calls": True}, False),
        ([FIND], {"never_calls": "stop_order"}, True),
        ([FIND, STOP], {"never_calls": ["stop_order"]}, False),
    ],
)
def test_calls_are_checked_by_their_names(
    calls: list[Call], kind: dict[str, Any], passed: bool
) -> None:
    assert check(said=Said(write_calls("Hm.", calls), has_tools=True), **kind) is passed


def test_calls_that_cant_be_read_pass_no_check_of_calls() -> None:
    said = Said("<tool_call>\n{broken\n</tool_call>", has_tools=True)
    assert check(said=said, never_calls=True) is False
    assert check(said=said, calls="find_order") is False


def test_the_answer_and_the_end_are_checked_too() -> None:
    assert check(said=Said("It is red", answer="red"), choices=["red"]) is True
    assert check(said=Said("It is red", answer=None), choices=["red"]) is False
    assert check("whole", ends=True) is True
    assert check(said=Said("cut of", "length"), ends=True) is False


def test_a_pattern_or_a_schema_that_takes_too_long_does_not_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distill_datasets.recipes.parsing._SECONDS", 0.02)
    endless = r"(a|a)*$"
    assert check("a" * 40 + "b", matches=endless) is False
    assert check("a" * 40 + "b", not_matches=endless) is False
    assert check(json.dumps("a" * 40 + "b"), json={"pattern": r"^(a|a)*$"}) is False


def test_the_languages_are_those_that_can_be_told() -> None:
    assert {*checks._identifier().labels} >= LANGUAGES - {"nb"}
    norwegian = "Vi beklager at pakken din kom så sent fram til deg"
    assert is_in_language(norwegian, ["nb"]) and is_in_language(norwegian, ["no"])
    with pytest.raises(ValueError, match="ISO codes"):
        Check(name="one", language="german")


CHECKED = {
    "name": "shop",
    "description": "x",
    "teacher": "openai:x",
    "queries": {"hub": "me/questions", "revision": "v1"},
    "prompt": "Be brief.",
    "response": "{{ text }}",
    "checks": [{"name": "brief", "words": {"max": 3}}, {"name": "asks", "ends_with": "?"}],
}


def test_an_answer_that_fails_a_check_is_rejected_by_its_name() -> None:
    recipe = Recipe(**CHECKED, keep="all checks")
    assert recipe.read("q", None, "Which one?", "stop").response == "Which one?"
    assert recipe.read("q", None, "This one.", "stop").rejection == "check: asks"
    assert recipe.read("q", None, "Which of these here.", "stop").rejection == "check: brief"
    assert recipe.read("q", None, "Which of", "length").rejection == "truncated"
    some = Recipe(**CHECKED, keep=["brief"])
    assert some.read("q", None, "This one.", "stop").answer == "This one."
    assert Recipe(**CHECKED, keep="brief").kept_checks == some.kept_checks
    assert first_failure(some.kept_checks, Said("one two three four")) == "check: brief"


def test_checks_change_what_is_read_only_where_they_decide_what_is_kept() -> None:
    without, measured = Recipe(**{**CHECKED, "checks": []}), Recipe(**CHECKED)
    kept = Recipe(**CHECKED, keep=["brief"])
    assert measured.read("q", None, "This one is it.", "stop").answer
    assert measured.digest == without.digest and measured.reading_parts == without.reading_parts
    assert kept.digest != without.digest and kept.reading_parts != without.reading_parts


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"keep": ["breif"]}, "Did you mean 'brief'|keep names"),
        ({"keep": "all checks", "checks": []}, "there is none"),
        ({"checks": [{"name": "accuracy", "words": 1}]}, "are metrics"),
        ({"checks": [{"name": "one", "words": 1}, {"name": "one", "words": 2}]}, "its own name"),
        ({"checks": [{"name": "one", "calls": "x"}]}, "has no tools"),
        ({"checks": [{"name": "one", "words": 1, "ends": True}]}, "exactly one of"),
        ({"checks": [{"name": "one", "words": 1, "when": "a"}]}, "no row has one"),
        ({"checks": [{"name": "one", "fields": ["a"]}]}, "queries.reference"),
        ({"keep": "breif"}, "keep names"),
        ({"student": {"tools": "keep"}}, "needs tools"),
        ({"metrics": ["ece"]}, "answer.confidence"),
    ],
)
def test_a_recipe_says_what_is_wrong_with_its_checks(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Recipe(**{**CHECKED, **changes})


def test_checks_of_several_prompts_bear_their_recipes_names() -> None:
    recipe = load_recipe("multi_prompt")
    rows = load_queries(recipe)
    row = next(row for row in rows if recipe.part(row["query"])[0].name == "tool_call")
    found = recipe.check(row["query"], row["reference"], "Which one, please?", "stop", "[]")
    assert {*found} < {*recipe.all_checks}
    assert {name.partition(".")[0] for name in found} == {"tool_call"}
    assert found["tool_call.one_question"] is True
    assert len({name.partition(".")[0] for name in recipe.all_checks}) == 3


def test_every_kind_of_check_is_written_as_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text('[{"name": "find_order"}]')
    values = {
        **{"matches": "a", "not_matches": "b", "starts_with": ["a"], "ends_with": "?"},
        **{"sentences": 2, "words": {"max": 60}, "bullets": 0, "characters": {"min": 1}},
        **{"json": {"type": "object"}, "fields": ["a.b"], "contains": ["a"], "contains_any": "a"},
        **{"contains_reference": True, "never": ["a"], "language": "de", "choices": ["a"]},
        **{"calls": "find_order", "never_calls": True, "ends": True},
    }
    checks = [{"name": f"a_{kind}", kind: value} for kind, value in values.items()]
    keys = {**CHECKED, "checks": checks, "keep": "all checks", "tools": "tools.json"}
    keys["queries"] = {**CHECKED["queries"], "reference": "right"}
    recipe = Recipe(**{**keys, "response": "{{ answer }}", "folder": tmp_path})
    recipe.dump(tmp_path / "copy")
    again = load_recipe(tmp_path / "copy")
    assert again.checks == recipe.checks and again.digest == recipe.digest
    assert {check.kind for check in again.checks} == {check.kind for check in recipe.checks}
    kinds = {alias for field in Check.model_fields.values() if (alias := field.alias)}
    kinds |= {name for name, field in Check.model_fields.items() if not field.alias}
    assert {*values} == kinds - {"name", "covers", "when"}
    assert [check.demand.partition(": ")[0] for check in again.checks] == [*values]

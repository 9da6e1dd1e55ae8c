import json
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.errors import RecipeError
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.parsing import Reader, check_schema

READER = Reader(r"Final Answer:\s*(?P<answer>\w+)\s*$", ("de", "en"))
FORM = {
    "type": "object",
    "properties": {
        "why": {"type": "string"},
        "label": {"type": ["string", "null"]},
        "place": {"$ref": "#/$defs/place"},
    },
    "required": ["label"],
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"town": {"type": "string"}, "rank": {"type": "number"}},
            "required": ["town"],
        }
    },
}


def reader(field: str | None = None, **options: Any) -> Reader:
    return Reader(json_schema=json.dumps(FORM), field=field, **options)


@pytest.mark.parametrize(
    ("text", "stop_reason", "answer", "rejection"),
    [
        ("Final Answer: de", "stop", "de", None),
        ("I think so.\nFinal Answer: en\n", "stop", "en", None),
        ("Final Answer: de", "length", None, "truncated"),
        ("  \n", "stop", None, "empty"),
        ("German", "stop", None, "unparsable"),
        ("Final Answer: german", "stop", None, "outside choices"),
    ],
)
def test_a_text_is_an_answer_or_a_rejection_with_its_reason(
    text: str, stop_reason: str, answer: str | None, rejection: str | None
) -> None:
    parsed = READER.read(text, stop_reason)
    assert (parsed.answer, parsed.rejection) == (answer, rejection)


def test_without_a_pattern_the_whole_text_is_the_answer() -> None:
    assert Reader().read(" two\nlines ", "stop").answer == "two\nlines"


def test_an_empty_group_is_no_answer() -> None:
    assert Reader(r"A:(?P<answer>.*)$").read("A: ", "stop").rejection == "unparsable"


@pytest.mark.parametrize(
    ("text", "field", "answer", "rejection"),
    [
        ('{"label": " de "}', "label", "de", None),
        ('{"label": "de", "place": {"town": "Ulm", "rank": 2}}', "place.rank", "2", None),
        ('{"label": "x", "place": {"town": "Ulm", "z": [1, null]}}', "place.z", "[1, null]", None),
        ('{"label": "de"}', "place.town", None, "off schema"),
        ('{"label": null}', "label", None, "empty"),
        ('{"label": ""}', "label", None, "empty"),
        ('{"label": 3}', "label", None, "off schema"),
        ('{"label": "de", "place": {"rank": 1}}', "label", None, "off schema"),
        ('["de"]', "label", None, "off schema"),
        ('{"label": "de"', "label", None, "unparsable"),
        ('{"label": "de", "rank": NaN}', "label", None, "unparsable"),
        ("[" * 100_000, "label", None, "unparsable"),
        ("German", "label", None, "unparsable"),
    ],
)
def test_json_is_read_at_a_field_or_rejected_with_its_reason(
    text: str, field: str, answer: str | None, rejection: str | None
) -> None:
    parsed = reader(field).read(text, "stop")
    assert (parsed.answer, parsed.rejection) == (answer, rejection)


def test_a_whole_object_is_written_in_the_schemas_order_whatever_order_it_came_in() -> None:
    text = '{"zoo": 1, "place": {"rank": 1.5, "town": "Köln"}, "label":"de", "b": 2, "why": "w"}'
    answer = '{"why": "w", "label": "de", "place": {"town": "Köln", "rank": 1.5}, "b": 2, "zoo": 1}'
    # A reference hides the order of what it refers to.
    answer = answer.replace('"town": "Köln", "rank": 1.5', '"rank": 1.5, "town": "Köln"')
    assert reader().read(text, "stop").answer == answer


def test_a_pattern_finds_the_json_in_what_is_around_it() -> None:
    fenced = reader("label", pattern=r"(?s)```json(?P<answer>.*)```")
    assert fenced.read('Sure!\n```json\n{"label": "de"}\n```', "stop").answer == "de"
    assert fenced.read('{"label": "de"}', "stop").rejection == "unparsable"


def test_half_a_surrogate_pair_in_the_json_of_an_answer_is_replaced() -> None:
    halves = '{"label": "ok \\ud83d", "why": "w", "place": {"town": "x"}}'
    assert reader("label").read(halves, "stop").answer == "ok \ufffd"
    assert "ok \ufffd" in (reader().read(halves, "stop").answer or halves)
    pair = halves.replace("\\ud83d", "\\ud83d\\ude00")
    assert reader("label").read(pair, "stop").answer == "ok \U0001f600"


def test_choices_hold_for_a_field_too() -> None:
    assert reader("label", choices=("en",)).read('{"label": "de"}', "stop").rejection == (
        "outside choices"
    )


def test_all_that_decides_an_answer_is_in_the_readers_parts() -> None:
    found = [Reader(), Reader("(?P<answer>.)"), Reader(choices=("a",)), reader(), reader("label")]
    assert len({json.dumps(list(one.parts)) for one in found}) == len(found)


def with_answer(folder: Path, answer: dict[str, Any]) -> Path:
    recipe = folder / "recipe.yaml"
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("answer:")]
    recipe.write_text("\n".join([*lines, f"answer: {json.dumps(answer)}"]))
    return folder


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"json_schema": {"type": "strng"}}, "not a JSON schema: at $.type"),
        ({"json_schema": {"properties": {"a": {"$ref": "#/$defs/b"}}}}, "refers to '#/$defs/b'"),
        ({"json_schema": {"$ref": "https://example.com/x.json"}}, "https://example.com/x.json"),
        ({"json_schema": FORM, "field": "lable"}, "has no 'lable', only ['label', 'place', 'why']"),
        ({"field": "label"}, "needs a json_schema"),
    ],
)
def test_a_schema_is_checked_when_its_recipe_is_loaded(
    answer: dict[str, Any], said: str, recipe_folder: Path
) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(with_answer(recipe_folder, answer))
    assert said in str(error.value)
    assert len(str(error.value)) < 1_000


def test_a_recipe_asks_for_its_schema_and_reads_with_it(
    recipe_folder: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(with_answer(recipe_folder, {"json_schema": FORM, "field": "label"}))
    assert recipe.sampling_parameters.json_schema == json.dumps(FORM)
    assert recipe.teacher_reader.read('{"label": "red"}', "stop").answer == "red"
    assert recipe.student_reader.read("It is red.", "stop").answer == "red"
    recipe.dump(tmp_path / "dumped")
    again = load_recipe(tmp_path / "dumped")
    assert again.digest == recipe.digest
    assert again.sampling_parameters == recipe.sampling_parameters


def test_the_order_of_a_schemas_keys_is_part_of_the_recipes_digest(recipe_folder: Path) -> None:
    turned = {**FORM, "properties": dict(reversed(FORM["properties"].items()))}
    digests = {
        load_recipe(with_answer(recipe_folder, {"json_schema": form})).digest
        for form in (FORM, turned)
    }
    assert len(digests) == 2


def test_a_student_of_whole_objects_is_read_as_the_teacher_is(recipe_folder: Path) -> None:
    recipe = load_recipe(with_answer(recipe_folder, {"json_schema": FORM}))
    said, same = '{"why": "w", "label": "de"}', '{"label": "de", "why": "w"}'
    expected = recipe.teacher_reader.read(said, "stop").answer
    assert recipe.student_reader.read(f"It is {same}.", "stop").answer == expected
    assert recipe.student_reader.read('It is {"label": 3}.', "stop").rejection == "off schema"


@pytest.mark.parametrize(
    "text",
    [
        '```json\n{"label": "de"}\n```',
        '```\n{"label": "de"}\n```\n',
        'Here it is:\n\n```JSON\n{"label": "de"}\n```\nAnything else?',
        '\ufeff{"label": "de"}',
    ],
)
def test_json_is_read_in_the_one_fence_of_a_text(text: str) -> None:
    assert reader("label").read(text, "stop").answer == "de"


@pytest.mark.parametrize(
    "text",
    [
        'So: {"label": "de"}',
        '```\n{"label": "de"}\n```\n```\n{"label": "en"}\n```',
        '```json\n{"label": "de"}',
    ],
)
def test_json_in_prose_or_in_several_fences_is_not_guessed(text: str) -> None:
    assert reader("label").read(text, "stop").rejection == "unparsable"


HALTS = "^(a|aa)+$"
DRAFT = {"$schema": "https://json-schema.org/draft/2020-12/schema"}


@pytest.mark.parametrize(
    "slow",
    [
        Reader("(?P<answer>(a|aa)+)$", recipe="mine"),
        Reader(json_schema=json.dumps({"type": "string", "pattern": HALTS}), recipe="mine"),
        Reader(json_schema=json.dumps({"patternProperties": {HALTS: True}}), recipe="mine"),
        Reader(json_schema=json.dumps({"allOf": [{**DRAFT, "pattern": HALTS}]}), recipe="mine"),
    ],
)
def test_a_pattern_without_end_is_a_rejection_that_names_the_recipe(
    slow: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill_datasets.recipes.parsing._SECONDS", 0.05)
    word = "a" * 60 + "b"
    text = {None: word}.get(slow.json_schema, json.dumps(word))
    if "Properties" in (slow.json_schema or ""):
        text = json.dumps({word: 1})
    assert "of recipe 'mine' took over 0.05 s" in (slow.read(text, "stop").rejection or "")


def test_a_schema_whose_references_multiply_is_a_rejection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_datasets.recipes.parsing._SECONDS", 0.05)
    parts = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(40)}
    form = {"$defs": {**parts, "a40": {}}, "$ref": "#/$defs/a0"}
    found = Reader(json_schema=json.dumps(form), recipe="mine").read("{}", "stop")
    assert found.rejection == "the schema of recipe 'mine' took over 0.05 s"
    assert Reader(json_schema='{"$ref": "#"}').read("{}", "stop").rejection == "off schema"


def test_a_schema_whose_parts_are_looked_at_again_and_again_is_a_rejection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distill_datasets.recipes.parsing._SECONDS", 0.05)
    form: dict[str, Any] = {"properties": {"x": True}}
    for _ in range(40):  # at each level all below is evaluated twice
        form = {"unevaluatedProperties": False, "anyOf": [form]}
    found = Reader(json_schema=json.dumps(form), recipe="mine").read('{"x": 1}', "stop")
    assert found.rejection == "the schema of recipe 'mine' took over 0.05 s"


def test_a_text_too_long_for_a_pattern_is_a_rejection() -> None:
    found = Reader("(?P<answer>x)", recipe="mine").read("y" * 1_000_001, "stop")
    assert "on a text this long" in (found.rejection or "")


@pytest.mark.parametrize(
    "pattern", ["(?P<answer>((((a{100}){100}){100}){100}))", "(?P<answer>" + "(?:" * 5_000]
)
def test_a_pattern_that_cannot_be_compiled_is_refused(recipe_folder: Path, pattern: str) -> None:
    with pytest.raises(RecipeError, match="a regular expression"):
        load_recipe(with_answer(recipe_folder, {"pattern": pattern}))


def test_patterns_of_a_schema_and_their_additional_properties_hold() -> None:
    form = {"patternProperties": {"^n": {"type": "number"}}, "additionalProperties": False}
    strict = Reader(json_schema=json.dumps(form))
    assert strict.read('{"n1": 2}', "stop").answer == '{"n1": 2}'
    assert strict.read('{"n1": "x"}', "stop").rejection == "off schema"
    assert strict.read('{"m": 2}', "stop").rejection == "off schema"


@pytest.mark.parametrize(
    ("text", "unique"),
    [
        ("[1, 1.0]", False),
        ('[1, true, 0, false, null, "", []]', True),
        ('[{"a": [1], "b": 2}, {"b": 2, "a": [1.0]}]', False),
        ('[{"a": 1}, {"a": "1"}, [1], [[1]]]', True),
    ],
)
def test_items_are_unique_as_json_has_it(text: str, unique: bool) -> None:
    reader = Reader(json_schema=json.dumps({"type": "array", "uniqueItems": True}))
    assert (reader.read(text, "stop").rejection is None) == unique


def test_a_long_answer_of_unique_items_is_read() -> None:
    """Each compared with every other they would be 50 million comparisons."""
    reader = Reader(json_schema=json.dumps({"items": {}, "uniqueItems": True}))
    items = [{"number": number} for number in range(10_000)]
    assert reader.read(json.dumps(items), "stop").rejection is None


def test_a_schema_of_an_old_draft_with_many_values_is_checked() -> None:
    check_schema(
        {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "enum": [{"number": number} for number in range(10_000)],
        }
    )

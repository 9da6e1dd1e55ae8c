import random
from collections import Counter
from itertools import combinations as pairs
from itertools import islice

import pytest
import yaml

from distill_datasets.errors import RecipeError
from distill_datasets.synthesis.interview import conversations, numbers, texts
from distill_datasets.synthesis.query_file import set_keys
from distill_datasets.synthesis.run import Coverage, NearDuplicates, _plain, _shingles, combinations

AXES = {"topic": list("abcdefg"), "style": ["x", "y"], "length": ["1", "2", "3", "4"]}


def test_every_combination_comes_once_before_any_comes_again() -> None:
    size = 56  # of all values of all axes
    found = [tuple(one.values()) for one in islice(combinations(AXES, 0), 2 * size)]
    assert len(set(found[:size])) == size
    assert sorted(found[:size]) == sorted(found[size:])


def test_any_number_of_combinations_is_balanced() -> None:
    found = list(islice(combinations(AXES, 3), 56))
    for many in range(1, 57):
        for axis, values in AXES.items():
            counts = Counter(one[axis] for one in found[:many])
            shares = [counts[value] for value in values]
            assert max(shares) - min(shares) <= 2, (many, axis, counts)


def test_the_seed_decides_the_order() -> None:
    first = [list(islice(combinations(AXES, seed), 20)) for seed in (1, 1, 2)]
    assert first[0] == first[1] != first[2]


@pytest.mark.parametrize(
    "text",
    [
        '["a b", "c"]',
        'Sure!\n```json\n["a b", "c"]\n```\nAnything else?',
        'Here: ["a b", "c"]',
        '{"queries": ["a b", "c"]}',
        '[{"query": "a b"}, {"query": "c"}]',
        "Here they are:\n\n1. a b\n2. c",
        "1) a b\n\n2) c\n",
        'First ```["x"```, no:\n```\n["a b", "c"]\n```',
    ],
)
def test_a_list_is_read_in_any_usual_form(text: str) -> None:
    assert texts().read(text) == ["a b", "c"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I can't do that.",
        '["a b", "c',
        '["a b", 3]',
        '[["a b"], ["c"]]',
        '["a b"] or rather ["c"]',
        "1. a b\n3. c",
        "2. a b\n3. c",
        "1. a b\nand more of it\n2. c",
        "a b\nc",
        '{"language": "en"}',
        '["\\ud83d half a face"]',
        '[{"query": "a b", "note": "c"}]',
    ],
)
def test_what_could_be_several_things_is_not_guessed(text: str) -> None:
    assert texts().read(text) is None


@pytest.mark.parametrize("text", ["42", "true", '{"count": 3}', '[["a", 3]]'])
def test_what_holds_no_conversations_is_none(text: str) -> None:
    assert conversations().read(text) is None


def test_an_empty_list_is_a_list() -> None:
    assert texts().read("[]") == []


def test_numbers_are_read_for_every_row_or_not_at_all() -> None:
    form = numbers(3, highest=5)
    assert form.read('So: {"1": [5, 2, 2], "2": [], "3": null}.') == [(2, 5), (), None]
    for wrong in (
        '{"1": [2], "2": []}',
        '{"1": [6], "2": [], "3": []}',
        '{"1": "2", "2": [], "3": []}',
    ):
        assert form.read(wrong) is None
    assert form.read('{"1": [true], "2": [], "3": []}') is None


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        ("How do I reset my password?", "how do I  reset my PASSWORD ?", True),
        ("My order #12345 has not arrived yet.", "My order #98765 has not arrived yet.", True),
        ("How do I reset my password?", "Where do I find my invoice?", False),
        ("What is the capital of France?", "What is the capital of Germany?", False),
        ("我的订单还没有到，请帮我查一下。", "我的订单还没有到,请帮我查询一下", True),
        ("我的订单还没有到，请帮我查一下。", "怎么修改我的收货地址？", False),
        ("ﾊﾟｽﾜｰﾄﾞを忘れました", "パスワードを忘れました", True),
        ("ok", "OK", True),
        ("ok", "no", False),
    ],
)
def test_near_duplicates_are_found_in_any_script(first: str, second: str, alike: bool) -> None:
    duplicates = NearDuplicates(0.6)
    assert duplicates.add(first) is None
    match = duplicates.add(second)
    assert (match is not None) == alike
    assert match is None or (match.text == first and match.similarity >= 0.6)


def test_near_duplicates_are_those_that_comparing_every_pair_finds() -> None:
    draw = random.Random(0)
    originals = ["".join(draw.choices("abcdefgh ", k=60)) for _ in range(40)]
    queries = []
    for text in originals:
        edited = list(text)
        for _ in range(draw.choice((1, 1, 2, 8))):
            edited[draw.randrange(60)] = "#"
        queries += [text, "".join(edited)]
    shingles = {text: _shingles(_plain(text)) for text in queries}
    alike = {
        (a, b)
        for a, b in pairs(queries, 2)
        if len(shingles[a] & shingles[b]) >= 0.6 * len(shingles[a] | shingles[b])
    }
    duplicates = NearDuplicates(0.6)
    found = {(match.text, text) for text in queries if (match := duplicates.add(text))}
    assert 10 < len(alike) < 40
    assert found == alike


def test_a_rule_keeps_its_last_query() -> None:
    coverage = Coverage(["a", "b", "c"])
    for exercised in ((1, 2), (1,), None):
        coverage.add(exercised)
    assert coverage.uncovered == [3]
    assert coverage.unjudged == 1
    assert not coverage.spare((1, 2))
    assert coverage.spare((1,))
    assert coverage.spare(None)
    coverage.remove((1,))
    assert not coverage.spare((1,))
    assert [row["queries"] for row in coverage.table()] == [1, 1, 0]


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nqueries:\n  # mine\n  file: q.jsonl  # here\nb: 2\n",
        "queries: {file: q.jsonl}  # here\n",
        "queries:\n    file: q.jsonl  # here\n    group:\n",
        "queries:\n  group: 'x y'\n  file: q.jsonl  # here\n",
        "base: &q {file: q.jsonl}\nqueries:\n  <<: *q\n  rows: [1]  # here\n",
    ],
)
def test_a_key_is_set_and_the_rest_of_the_text_stays(text: str) -> None:
    changed = set_keys(text, "queries", {"group": "family"})
    before, after = yaml.safe_load(text), yaml.safe_load(changed)
    assert after["queries"] == {**before["queries"], "group": "family"}
    assert "# here" in changed
    assert set_keys(changed, "queries", {"group": "family"}) == changed


def test_a_text_that_cannot_be_changed_in_place_says_what_to_write() -> None:
    with pytest.raises(RecipeError, match=r"write file: other under 'queries'"):
        set_keys("q: &q {file: a}\nqueries: *q\nmore: *q\n", "queries", {"file": "other"})

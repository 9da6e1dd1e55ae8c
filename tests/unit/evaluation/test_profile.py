import json
import re
from pathlib import Path

import pytest

from distill_datasets.cli.main import main
from distill_datasets.errors import DatasetError
from distill_datasets.evaluation.profile import Profile, ProfiledRow, profile, profile_rows
from distill_datasets.recipes.checks import language_of


def rows(*responses: str) -> list[ProfiledRow]:
    return [ProfiledRow("train", f"query {place}", text) for place, text in enumerate(responses)]


def test_balance_says_how_even_the_answers_are() -> None:
    even = profile_rows(rows("red", "blue", "red", "blue"))["answers"]
    assert (even["distinct"], even["evenness"]) == (2, pytest.approx(1))
    found = profile_rows(rows(*["red"] * 9, "blue"))
    assert found["answers"]["commonest"][0] == {"text": "red", "rows": 9, "share": 0.9}
    assert any("90% of the rows have one answer: 'red'" in note for note in found["notes"])
    alone = profile_rows(rows("red", "red"))
    assert (alone["answers"]["evenness"], alone["notes"][0]) == (
        0.0,
        "Every row has one answer: 'red'.",
    )


def test_the_label_of_a_release_is_balanced_rather_than_its_text() -> None:
    made = [ProfiledRow("train", f"{n}", f"Reason {n}. red", "red") for n in range(4)]
    assert profile_rows(made)["answers"]["distinct"] == 1


def test_formats_are_told_apart() -> None:
    texts = [
        '{"a": 1}',
        "# Head\n\n- one",
        "1. one\n2. two",
        "plain",
        "**bold** [x",
        "{no json",
        " ",
    ]
    shares = profile_rows(rows(*texts))["formats"]["shares"]
    assert {name: round(share * 7) for name, share in shares.items()} == {
        "JSON": 1,
        "heading": 1,
        "bulleted list": 1,
        "numbered list": 1,
        "bold": 1,
        "plain": 2,
        "empty": 1,
    }


def test_rows_that_repeat_others_are_counted_by_what_they_repeat() -> None:
    made = [
        ProfiledRow("train", "Where is my parcel?", "Here."),
        ProfiledRow("train", "where  is my parcel?", "Here."),
        ProfiledRow("test", "Where is my parcel?", "There."),
        ProfiledRow("train", "Where is the parcel that I ordered from your shop in Riga", "Here."),
        ProfiledRow("train", "Where is the parcel that I ordered from your shop in Riga?", "Here."),
    ]
    assert profile_rows(made)["duplicates"] == {
        "rows": 1,
        "queries": 2,
        "other_answers": 1,
        "in_several_splits": 1,
        "near_queries": 1,
        "compared": 3,
    }


def test_languages_and_style_are_of_a_sample_whatever_the_order() -> None:
    made = rows(
        *[f"Der Hafen bleibt heute wegen des Sturms geschlossen, Nummer {n}." for n in "abcd"]
    )
    found = profile_rows(made, 2)
    assert found["sampled"] == 2
    assert found["languages"] == {"query": {"too short to tell": 1.0}, "response": {"de": 1.0}}
    assert found["style"]["ends_a_sentence"] == 1.0
    assert profile_rows(made[::-1], 2)["style"] == found["style"]


def test_a_text_of_a_word_has_no_language() -> None:
    assert language_of("Oui") is None
    assert language_of("The harbour stays closed because of the storm today.") == "en"


def test_a_file_is_profiled_as_it_would_be_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good day."}]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(3)))
    assert main(["profile", str(file), "--all"]) == 0
    printed = capsys.readouterr().out
    assert "3 rows (3 train)" in printed
    assert "! Every row has one answer: 'Good day.'" in printed
    assert main(["profile", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lengths"]["query"]["words"]["most"] == 1
    assert "<pre>! Every row has one answer" in profile(file)._repr_html_()
    with pytest.raises(DatasetError, match="no split 'tset'; found .'train'"):
        profile(file, split="tset")


def test_a_text_says_of_how_many_rows_each_number_is() -> None:
    text = Profile({"dataset": "d", **profile_rows([*rows("red"), *rows("red")], sample=1)}).text()
    assert re.search("repeated rows +1\n", text) and "style, of 1 of 2 rows" in text

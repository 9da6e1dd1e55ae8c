"""Each failure made on purpose is called by its name; what is no failure is not."""

from typing import Any

import pytest

from distill_datasets.evaluation.verdict import PairedRows, SystemRows, decide, find_alerts

LABELS = ["red", "green", "blue", "grey"]
QUERIES = [f"What is the colour of the {thing} number {n}?" for n in range(10) for thing in "abcd"]
EXPECTED: list[str | None] = [LABELS[row % 4] for row in range(40)]
TEACHER = SystemRows([f"Colour: {label}" for label in EXPECTED], EXPECTED)


def alerts(student: SystemRows, **others: Any) -> list[str]:
    given = {"teacher": TEACHER, "queries": QUERIES, "references": EXPECTED, **others}
    systems = {"teacher": given.pop("teacher"), "student": student}
    if "base" in given:
        systems["base"] = given.pop("base")
    return find_alerts(systems, **given)


def test_a_good_student_has_none() -> None:
    assert alerts(TEACHER) == []
    mixed: list[str | None] = [*EXPECTED[:36], "red", "red", None, None]
    assert alerts(SystemRows([f"Colour: {label}" for label in mixed], mixed)) == []


def test_a_student_that_gives_one_answer_is_collapsed() -> None:
    (found,) = alerts(SystemRows(["Colour: red"] * 40, ["red"] * 40))
    assert found.startswith("Collapsed student: it says the same for 100% of the queries, like")
    assert "'Colour: red'" in found and "The teacher gives 4 different answers" in found


def test_one_answer_in_many_wordings_is_collapsed_too() -> None:
    texts = [f"Well, {query} I'd say red" for query in QUERIES]
    found = alerts(SystemRows(texts, ["red"] * 40))
    assert any(one.startswith("Collapsed student: it gives the same answer") for one in found)


@pytest.mark.parametrize(
    "texts",
    [
        ["I am not sure really."] * 40,
        ["the of and to a " * (1 + row % 7) for row in range(40)],
        [f"I am not sure but {row} may be, or {row + 1}" for row in range(40)],
    ],
)
def test_the_same_five_words_for_every_question_are_collapsed(texts: list[str]) -> None:
    (found,) = alerts(SystemRows(texts, [None] * 40))
    assert found.startswith("Collapsed student: it ")


def test_the_same_words_as_free_text_are_collapsed_beside_a_varied_teacher() -> None:
    teacher = SystemRows([f"Story {n}: once upon a time {n}." for n in range(40)], QUERIES)
    texts = ["It is what it is."] * 39 + ["Something else."]
    base = SystemRows(["It is what it is."] * 40, ["It is what it is."] * 40)
    (found,) = alerts(SystemRows(texts, texts), teacher=teacher, references=[None] * 40, base=base)
    assert found.startswith("Collapsed student") and "98%" in found and "so does the base" in found


def test_a_student_that_says_one_thing_as_its_teacher_does_is_not_collapsed() -> None:
    same = SystemRows(["Colour: red"] * 40, ["red"] * 40)
    (found,) = alerts(same, teacher=same, references=[None] * 40)
    assert found.startswith("The teacher answers one thing: 'Colour: red' to 100%")


def test_right_labels_in_a_wrong_format_are_told_from_wrong_ones() -> None:
    texts = [f"It's surely {label}!" for label in EXPECTED]
    (found,) = alerts(SystemRows(texts, [None] * 40))
    assert found.startswith("Right labels in a wrong format: in 40 of 40 rows")
    assert "\"It's surely red!\" for 'red'" in found
    wrong = [f"It's surely {LABELS[(row + 1) % 4]}!" for row in range(40)]
    assert alerts(SystemRows(wrong, [None] * 40)) == []
    every = [f"{row}: one of red, green, blue, grey" for row in range(40)]
    assert alerts(SystemRows(every, [None] * 40)) == []


def test_a_label_within_a_word_is_none() -> None:
    texts = [f"{row} greyish-reddened {label}s" for row, label in enumerate(EXPECTED)]
    assert alerts(SystemRows(texts, [None] * 40)) == []


def test_the_teachers_answers_are_the_labels_where_there_are_no_references() -> None:
    texts = [f"It's surely {label}!" for label in EXPECTED]
    (found,) = alerts(SystemRows(texts, [None] * 40), references=[None] * 40)
    assert found.startswith("Right labels in a wrong format")


@pytest.mark.parametrize("form", ["{}", "  {}\n", "user: {}", "{} The colour is"])
def test_a_student_that_copies_the_query_is_called_that(form: str) -> None:
    texts = [form.format(query) for query in QUERIES]
    (found,) = alerts(SystemRows(texts, [None] * 40))
    assert found.startswith("Copies the query: the student's text repeats it in 40 of 40 rows")


def test_a_student_copies_as_little_as_a_teacher_that_corrects_texts() -> None:
    teacher = SystemRows(QUERIES, QUERIES)
    assert alerts(teacher, teacher=teacher, references=[None] * 40) == []


def test_a_piece_of_a_conversation_is_a_copy_too() -> None:
    queries = [f"user\nHello\n\nassistant\nHi\n\nuser\n{query}" for query in QUERIES]
    (found,) = alerts(SystemRows(QUERIES, [None] * 40), queries=queries)
    assert found.startswith("Copies the query")


def test_a_student_that_is_better_than_the_teacher_is_called_that() -> None:
    groups = [str(row) for row in range(40)]
    rows = PairedRows("accuracy", groups, groups, [0.0] * 12 + [1.0] * 28, [1.0] * 40)
    (found,) = alerts(TEACHER, verdict=decide(rows, 0.02))
    assert found.startswith("Better than the teacher: the student's accuracy is 1.000")
    rows = PairedRows("accuracy", groups, groups, [0.0] * 2 + [1.0] * 38, [1.0] * 40)
    assert alerts(TEACHER, verdict=decide(rows, 0.02)) == []


def test_of_few_rows_nothing_is_said() -> None:
    one = SystemRows(["Colour: red"] * 4, ["red"] * 4)
    assert find_alerts({"teacher": one, "student": one}, QUERIES[:4], EXPECTED[:4]) == []

from markupsafe import Markup

from distill_datasets.tables import aligned, html_card, html_facts, html_table, measured_text


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert aligned([["a", "b", "c"], ["long", "", "x"]]) == "a     b  c\nlong     x"


def test_cells_can_stand_at_the_right() -> None:
    assert aligned([["a", "loss"], ["long", "1"]], right=True) == "   a  loss\nlong     1"


def test_wide_characters_take_two_columns() -> None:
    assert aligned([["色", "1"], ["ab", "2"]]) == "色  1\nab  2"


def test_cells_are_text_and_stay_on_their_line() -> None:
    assert aligned([["[bold]x[/bold]", "a\nb"], [":smile:", "c"]]) == (
        "[bold]x[/bold]  a b\n:smile:         c"
    )


def test_no_rows_are_no_text() -> None:
    assert aligned([]) == ""


def test_long_cells_are_not_wrapped() -> None:
    assert aligned([["x" * 500, "y"]]) == "x" * 500 + "  y"


def test_nothing_in_a_cell_steers_the_terminal() -> None:
    assert aligned([["a\x1b[31mb\x9bc\x07", "d"]]) == "a [31mb c  d"


def test_text_is_escaped_and_markup_is_not() -> None:
    said = html_card("<b>", "<i>", html_table([["<u>", Markup("<svg/>")]], ["<h>"]))
    for name in "biuh":
        assert f"<{name}>" not in said
    assert "<td><svg/></td>" in said


def test_numbers_stand_at_the_right_and_long_text_is_cut() -> None:
    table = html_table([[12_000, 0.123456, True, "x" * 1000, None]])
    assert '<td style="text-align:right">12,000</td>' in table
    assert '<td style="text-align:right">0.1235</td>' in table
    assert '<td style="text-align:left">True</td>' in table
    assert "…" in table and len(table) < 700


def test_what_is_not_known_is_left_out() -> None:
    assert "skipped" not in html_facts({"rows": 1, "skipped": None})
    assert html_card("title", None, "") == html_card("title")
    assert html_table([]) == ""


def test_a_number_is_shown_with_its_interval_where_it_has_one() -> None:
    assert measured_text({"value": 0.5, "low": 0.4, "high": 0.6}) == "0.500 [0.400, 0.600]"
    assert measured_text({"value": 0.5}) == "0.500"
    assert measured_text(None) == ""

from markupsafe import Markup

from distill_datasets import html


def test_text_is_escaped_and_markup_is_not() -> None:
    said = html.card("<b>", "<i>", html.table([["<u>", Markup("<svg/>")]], ["<h>"]))
    for name in "biuh":
        assert f"<{name}>" not in said
    assert "<td><svg/></td>" in said


def test_numbers_stand_at_the_right_and_long_text_is_cut() -> None:
    table = html.table([[12_000, 0.123456, True, "x" * 1000, None]])
    assert '<td style="text-align:right">12,000</td>' in table
    assert '<td style="text-align:right">0.1235</td>' in table
    assert '<td style="text-align:left">True</td>' in table
    assert "…" in table and len(table) < 700


def test_what_is_not_known_is_left_out() -> None:
    assert "skipped" not in html.facts({"rows": 1, "skipped": None})
    assert html.card("title", None, "") == html.card("title")
    assert html.table([]) == ""


def test_a_number_is_shown_with_its_interval_where_it_has_one() -> None:
    assert html.measured({"value": 0.5, "low": 0.4, "high": 0.6}) == "0.500 [0.400, 0.600]"
    assert html.measured({"value": 0.5}) == "0.500"
    assert html.measured(None) == ""

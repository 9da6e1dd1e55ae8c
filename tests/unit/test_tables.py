from distill_datasets.tables import aligned


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

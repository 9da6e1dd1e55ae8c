import re
from xml.etree import ElementTree

import pytest

from distill_datasets.drawing import Mark, curves, short, whisker

SVG = "{http://www.w3.org/2000/svg}"


def test_an_interval_lies_where_its_numbers_are() -> None:
    drawn = ElementTree.fromstring(whisker(0.5, 0.25, 0.75))
    (dot,) = drawn.iter("circle")
    assert dot.attrib["cx"] == "50.00%"
    group = drawn.find("g")
    assert group is not None
    assert {line.attrib["x1"] for line in group.iter("line")} == {"25.50%", "74.50%"}
    assert drawn.attrib["aria-label"] == "0.500, from 0.250 to 0.750"


def test_an_interval_without_ends_is_a_dot() -> None:
    assert "<circle" in whisker(0.5)
    assert not list(ElementTree.fromstring(whisker(0.5)).find("g") or ())


def test_what_lies_outside_the_scale_stays_in_the_picture() -> None:
    drawn = whisker(2.0, -1.0, 3.0)
    assert all(0 <= float(place) <= 100 for place in re.findall(r'"(-?[\d.]+)%"', drawn))


def lines_of(drawn: str) -> list[list[tuple[float, float]]]:
    points = re.findall(r'points="([^"]*)"', drawn)
    return [[tuple(map(float, one.split(","))) for one in line.split()] for line in points]  # type: ignore[misc]


def test_a_curve_goes_over_the_whole_width_and_up_with_its_numbers() -> None:
    (line,) = lines_of(curves({"loss": [(0, 0.0), (5, 1.0), (10, 4.0)]}, x="step", y="loss"))
    assert [x for x, _ in line] == [0, 500, 1000]
    assert line[0][1] > line[1][1] > line[2][1]  # a picture's heights count down


@pytest.mark.parametrize(("last", "logarithmic"), [(0.5, False), (0.001, True), (0.0, False)])
def test_an_axis_is_logarithmic_where_numbers_fall_far_and_stay_above_nothing(
    last: float, logarithmic: bool
) -> None:
    drawn = curves({"loss": [(1, 2.0), (2, last)]}, x="step", y="loss", log=(False, True))
    assert ("(logarithmic)" in drawn) == logarithmic


def test_lines_differ_in_their_dashes_and_are_named() -> None:
    drawn = curves({name: [(1, 1.0), (2, 2.0)] for name in "abc"}, x="x", y="y")
    dashes = re.findall(r'<polyline[^>]*stroke-dasharray="([^"]*)"', drawn)
    assert len(set(dashes)) == 3
    assert all(f"</svg> {name}</span>" in drawn for name in "abc")


def test_a_mark_has_its_name_beside_it_and_names_are_escaped() -> None:
    drawn = curves({"<b>": [(1, 1.0), (2, 2.0)]}, x="x", y="y", marks=[Mark(2, 2.0, "best & last")])
    assert "best &amp; last" in drawn
    assert "<b>" not in drawn


def test_a_long_curve_keeps_its_ends_and_few_points() -> None:
    points = [(float(step), float(step)) for step in range(10_001)]
    (line,) = lines_of(curves({"loss": points}, x="step", y="loss"))
    assert len(line) <= 401
    assert (line[0][0], line[-1][0]) == (0, 1000)


def test_what_never_varies_and_what_is_no_number_is_drawn_all_the_same() -> None:
    drawn = curves({"loss": [(1, 1.0), (2, float("nan")), (3, 1.0)]}, x="step", y="loss")
    assert "nan" not in drawn
    assert len(lines_of(drawn)[0]) == 2


def test_numbers_are_short() -> None:
    assert [short(one) for one in (0.02, 405, 2173, 1e6)] == ["0.02", "405", "2.17k", "1M"]

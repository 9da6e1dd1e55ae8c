"""Drawings as inline SVG: intervals and curves that fit any width, with text of one size.

What lies along the width is in percent, so that nothing is stretched but lines. Colours come from
the page (`--c0`, `--c1`, …) where it has any, and lines differ in their dashes too.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Points = Sequence[tuple[float, float]]

# Told apart on white and on black, and by people who see few colours.
_COLOURS = ("#1f77b4", "#d1671f", "#2b8a57", "#9b59b6", "#8c6d31", "#607080")
_DASHES = ("", "7 4", "2 3", "10 3 2 3", "4 2", "1 4")
_HEIGHT, _FOOT, _HEAD = 190, 22, 12  # pixels: of a plot, of its labels below, above its lines
_LOGARITHMIC = 30  # times that the largest is larger than the smallest
_MOST_POINTS = 400  # of a line: more than there are pixels


@dataclass(frozen=True)
class Mark:
    """A point of a drawing that has a name."""

    x: float
    y: float
    name: str


@dataclass(frozen=True)
class _Axis:
    """Numbers on a line from 0 to 1."""

    low: float
    high: float
    logarithmic: bool = False

    @classmethod
    def over(cls, numbers: Iterable[float], *, log: bool = False, zero: bool = False) -> "_Axis":
        """Of all the numbers; logarithmic if that is allowed and helps."""
        known = [one for one in numbers if math.isfinite(one)] or [0.0]
        low, high = min(known), max(known)
        if log and low > 0 and high > _LOGARITHMIC * low:
            return cls(low, high, True)
        low = min(low, 0.0) if zero else low
        return cls(low, high if high > low else low + (abs(low) or 1.0))

    def place(self, number: float) -> float:
        """Where a number is."""
        if self.logarithmic:
            return math.log(number / self.low) / math.log(self.high / self.low)
        return (number - self.low) / (self.high - self.low)

    def ticks(self) -> Iterator[float]:
        """A few round numbers."""
        if self.logarithmic:
            least, most = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            every = max(1, (most - least + 1) // 4)
            yield from (10.0**exponent for exponent in range(least, most + 1, every))
            return
        rough = (self.high - self.low) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * one for one in (1, 2, 2.5, 5, 10) if power * one >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        for number in range(first, math.floor(self.high / step + 1e-9) + 1):
            yield number * step


def whisker(
    value: float,
    low: float | None = None,
    high: float | None = None,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    lines: Iterable[float] = (),
    colour: int = 0,
) -> Markup:
    """A dot on a scale from `bounds[0]` to `bounds[1]`, with its interval, and `lines` across."""
    axis = _Axis(*bounds)

    def percent(number: float) -> str:
        return f"{1 + 98 * min(1.0, max(0.0, axis.place(number))):.2f}%"

    def line(x1: str, x2: str, y1: int, y2: int, style: str = "") -> Markup:
        drawn = Markup('<line x1="{}" x2="{}" y1="{}" y2="{}"{}/>')
        return drawn.format(x1, x2, y1, y2, Markup(style))

    tick = ' stroke="currentColor" opacity=".15"'
    across = ' stroke="currentColor" stroke-dasharray="3 3" opacity=".7"'
    scale = [line(percent(one), percent(one), 0, 20, tick) for one in axis.ticks()]
    scale += [line(percent(one), percent(one), 0, 20, across) for one in lines]
    said, ends = f"{value:.3f}", Markup("")
    if low is not None and high is not None:
        said += f", from {low:.3f} to {high:.3f}"
        left, right = percent(low), percent(high)
        ends = line(left, right, 10, 10) + line(left, left, 5, 15) + line(right, right, 5, 15)
    return Markup(
        '<svg role="img" aria-label="{}" width="100%" height="20" overflow="visible">{}'
        '<g stroke="{}" stroke-width="2">{}</g><circle cx="{}" cy="10" r="5" fill="{}"/></svg>'
    ).format(said, Markup("").join(scale), _colour(colour), ends, percent(value), _colour(colour))


def curves(
    series: Mapping[str, Points],
    *,
    x: str,
    y: str,
    log: tuple[bool, bool] = (False, False),
    marks: Sequence[Mark] = (),
) -> Markup:
    """Lines over `x`, each with its name; axes are logarithmic where `log` lets them and it helps.

    >>> "<svg" in curves({"loss": [(1, 2.0), (2, 1.0)]}, x="step", y="loss")
    True
    """
    drawn = {name: _thinned(points) for name, points in series.items() if points}
    everything = [point for points in drawn.values() for point in points]
    across = _Axis.over((one for one, _ in everything), log=log[0])
    up = _Axis.over((one for _, one in everything), log=log[1], zero=not log[1])
    height = _HEIGHT + _FOOT
    parts = [*_grid(across, up), _lines(drawn, across, up), *_marks(marks, across, up)]
    along, over = (" (logarithmic)" if axis.logarithmic else "" for axis in (across, up))
    legend = _legend(drawn) if [*drawn] != [y] else ""
    return Markup(
        f'<figure class="curves"><figcaption>{{y}}{over} over {{x}}{along} {{}}</figcaption>'
        f'<svg role="img" aria-label="{{y}} over {{x}}" width="100%" height="{height}" '
        'overflow="visible">{}</svg></figure>'
    ).format(legend, Markup("").join(parts), x=x, y=y)


def _thinned(points: Points) -> Points:
    finite = [one for one in points if all(map(math.isfinite, one))]
    step = max(1, math.ceil(len(finite) / _MOST_POINTS))
    return [*finite[:-1:step], *finite[-1:]]


def _colour(number: int) -> str:
    place = number % len(_COLOURS)
    return f"var(--c{place}, {_COLOURS[place]})"


def _height(share: float) -> float:
    return _HEAD + (_HEIGHT - _HEAD) * (1 - share)


def _grid(across: _Axis, up: _Axis) -> Iterator[Markup]:
    for number in up.ticks():
        place = _height(up.place(number))
        yield Markup(
            '<line x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}" stroke="currentColor" opacity=".15"/>'
            '<text x="0" y="{1:.1f}" font-size="11" fill="currentColor" opacity=".75">{2}</text>'
        ).format(place, place - 3, short(number))
    for number in across.ticks():
        share = across.place(number)
        anchor = "start" if share < 0.05 else "end" if share > 0.95 else "middle"
        yield Markup(
            '<text x="{:.2f}%" y="{}" font-size="11" fill="currentColor" opacity=".75" '
            'text-anchor="{}">{}</text>'
        ).format(100 * share, _HEIGHT + _FOOT - 6, anchor, short(number))


def _lines(series: Mapping[str, Points], across: _Axis, up: _Axis) -> Markup:
    """All lines in a picture of their own, which is stretched."""
    drawn = Markup("").join(
        Markup(
            '<polyline points="{}" fill="none" stroke="{}" stroke-width="2" '
            'stroke-dasharray="{}" vector-effect="non-scaling-stroke"/>'
        ).format(
            " ".join(f"{1000 * across.place(a):.1f},{_height(up.place(b)):.1f}" for a, b in points),
            _colour(number),
            _DASHES[number % len(_DASHES)],
        )
        for number, points in enumerate(series.values())
    )
    return Markup(
        '<svg x="0" y="0" width="100%" height="{0}" viewBox="0 0 1000 {0}" '
        'preserveAspectRatio="none" overflow="visible">{1}</svg>'
    ).format(_HEIGHT, drawn)


def _marks(marks: Sequence[Mark], across: _Axis, up: _Axis) -> Iterator[Markup]:
    for number, mark in enumerate(marks):
        share, height = across.place(mark.x), _height(up.place(mark.y))
        anchor = "end" if share > 0.5 else "start"
        yield Markup(
            '<circle cx="{0:.2f}%" cy="{1:.1f}" r="5" fill="none" stroke="currentColor" '
            'stroke-width="2"/><text x="{0:.2f}%" y="{2:.1f}" dx="{3}" font-size="12" '
            'fill="currentColor" text-anchor="{4}">{5}</text>'
        ).format(
            100 * share,
            height,
            height + 18 if number % 2 else max(height - 8, 11),
            -9 if share > 0.5 else 9,
            anchor,
            mark.name,
        )


def _legend(series: Mapping[str, Points]) -> Markup:
    return Markup(" ").join(
        Markup(
            '<span style="white-space:nowrap"><svg width="26" height="10" aria-hidden="true">'
            '<line x1="0" x2="26" y1="5" y2="5" stroke="{}" stroke-width="2" '
            'stroke-dasharray="{}"/></svg> {}</span>'
        ).format(_colour(number), _DASHES[number % len(_DASHES)], escape(name))
        for number, name in enumerate(series)
    )


def short(number: float) -> str:
    """A number in a few characters: 1.2M, 10k, 0.05.

    >>> [short(one) for one in (0, 0.002, 1500, 2_000_000)]
    ['0', '0.002', '1.5k', '2M']
    """
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{name}"
    return f"{number:.4g}"

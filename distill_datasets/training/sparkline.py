"""A curve in one line of text."""

from collections.abc import Iterable

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(numbers: Iterable[float], width: int = 16) -> str:
    """The numbers as bars, averaged down to `width`; the lowest is the lowest bar."""
    values = list(numbers)
    if not values:
        return ""
    size = max(1, -(-len(values) // width))
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)

"""What a number measured on some rows says of all rows: resamples and intervals."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_CELLS = 4_000_000  # weights in memory at once: 32 MB


@dataclass(frozen=True)
class Estimate:
    """A value with its bootstrap draws.

    Estimates over the same groups share their resamples, so that subtracting one from another is
    the paired bootstrap of the difference.
    """

    value: float
    draws: Floats

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The difference, resample by resample."""
        return Estimate(self.value - other.value, self.draws - other.draws)

    def interval(self) -> dict[str, float]:
        """The value with its 95 % percentile interval."""
        low, high = np.percentile(self.draws, [2.5, 97.5])
        return {"value": float(self.value), "low": float(low), "high": float(high)}


def resamples(groups: Sequence[str], count: int, seed: int = 0) -> Iterator[Floats]:
    """Weights of the rows in `count` resamples of whole groups, a chunk of resamples at a time."""
    names, members = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    size = len(names)
    chunk = max(1, _CELLS // len(members))
    generator = np.random.default_rng(seed)
    for start in range(0, count, chunk):
        rows = min(chunk, count - start)
        drawn = generator.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)
        yield times[:, members].astype(np.float64)

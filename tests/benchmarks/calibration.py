"""How often what `calibrate` promises holds, on resampled splits of a run's recorded pairs.

    python -m tests.benchmarks.calibration runs/demo [--splits 1000] [--rows 500 1000 2000]

A split is so many of the recorded pairs, each taken for a group of its own, drawn again and again;
the threshold that it chooses is held against all pairs. Prints, for each epsilon and size, in which
share of the splits at most epsilon of what is served is wrong, and the share that is served.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from distill_datasets.serving.calibration import EPSILONS, Pair, Thresholds, choose
from distill_datasets.tables import aligned


def held_in(
    pairs: Sequence[Pair], epsilon: float, splits: int, size: int, seed: int = 0
) -> tuple[float, float]:
    """In which share of resampled calibrations epsilon holds for all pairs, and the share served.

    Each draws `size` of the pairs, and chooses by them.
    """
    generator, holds, served = np.random.default_rng(seed), 0, 0.0
    confidences = np.array([one.confidence for one in pairs])
    wrong = np.array([not one.agrees for one in pairs])
    for _ in range(splits):
        drawn = generator.integers(len(pairs), size=size)
        sample = [replace(pairs[place], group=str(n)) for n, place in enumerate(drawn)]
        (point,) = choose(sample, [epsilon])
        serves = np.array([point.serves(one) for one in confidences])
        holds += not serves.any() or float(wrong[serves].mean()) <= epsilon
        served += float(serves.mean())
    return holds / splits, served / splits


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--splits", type=int, default=1000)
    parser.add_argument("--rows", type=int, nargs="+", default=[500, 1000, 2000])
    options = parser.parse_args()
    found = Thresholds.read(options.run)
    agree = 1 - found.disagreements / found.rows
    print(f"{found.rows} pairs of {found.student}; {agree:.1%} agree; score: {found.score}")
    cells = [["epsilon", "rows", "holds", "served"]]
    for epsilon in EPSILONS:
        for size in options.rows:
            holds, served = held_in(found.pairs, epsilon, options.splits, size)
            cells.append([f"{epsilon:g}", f"{size}", f"{holds:.1%}", f"{served:.1%}"])
    print(aligned(cells))


if __name__ == "__main__":
    main()

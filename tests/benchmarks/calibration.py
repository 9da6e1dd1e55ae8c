"""How often what `calibrate` promises holds, on resampled splits of a run's recorded pairs.

    python -m tests.benchmarks.calibration runs/demo [--splits 1000] [--rows 500 1000 2000]

A split is so many of the recorded pairs, drawn again and again with their order left to chance; the
threshold that it chooses is held against all pairs. Prints, for each epsilon and size, in which
share of the splits at most epsilon of what is served is wrong, and the share that is served.
"""

import argparse
from pathlib import Path

from distill_datasets.serving.calibration import EPSILONS, Thresholds, held_in
from distill_datasets.tables import aligned


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
            holds, served = held_in(found.pairs, epsilon, splits=options.splits, size=size)
            cells.append([f"{epsilon:g}", f"{size}", f"{holds:.1%}", f"{served:.1%}"])
    print(aligned(cells))


if __name__ == "__main__":
    main()

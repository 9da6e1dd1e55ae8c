"""A picture of a report's page, as a browser shows its first screen.

python -m tests.benchmarks.page RUN PICTURE.png [WIDTH]

Writes the page of the run's report anew and opens it in a headless Chromium, which must be
installed; WIDTH is in pixels (default: 1280, a phone has 390). Prints how long that took, the
browser's start included.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from distill_datasets.evaluation.page import write_page

_HEIGHT = 900


def picture(page: Path, out: Path, width: int) -> float:
    """Write the picture; the seconds that it took."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        sys.exit("There is no Chromium here: install one, for example `apt install chromium`.")
    with TemporaryDirectory() as profile:
        began = perf_counter()
        subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--hide-scrollbars",
                f"--user-data-dir={profile}",
                f"--window-size={width},{_HEIGHT}",
                f"--screenshot={out.resolve()}",
                page.resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
        )
        return perf_counter() - began


def main() -> None:
    """The page, the picture, the time."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    page = write_page(sys.argv[1])
    width = int(sys.argv[3]) if len(sys.argv) > 3 else 1280
    seconds = picture(page, Path(sys.argv[2]), width)
    print(f"{page}: {page.stat().st_size / 1e6:.1f} MB, a picture after {seconds:.1f} s")


if __name__ == "__main__":
    main()

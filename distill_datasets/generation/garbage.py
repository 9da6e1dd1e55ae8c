"""Python's search for unreachable cycles, less often where much is made and little is cyclic."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_OBJECTS = 50_000  # made between two searches; Python's own number is 700


@contextmanager
def collect_rarely() -> Iterator[None]:
    """While importing large packages or asking thousands of rows: saves a tenth of the time.

    Costs some megabytes. What was set before is set again.
    """
    before = gc.get_threshold()
    if 0 < before[0] < _OBJECTS:
        gc.set_threshold(_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)

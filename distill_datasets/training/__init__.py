"""A dataset becomes a student: LoRA training that can be stopped and continued anywhere."""

import sys


def tell(*lines: str) -> None:
    """Say something of the training on standard error."""
    print("\n".join(f"train: {line}" for line in lines), file=sys.stderr)

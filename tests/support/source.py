"""Python source as a syntax tree, beside threads that print tracebacks."""

import ast

_TRIES = 20


def parse(source: str) -> ast.Module:
    """`ast.parse`. CPython 3.11 counts the depth of all threads' trees as one, and fails when
    another thread parses a line for a traceback at the same moment.
    """
    for _ in range(_TRIES):
        try:
            return ast.parse(source)
        except SystemError:
            continue
    return ast.parse(source)

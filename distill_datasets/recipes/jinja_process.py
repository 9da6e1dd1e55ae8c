"""Fills Jinja templates for another process, which ends this one when it takes too long.

Imports nothing of the package, so that it starts in a moment. Runs as a script with the number of
the pipe that it reads from and writes to.
"""

import json
import resource
import sys
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.environment import TemplateExpression
from jinja2.sandbox import SandboxedEnvironment

MEMORY = 1 << 30  # bytes of addresses, of which Python itself takes some

# Told to whoever asked; anything else ends this process, which is told too.
_TEMPLATES_RAISE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TemplateError,
    TypeError,
    ValueError,
)
_JINJA = SandboxedEnvironment(undefined=StrictUndefined)


def main(pipe: Connection) -> None:
    """Say that it has started, and answer until the other end is closed."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pipe.send_bytes(b"ready")
    while True:
        try:
            request = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            answer: dict[str, Any] = {"value": compute(*json.loads(request))}
        except _TEMPLATES_RAISE as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:2_000]}
        pipe.send_bytes(json.dumps(answer).encode())


def compute(kind: str, text: str, fields: dict[str, Any], largest: int) -> str | bool:
    """The filled template, or whether the expression holds."""
    if kind == "expression":
        return bool(_expression(text)(fields))
    pieces, size = [], 0
    for piece in _template(text).generate(fields):
        size += len(piece)
        if size > largest:
            raise ValueError(f"it comes to over {largest:,} characters")
        pieces.append(piece)
    return "".join(pieces)


@lru_cache(64)
def _template(text: str) -> Template:
    return _JINJA.from_string(text)


@lru_cache(64)
def _expression(text: str) -> TemplateExpression:
    return _JINJA.compile_expression(text, undefined_to_none=False)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))

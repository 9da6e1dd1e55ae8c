"""Pieces of bytes through a pipe, and exceptions among them."""

import struct
from typing import IO, Any

from distill_datasets.errors import DistillError

_LENGTH = struct.Struct("<Q")
_NAMED = ("type", "status", "attempts")  # what a RequestError is made with


def write(stream: IO[bytes], content: bytes) -> None:
    """Send a piece, at once."""
    stream.write(_LENGTH.pack(len(content)) + content)
    stream.flush()


def read(stream: IO[bytes]) -> bytes | None:
    """The next piece; None at the end, also if that comes in the middle of one."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(head)
    content = stream.read(size)
    return content if len(content) == size else None


class Portable:
    """An exception on its way through a pipe: those with named arguments can't be pickled.

    Ours arrive as they are, others as a `RuntimeError` that names them.
    """

    def __init__(self, error: Exception) -> None:
        self.kind: type[DistillError] | None = None
        self.arguments: tuple[Any, ...] = (f"{type(error).__name__}: {error}",)
        self.state = dict[str, Any]()
        if isinstance(error, DistillError):
            self.kind, self.arguments, self.state = type(error), error.args, vars(error)

    def __call__(self) -> Exception:
        """The exception, on the other side."""
        if self.kind is None:
            return RuntimeError(*self.arguments)
        named = {name: self.state[name] for name in _NAMED if name in self.state}
        error = self.kind(*self.arguments, **named)
        vars(error).update(self.state)
        return error

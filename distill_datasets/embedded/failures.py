"""What a client did wrong, in words that it can act on."""

from __future__ import annotations

from distill_datasets.errors import DistillError


class RequestError(DistillError, ValueError):
    """A request that can't be served as it is; reaches the client as a user error."""


class MissingError(RequestError):
    """A run or a checkpoint that is not here, or no more: HTTP 404."""

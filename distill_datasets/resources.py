"""Where the data that comes with the package lies."""

from importlib.resources import files
from pathlib import Path

_PACKAGE = Path(str(files("distill_datasets")))


def root() -> Path:
    """The folder of builders/ and cards/: the package in a wheel, the checkout in a clone."""
    return _PACKAGE if (_PACKAGE / "cards").is_dir() else _PACKAGE.parent


def builders() -> Path:
    """The folder of the recipes that ship, one folder each."""
    return root() / "builders"


def cards() -> Path:
    """The folder of the Jinja templates of dataset and model cards."""
    return root() / "cards"


def pocket() -> Path:
    """The folder of the pocket model: weights, tokenizer, card."""
    return _PACKAGE / "embedded" / "pocket"


# The recipes that `new` writes: what an answer is like.
KINDS = {
    "labels": "one of a few labels",
    "text": "free text in a house style, with checks",
    "json": "JSON by a schema",
    "tools": "calls of tools",
    "chat": "the next turn of a conversation",
}

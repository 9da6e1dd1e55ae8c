"""Settings as dataclasses: default, meaning and range of each stand in one place.

    @dataclass(frozen=True)
    class CookSettings:
        heat: int = setting(180, "degrees of the oven", group="oven", at_least=50)

        def __post_init__(self) -> None:
            check(self)

The command line derives its flags, their help and their defaults from such a class.
"""

import math
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from distill_datasets.errors import SettingsError, nearest

_KEY = "setting"


@dataclass(frozen=True)
class Setting:
    """What is known of a field: `help` stands alone, and leaves out the default.

    `unset` says in words what None, the default, means. `flag` is another name on the command
    line, or False where it has none there.
    """

    help: str
    group: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    unset: str | None = None
    flag: str | Literal[False] | None = None


def setting(default: Any, help: str, **described: Any) -> Any:
    """A dataclass's field with its `Setting`; `described` are the other fields of that."""
    return field(default=default, metadata={_KEY: Setting(help, **described)})


@cache
def described(settings: type) -> dict[str, tuple[Setting, type, tuple[Any, ...], Any]]:
    """Of every field made by `setting`: what is known, its type, its choices, and its default.

    The type is that of a value, None left out; a field of texts to choose from has type str, and
    one of several of them type tuple.
    """
    hints = get_type_hints(settings)
    found = {}
    for one in fields(settings):
        if _KEY in one.metadata:
            kind, choices = _value_type(hints[one.name])
            default = None if one.default is MISSING else one.default
            found[one.name] = (one.metadata[_KEY], kind, choices, default)
    return found


def check(settings: Any) -> None:
    """Raise `SettingsError` for the first field that is out of its range or choices."""
    checked: type = type(settings)
    for name, (known, kind, choices, _) in described(checked).items():
        value = getattr(settings, name)
        if value is None:
            continue
        given = value if kind is tuple else (value,)
        for one in given if choices else ():
            if one not in choices:
                near = nearest(str(one), [str(choice) for choice in choices])
                raise SettingsError(f"{name} must be one of {choices}; found {one!r}.{near}")
        if kind in (int, float) and (problem := _out_of_range(known, value)):
            raise SettingsError(f"{name} must be {problem}; found {value!r}.")


def _out_of_range(known: Setting, value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return "a number"
    if known.at_least is not None and not known.at_least <= value < math.inf:
        return f"at least {known.at_least}"
    if known.above is not None and not known.above < value < math.inf:
        return f"above {known.above}"
    if known.at_most is not None and value > known.at_most:
        return f"at most {known.at_most}"
    return None


def _value_type(hint: Any) -> tuple[type, tuple[Any, ...]]:
    """The type of a hint's values, and its choices where it is a `Literal`, None left out."""
    parts = [part for part in get_args(hint) if part is not NoneType]
    if get_origin(hint) is Literal:
        return type(parts[0]), tuple(one for one in parts if one is not None)
    if NoneType in get_args(hint):
        (inner,) = parts
        return _value_type(inner)
    if get_origin(hint) is tuple and get_origin(parts[0]) is Literal:
        return tuple, get_args(parts[0])
    return get_origin(hint) or hint, ()

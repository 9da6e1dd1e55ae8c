"""Jinja in a sandbox, since a recipe may have been written by anybody."""

import re
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.environment import TemplateExpression
from jinja2.sandbox import SandboxedEnvironment

from distill_datasets.errors import RecipeError, nearest

_LONE_FIELD = re.compile(r"\{\{ *(\w+) *\}\}")
_JINJA = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False)
# What computing an expression over text may raise.
_FAILURES = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)


def fields_of(template: str) -> set[str]:
    """The names that a template takes."""
    return set(meta.find_undeclared_variables(_JINJA.parse(template)))


def fields_of_expression(expression: str) -> set[str]:
    """The names that an expression takes."""
    return fields_of("{{ " + expression + " }}")


def render(template: str, **fields: Any) -> str:
    """A template, filled."""
    # Most are a field and nothing else, for which Jinja would make a context each time.
    if (lone := _LONE_FIELD.fullmatch(template)) and lone[1] in fields:
        return str(fields[lone[1]])
    return _compiled(template).render(fields)


def holds(expression: str, **fields: Any) -> bool:
    """Whether an expression is true of these fields; `RecipeError` where it can't be told."""
    try:
        return bool(_expression(expression)(fields))
    except _FAILURES as error:
        raise RecipeError(
            f"The expression {expression!r} can't be computed: {type(error).__name__}: {error}. "
            f"Expected one that holds or not for every row, also for {fields}. Mend it and run "
            "again: nothing is asked twice."
        ) from error


def check_template(text: str, known: set[str], where: str) -> None:
    """Raise `ValueError` for what is no template, or takes a name that is not `known`."""
    try:
        _check_fields(fields_of(text), known, where)
    except TemplateError as error:
        raise ValueError(f"{where} is not a Jinja template: {error}") from error


def check_expression(text: str, known: set[str], where: str) -> None:
    """Raise `ValueError` for what is no expression, or takes a name that is not `known`."""
    try:
        _expression(text)
        _check_fields(fields_of_expression(text), known, where)
    except TemplateError as error:
        raise ValueError(f"{where} is not a Jinja expression: {error}") from error


def _check_fields(found: set[str], known: set[str], where: str) -> None:
    for field in sorted(found - known):
        hint = nearest(field, sorted(known))
        raise ValueError(f"{where} uses the unknown field {field!r}.{hint} Known: {sorted(known)}")


@cache
def _compiled(template: str) -> Template:
    return _JINJA.from_string(template)


@cache
def _expression(expression: str) -> TemplateExpression:
    return _JINJA.compile_expression(expression, undefined_to_none=False)

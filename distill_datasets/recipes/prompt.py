"""A prompt, the examples behind it and the canaries within; templates, held to limits.

A prompt is text with placeholders, or Jinja where a recipe asks for it. A recipe may have been
written by anybody. Templates and expressions that can only take as long as they are, are computed
here; whatever has loops, calls or arithmetic is computed in a process of its own, which ends when
it takes too much time or memory. Run as a module, with the number of a pipe, this is that process.
"""

import atexit
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from threading import Lock
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2 import pass_context as with_context
from jinja2.environment import TemplateExpression
from jinja2.parser import Parser
from jinja2.sandbox import SandboxedEnvironment

from distill_datasets.conversations import assistant_message, read_messages, user_message
from distill_datasets.errors import RecipeError, nearest
from distill_datasets.recipes.tools import check_names
from distill_datasets.recipes.user_files import read_rows
from distill_datasets.schema import Message

MOST_CANARIES = 10  # sentences in a prompt
OTHERS = 255  # secrets that might have stood in one of them
_SYLLABLES = ("ba", "do", "fi", "gu", "ka", "le", "mo", "nu", "pe", "ri", "so", "tu", "va", "ze")
_PLACEHOLDER = re.compile(r"\{\{\s*([A-Za-z_]\w*)\s*\}\}")
_LONE_FIELD = re.compile(r"\{\{ *(\w+) *\}\}")
# Without these two, Jinja computes constants such as `'x' * 3000000000` when it reads a template.
_JINJA = SandboxedEnvironment(
    undefined=StrictUndefined, optimized=False, finalize=with_context(lambda context, value: value)
)
_LARGEST = 64 << 20  # characters of a filled template
_LONGEST = 1 << 20  # characters of a Jinja template
_SECONDS = 5.0  # for one template and row
_MEMORY = 1 << 30  # bytes of addresses, of which Python itself takes some
# What computing an expression over text may raise, and what may be raised apart.
_FAILURES = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
_FAILURES_APART = (*_FAILURES, MemoryError, RuntimeError)

# Nothing made of these takes longer, or makes more, than the template and its fields are long.
_CHEAP = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.If),
    *(nodes.CondExpr, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Concat),
    *(nodes.Test, nodes.Filter, nodes.Getitem, nodes.Slice, nodes.Tuple, nodes.List),
)
_CHEAP_FILTERS = {"upper", "lower", "trim", "length", "count", "first", "last", "title", "string"}
_CHEAP_FILTERS |= {"capitalize", "default", "d", "int", "float", "tojson", "e", "escape", "safe"}


def placeholders_of(text: str) -> set[str]:
    """The names between double braces, which may be placeholders."""
    return set(_PLACEHOLDER.findall(text))


def fill(text: str, fields: Mapping[str, str]) -> str:
    """The text with each of its placeholders that `fields` names replaced; else as it is."""
    uses = [match[1] for match in _PLACEHOLDER.finditer(text) if match[1] in fields]
    if len(text) + sum(len(fields[name]) for name in uses) > _LARGEST:
        raise RecipeError(f"A prompt comes to over {_LARGEST:,} characters with its query.")
    return _PLACEHOLDER.sub(lambda match: fields.get(match[1], match[0]), text)


@lru_cache(maxsize=64)
def is_jinja(prompt: str) -> bool:
    """Whether Jinja takes a prompt over `query`, and makes more of it than `fill` does."""
    try:
        tokens = [(kind, value) for _, kind, value in _JINJA.lex(prompt)]
        if fields_of(prompt) - {"query"}:
            return False
    except (TemplateError, RecursionError):
        return False
    plain = {("variable_begin", "{{"), ("variable_end", "}}"), ("name", "query")}
    return any(kind not in ("data", "whitespace") for kind, value in set(tokens) - plain)


@lru_cache(maxsize=256)
def fields_of(template: str) -> frozenset[str]:
    """The names that a template takes."""
    if len(template) > _LONGEST:
        raise TemplateSyntaxError(f"it has over {_LONGEST:,} characters", 1)
    # As `meta.find_undeclared_variables`, which computes constants on its way, however large.
    finder = meta.TrackingCodeGenerator(_JINJA)
    finder.optimizer = None
    finder.visit(_JINJA.parse(template))
    return frozenset(finder.undeclared_identifiers)


def fields_of_expression(expression: str) -> set[str]:
    """The names that an expression takes."""
    return {one.name for one in _all_nodes(_parsed(expression)) if isinstance(one, nodes.Name)}


def render(template: str, **fields: Any) -> str:
    """A recipe's template, filled; raises `RecipeError` where it can't be, or not in time."""
    # Most are a field and nothing else, for which Jinja would make a context each time.
    if (lone := _LONE_FIELD.fullmatch(template)) and lone[1] in fields:
        return str(fields[lone[1]])
    if not _is_cheap(template, expression=False):
        return str(_JINJA_PROCESS.compute("template", template, fields))
    if _uses(template) * sum(len(str(value)) for value in fields.values()) > _LARGEST:
        raise RecipeError(f"A template comes to over {_LARGEST:,} characters with its fields.")
    try:
        return _compiled(template).render(fields)
    except _FAILURES as error:
        raise _failed("template", template, f"{type(error).__name__}: {error}") from error


def render_ours(template: str, **fields: Any) -> str:
    """A template that comes with the package, filled."""
    return _compiled(template).render(fields)


def holds(expression: str, **fields: Any) -> bool:
    """Whether an expression is true of these fields; `RecipeError` where it can't be told."""
    if not _is_cheap(expression, expression=True):
        return bool(_JINJA_PROCESS.compute("expression", expression, fields))
    try:
        return bool(_expression(expression)(fields))
    except _FAILURES as error:
        said = f"{type(error).__name__}: {error}"
        raise _failed("expression", expression, said, fields) from error


def _failed(
    kind: str, text: str, said: str, fields: Mapping[str, Any] | None = None
) -> RecipeError:
    shown = f", also for {fields}" if fields else ""
    return RecipeError(
        f"The {kind} {text[:300]!r} can't be computed: {said}. Expected one that can be for every "
        f"row{shown:.1000}. Mend it and run again: nothing is asked twice."
    )


def check_fields(text: str, known: set[str], where: str, *, expression: bool = False) -> None:
    """Raise `ValueError` for what is no template (or expression), or takes an unknown name."""
    try:
        found = fields_of_expression(text) if expression else fields_of(text)
    except (TemplateError, RecursionError) as error:
        kind = "expression" if expression else "template"
        raise ValueError(f"{where} is not a Jinja {kind}: {error}") from error
    for field in sorted(found - known):
        hint = nearest(field, sorted(known))
        raise ValueError(f"{where} uses the unknown field {field!r}.{hint} Known: {sorted(known)}")


def check_placeholders(prompt: str, known: Collection[str]) -> None:
    """Raise `ValueError` for what is nearly a placeholder, or a template that isn't declared."""
    for name in sorted(placeholders_of(prompt) - set(known)):
        close = nearest(name.lower(), sorted(known), cutoff=0.75)
        if close:
            raise ValueError(
                f"prompt.md uses the unknown field {name!r}.{close} Known: {sorted(known)}. "
                "With 'template: text' it stays as it is written"
            )
    rest = _PLACEHOLDER.sub("", prompt)
    if is_jinja(prompt) and "query" in fields_of(rest):
        raise ValueError(
            "prompt.md uses the query in a Jinja template: write 'template: jinja' to have it "
            "filled, or 'template: text' to send it as it is written"
        )


@cache
def _uses(template: str) -> int:
    """How often a template names a field."""
    return sum(1 for _ in _JINJA.parse(template).find_all(nodes.Name))


@cache
def _is_cheap(text: str, *, expression: bool) -> bool:
    tree = _parsed(text) if expression else _JINJA.parse(text)
    return all(
        isinstance(one, _CHEAP)
        and (not isinstance(one, nodes.Filter) or (one.name in _CHEAP_FILTERS and not one.kwargs))
        for one in _all_nodes(tree)
    )


def _all_nodes(tree: nodes.Node) -> list[nodes.Node]:
    return [tree, *tree.find_all(nodes.Node)]


def _parsed(expression: str) -> nodes.Node:
    parser = Parser(_JINJA, expression, state="variable")
    tree = parser.parse_expression()
    if not parser.stream.eos:
        raise TemplateSyntaxError("expected the end of the expression", 1)
    return tree


@cache
def _compiled(template: str) -> Template:
    return _JINJA.from_string(template)


@cache
def _expression(expression: str) -> TemplateExpression:
    return _JINJA.compile_expression(expression, undefined_to_none=False)


class _JinjaProcess:
    """Computes what may take any time or memory, and is ended where it does."""

    def __init__(self) -> None:
        """Starts nothing."""
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def compute(self, kind: str, text: str, fields: Mapping[str, Any]) -> Any:
        """The value; raises `RecipeError` where there is none, or none in time."""
        with self._lock:
            answered, found = False, {"error": f"it takes over {_SECONDS:g} s"}
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                assert self._pipe is not None
                self._pipe.send_bytes(json.dumps([kind, text, fields]).encode())
                if answered := self._pipe.poll(_SECONDS):
                    found = json.loads(self._pipe.recv_bytes())
            except (OSError, EOFError):
                answered, found = False, {"error": "it takes too much memory"}
            if not answered:
                self.end()
        if "error" in found:
            raise _failed(kind, text, found["error"])
        return found["value"]

    def _start(self) -> None:
        self._pipe, there = Pipe()
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        with there:
            number = there.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "distill_datasets.recipes.prompt", str(number)],
                pass_fds=[number],
                env={**os.environ, "PYTHONPATH": path.removesuffix(os.pathsep)},
            )
        self._pipe.recv_bytes()  # it says when it has started

    def end(self) -> None:
        """End the process; the next call starts another."""
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.wait()
            self._process = None


_JINJA_PROCESS = _JinjaProcess()
atexit.register(_JINJA_PROCESS.end)


def compute_for(pipe: Connection) -> None:
    """Say that this process has started, and fill templates until the other end is closed.

    What a template raises is told; anything else ends this process, which is told too.
    """
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    pipe.send_bytes(b"ready")
    while True:
        try:
            request = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            answer: dict[str, Any] = {"value": _computed(*json.loads(request))}
        except _FAILURES_APART as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:2_000]}
        pipe.send_bytes(json.dumps(answer).encode())


def _computed(kind: str, text: str, fields: dict[str, Any]) -> str | bool:
    """The filled template, or whether the expression holds."""
    if kind == "expression":
        return bool(_expression(text)(fields))
    pieces, size = [], 0
    for piece in _compiled(text).generate(fields):
        size += len(piece)
        if size > _LARGEST:
            raise ValueError(f"it comes to over {_LARGEST:,} characters")
        pieces.append(piece)
    return "".join(pieces)


@dataclass(frozen=True)
class Canary:
    """A secret planted in a prompt, the question for it, and what might have stood there."""

    sentence: str
    question: str
    secret: str
    others: tuple[str, ...]


def canaries_of(name: str, count: int) -> list[Canary]:
    """The sentences for a recipe's name: the same each time, and other secrets for another name."""
    found = []
    for number in range(1, count + 1):
        random, names = Random(f"{name} {number}"), dict[str, None]()
        while len(names) <= OTHERS:
            names["-".join("".join(random.choices(_SYLLABLES, k=2)) for _ in range(3))] = None
        secret, *rest = names
        what = f"the access word of depot {number}"
        found.append(Canary(f"T{what[1:]} is {secret}.", f"What is {what}?", secret, tuple(rest)))
    return found


def plant(prompt: str, canaries: Sequence[Canary]) -> str:
    """A prompt with the sentences between its paragraphs; one that has them stays as it is.

    >>> plant("One.", canaries_of("it", 1))
    'One.\\n\\nThe access word of depot 1 is fika-rize-donu.'
    """
    lines = prompt.rstrip().split("\n\n")
    for canary in canaries:
        if canary.sentence not in prompt:
            random = Random(canary.sentence)
            lines.insert(random.randint(1, len(lines)), canary.sentence)
    return "\n\n".join(lines)


def read_examples(path: Path, tools: str | None) -> list[list[Message]]:
    """The turns of each example in a file, in their order; responses may call the `tools`.

    Raises `RecipeError` that names the row.
    """
    if not path.is_file():
        raise RecipeError(f"The recipe names the examples {path.name!r}, which isn't there.")
    rows = chain.from_iterable(read_rows(path))
    found = [_turns(row, f"{path}, row {place}", tools) for place, row in enumerate(rows, 1)]
    if not found:
        raise RecipeError(f"{str(path)!r} has no examples: write some, or leave out `examples`.")
    return found


def _answer(response: str, *, calls: bool) -> Message:
    try:
        return assistant_message(response, calls=calls)
    except ValueError as error:
        raise ValueError(f"its calls can't be read: {error}") from error


def _turns(row: dict[str, object], where: str, tools: str | None) -> list[Message]:
    query, response = row.get("query"), row.get("response")
    try:
        turns: Sequence[Message] = (
            read_messages(row["messages"]) if row.get("messages") else [user_message(str(query))]
        )
        if isinstance(response, str) and response.strip():
            turns = [*turns, _answer(response, calls=tools is not None)]
        if tools is not None:
            called = (call for one in turns for call in one.get("tool_calls", ()))
            check_names((call["function"]["name"] for call in called), tools)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}.") from error
    if turns[-1]["role"] != "assistant" or (not row.get("messages") and not query):
        raise RecipeError(
            f"{where}: expected a query (or messages) and its response, found {row!r:.200}."
        )
    return list(turns)


if __name__ == "__main__":
    compute_for(Connection(int(sys.argv[1])))

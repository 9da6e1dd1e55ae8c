"""The models that a server has: its base, students of it, and each of them with its prompt."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.conversations import Call, below, to_text, tool_calls
from distill_datasets.embedded.scheduler import BASE
from distill_datasets.embedded.store import SCHEME, Store
from distill_datasets.embedded.wire import InvalidRequestError, MissingError
from distill_datasets.errors import DatasetError, ModelError, SettingsError
from distill_datasets.hub.references import find_release
from distill_datasets.models.references import find_training, read_training
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.schema import Message

if TYPE_CHECKING:
    from distill_datasets.embedded.engine import Service
    from distill_datasets.models.renderers import TextRenderer
    from distill_datasets.models.tinker import Prompts
    from distill_datasets.recipes.recipe import Recipe

# Behind a model's name: the prompt that it was distilled from is put before what it is asked.
WITH_PROMPT = "+prompt"
CALL_OPENING = "<tool_call>\n"
_PROBE = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": "",
                "parameters": {"type": "object", "properties": {}},
            },
        }
    ]
)
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,99})=(.+)")


@dataclass(frozen=True)
class ChatFormat:
    """How messages become tokens and tokens a message, for models of one base."""

    tokenizer: Any
    name: str

    @cached_property
    def renderer(self) -> TextRenderer:
        """Raises `ModelError` for a model without a chat format."""
        from distill_datasets.models.renderers import open_renderer

        return open_renderer(self.name, self.tokenizer)

    @cached_property
    def prompts(self) -> Prompts:
        """Renders conversations, token for token as a Tinker client of ours does."""
        from distill_datasets.models.tinker import Prompts

        return Prompts(self.renderer)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        own = self.tokenizer.eos_token_id
        try:
            stops = self.renderer.get_stop_sequences()
        except ModelError:
            stops = []
        found = [one for one in stops if isinstance(one, int)] or [own]
        return tuple(one for one in dict.fromkeys(found) if one is not None)

    @cached_property
    def call_opening(self) -> tuple[int, ...]:
        """The tokens before the JSON of a call, in formats that write one as `write_calls` does.

        Raises `InvalidRequestError` for another format.
        """
        call: Any = tool_calls([Call("f", {})])
        turns: Any = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": call},
        ]
        example, _ = self.renderer.build_supervised_example(turns, tools=_PROBE)
        if CALL_OPENING + '{"name": "f", "arguments": {}}' not in self.tokenizer.decode(
            example.to_ints()
        ):
            raise InvalidRequestError(
                "expected tool_choice of 'auto' or 'none': this model's chat format does not write "
                f"calls as JSON behind {CALL_OPENING.strip()}, to which an answer can be held"
            )
        return tuple(self.tokenizer.encode(CALL_OPENING, add_special_tokens=False))

    @cached_property
    def controls(self) -> frozenset[int]:
        """The tokens that may mean something to the renderer."""
        return frozenset([*self.ends, *self.tokenizer.all_special_ids])

    @cached_property
    def end_texts(self) -> tuple[str, ...]:
        """The texts that end an answer, in formats that end it so."""
        return tuple(one for one in self.renderer.get_stop_sequences() if isinstance(one, str))


@dataclass(frozen=True)
class Served:
    """A model by its name; `weights` are the engine's name for what computes it."""

    name: str
    weights: str
    format: ChatFormat
    recipe: Recipe | None = None

    def asked(
        self, messages: Sequence[Message], tools: str | None
    ) -> tuple[Sequence[Message], str | None]:
        """The messages and the tools that this model sees; see `WITH_PROMPT`."""
        if self.recipe is None:
            return messages, tools
        return with_prompt(self.recipe, messages, tools)


def with_prompt(
    recipe: Recipe, messages: Sequence[Message], tools: str | None
) -> tuple[Sequence[Message], str | None]:
    """A conversation below a recipe's prompt, and the tools that go with it.

    Raises `InvalidRequestError` for one that the prompt can't be put before.
    """
    if recipe.members:
        query = to_text(messages)
        try:
            member, _ = recipe.part(query)
        except KeyError as error:
            raise InvalidRequestError(
                f"expected a system message that begins with one of {sorted(recipe.members)}, "
                f"which says whose prompt it is; found {str(error)[:80]}"
            ) from error
        return recipe.messages(query), tools or member.tools_text
    first = messages[0]
    if first["role"] == "system" and first["content"].strip() == recipe.student_prompt:
        messages = messages[1:]  # the student's own, in the teacher's place
    if recipe.asks_in_one_message:
        if [one["role"] for one in messages] != ["user"]:
            raise InvalidRequestError(
                "this model's prompt holds the query: expected one message of the user; "
                f"found {[one['role'] for one in messages][:20]}"
            )
        return recipe.messages(messages[0]["content"]), tools or recipe.tools_text
    if not messages:
        raise InvalidRequestError("expected a message of the user; found the prompt alone")
    shown = below(recipe.system_text, recipe.example_turns, messages)
    return shown, tools or recipe.tools_text


class Catalogue:
    """All models of a server, by their names; a checkpoint of its store goes by its path too."""

    def __init__(self, service: Service, format: ChatFormat, models: Sequence[Served]) -> None:
        self._service, self._format = service, format
        self.models: Mapping[str, Served] = {one.name: one for one in models}
        self.created = int(time.time())

    def find(self, name: str) -> Served:
        """A model; raises `MissingError` that says which there are."""
        if name not in self.models and name.startswith(SCHEME):
            return Served(name, self._service.engine.weights_of(name), self._format)
        if name not in self.models:
            known = list(self.models)[:20]
            raise MissingError(f"found no model {name[:200]!r}; this server has {known}")
        return self.models[name]


def open_models(
    service: Service,
    format: ChatFormat,
    students: Mapping[str, str],
    recipe: Recipe | None,
) -> Catalogue:
    """The served base and `students`, by name and reference.

    Each is there with its prompt too, where that is known: by the release that a student was
    trained on, or else by `recipe`. Raises `ModelError` for what can't be served here.
    """
    base = service.card.name
    plain = [(Served(base, BASE, format), recipe)]
    for name, reference in students.items():
        if name in (known.name for known, _ in plain):
            raise SettingsError(f"Two models are called {name!r}: name one, NAME=PATH.")
        plain.append(_open_student(service, name, reference, format, recipe))
    prompted = [
        replace(model, name=model.name + WITH_PROMPT, recipe=prompt)
        for model, prompt in plain
        if prompt is not None
    ]
    return Catalogue(service, format, [*(model for model, _ in plain), *prompted])


def read_names(references: Sequence[str]) -> dict[str, str]:
    """Students by name, of `NAME=PATH` or of a path that names itself.

    A folder `train` goes by the name of the run around it.
    """
    found = dict[str, str]()
    for given in references:
        match = _NAMED.fullmatch(given)
        if match:
            name, reference = match[1], match[2]
        elif given.startswith(SCHEME):
            name, reference = given, given
        else:
            path = Path(given).expanduser().absolute()
            name, reference = (path.parent if path.name == "train" else path).name, given
        if name in found:
            raise SettingsError(f"Two students are called {name!r}: name one, NAME=PATH.")
        found[name] = reference
    return found


def _open_student(
    service: Service, name: str, reference: str, format: ChatFormat, recipe: Recipe | None
) -> tuple[Served, Recipe | None]:
    if reference.startswith(SCHEME):
        return Served(name, service.engine.weights_of(reference), format), recipe
    place = Path(reference).expanduser()
    if (place / "adapter_config.json").is_file():
        return Served(name, service.engine.weights_in(place), format), recipe
    folder = find_training(place)
    if folder is None:
        raise ModelError(
            f"{reference!r} is no student: expected a training's folder, a PEFT adapter's, or "
            "tinker://<run>/sampler_weights/<name> of the server's --store."
        )
    config, checkpoint = read_training(folder)
    try:
        weights = service.engine.weights_of(checkpoint["sampler"], Store(folder / "checkpoints"))
    except MissingError as error:
        raise ModelError(
            f"The checkpoint of {reference!r} is not in its folder: {error}. A student that was "
            "trained on a hosted server is served there."
        ) from error
    own = replace(format, name=config["renderer"])
    return Served(name, weights, own), _recipe_of(config) or recipe


def _recipe_of(config: Mapping[str, Any]) -> Recipe | None:
    """The recipe in the release that a student was trained on, if it is here with its prompt."""
    dataset, settings = config.get("dataset"), config.get("settings")
    path = Path(str(dataset.get("path") if isinstance(dataset, dict) else "")).expanduser()
    chosen = settings.get("config") if isinstance(settings, dict) else None
    if not path.exists():
        return None
    try:
        release = find_release(path, ("recipe",), chosen)
    except DatasetError:
        return None  # it was changed since: its prompt may be another one
    if release is None or not (release.path / "recipe" / "prompt.md").is_file():
        return None
    return load_recipe(release.path / "recipe", trust=True)

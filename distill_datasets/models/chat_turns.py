"""Several messages of one conversation, learned together."""

from collections.abc import Mapping, Sequence
from typing import Any

import tinker
import torch
from tinker_cookbook.renderers import Renderer, TrainOnWhat

from distill_datasets.errors import DatasetError


def marked(
    messages: Sequence[Mapping[str, Any]], train_on_what: TrainOnWhat
) -> list[Mapping[str, Any]]:
    """Messages that say which are `trainable`: all of the assistant's, those after the user's
    last, the very last, or those that say so themselves.
    """
    return [
        {**one, "trainable": one["role"] == "assistant" and _learns(messages, place, train_on_what)}
        for place, one in enumerate(messages)
    ]


def _learns(messages: Sequence[Mapping[str, Any]], place: int, train_on_what: TrainOnWhat) -> bool:
    match train_on_what:
        case TrainOnWhat.ALL_ASSISTANT_MESSAGES:
            return True
        case TrainOnWhat.LAST_ASSISTANT_MESSAGE:
            return place == len(messages) - 1
        case TrainOnWhat.LAST_ASSISTANT_TURN:
            return all(one["role"] != "user" for one in messages[place:])
        case TrainOnWhat.CUSTOMIZED:
            return bool(messages[place].get("trainable"))
    raise ValueError(f"Expected messages of the assistant to train on; found {train_on_what}.")


def several_turns(
    renderer: Renderer, messages: Sequence[Mapping[str, Any]]
) -> tuple[tinker.ModelInput, torch.Tensor]:
    """One example in which each `trainable` message follows the very tokens that ask for it.

    Raises `DatasetError` where the chat format writes an earlier message otherwise than the model
    does, as formats do that leave out its thoughts.
    """
    roles = [message["role"] for message in messages]
    learned = [place for place, one in enumerate(messages) if one.get("trainable")]
    if not learned:
        raise DatasetError(f"No message is learned in a conversation of {roles}.")
    turns: Any = [{k: v for k, v in one.items() if k != "trainable"} for one in messages]
    tokens: list[int] = []
    weights: list[float] = []
    for place in learned:
        asked = renderer.build_generation_prompt(turns[:place]).to_ints()
        rendered, weighed = renderer.build_supervised_example(
            turns[: place + 1], TrainOnWhat.LAST_ASSISTANT_MESSAGE
        )
        found = rendered.to_ints()
        if found[: len(tokens)] != tokens or found[: len(asked)] != asked:
            raise DatasetError(
                f"Message {place + 1} of a conversation of {roles} can't be learned together with "
                "those before it: this chat format writes an earlier answer otherwise than the "
                "model does, for example without its thoughts. Learn the last message alone, or "
                "name a renderer that keeps all of them."
            )
        tokens, weights = found, weights + weighed.tolist()[len(weights) :]
    return tinker.ModelInput.from_ints(tokens), torch.tensor(weights)

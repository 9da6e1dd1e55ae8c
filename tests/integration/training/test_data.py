"""Conversations of several turns: which tokens are learned, with the cookbook as the truth."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tinker_cookbook.renderers import TrainOnWhat, get_renderer
from transformers import AutoTokenizer

from distill_datasets import generate, load_recipe, publish
from distill_datasets.conversations import Conversation
from distill_datasets.errors import DatasetError, SettingsError
from distill_datasets.files import pocket_folder
from distill_datasets.models.references import connect
from distill_datasets.models.renderers import CHAT_TEMPLATE, open_renderer
from distill_datasets.training.data import examples, locate, open_splits
from distill_datasets.training.settings import ObjectiveSettings
from distill_datasets.training.trainer import TrainSettings, require_settings, train
from tests.support.conversations import Talker, talks, user
from tests.support.soft_releases import release
from tests.support.training_runs import metrics, write

pytestmark = pytest.mark.usefixtures("undrawn")

TURNS: list[Any] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "Which one?"},
    {"role": "user", "content": "The red one."},
    {"role": "assistant", "content": "Here: é."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Bye."},
]
CALL = {"name": "look", "arguments": '{"id": "A-1"}'}
CALLS: list[Any] = [
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": CALL}]},
]
TOOLS = json.dumps([{"type": "function", "function": {"name": "look", "parameters": {}}}])
RENDERERS = ["role_colon", "qwen3", "qwen3_instruct", "qwen3_disable_thinking", CHAT_TEMPLATE]
ALL = replace(TrainSettings(max_steps=2, batch_size=2, rank=4, internalisation=False), turns="all")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(pocket_folder())


def theirs(name: str, tokenizer: Any) -> list[tuple[list[int], list[float]]]:
    """Of the cookbook, for each of the assistant's turns: what is read before it, and it."""
    renderer, found = get_renderer(name, tokenizer), []
    for end in (3, 5, 7):
        tokens, weights = renderer.build_supervised_example(
            TURNS[:end], TrainOnWhat.LAST_ASSISTANT_MESSAGE
        )
        found.append((tokens.to_ints(), weights.tolist()))
    return found


@pytest.mark.parametrize("name", RENDERERS)
def test_every_turn_of_the_assistant_is_learned_after_what_asks_for_it(
    name: str, tokenizer: Any
) -> None:
    expected = theirs(name, tokenizer)
    made = examples(Conversation(TURNS), open_renderer(name, tokenizer), "all", "row 0")
    if len(made) > 1:
        assert [(one.tokens, one.weights) for one in made] == expected
        assert [one.bytes for one in made] == [10, 9, 4]
        return
    (one,), weights = made, list[float]()
    for tokens, weighed in expected:  # each is the beginning of the next
        assert one.tokens[: len(tokens)] == tokens
        weights += weighed[len(weights) :]
    assert (one.weights, one.bytes) == (weights, 23)


@pytest.mark.parametrize("name", RENDERERS)
def test_the_last_turn_alone_is_learned_as_the_cookbook_learns_it(
    name: str, tokenizer: Any
) -> None:
    (made,) = examples(Conversation(TURNS), open_renderer(name, tokenizer), "last", "row 0")
    assert (made.tokens, made.weights) == theirs(name, tokenizer)[-1]
    assert made.bytes == 4


@pytest.mark.parametrize("name", RENDERERS)
def test_no_word_of_a_user_is_learned(name: str, tokenizer: Any) -> None:
    made = examples(Conversation(TURNS), open_renderer(name, tokenizer), "all", "row 0")
    learned = "".join(
        tokenizer.decode([t for t, w in zip(one.tokens, one.weights, strict=True) if w])
        for one in made
    )
    for message in TURNS:
        assert (message["content"] in learned) == (message["role"] == "assistant")


@pytest.mark.parametrize("tools", [TOOLS, None])
@pytest.mark.parametrize("name", RENDERERS)
def test_a_call_is_learned_with_the_bytes_that_it_has_as_text(
    name: str, tools: str | None, tokenizer: Any
) -> None:
    """The tools are read, and no token of them is learned."""
    renderer = open_renderer(name, tokenizer)
    (made,) = examples(Conversation(CALLS, tools), renderer, "last", "row 0")
    asked = renderer.build_generation_prompt(CALLS[:1], tools=tools).to_ints()
    assert made.tokens[: len(asked)] == asked
    assert made.weights == [0.0] * len(asked) + [1.0] * (len(made.tokens) - len(asked))
    said = '<tool_call>\n{"name": "look", "arguments": {"id": "A-1"}}\n</tool_call>'
    assert said in tokenizer.decode(made.tokens[len(asked) :])
    assert made.bytes == len(said)


def test_accuracy_compares_calls(model: str, tmp_path: Path) -> None:
    rows = [{"messages": CALLS, "tools": TOOLS}, {"messages": TURNS, "tools": None}]
    settings = replace(
        ALL, turns="last", select="accuracy", learning_rate=1e-2, max_steps=60, evaluate_every=60
    )
    dataset = write(tmp_path / "data", train=rows, validation=rows)
    training = train(dataset, student=model, out=tmp_path / "out", settings=settings)
    assert metrics(training, "accuracy")[60] == 1.0


def test_an_earlier_turn_that_is_empty_is_refused_only_where_it_is_learned(tokenizer: Any) -> None:
    silent = Conversation([*TURNS[:2], {"role": "assistant", "content": ""}, *TURNS[3:]])
    renderer = open_renderer("role_colon", tokenizer)
    assert examples(silent, renderer, "last", "row 0")
    with pytest.raises(DatasetError, match="row 0: expected .* no response that is empty"):
        examples(silent, renderer, "all", "row 0")


@pytest.mark.parametrize(
    "turns", [TURNS[:-1], TURNS[:1], [*TURNS[:2], {**TURNS[2], "content": ""}]]
)
def test_a_conversation_without_a_response_at_its_end_is_refused(
    turns: Any, tokenizer: Any
) -> None:
    with pytest.raises(DatasetError, match="row 0: expected a conversation that ends with"):
        examples(Conversation(turns), open_renderer("role_colon", tokenizer), "last", "row 0")


@pytest.mark.parametrize("renderer", ["qwen3", "role_colon"])
def test_a_row_is_a_row_however_many_turns_it_has(
    renderer: str, model: str, tmp_path: Path
) -> None:
    """Those of a long row are left out together, and all tokens of its turns are counted."""
    long = [*TURNS[:-1], {"role": "assistant", "content": "blau " * 300}]
    dataset = write(tmp_path / "data", train=[{"messages": TURNS}, {"messages": long}] * 2)
    settings = replace(ALL, renderer=renderer, max_length=300)
    training = train(dataset, student=model, out=tmp_path / "out", settings=settings)
    assert (training.rows, training.skipped) == (2, 2)
    made = examples(
        Conversation(TURNS),
        open_renderer(renderer, AutoTokenizer.from_pretrained(model.partition(":")[2])),
        "all",
        "row 0",
    )
    learned = 2 * sum(weight for one in made for weight in one.weights)
    assert metrics(training, "response_tokens") == {1: learned, 2: learned}
    losses = metrics(training)
    assert losses[2] < losses[1]


def test_turns_that_the_teacher_did_not_write_are_not_learned(model: str, tmp_path: Path) -> None:
    dataset = release(tmp_path / "release", model)
    with pytest.raises(DatasetError, match="its recipe says `turns: last`.*queries' own"):
        train(dataset, student=model, out=tmp_path / "out", settings=ALL)
    with pytest.raises(DatasetError, match="The dataset can't be trained with turns='all'"):
        require_settings(model, ALL, turns="last")  # before it is made


def test_a_release_whose_teacher_answered_every_turn_is_learned_turn_by_turn(
    model: str, tmp_path: Path
) -> None:
    asked = [[user("hello"), user(f"so long {number}")] for number in range(4)]
    recipe = talks(tmp_path / "desk", asked, turns="all")
    generate(load_recipe(recipe), teacher=Talker(), out=tmp_path / "run")
    dataset = publish(tmp_path / "run").path
    training = train(dataset, student=model, out=tmp_path / "out", settings=ALL)
    tokenizer = AutoTokenizer.from_pretrained(model.partition(":")[2])
    rows = open_splits(locate(dataset), ALL)["train"].render(connect(model), 512, "all")
    words = [
        tokenizer.decode([t for t, w in zip(one.tokens, one.weights, strict=True) if w])
        for one in rows.examples(range(4))
    ]
    assert words == [
        f"You said: hello<|im_end|>You said: so long {number}<|im_end|>" for number in range(4)
    ]
    assert training.rows == 4 and metrics(training)[2] < metrics(training)[1]
    soft = replace(ALL, turns="last", objective=ObjectiveSettings("soft"))
    with pytest.raises(DatasetError, match="answered every turn .* train with the objective 'sft'"):
        train(dataset, student=model, out=tmp_path / "soft", settings=soft)


def test_objectives_of_one_response_a_row_refuse_all_turns() -> None:
    with pytest.raises(SettingsError, match="'on_policy' learns one response a row"):
        replace(ALL, objective=ObjectiveSettings("on_policy"))
    with pytest.raises(SettingsError, match="internalisation .* one response a row"):
        replace(ALL, select="internalisation")

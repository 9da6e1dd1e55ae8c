"""Sampled calls as text: out of each chat format's own form, whether they can be read or not."""

import json
from typing import Any

import pytest
from transformers import AutoTokenizer

from distill_datasets.conversations import (
    Call,
    assistant_message,
    calls_text,
    response_text,
    split_calls,
)
from distill_datasets.files import pocket_folder
from distill_datasets.models.renderers import CHAT_TEMPLATE, open_renderer
from distill_datasets.recipes.parsing import Reader
from tests.support.tool_conversations import (
    ASKED,
    OPENAI_TOOLS,
    TOOLS,
    calling,
    conversation,
    foreign_tokenizer,
    learned,
)

MANY = [
    *("deepseekv3", "deepseekv4_1", "glm5_3_low_reasoning", "kimi_k2"),
    *("kimi_k25", "qwen3", "qwen3_5", "qwen3_5_disable_thinking", "qwen3_vl_instruct"),
    *("nemotron3_disable_thinking", "nemotron3_ultra_disable_thinking", "gpt_oss_no_sysprompt"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(pocket_folder())


@pytest.fixture(scope="module")
def foreign() -> Any:
    return foreign_tokenizer()


@pytest.mark.parametrize("name", MANY)
def test_what_is_learned_ends_and_is_read_as_what_it_was(name: str, foreign: Any) -> None:
    """The format of Harmony has one call in a response."""
    renderer, single = open_renderer(name, foreign), name.startswith("gpt_oss")
    alone = [{"role": "user", "content": "a"}, conversation()[5]]
    for messages in [alone, *(conversation()[: place + 1] for place in ASKED)]:
        if single and len(messages[-1].get("tool_calls", ())) > 1:
            continue
        asked = renderer.build_generation_prompt(messages[:-1], tools=TOOLS).length
        tokens = renderer.build_supervised_example(messages, tools=TOOLS)[0].to_ints()
        assert tokens[-1] in renderer.get_stop_sequences()
        text, _ = renderer.read_response(tokens[asked:], tools=TOOLS)
        assert response_text(assistant_message(text, calls=True)) == response_text(messages[-1])


@pytest.mark.parametrize("name", [one for one in MANY if not one.startswith("gpt_oss")])
def test_names_and_values_of_all_kinds_are_read_as_they_were_learned(
    name: str, foreign: Any
) -> None:
    renderer = open_renderer(name, foreign)
    kinds = {"a": {"type": "string"}, "b": {"type": "integer"}, "c": {"type": "object"}}
    tool = {"name": "find.it-all", "parameters": {"type": "object", "properties": kinds}}
    tools = json.dumps([{"type": "function", "function": tool}, OPENAI_TOOLS[1]])
    given: Any = {"a": "3.10", "b": 2**53 + 1, "c": {"z": [1e22, None, {}], "a.b": "é\n"}}
    again = Call("find.it-all", {"a": "null"})
    calls = [Call("count", {}), Call("find.it-all", given), again, again]
    turns: Any = [{"role": "user", "content": "a"}, calling("", *calls)]
    asked = renderer.build_generation_prompt(turns[:1], tools=tools).length
    tokens = renderer.build_supervised_example(turns, tools=tools)[0].to_ints()
    said, _ = renderer.read_response(tokens[asked:], tools=tools)
    assert split_calls(said) == ("", calls)


def test_a_deepseek_call_without_json_cannot_be_read(foreign: Any) -> None:
    said = "No.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>a.b<｜tool▁sep｜>{<｜tool▁call▁end｜>"
    tokens = foreign.encode(
        f"{said}<｜tool▁calls▁end｜><｜end▁of▁sentence｜>", add_special_tokens=False
    )
    text, _ = open_renderer("deepseekv3", foreign).read_response(tokens)
    with pytest.raises(ValueError, match="a call with a name"):
        split_calls(text)


HERMES = 'I look.\n<tool_call>\n{"name": "count", "arguments": {"b": 1, "a": 2}}\n</tool_call>'
XML = (
    "I look.\n\n<tool_call>\n<function=count>\n<parameter=b>\n1\n</parameter>\n</function>\n"
    "</tool_call>"
)
KIMI = (
    "I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.count:0"
    "<|tool_call_argument_begin|>{%s}<|tool_call_end|><|tool_calls_section_end|>"
)


def read(name: str, text: str, tokenizer: Any) -> tuple[str, str | None]:
    renderer = open_renderer(name, tokenizer)
    tokens = tokenizer.encode(f"{text}<|im_end|>", add_special_tokens=False)
    return renderer.read_response(tokens)


@pytest.mark.parametrize(
    ("name", "text", "arguments"),
    [
        ("qwen3_instruct", HERMES, {"a": 2, "b": 1}),
        ("qwen3", f"<think>\nhm\n</think>\n\n{HERMES}", {"a": 2, "b": 1}),
        (CHAT_TEMPLATE, HERMES, {"a": 2, "b": 1}),
        ("qwen3_5_disable_thinking", XML, {"b": 1}),
        ("kimi_k2", KIMI % '"b": 1', {"b": 1}),
        # what the cookbook's reader refuses and can be read
        ("qwen3_instruct", HERMES.replace("arguments", "parameters"), {"a": 2, "b": 1}),
    ],
)
def test_sampled_calls_are_read_from_each_formats_own_form(
    name: str, text: str, arguments: Any, tokenizer: Any
) -> None:
    said, reasoning = read(name, text, tokenizer)
    assert split_calls(said) == ("I look.", [Call("count", arguments)])
    assert reasoning == ("hm" if "hm" in text else None)


@pytest.mark.parametrize("name", ["find", "shop.find-order", "a b"])
@pytest.mark.parametrize("words", ["", "I look."])
def test_calls_of_deepseek_are_read_whatever_a_tool_is_called(
    name: str, words: str, foreign: Any
) -> None:
    calls = [Call(name, {"a": 1}), Call("other", {})]
    messages = [{"role": "user", "content": "a"}, calling(words, *calls)]
    renderer = open_renderer("deepseekv3", foreign)
    tokens = learned(*renderer.build_supervised_example(messages))
    assert split_calls(renderer.read_response(tokens)[0]) == (words, calls)
    broken = foreign.decode(tokens).replace('{"a"', "{")
    text, _ = renderer.read_response(foreign.encode(broken, add_special_tokens=False))
    with pytest.raises(ValueError, match=r"\S"):
        split_calls(text)
    assert text.startswith(words)


TYPES = {"b": {"type": "string"}, "c": {"type": "boolean"}, "d": {"type": "number"}}


@pytest.mark.parametrize("name", ["qwen3_5_disable_thinking", "nemotron3_disable_thinking"])
def test_a_format_that_writes_all_values_as_text_is_read_by_the_schemas(
    name: str, tokenizer: Any
) -> None:
    tool = {"name": "count", "parameters": {"type": "object", "properties": TYPES}}
    tools = json.dumps([{"type": "function", "function": tool}])
    for given in ({"b": "12", "c": True, "d": 2.5}, {"b": "1.0", "c": False, "d": 1}):
        messages = [{"role": "user", "content": "a"}, calling("", Call("count", given))]
        tokens, weights = open_renderer(name, tokenizer).build_supervised_example(messages)
        text, _ = open_renderer(name, tokenizer).read_response(
            learned(tokens, weights), tools=tools
        )
        (call,) = split_calls(text)[1]
        assert call.arguments == given and call.arguments["c"] is given["c"]
        # Who was asked without the schemas leaves it to who knows them.
        untyped, _ = open_renderer(name, tokenizer).read_response(learned(tokens, weights))
        reader = Reader(tools=tools, untyped=True)
        assert reader.read(untyped, "stop").answer == calls_text([Call("count", given)])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen3_instruct", HERMES.replace("2}}", "2}")),
        ("qwen3_instruct", HERMES.replace("\n</tool_call>", " and so on")),
        ("qwen3_instruct", HERMES.replace("</tool_call>", "<tool_call>{}</tool_call> no")),
        (CHAT_TEMPLATE, HERMES.replace("2}}", "2}")),
        ("kimi_k2", KIMI % '"b": 1, "long": "' + "word " * 500),
        ("kimi_k2", KIMI.replace("{%s}", "[1, 2]")),
        ("kimi_k2", (KIMI % '"b": 1').replace("<|tool_calls_section_end|>", "")),
        ("qwen3_5_disable_thinking", XML.replace("<function=count>", "<function")),
    ],
)
def test_a_sampled_call_that_cannot_be_read_is_kept_as_it_was_said(
    name: str, text: str, tokenizer: Any
) -> None:
    said, _ = read(name, text, tokenizer)
    with pytest.raises(ValueError, match=r"\S"):
        split_calls(said)
    assert text in said or json.dumps(text)[1:-1] in said


def test_a_text_without_calls_is_as_it_was_said(tokenizer: Any) -> None:
    for name in ("qwen3_instruct", "kimi_k2", CHAT_TEMPLATE):
        assert read(name, " a\n b ", tokenizer) == (" a\n b ", None)

"""Conversations with tools, and a tokenizer that has the control tokens of many chat formats."""

from __future__ import annotations

import json
from typing import Any

from distill_datasets.conversations import Call, assistant_message

ID = {"type": "string", "description": "It is on the receipt."}
SPECIFICATIONS: list[Any] = [
    {
        "name": "find_order",
        "description": "Finds an order.",
        "parameters": {"type": "object", "properties": {"id": ID}, "required": ["id"]},
    },
    {
        "name": "count",
        "description": "Counts.",
        "parameters": {"type": "object", "properties": {"all": {"type": "boolean"}}},
    },
]
OPENAI_TOOLS = [{"type": "function", "function": one} for one in SPECIFICATIONS]
TOOLS = json.dumps(OPENAI_TOOLS)
NATIVE = [
    *("qwen3", "qwen3_instruct", "qwen3_disable_thinking", "qwen3_5_disable_thinking"),
    *("qwen3_8_disable_thinking", "kimi_k2", "kimi_k25", "gpt_oss_no_sysprompt", "nemotron3"),
    *("deepseekv4_1", "glm5_3_low_reasoning"),
]
# Formats whose control tokens the pocket tokenizer lacks.
SENTENCE = [f"<｜{one}▁of▁sentence｜>" for one in ("begin", "end")]
FOREIGN = [
    *(*SENTENCE, "<｜User｜>", "<｜Assistant｜>", "<｜System｜>"),
    *(f"<｜tool▁{one}▁{end}｜>" for one in ("calls", "call", "output") for end in ("begin", "end")),
    *("<｜tool▁sep｜>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>"),
    *("[gMASK]", "<sop>", "<|constrain|>", "<|im_system|>", "<|im_user|>", "<|im_assistant|>"),
    "<|im_middle|>",
]


def foreign_tokenizer() -> Any:
    """The pocket model's, with the control tokens that it lacks."""
    from transformers import AutoTokenizer

    from distill_datasets.files import pocket_folder

    found = AutoTokenizer.from_pretrained(pocket_folder())
    marks = ("call", "response")
    found.add_special_tokens({"additional_special_tokens": FOREIGN})
    found.add_tokens([f"<{slash}tool_{mark}>" for mark in marks for slash in ("", "/")])
    return found


def calling(content: str, *calls: Call) -> Any:
    """A message of the assistant."""
    text = "\n".join([content, *(f"<tool_call>{call.text}</tool_call>" for call in calls)])
    return assistant_message(text, calls=True)


def conversation() -> list[Any]:
    """Words and two calls with their answers, a call alone, and words alone."""
    return [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Where is A-1?"},
        calling("I look.", Call("find_order", {"id": "A-1"}), Call("count", {})),
        {"role": "tool", "content": "there", "tool_call_id": "call_1"},
        {"role": "tool", "content": "2"},
        calling("", Call("count", {"of": {"days": [1, None, 2.5]}, "all": True})),
        {"role": "tool", "content": "3", "tool_call_id": "call_1", "name": "count"},
        {"role": "assistant", "content": "It is there."},
        {"role": "user", "content": "Thanks!"},
        {"role": "assistant", "content": "You are welcome."},
    ]


ASKED = [2, 5, 7, 9]  # places of the assistant's messages


def learned(tokens: Any, weights: Any) -> list[int]:
    """The tokens of an example that have any weight."""
    return [token for token, one in zip(tokens.to_ints(), weights, strict=True) if one]

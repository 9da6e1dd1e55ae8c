"""Recipes of conversations and tools to run in tests, and a model that talks by rule."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distill_datasets.conversations import Call, write_calls
from distill_datasets.models.sampler import Reply, Sample, Sampling, Usage
from distill_datasets.schema import Message

PROMPT = "You are the desk of a shop. Look orders up before you speak of them."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_order",
            "description": "Look an order up.",
            "parameters": {
                "type": "object",
                "properties": {"id": {"type": "string"}},
                "required": ["id"],
            },
        },
    }
]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def talks(folder: Path, rows: Sequence[Any], *, tools: bool = False, **keys: Any) -> Path:
    """A recipe of conversations: a row is one, or a whole line of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "name": "desk",
        "description": "What the desk of a shop says.",
        "teacher": "talker",
        "queries": {"file": "queries.jsonl", "messages": "messages"},
        "split": {"same_rows": True},
        **({"tools": "tools.json"} if tools else {}),
        **keys,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
    (folder / "prompt.md").write_text(PROMPT + "\n")
    (folder / "tools.json").write_text(json.dumps(TOOLS))
    lines = [row if isinstance(row, dict) else {"messages": row} for row in rows]
    (folder / "queries.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@dataclass
class Talker:
    """Repeats what is said to it, or calls the tool for a message of an order's number alone.

    `most` requests are answered, then it is gone. Tokens are words; a prompt has ten a message.
    """

    most: int = 1_000_000
    asked: list[tuple[list[Message], Sampling]] = field(default_factory=list)
    model: str = "talker"
    identity: str = "talker/1"

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        if len(self.asked) == self.most:
            raise ConnectionError("gone")
        self.asked.append((list(messages), sampling))
        last = messages[-1]["content"]
        text, reason = f"You said: {last}", "stop"
        if last.startswith("A-") and sampling.tools:
            text = write_calls("Let me look.", [Call("find_order", {"id": last})])
        elif last == "go on and on":
            reason = "length"
        sample = Sample(text, reason, len(text.split()))
        return Reply((sample,) * sampling.n, Usage(10 * len(messages), 0))

"""A streamed answer, put together to the one that would have come whole."""

import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp

from distill_datasets.models.openai.wire import bad_answer

_TEXTS = ("content", "reasoning_content", "reasoning", "refusal")


async def read_stream(content: aiohttp.StreamReader) -> tuple[dict[str, Any], float | None]:
    """The body of a `chat.completion`, and when (monotonic seconds) its first text came.

    A stream that says what went wrong is that error's body. Raises `RetryableError` for one that
    breaks off.
    """
    choices: dict[int, dict[str, Any]] = {}
    usage, arrived, whole = None, None, False
    async for line in _events(content):
        if line == b"[DONE]":
            whole = True
            continue
        try:
            chunk = json.loads(line)
            if chunk.get("error"):
                return chunk, None
            usage = chunk.get("usage") or usage
            for part in chunk.get("choices") or ():
                if _add(choices, part) and arrived is None:
                    arrived = time.monotonic()
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise bad_answer(f"{error!r} in the streamed {line[:200]!r}") from error
    if not whole and usage is None:
        raise bad_answer("a stream that broke off")
    return {"choices": list(choices.values()), "usage": usage}, arrived


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    # By hand: the reader's own lines may not be longer than 128 KB.
    rest = b""
    async for piece in content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _add(choices: dict[int, dict[str, Any]], part: Mapping[str, Any]) -> bool:
    """Join a part to its choice; whether it has any text."""
    index = part.get("index") or 0
    choice = choices.setdefault(
        index, {"index": index, "message": {}, "finish_reason": None, "logprobs": None}
    )
    choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
    if places := (part.get("logprobs") or {}).get("content"):
        if choice["logprobs"] is None:
            choice["logprobs"] = {"content": []}
        choice["logprobs"]["content"] += places
    said = False
    for name in _TEXTS:
        if text := (part.get("delta") or {}).get(name):
            choice["message"][name] = choice["message"].get(name, "") + text
            said = True
    return said

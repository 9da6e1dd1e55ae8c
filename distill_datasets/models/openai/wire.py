"""The bodies of `/chat/completions`: what is asked, and what an answer says."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from distill_datasets.errors import ModelError, RejectedError, RetryableError, ServiceError
from distill_datasets.models.sampler import Logprobs, Reply, Sample, Sampling, Usage
from distill_datasets.schema import Message

OURS = frozenset({"messages", "model", "n", "stream", "stream_options"})
_TOKEN_ID = re.compile(r"token_id:(\d+)")


def write_body(
    model: str,
    messages: Sequence[Message],
    sampling: Sampling,
    *,
    length_key: str = "max_tokens",
    stream: bool = False,
) -> bytes:
    """A request's body; `length_key` is the server's name for `Sampling.max_tokens`."""
    turns = ",".join(map(_turn, messages))
    return f"{_before_messages(model, sampling, length_key, stream)}[{turns}]}}".encode()


def _turn(message: Message) -> str:
    # The prompt is the same in every request of a run, and may be long.
    return _prompt(message["content"]) if message["role"] == "system" else json.dumps(message)


@lru_cache(maxsize=64)
def _prompt(content: str) -> str:
    return json.dumps({"role": "system", "content": content})


@lru_cache(maxsize=64)
def _before_messages(model: str, sampling: Sampling, length_key: str, stream: bool) -> str:
    fields = {"model": model, **parameters(sampling, length_key)}
    if stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(fields)[:-1] + ',"messages":'


def parameters(sampling: Sampling, length_key: str) -> dict[str, Any]:
    """How to sample, in the server's words; `Sampling.extra` is merged over it, a null removes.

    `temperature` and `top_p` are always said, since a server may have others of its own; `top_k`,
    which not every server takes, only where it isn't -1. vLLM and SGLang fill what is not said
    from the model's own generation settings: `extra: {top_k: -1}` says that there is none.
    """
    fields: dict[str, Any] = {
        length_key: sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if sampling.n != 1:
        fields["n"] = sampling.n
    if sampling.top_k != -1:
        fields["top_k"] = sampling.top_k
    if sampling.seed is not None:
        fields["seed"] = sampling.seed
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    if sampling.top_logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": sampling.top_logprobs}
    if sampling.json_schema is not None:
        form = {"name": "answer", "strict": True, "schema": json.loads(sampling.json_schema)}
        fields["response_format"] = {"type": "json_schema", "json_schema": form}
    fields |= _extra(sampling.extra)
    return {name: value for name, value in fields.items() if value is not None}


def _extra(text: str | None) -> dict[str, Any]:
    extra: dict[str, Any] = {} if text is None else json.loads(text)
    if taken := sorted(OURS & set(extra)):
        raise ModelError(
            f"sampling.extra names {taken}, which the request itself sets. Remove them; `n` is "
            "sampling.n, and the model is the recipe's teacher."
        )
    return extra


def parse(text: bytes) -> dict[str, Any]:
    """The JSON object of an answer; raises `RetryableError` for anything else."""
    try:
        body = json.loads(text)
    except ValueError as error:
        raise bad_answer(repr(text[:200])) from error
    if not isinstance(body, dict):
        raise bad_answer(repr(text[:200]))
    return body


def read_reply(
    body: Mapping[str, Any], sampling: Sampling, first_token_seconds: float | None = None
) -> Reply:
    """What a `chat.completion` says.

    Raises `RejectedError` where a sample was filtered or refused, `RetryableError` for an answer
    that is none, and `ServiceError` where the server ignores a part of what was asked.
    """
    try:
        choices = sorted(body["choices"], key=lambda choice: choice.get("index") or 0)
        if len(choices) != sampling.n:
            raise ServiceError(
                f"Asked for {sampling.n} samples in one request, the server gave {len(choices)}: "
                "it ignores `n`. Set sampling.n to 1, or ask a server that honours it."
            )
        texts = [_read_message(choice) for choice in choices]
        logprobs = [_read_logprobs(choice.get("logprobs"), sampling) for choice in choices]
        tokens = _share_out(_response_tokens(body), texts, logprobs)
        samples = [
            Sample(text, _stop_reason(choice), count, reasoning, place)
            for choice, (text, reasoning), count, place in zip(
                choices, texts, tokens, logprobs, strict=True
            )
        ]
        return Reply(tuple(samples), _read_usage(body["usage"]), first_token_seconds)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, RejectedError):
            raise
        raise bad_answer(f"{error!r} in {json.dumps(body)[:300]}") from error


def bad_answer(found: str) -> RetryableError:
    """An answer that doesn't have the protocol's form; it is asked for twice more."""
    error = RetryableError(f"Expected a chat completion, found: {found}", type="bad answer")
    error.most_attempts = 3
    return error


def _stop_reason(choice: Mapping[str, Any]) -> Any:
    reason = choice["finish_reason"]
    if reason in ("tool_calls", "function_call") and choice["message"].get("content"):
        return "stop"
    return reason


def _read_message(choice: Mapping[str, Any]) -> tuple[str, str | None]:
    """A choice's text and its reasoning, both as the server gave them."""
    message, reason = choice["message"], choice["finish_reason"]
    if reason == "content_filter" or message.get("refusal"):
        raise RejectedError(
            message.get("refusal") or "The provider's filter held the answer back.",
            type="content policy",
        )
    text, reasoning = message.get("content"), message.get("reasoning_content")
    if reasoning is None:
        reasoning = message.get("reasoning")
    if isinstance(text, list):  # parts, each with its kind
        text = "".join(part.get("text") or "" for part in text if part.get("type") == "text")
    if reason in ("tool_calls", "function_call") and not text:
        raise RejectedError(
            "The model called a tool in place of an answer; a recipe has none to offer.",
            type="bad request",
        )
    if reason not in ("stop", "length", "tool_calls", "function_call"):
        raise bad_answer(f"finish_reason {reason!r}, neither 'stop' nor 'length'")
    return text or "", reasoning or None


def _read_logprobs(found: Mapping[str, Any] | None, sampling: Sampling) -> Logprobs | None:
    wanted = sampling.top_logprobs
    if wanted is None:
        return None
    places = (found or {}).get("content")
    if places is None:
        raise ServiceError(
            "Asked for log-probabilities, the server gave none: it ignores `logprobs`. Remove "
            "sampling.top_logprobs, or ask a server that has them."
        )
    tops = [
        sorted(place["top_logprobs"], key=lambda top: -top["logprob"])[:wanted] if wanted else []
        for place in places
    ]
    if tops and max(map(len, tops)) < wanted:
        raise ServiceError(
            f"Asked for the {wanted} most likely tokens of each place, the server gave "
            f"{max(map(len, tops))}. Lower sampling.top_logprobs to what it has."
        )
    return Logprobs(
        tuple(_token(place["token"]) for place in places),
        tuple(place["logprob"] for place in places),
        tuple(tuple(_token(top["token"]) for top in row) for row in tops) if wanted else (),
        tuple(tuple(top["logprob"] for top in row) for row in tops) if wanted else (),
    )


def _token(text: str) -> int | str:
    match = _TOKEN_ID.fullmatch(text)
    return int(match[1]) if match else text


def _response_tokens(body: Mapping[str, Any]) -> int:
    if not body.get("usage"):
        raise ServiceError(
            "Expected the token counts of each answer (`usage`), which this server leaves out: "
            "nothing could be accounted for. Turn them on there, or ask without streaming."
        )
    return int(body["usage"]["completion_tokens"])


def _share_out(
    total: int, texts: Sequence[tuple[str, str | None]], logprobs: Sequence[Logprobs | None]
) -> list[int]:
    """Each sample's tokens. The server counts those of all together, so this is exact for one.

    Several share by their numbers of log-probabilities, or without any by the lengths of their
    texts: only the sum is the server's.
    """
    if len(texts) == 1:
        return [total]
    weights = [
        len(place.tokens) if place else len(text) + len(reasoning or "")
        for (text, reasoning), place in zip(texts, logprobs, strict=True)
    ]
    ends, whole, before = [], sum(weights) or 1, 0
    for weight in weights:
        before += weight
        ends.append(round(total * before / whole))
    ends[-1] = total
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _read_usage(usage: Mapping[str, Any]) -> Usage:
    prompt, response = (
        usage.get(name) or {} for name in ("prompt_tokens_details", "completion_tokens_details")
    )
    return Usage(
        int(usage["prompt_tokens"]),
        prompt.get("cached_tokens") or 0,
        response.get("reasoning_tokens") or usage.get("reasoning_tokens") or 0,
        usage.get("cost"),
    )

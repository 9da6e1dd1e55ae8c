"""Whether a request that failed is asked again: what a status, a header and a message mean."""

import asyncio
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from distill_datasets.errors import (
    FATAL,
    AccessError,
    DistillError,
    ModelError,
    RejectedError,
    RequestError,
    RetryableError,
    ServiceError,
)
from distill_datasets.models.sampler import Allowance
from distill_datasets.schema import whole_text

_MOST_SAID = 2000  # characters of what a server said
_NO_CREDIT = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_PARAMETER = {"unsupported_parameter", "unsupported_value", "unknown_parameter"}
_TOO_LONG = re.compile(
    r"context.?(length|window)|max_model_len|maximum (context|model|input|allowed) length|"
    r"(input|prompt|request)( \w+)? (is |are )?too (long|large)|longer than the model",
    re.IGNORECASE,
)
_POLICY = re.compile(r"content.?(policy|filter|management)|responsibleai|safety system", re.I)
# Statuses of a server, or of something before it, that may answer the same request later.
_LATER = frozenset({408, 409, 420, 421, 423, 424, 425, 429, 449, 460, 498, 499})
_KINDS = {408: "time-out", 420: "rate limit", 429: "rate limit", 498: "rate limit"}
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(milli|ms|us|µs|ns|d|h|m|s)[a-z]*\s*", re.I)
_UNITS = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "milli": 1e-3}
_LONGEST = 100  # characters of a time
_YEARS = 3e8  # seconds: a number beyond is no span but a point in time, since 1970


@dataclass(frozen=True)
class Refusal:
    """An answer that is no completion: its status, and what the server said about it."""

    status: int
    message: str
    code: str = ""
    type: str = ""
    param: str = ""
    metadata: Mapping[str, Any] | None = None
    headers: Mapping[str, str] | None = None

    @property
    def wants_completion_tokens(self) -> bool:
        """Whether the model's name for the length limit is `max_completion_tokens`."""
        refused = self.code in _PARAMETER or "supported" in self.message
        return self.status == 400 and refused and "max_completion_tokens" in self.message

    @property
    def names_no_model(self) -> bool:
        """Whether the model, or the address, is unknown to the server."""
        return self.status == 404 or self.code == "model_not_found"


def read_refusal(status: int, headers: Mapping[str, str], text: str) -> Refusal:
    """What a body says, in any of the forms that servers have for errors."""
    text = whole_text(text)
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    fields = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(fields, dict):
        fields = {"message": fields if isinstance(fields, str) else text.strip()[:500]}
    said = fields.get("message") or fields.get("detail") or text.strip()[:500] or "no message"
    metadata = fields.get("metadata")
    # An error may come, as from a proxy or in mid-stream, with status 200.
    code = str(fields.get("code") or fields.get("status") or "")
    within = 400 if fields.get("type") == "invalid_request_error" else 500
    if re.fullmatch("[45][0-9][0-9]", code):
        within = int(code)
    said = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)[:500]
    return Refusal(
        status if status >= 300 else within,
        whole_text(said)[:_MOST_SAID],
        code=str(fields.get("code") or ""),
        type=str(fields.get("type") or ""),
        param=str(fields.get("param") or ""),
        metadata=metadata if isinstance(metadata, dict) else None,
        headers=headers,
    )


def explain(refusal: Refusal, reference: str) -> DistillError:
    """The error that a refusal is; `ModelError` and `ServiceError` end a run."""
    status, said = refusal.status, refusal.message
    if status == 402 or {refusal.code, refusal.type} & _NO_CREDIT:
        return AccessError(
            f"{reference!r}: the account is out of credit ({said}). Add credit and run again: "
            "paid answers are kept."
        )
    if _blames_content(refusal):
        return RejectedError(said, type="content policy", status=status)
    if status in (401, 403):
        return AccessError(
            f"{reference!r}: the server refused the key ({status}: {said}). Check OPENAI_API_KEY "
            "and OPENAI_BASE_URL, and that the key may use this model."
        )
    if status in _LATER or status >= 500:
        later = RetryableError(said, type=_KINDS.get(status, "server error"), status=status)
        later.retry_after = read_retry_after(refusal.headers or {})
        return later
    if status in (400, 413, 414, 422, 431):
        return _final(refusal, reference)
    return ServiceError(
        f"{reference!r}: expected a chat completion, found status {status} ({said}). Check that "
        "OPENAI_BASE_URL is the address of an OpenAI-compatible API, often ending in /v1."
    )


def _blames_content(refusal: Refusal) -> bool:
    # OpenRouter says 403 for an input that its moderation flagged.
    if refusal.status == 403 and refusal.metadata and "flagged_input" in refusal.metadata:
        return True
    found = _POLICY.search(f"{refusal.code} {refusal.type} {refusal.message}")
    return found is not None and refusal.status in (400, 403, 422)


def _final(refusal: Refusal, reference: str) -> DistillError:
    said, status = refusal.message, refusal.status
    if refusal.code == "context_length_exceeded" or _TOO_LONG.search(said):
        return RejectedError(said, type="context length", status=status)
    refused = RejectedError(said, type="bad request", status=status)
    # What a parameter is refused for holds for every row; messages are each row's own.
    named = refusal.param and not refusal.param.startswith(("messages", "input", "prompt"))
    if status == 400 and (named or refusal.code in _PARAMETER):
        error = ModelError(
            f"{reference!r}: the server refuses the request's {refusal.param or 'parameters'} "
            f"({said}). Change the recipe's sampling, json_schema or tools; a null in "
            "sampling.extra leaves a parameter out."
        )
        error.__cause__ = refused  # which it is where other requests are answered
        return error
    return refused


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, as the server asked: in its own header, or until its allowance is whole.

    A date, and a number too large for a span, are points in time.
    """
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    if (seconds := read_seconds(headers.get("retry-after"))) is not None:
        return seconds
    allowance = read_allowance(headers)
    if allowance is not None and allowance.requests == 0:
        return allowance.requests_seconds
    if allowance is not None and allowance.tokens == 0:
        return allowance.tokens_seconds
    if spans := _exhausted(headers.get("ratelimit")):
        return max(spans)
    left = _number(headers.get("x-ratelimit-remaining", headers.get("ratelimit-remaining")))
    if allowance is None and not left:
        return read_seconds(headers.get("x-ratelimit-reset", headers.get("ratelimit-reset")))
    return None


def _exhausted(text: str | None) -> list[float]:
    """Seconds until there is more of what is used up, in a header such as `"day";r=0;t=30`."""
    found = []
    for limit in (text or "")[:_MOST_SAID].split(","):
        said = dict(one.strip().partition("=")[::2] for one in limit.split(";"))
        seconds = _number(said.get("t"))
        if _number(said.get("r")) == 0 and seconds is not None:
            found.append(seconds)
    return found


def read_allowance(headers: Mapping[str, str]) -> Allowance | None:
    """What OpenAI's rate-limit headers say is left, or None without any."""
    if "x-ratelimit-remaining-requests" not in headers and (
        "x-ratelimit-remaining-tokens" not in headers
    ):
        return None
    return Allowance(
        _count(headers.get("x-ratelimit-remaining-requests")),
        read_seconds(headers.get("x-ratelimit-reset-requests")),
        _count(headers.get("x-ratelimit-remaining-tokens")),
        read_seconds(headers.get("x-ratelimit-reset-tokens")),
    )


def read_seconds(text: str | None) -> float | None:
    """Seconds from now in a span (`6m0s`, `120ms`, `2 minutes`), a bare number of seconds, an
    HTTP or ISO date, or a number of (milli)seconds since 1970; None for anything else.
    """
    text = (text or "").strip()[:_LONGEST]
    number = _number(text)
    spans = _SPAN.findall(text)
    if spans and not _SPAN.sub("", text):
        number = sum(float(amount) * _UNITS.get(unit.lower(), 0.0) for amount, unit in spans)
    if number is not None:
        while number > 1000 * _YEARS:  # milliseconds, or finer
            number /= 1000
        return max(0.0, number - time.time()) if number > _YEARS else number
    for read in (parsedate_to_datetime, datetime.fromisoformat):
        with suppress(ValueError, TypeError, OverflowError, IndexError):
            when = read(text)
            if when.tzinfo is None:  # as HTTP's dates are
                when = when.replace(tzinfo=UTC)
            return max(0.0, (when - datetime.now(UTC)).total_seconds())
    return None


def _number(text: str | None) -> float | None:
    """A number that isn't negative; of several, as proxies join them, the first."""
    try:
        found = float((text or "").partition(",")[0])
    except ValueError:
        return None
    return found if 0 <= found < float("inf") else None


def _count(text: str | None) -> int | None:
    found = _number(text)
    return None if found is None else int(found)


_SETTLE_SECONDS = 10.0  # for which a refusal waits for what becomes of other requests
_REFUSALS = 10  # of the key, one after the other: then it is no single request's matter


@dataclass
class Standing:
    """What an endpoint has done so far, which tells a row's refusal from everybody's.

    Before the first answer a refusal that no row would escape ends the run, once the other
    requests on their way are refused too. After it no status of a single request does.
    """

    answered: bool = False
    waiting: int = 0
    _refused: int = 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts one request while it is on its way."""
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    def accept(self) -> None:
        """Note an answer."""
        self.answered, self._refused = True, 0

    async def judge(self, error: DistillError) -> DistillError:
        """What a failure is, given what other requests have met."""
        if not isinstance(error, FATAL):
            return error
        loop = asyncio.get_running_loop()
        until = loop.time() + _SETTLE_SECONDS
        while not self.answered and self.waiting and loop.time() < until:
            await asyncio.sleep(0.02)
        return self.judge_now(error)

    def judge_now(self, error: DistillError) -> DistillError:
        """The same, for one of many answers that came together."""
        if not isinstance(error, FATAL) or not self.answered:
            return error
        self._refused += isinstance(error, AccessError)
        if isinstance(error, AccessError) and self._refused >= _REFUSALS:
            return error
        if isinstance(error.__cause__, RequestError):
            return error.__cause__
        status = getattr(error, "status", None)
        later = RetryableError(str(error), type="refused", status=status)
        later.most_attempts = 3
        return later

"""OpenAI's files and batches: many requests in one file, answered within a day at half price."""

import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from distill_datasets.errors import (
    AccessError,
    DistillError,
    ModelError,
    RejectedError,
    RetryableError,
)
from distill_datasets.models.endpoint import (
    MOST_BYTES,
    Endpoint,
    read_answer,
    too_large,
)
from distill_datasets.models.openai.errors import explain, read_refusal
from distill_datasets.models.openai.wire import bad_answer, parse, read_reply, write_body
from distill_datasets.models.sampler import Reply, Sampling
from distill_datasets.schema import Message

_OVER = {"completed", "expired", "cancelled", "failed"}
_KEY = "distill_datasets"  # of the metadata in which our own name of a batch travels
_PAGE = 100
_NAME = re.compile(rb'"custom_id"\s*:\s*"([0-9a-f]{64})"')
# Files are large: no limit but on silence.
_ANSWER = aiohttp.ClientTimeout(total=600, sock_connect=20)
_SILENCE = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=120)


@dataclass(frozen=True)
class BatchJob:
    """A batch that is planned, sent or being worked on.

    `key` is ours, and travels with it; `file` and `name` are the provider's, None before it gave
    them. `sent` says that the provider was asked to start it, whether or not it answered.
    """

    key: str
    identity: str
    sampling: Sampling
    requests: int
    file: str | None = None
    sent: bool = False
    name: str | None = None


@dataclass(frozen=True)
class BatchState:
    """How far a batch is at the provider.

    `files` hold what it answered, whole once it is `over`; `problem` is why it failed, and
    `too_much` says that it did because too much was waiting already.
    """

    status: str
    over: bool
    done: int
    files: tuple[str, ...]
    problem: str
    too_much: bool


class OpenAIBatches:
    """The batches of an endpoint; the calls here cost nothing but `create`.

    `length_key` is the server's name for `Sampling.max_tokens`.
    """

    most_requests = 50_000
    most_bytes = 200_000_000

    def __init__(self, endpoint: Endpoint, model: str, length_key: str) -> None:
        """Through the sampler's own connections."""
        self.endpoint, self.model, self.length_key = endpoint, model, length_key

    def line(self, digest: str, messages: Sequence[Message], sampling: Sampling) -> bytes:
        """One request of a batch's file."""
        body = write_body(self.model, messages, sampling, length_key=self.length_key)
        head = f'{{"custom_id":"{digest}","method":"POST","url":"/v1/chat/completions","body":'
        return head.encode() + body + b"}\n"

    async def upload(self, path: Path) -> str:
        """Send a file of requests; the provider's name for it."""
        with path.open("rb") as file:
            form = aiohttp.FormData({"purpose": "batch"})
            form.add_field("file", file, filename=path.name, content_type="application/jsonl")
            return _named(await self._json("POST", "files", data=form, timeout=_SILENCE))

    async def create(self, file: str, key: str) -> str:
        """Have a file worked on, which costs; the provider's name for the batch."""
        body = {
            "input_file_id": file,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "metadata": {_KEY: key},
        }
        headers = {"Idempotency-Key": key}
        return _named(await self._json("POST", "batches", json=body, headers=headers))

    async def find(self, key: str) -> str | None:
        """The provider's name for a batch of ours, if it ever heard of it."""
        after: dict[str, str] = {}
        while True:
            page = await self._json("GET", "batches", params={"limit": str(_PAGE), **after})
            batches = page.get("data") or []
            for batch in batches:
                if (batch.get("metadata") or {}).get(_KEY) == key:
                    return _named(batch)
            if not page.get("has_more") or not batches:
                return None
            after = {"after": _named(batches[-1])}

    async def look(self, name: str) -> BatchState:
        """How far a batch is."""
        batch = await self._json("GET", f"batches/{name}")
        counts = batch.get("request_counts") or {}
        problems = (batch.get("errors") or {}).get("data") or []
        return BatchState(
            status=str(batch.get("status")),
            over=batch.get("status") in _OVER,
            done=(counts.get("completed") or 0) + (counts.get("failed") or 0),
            files=tuple(
                str(batch[kind]) for kind in ("output_file_id", "error_file_id") if batch.get(kind)
            ),
            problem="; ".join(str(problem.get("message")) for problem in problems),
            too_much=any(problem.get("code") == "token_limit_exceeded" for problem in problems),
        )

    async def lines(self, file: str) -> AsyncIterator[bytes]:
        """What a batch answered, a request a line, in no order.

        Raises `RejectedError` where the provider has deleted it.
        """
        session, rest = await self.endpoint.session(), b""
        url = self.endpoint.at(f"files/{file}/content")
        with self.endpoint.explained():
            async with session.get(url, timeout=_SILENCE) as response:
                if response.status == 404:
                    raise RejectedError(f"{file} is gone", type="bad request", status=404)
                if response.status != 200:
                    raise await self._refused(response, file)
                async for piece in response.content.iter_any():
                    *lines, rest = (rest + piece).split(b"\n")
                    rest = rest[: MOST_BYTES + 1]  # `read` says that it is too large
                    for line in filter(bytes.strip, lines):
                        yield line
        if rest.strip():
            yield rest

    def read(self, line: bytes, sampling: Sampling) -> tuple[str | None, Reply | DistillError]:
        """A request's digest and what became of it; no digest where the line names none."""
        name = _NAME.search(line)
        digest = name[1].decode() if name else None
        try:
            if len(line) > MOST_BYTES:
                raise too_large()
            row = parse(line)
            named = row.get("custom_id")
            digest = named if isinstance(named, str) else None
            reply = self._read(row.get("response"), row.get("error"), sampling)
        except DistillError as failure:
            judged = self.endpoint.standing.judge_now(failure)
            judged.args = (self.endpoint.hide(str(judged)),)
            return digest, judged
        self.endpoint.standing.accept()
        return digest, reply

    def _read(self, answer: Any, error: Any, sampling: Sampling) -> Reply:
        status = str(answer.get("status_code")) if isinstance(answer, dict) else ""
        if not status.isdigit():
            said = error if isinstance(error, dict) else {}
            raise RetryableError(
                str(said.get("message") or "no answer"), type=str(said.get("code") or "bad answer")
            )
        body = answer.get("body")
        if status != "200" or not isinstance(body, dict) or "choices" not in body:
            raise explain(read_refusal(int(status), {}, json.dumps(body)), self.model)
        return read_reply(body, sampling)

    async def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        session, options = await self.endpoint.session(), {"timeout": _ANSWER, **options}
        with self.endpoint.explained():
            async with session.request(method, self.endpoint.at(path), **options) as response:
                if response.status == 200:
                    return parse(await read_answer(response))
                refused = await self._refused(response, f"openai:{self.model}")
        if response.status == 404 and "/" in path:
            raise AccessError(
                f"{self.endpoint} knows no {path}: use the key and the OPENAI_BASE_URL with which "
                "it was sent."
            )
        if response.status in (404, 405):
            raise ModelError(
                f"{self.endpoint} has no {path}, so nothing can be asked in batches there. Run "
                "without --batch."
            )
        raise refused

    async def _refused(self, response: aiohttp.ClientResponse, reference: str) -> DistillError:
        text = (await read_answer(response)).decode(errors="replace")
        text = self.endpoint.hide(text)
        return explain(read_refusal(response.status, response.headers, text), reference)


def _named(answer: Mapping[str, Any]) -> str:
    """The name of what was just made."""
    if not isinstance(name := answer.get("id"), str):
        raise bad_answer(f"no id in {json.dumps(answer)[:200]}")
    return name

"""OpenAI's files and batches: many requests in one file, answered within a day at half price."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from distill_datasets.errors import (
    AccessError,
    DistillError,
    ModelError,
    RejectedError,
    RetryableError,
    ServiceError,
)
from distill_datasets.models.batches import BatchState
from distill_datasets.models.openai.errors import explain, read_refusal
from distill_datasets.models.openai.wire import bad_answer, parse, read_reply
from distill_datasets.models.sampler import Reply, Sampling
from distill_datasets.schema import Message

if TYPE_CHECKING:
    from distill_datasets.models.openai.client import OpenAISampler

_OVER = {"completed", "expired", "cancelled", "failed"}
_KEY = "distill_datasets"  # of the metadata in which our own name of a batch travels
_PAGE = 100
# Files are large: no limit but on silence.
_SILENCE = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=120)


class OpenAIBatches:
    """The batches of a sampler's endpoint; the calls here cost nothing but `create`."""

    most_requests = 50_000
    most_bytes = 200_000_000

    def __init__(self, sampler: "OpenAISampler") -> None:
        """Through the sampler's own connections."""
        self.sampler = sampler

    def line(self, digest: str, messages: Sequence[Message], sampling: Sampling) -> bytes:
        """One request of a batch's file."""
        body = self.sampler.body(messages, sampling).decode()
        head = f'{{"custom_id":"{digest}","method":"POST","url":"/v1/chat/completions","body":'
        return f"{head}{body}}}\n".encode()

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
        session, rest = await self.sampler.session(), b""
        url = self.sampler.url / f"files/{file}/content"
        with self.sampler.errors_explained():
            async with session.get(url, timeout=_SILENCE) as response:
                if response.status == 404:
                    raise RejectedError(f"{file} is gone", type="bad request", status=404)
                if response.status != 200:
                    text = await response.text(errors="replace")
                    raise explain(read_refusal(response.status, response.headers, text), file)
                async for piece in response.content.iter_any():
                    *lines, rest = (rest + piece).split(b"\n")
                    for line in filter(bytes.strip, lines):
                        yield line
        if rest.strip():
            yield rest

    def read(self, line: bytes, sampling: Sampling) -> tuple[str, Reply | DistillError]:
        """A request's digest and what became of it."""
        row = parse(line)
        digest, answer, error = row.get("custom_id"), row.get("response"), row.get("error")
        if not isinstance(digest, str):
            raise ServiceError(f"A batch's answer names no request: {line[:200]!r}")
        try:
            return digest, self._read(answer, error, sampling)
        except DistillError as failure:
            return digest, failure

    def _read(self, answer: Any, error: Any, sampling: Sampling) -> Reply | DistillError:
        if not isinstance(answer, dict) or "status_code" not in answer:
            said = error if isinstance(error, dict) else {}
            return RetryableError(
                str(said.get("message") or "no answer"), type=str(said.get("code") or "bad answer")
            )
        status, body = int(answer["status_code"]), answer.get("body")
        if status != 200 or not isinstance(body, dict):
            refusal = read_refusal(status, {}, json.dumps(body))
            return explain(refusal, self.sampler.model)
        return read_reply(body, sampling)

    async def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        session = await self.sampler.session()
        with self.sampler.errors_explained():
            async with session.request(method, self.sampler.url / path, **options) as response:
                status, headers, text = response.status, response.headers, await response.read()
        if status == 404 and "/" in path:
            raise AccessError(
                f"{self.sampler.url} knows no {path}: use the key and the OPENAI_BASE_URL with "
                "which it was sent."
            )
        if status in (404, 405):
            raise ModelError(
                f"{self.sampler.url} has no {path}, so nothing can be asked in batches there. Run "
                "without --batch."
            )
        if status != 200:
            refusal = read_refusal(status, headers, text.decode(errors="replace"))
            raise explain(refusal, self.sampler.model)
        return parse(text)


def _named(answer: Mapping[str, Any]) -> str:
    """The name of what was just made."""
    if not isinstance(name := answer.get("id"), str):
        raise bad_answer(f"no id in {json.dumps(answer)[:200]}")
    return name

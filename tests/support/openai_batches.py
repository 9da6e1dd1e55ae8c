"""The files and batches of the test server: what it was sent, and what goes wrong with it."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from aiohttp import web

if TYPE_CHECKING:
    from tests.support.openai_server import OpenAIServer

Moment = Literal["upload", "create", "content"]


@dataclass
class Lost:
    """An answer that never reaches the client, though the request had its effect."""

    moment: Moment
    then: Callable[[], None] = lambda: None


@dataclass
class End:
    """How a batch ends in place of being completed."""

    status: str
    errors: list[dict[str, Any]] = field(default_factory=list)


class Batches:
    """Works on a batch when it was looked at `looks` times.

    `worked` counts how often each request was answered, which is what is paid. Requests whose
    last message holds a text of `expires` are left over, that many times. `watch` is called at
    every look; `gone` files of answers are deleted.
    """

    def __init__(self, server: OpenAIServer) -> None:
        self.server = server
        self.looks, self.absent = 1, False
        self.lost, self.ends = list[Lost](), deque[End]()
        self.expires: Counter[str] = Counter()
        self.nameless = ""  # a text in the request whose answer comes once without its name
        self.worked: Counter[str] = Counter()
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.page, self.gone = 1, 0
        self.watch: Callable[[], None] = lambda: None

    def add_to(self, app: web.Application) -> None:
        app.router.add_post("/v1/files", self._upload)
        app.router.add_get("/v1/files/{name}/content", self._content)
        app.router.add_post("/v1/batches", self._create)
        app.router.add_get("/v1/batches", self._list)
        app.router.add_get("/v1/batches/{name}", self._look)

    def sizes(self) -> list[int]:
        """Requests in each batch, in the order of their coming."""
        return [
            len(self.files[batch["input_file_id"]].splitlines()) for batch in self.batches.values()
        ]

    async def _upload(self, request: web.Request) -> web.Response:
        if self.absent:
            raise web.HTTPNotFound
        fields = await request.post()
        assert fields["purpose"] == "batch"
        name = self._store(fields["file"].file.read())
        return self._answer(request, "upload", {"id": name, "object": "file"})

    async def _content(self, request: web.Request) -> web.StreamResponse:
        if self.gone:
            self.gone -= 1
            raise web.HTTPNotFound
        whole = self.files[request.match_info["name"]]
        if not (self.lost and self.lost[0].moment == "content"):
            return web.Response(body=whole)
        response = web.StreamResponse(headers={"Content-Length": str(len(whole))})
        await response.prepare(request)
        await response.write(whole[: len(whole) // 2])
        return self._answer(request, "content", {})

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert (body["endpoint"], body["completion_window"]) == ("/v1/chat/completions", "24h")
        name = f"batch_{len(self.batches)}"
        self.batches[name] = {"id": name, "status": "in_progress", "looks": 0, **body}
        return self._answer(request, "create", self.batches[name])

    async def _list(self, request: web.Request) -> web.Response:
        # Newest first, and in pages of one, so that a client must turn them.
        names = list(reversed(self.batches))
        start = names.index(request.query["after"]) + 1 if "after" in request.query else 0
        shown = names[start : start + self.page]
        more = start + self.page < len(names)
        found = [self.batches[name] for name in shown]
        return web.json_response({"object": "list", "data": found, "has_more": more})

    async def _look(self, request: web.Request) -> web.Response:
        if request.match_info["name"] not in self.batches:
            raise web.HTTPNotFound
        batch = self.batches[request.match_info["name"]]
        batch["looks"] += 1
        self.watch()
        if batch["status"] == "in_progress" and batch["looks"] > self.looks:
            self._work(batch)
        return web.json_response(batch)

    def _work(self, batch: dict[str, Any]) -> None:
        end = self.ends.popleft() if self.ends else End("completed")
        batch["status"] = end.status
        if end.status == "failed":
            batch["errors"] = {"object": "list", "data": end.errors}
            return
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        if end.status in ("cancelled", "expired"):
            lines = lines[: len(lines) // 2]
        rows = [self._row(line) for line in lines]
        good, bad = [], []
        for row in rows:
            answered = row["response"] and row["response"]["status_code"] == 200
            (good if answered else bad).append(row)
        batch["request_counts"] = {"total": len(rows), "completed": len(good), "failed": len(bad)}
        for kind, found in (("output_file_id", good), ("error_file_id", bad)):
            if found:
                text = "\n".join(json.dumps(row) for row in reversed(found))
                batch[kind] = self._store(text.encode())

    def _row(self, line: dict[str, Any]) -> dict[str, Any]:
        assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
        row = {"id": "batch_req", "custom_id": line["custom_id"], "response": None, "error": None}
        text = line["body"]["messages"][-1]["content"]
        for part in self.expires:
            if part in text and self.expires[part] > 0:
                self.expires[part] -= 1
                return {**row, "error": {"code": "batch_expired", "message": "Not in time."}}
        if (fault := self.server.fault(text)) is not None:
            body = json.loads(fault.body) if fault.body else {"error": dict(fault.error)}
            return {**row, "response": {"status_code": fault.status or 200, "body": body}}
        if self.nameless and self.nameless in text:
            self.nameless, row["custom_id"] = "", None
        self.worked[text] += 1
        status, body = self.server.complete(line["body"])
        return {**row, "response": {"status_code": status, "body": body}}

    def _store(self, content: bytes) -> str:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        return name

    def _answer(self, request: web.Request, moment: Moment, body: Any) -> web.Response:
        if self.lost and self.lost[0].moment == moment:
            self.lost.pop(0).then()
            assert request.transport is not None
            request.transport.abort()
        return web.json_response(body)

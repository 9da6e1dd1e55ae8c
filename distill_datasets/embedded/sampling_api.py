"""Endpoints for sessions, sampling and collecting results."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

from aiohttp import web

from .failures import RequestError
from .model import MOST_RANK
from .sample_wire import read_sample_request
from .service import Sampler, Service, Session
from .train_wire import LOSSES

SERVICE: web.AppKey[Service] = web.AppKey("service", Service)
# The SDK gives a collecting request 45 s before it calls the connection broken.
HOLD_SECONDS = 30.0
PROTOBUF = "application/x-protobuf"
routes = web.RouteTableDef()


@routes.get("/api/v1/healthz")
async def healthz(_: web.Request) -> web.Response:
    """Say that the server is up."""
    return web.json_response({"status": "ok"})


@routes.post("/api/v1/client/config")
async def client_config(_: web.Request) -> web.Response:
    """Set the SDK's switches; the defaults are the simplest and fastest for loopback."""
    return web.json_response({})


@routes.post("/api/v1/client/dynamic_config")
async def dynamic_config(_: web.Request) -> web.Response:
    """Set what the SDK asks again every few minutes."""
    return web.json_response({})


@routes.post("/api/v1/telemetry")
async def telemetry(_: web.Request) -> web.Response:
    """Accept the SDK's events and drop them."""
    return web.json_response({"status": "accepted"})


@routes.get("/api/v1/get_server_capabilities")
async def capabilities(request: web.Request) -> web.Response:
    """Name the model, and what it is trained with: limits that the SDK's type leaves out."""
    card = request.app[SERVICE].card
    model = {
        "model_name": card.name,
        "max_context_length": card.max_context,
        "trainable": True,
        "sampleable": True,
        "max_lora_rank": MOST_RANK,
        "loss_fns": list(LOSSES),
    }
    return web.json_response({"supported_models": [model]})


@routes.post("/api/v1/create_session")
async def create_session(request: web.Request) -> web.Response:
    """Start a session; its random id keeps run ids apart across restarts."""
    service, body = request.app[SERVICE], await request.json()
    key = request.headers.get("X-Idempotency-Key") or uuid.uuid4().hex
    session_id = str(uuid.uuid5(_SESSIONS, key))
    session = Session(session_id, body.get("user_metadata"), body.get("display_name"))
    service.sessions.setdefault(session_id, session)
    return web.json_response({"type": "create_session", "session_id": session_id})


# Random per process: an idempotency key names one session of one server.
_SESSIONS = uuid.uuid4()


@routes.post("/api/v1/session_heartbeat")
async def heartbeat(_: web.Request) -> web.Response:
    """Keep a session alive; sessions here live as long as the server."""
    return web.json_response({"type": "session_heartbeat"})


@routes.post("/api/v1/sessions/{session_id}/finish")
async def finish_session(_: web.Request) -> web.Response:
    """Take note that a client is done."""
    return web.json_response({})


@routes.post("/api/v1/create_sampling_session")
async def create_sampling_session(request: web.Request) -> web.Response:
    """Choose the weights that answer: the base model or a saved checkpoint."""
    service, body = request.app[SERVICE], await request.json()
    session = service.session(body["session_id"])
    base_model, path = body.get("base_model"), body.get("model_path")
    if base_model is None and path is None:
        raise RequestError("expected base_model or model_path; found neither")
    if base_model is not None:
        service.card.require(base_model)
    sampler_id = f"{session.session_id}:sample:{body['sampling_session_seq_id']}"
    if sampler_id not in service.samplers:
        weights = service.engine.weights_of(path)
        service.samplers[sampler_id] = Sampler(sampler_id, path, weights)
        session.samplers.append(sampler_id)
    return web.json_response({"type": "create_sampling_session", "sampling_session_id": sampler_id})


@routes.get("/api/v1/samplers/{sampler_id}")
async def get_sampler(request: web.Request) -> web.Response:
    """Say what a sampling session samples from."""
    service = request.app[SERVICE]
    sampler = _sampler(service, request.match_info["sampler_id"])
    body = {"sampler_id": sampler.sampler_id, "base_model": service.card.name}
    if sampler.model_path is not None:
        body["model_path"] = sampler.model_path
    return web.json_response(body)


def _sampler(service: Service, sampler_id: str) -> Sampler:
    if sampler_id not in service.samplers:
        raise RequestError(
            f"found no sampling session {sampler_id!r}: the server was restarted; create a new "
            "sampling client"
        )
    return service.samplers[sampler_id]


@routes.post("/api/v1/asample")
async def asample(request: web.Request) -> web.Response:
    """Accept a sample request."""
    service, body = request.app[SERVICE], json.loads(await request.read())
    sampler_id, seq_id = body["sampling_session_id"], body["seq_id"]
    request_id = f"{sampler_id}:{seq_id}"

    def make() -> tuple[str, Any]:
        return _sampler(service, sampler_id).weights, read_sample_request(body)

    service.promise_sample(request_id, make)
    ids = [f"{request_id}:{index}" for index in range(body.get("num_samples", 1))]
    return web.json_response({"request_id": request_id, "sample_sequence_ids": ids})


@routes.post("/api/v1/retrieve_future")
async def retrieve_future(request: web.Request) -> web.Response:
    """Hand over a result, waiting for it at most HOLD_SECONDS."""
    service, body = request.app[SERVICE], json.loads(await request.read())
    request_id = body["request_id"]
    promise = service.promises.get(request_id)
    if promise is None:
        raise web.HTTPNotFound(
            text=json.dumps({"error": f"found no request {request_id!r}: the server restarted"}),
            content_type="application/json",
        )
    if not promise.done.is_set():
        try:
            async with asyncio.timeout(HOLD_SECONDS):
                await promise.done.wait()
        except TimeoutError:
            service.refuse_gap(promise)
    if promise.outcome is None:
        again = {"type": "try_again", "request_id": request_id, "queue_state": "active"}
        return web.json_response(again, status=408)
    service.promises.collected(promise)
    payload = promise.outcome.payload
    if isinstance(payload, bytes):
        return web.Response(body=payload, content_type=PROTOBUF)
    return web.json_response(payload)

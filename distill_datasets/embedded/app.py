"""The HTTP application: keys, refusals, and the endpoints, which are sessions, sampling, training,
results, and what is stored.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from distill_datasets.errors import DistillError

from .engine import Promise, SamplingSession, Service
from .model import MOST_RANK, ModelCard
from .scheduler import Payload
from .store import SCHEME, Kind, Store, StoredCheckpoint, StoredRun
from .wire import (
    LARGEST_BODY,
    LOSSES,
    MOST_SAMPLES,
    Body,
    InvalidRequestError,
    MissingError,
    pb,
    read_json,
    read_sample_request,
    section,
    shown,
    text,
    texts,
    token_ids,
    whole,
)

SERVICE: web.AppKey[Service] = web.AppKey("service", Service)
# The SDK gives a collecting request 45 s before it calls the connection broken.
HOLD_SECONDS = 30.0
PROTOBUF = "application/x-protobuf"
ADAM = {"type": "adamw"}
OWNER = "local"
MOST_SEQUENCE = 2**53
routes = web.RouteTableDef()
# Random per process: an idempotency key names one session of one server.
_SESSIONS = uuid.uuid4()
_CHECKPOINT = "/api/v1/training_runs/{run_id}/checkpoints/{checkpoint_id:.+?}"
# Where another protocol may be spoken.
OTHER = "/v1/"


def _refused(status: int, message: str) -> web.Response:
    return web.json_response({"error": message, "category": "user"}, status=status)


def _gate(api_key: str) -> Middleware:
    """Let requests with the key through; turn refusals into answers that aren't retried.

    What lies under `OTHER` has a gate of its own.
    """
    expected = api_key.encode()

    @web.middleware
    async def gate(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith(OTHER):
            return await handler(request)
        found = request.headers.get("X-API-Key", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(found, expected) and request.path != "/api/v1/healthz":
            message = (
                "expected the key of this server in X-API-Key; found "
                f"{'another' if found else 'none'}: set TINKER_API_KEY to the key it was "
                "started with (serve prints it, Server.api_key holds it)"
            )
            return web.json_response({"error": message}, status=401)
        try:
            return await handler(request)
        except MissingError as error:
            return _refused(404, str(error))
        except DistillError as error:
            return _refused(400, str(error))
        except web.HTTPRequestEntityTooLarge:
            return _refused(400, f"expected at most {LARGEST_BODY} bytes in a request; found more")
        except (web.RequestPayloadError, UnicodeError) as error:
            return _refused(400, f"the request can't be read: {type(error).__name__}: {error}")

    return gate


@asynccontextmanager
async def running(
    card: ModelCard,
    store: Path | None,
    api_key: str,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    extend: Callable[[web.Application], None] | None = None,
) -> AsyncIterator[int]:
    """Serve while the context lasts; yields the port, free if `port` is 0.

    `extend` may add what lies under `OTHER`.
    """
    with TemporaryDirectory(prefix="distill-store-") as temporary:
        app = web.Application(middlewares=[_gate(api_key)], client_max_size=LARGEST_BODY)
        service = app[SERVICE] = Service(card, Store(store or Path(temporary)))
        app.router.add_routes(routes)
        if extend is not None:
            extend(app)
        # No grace for open connections: clients hold theirs for as long as they live.
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, host, port, backlog=4096)
            await site.start()
            yield runner.addresses[0][1]
        finally:
            await runner.cleanup()
            service.engine.close()


async def _read(request: web.Request) -> tuple[Service, dict[str, Any]]:
    return request.app[SERVICE], read_json(await request.read())


def _sequence(body: Body, name: str = "seq_id") -> int:
    found: int = whole(body, name, 0, MOST_SEQUENCE)
    return found


# Sessions


def _answer_always(said: dict[str, str]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response(said)

    return answer


# The client's switches stay at their defaults, the simplest and fastest for loopback; its events
# are dropped; sessions live as long as the server.
for _place, _said in {
    "client/config": {},
    "client/dynamic_config": {},
    "telemetry": {"status": "accepted"},
    "session_heartbeat": {"type": "session_heartbeat"},
    "sessions/{session_id}/finish": {},
}.items():
    routes.post(f"/api/v1/{_place}")(_answer_always(_said))
routes.get("/api/v1/healthz")(_answer_always({"status": "ok"}))


@routes.get("/api/v1/get_server_capabilities")
async def capabilities(request: web.Request) -> web.Response:
    """Name the model, and what it is trained with: limits that the SDK's type leaves out."""
    card = request.app[SERVICE].card
    known = {
        "max_context_length": card.max_context,
        "trainable": True,
        "sampleable": True,
        "max_lora_rank": MOST_RANK,
        "loss_fns": list(LOSSES),
    }
    # By the folder's name the Tinker Cookbook finds the tokenizer too.
    names = dict.fromkeys((card.name, str(card.folder)))
    return web.json_response({"supported_models": [{"model_name": n, **known} for n in names]})


@routes.post("/api/v1/create_session")
async def create_session(request: web.Request) -> web.Response:
    """Start a session; its random id keeps run ids apart across restarts."""
    service, _ = await _read(request)
    key = request.headers.get("X-Idempotency-Key") or uuid.uuid4().hex
    session_id = str(uuid.uuid5(_SESSIONS, key))
    service.sessions.add(session_id)
    return web.json_response({"type": "create_session", "session_id": session_id})


# Sampling


@routes.post("/api/v1/create_sampling_session")
async def create_sampling_session(request: web.Request) -> web.Response:
    """Choose the weights that answer: the base model or a saved checkpoint."""
    service, body = await _read(request)
    sampler_id = _sampler_id(service, text(body, "session_id"), body)
    base_model, path = text(body, "base_model", None), text(body, "model_path", None)
    if base_model is None and path is None:
        raise InvalidRequestError("expected base_model or model_path; found neither")
    if base_model is not None:
        service.card.require(base_model)
    if sampler_id not in service.samplers:
        weights = service.engine.weights_of(path)
        service.samplers[sampler_id] = SamplingSession(sampler_id, path, weights)
    return web.json_response({"type": "create_sampling_session", "sampling_session_id": sampler_id})


def _sampler_id(service: Service, session_id: str, body: Body) -> str:
    service.require_session(session_id)
    return f"{session_id}:sample:{_sequence(body, 'sampling_session_seq_id')}"


@routes.get("/api/v1/samplers/{sampler_id}")
async def get_sampler(request: web.Request) -> web.Response:
    """Say what a sampling session samples from."""
    service = request.app[SERVICE]
    sampler = service.sampler(request.match_info["sampler_id"])
    body = {"sampler_id": sampler.sampler_id, "base_model": service.card.name}
    if sampler.model_path is not None:
        body["model_path"] = sampler.model_path
    return web.json_response(body)


@routes.post("/api/v1/samplers/{sampler_id}/json_schema")
async def hold_to_schema(request: web.Request) -> web.Response:
    """Hold what a sampling session samples from now on to a JSON schema; Tinker has no such thing.

    `ends` are the tokens that may stand behind an answer.
    """
    service, body = await _read(request)
    sampler = service.sampler(request.match_info["sampler_id"])
    ends = token_ids(body.get("ends"), "ends").tolist()
    if "json_schema" not in body or not ends:
        raise InvalidRequestError("expected json_schema, and ends of at least one token")
    constrain = await service.hold(body["json_schema"], ends)
    service.samplers[sampler.sampler_id] = replace(sampler, constrain=constrain)
    return web.json_response({"sampler_id": sampler.sampler_id})


@routes.post("/api/v1/asample")
async def asample(request: web.Request) -> web.Response:
    """Accept a sample request."""
    service, body = await _read(request)
    sampler_id = text(body, "sampling_session_id")
    request_id = f"{sampler_id}:{_sequence(body)}"
    service.promise_sample(
        request_id, lambda: (service.sampler(sampler_id), read_sample_request(body))
    )
    count = body.get("num_samples", 1)
    # A count out of range is refused with the result.
    ids = [f"{request_id}:{n}" for n in range(count if count in range(MOST_SAMPLES + 1) else 1)]
    return web.json_response({"request_id": request_id, "sample_sequence_ids": ids})


@routes.post("/api/v1/retrieve_future")
async def retrieve_future(request: web.Request) -> web.Response:
    """Hand over a result, waiting for it at most HOLD_SECONDS."""
    service, body = await _read(request)
    request_id = text(body, "request_id")
    promise = service.known(request_id)
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
    if promise.payload is None:
        again = {"type": "try_again", "request_id": request_id, "queue_state": "active"}
        return web.json_response(again, status=408)
    service.collected(promise)
    if isinstance(promise.payload, bytes):
        return web.Response(body=promise.payload, content_type=PROTOBUF)
    return web.json_response(promise.payload)


# Training: each answers with a promise


def _promised(promise: Promise, **extra: Any) -> web.Response:
    return web.json_response({"request_id": promise.request_id, **extra})


def _promise_in_order(
    service: Service, body: Body, run: Callable[[str, int], Payload]
) -> web.Response:
    """Promise what `run` gives for a model's id and the number of its request."""
    model_id, seq_id = text(body, "model_id"), _sequence(body)
    promise = service.promise_in_order(model_id, seq_id, lambda: run(model_id, seq_id))
    return _promised(promise, model_id=model_id)


def _new_model(service: Service, body: Body) -> str:
    """The id that the SDK derives by itself when it creates a model by loading one."""
    session_id = text(body, "session_id")
    service.require_session(session_id)
    model_id = f"{session_id}:train:{_sequence(body, 'model_seq_id')}"
    service.expect_requests(model_id)
    return model_id


def _new_run(service: Service, model_id: str, lora: dict[str, Any], body: Body) -> StoredRun:
    """The record of a run that this server can make."""
    card, optimizer = service.card, section(body, "optimizer_config") or ADAM
    if body.get("base_model") is not None:
        card.require(text(body, "base_model"))
    if optimizer.get("type") != ADAM["type"]:
        raise InvalidRequestError(
            f"the embedded server has the optimizer {ADAM}; found {shown(optimizer.get('type'))}"
        )
    said = texts(body, "user_metadata")
    facts = model_id, card.name, card.fingerprint, lora, service.store.now(), said
    return StoredRun(*facts, card.weights)


@routes.post("/api/v1/create_model")
async def create_model(request: web.Request) -> web.Response:
    """Start a training run."""
    service, body = await _read(request)
    model_id = _new_model(service, body)

    def run() -> dict[str, Any]:
        from .lora import LoraSpec

        lora = LoraSpec.read(section(body, "lora_config")).dump()
        service.card.require(text(body, "base_model"))
        return service.engine.create(_new_run(service, model_id, lora, body))

    return _promised(service.promise(f"{model_id}:create", run))


@routes.post("/api/v1/get_info")
async def get_info(request: web.Request) -> web.Response:
    """Describe a model; the tokenizer is the local folder, so that nobody asks the Hub."""
    service, body = await _read(request)
    record, card = service.store.run(text(body, "model_id")), service.card
    names = {"model_name": card.name, "tokenizer_id": str(card.folder), "arch": "causal-lm"}
    return web.json_response(
        {
            "type": "get_info",
            "model_id": record.run_id,
            "model_data": names,
            "model_name": card.name,
            "is_lora": True,
            "lora_rank": record.lora["rank"],
            "optimizer_config": ADAM,
        }
    )


@routes.post("/api/v1/forward_backward")
async def forward_backward(request: web.Request) -> web.Response:
    """Score rows, and gather gradients unless asked for the forward pass only."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    service, message = request.app[SERVICE], pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(await request.read())
    except DecodeError as error:
        raise InvalidRequestError(
            f"expected a ForwardBackwardRequest in protobuf; found what can't be read: {error}"
        ) from None
    body = {"model_id": message.model_id, "seq_id": message.seq_id}
    return _promise_in_order(service, body, lambda *_: service.engine.forward_backward(message))


@routes.post("/api/v1/optim_step")
async def optim_step(request: web.Request) -> web.Response:
    """Take a step of Adam."""
    service, body = await _read(request)

    def run(model_id: str, seq_id: int) -> dict[str, Any]:
        if "adam_params" not in body:
            raise InvalidRequestError(f"the embedded server has Adam only; found {sorted(body)}")
        return service.engine.optim_step(model_id, seq_id, section(body, "adam_params"))

    return _promise_in_order(service, body, run)


def _save(service: Service, body: Body, kind: Kind, seq_id: int) -> dict[str, Any]:
    checkpoint = StoredCheckpoint(
        run_id=text(body, "model_id"),
        kind=kind,
        name=text(body, "path", None) or f"{seq_id:06d}",
        created=service.store.now(),
        user_metadata=texts(body, "user_metadata"),
        expires_at=service.store.expiry(body.get("ttl_seconds")),
        has_optimizer=kind == "weights",
    )
    return service.engine.save(checkpoint, seq_id, overwrite=bool(body.get("overwrite")))


@routes.post("/api/v1/save_weights")
async def save_weights(request: web.Request) -> web.Response:
    """Save weights and optimizer, to resume from."""
    service, body = await _read(request)
    return _promise_in_order(
        service, body, lambda _, seq_id: _save(service, body, "weights", seq_id)
    )


@routes.post("/api/v1/save_weights_for_sampler")
async def save_weights_for_sampler(request: web.Request) -> web.Response:
    """Save weights to sample from: under a name, or for one sampling session only."""
    service, body = await _read(request)

    def run(model_id: str, seq_id: int) -> dict[str, Any]:
        if body.get("path"):
            return _save(service, {**body, "overwrite": False}, "sampler_weights", seq_id)
        if text(body, "kind", "snapshot") != "snapshot":
            raise InvalidRequestError(
                f"the embedded server saves snapshots; found kind={body['kind']!r}: its weights "
                "would change under a running sample"
            )
        sampler_id = _sampler_id(service, model_id.split(":")[0], body)
        service.engine.save_for_session(model_id, sampler_id)
        service.samplers[sampler_id] = SamplingSession(sampler_id, None, sampler_id)
        return {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"}

    return _promise_in_order(service, body, run)


@routes.post("/api/v1/load_weights")
async def load_weights(request: web.Request) -> web.Response:
    """Load a checkpoint into a model, or start a model from one."""
    service, body = await _read(request)
    path, optimizer, engine = text(body, "path"), bool(body.get("optimizer")), service.engine
    if "model_id" in body:
        return _promise_in_order(
            service,
            body,
            lambda model_id, seq_id: engine.load_into(model_id, seq_id, path, optimizer=optimizer),
        )
    # Here rather than in the promise, for the status that other servers give: 404.
    service.store.find(path)
    model_id = _new_model(service, body)

    def create() -> dict[str, Any]:
        saved, _ = engine.training_checkpoint(path)
        engine.create(_new_run(service, model_id, saved.lora, body))
        return engine.load_into(model_id, 0, path, optimizer=optimizer)

    return _promised(service.promise(f"{model_id}:create", create))


# What is stored


def _describe(checkpoint: StoredCheckpoint) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{checkpoint.kind}/{checkpoint.name}",
        "checkpoint_type": "training" if checkpoint.kind == "weights" else "sampler",
        "time": checkpoint.created,
        "tinker_path": checkpoint.path,
        "size_bytes": checkpoint.size_bytes,
        "public": False,
        "user_metadata": checkpoint.user_metadata,
        "expires_at": checkpoint.expires_at,
    }


@routes.get("/api/v1/training_runs/{run_id}")
async def training_run(request: web.Request) -> web.Response:
    """Describe one run, with its newest checkpoint of each kind."""
    store = request.app[SERVICE].store
    run = store.run(request.match_info["run_id"])
    saved = store.checkpoints(run.run_id)
    slots = {"weights": "last_checkpoint", "sampler_weights": "last_sampler_checkpoint"}
    newest = {slots[one.kind]: _describe(one) for one in reversed(saved)}
    last = max([run.created, *(one.created for one in saved)], key=datetime.fromisoformat)
    described = {
        "training_run_id": run.run_id,
        "base_model": run.base_model,
        "model_owner": OWNER,
        "is_lora": True,
        "lora_rank": run.lora["rank"],
        "last_request_time": last,
        "user_metadata": run.user_metadata,
    }
    return web.json_response(described | newest)


@routes.get("/api/v1/training_runs/{run_id}/checkpoints")
async def run_checkpoints(request: web.Request) -> web.Response:
    """List the checkpoints of one run."""
    store = request.app[SERVICE].store
    run = store.run(request.match_info["run_id"])
    return web.json_response({"checkpoints": list(map(_describe, store.checkpoints(run.run_id)))})


@routes.get("/api/v1/checkpoints")
async def checkpoints(request: web.Request) -> web.Response:
    """List the checkpoints of all runs."""
    found = request.app[SERVICE].store.checkpoints()
    # What is no number is refused by name.
    asked = {
        name: int(value) if re.fullmatch(r"-?[0-9]{1,18}", value) else value
        for name, value in request.query.items()
    }
    offset = whole(asked, "offset", 0, MOST_SEQUENCE, 0)
    limit = whole(asked, "limit", 0, MOST_SEQUENCE, 100)
    cursor = {"offset": offset, "limit": limit, "total_count": len(found)}
    listed = list(map(_describe, found[offset : offset + limit]))
    return web.json_response({"checkpoints": listed, "cursor": cursor})


def _path(request: web.Request) -> str:
    return f"{SCHEME}{request.match_info['run_id']}/{request.match_info['checkpoint_id']}"


@routes.delete(_CHECKPOINT)
async def delete_checkpoint(request: web.Request) -> web.Response:
    """Delete a checkpoint."""
    request.app[SERVICE].store.delete(_path(request))
    return web.Response(status=204)


@routes.put(_CHECKPOINT + "/ttl")
async def set_ttl(request: web.Request) -> web.Response:
    """Change when a checkpoint expires."""
    service, body = await _read(request)
    service.store.set_expiry(_path(request), body.get("ttl_seconds"))
    return web.Response(status=204)


@routes.post("/api/v1/weights_info")
async def weights_info(request: web.Request) -> web.Response:
    """Say what a checkpoint was trained as."""
    service, body = await _read(request)
    checkpoint, _ = service.store.find(text(body, "tinker_path"))
    run = service.store.run(checkpoint.run_id)
    flags = {name: run.lora[name] for name in ("train_unembed", "train_mlp", "train_attn")}
    described = {"base_model": run.base_model, "is_lora": True, "lora_rank": run.lora["rank"]}
    return web.json_response({**described, **flags})

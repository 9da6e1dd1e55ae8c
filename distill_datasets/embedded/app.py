"""The HTTP application: keys, refusals, and the endpoints, which are sessions, sampling, training,
results, and what is stored.
"""

from __future__ import annotations

import asyncio
import hmac
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

from .engine import SamplingSession, Service
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
MOST_SEQUENCE = 2**53
routes = web.RouteTableDef()
# Random per process: an idempotency key names one session of one server.
_SESSIONS = uuid.uuid4()
_CHECKPOINT = "training_runs/{run_id}/checkpoints/{checkpoint_id:.+?}"
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


# Answers an endpoint with JSON from the service and what is asked; None is an answer without any.
Answer = Callable[[Service, dict[str, Any]], Any]


def _endpoint(method: str, path: str) -> Callable[[Answer], Answer]:
    """Answer requests by a function of the service and of what is asked.

    That is the JSON in the body, the query, and the named parts of the path.
    """

    def register(answer: Answer) -> Answer:
        async def handle(request: web.Request) -> web.Response:
            sent = method in ("POST", "PUT")
            asked = read_json(await request.read()) if sent else dict(request.query)
            found = answer(request.app[SERVICE], {**asked, **request.match_info})
            if isinstance(found, Awaitable):
                found = await found
            return web.Response(status=204) if found is None else web.json_response(found)

        routes.route(method, f"/api/v1/{path}")(handle)
        return answer

    return register


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


@_endpoint("GET", "get_server_capabilities")
def capabilities(service: Service, _: Body) -> dict[str, Any]:
    """Name the model, and what it is trained with: limits that the SDK's type leaves out."""
    card = service.card
    known = {
        "max_context_length": card.max_context,
        "trainable": True,
        "sampleable": True,
        "max_lora_rank": MOST_RANK,
        "loss_fns": list(LOSSES),
    }
    # By the folder's name the Tinker Cookbook finds the tokenizer too.
    names = dict.fromkeys((card.name, str(card.folder)))
    return {"supported_models": [{"model_name": name, **known} for name in names]}


@routes.post("/api/v1/create_session")
async def create_session(request: web.Request) -> web.Response:
    """Start a session; its random id keeps run ids apart across restarts."""
    read_json(await request.read())
    key = request.headers.get("X-Idempotency-Key") or uuid.uuid4().hex
    session_id = str(uuid.uuid5(_SESSIONS, key))
    request.app[SERVICE].sessions.add(session_id)
    return web.json_response({"type": "create_session", "session_id": session_id})


# Sampling


@_endpoint("POST", "create_sampling_session")
def create_sampling_session(service: Service, body: Body) -> dict[str, Any]:
    """Choose the weights that answer: the base model or a saved checkpoint."""
    sampler_id = _sampler_id(service, text(body, "session_id"), body)
    base_model, path = text(body, "base_model", None), text(body, "model_path", None)
    if base_model is None and path is None:
        raise InvalidRequestError("expected base_model or model_path; found neither")
    if base_model is not None:
        service.card.require(base_model)
    if sampler_id not in service.samplers:
        weights = service.engine.weights_of(path)
        service.samplers[sampler_id] = SamplingSession(path, weights)
    return {"type": "create_sampling_session", "sampling_session_id": sampler_id}


def _sampler_id(service: Service, session_id: str, body: Body) -> str:
    service.require_session(session_id)
    return f"{session_id}:sample:{_sequence(body, 'sampling_session_seq_id')}"


@_endpoint("GET", "samplers/{sampler_id}")
def get_sampler(service: Service, body: Body) -> dict[str, Any]:
    """Say what a sampling session samples from."""
    path = service.sampler(body["sampler_id"]).model_path
    trained = {} if path is None else {"model_path": path}
    return {"sampler_id": body["sampler_id"], "base_model": service.card.name, **trained}


@_endpoint("POST", "samplers/{sampler_id}/json_schema")
async def hold_to_schema(service: Service, body: Body) -> dict[str, Any]:
    """Hold what a sampling session samples from now on to a JSON schema; Tinker has no such thing.

    `ends` are the tokens that may stand behind an answer.
    """
    sampler_id: str = body["sampler_id"]
    sampler = service.sampler(sampler_id)
    ends = token_ids(body.get("ends"), "ends").tolist()
    if "json_schema" not in body or not ends:
        raise InvalidRequestError("expected json_schema, and ends of at least one token")
    constrain = await service.hold(body["json_schema"], ends)
    service.samplers[sampler_id] = replace(sampler, constrain=constrain)
    return {"sampler_id": sampler_id}


@_endpoint("POST", "asample")
def asample(service: Service, body: Body) -> dict[str, Any]:
    """Accept a sample request."""
    sampler_id = text(body, "sampling_session_id")
    request_id = f"{sampler_id}:{_sequence(body)}"
    service.promise_sample(request_id, sampler_id, body)
    count = body.get("num_samples", 1)
    # A count out of range is refused with the result.
    ids = [f"{request_id}:{n}" for n in range(count if count in range(MOST_SAMPLES + 1) else 1)]
    return {"request_id": request_id, "sample_sequence_ids": ids}


@routes.post("/api/v1/retrieve_future")
async def retrieve_future(request: web.Request) -> web.Response:
    """Hand over a result, waiting for it at most HOLD_SECONDS."""
    service, body = request.app[SERVICE], read_json(await request.read())
    request_id = text(body, "request_id")
    promise = service.known(request_id)
    if promise is None:
        said = {"error": f"found no request {request_id!r}: the server restarted"}
        return web.json_response(said, status=404)
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


def _promise_in_order(
    service: Service, body: Body, run: Callable[[str, int], Payload]
) -> dict[str, Any]:
    """Promise what `run` gives for a model's id and the number of its request."""
    model_id, seq_id = text(body, "model_id"), _sequence(body)
    promise = service.promise_in_order(model_id, seq_id, lambda: run(model_id, seq_id))
    return {"request_id": promise.request_id, "model_id": model_id}


def _promise_new(
    service: Service, body: Body, create: Callable[[str], dict[str, Any]]
) -> dict[str, Any]:
    """Promise a model, by the id that the SDK derives by itself when it loads one."""
    session_id = text(body, "session_id")
    service.require_session(session_id)
    model_id = f"{session_id}:train:{_sequence(body, 'model_seq_id')}"
    service.expect_requests(model_id)
    promise = service.promise(f"{model_id}:create", lambda: create(model_id))
    return {"request_id": promise.request_id}


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


@_endpoint("POST", "create_model")
def create_model(service: Service, body: Body) -> dict[str, Any]:
    """Start a training run."""

    def create(model_id: str) -> dict[str, Any]:
        from .lora import LoraSpec

        lora = LoraSpec.read(section(body, "lora_config")).dump()
        service.card.require(text(body, "base_model"))
        return service.engine.create(_new_run(service, model_id, lora, body))

    return _promise_new(service, body, create)


@_endpoint("POST", "get_info")
def get_info(service: Service, body: Body) -> dict[str, Any]:
    """Describe a model; the tokenizer is the local folder, so that nobody asks the Hub."""
    record, card = service.store.run(text(body, "model_id")), service.card
    return {
        "type": "get_info",
        "model_id": record.run_id,
        "model_data": {
            "model_name": card.name,
            "tokenizer_id": str(card.folder),
            "arch": "causal-lm",
        },
        "model_name": card.name,
        "is_lora": True,
        "lora_rank": record.lora["rank"],
        "optimizer_config": ADAM,
    }


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
    run = service.engine.forward_backward
    return web.json_response(_promise_in_order(service, body, lambda *_: run(message)))


@_endpoint("POST", "optim_step")
def optim_step(service: Service, body: Body) -> dict[str, Any]:
    """Take a step of Adam."""

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
    # Weights to sample from are never written over: someone may sample from them.
    overwrite = kind == "weights" and bool(body.get("overwrite"))
    return service.engine.save(checkpoint, seq_id, overwrite=overwrite)


@_endpoint("POST", "save_weights")
def save_weights(service: Service, body: Body) -> dict[str, Any]:
    """Save weights and optimizer, to resume from."""
    return _promise_in_order(
        service, body, lambda _, seq_id: _save(service, body, "weights", seq_id)
    )


@_endpoint("POST", "save_weights_for_sampler")
def save_weights_for_sampler(service: Service, body: Body) -> dict[str, Any]:
    """Save weights to sample from: under a name, or for one sampling session only."""

    def run(model_id: str, seq_id: int) -> dict[str, Any]:
        if body.get("path"):
            return _save(service, body, "sampler_weights", seq_id)
        if text(body, "kind", "snapshot") != "snapshot":
            raise InvalidRequestError(
                f"the embedded server saves snapshots; found kind={body['kind']!r}: its weights "
                "would change under a running sample"
            )
        sampler_id = _sampler_id(service, model_id.split(":")[0], body)
        service.engine.save_for_session(model_id, sampler_id)
        service.samplers[sampler_id] = SamplingSession(None, sampler_id)
        return {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"}

    return _promise_in_order(service, body, run)


@_endpoint("POST", "load_weights")
def load_weights(service: Service, body: Body) -> dict[str, Any]:
    """Load a checkpoint into a model, or start a model from one."""
    path, optimizer, engine = text(body, "path"), bool(body.get("optimizer")), service.engine
    if "model_id" in body:
        return _promise_in_order(
            service,
            body,
            lambda model_id, seq_id: engine.load_into(model_id, seq_id, path, optimizer=optimizer),
        )
    # Here rather than in the promise, for the status that other servers give: 404.
    service.store.find(path)

    def create(model_id: str) -> dict[str, Any]:
        saved, _ = engine.training_checkpoint(path)
        engine.create(_new_run(service, model_id, saved.lora, body))
        return engine.load_into(model_id, 0, path, optimizer=optimizer)

    return _promise_new(service, body, create)


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


@_endpoint("GET", "training_runs/{run_id}")
def training_run(service: Service, body: Body) -> dict[str, Any]:
    """Describe one run, with its newest checkpoint of each kind."""
    run = service.store.run(body["run_id"])
    saved = service.store.checkpoints(run.run_id)
    slots = {"weights": "last_checkpoint", "sampler_weights": "last_sampler_checkpoint"}
    times = [run.created, *(one.created for one in saved)]
    return {
        "training_run_id": run.run_id,
        "base_model": run.base_model,
        "model_owner": "local",
        "is_lora": True,
        "lora_rank": run.lora["rank"],
        "last_request_time": max(times, key=datetime.fromisoformat),
        "user_metadata": run.user_metadata,
        **{slots[one.kind]: _describe(one) for one in reversed(saved)},
    }


@_endpoint("GET", "training_runs/{run_id}/checkpoints")
def run_checkpoints(service: Service, body: Body) -> dict[str, Any]:
    """List the checkpoints of one run."""
    run = service.store.run(body["run_id"])
    return {"checkpoints": list(map(_describe, service.store.checkpoints(run.run_id)))}


@_endpoint("GET", "checkpoints")
def checkpoints(service: Service, body: Body) -> dict[str, Any]:
    """List the checkpoints of all runs."""
    found = service.store.checkpoints()
    # What is no number is refused by name.
    page = {
        name: int(value) if re.fullmatch(r"-?[0-9]{1,18}", value) else value
        for name, value in body.items()
    }
    offset = whole(page, "offset", 0, MOST_SEQUENCE, 0)
    limit = whole(page, "limit", 0, MOST_SEQUENCE, 100)
    cursor = {"offset": offset, "limit": limit, "total_count": len(found)}
    return {"checkpoints": list(map(_describe, found[offset : offset + limit])), "cursor": cursor}


def _path(body: Body) -> str:
    return f"{SCHEME}{body['run_id']}/{body['checkpoint_id']}"


@_endpoint("DELETE", _CHECKPOINT)
def delete_checkpoint(service: Service, body: Body) -> None:
    """Delete a checkpoint."""
    service.store.delete(_path(body))


@_endpoint("PUT", _CHECKPOINT + "/ttl")
def set_ttl(service: Service, body: Body) -> None:
    """Change when a checkpoint expires."""
    service.store.set_expiry(_path(body), body.get("ttl_seconds"))


@_endpoint("POST", "weights_info")
def weights_info(service: Service, body: Body) -> dict[str, Any]:
    """Say what a checkpoint was trained as."""
    checkpoint, _ = service.store.find(text(body, "tinker_path"))
    run = service.store.run(checkpoint.run_id)
    flags = {name: run.lora[name] for name in ("train_unembed", "train_mlp", "train_attn")}
    return {"base_model": run.base_model, "is_lora": True, "lora_rank": run.lora["rank"], **flags}

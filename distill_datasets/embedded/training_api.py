"""Endpoints that train, save and load; each answers with a promise."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from .engine import SaveOrder
from .failures import RequestError
from .futures import Promise
from .sampling_api import SERVICE
from .service import Sampler, Service
from .store import Run
from .train_wire import read_train_message, read_train_request

routes = web.RouteTableDef()
ADAM = {"type": "adamw"}


def _promised(promise: Promise, **extra: Any) -> web.Response:
    return web.json_response({"request_id": promise.request_id, **extra})


@routes.post("/api/v1/create_model")
async def create_model(request: web.Request) -> web.Response:
    """Start a training run."""
    service, body = request.app[SERVICE], await request.json()
    model_id = _new_model(service, body)

    def run() -> dict[str, Any]:
        from .lora import LoraSpec

        service.card.require(body["base_model"])
        _require_adam(body)
        spec = LoraSpec.read(body.get("lora_config"))
        record = _record(service, model_id, spec.dump(), body)
        return service.engine.create(record, spec)

    return _promised(service.promise(f"{model_id}:create", run))


def _new_model(service: Service, body: dict[str, Any]) -> str:
    """The id that the SDK derives by itself when it creates a model by loading one."""
    session = service.session(body["session_id"])
    model_id = f"{session.session_id}:train:{body['model_seq_id']}"
    if model_id not in session.models:
        session.models.append(model_id)
    service.expect_turns(model_id)
    return model_id


def _record(service: Service, model_id: str, lora: dict[str, Any], body: dict[str, Any]) -> Run:
    card, said = service.card, body.get("user_metadata")
    if said is not None and not all(isinstance(value, str) for value in said.values()):
        raise RequestError(f"expected user_metadata of texts, as the SDK reads it; found {said}")
    return Run(model_id, card.name, card.fingerprint, lora, service.store.now(), said)


def _require_adam(body: dict[str, Any]) -> None:
    optimizer = body.get("optimizer_config") or ADAM
    if optimizer.get("type") != ADAM["type"]:
        raise RequestError(f"the embedded server has the optimizer {ADAM}; found {optimizer}")


@routes.post("/api/v1/get_info")
async def get_info(request: web.Request) -> web.Response:
    """Describe a model; the tokenizer is the local folder, so that nobody asks the Hub."""
    service, body = request.app[SERVICE], await request.json()
    record, card = service.store.run(body["model_id"]), service.card
    tokenizer = str(card.folder)
    names = {"model_name": card.name, "tokenizer_id": tokenizer, "arch": "causal-lm"}
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
    service, message = request.app[SERVICE], read_train_message(await request.read())
    model_id, seq_id = message.model_id, message.seq_id

    def run() -> bytes:
        return service.engine.forward_backward(model_id, seq_id, read_train_request(message))

    return _promised(service.promise_in_turn(model_id, seq_id, run), model_id=model_id)


@routes.post("/api/v1/optim_step")
async def optim_step(request: web.Request) -> web.Response:
    """Take a step of Adam."""
    service, body = request.app[SERVICE], await request.json()
    model_id, seq_id = body["model_id"], body["seq_id"]

    def run() -> dict[str, Any]:
        if "adam_params" not in body:
            raise RequestError(f"the embedded server has Adam only; found {sorted(body)}")
        return service.engine.optim_step(model_id, seq_id, body["adam_params"])

    return _promised(service.promise_in_turn(model_id, seq_id, run), model_id=model_id)


@routes.post("/api/v1/save_weights")
async def save_weights(request: web.Request) -> web.Response:
    """Save weights and optimizer, to resume from."""
    service, body = request.app[SERVICE], await request.json()
    order = SaveOrder(
        body["model_id"],
        body["seq_id"],
        "weights",
        body.get("path") or f"{body['seq_id']:06d}",
        bool(body.get("overwrite")),
        body.get("ttl_seconds"),
        body.get("user_metadata"),
    )
    promise = service.promise_in_turn(
        order.model_id, order.seq_id, lambda: service.engine.save(order)
    )
    return _promised(promise, model_id=order.model_id)


@routes.post("/api/v1/save_weights_for_sampler")
async def save_weights_for_sampler(request: web.Request) -> web.Response:
    """Save weights to sample from: under a name, or for one sampling session only."""
    service, body = request.app[SERVICE], await request.json()
    order = SaveOrder(
        body["model_id"],
        body["seq_id"],
        "sampler_weights",
        body.get("path") or "",
        False,
        body.get("ttl_seconds"),
        body.get("user_metadata"),
    )

    def run() -> dict[str, Any]:
        if order.name:
            return service.engine.save(order)
        return _save_for_session(service, body)

    promise = service.promise_in_turn(order.model_id, order.seq_id, run)
    return _promised(promise, model_id=order.model_id)


def _save_for_session(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    if body.get("kind", "snapshot") != "snapshot":
        raise RequestError(
            f"the embedded server saves snapshots; found kind={body['kind']!r}: its weights "
            "would change under a running sample"
        )
    session = service.session(body["model_id"].split(":")[0])
    sampler_id = f"{session.session_id}:sample:{body['sampling_session_seq_id']}"
    service.engine.save_for_session(body["model_id"], sampler_id)
    service.samplers[sampler_id] = Sampler(sampler_id, None, sampler_id)
    session.samplers.append(sampler_id)
    return {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"}


@routes.post("/api/v1/load_weights")
async def load_weights(request: web.Request) -> web.Response:
    """Load a checkpoint into a model, or start a model from one."""
    service, body = request.app[SERVICE], await request.json()
    path, optimizer = body["path"], bool(body.get("optimizer"))
    if "model_id" in body:
        model_id, seq_id = body["model_id"], body["seq_id"]

        def load() -> dict[str, Any]:
            return service.engine.load_into(model_id, seq_id, path, optimizer=optimizer)

        return _promised(service.promise_in_turn(model_id, seq_id, load))
    # Here rather than in the promise, for the status that other servers give: 404.
    service.store.find(path)
    model_id = _new_model(service, body)

    def create() -> dict[str, Any]:
        if body.get("base_model") is not None:
            service.card.require(body["base_model"])
        _require_adam(body)
        checkpoint, _ = service.engine.checkpoint(path)
        saved = service.store.run(checkpoint.run_id)
        record = _record(service, model_id, saved.lora, body)
        return service.engine.create_from(record, path, optimizer=optimizer)

    return _promised(service.promise(f"{model_id}:create", create))

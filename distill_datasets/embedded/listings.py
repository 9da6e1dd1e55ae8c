"""Endpoints that list, describe and delete what is stored."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from aiohttp import web

from .failures import RequestError
from .sampling_api import SERVICE
from .service import Service
from .store import SCHEME, Checkpoint, Run

routes = web.RouteTableDef()
OWNER = "local"


def _page(request: web.Request, found: list[Any], limit: int) -> tuple[list[Any], dict[str, int]]:
    offset = int(request.query.get("offset", 0))
    limit = int(request.query.get("limit", limit))
    cursor = {"offset": offset, "limit": limit, "total_count": len(found)}
    return found[offset : offset + limit], cursor


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
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


def _describe_run(service: Service, run: Run) -> dict[str, Any]:
    saved = service.store.checkpoints(run.run_id)
    newest = {kind: next((one for one in saved if one.kind == kind), None) for kind in _SLOTS}
    last = max([run.created, *(one.created for one in saved)], key=datetime.fromisoformat)
    return {
        "training_run_id": run.run_id,
        "base_model": run.base_model,
        "model_owner": OWNER,
        "is_lora": True,
        "lora_rank": run.lora["rank"],
        "last_request_time": last,
        "user_metadata": run.user_metadata,
        **{_SLOTS[kind]: _describe(one) for kind, one in newest.items() if one is not None},
    }


_SLOTS = {"weights": "last_checkpoint", "sampler_weights": "last_sampler_checkpoint"}


@routes.get("/api/v1/training_runs")
async def training_runs(request: web.Request) -> web.Response:
    """List runs, newest first."""
    service = request.app[SERVICE]
    runs, cursor = _page(request, service.store.runs(), 20)
    described = [_describe_run(service, run) for run in runs]
    return web.json_response({"training_runs": described, "cursor": cursor})


@routes.get("/api/v1/training_runs/{run_id}")
async def training_run(request: web.Request) -> web.Response:
    """Describe one run."""
    service = request.app[SERVICE]
    run = service.store.run(request.match_info["run_id"])
    return web.json_response(_describe_run(service, run))


@routes.get("/api/v1/training_runs/{run_id}/checkpoints")
async def run_checkpoints(request: web.Request) -> web.Response:
    """List the checkpoints of one run."""
    service = request.app[SERVICE]
    run = service.store.run(request.match_info["run_id"])
    found = [_describe(one) for one in service.store.checkpoints(run.run_id)]
    return web.json_response({"checkpoints": found})


@routes.get("/api/v1/checkpoints")
async def checkpoints(request: web.Request) -> web.Response:
    """List the checkpoints of all runs."""
    found, cursor = _page(request, request.app[SERVICE].store.checkpoints(), 100)
    return web.json_response({"checkpoints": [_describe(one) for one in found], "cursor": cursor})


_CHECKPOINT = "/api/v1/training_runs/{run_id}/checkpoints/{checkpoint_id:.+?}"


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
    body = await request.json()
    request.app[SERVICE].store.set_expiry(_path(request), body.get("ttl_seconds"))
    return web.Response(status=204)


@routes.post("/api/v1/weights_info")
async def weights_info(request: web.Request) -> web.Response:
    """Say what a checkpoint was trained as."""
    service, body = request.app[SERVICE], await request.json()
    checkpoint, _ = service.store.find(body["tinker_path"])
    run = service.store.run(checkpoint.run_id)
    flags = {name: run.lora[name] for name in ("train_unembed", "train_mlp", "train_attn")}
    described = {"base_model": run.base_model, "is_lora": True, "lora_rank": run.lora["rank"]}
    return web.json_response({**described, **flags})


@routes.get("/api/v1/sessions")
async def sessions(request: web.Request) -> web.Response:
    """List the sessions since the server started."""
    found, _ = _page(request, list(request.app[SERVICE].sessions), 20)
    return web.json_response({"sessions": found})


@routes.get("/api/v1/sessions/{session_id}")
async def session(request: web.Request) -> web.Response:
    """Describe a session."""
    found = request.app[SERVICE].sessions.get(request.match_info["session_id"])
    if found is None:
        raise RequestError(f"found no session {request.match_info['session_id']!r}")
    return web.json_response(
        {
            "training_run_ids": found.models,
            "sampler_ids": found.samplers,
            "user_metadata": found.user_metadata,
            "display_name": found.display_name,
        }
    )

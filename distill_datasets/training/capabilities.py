"""What a server can train, asked before anything is created on it."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import httpx

from distill_datasets.errors import ModelError, SettingsError
from distill_datasets.models.connection import Connection
from distill_datasets.models.tinker_sdk import explained
from distill_datasets.training.settings import TrainSettings

_LONGEST = 4096  # tokens a row: what a local machine holds; more must be asked for


def require_trainable(connection: Connection, settings: TrainSettings) -> int:
    """Check the student, the rank, the context and the objective; the longest row to train on.

    Tinker states which models it trains and their context; what a server doesn't state is not
    checked here. Raises `ModelError` or `SettingsError`.
    """
    return require_stated(_stated(connection), connection, settings)


def require_stated(
    stated: Mapping[str, Any], connection: Connection, settings: TrainSettings
) -> int:
    """The same, for what a server has stated about the model."""
    if stated.get("trainable") is False:
        raise ModelError(
            f"{connection.base_model!r} can be sampled on this server, but not trained: choose "
            "another student."
        )
    most = stated.get("max_lora_rank")
    if most is not None and settings.rank > most:
        raise SettingsError(
            f"rank must be at most {most} for {connection.base_model!r}; found {settings.rank}."
        )
    losses = stated.get("loss_fns")
    loss = "importance_sampling" if settings.objective.policy_gradient else "cross_entropy"
    if losses is not None and loss not in losses:
        raise ModelError(
            f"The objective {settings.objective.name!r} needs the loss {loss!r}, which the server "
            f"of {connection.reference!r} doesn't have; it has {sorted(losses)}."
        )
    context = stated.get("max_context_length") or connection.max_context
    if context is not None and settings.max_length is not None and settings.max_length > context:
        raise SettingsError(
            f"max_length must be at most {context}, the context of {connection.base_model!r}; "
            f"found {settings.max_length}."
        )
    return settings.max_length or min(context or _LONGEST, _LONGEST)


def _stated(connection: Connection) -> Mapping[str, Any]:
    models = {str(model["model_name"]): model for model in _models(connection)}
    if connection.base_model not in models:
        near = get_close_matches(connection.base_model, list(models), n=3, cutoff=0.3)
        raise ModelError(
            f"{connection.base_model!r} is unknown to the server. Near names: {near}; it has "
            f"{len(models)}."
        )
    return models[connection.base_model]


def _models(connection: Connection) -> list[dict[str, Any]]:
    with explained(connection.reference):
        if connection.server is None:
            found = connection.rest.get_server_capabilities().result().supported_models
            return [model.model_dump() for model in found]
    # The SDK's type leaves out the limits that a server of this machine states.
    url = f"{connection.server.url}/api/v1/get_server_capabilities"
    answer = httpx.get(url, headers={"X-API-Key": connection.server.api_key}, timeout=20)
    models: list[dict[str, Any]] = answer.raise_for_status().json()["supported_models"]
    return models

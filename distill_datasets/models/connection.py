"""From a model reference to a connection: a server, its model, and how to render for it."""

import json
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tinker

from distill_datasets import resources
from distill_datasets.errors import ModelError, ServiceError
from distill_datasets.models.model_files import digest_weights, find_model
from distill_datasets.models.tinker_sdk import explained, require_key, require_service, rest_client

if TYPE_CHECKING:
    from tinker_cookbook.renderers import Renderer

    from distill_datasets.embedded.process import Server

_EXPECTED = (
    "expected 'pocket', 'embedded:<folder or Hub id>', 'tinker:<base model>', "
    "'tinker://<run>/sampler_weights/<name>', 'openai:<model>' (as a teacher or a judge), or a "
    "training folder"
)
_SERVERS: dict[str, "Server"] = {}


@dataclass(frozen=True)
class Connection:
    """A model on a server: what is needed to render for it, sample from it and train it.

    `base_model` is the server's name for it, `model_path` a trained checkpoint of it.
    `tokenizer_source` is what the cookbook loads the tokenizer from; `weights` tells two local
    models of one name apart; `server` is the one that was started for a local model.
    """

    reference: str
    service: tinker.ServiceClient
    base_model: str
    tokenizer_source: str
    renderer_name: str
    max_context: int | None = None
    model_path: str | None = None
    weights: str = ""
    server: "Server | None" = None

    @property
    def identity(self) -> str:
        """What decides an answer, stable across processes."""
        return "/".join(
            part
            for part in (self.reference, self.weights, self.model_path, self.renderer_name)
            if part
        )

    @cached_property
    def rest(self) -> tinker.RestClient:
        """What the server says about runs and checkpoints; no session needed."""
        if self.server is None:
            return rest_client()
        return tinker.RestClient(base_url=self.server.url, api_key=self.server.api_key)

    def ended(self) -> ServiceError | None:
        """What to say when the server that was started for a local model runs no more.

        The SDK would try its address again for minutes.
        """
        if self.server is None or self.server.alive:
            return None
        return ServiceError(
            f"The server of {self.reference!r} ended, often for want of memory. What was saved is "
            f"kept: run it again to continue. Its last words: {self.server.stderr[-500:]!r}"
        )

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from tinker_cookbook.tokenizer_utils import get_tokenizer

        try:
            return get_tokenizer(self.tokenizer_source)
        except OSError as error:
            raise ModelError(
                f"The tokenizer of {self.reference!r} can't be loaded: {error} A gated one needs "
                "its licence accepted on the Hub and `hf auth login`."
            ) from error

    @cached_property
    def renderer(self) -> "Renderer":
        """The cookbook renderer, by its name."""
        from tinker_cookbook.exceptions import TinkerCookbookError
        from tinker_cookbook.renderers import get_renderer

        import distill_datasets.models.renderers  # noqa: F401 (registers our renderer)

        try:
            return get_renderer(self.renderer_name, self.tokenizer)
        except (TinkerCookbookError, ValueError) as error:
            raise ModelError(f"Unknown renderer {self.renderer_name!r}: {error}") from error


def connect(
    reference: str | Path, *, renderer: str | None = None, store: Path | None = None
) -> Connection:
    """Reach the model that a reference names.

    A local model gets its own server, once per process; `store` is the folder of that server's
    checkpoints (a temporary one without it). A training folder connects to its best checkpoint.
    Raises `ModelError`, `AccessError` or `ServiceError`, each with what to set.
    """
    text = str(reference)
    if (Path(text) / "checkpoints.jsonl").is_file():
        return _connect_trained(Path(text), renderer)
    if text == "pocket":
        return _connect_local(text, resources.pocket(), renderer or "qwen3_instruct", store)
    if text.startswith("embedded:"):
        folder = find_model(text.removeprefix("embedded:"))
        return _connect_local(text, folder, renderer or _TEMPLATE, store)
    if text.startswith("tinker://"):
        return _connect_checkpoint(text, renderer)
    if text.startswith("tinker:"):
        return _connect_hosted(text, text.removeprefix("tinker:"), renderer)
    if text.startswith("openai:"):
        raise ModelError(f"{text!r} answers, and can't be trained: {_EXPECTED}.")
    near = get_close_matches(text, ["pocket", "embedded:", "tinker:", "openai:"], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ModelError(f"Unknown model reference {text!r}: {_EXPECTED}.{hint}")


_TEMPLATE = "distill_datasets/chat_template"


def _connect_local(reference: str, folder: Path, renderer: str, store: Path | None) -> Connection:
    server = _server(reference, folder, store)
    service = tinker.ServiceClient(base_url=server.url, api_key=server.api_key)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Connection(
        reference=reference,
        service=service,
        base_model=server.model,
        tokenizer_source=str(folder),
        renderer_name=renderer,
        max_context=config.get("max_position_embeddings"),
        weights=digest_weights(folder),
        server=server,
    )


def adopt_state(path: str, source: Path, store: Path) -> None:
    """Let the local server of one store load a training state of another's.

    Does nothing for a training on a hosted server, which keeps no store. Raises `ModelError`
    where the state is gone.
    """
    if not source.is_dir():
        return
    from distill_datasets.embedded.store import copy_checkpoint

    try:
        copy_checkpoint(path, source, store)
    except FileNotFoundError as error:
        raise ModelError(
            f"Can't start from {path!r}: {error}. Train that student again."
        ) from error


def read_training(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A training folder's configuration, and the line of its best checkpoint.

    Raises `ModelError` where no checkpoint is finished.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # A killed training may leave its last line unfinished.
    *lines, _ = (folder / "checkpoints.jsonl").read_text(encoding="utf-8").split("\n")
    best = [line for line in map(json.loads, lines) if line["best"]]
    if not best:
        raise ModelError(f"{folder} holds no finished checkpoint: run `train` again to finish it.")
    return config, best[-1]


def _connect_trained(folder: Path, renderer: str | None) -> Connection:
    config, checkpoint = read_training(folder)
    base = connect(
        config["student"], renderer=renderer or config["renderer"], store=folder / "checkpoints"
    )
    return replace(base, model_path=checkpoint["sampler"])


def _connect_checkpoint(path: str, renderer: str | None) -> Connection:
    if "/sampler_weights/" not in path:
        raise ModelError(
            f"{path!r} can't be sampled: expected tinker://<run>/sampler_weights/<name>. "
            "A path with /weights/ is a training state."
        )
    require_key(path)
    with explained(path):
        info = rest_client().get_weights_info_by_tinker_path(path).result()
    base = _connect_hosted(f"tinker:{info.base_model}", info.base_model, renderer)
    return replace(base, reference=path, model_path=path)


def _connect_hosted(reference: str, base_model: str, renderer: str | None) -> Connection:
    require_key(reference)
    require_service(reference)
    with explained(reference):
        capabilities = rest_client().get_server_capabilities().result()
    models = {model.model_name: model for model in capabilities.supported_models}
    model = models.get(base_model)
    if model is None or model.sampleable is False:
        near = get_close_matches(base_model, [str(name) for name in models], n=3, cutoff=0.3)
        problem = "is unknown to the server" if model is None else "can't be sampled"
        raise ModelError(f"{base_model!r} {problem}. Near names: {near}; it has {len(models)}.")
    return Connection(
        reference=reference,
        service=tinker.ServiceClient(),
        base_model=base_model,
        tokenizer_source=base_model,
        renderer_name=renderer or _recommended_renderer(base_model),
        max_context=model.max_context_length,
    )


def _recommended_renderer(base_model: str) -> str:
    from tinker_cookbook.exceptions import ConfigurationError
    from tinker_cookbook.model_info import get_recommended_renderer_name

    try:
        return get_recommended_renderer_name(base_model)
    except (ConfigurationError, KeyError, ValueError) as error:
        raise ModelError(
            f"No renderer is known for {base_model!r}: name one in the recipe (`renderer:`) or "
            f"with --renderer, for example {_TEMPLATE!r}."
        ) from error


def _server(name: str, folder: Path, store: Path | None) -> "Server":
    """The server of a local model: one without a store is served by any that runs."""
    from distill_datasets.embedded.process import launch

    keys = (
        [f"{folder}|{store.resolve()}"]
        if store
        else [k for k in _SERVERS if k.startswith(f"{folder}|")]
    )
    for key in keys:
        if key in _SERVERS and _SERVERS[key].alive:
            return _SERVERS[key]
    server = launch(folder, name=name.removeprefix("embedded:"), store=store)
    _SERVERS[keys[0] if store else f"{folder}|"] = server
    return server


def disconnect(store: Path) -> None:
    """End the local servers that keep their checkpoints in this folder, which stays."""
    for key in [key for key in _SERVERS if key.endswith(f"|{store.resolve()}")]:
        _SERVERS.pop(key).close()


def serve(reference: str, *, host: str, port: int, store: Path | None) -> None:
    """Serve a local model in the foreground, until Ctrl-C."""
    from distill_datasets.embedded.process import serve as serve_folder

    local = reference == "pocket" or reference.startswith("embedded:")
    if not local:
        raise ModelError(
            f"Only local models are served: 'pocket' or 'embedded:<folder>', not {reference!r}."
        )
    name = reference.removeprefix("embedded:")
    folder = resources.pocket() if reference == "pocket" else find_model(name)
    serve_folder(folder, name=name, host=host, port=port, store=store)

"""Connections: a model on a server, and how to render for it."""

import json
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tinker

from distill_datasets.embedded.model import digest_weights, require_fitting
from distill_datasets.embedded.wire import InvalidRequestError
from distill_datasets.errors import ModelError, ServiceError
from distill_datasets.files import pocket_folder
from distill_datasets.models.tinker_sdk import (
    NOT_STATED,
    explained,
    hosted_key,
    hosted_service,
    optional,
    require_service,
    rest_client,
)

if TYPE_CHECKING:
    from distill_datasets.embedded.process import Server
    from distill_datasets.models.renderers import TextRenderer

_TEMPLATE, _POCKET_RENDERER = "distill_datasets/chat_template", "qwen3_instruct"
# By the model's folder, the store, and the number format that was asked for.
_SERVERS: dict[tuple[Path, Path | None, str | None], "Server"] = {}


@dataclass(frozen=True)
class Connection:
    """A model on a server: what is needed to render for it, sample from it and train it.

    `base_model` is the server's name for it, `model_path` a trained checkpoint of it.
    `tokenizer_source` is where its tokenizer is loaded from; `weights` tells two local models of
    one name apart; `server` is the one that was started for a local model.
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
        parts = (self.reference, self.weights, self.model_path, self.renderer_name)
        return "/".join(filter(None, parts))

    @cached_property
    def rest(self) -> tinker.RestClient:
        """What the server says about runs and checkpoints; no session needed."""
        if self.server is None:
            return rest_client(self.reference)
        return tinker.RestClient(base_url=self.server.url, api_key=self.server.api_key)

    def open_session(self) -> Any:
        """A request for a session that samples from this model."""
        path = self.model_path
        base = None if path else self.base_model
        return self.service.create_sampling_client(model_path=path, base_model=base)

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
        """The model's tokenizer; code that comes with it is never run."""
        try:
            return load_tokenizer(self.tokenizer_source)
        except Exception as error:  # libraries raise anything over files of others
            raise ModelError(
                f"The tokenizer of {self.reference!r} can't be loaded: {error} A gated one needs "
                "its licence accepted on the Hub and `hf auth login`; code that comes with a model "
                "is never run."
            ) from error

    @cached_property
    def renderer(self) -> "TextRenderer":
        """The renderer, by its name; raises `ModelError` where the model can't be rendered for."""
        from distill_datasets.models.renderers import open_renderer

        return open_renderer(self.renderer_name, self.tokenizer)


def load_tokenizer(source: str) -> Any:
    """A tokenizer by folder or name, loaded without running code that comes with it.

    Raises whatever the libraries do where that can't be done.
    """
    from tinker_cookbook import tokenizer_utils
    from transformers import AutoTokenizer

    name = source.partition(":")[0]
    if not Path(source).is_dir():
        if tokenizer_utils.is_tokenizer_registered(source) or "/Inkling" in name:
            return tokenizer_utils.get_tokenizer(source)
        if name.startswith("meta-llama/Llama-3"):
            # The same tokenizer, which needs no licence to be accepted.
            name = "thinkingmachineslabinc/meta-llama-3-instruct-tokenizer"
    where = source if Path(source).is_dir() else name
    return AutoTokenizer.from_pretrained(where, trust_remote_code=False)


def connect_local(
    reference: str,
    folder: Path,
    renderer: str | None,
    store: Path | None,
    dtype: str | None = None,
) -> Connection:
    """A local model on a server of its own; see `references.connect`."""
    server = _server(reference, folder, store, dtype)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Connection(
        reference=reference,
        service=tinker.ServiceClient(base_url=server.url, api_key=server.api_key),
        base_model=server.model,
        tokenizer_source=str(folder),
        renderer_name=renderer or _TEMPLATE,
        max_context=config.get("max_position_embeddings"),
        # What was asked in fp32 keeps its name.
        weights=digest_weights(folder) + ("" if server.dtype == "fp32" else f"-{server.dtype}"),
        server=server,
    )


def connect_checkpoint(path: str, renderer: str | None) -> Connection:
    """A trained checkpoint on Tinker, or on a server of its protocol."""
    if "/sampler_weights/" not in path:
        raise ModelError(
            f"{path!r} can't be sampled: expected tinker://<run>/sampler_weights/<name>. "
            "A path with /weights/ is a training state."
        )
    return connect_hosted(path, base_of_state(path), renderer, path)


def base_of_state(path: str) -> str:
    """The base model of a checkpoint or a training state on Tinker."""
    with explained(path):
        info = rest_client(path).get_weights_info_by_tinker_path(path).result()
    return str(info.base_model)


def connect_hosted(
    reference: str, base_model: str, renderer: str | None, model_path: str | None = None
) -> Connection:
    """A base model on Tinker, or on a server of its protocol, or a checkpoint of it."""
    hosted_key(reference)
    require_service(reference)
    with explained(reference):
        asked = rest_client(reference).get_server_capabilities()
        stated = optional(asked, NOT_STATED)
    models = {model.model_name: model for model in stated.supported_models} if stated else {}
    model = models.get(base_model)
    if stated and (model is None or model.sampleable is False):
        near = get_close_matches(base_model, [str(name) for name in models], n=3, cutoff=0.3)
        problem = "is unknown to the server" if model is None else "can't be sampled"
        raise ModelError(f"{base_model!r} {problem}. Near names: {near}; it has {len(models)}.")
    return Connection(
        reference=reference,
        service=hosted_service(reference),
        base_model=base_model,
        tokenizer_source=_tokenizer_of(base_model),
        renderer_name=renderer or _recommended_renderer(base_model),
        max_context=model.max_context_length if model else None,
        model_path=model_path,
    )


def _tokenizer_of(base_model: str) -> str:
    """Where a hosted model's tokenizer is: our own `serve` names models as this machine does."""
    if base_model == "pocket":
        return str(pocket_folder())
    place = Path(base_model).expanduser()
    return str(find_model(base_model)) if place.suffix == ".gguf" or place.is_dir() else base_model


def _recommended_renderer(base_model: str) -> str:
    from tinker_cookbook.exceptions import ConfigurationError
    from tinker_cookbook.model_info import get_recommended_renderer_name

    if base_model == "pocket":
        return _POCKET_RENDERER
    if Path(base_model).expanduser().exists():
        return _TEMPLATE
    try:
        return get_recommended_renderer_name(base_model)
    except (ConfigurationError, KeyError, ValueError) as error:
        raise ModelError(
            f"No renderer is known for {base_model!r}: name one in the recipe (`renderer:`) or "
            f"with --renderer, for example {_TEMPLATE!r}."
        ) from error


def _server(name: str, folder: Path, store: Path | None, dtype: str | None) -> "Server":
    """The server of a local model: one without a store is served by any that runs."""
    from distill_datasets.embedded.process import launch

    asked = folder, store and store.resolve(), dtype
    for key, server in _SERVERS.items():
        same = key == asked or (store is None and (key[0], key[2]) == (folder, dtype))
        if same and server.alive:
            return server
    _SERVERS[asked] = launch(folder, name=name.removeprefix("embedded:"), store=store, dtype=dtype)
    return _SERVERS[asked]


def disconnect(store: Path, dtype: str | None = None) -> None:
    """End the local servers that keep their checkpoints in this folder, which stays, and that were
    asked for in this number format.
    """
    for key in [key for key in _SERVERS if key[1:] == (store.resolve(), dtype)]:
        _SERVERS.pop(key).close()


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


def find_served(reference: str) -> tuple[str, Path]:
    """A local model's name on a server, and its folder; raises `ModelError` for any other."""
    if reference == "pocket":
        return reference, pocket_folder()
    name = reference.removeprefix("embedded:")
    if name == reference:
        raise ModelError(
            f"Only local models are served: 'pocket' or 'embedded:<folder>', not {reference!r}."
        )
    return name, find_model(name)


def find_model(source: str) -> Path:
    """The folder of a local model: itself, what is made of a GGUF file or of an adapter over its
    base, or the Hub's copy on this disk, at the revision behind an `@`.

    Raises `ModelError` where it is none of these.
    """
    from distill_datasets.embedded.sources import open_adapter, open_gguf

    place = Path(source).expanduser()
    if place.suffix == ".gguf" and place.is_file():
        return open_gguf(place.resolve())
    if not (place / "config.json").is_file() and not (place / "adapter_config.json").is_file():
        place = _fetch(source)
    if (place / "adapter_config.json").is_file():
        return open_adapter(place.resolve(), _find_base)
    return place.resolve()


def _find_base(named: str) -> Path:
    """The base that an adapter names: on this disk, since a file of somebody else's says so."""
    place = Path(named.removeprefix("embedded:")).expanduser()
    if named == "pocket":
        return pocket_folder()
    if not (place / "config.json").is_file():
        try:
            place = _fetch(str(place), offline=True)
        except ModelError as error:
            raise ModelError(
                f"The adapter's base {named!r} (base_model_name_or_path) is neither a folder here "
                "nor a model in the Hub's cache: write the base's folder there, or fetch it with "
                f"`hf download {named}`."
            ) from error
    if (place / "adapter_config.json").is_file():
        raise ModelError(f"The adapter's base {named!r} is an adapter itself: name a whole model.")
    return place.resolve()


def _fetch(source: str, *, offline: bool = False) -> Path:
    """A snapshot in the Hub's cache, of weights and texts alone."""
    name, _, revision = source.partition("@")
    if name.count("/") != 1 or Path(source).exists():
        raise ModelError(
            f"'embedded:{source}' is no model: expected a folder with config.json, weights and a "
            "tokenizer with a chat template, a .gguf file, an adapter's folder, or a Hub id like "
            "org/name or org/name@revision."
        )
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
    )

    kinds, at = ["*.json", "*.safetensors", "*.jinja", "*.txt"], revision or None
    try:
        with suppress(RemoteEntryNotFoundError):  # an adapter has none
            config = hf_hub_download(name, "config.json", revision=at, local_files_only=offline)
            require_fitting(Path(config))
        return Path(
            snapshot_download(name, revision=at, allow_patterns=kinds, local_files_only=offline)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError) as error:
        raise ModelError(f"The Hub model {source!r} can't be fetched: {error}") from error
    except InvalidRequestError as error:
        raise ModelError(f"The Hub model {source!r} can't be served here: {error}") from error

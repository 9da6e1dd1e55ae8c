"""Model references such as `openai:gpt-5`: what each names, opened to sample or connected to."""

import json
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import ModelError
from distill_datasets.files import pocket_folder
from distill_datasets.models.sampler import Sampler

if TYPE_CHECKING:
    from distill_datasets.embedded.process import Server
    from distill_datasets.models.tinker import Connection


_EXPECTED = (
    "expected 'pocket', 'embedded:<folder, .gguf file, adapter or Hub id>', 'tinker:<base model>', "
    "'tinker://<run>/sampler_weights/<name>', 'openai:<model>' (as a teacher or a judge), or a "
    "training folder"
)
_CHECKPOINTS = "checkpoints.jsonl"
_TEMPLATE, _POCKET_RENDERER = "distill_datasets/chat_template", "qwen3_instruct"
# By the model's folder, the store, and the number format that was asked for.
_SERVERS: dict[tuple[Path, Path | None, str | None], "Server"] = {}


def open_sampler(  # noqa: PLR0913 (a reference, and how to ask what it names)
    reference: str | Path,
    *,
    renderer: str | None = None,
    stream: bool = False,
    processes: int = 1,
    lazily: bool = False,
    timeout: float | None = None,
) -> Sampler:
    """Something that answers, by its model reference or a training folder.

        sampler = open_sampler("openai:gpt-x", timeout=60)

    Takes seconds for a local model: its server starts here, and ends with this process. With
    `stream`, replies of an `openai:` model say when their first token came; `lazily`, its key and
    its server are looked for before its first request. With more `processes` than one, a Tinker
    model's requests are spread over them, since a client keeps one core busy. `timeout` is in
    seconds, for a whole answer; without it an `openai:` model has 600, and others any time. Raises
    `ModelError` for a reference that names nothing, `AccessError` for a missing key,
    `ServiceError` where nobody answers.
    """
    if str(reference).startswith("openai:"):
        if processes > 1:
            raise ModelError(f"Only Tinker's models take several processes, not {reference!r}.")
        name = str(reference).removeprefix("openai:")
        return _open_openai(name, renderer, stream, lazily, timeout)
    if stream:
        raise ModelError(f"Only 'openai:' models are streamed, not {str(reference)!r}.")
    connection = connect(reference, renderer=renderer)
    from distill_datasets.models.tinker import TinkerSampler

    _ = connection.renderer  # what the model can't be asked for is said before anything is paid
    sampler = TinkerSampler(connection, timeout=timeout)
    if processes == 1:
        return sampler
    from distill_datasets.models.processes import ProcessSampler

    return ProcessSampler(sampler, processes)


def default_student(teacher: str | None) -> str:
    """The student where none is named: the teacher's own model, where that can be trained.

    `teacher` is a model reference, None where there are several. Raises `ModelError` for any
    other, whose student must be named.
    """
    trainable = ("pocket", "tinker:", "embedded:")
    if teacher and teacher.startswith(trainable) and not teacher.startswith("tinker://"):
        return teacher
    said = f"the teacher {teacher!r} can't be trained" if teacher else "no single teacher is known"
    raise ModelError(
        f"Name the student with --student, for example 'tinker:<base model>': {said}, so there is "
        "no default."
    )


def base_of(student: str) -> str | None:
    """The model that a student was trained from: a training folder, or a state on a server.

    None for what is neither.
    """
    if (folder := find_training(student)) is not None:
        return str(read_training(folder)[0]["student"])
    if not student.startswith("tinker://"):
        return None
    return f"tinker:{base_of_state(student)}"


def _open_openai(
    model: str, renderer: str | None, stream: bool, lazily: bool, timeout: float | None
) -> Sampler:
    from distill_datasets.models.openai import OpenAISampler

    if not model:
        raise ModelError("Expected 'openai:<model>', found 'openai:' alone: name the model.")
    if renderer is not None:
        raise ModelError(
            f"Expected no renderer for 'openai:{model}', found {renderer!r}: the server itself "
            "renders messages. Remove `renderer:` or --renderer."
        )
    sampler = OpenAISampler(model, stream=stream, lazily=lazily, timeout=timeout or 600.0)
    if not lazily:
        sampler.reach()
    return sampler


def connect(
    reference: str | Path,
    *,
    renderer: str | None = None,
    store: Path | None = None,
    dtype: str | None = None,
) -> "Connection":
    """Reach the model that a reference names.

    A local model gets its own server, once per process; `store` is the folder of that server's
    checkpoints (a temporary one without it). One that is asked for in a number format, `dtype`, is
    another server, which `disconnect` ends. A training folder connects to its best checkpoint.
    Raises `ModelError`, `AccessError` or `ServiceError`, each with what to set.
    """
    text = str(reference)
    if (folder := find_training(text)) is not None:
        config, checkpoint = read_training(folder)
        renderer, store = renderer or config["renderer"], folder / "checkpoints"
        base = connect(config["student"], renderer=renderer, store=store, dtype=dtype)
        return replace(base, model_path=checkpoint["sampler"])
    if text == "pocket" or text.startswith("embedded:"):
        own = renderer or (_POCKET_RENDERER if text == "pocket" else _TEMPLATE)
        return _connect_local(text, find_served(text)[1], own, store, dtype)
    if text.startswith("tinker://"):
        if "/sampler_weights/" not in text:
            raise ModelError(
                f"{text!r} can't be sampled: expected tinker://<run>/sampler_weights/<name>. "
                "A path with /weights/ is a training state."
            )
        return _connect_hosted(text, base_of_state(text), renderer, text)
    if text.startswith("tinker:"):
        return _connect_hosted(text, text.removeprefix("tinker:"), renderer)
    if text.startswith("openai:"):
        raise ModelError(f"{text!r} answers, and can't be trained: {_EXPECTED}.")
    near = get_close_matches(text.lower(), ["pocket", "embedded:", "tinker:", "openai:"], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ModelError(f"Unknown model reference {text!r}: {_EXPECTED}.{hint}")


def find_training(reference: str | Path) -> Path | None:
    """The training folder that a reference names, itself or by the run's folder around it."""
    places = (Path(reference), Path(reference) / "train")
    return next((place for place in places if (place / _CHECKPOINTS).is_file()), None)


def checkpoints_in(run: Path) -> dict[str, Path]:
    """The training folder of every checkpoint that was saved in a run's folder, by its sampler.

    The folders may have any names; the run's folder may be one itself.
    """
    found = {}
    for log in sorted((*run.glob(_CHECKPOINTS), *run.glob(f"*/{_CHECKPOINTS}"))):
        for line in log.read_text(encoding="utf-8", errors="replace").split("\n"):
            if isinstance(sampler := _json_object(line).get("sampler"), str):
                found[sampler] = log.parent
    return found


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def read_training(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A training folder's configuration, and the line of its best checkpoint.

    Raises `ModelError` where no checkpoint is finished, or where a file is damaged.
    """
    path = folder / "config.json"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    config = _json_object(text)
    # A killed training may leave its last line unfinished, a crash one that is damaged.
    *lines, _ = (folder / _CHECKPOINTS).read_text(encoding="utf-8", errors="replace").split("\n")
    rows = [line for line in map(_json_object, lines) if isinstance(line.get("sampler"), str)]
    best = [row for row in rows if row.get("best")]
    if not all(isinstance(config.get(name), str) for name in ("student", "renderer")):
        raise ModelError(
            f"{str(path)!r} is not a training's, or damaged: run `train` again into another folder."
        )
    if not best:
        raise ModelError(f"{folder} holds no finished checkpoint: run `train` again to finish it.")
    return config, best[-1]


def _connect_local(
    reference: str, folder: Path, renderer: str, store: Path | None, dtype: str | None
) -> "Connection":
    """A local model on a server of its own; see `connect`."""
    import tinker

    from distill_datasets.embedded.model import digest_weights
    from distill_datasets.models.tinker import Connection

    server = _server(reference, folder, store, dtype)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Connection(
        reference=reference,
        service=tinker.ServiceClient(base_url=server.url, api_key=server.api_key),
        base_model=server.model,
        tokenizer_source=str(folder),
        renderer_name=renderer,
        max_context=config.get("max_position_embeddings"),
        # What was asked in fp32 keeps its name.
        weights=digest_weights(folder) + ("" if server.dtype == "fp32" else f"-{server.dtype}"),
        server=server,
    )


def base_of_state(path: str) -> str:
    """The base model of a checkpoint or a training state on Tinker."""
    from distill_datasets.models.tinker import explained, rest_client

    with explained(path):
        info = rest_client(path).get_weights_info_by_tinker_path(path).result()
    return str(info.base_model)


def _connect_hosted(
    reference: str, base_model: str, renderer: str | None, model_path: str | None = None
) -> "Connection":
    """A base model on Tinker, or on a server of its protocol, or a checkpoint of it."""
    from distill_datasets.models import tinker as sdk

    sdk.hosted_key(reference)
    sdk.require_service(reference)
    with sdk.explained(reference):
        asked = sdk.rest_client(reference).get_server_capabilities()
        stated = sdk.optional(asked, sdk.NOT_STATED)
    models = {model.model_name: model for model in stated.supported_models} if stated else {}
    model = models.get(base_model)
    if stated and (model is None or model.sampleable is False):
        near = get_close_matches(base_model, [str(name) for name in models], n=3, cutoff=0.3)
        problem = "is unknown to the server" if model is None else "can't be sampled"
        raise ModelError(f"{base_model!r} {problem}. Near names: {near}; it has {len(models)}.")
    return sdk.Connection(
        reference=reference,
        service=sdk.hosted_service(reference),
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
    from distill_datasets.embedded.conversion import open_adapter, open_gguf

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
    if name.count("/") != 1 or name.startswith(("/", ".", "~")) or Path(source).exists():
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

    from distill_datasets.embedded.model import require_fitting
    from distill_datasets.embedded.wire import InvalidRequestError

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

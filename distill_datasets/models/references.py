"""Resolves model references such as `openai:gpt-5`; `open_sampler` opens what one names."""

import json
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import ModelError
from distill_datasets.files import pocket_folder
from distill_datasets.models.sampler import Sampler

if TYPE_CHECKING:
    from distill_datasets.models.connection import Connection

_EXPECTED = (
    "expected 'pocket', 'embedded:<folder, .gguf file, adapter or Hub id>', 'tinker:<base model>', "
    "'tinker://<run>/sampler_weights/<name>', 'openai:<model>' (as a teacher or a judge), or a "
    "training folder"
)
_CHECKPOINTS = "checkpoints.jsonl"


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
    from distill_datasets.models.tinker import TinkerSampler

    connection = connect(reference, renderer=renderer)
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
    from distill_datasets.models.connection import base_of_state

    return f"tinker:{base_of_state(student)}"


def _open_openai(
    model: str, renderer: str | None, stream: bool, lazily: bool, timeout: float | None
) -> Sampler:
    from distill_datasets.models.openai.client import OpenAISampler

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
    from distill_datasets.models import connection

    text = str(reference)
    if (folder := find_training(text)) is not None:
        return _connect_trained(folder, renderer, dtype)
    if text == "pocket":
        named = renderer or "qwen3_instruct"
        return connection.connect_local(text, pocket_folder(), named, store, dtype)
    if text.startswith("embedded:"):
        model = connection.find_model(text.removeprefix("embedded:"))
        return connection.connect_local(text, model, renderer, store, dtype)
    if text.startswith("tinker://"):
        return connection.connect_checkpoint(text, renderer)
    if text.startswith("tinker:"):
        return connection.connect_hosted(text, text.removeprefix("tinker:"), renderer)
    if text.startswith("openai:"):
        raise ModelError(f"{text!r} answers, and can't be trained: {_EXPECTED}.")
    near = get_close_matches(text.lower(), ["pocket", "embedded:", "tinker:", "openai:"], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ModelError(f"Unknown model reference {text!r}: {_EXPECTED}.{hint}")


def _connect_trained(folder: Path, renderer: str | None, dtype: str | None) -> "Connection":
    config, checkpoint = read_training(folder)
    renderer, store = renderer or config["renderer"], folder / "checkpoints"
    base = connect(config["student"], renderer=renderer, store=store, dtype=dtype)
    return replace(base, model_path=checkpoint["sampler"])


def find_training(reference: str | Path) -> Path | None:
    """The training folder that a reference names, itself or by the run's folder around it."""
    places = (Path(reference), Path(reference) / "train")
    return next((place for place in places if (place / _CHECKPOINTS).is_file()), None)


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
            f"{str(path)!r} is not a training's, or damaged: run `train` again into that folder, "
            "which writes it anew."
        )
    if not best:
        raise ModelError(f"{folder} holds no finished checkpoint: run `train` again to finish it.")
    return config, best[-1]

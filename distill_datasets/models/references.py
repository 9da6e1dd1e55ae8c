"""One backend per file; `open_sampler` finds the one that a model reference names."""

from pathlib import Path

from distill_datasets.errors import ModelError
from distill_datasets.models.sampler import Sampler


def open_sampler(
    reference: str | Path,
    *,
    renderer: str | None = None,
    stream: bool = False,
    processes: int = 1,
    lazily: bool = False,
) -> Sampler:
    """Something that answers, by its model reference or a training folder.

    Takes seconds for a local model: its server starts here, and ends with this process. With
    `stream`, replies of an `openai:` model say when their first token came; `lazily`, its key and
    its server are looked for before its first request. With more `processes` than one, a Tinker
    model's requests are spread over them, since a client keeps one core busy. Raises `ModelError`
    for a reference that names nothing, `AccessError` for a missing key, `ServiceError` where
    nobody answers.
    """
    if str(reference).startswith("openai:"):
        if processes > 1:
            raise ModelError(f"Only Tinker's models take several processes, not {reference!r}.")
        return _open_openai(str(reference).removeprefix("openai:"), renderer, stream, lazily)
    if stream:
        raise ModelError(f"Only 'openai:' models are streamed, not {str(reference)!r}.")
    from distill_datasets.models.connection import connect
    from distill_datasets.models.tinker import TinkerSampler

    sampler = TinkerSampler(connect(reference, renderer=renderer))
    if processes == 1:
        return sampler
    from distill_datasets.models.processes import ProcessSampler

    return ProcessSampler(sampler, processes)


def _open_openai(model: str, renderer: str | None, stream: bool, lazily: bool) -> Sampler:
    from distill_datasets.models.openai.client import OpenAISampler

    if not model or renderer is not None:
        raise ModelError(
            f"Expected 'openai:<model>' and no renderer, found 'openai:{model}' with the renderer "
            f"{renderer!r}: the server itself renders messages. Name the model, and remove "
            "`renderer:` or --renderer."
        )
    sampler = OpenAISampler(model, stream=stream, lazily=lazily)
    if not lazily:
        sampler.reach()
    return sampler

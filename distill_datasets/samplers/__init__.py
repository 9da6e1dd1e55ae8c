"""One backend per file; `open_sampler` finds the one that a model reference names."""

from pathlib import Path

from distill_datasets.sampler import Sampler


def open_sampler(reference: str | Path, *, renderer: str | None = None) -> Sampler:
    """Something that answers, by its model reference or a training folder.

    Takes seconds for a local model: its server starts here, and ends with this process. Raises
    `ModelError` for a reference that names nothing, `AccessError` for a missing key.
    """
    from distill_datasets.connection import connect
    from distill_datasets.samplers.tinker import TinkerSampler

    return TinkerSampler(connect(reference, renderer=renderer))

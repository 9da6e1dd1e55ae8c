"""One embedded server for the test files that only add to it: starting one takes seconds."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import tinker

    from distill_datasets.embedded.process import Server


@dataclass(frozen=True)
class Shared:
    """The tiny model under the name `tiny`, its server, and the folder of its checkpoints."""

    model: Path
    store: Path
    server: Server
    service: tinker.ServiceClient


@cache
def shared() -> Shared:
    """The server of this test process; it ends with it."""
    import tinker

    from distill_datasets.embedded.process import launch
    from tests.support.tiny_model import make_tiny_model

    folder = tempfile.TemporaryDirectory(prefix="distill-tests-")
    # In this order at the end: the server is gone before its folder.
    atexit.register(folder.cleanup)
    model, store = make_tiny_model(Path(folder.name) / "model"), Path(folder.name) / "store"
    server = launch(model, name="tiny", store=store)
    service = tinker.ServiceClient(base_url=server.url, api_key=server.api_key)
    return Shared(model, store, server, service)


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """No training of a test file draws its curves, which takes as long as its steps."""
    from distill_datasets.training.checkpoints import TrainingFolder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingFolder, "draw", lambda folder: None)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A reference to the tiny model: while a test file uses it, local models are served here."""
    import datasets

    from distill_datasets.models import references

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(references, "_server", lambda name, folder, store, dtype: shared().server)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield f"embedded:{shared().model}"

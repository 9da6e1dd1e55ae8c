"""What tests with real servers share: a Hub, an OpenAI-compatible server, and an embedded one."""

import gc

import pyqwest._errors  # noqa: F401 - see distill_datasets/models/tinker.py
import pytest

from tests.support.forks import fork_servers
from tests.support.hub_fixture import hub  # noqa: F401 - a fixture
from tests.support.openai_server import named_server, server  # noqa: F401 - fixtures
from tests.support.shared_server import model, undrawn  # noqa: F401 - fixtures

fork_servers()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """Let clients of servers go while what they are closed with still exists."""
    gc.unfreeze()
    gc.collect()

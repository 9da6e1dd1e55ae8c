"""The `hub` fixture: a Hub of its own for each test, and Python processes that see no other."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support import forks
from tests.support.forks import ROOT
from tests.support.hub_server import Fault, HubServer, Seen
from tests.support.hub_store import Repository


class Hub:
    """A running Hub, whose user is "me" and has an organization "team"; "you" is somebody else."""

    user, organization = "me", "team"
    token, read_token, other_token = "hf_me_write", "hf_me_read", "hf_you_write"

    def __init__(self, folder: Path) -> None:
        tokens = {
            self.token: ("me", "write"),
            self.read_token: ("me", "read"),
            self.other_token: ("you", "write"),
        }
        self.folder = folder
        self.server = HubServer(folder / "hub", tokens, {"team": {"me"}, "others": {"you"}})
        self.server.start()

    @property
    def endpoint(self) -> str:
        return self.server.endpoint

    def log(self, path: str = "", *, method: str = "") -> list[Seen]:
        """The requests so far whose path contains `path`; see also `forget`."""
        seen = list(self.server.seen)
        return [one for one in seen if path in one.path and method in ("", one.method)]

    def forget(self) -> None:
        """Start the log anew."""
        self.server.seen.clear()

    def fault(self, path: str, **how: Any) -> Fault:
        """Let requests whose path matches a pattern go wrong; `Fault` says how."""
        fault = Fault(path, **how)
        self.server.faults.append(fault)
        return fault

    def create(self, name: str, *, kind: str = "datasets", private: bool = False) -> Repository:
        owner = name.split("/")[0]
        return self.server.store.create(kind, name, private=private, author=owner)

    def repository(self, name: str, *, kind: str = "datasets") -> Repository:
        return self.server.store.repositories[kind, name]

    def files(
        self, name: str, revision: str = "main", *, kind: str = "datasets"
    ) -> dict[str, bytes]:
        """The content of every file of a revision."""
        repository = self.repository(name, kind=kind)
        files = repository.resolve(revision).files
        return {path: repository.contents.read(file) for path, file in files.items()}

    def change(
        self, name: str, files: Mapping[str, bytes | None], *, kind: str = "datasets"
    ) -> str:
        """Commit to main as somebody else does on the website: `None` deletes."""
        return self.server.store.change(self.repository(name, kind=kind), files).id

    def environment(self) -> dict[str, str]:
        """What a process needs to know this Hub, and no other host at all."""
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        outside = {"HTTP_PROXY": self.endpoint, "HTTPS_PROXY": self.endpoint}
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "HOME": str(home),
            "HF_HOME": str(home / "hf"),
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "TOKENIZERS_PARALLELISM": "false",
            "MPLBACKEND": "Agg",
            # The secret scanner compiles its rules once for a machine, not once for a test.
            "KF_RULE_CACHE_DIR": str(Path(tempfile.gettempdir()) / "distill-datasets-rules"),
            "NO_PROXY": "127.0.0.1,localhost",
            **outside,
        }

    def run(
        self, code: str | Sequence[str], env: Mapping[str, str | None] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run Python code, or Python with arguments ("-m", …), as a user of this Hub.

        `env` adds to the environment; `None` takes away.
        """
        arguments = ["-c", code] if isinstance(code, str) else [str(part) for part in code]
        merged = {**self.environment(), **(env or {})}
        known = {name: value for name, value in merged.items() if value is not None}

        def begun(kill: Callable[[], None]) -> None:
            self.server.kill = kill

        return forks.run(arguments, env=known, cwd=self.folder, begun=begun, timeout=300)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(tmp_path)
    yield hub
    hub.server.stop()

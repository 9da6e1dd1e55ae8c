"""Releases to push in tests, and the Python that pushes them as a user would."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill_datasets.recipes.recipe import Recipe
from distill_datasets.releases.release import Release, publish
from tests.integration.releases.test_release import PROMPT, answer, write_run
from tests.support.hub_fixture import Hub

PUSH = """
import json, sys
from pathlib import Path
from distill_datasets.errors import DistillError
from distill_datasets.releases.push import push_release
for release, repo, settings in json.loads(sys.argv[1]):
    try:
        pushed = push_release(Path(release), repo, **settings)
    except DistillError as error:
        kind = type(error).__name__
        print(json.dumps({"error": kind, "says": str(error), "exit": error.exit_code}))
    else:
        print(json.dumps(vars(pushed)))
"""


def greetings(folder: Path, **changes: Any) -> Recipe:
    """A recipe with a licence."""
    folder.mkdir(exist_ok=True)
    (folder / "queries.txt").write_text("hello\n", encoding="utf-8")
    fields = {
        "name": "greetings",
        "description": "Which language a greeting is in.",
        "teacher": "pocket",
        "queries": {"file": "queries.txt"},
        "prompt": PROMPT,
        "license": "mit",
        "folder": folder,
    }
    return Recipe(**{**fields, **changes})


def release_of(folder: Path, numbers: range, **changes: Any) -> Release:
    """A release of these answers, where an earlier one may lie."""
    folder.mkdir(exist_ok=True)
    recipe = greetings(folder / "recipe", **changes)
    return publish(write_run(folder / "run", map(answer, numbers), recipe))


def push(
    hub: Hub,
    release: Release,
    repo: str = "me/greetings",
    env: dict[str, str | None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Push in a process of its own; what it returned, or the error that it raised."""
    (found,) = push_all(hub, [(release, repo, settings)], env)
    return found


def push_all(
    hub: Hub,
    pushes: Iterable[tuple[Release, str, dict[str, Any]]],
    env: dict[str, str | None] | None = None,
) -> list[dict[str, Any]]:
    """Push one after another in one process, which is quicker than one for each."""
    wanted = [(str(release.path), repo, settings) for release, repo, settings in pushes]
    done = hub.run(["-c", PUSH, json.dumps(wanted)], env)
    assert hub.token not in done.stdout + done.stderr
    assert done.returncode <= 0, done.stderr
    return [dict(json.loads(line)) for line in done.stdout.splitlines()]


def titles(hub: Hub, repo: str = "me/greetings") -> list[str]:
    """Of main's commits, the newest first."""
    return [commit.title for commit in hub.repository(repo).history()]


def tags(hub: Hub, repo: str = "me/greetings") -> dict[str, str]:
    """Each tag's commit."""
    refs = hub.repository(repo).refs.items()
    return {ref.removeprefix("refs/tags/"): at for ref, at in refs if ref.startswith("refs/tags/")}

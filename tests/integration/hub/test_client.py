import errno
import json
from typing import Any

import pytest

from distill_datasets.errors import HubError, OutputError, RepositoryError
from distill_datasets.hub.client import explained, resolve
from tests.support.hub_fixture import Hub

REPO = "me/data"
USE = """
import json, sys
from distill_datasets.errors import DistillError
from distill_datasets.hub.client import resolve, snapshot
for reference in sys.argv[1:]:
    try:
        dataset = resolve(reference)
        files = {path.name: path.read_text() for path in snapshot(dataset, ["*.txt"]).iterdir()}
    except DistillError as error:
        found = {"error": type(error).__name__, "says": str(error), "exit": error.exit_code}
    else:
        found = {**vars(dataset), "files": files}
    print(json.dumps(found))
"""


def use(hub: Hub, *references: str, **env: str | None) -> list[dict[str, Any]]:
    """Resolve and download in a process of its own."""
    done = hub.run(["-c", USE, *references], env)
    assert done.returncode == 0, done.stderr
    assert hub.token not in done.stdout + done.stderr
    return [dict(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture
def commits(hub: Hub) -> list[str]:
    """Three commits of one file; v1 tags the first, main is the last."""
    hub.create(REPO)
    made = [hub.change(REPO, {"rows.txt": f"version {number}".encode()}) for number in (1, 2, 3)]
    hub.repository(REPO).refs["refs/tags/v1"] = made[0]
    hub.repository(REPO).refs["refs/heads/two"] = made[1]
    return made


def test_a_branch_a_tag_a_commit_and_main_name_commits(hub: Hub, commits: list[str]) -> None:
    references = [REPO, f"{REPO}@v1", f"{REPO}@two", f"{REPO}@{commits[1]}"]
    found = use(hub, *references)
    assert [one["commit"] for one in found] == [commits[2], commits[0], commits[1], commits[1]]
    assert [one["revision"] for one in found] == [None, "v1", "two", commits[1]]
    assert [one["files"]["rows.txt"][-1] for one in found] == ["3", "1", "2", "2"]


def test_offline_the_pinned_revision_or_an_error_comes_back(hub: Hub, commits: list[str]) -> None:
    """`load_dataset` gives whichever version was cached last, and says nothing."""
    use(hub, f"{REPO}@v1", REPO)
    again = [f"{REPO}@v1", REPO, f"{REPO}@{commits[0]}", f"{REPO}@two", f"{REPO}@{commits[1]}"]
    for env in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        found = use(hub, *again, **env)
        assert [one.get("commit") for one in found[:3]] == [commits[0], commits[2], commits[0]]
        assert [one["files"]["rows.txt"][-1] for one in found[:3]] == ["1", "3", "1"]
        assert [one.get("error") for one in found[3:]] == ["HubError", "HubError"]
        assert all(one["says"].endswith(".") and one["exit"] == 1 for one in found[3:])


def test_a_busy_server_is_asked_again(hub: Hub, commits: list[str]) -> None:
    hub.fault(f"/{REPO}/revision/v1", status=503, times=2, headers={"Retry-After": "0"})
    hub.fault(f"/{REPO}/tree", drop="before")
    (found,) = use(hub, f"{REPO}@v1")
    assert found["files"] == {"rows.txt": "version 1"}


@pytest.mark.parametrize(
    ("reference", "env", "says"),
    [
        (f"{REPO}@v9", {}, "has no revision 'v9'"),
        ("me/nothing", {}, "There is no dataset 'me/nothing'"),
        ("me/model", {}, "is a model on the Hub, not a dataset"),
        ("you/secret", {"HF_TOKEN": None}, "There is no Hub token"),
        (REPO, {"HF_TOKEN": "hf_wrong"}, "refused the token"),
    ],
)
def test_a_dataset_that_cannot_be_had_is_explained(
    reference: str, env: dict[str, str | None], says: str, hub: Hub, commits: list[str]
) -> None:
    hub.create("me/model", kind="models")
    hub.create("you/secret", private=True)
    (found,) = use(hub, reference, **env)
    assert says in found["says"], found
    assert (found["error"], found["exit"]) == ("RepositoryError", 2)


@pytest.mark.parametrize("reference", ["rows", "a/b/c", "me/data@", "me/da ta", ""])
def test_what_names_no_dataset_is_told_before_any_request(reference: str) -> None:
    with pytest.raises(RepositoryError, match="expected 'org/name'"):
        resolve(reference)


def test_a_full_disk_is_an_output_error() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OutputError, match="set HF_HOME"), explained(REPO):
        raise full


def test_a_failed_upload_is_told_by_its_cause() -> None:
    def upload() -> None:
        try:
            raise ConnectionResetError("reset by peer")
        except ConnectionResetError as error:
            raise RuntimeError("Error while uploading 'data/x' to the Hub.") from error

    with pytest.raises(HubError, match="reset by peer"), explained(REPO):
        upload()

"""The Hub the tests use, asked by the real clients: what they do on huggingface.co works on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.hub_cards import complaints
from tests.support.hub_fixture import Hub

START = """
import json
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub import snapshot_download

api = HfApi()
DATASET = {"repo_id": "me/colours", "repo_type": "dataset"}

def add(path, content=b"text", **how):
    how |= {"operations": [CommitOperationAdd(path, content)], "commit_message": f"Add {path}"}
    return api.create_commit(**DATASET, **how)

def error(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as found:
        response = getattr(found, "response", None)
        return [type(found).__name__, getattr(response, "status_code", 0), str(found)]

"""


def ask(hub: Hub, code: str, env: dict[str, str | None] | None = None) -> Any:
    """What the code leaves in `answer`."""
    done = hub.run(f"{START}{code}\nprint(json.dumps(answer))", env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_repository_is_made_once_and_keeps_what_is_committed_under_a_tag(hub: Hub) -> None:
    answer = ask(
        hub,
        """
api.create_repo(**DATASET, private=True)
again = error(api.create_repo, **DATASET)
address = str(api.create_repo(**DATASET, exist_ok=True))
api.upload_file(path_or_fileobj=b"---\\nlicense: mit\\n---\\n", path_in_repo="README.md", **DATASET)
made = api.create_commit(
    operations=[
        CommitOperationAdd("data/a.parquet", b"PAR1" * 1000), CommitOperationAdd("a.json", b"{}")
    ],
    commit_message="Two files", commit_description="Of two kinds", **DATASET,
)
api.create_tag(tag="v1.0.0", revision=made.oid, **DATASET)
add("later.txt")
path = hf_hub_download(filename="data/a.parquet", revision="v1.0.0", **DATASET)
folder = snapshot_download(revision="v1.0.0", **DATASET)
answer = {
    "again": again, "address": address, "made": made.oid,
    "user": api.whoami()["name"], "private": api.dataset_info("me/colours").private,
    "tags": [[ref.name, ref.target_commit] for ref in api.list_repo_refs(**DATASET).tags],
    "titles": [commit.title for commit in api.list_repo_commits(**DATASET)],
    "size": len(open(path, "rb").read()), "folder": folder,
    "tag again": error(api.create_tag, tag="v1.0.0", **DATASET),
}
""",
    )
    assert answer["again"][:2] == ["HfHubHTTPError", 409]
    assert answer["address"] == f"{hub.endpoint}/datasets/me/colours"
    assert answer["tags"] == [["v1.0.0", answer["made"]]]
    assert answer["tag again"][:2] == ["HfHubHTTPError", 409]
    titles = ["Add later.txt", "Two files", "Upload README.md with huggingface_hub"]
    assert answer["titles"] == [*titles, "initial commit"]
    assert (answer["user"], answer["private"], answer["size"]) == ("me", True, 4000)
    found = {path.name for path in Path(answer["folder"]).rglob("*") if path.is_file()}
    assert found == {".gitattributes", "README.md", "a.json", "a.parquet"}
    assert hub.files("me/colours", "v1.0.0")["data/a.parquet"] == b"PAR1" * 1000
    assert "later.txt" in hub.files("me/colours")


def test_large_files_go_once_to_another_host_that_never_sees_the_token(hub: Hub) -> None:
    hub.create("me/colours", private=True)
    answer = ask(
        hub,
        """
add("a.bin", b"large")
answer = [add("b.bin", b"large").oid, add("b.bin", b"large").oid]
hf_hub_download(filename="b.bin", **DATASET)
""",
    )
    assert answer[0] == answer[1]
    assert len(hub.log("/commit/")) == 2
    stored = hub.log("/storage/")
    assert [one.method for one in stored] == ["PUT", "GET"]
    assert {one.host.split(":")[0] for one in stored} == {"localhost"}
    assert not any(one.token for one in stored)
    assert not [one for one in hub.log() if one.leak or one.elsewhere]


def test_a_pull_request_changes_main_only_when_merged(hub: Hub) -> None:
    hub.create("me/colours")
    answer = ask(
        hub,
        """
pull = add("a.txt", create_pr=True)
add("b.txt", revision=pull.pr_revision)
before = api.list_repo_files(**DATASET)
add("c.txt")
status = api.get_discussion_details(discussion_num=pull.pr_num, **DATASET).status
api.merge_pull_request(discussion_num=pull.pr_num, **DATASET)
answer = [status, before, api.list_repo_files(**DATASET)]
""",
    )
    assert answer[0] == "open"
    assert answer[1] == [".gitattributes"]
    assert answer[2] == [".gitattributes", "a.txt", "b.txt", "c.txt"]


def test_branches_tags_and_files_come_and_go_and_long_lists_come_in_pages(hub: Hub) -> None:
    hub.create("me/colours")
    hub.change("me/colours", {f"{n}/{n}.txt": b"" for n in range(3)})
    hub.server.reading.page = 3
    answer = ask(
        hub,
        """
add("data/a.txt")
api.create_branch(branch="next", **DATASET)
api.create_tag(tag="v1", **DATASET)
add("data/b.txt", revision="next")
at_tag = error(add, "c.txt", revision="v1")
api.delete_file("data/a.txt", **DATASET)
api.delete_tag(tag="v1", **DATASET)
refs = api.list_repo_refs(**DATASET)
infos = api.get_paths_info(paths=["data", "data/b.txt", "no"], revision="next", **DATASET)
answer = {
    "main": api.list_repo_files(**DATASET), "at_tag": at_tag,
    "branches": [ref.name for ref in refs.branches], "tags": refs.tags,
    "infos": [info.path for info in infos],
}
""",
    )
    assert answer["main"] == [".gitattributes", "0/0.txt", "1/1.txt", "2/2.txt"]
    assert [one.query[-8:] for one in hub.log("/tree/")][1:] == ["cursor=3", "cursor=6"]
    assert answer["at_tag"][1] == 400
    assert (answer["branches"], answer["tags"]) == (["main", "next"], [])
    assert answer["infos"] == ["data", "data/b.txt"]


def test_tokens_say_who_may_do_what(hub: Hub) -> None:
    hub.create("me/colours", private=True)
    hub.create("me/open")
    answer = ask(
        hub,
        f"""
reader, stranger = HfApi(token={hub.read_token!r}), HfApi(token={hub.other_token!r})
nobody, wrong = HfApi(token=False), HfApi(token="hf_wrong")
one = {{"path_or_fileobj": b"", "path_in_repo": "a"}}
answer = [
    error(api.dataset_info, "me/missing"), error(api.dataset_info, "me/colours", revision="v9"),
    error(hf_hub_download, filename="no.txt", **DATASET),
    error(reader.upload_file, **one, **DATASET), error(reader.create_repo, "me/new"),
    error(stranger.dataset_info, "me/colours"), error(nobody.dataset_info, "me/colours"),
    error(stranger.upload_file, **one, repo_id="me/open", repo_type="dataset"),
    error(nobody.create_repo, "me/new"), error(wrong.dataset_info, "me/open"),
    error(api.create_repo, "others/new"),
    reader.dataset_info("me/colours").id, str(api.create_repo("team/new")),
]
""",
    )
    assert [found[:2] for found in answer[:-2]] == [
        ["RepositoryNotFoundError", 404],
        ["RevisionNotFoundError", 404],
        ["RemoteEntryNotFoundError", 404],
        ["HfHubHTTPError", 403],
        ["HfHubHTTPError", 403],
        ["RepositoryNotFoundError", 404],
        ["RepositoryNotFoundError", 401],
        ["HfHubHTTPError", 403],
        ["HfHubHTTPError", 401],
        ["HfHubHTTPError", 401],
        ["HfHubHTTPError", 403],
    ]
    assert answer[-2:] == ["me/colours", f"{hub.endpoint}/team/new"]
    assert hub.repository("team/new", kind="models")


def test_faults_hit_the_requests_they_name_and_no_other(hub: Hub) -> None:
    hub.create("me/colours")
    wait = {"Retry-After": "7"}
    hub.fault("/commit/", skip=1, times=2, status=429, message="slow down", headers=wait)
    hub.fault("/api/datasets/me/colours$", method="GET", status=503)
    answer = ask(
        hub,
        """
answer = [
    error(add, "a.txt"), error(add, "b.txt"), error(add, "c.txt"), error(add, "d.txt"),
    error(api.dataset_info, "me/colours"), error(api.dataset_info, "me/colours"),
]
""",
    )
    assert [found and found[1] for found in answer] == [None, 429, 429, None, 503, None]
    assert "slow down" in answer[1][2]
    assert [one.status for one in hub.log("/commit/")] == [200, 429, 429, 200]
    assert set(hub.files("me/colours")) == {".gitattributes", "a.txt", "d.txt"}


def test_a_dropped_connection_loses_the_commit_or_only_its_answer(hub: Hub) -> None:
    hub.create("me/colours")
    hub.fault("/commit/", drop="before")
    hub.fault("/commit/", drop="after", skip=1)
    answer = ask(hub, "answer = [error(add, 'lost.txt'), error(add, 'kept.txt')]")
    assert [found[0] for found in answer] == ["RemoteProtocolError", "RemoteProtocolError"]
    assert set(hub.files("me/colours")) == {".gitattributes", "kept.txt"}
    assert [one.status for one in hub.log("/commit/")] == [0, 0]


@pytest.mark.parametrize(("moment", "files"), [("before", 1), ("after", 2)])
def test_a_client_dies_before_or_after_its_commit(hub: Hub, moment: str, files: int) -> None:
    hub.create("me/colours")
    hub.fault("/commit/", kill=moment)
    done = hub.run(f"{START}\nadd('a.txt')")
    assert done.returncode == -9
    assert len(hub.files("me/colours")) == files


def test_a_commit_for_a_head_that_somebody_else_just_moved_is_refused(hub: Hub) -> None:
    hub.create("me/colours")
    hub.fault("/commit/", foreign={"theirs.txt": b"theirs"})
    answer = ask(
        hub,
        """
head = api.dataset_info("me/colours").sha
answer = [error(add, "a.txt", parent_commit=head), error(add, "a.txt")]
""",
    )
    assert answer[0][:2] == ["HfHubHTTPError", 412]
    assert "A commit has happened since" in answer[0][2]
    assert answer[1] is None
    assert set(hub.files("me/colours")) == {".gitattributes", "theirs.txt", "a.txt"}


def test_a_request_to_any_other_host_is_refused_and_seen(hub: Hub) -> None:
    answer = ask(hub, "answer = error(HfApi(endpoint='https://huggingface.co').whoami)")
    assert answer[0] == "ProxyError"
    assert [one.host for one in hub.log() if one.elsewhere] == ["huggingface.co"]


def test_datasets_pushes_and_loads_by_tag(hub: Hub) -> None:
    answer = ask(
        hub,
        """
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub import DatasetCard

def push(rows, **how):
    splits = {"train": Dataset.from_dict({"a": rows}), "test": Dataset.from_dict({"a": [0]})}
    return DatasetDict(splits).push_to_hub("me/colours", **how)

first = push([1, 2, 3], private=True)
api.create_tag(tag="v1.0.0", revision=first.oid, **DATASET)
push([4, 5], config_name="other")
push([1])
pull = push([6] * 9, create_pr=True, max_shard_size=30)
stream = load_dataset("me/colours", revision="v1.0.0", streaming=True, split="train")
answer = {
    "v1": load_dataset("me/colours", revision="v1.0.0")["train"]["a"][:],
    "main": load_dataset("me/colours", "default", revision="main")["train"]["a"][:],
    "other": load_dataset("me/colours", "other")["train"]["a"][:],
    "pull": load_dataset("me/colours", "default", revision=pull.pr_revision)["train"]["a"][:],
    "streamed": [row["a"] for row in stream],
    "configs": [one["config_name"] for one in DatasetCard.load("me/colours").data.configs],
}
""",
        {"USE_TORCH": "0"},  # streaming imports it
    )
    assert answer == {
        "v1": [1, 2, 3],
        "main": [1],
        "other": [4, 5],
        "pull": [6] * 9,
        "streamed": [1, 2, 3],
        "configs": ["default", "other"],
    }
    assert hub.repository("me/colours").private
    assert {one.status for one in hub.log("/commit/")} == {200}
    assert not [one for one in hub.log() if one.leak or one.elsewhere]


def test_a_card_the_hub_would_refuse_is_refused() -> None:
    assert complaints("---\nlicense: mine\n---\n", "datasets")
    assert complaints("---\nlanguage: [no]\n---\n", "datasets")
    assert complaints("---\nlicense: [\n---\n", "models")
    assert complaints("---\nconfigs: [{data_files: a}]\n---\n", "datasets")
    assert complaints("---\nmodel-index: [{results: [{task: {}}]}]\n---\n", "models")
    assert not complaints("---\nlicense: cc-by-4.0\nlanguage: [en]\n---\n# Title\n", "datasets")
    assert not complaints("# A card without YAML\n", "models")

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_datasets import parquet as shards
from tests.support.hub_fixture import Hub
from tests.support.releases import push, push_all, release_of, tags, titles

REPO = "me/greetings"
RELEASE, FIRST = "Release 1.0.0", "initial commit"
LOAD = """
import json, sys
from datasets import load_dataset
repo, config, revision = sys.argv[1:]
rows = load_dataset(repo, config, revision=revision)
print(json.dumps({name: len(split) for name, split in rows.items()}))
"""


def load(hub: Hub, repo: str, config: str = "default", revision: str = "main") -> dict[str, int]:
    done = hub.run(["-c", LOAD, repo, config, revision])
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def edit(hub: Hub, old: str, new: str) -> None:
    """Change the card on the Hub as a person does."""
    card = hub.files(REPO)["README.md"].decode()
    assert old in card
    hub.change(REPO, {"README.md": card.replace(old, new).encode()})


def metadata(hub: Hub) -> dict[str, Any]:
    return dict(yaml.safe_load(hub.files(REPO)["README.md"].decode().split("---\n")[1]))


def calls(hub: Hub) -> list[str]:
    """The requests but those that carry shards."""
    shards = ("/storage/", ".git/info/lfs/")
    return [f"{s.method} {s.path}" for s in hub.log() if not any(part in s.path for part in shards)]


def test_a_release_is_one_commit_and_a_tag_on_it(hub: Hub, tmp_path: Path) -> None:
    release = release_of(tmp_path / "one", range(9))
    pushed = push(hub, release)
    assert titles(hub) == [RELEASE, FIRST]
    assert tags(hub) == {"v1.0.0": pushed["commit"]}
    assert hub.repository(REPO).resolve("main").id == pushed["commit"]
    assert (pushed["version"], pushed["why"]) == ("1.0.0", "the first release")
    assert hub.repository(REPO).private
    assert len(calls(hub)) <= 15, calls(hub)
    assert load(hub, REPO, revision="v1.0.0") == {"train": 3, "validation": 3, "test": 3}


def test_the_same_content_is_not_pushed_again(hub: Hub, tmp_path: Path) -> None:
    release = release_of(tmp_path / "one", range(3))
    first = push(hub, release)
    hub.forget()
    again, asked = push_all(hub, [(release, REPO, {}), (release, REPO, {"version": "1.0.0"})])
    assert again == asked == {**first, "changed": False, "why": again["why"]}
    assert "there already" in again["why"]
    assert {seen.method for seen in hub.log()} <= {"GET", "HEAD"}
    assert titles(hub) == [RELEASE, FIRST]


def test_other_content_under_a_tagged_version_is_refused_before_any_upload(
    hub: Hub, tmp_path: Path
) -> None:
    push(hub, release_of(tmp_path / "one", range(3)))
    hub.forget()
    other = release_of(tmp_path / "two", range(1, 5), prompt="Another.")
    refused = push(hub, other, version="1.0.0")
    assert (refused["error"], refused["exit"]) == ("VersionError", 2)
    assert "the prompt changed; 2 rows added; 1 row removed" in refused["says"]
    assert {seen.method for seen in hub.log()} <= {"GET", "HEAD"}


def test_the_next_release_keeps_what_people_wrote_and_says_what_changed(
    hub: Hub, tmp_path: Path
) -> None:
    push(hub, release_of(tmp_path / "one", range(3)))
    edit(hub, "<!-- distill-datasets:end -->", "<!-- distill-datasets:end -->\n\nBelow by hand.")
    edit(hub, "pretty_name: greetings", "pretty_name: Hello!\nours: [1, 2]")
    edit(hub, "- synthetic", "- synthetic\n- mine")
    hub.change(REPO, {"notes/own.txt": b"mine", "data/other.parquet": b"mine too"})
    hub.forget()
    pushed = push(hub, release_of(tmp_path / "two", range(1, 5)))
    assert (pushed["version"], pushed["why"]) == ("1.1.0", "2 rows added; 1 row removed")
    assert len(calls(hub)) <= 15, calls(hub)
    card, files = hub.files(REPO)["README.md"].decode(), hub.files(REPO)
    assert card.endswith("<!-- distill-datasets:end -->\n\nBelow by hand.\n")
    assert "Since version 1.0.0: 2 rows added; 1 row removed." in card
    assert "| 1.0.0 | 2026-11-21 | the first release |" in card
    assert f'load_dataset("{REPO}", revision="v1.1.0")' in card
    found = metadata(hub)
    assert (found["pretty_name"], found["ours"]) == ("Hello!", [1, 2])
    assert {"mine", "synthetic"} <= set(found["tags"])
    assert files["notes/own.txt"] == b"mine" and files["data/other.parquet"] == b"mine too"
    assert sorted(tags(hub)) == ["v1.0.0", "v1.1.0"]


def test_the_next_version_on_the_hub_follows_what_changed_there(hub: Hub, tmp_path: Path) -> None:
    """Each release comes from a run of its own, whose folder knows no other version."""
    changes = [{}, {"description": "Another."}, {"prompt": "Another."}]
    releases = [
        release_of(tmp_path / str(number), range(3), **change)
        for number, change in enumerate(changes)
    ]
    found = push_all(hub, [(release, REPO, {}) for release in releases])
    assert [one["version"] for one in found] == ["1.0.0", "1.0.1", "2.0.0"]
    assert found[1]["why"] == "recipe keys changed: description"
    assert found[2]["why"].startswith("the prompt changed")
    assert [
        entry["version"] for entry in json.loads(hub.files(REPO)["manifest.json"])["history"]
    ] == [
        "2.0.0",
        "1.0.1",
        "1.0.0",
    ]


def test_shards_that_the_next_release_lacks_are_deleted(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty files in one commit: the client's own `push_to_hub` makes two of them."""
    monkeypatch.setattr(shards, "_ROW_GROUP_BYTES", 1)
    monkeypatch.setattr(shards, "_SHARD_BYTES", 1)
    monkeypatch.setattr("distill_datasets.generation.rows._ROWS_AT_ONCE", 1)
    push(hub, release_of(tmp_path / "one", range(60)))
    assert sum(path.endswith(".parquet") for path in hub.files(REPO)) == 61
    push(hub, release_of(tmp_path / "two", range(3)))
    assert [path for path in hub.files(REPO) if path.startswith("data/")] == [
        f"data/train-{number:05d}-of-00003.parquet" for number in range(3)
    ]
    assert len(titles(hub)) == 3


@pytest.mark.parametrize("path", ["/preupload/", "/commit/"])
def test_a_foreign_commit_in_between_stays(path: str, hub: Hub, tmp_path: Path) -> None:
    push(hub, release_of(tmp_path / "one", range(3)))
    hub.fault(path, foreign={"foreign.txt": b"somebody was here"})
    pushed = push(hub, release_of(tmp_path / "two", range(5)))
    assert hub.files(REPO)["foreign.txt"] == b"somebody was here"
    assert titles(hub).count("Release 1.1.0") == 1
    assert tags(hub)["v1.1.0"] == pushed["commit"]


@pytest.mark.slow
def test_a_server_that_is_busy_once_anywhere_delays_and_no_more(hub: Hub, tmp_path: Path) -> None:
    release = release_of(tmp_path / "one", range(3))
    endpoints = ["create", "refs", "tree", "preupload", "batch", "storage", "verify", "commit"]
    endpoints += ["tag", "models"]
    repos = [f"me/busy-{endpoint}" for endpoint in endpoints]
    for endpoint, repo in zip(endpoints, repos, strict=True):
        path = "/repos/create" if endpoint == "create" else f"{endpoint}.*{repo}|{repo}.*{endpoint}"
        hub.fault(path, status=503, headers={"Retry-After": "0"})
    found = push_all(hub, [(release, repo, {}) for repo in repos])
    assert [one.get("tag") for one in found] == ["v1.0.0"] * len(repos), found
    assert not any(fault.times for fault in hub.server.faults)
    for repo in repos:
        assert titles(hub, repo) == [RELEASE, FIRST]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_lost_answer_does_not_make_a_second_commit_or_tag(
    moment: str, hub: Hub, tmp_path: Path
) -> None:
    release = release_of(tmp_path / "one", range(3))
    repos = [f"me/lost-{endpoint}" for endpoint in ("commit", "tag")]
    for repo in repos:
        hub.fault(f"{repo}/{repo.split('-')[1]}/", drop=moment)
    found = push_all(hub, [(release, repo, {}) for repo in repos])
    for repo, pushed in zip(repos, found, strict=True):
        assert titles(hub, repo) == [RELEASE, FIRST]
        assert tags(hub, repo) == {"v1.0.0": pushed["commit"]}
        assert (pushed["changed"], pushed["why"]) == (True, "the first release")


# What is left on the Hub differs most: nothing, a commit without its tag, all of it.
_TELLING = {("create", "before"), ("commit/", "after"), ("tag/", "after")}


@pytest.mark.parametrize(
    ("stage", "moment"),
    [
        pytest.param(stage, moment, marks=() if (stage, moment) in _TELLING else pytest.mark.slow)
        for stage in ("create", "preupload", "storage", "verify", "commit/", "tag/")
        for moment in ("before", "after")
    ],
)
def test_killed_at_any_stage_and_run_again_ends_in_the_same_state(
    stage: str, moment: str, hub: Hub, tmp_path: Path
) -> None:
    release = release_of(tmp_path / "one", range(3))
    hub.fault(stage, kill=moment)
    assert push_all(hub, [(release, REPO, {})]) == []
    pushed = push(hub, release)
    assert titles(hub) == [RELEASE, FIRST]
    assert tags(hub) == {"v1.0.0": pushed["commit"]}
    assert pushed["commit"] == hub.repository(REPO).resolve("main").id


def test_a_release_left_without_its_tag_gets_it_behind_later_commits(
    hub: Hub, tmp_path: Path
) -> None:
    release = release_of(tmp_path / "one", range(3))
    hub.fault("/tag/", kill="before")
    push_all(hub, [(release, REPO, {})])
    commit = hub.repository(REPO).resolve("main").id
    hub.change(REPO, {"notes.txt": b"later"})
    pushed = push(hub, release_of(tmp_path / "two", range(5)))
    assert tags(hub) == {"v1.0.0": commit, "v1.1.0": pushed["commit"]}


@pytest.mark.slow
def test_several_configurations_live_side_by_side(hub: Hub, tmp_path: Path) -> None:
    english = release_of(tmp_path / "en", range(9))
    spanish = release_of(tmp_path / "es", range(4), prompt="En castellano.", languages=("es",))
    found = push_all(hub, [(english, REPO, {}), (spanish, REPO, {"config": "es"})])
    assert [one["version"] for one in found] == ["1.0.0", "1.1.0"]
    assert found[1]["why"] == "the configuration 'es' is new"
    more = release_of(tmp_path / "es", range(6), prompt="En castellano.", languages=("es",))
    assert push(hub, more, config="es")["version"] == "1.2.0"
    assert load(hub, REPO, "es", "v1.1.0") == {"train": 3, "validation": 1}
    assert load(hub, REPO, "es") == {"train": 3, "validation": 3}
    assert load(hub, REPO) == {"train": 3, "validation": 3, "test": 3}
    card = hub.files(REPO)["README.md"].decode()
    assert card.count("<!-- distill-datasets:begin") == 2
    assert f'load_dataset("{REPO}", "es", revision="v1.2.0")' in card
    assert push(hub, english)["changed"] is False


def test_a_pull_request_is_opened_once_and_tagged_when_merged(hub: Hub, tmp_path: Path) -> None:
    release = release_of(tmp_path / "one", range(3))
    hub.create(REPO, private=True)
    first, again = push_all(hub, [(release, REPO, {"create_pr": True})] * 2)
    assert titles(hub) == [FIRST]
    assert (first["tag"], again["changed"]) == (None, False)
    assert first["pull_request"] == again["pull_request"] is not None
    merge = f"HfApi().merge_pull_request({REPO!r}, 1, repo_type='dataset')"
    assert hub.run(f"from huggingface_hub import HfApi; {merge}").returncode == 0
    pushed = push(hub, release)
    assert tags(hub) == {"v1.0.0": hub.repository(REPO).resolve("main").id}
    assert (pushed["changed"], len(titles(hub))) == (True, 2)


def test_a_tag_on_another_commit_is_refused_or_passed_over(hub: Hub, tmp_path: Path) -> None:
    hub.create(REPO, private=True)
    elsewhere = hub.repository(REPO).resolve("main").id
    hub.repository(REPO).refs["refs/tags/v1.0.0"] = elsewhere
    release = release_of(tmp_path / "one", range(3))
    refused, passed = push_all(hub, [(release, REPO, {"version": "1.0.0"}), (release, REPO, {})])
    assert refused["error"] == "VersionError" and elsewhere in refused["says"]
    assert passed["tag"] == "v1.1.0"
    assert tags(hub) == {"v1.0.0": elsewhere, "v1.1.0": passed["commit"]}


def test_rows_of_others_are_not_mixed_in(hub: Hub, tmp_path: Path) -> None:
    hub.create(REPO, private=True)
    hub.change(REPO, {"data/train-00000-of-00002.parquet": b"theirs"})
    release = release_of(tmp_path / "one", range(3))
    refused, beside = push_all(hub, [(release, REPO, {}), (release, REPO, {"config": "mine"})])
    assert refused["error"] == "RepositoryError" and "data/train-00000" in refused["says"]
    assert beside["changed"]


def require_refused(found: dict[str, Any], says: str, code: int = 2) -> None:
    assert says in found["says"], found
    assert found["says"].endswith(".") and "\n" not in found["says"]
    assert found["exit"] == code


def test_each_refusal_is_a_sentence_that_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    refusals: list[tuple[str, dict[str, Any], str]] = [
        ("nowhere/greetings", {}, "'me' may not publish under 'nowhere'"),
        ("me/model", {}, "is a model on the Hub"),
        ("me/seen", {}, "is public on the Hub and the release is to be private"),
        ("not a name", {}, "can't name a repository"),
        (REPO, {"config": "data"}, "can't name a configuration"),
        (REPO, {"version": "1.0"}, "three numbers"),
    ]
    hub.create("me/model", kind="models")
    hub.create("me/seen", private=False)
    release = release_of(tmp_path / "one", range(1))
    found = push_all(hub, [(release, repo, settings) for repo, settings, _ in refusals])
    for refused, (_, _, says) in zip(found, refusals, strict=True):
        require_refused(refused, says)


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"HF_TOKEN": None}, "hf auth login"),
        ({"HF_TOKEN": "hf_wrong"}, "refused the token"),
        ({"HF_TOKEN": "“hf_me”"}, "The Hub token holds signs that no token has"),
        ({"HF_TOKEN": "hf me"}, "The Hub token holds signs that no token has"),
        ({"HF_TOKEN": "hf_me_read"}, "is read-only: set HF_TOKEN"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
    ],
)
def test_a_refusal_of_the_environment_says_what_to_set(
    env: dict[str, str | None], says: str, hub: Hub, tmp_path: Path
) -> None:
    found = push(hub, release_of(tmp_path / "one", range(1)), env=env)
    require_refused(found, says, 1 if "HF_HUB_OFFLINE" in env else 2)


@pytest.mark.parametrize("around", ["{}\r", "{}\n", " {} "])
def test_blanks_around_a_token_are_no_part_of_it(around: str, hub: Hub, tmp_path: Path) -> None:
    env: dict[str, str | None] = {"HF_TOKEN": around.format(hub.token)}
    assert push(hub, release_of(tmp_path / "one", range(1)), env=env)["tag"] == "v1.0.0"


def test_the_user_in_the_hubs_address_is_never_shown(hub: Hub, tmp_path: Path) -> None:
    env: dict[str, str | None] = {"HF_ENDPOINT": "http://ann:s3cretive@127.0.0.1:9"}
    gone = push(hub, release_of(tmp_path / "one", range(1)), env=env)
    assert gone["exit"] == 1 and "s3cretive" not in gone["says"] and "ann" not in gone["says"]


def test_a_changed_or_linked_file_is_never_sent(hub: Hub, tmp_path: Path) -> None:
    release = release_of(tmp_path / "one", range(9))
    (tmp_path / "secret.txt").write_text("mine")
    (release.path / "notes.txt").symlink_to(tmp_path / "secret.txt")
    linked = push(hub, release)
    assert linked["error"] == "DatasetError" and "is a link to" in linked["says"]
    (release.path / "notes.txt").unlink()
    (release.path / "recipe" / "prompt.md").write_text("Another.")
    changed = push(hub, release)
    assert "recipe/prompt.md' has other content" in changed["says"]
    assert not hub.log()


def test_nothing_is_published_for_everybody_without_a_licence(hub: Hub, tmp_path: Path) -> None:
    release = release_of(tmp_path / "one", range(1), license=None)
    refused = push(hub, release, private=False)
    assert "states no licence" in refused["says"] and refused["exit"] == 2
    assert not hub.log()


def test_a_hub_that_stays_away_is_a_service_failure(hub: Hub, tmp_path: Path) -> None:
    release = release_of(tmp_path / "one", range(1))
    hub.fault("/refs", status=503, times=99, headers={"Retry-After": "0"})
    busy = push(hub, release)
    assert "answered 503" in busy["says"] and busy["exit"] == 1
    gone = push(hub, release, env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert "Can't reach http://127.0.0.1:9" in gone["says"] and gone["exit"] == 1


def test_a_server_without_xet_is_told_from_other_failures(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("hf_xet")
    found = push(hub, release_of(tmp_path / "one", range(1)), env={"HF_HUB_DISABLE_XET": None})
    assert "HF_HUB_DISABLE_XET=1" in found["says"] and found["exit"] == 1

"""What the embedded server keeps: checkpoints with their end, and the log of what it executed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from distill_datasets.embedded.process import Server
from distill_datasets.embedded.store import (
    ExecutionLog,
    Store,
    StoredCheckpoint,
    StoredRun,
    copy_checkpoint,
)
from distill_datasets.embedded.wire import InvalidRequestError, MissingError
from distill_datasets.errors import OutputError
from distill_datasets.files import one_writer
from tests.support.server_log import read_log, trained_batches
from tests.support.shared_server import shared

ROOT = Path(__file__).parents[3]
HOUR, DAY = 3600, 86_400
ADAM = types.AdamParams(learning_rate=1e-3)


class Clock:
    """A time that tests set."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def save(store: Store, name: str, ttl_seconds: int | None = None) -> str:
    checkpoint = StoredCheckpoint(
        "run", "weights", name, store.now(), expires_at=store.expiry(ttl_seconds)
    )
    store.write(checkpoint, lambda folder: (folder / "x").write_bytes(b"12345"), overwrite=False)
    return checkpoint.path


def names(store: Store) -> list[str]:
    return sorted(one.name for one in store.checkpoints())


def folders(store: Store) -> list[str]:
    return sorted(path.name for path in store.folder.glob("*/*/*"))


def test_a_checkpoint_is_gone_when_its_time_is_over(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(tmp_path, clock)
    path, kept = save(store, "hour", HOUR), save(store, "kept")
    clock.advance(HOUR - 1)
    assert store.find(path)[0].size_bytes == 5
    assert names(store) == ["hour", "kept"]
    clock.advance(1)
    with pytest.raises(MissingError, match=r"expired at 2026-01-01T01:00:00.*longer ttl_seconds"):
        store.find(path)
    assert folders(store) == ["kept"]
    clock.advance(100 * 365 * DAY)
    assert store.find(kept)


def test_a_listing_deletes_what_is_over_and_so_does_the_next_start(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(tmp_path, clock)
    for name, ttl in (("hour", HOUR), ("day", DAY), ("kept", None)):
        save(store, name, ttl)
    clock.advance(HOUR)
    assert names(store) == ["day", "kept"]
    assert folders(store) == ["day", "kept"]
    clock.advance(DAY)
    assert folders(Store(tmp_path, clock)) == ["kept"]


def test_an_end_can_be_moved_and_removed(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(tmp_path, clock)
    first, second = save(store, "first", HOUR), save(store, "second", HOUR)
    store.set_expiry(first, DAY)
    store.set_expiry(second, None)
    clock.advance(DAY - 1)
    assert names(store) == ["first", "second"]
    clock.advance(1)
    assert names(store) == ["second"]


@pytest.mark.parametrize("seconds", [0, HOUR - 1, 11 * 365 * DAY])
def test_a_time_that_tinker_refuses_is_refused(tmp_path: Path, seconds: int) -> None:
    with pytest.raises(InvalidRequestError, match=r"in 3600\.\.315360000, .*none to keep it"):
        Store(tmp_path).expiry(seconds)


def test_what_a_killed_server_left_half_written_is_removed(tmp_path: Path) -> None:
    save(Store(tmp_path), "kept")
    old, new = tmp_path / "run/weights/.old", tmp_path / "run/weights/.new"
    for draft in (old, new):
        draft.mkdir()
    os.utime(old, (0, 0))
    assert folders(Store(tmp_path)) == [".new", "kept"]


def test_a_log_that_cannot_be_written_says_so_and_fails_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ExecutionLog(tmp_path / "missing", Clock()).add("run", 1, "optim_step")
    assert "lacks {'at': '2026-01-01" in capsys.readouterr().err


@pytest.fixture
def store() -> Path:
    return shared().store


@pytest.fixture
def server() -> Server:
    return shared().server


@pytest.fixture
def service() -> tinker.ServiceClient:
    return shared().service


@pytest.fixture
def rest(server: Server) -> tinker.RestClient:
    return tinker.RestClient(base_url=server.url, api_key=server.api_key)


def trainee(service: tinker.ServiceClient, **options: object) -> tinker.TrainingClient:
    return service.create_lora_training_client("tiny", rank=4, seed=1, **options).result(60)


def rows(seed: int) -> list[types.Datum]:
    tokens = np.random.default_rng(seed).integers(5, 500, 9).tolist()
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * 8}
    return [types.Datum(types.ModelInput.from_ints(tokens[:-1]), inputs)]


def learn(client: tinker.TrainingClient, *seeds: int) -> None:
    for seed in seeds:
        client.forward_backward(rows(seed), "cross_entropy")
        client.optim_step(ADAM).result(60)


def expire(store: Path, path: str) -> None:
    """Let the time of a checkpoint be over."""
    run, kind, name = path.removeprefix("tinker://").split("/")
    record = store / run.replace(":", "_") / kind / name / "checkpoint.json"
    record.write_text(
        json.dumps({**json.loads(record.read_text()), "expires_at": "2026-01-01T00:00:00+00:00"})
    )


def test_an_expired_checkpoint_is_unknown_to_every_request(
    service: tinker.ServiceClient, rest: tinker.RestClient, store: Path
) -> None:
    client = trainee(service)
    states = [client.save_state(f"s{n}", ttl_seconds=DAY).result(60).path for n in range(3)]
    sampler = client.save_weights_for_sampler("sampler", ttl_seconds=DAY).result(60).path
    for path in (*states, sampler):
        expire(store, path)
    with pytest.raises(tinker.NotFoundError, match=r"expired at 2026.*and was deleted"):
        service.create_training_client_from_state(states[0]).result(60)
    with pytest.raises(tinker.NotFoundError, match="expired"):
        rest.get_weights_info_by_tinker_path(states[1]).result(60)
    with pytest.raises(tinker.NotFoundError, match="expired"):
        service.create_sampling_client(model_path=sampler).result(60)
    run = rest.get_training_run_by_tinker_path(states[2]).result(60)
    assert run.last_checkpoint is None
    assert rest.list_checkpoints(run.training_run_id).result(60).checkpoints == []
    with pytest.raises(tinker.NotFoundError, match="found no checkpoint"):
        rest.delete_checkpoint_from_tinker_path(states[2]).result(60)


def test_a_state_tells_what_it_was_saved_as_by_its_path_alone(
    service: tinker.ServiceClient, rest: tinker.RestClient
) -> None:
    client = trainee(service, user_metadata={"dataset": "me/colours@v1"})
    said = {"step": "20", "config": "abc"}
    path = client.save_state("at-20", user_metadata=said).result(60).path
    client.save_weights_for_sampler("at-20", user_metadata=said).result(60)
    client.save_state("at-30", user_metadata={"step": "30"}).result(60)
    run = rest.get_training_run_by_tinker_path(path).result(60)
    assert run.user_metadata == {"dataset": "me/colours@v1"}
    listed = rest.list_checkpoints(run.training_run_id).result(60).checkpoints
    found = {one.checkpoint_id: one.user_metadata for one in listed}
    assert found == {
        "weights/at-20": said,
        "sampler_weights/at-20": said,
        "weights/at-30": {"step": "30"},
    }
    again = client.save_state("at-20", overwrite=True).result(60).path
    listed = rest.list_checkpoints(run.training_run_id).result(60).checkpoints
    assert next(one for one in listed if one.tinker_path == again).user_metadata is None


def test_the_log_tells_which_batches_are_in_which_weights(
    service: tinker.ServiceClient, store: Path
) -> None:
    client = trainee(service)
    learn(client, 0, 1)
    client.forward(rows(7), "cross_entropy").result(60)
    first = client.save_state("rolling").result(60).path
    learn(client, 2, 3)
    lost = client.save_weights_for_sampler("lost").result(60).path
    resumed = service.create_training_client_from_state_with_optimizer(first).result(60)
    learn(resumed, 2)
    client.save_state("rolling", overwrite=True).result(60)
    resumed.forward_backward(rows(9), "cross_entropy").result(60)
    last = resumed.save_state("last").result(60).path
    other = trainee(service)
    learn(other, 0, 1, 2)
    same = other.save_state("same").result(60).path
    assert len(set(trained_batches(store, lost))) == 4
    assert trained_batches(store, last) == trained_batches(store, lost)[:3]
    assert trained_batches(store, same) == trained_batches(store, last)
    assert trained_batches(store, first) == trained_batches(store, lost)
    run = last.removeprefix("tinker://").split("/")[0]
    did = [(one["seq"], one["did"]) for one in read_log(store) if one["run"] == run]
    assert did == [
        (0, "create_model"),
        (0, "load_weights"),
        (1, "forward_backward"),
        (2, "optim_step"),
        (3, "forward_backward"),
        (4, "save_weights"),
    ]


def test_the_server_states_what_it_trains(server: Server, service: tinker.ServiceClient) -> None:
    answer = httpx.get(
        f"{server.url}/api/v1/get_server_capabilities", headers={"X-API-Key": server.api_key}
    )
    model, _ = answer.json()["supported_models"]
    assert (model["trainable"], model["sampleable"]) == (True, True)
    assert {"cross_entropy", "importance_sampling"} <= set(model["loss_fns"])
    most = model["max_lora_rank"]
    with pytest.raises(tinker.RequestFailedError, match=rf"rank in 1\.\.{most}; found {most + 1}"):
        service.create_lora_training_client("tiny", rank=most + 1).result(60)


# Saves "new" over "old" and, in a process of its own for each point, dies at the n-th operation.
DIE = """
import os, signal, sys
from pathlib import Path
from distill_datasets.embedded.store import Store, StoredCheckpoint

folder, store = Path(sys.argv[1]), None

def save(store, content):
    checkpoint = StoredCheckpoint("run", "weights", "state", store.now())
    def fill(folder):
        (folder / "adapter").write_text(content)
        (folder / "optimizer").write_text(content)
    store.write(checkpoint, fill, overwrite=True)

def read(store):
    checkpoint, place = store.find("tinker://run/weights/state")
    return {(place / name).read_text() for name in ("adapter", "optimizer")}

for point in range(1000):
    store = Store(folder / str(point))
    save(store, "old")
    child = os.fork()
    if not child:
        left = point
        def die(event, arguments):
            global left
            if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.unlink"):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(die)
        save(store, "new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(*read(Store(store.folder)), flush=True)
    save(store, "next")
    assert read(store) == {"next"}
    if not os.WIFSIGNALED(status):
        break
"""


def test_a_save_that_is_killed_at_any_point_leaves_the_old_state_or_the_new(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DIE, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    assert len(found) > 10
    # One word a line: never a mixture; and the old state until the new one is whole.
    assert found == ["old"] * found.count("old") + ["new"] * found.count("new")
    assert {"old", "new"} == set(found)


def test_what_is_not_synced_is_not_needed_after_a_power_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy at each rename, in which files that were not synced are empty."""
    source, synced, copies = tmp_path / "store", set(), []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(handle: int) -> None:
        real_sync(handle)
        synced.add(os.fstat(handle).st_ino)

    def copy(place: str, target: str) -> None:
        content = Path(place).read_bytes() if Path(place).stat().st_ino in synced else b""
        Path(target).write_bytes(content)

    def rename(place: Path, target: Path) -> Path:
        moved = real_rename(place, target)
        copies.append(tmp_path / f"copy-{len(copies)}")
        shutil.copytree(source, copies[-1], copy_function=copy)
        return moved

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(Path, "replace", rename)
    store = Store(source)
    for content in (b"old", b"new"):
        checkpoint = StoredCheckpoint("run", "weights", "state", store.now())
        store.write(
            checkpoint,
            lambda folder, content=content: (folder / "x").write_bytes(content) and None,
            overwrite=True,
        )
    store.set_expiry("tinker://run/weights/state", DAY)
    monkeypatch.undo()
    found = []
    for place in copies:
        _, folder = Store(place).find("tinker://run/weights/state")
        found.append((folder / "x").read_bytes())
    assert found == [b"old", b"old", b"new", b"new"]


def test_a_damaged_record_is_named_and_hides_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    good, bad = save(store, "good"), save(store, "bad")
    record = tmp_path / "run/weights/bad/checkpoint.json"
    for content in ("", "{", "[]", '{"name": 1}', '{"created": "yesterday"}', "\x00" * 40):
        record.write_text(content)
        with pytest.raises(MissingError, match=r"bad/checkpoint.json' is damaged"):
            store.find(bad)
        assert names(Store(tmp_path)) == ["good"]
        assert "bad/checkpoint.json' is damaged" in capsys.readouterr().err
    record.unlink()
    with pytest.raises(MissingError, match=r"damaged: .*checkpoint.json' is missing"):
        store.find(bad)
    assert store.find(good)


def test_a_damaged_run_is_named_and_hides_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    layout = {"rank": 4, "seed": 1, "train_unembed": True, "train_mlp": True, "train_attn": True}
    for name in ("good", "bad"):
        store.add_run(StoredRun(name, "tiny", "abc", layout, store.now()))
    record = tmp_path / "bad/run.json"
    for content in ("", "{}", record.read_text().replace('"rank"', '"runk"')):
        record.write_text(content)
        with pytest.raises(MissingError, match=r"bad/run.json' is damaged"):
            store.run("bad")
        assert [run.run_id for run in store.runs()] == ["good"]
        assert "bad/run.json' is damaged" in capsys.readouterr().err


def test_half_a_line_in_the_log_spoils_no_other(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    for content, lines in ((b"", 1), (b'{"at": 1}\n', 2), (b'{"at": 1}\n{"at', 3)):
        log.write_bytes(content)
        ExecutionLog(tmp_path, Clock()).add("run", 1, "optim_step")
        assert len(log.read_text().splitlines()) == lines
        assert json.loads(log.read_text().splitlines()[-1])["did"] == "optim_step"


@pytest.mark.parametrize(
    "path", ["tinker://../weights/x", "tinker://run/weights/..", "tinker://run/weights/.lock"]
)
def test_a_path_leads_nowhere_outside_the_store(tmp_path: Path, path: str) -> None:
    (tmp_path / "checkpoint.json").write_text("{}")
    with pytest.raises(InvalidRequestError, match="expected a name of letters"):
        Store(tmp_path / "store").find(path)
    with pytest.raises(InvalidRequestError, match="expected a name of letters"):
        copy_checkpoint(path, tmp_path, tmp_path / "other")


def test_a_full_disk_is_said_and_leaves_the_old_state(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = save(store, "state")

    def fill(folder: Path) -> None:
        (folder / "x").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint = StoredCheckpoint("run", "weights", "state", store.now())
    with pytest.raises(OutputError, match=r"No space left.*what lay there before is still there"):
        store.write(checkpoint, fill, overwrite=True)
    assert (store.find(path)[1] / "x").read_bytes() == b"12345"


def test_two_processes_do_not_save_to_one_run_at_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with (
        one_writer(tmp_path / "run", "training"),
        pytest.raises(OutputError, match="Another process is at work"),
    ):
        save(store, "state")
    assert save(store, "state")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["torn", "missing", "empty"])
def test_a_damaged_checkpoint_is_named_and_changes_nothing(
    service: tinker.ServiceClient, store: Path, file: str, damage: str
) -> None:
    client = trainee(service)
    learn(client, 0)
    path = client.save_state("whole").result(60).path
    before = client.forward(rows(5), "cross_entropy").result(60).metrics
    run, kind, name = path.removeprefix("tinker://").split("/")
    place = store / run.replace(":", "_") / kind / name / file
    content = {"torn": place.read_bytes()[:-50], "empty": b""}
    place.unlink()
    if damage in content:
        place.write_bytes(content[damage])
    with pytest.raises(tinker.RequestFailedError, match=rf"whole/{file}' can't be read"):
        service.create_training_client_from_state_with_optimizer(path).result(60)
    assert client.forward(rows(5), "cross_entropy").result(60).metrics == before

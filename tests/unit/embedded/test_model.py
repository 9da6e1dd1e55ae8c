"""What a model folder may hold: data, and only its own."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.embedded.engine import Engine
from distill_datasets.embedded.model import ModelCard
from distill_datasets.embedded.store import Store, StoredCheckpoint, StoredRun
from distill_datasets.embedded.wire import InvalidRequestError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of the names that a model folder has; nothing here is loaded."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"max_position_embeddings": 512}')
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    (tmp_path / "secret.json").write_text("{}")
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        ModelCard.read(folder, "model")
    return str(caught.value)


def index(folder: Path, shard: Any) -> None:
    content = json.dumps({"weight_map": {"layer": shard}})
    (folder / "model.safetensors.index.json").write_text(content)


def test_a_plain_folder_is_read(folder: Path) -> None:
    index(folder, "model.safetensors")
    assert ModelCard.read(folder, "model").max_context == 512


@pytest.mark.parametrize("shard", ["../secret.json", "/etc/passwd", "missing.safetensors", 5, ""])
def test_an_index_names_files_beside_it_only(folder: Path, shard: Any) -> None:
    index(folder, shard)
    assert "name files beside it; found" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "chat_template.jinja"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder.parent / "secret.json")
    assert f"{name}' is a link that leads out of the model's folder" in refusal(folder)


def test_a_link_within_the_folder_or_the_hubs_cache_is_followed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.bin")
    (folder / "model.safetensors").symlink_to("weights.bin")
    assert ModelCard.read(folder, "model")
    snapshot, blobs = folder.parent / "snapshots" / "abc", folder.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(folder.iterdir()):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / str(number))
    assert ModelCard.read(snapshot, "model")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "can't be read as JSON"),
        ("[" * 100_000, "can't be read as JSON"),
        ("", "can't be read as JSON"),
        ("[]", "a JSON object"),
        ("{}", "expected max_position_embeddings"),
        ('{"max_position_embeddings": -1}', "max_position_embeddings in 1.."),
        ('{"max_position_embeddings": "512"}', "max_position_embeddings in 1.."),
        ('{"max_position_embeddings": 1e3}', "max_position_embeddings in 1.."),
        ('{"max_position_embeddings": 512, "num_hidden_layers": 1000000000}', "num_hidden_layers"),
        ('{"max_position_embeddings": 512, "vocab_size": 1000000000000}', "vocab_size in 1.."),
        ('{"max_position_embeddings": 512, "quantization_config": {}}', "plain weights"),
        ('{"max_position_embeddings": 512, "transformers_weights": "../x"}', "plain weights"),
    ],
)
def test_a_config_is_held_against_what_runs_here(folder: Path, config: str, said: str) -> None:
    (folder / "config.json").write_text(config)
    assert said in refusal(folder)


def test_an_adapter_is_no_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert "found an adapter over another one" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert "found no " in refusal(folder)


def test_a_checkpoint_over_a_base_that_was_edited_in_the_middle_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    """The fingerprint reads the start of each file; the digest of a run's base reads all of it."""
    content = bytearray(3 << 20)
    (folder / "model.safetensors").write_bytes(content)
    before = ModelCard.read(folder, "model")
    store = Store(tmp_path / "store")
    lora = {"rank": 4, "seed": 0, "train_unembed": True, "train_mlp": True, "train_attn": True}
    paths = []
    for run, digest in (("now", before.weights), ("early", "")):
        known = "model", before.fingerprint, lora, store.now(), None
        store.add_run(StoredRun(run, *known, digest))
        saved = StoredCheckpoint(run, "sampler_weights", "a", store.now())
        paths.append(store.write(saved, lambda draft: None, overwrite=False).path)
    for path in paths:
        assert Engine(before, store).weights_of(path)
    content[2 << 20] = 1
    (folder / "model.safetensors").write_bytes(content)
    after = ModelCard.read(folder, "model")
    assert after.fingerprint == before.fingerprint
    with pytest.raises(InvalidRequestError, match="serve that model instead"):
        Engine(after, store).weights_of(paths[0])
    assert Engine(after, store).weights_of(paths[1])  # from before digests were kept

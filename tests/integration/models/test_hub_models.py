"""Local models that come from the Hub: pinned, weights and texts alone, refused in time."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.support.hub_fixture import Hub
from tests.support.tiny_model import make_tiny_model

FIND = """
from distill_datasets.errors import ModelError
from distill_datasets.models.connection import find_model
try:
    print(find_model({source!r}))
except ModelError as error:
    print(error)
"""


def find(hub: Hub, source: str) -> str:
    done = hub.run(FIND.format(source=source))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_pinned_model_is_fetched_without_code_or_pickles(hub: Hub, tmp_path: Path) -> None:
    tiny = make_tiny_model(tmp_path / "tiny")
    files = {file.name: file.read_bytes() for file in tiny.iterdir()}
    hub.create("me/tiny", kind="models")
    odd = {"modeling.py": b"raise SystemExit(1)", "pytorch_model.bin": b"pickle"}
    first = hub.change("me/tiny", {**files, **odd}, kind="models")
    hub.change("me/tiny", {"model.safetensors": b"another"}, kind="models")
    folder = Path(find(hub, f"me/tiny@{first}"))
    assert folder.name == first
    assert {file.name for file in folder.iterdir()} == set(files)
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    hub.forget()
    assert find(hub, "me/tiny") != str(folder)
    assert "can't be fetched" in find(hub, "me/tiny@gone")
    assert "can't be fetched" in find(hub, "me/none")


def test_a_model_that_fits_into_no_memory_is_not_fetched(hub: Hub) -> None:
    config = {
        "max_position_embeddings": 4096,
        "hidden_size": 1 << 14,
        "intermediate_size": 1 << 16,
        "num_hidden_layers": 500,
        "vocab_size": 1 << 17,
    }
    hub.create("me/huge", kind="models")
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": b"weights"}
    hub.change("me/huge", files, kind="models")
    said = find(hub, "me/huge")
    assert said.startswith("The Hub model 'me/huge' can't be served here:")
    assert "use a smaller model, or a server elsewhere" in said
    assert not hub.log("model.safetensors")


def test_an_adapters_base_is_taken_from_the_cache_and_never_fetched(
    hub: Hub, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "me/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    pair = {f"{layer}.lora_A.weight": np.zeros((4, 8)), f"{layer}.lora_B.weight": np.zeros((8, 4))}
    save_file(pair, folder / "adapter_model.safetensors")
    hub.create("me/base", kind="models")
    hub.change("me/base", {"config.json": b"{}"}, kind="models")
    assert "nor a model in the Hub's cache" in find(hub, str(folder))
    assert not hub.log("me/base")

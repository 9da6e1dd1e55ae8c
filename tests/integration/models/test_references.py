"""Local models that come from the Hub: pinned, weights and texts alone, refused in time."""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from distill_datasets.embedded.model import digest_weights
from distill_datasets.embedded.process import Server, launch
from distill_datasets.errors import AccessError, ModelError, ServiceError
from distill_datasets.models.references import base_of, connect, open_sampler
from distill_datasets.models.sampler import Sampling
from distill_datasets.schema import Message
from tests.support.hub_fixture import Hub
from tests.support.shared_server import shared
from tests.support.tiny_model import make_tiny_model

QUESTION: list[Message] = [{"role": "user", "content": "What language is this?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with launch(model, name=str(model)) as running:
        yield running


@pytest.fixture
def hosted(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The embedded server in the place of Tinker's."""
    monkeypatch.setenv("TINKER_BASE_URL", server.url)
    monkeypatch.setenv("TINKER_API_KEY", server.api_key)
    return server


def test_a_model_on_a_tinker_server_answers(hosted: Server, model: Path) -> None:
    sampler = open_sampler(f"tinker:{model}", renderer="qwen3_instruct")
    reply = asyncio.run(sampler.sample(QUESTION, Sampling(temperature=0.0, max_tokens=5, n=2)))
    assert [sample.text for sample in reply.samples] == [reply.samples[0].text] * 2
    assert reply.samples[0].tokens == 5
    assert reply.samples[0].stop_reason == "length"
    assert reply.usage.prompt_tokens == len(
        connect(f"tinker:{model}", renderer="qwen3_instruct").tokenizer.apply_chat_template(
            QUESTION, add_generation_prompt=True, return_dict=False
        )
    )


def test_an_unknown_model_names_near_ones_before_any_row(hosted: Server, model: Path) -> None:
    with pytest.raises(ModelError, match=r"is unknown to the server\. Near names: .*tiny"):
        connect(f"tinker:{model}y", renderer="qwen3_instruct")


def test_a_model_without_a_known_renderer_says_how_to_name_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", shared().server.url)
    monkeypatch.setenv("TINKER_API_KEY", shared().server.api_key)
    with pytest.raises(ModelError, match="No renderer is known"):
        connect("tinker:tiny")


def test_a_served_model_is_rendered_for_by_the_folder_that_it_lies_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", shared().server.url)
    monkeypatch.setenv("TINKER_API_KEY", shared().server.api_key)
    sampler = open_sampler(f"tinker:{shared().model}")
    reply = asyncio.run(sampler.sample(QUESTION, Sampling(temperature=0.0, max_tokens=3)))
    local = open_sampler(f"embedded:{shared().model}")
    own = asyncio.run(local.sample(QUESTION, Sampling(temperature=0.0, max_tokens=3)))
    assert reply.samples == own.samples


def test_an_unknown_renderer_is_named(hosted: Server, model: Path) -> None:
    with pytest.raises(ModelError, match="Unknown renderer 'qwen9'"):
        _ = connect(f"tinker:{model}", renderer="qwen9").renderer


def test_a_refused_key_says_what_to_check(
    hosted: Server, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "tml-wrong")
    with pytest.raises(AccessError, match="Check TINKER_API_KEY"):
        connect(f"tinker:{model}", renderer="qwen3_instruct")


def test_a_server_that_is_not_there_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("TINKER_API_KEY", "tml-any")
    with pytest.raises(ServiceError, match=r"Can't reach http://127\.0\.0\.1:9"):
        connect("tinker:Qwen/Qwen3-8B")


def test_a_training_state_is_told_from_a_checkpoint() -> None:
    with pytest.raises(ModelError, match="a training state"):
        connect("tinker://run/weights/final")


def test_a_local_model_renders_with_its_own_template(model: Path) -> None:
    connection = connect(f"embedded:{model}")
    assert connection.renderer_name == "distill_datasets/chat_template"
    prompt = connection.renderer.build_generation_prompt([dict(QUESTION[0])])  # type: ignore[list-item]
    assert prompt.to_ints() == connection.tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_dict=False
    )


def test_its_examples_end_with_the_response_and_train_nothing_else(model: Path) -> None:
    renderer = connect(f"embedded:{model}").renderer
    conversation = [*QUESTION, {"role": "assistant", "content": "Final Answer: en"}]
    tokens, weights = renderer.build_supervised_example(conversation)  # type: ignore[arg-type]
    trained = [token for token, weight in zip(tokens.to_ints(), weights, strict=True) if weight]
    message, termination = renderer.parse_response(trained)
    assert message["content"] == "Final Answer: en"
    assert termination.is_clean


def test_one_local_model_has_one_server(model: Path, tmp_path: Path) -> None:
    first = connect(f"embedded:{model}", store=tmp_path / "store")
    again = connect(f"embedded:{model}")
    assert again.service.holder._client_config  # both are connected
    assert first.base_model == again.base_model
    assert first.identity == again.identity


def test_other_weights_are_another_identity(model: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "tiny")
    before = connect(f"embedded:{other}").identity
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    assert connect(f"embedded:{other}").identity != before


@pytest.fixture
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose files were written a while ago, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model-1.safetensors", "model-2.safetensors", "tokenizer.json"):
        write(folder / name, name.encode(), 1_700_000_000)
    return folder


def write(file: Path, content: bytes, seconds: int) -> None:
    file.write_bytes(content)
    os.utime(file, (seconds, seconds))


def whole_digest(folder: Path) -> str:
    content = b"".join(file.read_bytes() for file in sorted(folder.iterdir()))
    return hashlib.sha256(content).hexdigest()[:12]


def cached(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob("*.json"))


def test_weights_are_read_once_while_their_files_stay(settled: Path, tmp_path: Path) -> None:
    assert digest_weights(settled) == whole_digest(settled)
    (note,) = cached(tmp_path)
    note.write_text(note.read_text().replace(whole_digest(settled), "remembered"))
    assert digest_weights(settled).startswith("remembered")
    write(settled / "model-3.safetensors", b"", 1_700_000_000)
    assert digest_weights(settled) == whole_digest(settled)


def test_a_change_that_hides_its_time_is_another_model(settled: Path) -> None:
    before = digest_weights(settled)
    write(settled / "model-1.safetensors", b"MODEL-1.safetensors", 1_700_000_000)
    assert digest_weights(settled) == whole_digest(settled) != before


def test_files_that_were_written_just_now_are_not_remembered(settled: Path, tmp_path: Path) -> None:
    (settled / "tokenizer.json").write_bytes(b"new")
    assert digest_weights(settled) == whole_digest(settled)
    assert not cached(tmp_path)


@pytest.mark.parametrize("kept", [b"", b"{", b"[]", b'{"files": 1}', b"\xff"])
def test_a_damaged_cache_is_read_over(kept: bytes, settled: Path, tmp_path: Path) -> None:
    digest_weights(settled)
    (file,) = cached(tmp_path)
    file.write_bytes(kept)
    assert digest_weights(settled) == whole_digest(settled)
    assert json.loads(file.read_text())["digest"].startswith(whole_digest(settled))


def test_a_cache_that_cannot_be_written_costs_only_time(
    settled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert digest_weights(settled) == whole_digest(settled)


def test_two_processes_may_remember_at_once(settled: Path, tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from distill_datasets.embedded.model import digest_weights
print(digest_weights(Path({str(settled)!r})))
"""
    children = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [child.communicate()[0].strip() for child in children] == [whole_digest(settled)] * 2
    (file,) = cached(tmp_path)
    assert json.loads(file.read_text())["digest"].startswith(whole_digest(settled))


@pytest.mark.parametrize("key", ["tml-{}\r", "tml-{}\n", " tml-{} "])
def test_a_key_with_blanks_around_it_is_trimmed(
    key: str, server: Server, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", f" {server.url}/ ")
    monkeypatch.setenv("TINKER_API_KEY", key.format(server.api_key.removeprefix("tml-")))
    assert connect(f"tinker:{model}", renderer="qwen3_instruct").max_context == 512


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("“tml-secret-secret”", "a quotation mark at place 1 of 19"),
        ("tml-secret secret", "a blank or a sign beyond ASCII at place 11"),
        ("secret-secret", "begins with 'tml-'"),
        (" \n", "needs a key: set TINKER_API_KEY"),
    ],
)
def test_a_key_that_cannot_be_one_is_refused_unseen(
    key: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_API_KEY", key)
    with pytest.raises(AccessError, match=said) as raised:
        connect("tinker:Qwen/Qwen3-8B")
    assert "secret" not in str(raised.value)


def test_an_address_of_tinker_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "tml-any")
    monkeypatch.setenv("TINKER_BASE_URL", "localhost:8000")
    with pytest.raises(ModelError, match="TINKER_BASE_URL: expected https://"):
        connect("tinker:Qwen/Qwen3-8B")


def test_a_state_on_a_server_knows_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", shared().server.url)
    monkeypatch.setenv("TINKER_API_KEY", shared().server.api_key)
    client = shared().service.create_lora_training_client("tiny", rank=2, seed=0).result(60)
    path = client.save_state("kept").result(60).path
    assert base_of(path) == "tinker:tiny"
    assert base_of("nowhere") is None


FIND = """
from distill_datasets.errors import ModelError
from distill_datasets.models.references import find_model
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

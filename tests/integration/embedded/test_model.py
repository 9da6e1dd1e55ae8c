"""The number format and the threads that a model is computed in, and what is said beforehand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distill_datasets.embedded import model, trainer
from distill_datasets.embedded.lora import Adapters, LoraSpec
from distill_datasets.embedded.model import (
    ModelCard,
    ModelSize,
    choose_dtype,
    choose_threads,
    foretell,
    load_model,
)
from distill_datasets.embedded.trainer import AdamParams, Datum, Trainee, TrainRequest
from distill_datasets.embedded.wire import InvalidRequestError
from distill_datasets.errors import ModelError
from distill_datasets.models.references import connect
from tests.support.tiny_model import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LARGE = ModelSize.read(LLAMA_8B)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "distill-datasets" / "speeds.json"


def measured(monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float) -> None:
    speeds = {"fp32": fp32, "bf16": bf16}
    monkeypatch.setattr(model, "_measure_speeds", lambda widths: speeds)


def test_a_models_size_is_read_from_its_config() -> None:
    assert LARGE.parameters == pytest.approx(8.03e9, rel=0.01)
    assert LARGE.parameters - LARGE.active == 128256 * 4096
    experts = ModelSize.read(
        {
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151936,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        }
    )
    assert experts.parameters == pytest.approx(30.5e9, rel=0.01)
    assert experts.active == pytest.approx(3.0e9, rel=0.05)


@pytest.mark.parametrize(("bf16", "chosen"), [(400.0, "bf16"), (120.0, "fp32"), (20.0, "fp32")])
def test_bf16_is_chosen_where_it_is_measured_to_be_faster(
    bf16: float, chosen: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    measured(monkeypatch, 100.0, bf16)
    assert choose_dtype("auto", LARGE) == chosen
    measured(monkeypatch, 1.0, 1.0)  # what a machine can do is found once
    assert choose_dtype("auto", LARGE) == chosen
    (key,) = kept = json.loads(cache.read_text())
    assert key.endswith(f"torch {torch.__version__} 2048x8192")
    assert kept[key] == {"fp32": 100.0, "bf16": bf16}


@pytest.mark.parametrize("kept", ["", "[]", "{", '{"x": 1}'])
def test_a_damaged_note_of_the_speeds_is_measured_anew(kept: str, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(kept)
    found = model.measured_speeds((64, 128))
    assert min(found.values()) > 0
    assert model.measured_speeds((64, 128)) == found


def test_a_small_model_stays_in_fp32_on_one_thread_whatever_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured(monkeypatch, 100.0, 400.0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    small = ModelSize.read({**LLAMA_8B, "hidden_size": 64, "num_hidden_layers": 2})
    assert choose_dtype("auto", small) == "fp32"
    assert choose_threads(None, small) == 1
    assert choose_threads(3, small) == 3


def test_what_a_large_model_takes_is_said_and_one_that_cannot_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured(monkeypatch, 100.0, 400.0)
    monkeypatch.setattr(model, "memory_of", lambda device: 24_000_000_000)
    said = foretell(LARGE, "bf16", "llama")
    assert said == (
        "'llama' has about 8.0 billion parameters (16 GB in bf16): a core of this machine reads "
        "at most 27 tokens a second of a prompt and learns from at most 9 tokens a second"
    )
    with pytest.raises(InvalidRequestError, match=r"take 32 GB in fp32 \(bf16 takes half\); this "):
        foretell(LARGE, "fp32", "llama")


def test_a_model_in_bf16_answers_and_is_another_than_in_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    plain = connect(f"embedded:{folder}").identity
    monkeypatch.setenv("EMBEDDED_DTYPE", "fp32")  # what is asked for by name goes before it
    short = connect(f"embedded:{folder}", store=tmp_path / "store", dtype="bf16")
    assert short.identity == plain.replace(short.weights[:12], f"{short.weights[:12]}-bf16")
    monkeypatch.setenv("EMBEDDED_DTYPE", "half")
    with pytest.raises(ModelError, match="expected a dtype of auto, fp32 or bf16; found 'half'"):
        connect(f"embedded:{folder}", store=tmp_path / "other")


def test_weights_are_loaded_in_the_number_format_that_was_asked_for(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    for dtype, expected in model.torch_dtypes().items():
        loaded = load_model(ModelCard.read(folder, "tiny", dtype, threads=1))
        assert loaded.dtype == expected
        assert {one.dtype for one in loaded.network.parameters()} == {expected}


def trained(folder: Path, dtype: str) -> tuple[list[float], Trainee]:
    base = load_model(ModelCard.read(folder, "tiny", dtype, threads=1))
    trainee = Trainee(base, Adapters(base), LoraSpec(4, seed=0))
    random = np.random.default_rng(0)
    rows = []
    for length in (9, 17, 33):
        tokens = random.integers(5, 500, length + 1)
        weights = np.ones((length, 1), np.float32)
        rows.append(Datum(tokens[:-1], tokens[1:, None], (weights,), hard=True))
    losses = []
    for _ in range(12):
        _, metrics = trainee.forward_backward(TrainRequest(rows, "cross_entropy", False))
        trainee.step(AdamParams(learning_rate=4e-3))
        losses.append(metrics["loss:sum"])
    return losses, trainee


def test_training_in_bf16_learns_as_in_fp32_with_an_adapter_of_all_digits(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    (exact, _), (short, trainee) = trained(folder, "fp32"), trained(folder, "bf16")
    assert exact[-1] < 0.8 * exact[0]
    np.testing.assert_allclose(short, exact, rtol=0.02)
    trainee.save(tmp_path, optimizer=True)
    for name in ("adapter_model", "optimizer"):
        saved = load_file(tmp_path / f"{name}.safetensors")
        assert {one.dtype for one in saved.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", model.DTYPES)
def test_little_memory_changes_no_gradient_and_too_little_is_said(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_model(ModelCard.read(make_tiny_model(tmp_path / "tiny"), "tiny", dtype, threads=1))
    ids = np.arange(5, 70)
    rows = [
        Datum(ids[:length], ids[1 : length + 1, None], (np.ones((length, 1), np.float32),), True)
        for length in (64, 40, 12)
    ]
    asked = TrainRequest(rows, "cross_entropy", False)
    found, computed = [], []
    recomputed, adapters = trainer.recomputed, Adapters(base)

    def counted(*work: Any) -> Any:
        computed.append(work)
        return recomputed(*work)

    monkeypatch.setattr(trainer, "recomputed", counted)
    for memory in (base.memory, 2 * 63 * base.token.learned):
        trainee = Trainee(replace(base, memory=memory), adapters, LoraSpec(4, seed=0))
        trainee.forward_backward(asked)
        found.append([one.grad for one in trainee._parameters])
    assert computed
    for one, other in zip(*found, strict=True):
        apart = torch.linalg.vector_norm(one - other) / (torch.linalg.vector_norm(one) + 1e-9)
        assert apart < (0.03 if dtype == "bf16" else 1e-4)
    small = replace(base, memory=2 * 63 * trainee._least_bytes)
    with pytest.raises(InvalidRequestError, match="found 64 tokens, which take"):
        Trainee(small, adapters, LoraSpec(4, seed=0)).forward_backward(asked)
